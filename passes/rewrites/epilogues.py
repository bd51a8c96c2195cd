"""Carries out fusions: a product of a packed weight and what follows it, as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal
from jaxtyping import Array

from qjax.pallas_kernels.numbers import activations
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.ops.epilogue_matmul.api import fused_matmul
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.values import Fused, Ref, Scope, as_float
from qjax.passes.plan import decisions
from qjax.passes.plan.decisions import Fusion
from qjax.passes.plan.epilogues import Shape, matrix_form, padded
from qjax.passes.rewrites import derivative, inputs, lower

# --- Carrying out ------------------------------------------------------------------------------------------------


def packed_forms(
    dots: Sequence[Any], operands: Sequence[int], read: Callable[[Any], Any]
) -> list[tuple[Ref, lower.DotForm]] | None:
    """The weights of dots and how they are multiplied; None where one is not packed, or for another reading.

    Args:
        dots: equations.
        operands: for each, which operand is the weight.
        read: the value of an atom.
    """
    refs = [read(eqn.invars[operand]) for eqn, operand in zip(dots, operands, strict=True)]
    if any(not isinstance(r, Ref) or not isinstance(r.base, QTensor) or r.shadow is not None for r in refs):
        return None
    forms = [lower.dot_form(eqn, ref, operand) for eqn, ref, operand in zip(dots, refs, operands, strict=True)]
    pairs = [(ref, form) for ref, form in zip(refs, forms, strict=True) if form is not None]
    return pairs if len(pairs) == len(dots) else None


def carried_out(fusion: Fusion, ranges: inputs.RangeArrays) -> Fused:
    """What `passes.jaxpr.replay` does in place of the equations of a region.

    Args:
        fusion: the region.
        ranges: as for `integer.quantized`.
    """

    def rule(eqns: Sequence[Any], read: Any, scope: Scope) -> list[Array] | None:
        dots = [eqns[i] for i in fusion.dots]
        packed = packed_forms(dots, [1] * len(dots), read)
        if packed is None:
            return None
        (ref, *_), forms = zip(*packed, strict=True)
        atoms = [eqns[other.equation].invars[other.operand] for other in fusion.others]
        others = [as_float(read(atom)) for atom in atoms]
        result, last = dots[0].outvars[0].aval, eqns[fusion.equations[-1]].outvars[0]
        shapes = [padded(a.aval.shape, o.axes, len(result.shape)) for a, o in zip(atoms, fusion.others, strict=True)]
        x, value, known = as_float(read(dots[0].invars[0])), None, None
        if fusion.site is not None:
            quantized, value = inputs.quantized_input(fusion.site, fusion.site.inputs[0], x, ranges, scope)
            x, value = inputs.rows_of(quantized, forms[0].rows), forms[0].rows(value)
        else:
            x = forms[0].rows(x)
        scales: list[Array] = []
        if codes := fusion.codes:
            known = inputs.range_of(codes.site, codes.entering, ranges, scope)
            assert known is not None
            scale, zero = activations.known_scale(codes.site.spec, known, len(result.shape))
            scales = [scale] if zero is None else [scale, zero]
        how: dict[str, Any] = {
            "casts": ref.view.casts,
            "precision": dots[0].params["precision"],
            "preferred_element_type": dots[0].params["preferred_element_type"],
        }

        def multiplied(x: Any, value: Array | None, w: QTensor, layer: Any) -> Array:
            if value is None:
                return quantized_matmul(x, w, layer=layer, **how)

            def of_codes(_: Any, operands: Any) -> Array:
                x, w, layer = operands
                return integer_matmul(x.codes, x.scale, x.zero, w, layer=layer, out_dtype=result.dtype)

            def smooth(values: list[Any], operands: Any) -> Array:
                _, w, layer = operands
                return quantized_matmul(values[0], w, layer=layer, **how)

            return derivative.with_derivative(of_codes, smooth, [value], (x, w, layer))

        def program(x: Any, weights: Any, layers: Any, others: Any, beside: Any) -> list[Array]:
            value, known = beside
            values: dict[Any, Any] = dict(zip(atoms, others[: len(atoms)], strict=True))
            products = [multiplied(x, value, w, layer) for w, layer in zip(weights, layers, strict=True)]
            values.update((e.outvars[0], f.result(p)) for e, f, p in zip(dots, forms, products, strict=True))
            for i in sorted((*fusion.repeats, *fusion.steps)):
                operands = [a.val if isinstance(a, Literal) else values[a] for a in eqns[i].invars]
                values[eqns[i].outvars[0]] = control_flow.bind(eqns[i], operands)[0]
            if codes is None:
                return [values[last]]
            made, value = activations.fake_quant(values[last], codes.site.spec, codes.entering.axes, known)
            return [made.codes, value]

        out = fused_matmul(
            x,
            [form.weight for form in forms],
            [*others, *scales],
            layers=[form.layer for form in forms],
            **(how if fusion.site is None else {}),
            epilogue=fusion.epilogue,
            shapes=[*(_matrix_form(shape, result.shape, fusion) for shape in shapes), *((1, 1, 1) for _ in scales)],
            program=program,
            beside=(value, known),
        )
        if codes:
            scope.memo[decisions.key_of(codes.site, codes.entering)] = Activation(out[0], *scales), out[1]
        return [out[-1]]

    return Fused(fusion.body, fusion.equations, rule, place=fusion.equations[-1], reads=fusion.repeats)


def _matrix_form(shape: Shape, result: Shape, fusion: Fusion) -> Shape:
    form = matrix_form(shape, result, fusion.batch, fusion.rows)
    assert form is not None  # the plan saw to it
    return form
