"""Matmuls and convolutions whose inputs are quantized, and the taps that calibrate their ranges.

`quantized` makes the rule for one planned equation: its inputs become codes (once for all equations of a body that
share an input), the codes are multiplied, as integers or as 8-bit floats, and scales are applied to the sum. Served and
trained models run the same code on the same codes. In training, where the weight has a shadow, the result has the
derivative of the float product of the quantized values; where the weight is packed, the derivative in the input alone.

Sums of integers are exact, so what is trained and what is served are equal to the last bit. Those of 8-bit floats are
float32 and equal up to their order (`pallas_kernels.fp8_matmul`).

A product counts as "float" where the plan says so: the quantized values are multiplied by the program's own equation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims
from jaxtyping import Array, Float

from pallas_kernels import activations, numerics, packing
from pallas_kernels.activations import Activation, ActSpec, Ranges
from pallas_kernels.formats import FORMATS, Format, PerChannel, QuantSpec
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.integer_matmul import integer_matmul
from pallas_kernels.matmul_reference import pick_layer
from pallas_kernels.numerics import Scales
from pallas_kernels.qtensor import Layout, QTensor
from passes import control_flow, lower, observe
from passes.plan import QuantizedInput, QuantizedSite
from passes.replay import AtRule, Ref, Scope, as_float

RangeArrays = Mapping[str, Mapping[str, Any]]
"""Name of a range -> its arrays, each with one leading axis for every layer scan around the site."""


def range_of(site: QuantizedSite, entering: QuantizedInput, ranges: RangeArrays, scope: Scope) -> Ranges | None:
    """The arrays of the range of an input, for the step of the layer scans around its site; None where it is dynamic.

    Args:
        site: the decision for an equation.
        entering: one of its inputs.
        ranges, scope: of the call, and of the body with the equation.
    """

    def pick(a: Any) -> Array:
        a = jnp.asarray(a, jnp.float32)
        for loop in site.loops:
            a = lax.dynamic_index_in_dim(a, scope.indices[loop], 0, keepdims=False)
        return a

    return None if entering.range is None else {part: pick(a) for part, a in ranges[entering.range].items()}


def key_of(site: QuantizedSite, entering: QuantizedInput) -> Any:
    """Under which `Scope.memo` has a quantized input: what sites that share it have in common."""
    return entering.flow, entering.axes, site.spec, entering.range


def quantized_input(
    site: QuantizedSite, entering: QuantizedInput, x: Any, ranges: RangeArrays, scope: Scope
) -> tuple[Activation, Array]:
    """`activations.fake_quant` of an input, once in a body; arguments as for `range_of`, and the value in flight."""
    key = key_of(site, entering)
    if key not in scope.memo:
        known = range_of(site, entering, ranges, scope)
        with jax.named_scope("quantize"):
            scope.memo[key] = activations.fake_quant(as_float(x), site.spec, entering.axes, known)
    return scope.memo[key]


def quantized(site: QuantizedSite, ranges: RangeArrays, *, tap: bool = False, enabled: Array | None = None) -> AtRule:
    """The rule for a planned equation.

    Args:
        site: the decision for it.
        ranges: the ranges that are known before the call.
        tap: let out the statistics of its inputs, as calibration does.
        enabled: whether inputs are quantized yet; None for always.
    """

    def rule(eqn: Any, values: list[Any], scope: Scope) -> list[Any]:
        if tap:
            _tap(site, values, scope)
        inputs = [quantized_input(site, i, values[i.operand], ranges, scope) for i in site.inputs]
        out = _product(site, eqn, values, inputs)
        if enabled is not None:
            plain = control_flow.bind(eqn, [as_float(v) for v in values])[0]
            out = jnp.where(enabled, out, plain)
        return [out]

    return rule


def observed(site: QuantizedSite) -> AtRule:
    """The rule of calibration: the program's own equation, and the statistics of its inputs."""

    def rule(eqn: Any, values: list[Any], scope: Scope) -> list[Any]:
        _tap(site, values, scope)
        return control_flow.bind(eqn, [as_float(v) for v in values])

    return rule


