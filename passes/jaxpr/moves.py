"""`MOVES`: operations that move elements and change none of them, one row each.

A row says how the axes of an operand lie in the result. What follows a value through a program takes from it what it
needs: a view of a parameter (`step`), the vectors of a packed cache (`Move.follow`, `Move.together`, `Move.run`), what
is known to be constant along an axis (`repeated_axes`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims
from jaxtyping import Array

from qjax.passes.jaxpr.views import Axis, View

Axes = dict[int, int]  # axis of an operand -> axis of the result

Viewing = Callable[[Any, View, Sequence[Any]], tuple[View, tuple] | None]


@dataclasses.dataclass(frozen=True)
class Move:
    """An operation that moves elements.

    Attributes:
        axes: (eqn, operand) -> the axes of the operand that are whole in the result, element for element and in order,
            and where they lie there; of axes of size 1 a reshape says nothing. None where the operation changes the
            elements after all.
        run: (eqn, arguments, out, width) -> the result, where axis `out` of it and those of the arguments that lie
            there are `width` long.
        view: (eqn, view of operand 0, the other operands) -> the view of the result and the index values that it
            picked, or None; without one, the result is no view of operand 0.
        together: (eqn, out) -> operands whose elements are in the result, and the axis of each that lies along axis
            `out`; without one, one operand alone.
        repeats: whether elements are repeated along the axes of the result where no axis of the operand lies.
    """

    axes: Callable[[Any, int], Axes | None]
    run: Callable[[Any, list[Any], int, int], Any]
    view: Viewing | None = None
    together: Callable[[Any, int], Axes] | None = None
    repeats: bool = False

    def follow(self, eqn: Any, operand: int, p: int) -> int | None:
        """Where axis `p` of an operand lies in the result; None where it is cut, mixed or gone."""
        return (self.axes(eqn, operand) or {}).get(p)

    def along(self, eqn: Any, out: int, operand: int, p: int) -> Axes:
        """The axis of each operand that lies along `out`, if axis `p` of this one does."""
        return {operand: p} if self.together is None else self.together(eqn, out)


def operand_shape(eqn: Any, operand: int = 0) -> tuple[int, ...]:
    """Shape of an operand of an equation."""
    return tuple(eqn.invars[operand].aval.shape)


def _rank(eqn: Any, operand: int = 0) -> int:
    return len(operand_shape(eqn, operand))


def _without(axes: int, gone: Iterable[Any]) -> list[int]:
    """All axes but some."""
    away = {axis % axes for axis in gone}
    return [axis for axis in range(axes) if axis not in away]


# --- How axes lie -------------------------------------------------------------------------------------------------


def _every(eqn: Any, operand: int) -> Axes:
    return {p: p for p in range(_rank(eqn, operand))}


def _if_floating(eqn: Any, operand: int) -> Axes | None:
    return _every(eqn, operand) if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else None


def _transposed(eqn: Any, operand: int) -> Axes:
    return {int(p): out for out, p in enumerate(eqn.params["permutation"])}


def _reshaped(eqn: Any, operand: int) -> Axes | None:
    """An axis is whole where as many elements lie before it as did, and it is as long."""
    if eqn.params.get("dimensions"):
        return None
    before, after = operand_shape(eqn), eqn.params["new_sizes"]
    places = {(math.prod(after[:i]), n): i for i, n in enumerate(after) if n != 1}
    found = {p: places.get((math.prod(before[:p]), n)) for p, n in enumerate(before) if n != 1}
    return {p: out for p, out in found.items() if out is not None}


def _squeezed(eqn: Any, operand: int) -> Axes:
    return {p: out for out, p in enumerate(_without(_rank(eqn), eqn.params["dimensions"]))}


def _broadcast(eqn: Any, operand: int) -> Axes:
    where, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    pairs = zip(where, operand_shape(eqn), strict=True) if operand == 0 else ()
    return {p: int(out) for p, (out, n) in enumerate(pairs) if shape[out] == n}


def _not_reversed(eqn: Any, operand: int) -> Axes:
    return {p: p for p in _without(_rank(eqn), eqn.params["dimensions"])}


def _not_sliced(eqn: Any, operand: int) -> Axes:
    params, shape = eqn.params, operand_shape(eqn)
    cuts = zip(params["start_indices"], params["limit_indices"], params["strides"] or (1,) * len(shape), strict=True)
    return {p: p for p, cut in enumerate(cuts) if cut == (0, shape[p], 1)}


def _taken_whole(eqn: Any, operand: int) -> Axes:
    sizes = zip(eqn.params["slice_sizes"], operand_shape(eqn), strict=True) if operand == 0 else ()
    return {p: p for p, (size, n) in enumerate(sizes) if size == n}


def _updated_whole(eqn: Any, operand: int) -> Axes:
    sizes = zip(operand_shape(eqn, 1), operand_shape(eqn), strict=True) if operand == 0 else ()
    return {p: p for p, (size, n) in enumerate(sizes) if size == n}


def _not_joined(eqn: Any, operand: int) -> Axes:
    return {p: p for p in _without(_rank(eqn, operand), (eqn.params["dimension"],))}


def _stays_in_bounds(eqn: Any, p: int, indexed: Sequence[Any]) -> bool:
    """Whether a start index on an axis that is taken whole can only mean 0."""
    clamped = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return p not in tuple(indexed) or eqn.params["mode"] in clamped


def _scatter_windows(eqn: Any) -> Axes:
    """Axis of the operand -> axis of the updates, for those that a window has."""
    numbers = eqn.params["dimension_numbers"]
    window = _without(_rank(eqn), (*numbers.inserted_window_dims, *numbers.operand_batching_dims))
    return dict(zip(window, map(int, numbers.update_window_dims), strict=True))


def _scattered_whole(eqn: Any, operand: int) -> Axes:
    indexed, shape, updates = eqn.params["dimension_numbers"], operand_shape(eqn), operand_shape(eqn, 2)
    windows = _scatter_windows(eqn).items() if operand == 0 else ()
    return {
        p: p
        for p, at in windows
        if updates[at] == shape[p] and _stays_in_bounds(eqn, p, indexed.scatter_dims_to_operand_dims)
    }


def _gather_windows(eqn: Any) -> Axes:
    """Axis of the operand -> axis of the result, for those that a window has."""
    numbers = eqn.params["dimension_numbers"]
    window = _without(_rank(eqn), (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims))
    return dict(zip(window, map(int, numbers.offset_dims), strict=True))


def _gathered_whole(eqn: Any, operand: int) -> Axes | None:
    params, shape = eqn.params, operand_shape(eqn)
    fill = params["fill_value"]  # an element that is not there is NaN, also by default: no other number may stand in
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP and not (fill is None or fill != fill):
        return None
    indexed = params["dimension_numbers"].start_index_map
    windows = _gather_windows(eqn).items() if operand == 0 else ()
    return {p: out for p, out in windows if params["slice_sizes"][p] == shape[p] and _stays_in_bounds(eqn, p, indexed)}


# --- Views --------------------------------------------------------------------------------------------------------


def _placed(eqn: Any, view: View, _: Sequence[Any]):
    """Each axis where it lies in the result; axes of size 1 may come and go."""
    out: Any = eqn.outvars[0].aval
    axes: list[Axis] = [()] * len(out.shape)
    for p, i in (MOVES[eqn.primitive].axes(eqn, 0) or {}).items():
        axes[i] = view.axes[p]
    placed = dataclasses.replace(view, axes=tuple(axes))
    return (placed, ()) if placed.shape == tuple(out.shape) else None


def _regrouped(eqn: Any, view: View, _: Sequence[Any]):
    following = None if _reshaped(eqn, 0) is None else view.reshape(eqn.params["new_sizes"])
    return following and (following, ())


def _cast(eqn: Any, view: View, _: Sequence[Any]):
    return None if _if_floating(eqn, 0) is None else (view.cast(eqn.params["new_dtype"]), ())


def _picking(key: Callable[[Any, int], Any], starts: Callable[[Any, Sequence[Any]], Sequence[Any]]) -> Viewing:
    """A view where each axis is taken whole or is one element of a parameter axis, at one of these starts."""

    def view_of(eqn: Any, view: View, others: Sequence[Any]):
        whole, picked = MOVES[eqn.primitive].axes(eqn, 0) or {}, []
        sizes: Any = eqn.outvars[0].aval.shape
        for axis, start in enumerate(starts(eqn, others)):
            if axis in whole:
                continue
            following = view.index(axis, key(eqn, axis), keep=True) if sizes[axis] == 1 else None
            if following is None:
                return None
            view = following
            picked.append(start)
        return view, tuple(picked)

    return view_of


def _unmoved(eqn: Any, view: View, _: Sequence[Any]):
    return view, ()


# --- Running with an axis of another length -----------------------------------------------------------------------


def _out_shape(eqn: Any, out: int, width: int) -> list[int]:
    shape = list(eqn.outvars[0].aval.shape)
    shape[out] = width
    return shape


def from_zero(starts: Sequence[Any], p: int) -> list[Any]:
    """Start indices that take an axis whole; XLA would clamp this one to 0."""
    return [jnp.zeros_like(start) if i == p else start for i, start in enumerate(starts)]


def _same(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    return args[0]


def _run_slice(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    limits = list(eqn.params["limit_indices"])
    limits[out] = width
    return lax.slice(args[0], eqn.params["start_indices"], limits, eqn.params["strides"])


def _run_dynamic_slice(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    sizes = list(eqn.params["slice_sizes"])
    sizes[out] = width
    return lax.dynamic_slice(args[0], from_zero(args[1:], out), sizes)


def _run_update(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    return lax.dynamic_update_slice(args[0], args[1], from_zero(args[2:], out))


def _run_select(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    which, *cases = args
    if which.ndim:  # constant along the axis, as the plan has found
        which = jnp.broadcast_to(lax.slice_in_dim(which, 0, 1, axis=out), cases[0].shape)
    return lax.select_n(which, *cases)


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


def _run_gather(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    params, sizes = eqn.params, list(eqn.params["slice_sizes"])
    sizes[next(p for p, i in _gather_windows(eqn).items() if i == out)] = width
    return lax.gather(
        args[0],
        args[1],
        params["dimension_numbers"],
        tuple(sizes),
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
        fill_value=0 if jnp.issubdtype(args[0].dtype, jnp.integer) else None,
    )


# --- The table ----------------------------------------------------------------------------------------------------

# operations that leave a value as it is; what they tell XLA or a gradient is their own matter
UNCHANGED = {prims.copy_p, prims.stop_gradient_p}

MOVES: dict[Primitive, Move] = {
    **dict.fromkeys(UNCHANGED, Move(_every, _same, _unmoved)),
    prims.convert_element_type_p: Move(_if_floating, _same, _cast),
    prims.transpose_p: Move(
        _transposed, lambda eqn, args, out, width: lax.transpose(args[0], eqn.params["permutation"]), _placed
    ),
    prims.reshape_p: Move(
        _reshaped, lambda eqn, args, out, width: lax.reshape(args[0], _out_shape(eqn, out, width)), _regrouped
    ),
    prims.squeeze_p: Move(
        _squeezed, lambda eqn, args, out, width: lax.squeeze(args[0], eqn.params["dimensions"]), _placed
    ),
    prims.broadcast_in_dim_p: Move(
        _broadcast,
        lambda eqn, args, out, width: lax.broadcast_in_dim(
            args[0], _out_shape(eqn, out, width), eqn.params["broadcast_dimensions"]
        ),
        _placed,
        repeats=True,
    ),
    prims.slice_p: Move(
        _not_sliced,
        _run_slice,
        _picking(
            lambda eqn, axis: ("static", eqn.params["start_indices"][axis]),
            lambda eqn, _: eqn.params["start_indices"],
        ),
    ),
    prims.dynamic_slice_p: Move(
        _taken_whole,
        _run_dynamic_slice,
        # dynamic_slice clamps its start; so does dynamic_index_in_dim, which View.apply uses
        _picking(lambda eqn, axis: ("dynamic", id(eqn), axis), lambda eqn, others: others),
    ),
    prims.rev_p: Move(_not_reversed, lambda eqn, args, out, width: lax.rev(args[0], eqn.params["dimensions"])),
    prims.dynamic_update_slice_p: Move(_updated_whole, _run_update, together=lambda eqn, out: {0: out, 1: out}),
    prims.scatter_p: Move(
        _scattered_whole, _run_scatter, together=lambda eqn, out: {0: out, 2: _scatter_windows(eqn)[out]}
    ),
    prims.gather_p: Move(_gathered_whole, _run_gather),
    prims.concatenate_p: Move(
        _not_joined,
        lambda eqn, args, out, width: lax.concatenate(args, eqn.params["dimension"]),
        together=lambda eqn, out: dict.fromkeys(range(len(eqn.invars)), out),
    ),
    prims.select_n_p: Move(
        _every, _run_select, together=lambda eqn, out: dict.fromkeys(range(1, len(eqn.invars)), out)
    ),
}

# operations whose result is a view of their first operand, if it moves as whole axes or single elements
VIEWS = {primitive for primitive, move in MOVES.items() if move.view is not None}


def step(eqn: Any, view: View, others: Sequence[Any]) -> tuple[View, tuple] | None:
    """The view after `eqn`, and the index values that it picked; None where its result is no view.

    Args:
        eqn: the equation; its first operand is the viewed one.
        view: the view of its first operand.
        others: the values of its other operands.
    """
    move = MOVES.get(eqn.primitive)
    found = move.view(eqn, view, others) if move is not None and move.view is not None else None
    if found is not None:
        out: Any = eqn.outvars[0].aval
        assert found[0].shape == tuple(out.shape), f"view of {eqn.primitive} is {found[0].shape}, not {out}"
    return found


def repeated_axes(eqn: Any) -> set[int]:
    """The axes of the result of a move along which every element is the same, whatever the operand is."""
    move = MOVES.get(eqn.primitive)
    if move is None or not move.repeats:
        return set()
    return set(range(len(eqn.outvars[0].aval.shape))) - set((move.axes(eqn, 0) or {}).values())
