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
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import primitives as prims

from qjax.passes.analysis.cache_moves import MOVES, Move, dot_reading, holds_vectors, operand_shape, window_axes
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.control_flow import CALLS, LOOPS, carries_of
from qjax.passes.jaxpr.trace import Address, Program

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
    prims.copy_p,
    prims.stop_gradient_p,
}


def _constant_axes(eqn: Any, operands: Sequence[Any]) -> frozenset[int]:
    """Axes along which the first result of an equation is constant, as far as is known."""
    shape = tuple(eqn.outvars[0].aval.shape)
    first = operands[0].same if operands and isinstance(operands[0], _Plain) else frozenset()
    found: set[int] = set()
    if eqn.primitive is prims.broadcast_in_dim_p:
        where = eqn.params["broadcast_dimensions"]
        found = {i for i in range(len(shape)) if i not in where or where.index(i) in first}
    elif eqn.primitive is prims.transpose_p:
        found = {i for i, p in enumerate(eqn.params["permutation"]) if p in first}
    elif eqn.primitive is prims.squeeze_p:
        kept = window_axes(len(operand_shape(eqn)), eqn.params["dimensions"])
        found = {i for i, p in enumerate(kept) if p in first}
    elif eqn.primitive is prims.reshape_p:
        before = [i for i, n in enumerate(operand_shape(eqn)) if n != 1]
        after = [i for i, n in enumerate(shape) if n != 1]
        if [operand_shape(eqn)[i] for i in before] == [shape[i] for i in after]:
            found = {j for i, j in zip(before, after, strict=True) if i in first}
    elif eqn.primitive in _ELEMENTWISE:
        found = set(range(len(shape)))
        for value, var in zip(operands, eqn.invars, strict=True):
            if var.aval.shape:
                found &= value.same if isinstance(value, _Plain) else set()
    return frozenset(found) | _units(shape)


