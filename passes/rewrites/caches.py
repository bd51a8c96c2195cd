"""A program's equations on packed key-value caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims
from jaxtyping import Array

from qjax.pallas_kernels.ops.cache_dot.api import cache_dot_general
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.passes.jaxpr import control_flow, listing
from qjax.passes.jaxpr.control_flow import CALLS, LOOPS, carries_of
from qjax.passes.jaxpr.moves import MOVES, Move, from_zero
from qjax.passes.jaxpr.trace import Address
from qjax.passes.jaxpr.values import Cached, float_value
from qjax.passes.plan.decisions import CachePlan


@dataclasses.dataclass(frozen=True)
class PackedCaches:
    """The `StateRules` of a plan of caches: what a replay does where packed caches go through."""

    plan: CachePlan

    def entering(self, eqn: Any, values: Sequence[Any], address: Address) -> list[Any]:
        """Operands of a higher-order equation, with each cache in the form in which it enters the bodies.

        Where a loop carries it, that is the `QCache`: a pytree like any other to the loop. What is closed over or
        handed on stays a `Cached`, and so does a stack of which a loop has one element at a time.
        """
        if eqn.primitive not in LOOPS:
            return list(values)
        body = control_flow.bodies(eqn)[-1]
        out = list(values)
        for i, feed in enumerate(body.feeds):
            value = out[feed.operand]
            if not isinstance(value, Cached) or feed.how == "whole":
                continue
            if feed.how == "scanned":
                out[feed.operand] = Cached(value.base) if value.position > 0 else value.materialize()
            else:
                kept = (address, i - body.first_carry) in self.plan.kept
                out[feed.operand] = value.base if kept else value.materialize()
        return out

    def inside(self, values: Sequence[Any]) -> list[Any]:
        """Inputs of a body: a cache that a loop carried is one in flight again."""
        return [Cached(value) if isinstance(value, QCache) else value for value in values]

    def leaving(self, eqn: Any, body: str, values: Sequence[Any], address: Address) -> list[Any]:
        """Results of a body, with each cache in the form in which it leaves: packed where the plan keeps it so.

        One of a stack, of which a scan makes a stack again, is left there.
        """
        if eqn.primitive in CALLS:
            return list(values)
        kept = self.plan.kept if body != "while_cond" else ()
        stacked = carries_of(eqn) if eqn.primitive is prims.scan_p else len(values)
        out = []
        for i, value in enumerate(values):
            if isinstance(value, Cached):
                if (address, i) not in kept:
                    value = value.materialize()
                elif value.layer is None or i < stacked:
                    value = value.base
            out.append(value)
        return out

    def equation(self, eqn: Any, values: Sequence[Any], address: Address) -> list[Any]:
        """A first-order equation of which at least one operand is a cache.

        Args:
            eqn: the equation.
            values: its operands; others may be packed parameters, which are dequantized.
            address: its address; the plan may keep its result packed where the operation alone does not tell.
        """
        move, kept = MOVES.get(eqn.primitive), (address, 0) in self.plan.kept
        caches = [(i, v) for i, v in enumerate(values) if isinstance(v, Cached)]
        if move is not None and (kept or eqn.primitive is not prims.select_n_p):
            for i, cached in caches:
                out = move.follow(eqn, i, cached.position)
                if out is None:
                    continue
                where = move.along(eqn, out, i, cached.position)
                if all(_alike(v.stored, cached.stored) and where.get(j) == v.position for j, v in caches):
                    if eqn.primitive is prims.dynamic_update_slice_p and cached.layer is not None and len(caches) == 1:
                        return [_updated(cached, values[1], values[2:])]
                    return [_moved(move, eqn, values, cached.base, out, where)]
        first, _ = caches[0]
        if (address, first) in self.plan.dots:
            return [_dot(eqn, values, first)]
        return control_flow.bind(eqn, [float_value(v) for v in values])

    def returned(self, values: Sequence[Any]) -> list[Any]:
        """The program's results: packed where they are the new values of packed state, else float.

        A new value that does not come from the old one (a cache filled at once) is quantized here.
        """
        results = self.plan.results or (None,) * len(values)
        out = []
        for value, entry in zip(values, results, strict=True):
            if entry is None:
                out.append(value.materialize() if isinstance(value, Cached) else value)
            else:
                out.append(value.base if isinstance(value, Cached) else entry.pack(float_value(value)))
        return out


def _alike(a: QCache, b: QCache) -> bool:
    return (a.spec, a.size) == (b.spec, b.size)


def _updated(cached: Cached, new: Any, starts: Sequence[Any]) -> Cached:
    """A cache of a stack with new vectors from these indices on, in the stack as it is then."""
    with listing.scope("quantize_cache", "new vectors"):
        update = qcache.quantize(jnp.asarray(float_value(new)), cached.stored.spec, cached.position)
    at = [jnp.asarray(i, jnp.int32) for i in (cached.layer, *from_zero(starts, cached.position))]
    stored = [
        lax.dynamic_update_slice(stack, part[None], at)
        for stack, part in zip(qcache.leaves(cached.stored), qcache.leaves(update), strict=True)
    ]
    axis = cached.position + 1
    like = cached.stored
    return dataclasses.replace(cached, stored=qcache.from_leaves(stored, like, axis, like.dtype))


def _moved(move: Move, eqn: Any, values: Sequence[Any], like: QCache, out: int, where: Mapping[int, int]) -> Cached:
    arrays: dict[int, list[Array]] = {}
    for j, p in where.items():
        value = values[j]
        if not isinstance(value, Cached):
            with listing.scope("quantize_cache", "new vectors"):
                value = Cached(qcache.quantize(jnp.asarray(float_value(value)), like.spec, p))
        arrays[j] = qcache.leaves(value.base)
    first, p = next(iter(where.items()))
    moved = []
    for number in range(len(arrays[first])):
        args = [arrays[j][number] if j in arrays else float_value(v) for j, v in enumerate(values)]
        moved.append(move.run(eqn, args, out, args[first].shape[p]))
    return Cached(qcache.from_leaves(moved, like, out, eqn.outvars[0].aval.dtype))


def _dot(eqn: Any, values: Sequence[Any], operand: Any) -> Array:
    """A product with the codes of an operand."""
    return cache_dot_general(
        jnp.asarray(float_value(values[1 - operand])),
        values[operand].base,
        eqn.params["dimension_numbers"],
        operand=operand,
        precision=eqn.params["precision"],
        out_dtype=eqn.outvars[0].aval.dtype,
    )
