"""Carries out attention on packed caches as one operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from qjax.pallas_kernels.ops.cache_attention.api import cache_attention
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec, CacheDot
from qjax.passes.jaxpr.values import Cached, Fused, Scope
from qjax.passes.plan.decisions import Attention
from qjax.passes.rewrites.caches import dot_reads


def attend(found: Attention, eqns: Any, read: Callable[[Any], Any]) -> Array | None:
    """The result of the last equation, where both dots read packed caches; else None.

    Args:
        found: the decision.
        eqns: those of the body.
        read: the value of a variable.
    """
    first, last = eqns[found.scores], eqns[found.result]
    operands = [read(atom) for atom in first.invars]
    values = read(last.invars[1 - found.weights])
    packed = [i for i, operand in enumerate(operands) if isinstance(operand, Cached)]
    if len(packed) != 1 or not isinstance(values, Cached):
        return None
    which = packed[0]
    keys, q = operands[which], operands[1 - which]
    mask = None if found.mask is None else read(found.mask)
    if any(hasattr(value, "materialize") for value in (q, mask)):
        return None
    if dot_reads(first, which, keys) != "scores" or dot_reads(last, 1 - found.weights, values) != "values":
        return None
    if mask is not None:
        mask = jnp.reshape(mask != 0, (1,) * (len(found.order) - jnp.ndim(mask)) + jnp.shape(mask))
    spec = AttentionSpec(
        _product(first, which), found.order, found.steps, found.dtype, _product(last, 1 - found.weights)
    )
    if keys.layer is None or values.layer is None:
        return cache_attention(jnp.asarray(q), keys.base, values.base, mask, spec)
    return cache_attention(jnp.asarray(q), keys.stored, values.stored, mask, spec, (keys.layer, values.layer))


def _product(eqn: Any, operand: Any) -> CacheDot:
    return CacheDot(eqn.params["dimension_numbers"], operand, eqn.params["precision"], eqn.outvars[0].aval.dtype)


def fused_attention(found: Attention) -> Fused:
    """The equations of attention as one, where its dots read packed caches when they run."""

    def rule(eqns: Sequence[Any], read: Callable[[Any], Any], scope: Scope) -> list[Any] | None:
        out = attend(found, eqns, read)
        return None if out is None else [out]

    return Fused(found.body, found.equations, rule, place=found.equations[-1])
