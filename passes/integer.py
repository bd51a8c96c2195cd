"""Matmuls and convolutions whose inputs are quantized, and the taps that calibrate their ranges.

`quantized` makes the rule for one planned equation: its inputs become integer codes (once for all equations of a body
that share an input), the codes are multiplied as integers, and scales are applied to the sum. Served and trained models
run the same code on the same integers. In training, where the weight has a shadow, the result has the derivative of the
float product of the quantized values; where the weight is packed, the derivative in the input alone.

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
from pallas_kernels.activations import Activation, ActSpec
from pallas_kernels.formats import FORMATS, Format, PerChannel, QuantSpec
from pallas_kernels.integer_matmul import integer_matmul
from pallas_kernels.matmul_reference import pick_layer
from pallas_kernels.numerics import Scales
from pallas_kernels.qtensor import Layout, QTensor
from passes import control_flow, lower, observe
from passes.plan import QuantizedSite
from passes.replay import AtRule, Ref, Scope, as_float

RangeArrays = Mapping[str, Mapping[str, Any]]
"""Name of a range -> its arrays, each with one leading axis for every layer scan around the site."""


def _range_of(ranges: RangeArrays, name: str, site: QuantizedSite, scope: Scope) -> dict[str, Array]:
    def pick(a: Any) -> Array:
        a = jnp.asarray(a, jnp.float32)
        for loop in site.loops:
            a = lax.dynamic_index_in_dim(a, scope.indices[loop], 0, keepdims=False)
        return a

    return {part: pick(a) for part, a in ranges[name].items()}


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
        inputs: list[tuple[Activation, Array]] = []
        for entering in site.inputs:
            x = as_float(values[entering.operand])
            key = (entering.flow, entering.axes, site.spec, entering.range)
            if key not in scope.memo:
                known = None if entering.range is None else _range_of(ranges, entering.range, site, scope)
                with jax.named_scope("quantize"):
                    scope.memo[key] = activations.fake_quant(x, site.spec, entering.axes, known)
            inputs.append(scope.memo[key])
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
    ref = None if site.weight is None else values[site.weight]
    exact = None
    if site.product == "integer":
        if ref is None:
            exact = _matmul_of_activations(eqn, codes, site.spec)
        elif isinstance(ref, Ref) and isinstance(ref.base, QTensor):
            exact = _INTEGER[eqn.primitive](eqn, values, ref, site.weight, codes[0], site.spec)

    def smooth(values: list[Any]) -> Array:
        packed = isinstance(ref, Ref) and ref.shadow is None
        rule = lower.RULES.get(eqn.primitive)
        if packed and rule and site.weight is not None and (out := rule(eqn, values, site.weight)) is not None:
            return out[0]
        return control_flow.bind(eqn, [as_float(v) for v in values])[0]

    if exact is None:
        return smooth(values)
    return _with_derivative(exact, smooth, values)


def _with_derivative(exact: Callable[[], Array], smooth: Callable[[list[Any]], Array], values: list[Any]) -> Array:
    """`exact()`, with the derivative of `smooth(values)` in the floats among the values and in shadows."""
    moving = [v.shadow if isinstance(v, Ref) else v for v in values]
    moving = [v if v is not None and jnp.issubdtype(v.dtype, jnp.inexact) else None for v in moving]

    def of(moving: list[Any]) -> Array:
        full = []
        for value, moved in zip(values, moving, strict=True):
            if moved is None:
                full.append(value)
            else:
                full.append(dataclasses.replace(value, shadow=moved) if isinstance(value, Ref) else moved)
        return smooth(full)

    @jax.custom_jvp
    def product(moving: list[Any]) -> Array:
        return exact()

    @product.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        _, tangent = jax.jvp(of, primals, tangents)
        return product(*primals), tangent

    return product(moving)


def _dot(eqn: Any, values: list[Any], ref: Ref, operand: int, x: Activation, spec: ActSpec) -> Any:
    form = lower.dot_form(eqn, ref, operand)
    if form is None:
        return None
    dtype, weight = eqn.outvars[0].aval.dtype, jax.tree.map(lax.stop_gradient, form.weight)

    def exact() -> Array:
        return form.result(integer_matmul(*_rows(x, form.rows), weight, layer=form.layer, out_dtype=dtype))

    return exact


def _rows(x: Activation, rows: Callable[[Array], Array]) -> tuple[Array, Array, Array | None]:
    """Codes `(*stack, M, K)`, and scales and zero points `(*stack, M, 1)`."""
    codes = rows(x.codes)

    def of_rows(a: Array) -> Array:
        if a.size == 1:
            return jnp.broadcast_to(a.reshape((1,) * codes.ndim), (*codes.shape[:-1], 1))
        return rows(a)

    return codes, of_rows(x.scale), None if x.zero is None else of_rows(x.zero)


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

    def exact() -> Array:
        zero = None if y.zero is None else of_columns(y.zero).astype(jnp.int8)
        # Codes of fewer bits are kept one to a byte here: they live for one product.
        plain = QuantSpec(FORMATS["int8"], PerChannel(), zero_point=zero is not None)
        layout = Layout((((k, "k"),), ((n, "n"),)))
        columns = QTensor(y_columns(y.codes), Scales(of_columns(y.scale), zero), plain, layout, jnp.dtype("float32"))
        product = integer_matmul(*_rows(x, x_rows), columns, out_dtype=out.dtype).reshape(out.shape)
        return lower.placed(product, eqn)

    return exact


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

    def exact() -> Array:
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

    return exact


def _ragged(eqn: Any, values: list[Any], ref: Ref, operand: int, x: Activation, spec: ActSpec) -> Any:
    group_axes = eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    picked = lower.pick(ref, [atom for i in group_axes for atom in ref.view.axes[i]])
    if picked is None or len(picked[0].words.shape) - 2 - (picked[1] is not None) != 1:
        return None
    (_, (w_axis,)), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    sizes, out = values[2], eqn.outvars[0].aval

    def exact() -> Array:
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

    return exact


_INTEGER: dict[Any, Callable[..., Any]] = {
    prims.dot_general_p: _dot,
    prims.conv_general_dilated_p: _conv,
    control_flow.ragged_dot_general_p: _ragged,
}