def _tap(site: QuantizedSite, values: list[Any], scope: Scope) -> None:
    for entering in site.inputs:
        key = ("tapped", entering.range)
        if entering.range is not None and key not in scope.memo:
            scope.memo[key] = True
            seen = observe.observe(as_float(values[entering.operand]), site.spec, entering.axes)
            scope.tap(entering.range, seen, site.loops)


# --- Products ------------------------------------------------------------------------------------------------------


def _product(site: QuantizedSite, eqn: Any, values: list[Any], inputs: list[tuple[Activation, Array]]) -> Array:
    values = list(values)
    for entering, (_, value) in zip(site.inputs, inputs, strict=True):
        values[entering.operand] = value
    codes = [activation for activation, _ in inputs]

    def of_codes(values: list[Any], codes: list[Activation]) -> Callable[[], Array] | None:
        ref = None if site.weight is None else values[site.weight]
        if site.product == "float":
            return None
        if ref is None:
            return _matmul_of_activations(eqn, codes, site.spec)
        if isinstance(ref, Ref) and isinstance(ref.base, QTensor):
            return _PRODUCTS[eqn.primitive](eqn, values, ref, site.weight, codes[0], site.spec)
        return None

    def smooth(values: list[Any], codes: list[Activation]) -> Array:
        ref = None if site.weight is None else values[site.weight]
        packed = isinstance(ref, Ref) and ref.shadow is None
        rule = lower.RULES.get(eqn.primitive)
        if packed and rule and site.weight is not None and (out := rule(eqn, values, site.weight)) is not None:
            return out[0]
        return control_flow.bind(eqn, [as_float(v) for v in values])[0]

    if of_codes(values, codes) is None:
        return smooth(values, codes)
    return with_derivative(lambda *operands: of_codes(*operands)(), smooth, values, codes)  # type: ignore[misc]


def with_derivative(
    of_codes: Callable[[list[Any], Any], Array],
    smooth: Callable[[list[Any], Any], Array],
    values: list[Any],
    codes: Any,
) -> Array:
    """`of_codes(values, codes)`, with the derivative of `smooth` of them in the floats among the values and in shadows.

    Everything traced that the two read is an operand: a call inside `jit` is differentiated when the trace is over.
    """

    def moving(values: list[Any], like: list[Any]) -> list[Any]:
        each = [(v.shadow, a.shadow) if isinstance(a, Ref) else (v, a) for v, a in zip(values, like, strict=True)]
        return [v if a is not None and jnp.issubdtype(a.dtype, jnp.inexact) else None for v, a in each]

    @jax.custom_jvp
    def product(values: list[Any], codes: Any) -> Array:
        return of_codes(values, codes)

    @product.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        values, codes = primals

        def of(moved: list[Any]) -> Array:
            full = []
            for value, own in zip(values, moved, strict=True):
                if own is None:
                    full.append(value)
                else:
                    full.append(dataclasses.replace(value, shadow=own) if isinstance(value, Ref) else own)
            return smooth(full, codes)

        _, tangent = jax.jvp(of, (moving(values, values),), (moving(tangents[0], values),))
        return product(values, codes), tangent

    return product(values, codes)


def _dot(eqn: Any, values: list[Any], ref: Ref, operand: int, x: Activation, spec: ActSpec) -> Any:
    form = lower.dot_form(eqn, ref, operand)
    if form is None:
        return None
    weight = jax.tree.map(lax.stop_gradient, form.weight)

    def of_codes() -> Array:
        return form.result(_multiplied(eqn, rows_of(x, form.rows), weight, spec, form.layer))

    return of_codes


def _multiplied(eqn: Any, x: Activation, w: QTensor, spec: ActSpec, layer: Any = None) -> Array:
    """The product of the codes of x, in rows, and those of a packed matrix, in the dtype of the equation's result."""
    dtype = eqn.outvars[0].aval.dtype
    if spec.format.kind == "int":
        return integer_matmul(x.codes, x.scale, x.zero, w, layer=layer, out_dtype=dtype)
    codes = lax.bitcast_convert_type(x.codes, jnp.dtype(spec.format.dtype))
    return fp8_matmul(codes, x.scale, w, layer=layer, precision=eqn.params["precision"], out_dtype=dtype)


