"""Quantized inputs of products: their ranges, their codes, the rows that they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax.pallas_kernels.numbers import activations
from qjax.pallas_kernels.numbers.activations import Activation, Ranges
from qjax.passes.jaxpr import listing
from qjax.passes.jaxpr.values import Scope, as_float
from qjax.passes.plan.decisions import QuantizedInput, QuantizedSite, key_of

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


def quantized_input(
    site: QuantizedSite, entering: QuantizedInput, x: Any, ranges: RangeArrays, scope: Scope
) -> tuple[Activation, Array]:
    """`activations.fake_quant` of an input, once in a body; arguments as for `range_of`, and the value in flight."""
    key = key_of(site, entering)
    if key not in scope.memo:
        known = range_of(site, entering, ranges, scope)
        with listing.scope(f"quantize[{site.spec}]", site.name):
            scope.memo[key] = activations.fake_quant(as_float(x), site.spec, entering.axes, known)
    return scope.memo[key]


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
