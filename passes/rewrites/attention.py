"""Carries out attention on packed caches as one operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from qjax.pallas_kernels.ops.cache_attention.api import cache_attention
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec, CacheDot
from qjax.passes.jaxpr.values import Cached, Fused, Scope, float_value
from qjax.passes.plan.decisions import Attention


def attend(found: Attention, eqns: Any, read: Callable[[Any], Any]) -> Array:
    """The result of the last of these equations.

    Args:
        found: the decision.
        eqns: those of the body.
        read: the value of a variable.
    """
    first, last = eqns[found.scores], eqns[found.result]
    keys, q = (read(first.invars[operand]) for operand in (found.keys, 1 - found.keys))
    values, mask = read(last.invars[1 - found.weights]), None
    assert isinstance(keys, Cached)
    assert isinstance(values, Cached)
    if found.mask is not None:
        number, operand = found.mask
        mask = float_value(read(eqns[number].invars[operand]))
        mask = jnp.reshape(mask != 0, (1,) * (len(found.order) - jnp.ndim(mask)) + jnp.shape(mask))
    spec = AttentionSpec(
        _product(first, found.keys), found.order, found.steps, found.dtype, _product(last, 1 - found.weights)
    )
    q = jnp.asarray(float_value(q))
    if keys.layer is None or values.layer is None:
        return cache_attention(q, keys.base, values.base, mask, spec)
    return cache_attention(q, keys.stored, values.stored, mask, spec, (keys.layer, values.layer))


def _product(eqn: Any, operand: Any) -> CacheDot:
    return CacheDot(eqn.params["dimension_numbers"], operand, eqn.params["precision"], eqn.outvars[0].aval.dtype)


def fused_attention(found: Attention) -> Fused:
    """The equations of attention as one."""

    def rule(eqns: Sequence[Any], read: Callable[[Any], Any], scope: Scope) -> list[Any]:
        return [attend(found, eqns, read)]

    return Fused(found.body, found.equations, rule, place=found.equations[-1])