def rows_of(x: Activation, rows: Callable[[Array], Array]) -> Activation:
    """The same with codes `(*stack, M, K)`, and scales and zero points `(*stack, M, 1)`.

    Args:
        x: a quantized input.
        rows: brings it into that form, as `lower.DotForm.rows`.
    """
    codes = rows(x.codes)

    def of_rows(a: Array) -> Array:
        if a.size == 1:
            return jnp.broadcast_to(a.reshape((1,) * codes.ndim), (*codes.shape[:-1], 1))
        return rows(a)

    return Activation(codes, of_rows(x.scale), None if x.zero is None else of_rows(x.zero))


def _matmul_of_activations(eqn: Any, inputs: list[Activation], spec: ActSpec) -> Callable[[], Array]:
    """Both operands of a dot are codes: the second takes the part of the weight."""
    (x_contract, y_contract), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    x, y = inputs
    shapes = [v.aval.shape for v in eqn.invars]
    free = [
        [i for i in range(len(shape)) if i not in (*contract, *batch)]
        for shape, contract, batch in zip(shapes, (x_contract, y_contract), (x_batch, y_batch), strict=True)
    ]
    stack = tuple(shapes[0][i] for i in x_batch)
    k = math.prod(shapes[0][i] for i in x_contract)
    m, n = (math.prod(shape[i] for i in axes) for shape, axes in zip(shapes, free, strict=True))
    out = eqn.outvars[0].aval

    def x_rows(a: Array) -> Array:
        width = k if a.shape == shapes[0] else 1
        return a.transpose(*x_batch, *free[0], *x_contract).reshape(*stack, m, width)

    def y_columns(a: Array) -> Array:
        height = k if a.shape == shapes[1] else 1
        return a.transpose(*y_batch, *y_contract, *free[1]).reshape(*stack, height, n)

    def of_columns(a: Array) -> Array:
        return jnp.broadcast_to(a.reshape((1,) * (len(stack) + 2)), (*stack, 1, n)) if a.size == 1 else y_columns(a)

    def of_codes() -> Array:
        zero = None if y.zero is None else of_columns(y.zero).astype(jnp.int8)
        # Codes of fewer bits are kept one to a byte here: they live for one product.
        format = FORMATS["int8"] if spec.format.kind == "int" else spec.format
        plain = QuantSpec(format, PerChannel(), zero_point=zero is not None)
        layout = Layout((((k, "k"),), ((n, "n"),)))
        columns = QTensor(y_columns(y.codes), Scales(of_columns(y.scale), zero), plain, layout, jnp.dtype("float32"))
        product = _multiplied(eqn, rows_of(x, x_rows), columns, spec)
        return lower.placed(product.reshape(out.shape), eqn)

    return of_codes


# --- Convolution and ragged dot: integers that float32 holds -------------------------------------------------------
#
# XLA has no fast integer form of these on every platform. Products of codes are small integers, and float32 adds them
# exactly up to 2**24: the program's own equation runs on them, in parts of what is contracted where it must.

_EXACT = 2**24


def _largest(format: Format, centred: bool) -> int:
    """The largest magnitude of a code, or of a code less its zero point."""
    return 2**format.bits - 1 if centred else 2 ** (format.bits - 1)


