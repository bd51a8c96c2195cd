"""`MOVES`: operations that move the vectors of a key-value cache as wholes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims
from jaxtyping import Array

from qjax.pallas_kernels.ops.cache_dot.axes import reading

# --- Operations that move vectors as wholes --------------------------------------------------------------------
#
# `p` is where the vectors lie in an operand, `out` where they lie in the result. An operation runs on each array of a
# packed cache, whose vector axis is `width` long: R for codes, 1 for scales.


@dataclasses.dataclass(frozen=True)
class Move:
    """An operation that moves vectors as wholes.

    Attributes:
        follow: (eqn, operand, p) -> out, or None where a vector would be cut or mixed.
        run: (eqn, arguments, out, width) -> the result for one array of the cache.
        holds: (eqn, out) -> where vectors lie in each operand that has some: new ones are quantized along it.
    """

    follow: Callable[[Any, int, int], int | None]
    run: Callable[[Any, list[Any], int, int], Any]
    holds: Callable[[Any, int], dict[int, int]] | None = None


def operand_shape(eqn: Any, operand: int = 0) -> tuple[int, ...]:
    """Shape of an operand of an equation."""
    return tuple(eqn.invars[operand].aval.shape)


def _out_shape(eqn: Any, out: int, width: int) -> list[int]:
    shape = list(eqn.outvars[0].aval.shape)
    shape[out] = width
    return shape


def _regrouped(before: Sequence[Any], after: Sequence[Any], p: int) -> int | None:
    """Where axis `p` (longer than 1) lies after a reshape that leaves it whole."""
    lead, at = math.prod(before[:p]), 0
    while at < len(after) and (math.prod(after[:at]) < lead or after[at] == 1):
        at += 1
    whole = at < len(after) and math.prod(after[:at]) == lead and after[at] == before[p]
    return at if whole else None


def _follow_broadcast(eqn: Any, operand: int, p: int) -> int | None:
    out = int(eqn.params["broadcast_dimensions"][p]) if operand == 0 else None
    return out if out is not None and eqn.params["shape"][out] == operand_shape(eqn)[p] else None


def _follow_slice(eqn: Any, operand: int, p: int) -> int | None:
    params = eqn.params
    stride = 1 if params["strides"] is None else params["strides"][p]
    return (
        p if (params["start_indices"][p], params["limit_indices"][p], stride) == (0, operand_shape(eqn)[p], 1) else None
    )


def _run_slice(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    limits = list(eqn.params["limit_indices"])
    limits[out] = width
    return lax.slice(args[0], eqn.params["start_indices"], limits, eqn.params["strides"])


def from_zero(starts: Sequence[Any], p: int) -> list[Any]:
    """Start indices that take an axis whole; XLA would clamp this one to 0."""
    return [jnp.zeros_like(start) if i == p else start for i, start in enumerate(starts)]


def _run_dynamic_slice(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    sizes = list(eqn.params["slice_sizes"])
    sizes[out] = width
    return lax.dynamic_slice(args[0], from_zero(args[1:], out), sizes)


def _follow_update(eqn: Any, operand: int, p: int) -> int | None:
    return p if operand == 0 and operand_shape(eqn, 1)[p] == operand_shape(eqn)[p] else None


def _run_update(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    return lax.dynamic_update_slice(args[0], args[1], from_zero(args[2:], out))


def _run_select(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    which, *cases = args
    if which.ndim:  # constant along the vectors, as the plan has found
        which = jnp.broadcast_to(lax.slice_in_dim(which, 0, 1, axis=out), cases[0].shape)
    return lax.select_n(which, *cases)


def _stays_in_bounds(eqn: Any, p: int, indexed: Sequence[Any]) -> bool:
    """Whether a start index on the vector axis, which is taken whole, can only mean 0."""
    clamped = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return p not in tuple(indexed) or eqn.params["mode"] in clamped


def window_axes(axes: int, without: Sequence[Any]) -> list[int]:
    """The axes of a window: all but those that are indexed away."""
    return [i for i in range(axes) if i not in without]


def _follow_scatter(eqn: Any, operand: int, p: int) -> int | None:
    numbers = eqn.params["dimension_numbers"]
    away = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    if operand != 0 or p in away or not _stays_in_bounds(eqn, p, numbers.scatter_dims_to_operand_dims):
        return None
    return p if operand_shape(eqn, 2)[_scatter_holds(eqn, p)[2]] == operand_shape(eqn)[p] else None


def _scatter_holds(eqn: Any, out: int) -> dict[int, int]:
    numbers = eqn.params["dimension_numbers"]
    window = window_axes(len(operand_shape(eqn)), (*numbers.inserted_window_dims, *numbers.operand_batching_dims))
    return {0: out, 2: int(numbers.update_window_dims[window.index(out)])}


def _run_scatter(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    params = eqn.params
    return lax.scatter(
        args[0],
        args[1],
        args[2],
        params["dimension_numbers"],
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
    )


def _follow_gather(eqn: Any, operand: int, p: int) -> int | None:
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    away = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if operand != 0 or p in away or params["slice_sizes"][p] != operand_shape(eqn)[p]:
        return None
    if not _stays_in_bounds(eqn, p, numbers.start_index_map):
        return None
    fill = params["fill_value"]  # NaN, also by default, becomes a NaN scale
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP and not (fill is None or fill != fill):
        return None
    return int(numbers.offset_dims[window_axes(len(operand_shape(eqn)), away).index(p)])


def _run_gather(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    away = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    sizes = list(params["slice_sizes"])
    p = window_axes(len(sizes), away)[list(numbers.offset_dims).index(out)]
    sizes[p] = width
    return lax.gather(
        args[0],
        args[1],
        numbers,
        tuple(sizes),
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
        fill_value=0 if jnp.issubdtype(args[0].dtype, jnp.integer) else None,
    )


def _when(condition: Callable[[Any, int], bool]) -> Callable[[Any, int, int], int | None]:
    """Vectors stay where they are, if the condition on (eqn, p) holds."""
    return lambda eqn, operand, p: p if condition(eqn, p) else None


def _same(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    return args[0]


_STAYS = Move(_when(lambda eqn, p: True), _same)

MOVES: dict[Primitive, Move] = {
    prims.copy_p: _STAYS,
    prims.stop_gradient_p: _STAYS,
    prims.convert_element_type_p: Move(
        _when(lambda eqn, p: jnp.issubdtype(eqn.params["new_dtype"], jnp.floating)), _same
    ),
    prims.transpose_p: Move(
        lambda eqn, operand, p: list(eqn.params["permutation"]).index(p),
        lambda eqn, args, out, width: lax.transpose(args[0], eqn.params["permutation"]),
    ),
    prims.reshape_p: Move(
        lambda eqn, operand, p: (
            None if eqn.params.get("dimensions") else _regrouped(operand_shape(eqn), eqn.params["new_sizes"], p)
        ),
        lambda eqn, args, out, width: lax.reshape(args[0], _out_shape(eqn, out, width)),
    ),
    prims.squeeze_p: Move(
        lambda eqn, operand, p: p - sum(d < p for d in eqn.params["dimensions"]),
        lambda eqn, args, out, width: lax.squeeze(args[0], eqn.params["dimensions"]),
    ),
    prims.broadcast_in_dim_p: Move(
        _follow_broadcast,
        lambda eqn, args, out, width: lax.broadcast_in_dim(
            args[0], _out_shape(eqn, out, width), eqn.params["broadcast_dimensions"]
        ),
    ),
    prims.rev_p: Move(
        _when(lambda eqn, p: p not in eqn.params["dimensions"]),
        lambda eqn, args, out, width: lax.rev(args[0], eqn.params["dimensions"]),
    ),
    prims.slice_p: Move(_follow_slice, _run_slice),
    prims.dynamic_slice_p: Move(
        lambda eqn, operand, p: p if operand == 0 and eqn.params["slice_sizes"][p] == operand_shape(eqn)[p] else None,
        _run_dynamic_slice,
    ),
    prims.dynamic_update_slice_p: Move(_follow_update, _run_update, lambda eqn, out: {0: out, 1: out}),
    prims.scatter_p: Move(_follow_scatter, _run_scatter, _scatter_holds),
    prims.gather_p: Move(_follow_gather, _run_gather),
    prims.concatenate_p: Move(
        _when(lambda eqn, p: p != eqn.params["dimension"]),
        lambda eqn, args, out, width: lax.concatenate(args, eqn.params["dimension"]),
        lambda eqn, out: dict.fromkeys(range(len(eqn.invars)), out),
    ),
    prims.select_n_p: Move(
        _when(lambda eqn, p: True), _run_select, lambda eqn, out: dict.fromkeys(range(1, len(eqn.invars)), out)
    ),
}


def holds_vectors(move: Move, eqn: Any, out: int, operand: int, p: int) -> dict[int, int]:
    """Where vectors lie in each operand that has some, if they lie along axis `out` of the result."""
    return {operand: p} if move.holds is None else move.holds(eqn, out)


def dot_reading(eqn: Any, operand: int, p: int) -> str | None:
    """Whether a dot contracts the vectors ("scores") or produces them ("values"); None where it needs floats."""
    contract, batch = (dims[operand] for dims in eqn.params["dimension_numbers"])
    if eqn.params.get("out_sharding") is not None:
        return None
    return reading(operand_shape(eqn, operand), p, contract, batch)
