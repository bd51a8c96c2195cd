"""Quantized key-value caches: which state of a program can be one, and the program's equations on packed ones.

A cache is state that is read by attention and updated a few tokens at a time. It can be packed where its new value is
made from the old one and from new vectors only by operations that move vectors as wholes (`MOVES`: updates, scatters,
selects between vectors, slices, concatenations, transposes, reshapes, repetition, casts). Such an operation is done to
codes and scales alike: vectors that stay keep their bits, new ones are quantized once. Whatever else the program reads
from the cache it reads dequantized, except that a `dot_general` multiplies codes and applies scales to its result or
to its other operand (`pallas_kernels.ops.cache_dot`).

`plan_caches` decides, by one walk that follows each state with every axis that could hold its vectors; the rest is
what `passes.jaxpr.replay` calls. Both ask `MOVES`, so the replay does what the walk has seen; only where an operation
alone does not tell (a mask must be constant along a vector, a loop must carry the cache on) the plan says so in `kept`.

A cache that cannot be packed stays float and the plan says why. Nothing is requantized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from qjax.pallas_kernels.ops.cache_dot.axes import reading
from qjax.passes.jaxpr.control_flow import CALLS, LOOPS, Body, Feed, carries_of
from qjax.passes.jaxpr.moves import MOVES, UNCHANGED, Move, operand_shape, repeated_axes
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.jaxpr.walk import ForwardWalk

# --- Analysis --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrackedCache:
    """State, or a part of it, that only operations of `MOVES` have touched.

    `at` holds (vector axis of the state, counted from the end; where it is now) for each axis that still could be it.
    """

    path: str
    at: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Plain:
    """Any other value.

    Attributes:
        same: axes along which it is known to be constant; those of size 1 among them.
        depends: the state that it is computed from.
        lost: (state, operation) where it is state after an operation that is no move.
    """

    same: frozenset[int] = frozenset()
    depends: frozenset[str] = frozenset()
    lost: tuple[tuple[str, str], ...] = ()


def _units(shape: Sequence[int]) -> frozenset[int]:
    return frozenset(i for i, n in enumerate(shape) if n == 1)


# higher-order equations in which packed state stays packed; the bodies of others get floats
_FOLLOWED = CALLS | LOOPS | {prims.cond_p}

_ELEMENTWISE = {
    prims.and_p,
    prims.or_p,
    prims.not_p,
    prims.xor_p,
    prims.eq_p,
    prims.ne_p,
    prims.lt_p,
    prims.le_p,
    prims.gt_p,
    prims.ge_p,
    prims.add_p,
    prims.sub_p,
    prims.mul_p,
    prims.max_p,
    prims.min_p,
    prims.select_n_p,
    prims.convert_element_type_p,
    *UNCHANGED,
}


def _constant_axes(eqn: Any, operands: Sequence[Any]) -> frozenset[int]:
    """Axes along which the first result of an equation is constant, as far as is known."""
    shape = tuple(eqn.outvars[0].aval.shape)
    found: set[int] = set()
    if eqn.primitive in _ELEMENTWISE:
        found = set(range(len(shape)))
        for value, var in zip(operands, eqn.invars, strict=True):
            if var.aval.shape:
                found &= value.same if isinstance(value, _Plain) else set()
    elif eqn.primitive in MOVES and len(operands) == 1:
        whole = MOVES[eqn.primitive].axes(eqn, 0) or {}
        same = operands[0].same if isinstance(operands[0], _Plain) else frozenset()
        found = repeated_axes(eqn) | {out for p, out in whole.items() if p in same}
    return frozenset(found) | _units(shape)


def dot_reading(eqn: Any, operand: int, p: int) -> str | None:
    """Whether a dot contracts the vectors ("scores") or produces them ("values"); None where it needs floats."""
    contract, batch = (dims[operand] for dims in eqn.params["dimension_numbers"])
    if eqn.params.get("out_sharding") is not None:
        return None
    return reading(operand_shape(eqn, operand), p, contract, batch)


@dataclasses.dataclass(frozen=True)
class Read:
    """A read of state that takes it as floats, or its codes in a dot, if these are its vectors.

    Attributes:
        path, axis: the state, and the axis that holds its vectors.
        operation: what reads it.
        codes: how a dot reads codes, "scores" or "values" (`dot_reading`); None where floats are read.
        address: the equation that reads it.
        operand: which of its operands it is; None for what a loop or a branch hands on.
    """

    path: str
    axis: int
    operation: str
    codes: str | None
    address: Address
    operand: int | None


class CacheWalk(ForwardWalk[TrackedCache | _Plain]):
    """Follows state through a program, with the axes that could hold its vectors.

    Attributes:
        reads: of the state, in program order.
        kept: (path, axis, equation, result): see `CachePlan.kept`.
        results: what is known of the results of the program.
    """

    def __init__(self, program: Program, axes: Mapping[str, Sequence[int]]):
        self.reads: list[Read] = []
        self.kept: list[tuple[str, int, Address, int]] = []
        values: list[TrackedCache | _Plain] = []
        for path, aval in zip(program.state, program.jaxpr.in_avals, strict=True):
            if path is not None and axes.get(path):
                values.append(TrackedCache(path, tuple((axis, axis + len(jnp.shape(aval))) for axis in axes[path])))
            else:
                values.append(_Plain(_units(getattr(aval, "shape", ()))))
        self.results = self.walk(program.jaxpr, values, ())

    def constant(self, value: Any, aval: Any) -> _Plain:
        """A constant may differ along each axis."""
        return _Plain(_units(jnp.shape(value)))

    def equation(self, eqn: Any, operands: list[Any], address: Address) -> list[Any] | None:
        """Results of one equation."""
        if eqn.primitive in _FOLLOWED:
            return None
        if any(isinstance(v, TrackedCache) for v in operands):
            moved = self.move(eqn, operands, address)
            if moved is not None:
                return moved
        return self.plain(eqn, operands, address)

    def descend(self, eqn: Any, operands: Sequence[Any], address: Address) -> list[Any]:
        """Results of an equation with bodies, which loops and branches may keep packed."""
        results = super().descend(eqn, operands, address)
        if eqn.primitive not in CALLS:
            self.keep(results, address)
        return results

    def keep(self, results: Sequence[Any], address: Address) -> None:
        """Notes that these results may stay packed."""
        for i, value in enumerate(results):
            if isinstance(value, TrackedCache):
                self.kept += [(value.path, axis, address, i) for axis, _ in value.at]

    def read_floats(
        self, path: str, axes: Iterable[int], operation: str, address: Address, operand: int | None = None
    ) -> None:
        """Notes a read of floats for each of the axes."""
        self.reads += [Read(path, axis, operation, None, address, operand) for axis in axes]

    def move(self, eqn: Any, operands: list[Any], address: Address) -> list[Any] | None:
        """The results of an operation that moves vectors as wholes; None where none of them stays whole."""
        move = MOVES.get(eqn.primitive)
        for i, value in enumerate(operands) if move is not None else ():
            if not isinstance(value, TrackedCache):
                continue
            assert move is not None
            at = []
            for axis, p in value.at:
                out = move.follow(eqn, i, p)
                if out is not None and self.moves_whole(move, eqn, operands, value.path, axis, out, (i, p)):
                    at.append((axis, out))
                else:
                    self.read_floats(value.path, (axis,), eqn.primitive.name, address, i)
            if at:
                results = [TrackedCache(value.path, tuple(at))] * len(eqn.outvars)
                if eqn.primitive is prims.select_n_p:
                    self.keep(results, address)
                return results
        return None

    def moves_whole(
        self, move: Move, eqn: Any, operands: list[Any], path: str, axis: int, out: int, own: tuple[int, int]
    ) -> bool:
        """Whether the other operands go with it: parts of the same state alike, a mask constant along vectors."""
        for j, where in move.along(eqn, out, *own).items():
            other = operands[j]
            if isinstance(other, TrackedCache) and (other.path != path or (axis, where) not in other.at):
                return False
        if eqn.primitive is prims.select_n_p and operand_shape(eqn):
            mask = operands[0]
            return isinstance(mask, _Plain) and out in mask.same
        return True

    def plain(self, eqn: Any, operands: list[Any], address: Address) -> list[Any]:
        """The results of an equation that reads floats, or codes in a dot."""
        depends: set[str] = set()
        lost: dict[str, str] = {}
        dot = eqn.primitive is prims.dot_general_p
        for i, (value, var) in enumerate(zip(operands, eqn.invars, strict=True)):
            if isinstance(value, TrackedCache):
                depends.add(value.path)
                for axis, p in value.at:
                    codes = dot_reading(eqn, i, p) if dot else None
                    self.reads.append(Read(value.path, axis, eqn.primitive.name, codes, address, i))
                if not dot:
                    lost[value.path] = eqn.primitive.name
            else:
                depends |= value.depends
                sizes = [math.prod(out.aval.shape) for out in eqn.outvars if hasattr(out.aval, "shape")]
                if not dot and math.prod(var.aval.shape) in sizes:
                    lost.update(value.lost)
        same = _constant_axes(eqn, operands) if len(eqn.outvars) == 1 else None
        return [
            _Plain(
                _units(getattr(out.aval, "shape", ())) if same is None else same,
                frozenset(depends),
                tuple(sorted(lost.items())),
            )
            for out in eqn.outvars
        ]

    def join(self, eqn: Any, values: Sequence[Any], address: Address) -> TrackedCache | _Plain:
        """A value that is one of several: the same state with the same vectors, else floats."""
        first, *rest = values
        if all(isinstance(v, TrackedCache) and v.path == first.path for v in values):
            at = tuple(pair for pair in first.at if all(pair in v.at for v in rest))
            if at:
                return TrackedCache(first.path, at)
        depends: set[str] = set()
        lost: dict[str, str] = {}
        same: frozenset[int] | None = None
        for value in values:
            if isinstance(value, TrackedCache):
                depends.add(value.path)
                lost.setdefault(value.path, eqn.primitive.name)
                self.read_floats(value.path, dict(value.at), eqn.primitive.name, address)
                same = frozenset()
            else:
                depends |= value.depends
                lost = {**lost, **dict(value.lost)}
                same = value.same if same is None else same & value.same
        return _Plain(same or frozenset(), frozenset(depends), tuple(sorted(lost.items())))

    def mark(self) -> tuple[int, int]:
        """How much is noted."""
        return len(self.reads), len(self.kept)

    def again(self, eqn: Any, before: list[Any], after: list[Any], mark: Any, address: Address) -> None:
        """A carry that is state before the step and not after it is read before the loop."""
        reads, kept = mark
        del self.reads[reads:]
        del self.kept[kept:]
        for old, new in zip(before, after, strict=True):
            if isinstance(old, TrackedCache) and not isinstance(new, TrackedCache):
                self.read_floats(old.path, dict(old.at), f"carry of {eqn.primitive.name}", address)

    def enter(self, eqn: Any, body: Body, feed: Feed, aval: Any, value: Any, address: Address) -> TrackedCache | _Plain:
        """One element of the first axis, where a scan takes one a step."""
        if feed.how != "scanned":
            return value
        if not isinstance(value, TrackedCache):
            return dataclasses.replace(value, same=frozenset(i - 1 for i in value.same if i))
        at = tuple((axis, p - 1) for axis, p in value.at if p)
        self.read_floats(value.path, (axis for axis, p in value.at if not p), eqn.primitive.name, address, feed.operand)
        if at:
            return TrackedCache(value.path, at)
        return _Plain(frozenset(), frozenset({value.path}), ((value.path, eqn.primitive.name),))

    def leave(self, eqn: Any, body: Body, results: list[Any], address: Address) -> list[Any]:
        """Results of a body: a scan stacks all but its carries along a new first axis."""
        if eqn.primitive is not prims.scan_p:
            return results
        carries = carries_of(eqn)
        return results[:carries] + [
            TrackedCache(v.path, tuple((axis, p + 1) for axis, p in v.at))
            if isinstance(v, TrackedCache)
            else dataclasses.replace(v, same=frozenset(i + 1 for i in v.same))
            for v in results[carries:]
        ]