def _most(x: Activation, spec: ActSpec, q: QTensor) -> int:
    """How many products of codes float32 adds up exactly."""
    largest = _largest(spec.format, x.zero is not None) * _largest(q.spec.format, q.scales.zero is not None)
    return max(1, _EXACT // largest)


def _centred_weight(ref: Ref) -> Float[Array, "*S"]:
    """`code - zero` of a packed weight as the program sees it, casts left out; float32 integers."""
    q = ref.base
    words, scales = q.matrix_arrays()
    codes = packing.unpack(words, q.spec.format, q.layout.k).astype(jnp.float32)
    if scales.zero is not None:
        codes = codes - jnp.broadcast_to(scales.zero.astype(jnp.float32), (*scales.zero.shape[:-2], 1, codes.shape[-1]))
    return dataclasses.replace(ref.view, casts=()).apply(q.layout.from_matrix(codes), ref.indices)


def _bind_float32(eqn: Any, values: list[Any]) -> Array:
    params = eqn.primitive.get_bind_params({**eqn.params, "preferred_element_type": jnp.dtype("float32")})
    return eqn.primitive.bind(*values, **params)


def _conv(eqn: Any, values: list[Any], ref: Ref, operand: int, x: Activation, spec: ActSpec) -> Any:
    picked = lower.pick(ref, [])
    if picked is None:
        return None
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    x_axis, w_axis, out_batch, out_axis = (
        numbers.lhs_spec[1],
        numbers.rhs_spec[1],
        numbers.out_spec[0],
        numbers.out_spec[1],
    )
    out = eqn.outvars[0].aval

    def of_codes() -> Array:
        q = pick_layer(*picked)
        most = _most(x, spec, q)
        codes, weight = x.centred(spec.format), _centred_weight(ref)
        features = weight.shape[w_axis]
        window = math.prod(weight.shape) // max(1, features * weight.shape[numbers.rhs_spec[0]])
        if window * features <= most:
            acc = _bind_float32(eqn, [codes, weight])
        elif groups > 1 or window > most:
            params = {**eqn.params, "preferred_element_type": jnp.dtype("int32")}
            operands = [codes.astype(jnp.int32), weight.astype(jnp.int32)]
            acc = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params)).astype(jnp.float32)
        else:
            acc, step = jnp.zeros(out.shape, jnp.int32), most // window
            for start in range(0, features, step):
                end = min(start + step, features)
                features_of = ((codes, x_axis), (weight, w_axis))
                part = [lax.slice_in_dim(a, start, end, axis=axis) for a, axis in features_of]
                acc = acc + _bind_float32(eqn, part).astype(jnp.int32)
            acc = acc.astype(jnp.float32)
        _, scales = q.matrix_arrays()
        columns = numerics.resolve_scales(scales).reshape(-1)  # one for each output feature, or one
        columns = columns.reshape([columns.size if i == out_axis else 1 for i in range(len(out.shape))])
        rows = x.scale.reshape([x.scale.size if i == out_batch else 1 for i in range(len(out.shape))])
        return (acc * columns * rows).astype(out.dtype)

    return of_codes


def _ragged(eqn: Any, values: list[Any], ref: Ref, operand: int, x: Activation, spec: ActSpec) -> Any:
    group_axes = eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    picked = lower.pick(ref, [atom for i in group_axes for atom in ref.view.axes[i]])
    if picked is None or len(picked[0].words.shape) - 2 - (picked[1] is not None) != 1:
        return None
    (_, (w_axis,)), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    sizes, out = values[2], eqn.outvars[0].aval

    def of_codes() -> Array:
        q = pick_layer(*picked)
        most, k = _most(x, spec, q), q.layout.k
        codes, weight = x.centred(spec.format), _centred_weight(ref)
        acc = jnp.zeros(out.shape, jnp.int32)
        for start in range(0, k, most):
            end = min(start + most, k)
            part = (lax.slice_in_dim(codes, start, end, axis=1), lax.slice_in_dim(weight, start, end, axis=w_axis))
            acc = acc + _bind_float32(eqn, [*part, sizes]).astype(jnp.int32)
        _, scales = q.matrix_arrays()
        expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(codes.shape[0]), side="right")
        columns = numerics.resolve_scales(scales)[:, 0][jnp.minimum(expert, sizes.size - 1)]  # (M, N or 1)
        return (acc.astype(jnp.float32) * columns * x.scale).astype(out.dtype)

    return of_codes


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    prims.dot_general_p: _dot,
    prims.conv_general_dilated_p: _conv,
    control_flow.ragged_dot_general_p: _ragged,
}
