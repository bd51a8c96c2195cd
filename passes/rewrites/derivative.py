"""The straight-through derivative of a product of codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.passes.jaxpr.values import Ref


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