class CacheWalk:
    """Follows state through a program, with the axes that could hold its vectors.

    Attributes:
        reads: (path, axis, operation, whether it works on codes).
        kept: (path, axis, equation, result): see `CachePlan.kept`.
    """

    def __init__(self, program: Program, axes: Mapping[str, Sequence[int]]):
        self.reads: list[tuple[str, int, str, bool]] = []
        self.kept: list[tuple[str, int, Address, int]] = []
        values: list[Any] = []
        for path, aval in zip(program.state, program.jaxpr.in_avals, strict=True):
            if path is not None and axes.get(path):
                values.append(TrackedCache(path, tuple((axis, axis + len(jnp.shape(aval))) for axis in axes[path])))
            else:
                values.append(_Plain(_units(getattr(aval, "shape", ()))))
        self.results = self.walk(program.jaxpr, values, ())

    def walk(self, jaxpr: Any, values: Sequence[Any], address: Address) -> list[Any]:
        """Results of a jaxpr, from what is known of its inputs."""
        env: dict[Any, Any] = dict(zip(jaxpr.invars, values, strict=True))
        consts = (_Plain(_units(jnp.shape(c))) for c in control_flow.consts_of(jaxpr))
        env.update(zip(jaxpr.constvars, consts, strict=False))
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)

        def read(atom: Any) -> Any:
            return _Plain(_units(jnp.shape(atom.val))) if isinstance(atom, JaxprLiteral) else env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            results = self.equation(eqn, [read(atom) for atom in eqn.invars], (*address, i))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Any], address: Address) -> list[Any]:
        """Results of one equation."""
        inner = control_flow.bodies(eqn)
        tracked = any(isinstance(v, TrackedCache) for v in operands)
        if inner and eqn.primitive in CALLS:
            return self.walk(inner[0].jaxpr, operands, (*address, inner[0].name))
        if inner and eqn.primitive in LOOPS:
            return self.loop(eqn, inner, operands, address)
        if inner and eqn.primitive is prims.cond_p:
            branches = [self.walk(body.jaxpr, operands[1:], (*address, body.name)) for body in inner]
            merged = [self.join(values, eqn) for values in zip(*branches, strict=True)]
            self.keep(merged, address)
            return merged
        if tracked and (moved := self.move(eqn, operands, address)) is not None:
            return moved
        return self.plain(eqn, operands)

    def keep(self, results: Sequence[Any], address: Address) -> None:
        """Notes that these results may stay packed."""
        for i, value in enumerate(results):
            if isinstance(value, TrackedCache):
                self.kept += [(value.path, axis, address, i) for axis, _ in value.at]

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
                    self.reads.append((value.path, axis, eqn.primitive.name, False))
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
        for j, where in holds_vectors(move, eqn, out, *own).items():
            other = operands[j]
            if isinstance(other, TrackedCache) and (other.path != path or (axis, where) not in other.at):
                return False
        if eqn.primitive is prims.select_n_p and operand_shape(eqn):
            mask = operands[0]
            return isinstance(mask, _Plain) and out in mask.same
        return True

    def plain(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The results of an equation that reads floats, or codes in a dot."""
        depends: set[str] = set()
        lost: dict[str, str] = {}
        dot = eqn.primitive is prims.dot_general_p
        for i, (value, var) in enumerate(zip(operands, eqn.invars, strict=True)):
            if isinstance(value, TrackedCache):
                depends.add(value.path)
                for axis, p in value.at:
                    codes = dot and dot_reading(eqn, i, p) is not None
                    self.reads.append((value.path, axis, eqn.primitive.name, codes))
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

    def join(self, values: Sequence[Any], eqn: Any) -> Any:
        """A value that is one of several."""
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
                self.reads += [(value.path, axis, eqn.primitive.name, False) for axis, _ in value.at]
                same = frozenset()
            else:
                depends |= value.depends
                lost = {**lost, **dict(value.lost)}
                same = value.same if same is None else same & value.same
        return _Plain(same or frozenset(), frozenset(depends), tuple(sorted(lost.items())))

    def loop(self, eqn: Any, inner: list[control_flow.Body], operands: list[Any], address: Address) -> list[Any]:
        """A scan or while loop: what a carry is has to hold before and after every step."""
        body = inner[-1]
        stacked = len([feed for feed in body.feeds if feed.how == "scanned"])
        n_carry = carries_of(eqn)
        first = len(body.feeds) - stacked - n_carry  # the first carry among the inputs of the body
        values = [self.enter(operands[feed.operand], feed.how, eqn) for feed in body.feeds]
        while True:
            reads, kept = len(self.reads), len(self.kept)
            outs = self.walk(body.jaxpr, values, (*address, body.name))
            carried = [self.join((values[first + i], outs[i]), eqn) for i in range(n_carry)]
            if carried == values[first : first + n_carry]:
                break
            del self.kept[kept:]
            del self.reads[reads:]
            for i, value in enumerate(carried):
                before = values[first + i]
                if isinstance(before, TrackedCache) and not isinstance(value, TrackedCache):
                    self.reads += [
                        (before.path, axis, f"carry of {eqn.primitive.name}", False) for axis, _ in before.at
                    ]
            values[first : first + n_carry] = carried
        if len(inner) == 2:  # the condition of a while loop reads the carries
            condition = inner[0]
            local = [values[first + i] for i in range(n_carry)]
            whole = [operands[feed.operand] for feed in condition.feeds[: len(condition.feeds) - n_carry]]
            self.walk(condition.jaxpr, [*whole, *local], (*address, condition.name))
        results = carried + [
            TrackedCache(v.path, tuple((axis, p + 1) for axis, p in v.at))
            if isinstance(v, TrackedCache)
            else dataclasses.replace(v, same=frozenset(i + 1 for i in v.same))
            for v in outs[n_carry:]
        ]
        self.keep(results, address)
        return results

    def enter(self, value: Any, how: str, eqn: Any) -> Any:
        """An operand as a body of a loop gets it."""
        if how != "scanned":
            return value
        if not isinstance(value, TrackedCache):
            return dataclasses.replace(value, same=frozenset(i - 1 for i in value.same if i))
        at = tuple((axis, p - 1) for axis, p in value.at if p)
        self.reads += [(value.path, axis, eqn.primitive.name, False) for axis, p in value.at if not p]
        if at:
            return TrackedCache(value.path, at)
        return _Plain(frozenset(), frozenset({value.path}), ((value.path, eqn.primitive.name),))
