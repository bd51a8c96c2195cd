"""Matmuls and convolutions whose inputs are quantized, and the taps that calibrate their ranges.

`quantized` makes the rule for one planned equation: its inputs become codes (once for all equations of a body that
share an input), the codes are multiplied, as integers or as 8-bit floats, and scales are applied to the sum. Served and
trained models run the same code on the same codes. In training, where the weight has a shadow, the result has the
derivative of the float product of the quantized values; where the weight is packed, the derivative in the input alone.

Sums of integers are exact, so what is trained and what is served are equal to the last bit. Those of 8-bit floats are
float32 and equal up to their order (`pallas_kernels.ops.fp8_matmul`).

A product counts as "float" where the plan says so: the quantized values are multiplied by the program's own equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims
from jaxtyping import Array

from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.formats import FORMATS, PerChannel, QuantSpec
from qjax.pallas_kernels.numbers.stored_scales import Scales
from qjax.pallas_kernels.ops.fp8_matmul.api import fp8_matmul
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.values import AtRule, Ref, Scope, as_float
from qjax.passes.plan.decisions import QuantizedSite
from qjax.passes.rewrites import lower
from qjax.passes.rewrites.derivative import with_derivative
from qjax.passes.rewrites.exact_float_sums import exact_conv, exact_ragged
from qjax.passes.rewrites.inputs import RangeArrays, quantized_input, rows_of
from qjax.passes.rewrites.taps import tap_input


def quantized_product(
    site: QuantizedSite, ranges: RangeArrays, *, tap: bool = False, enabled: Array | None = None
) -> AtRule:
    """The rule for a planned equation.

    Args:
        site: the decision for it.
        ranges: the ranges that are known before the call.
        tap: let out the statistics of its inputs, as calibration does.
        enabled: whether inputs are quantized yet; None for always.
    """

    def rule(eqn: Any, values: list[Any], scope: Scope) -> list[Any]:
        if tap:
            tap_input(site, values, scope)
        inputs = [quantized_input(site, i, values[i.operand], ranges, scope) for i in site.inputs]
        out = _product(site, eqn, values, inputs)
        if enabled is not None:
            plain = control_flow.bind(eqn, [as_float(v) for v in values])[0]
            out = jnp.where(enabled, out, plain)
        return [out]

    return rule


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


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    prims.dot_general_p: _dot,
    prims.conv_general_dilated_p: exact_conv,
    control_flow.ragged_dot_general_p: exact_ragged,
}
