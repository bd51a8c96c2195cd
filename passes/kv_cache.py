"""Quantized key-value caches: which state of a program can be one, and the program's equations on packed ones.

A cache is state that is read by attention and updated a few tokens at a time. It can be packed where its new value is
made from the old one and from new vectors only by operations that move vectors as wholes (`MOVES`: updates, scatters,
selects between vectors, slices, concatenations, transposes, reshapes, repetition, casts). Such an operation is done to
codes and scales alike: vectors that stay keep their bits, new ones are quantized once. Whatever else the program reads
from the cache it reads dequantized, except that a `dot_general` multiplies codes and applies scales to its result or
to its other operand (`pallas_kernels.cache_dot`).

`plan_caches` decides, by one walk that follows each state with every axis that could hold its vectors; the rest is
what `passes.replay` calls. Both ask `MOVES`, so the replay does what the walk has seen; only where an operation alone
does not tell (a mask must be constant along a vector, a loop must carry the cache on) the plan says so in `kept`.

A cache that cannot be packed stays float and the plan says why. Nothing is requantized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import Primitive
from jax.extend.core import primitives as prims
from jaxtyping import Array
from rich.table import Table

from pallas_kernels import kv_cache
from pallas_kernels.cache_dot import cache_dot_general, reading
from pallas_kernels.formats import FORMATS
from pallas_kernels.kv_cache import CacheSpec, QCache
from passes import control_flow
from passes.plan import PlanError, Rule
from passes.sites import Address
from passes.trace import Program

_quantize_jitted = jax.jit(kv_cache.quantize, static_argnums=(1, 2))

# --- Rules and decisions ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CacheRule:
    """How the state whose path matches `pattern` is stored; of several rules the first match wins.

    Attributes:
        pattern: as in `Rule`: one that ends in a wildcard sweeps, one that ends in a name means each that it matches.
        spec: the format, or None to keep it float.
    """

    pattern: str
    spec: CacheSpec | None

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        return Rule(self.pattern).matches(path)

    @property
    def sweeps(self) -> bool:
        """Whether the pattern takes what can be quantized and leaves the rest."""
        return Rule(self.pattern).sweeps

    def __str__(self) -> str:
        return f"kv_cache={{{self.pattern!r}: {self.spec or 'None'}}}"

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back."""
        return {"pattern": self.pattern, "spec": self.spec and self.spec.to_json()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> CacheRule:
        """Reads what `to_json` wrote."""
        return CacheRule(data["pattern"], data["spec"] and CacheSpec.from_json(data["spec"]))


def as_cache_spec(spec: Any) -> CacheSpec | None:
    """A spec given as the name of a format, a `CacheSpec` or None."""
    if spec is None or isinstance(spec, CacheSpec):
        return spec
    if isinstance(spec, str) and spec in FORMATS:
        return CacheSpec(FORMATS[spec])
    raise TypeError(
        f"qjax: a cache is stored as the name of a format such as 'int8', a CacheSpec or None; got {spec!r}."
    )


def as_cache_rules(given: Any) -> tuple[CacheRule, ...]:
    """Rules given as what `quantize(kv_cache=...)` takes: None, a spec for all caches, or {pattern: spec}."""
    if given is None:
        return ()
    if isinstance(given, Mapping):
        return tuple(CacheRule(pattern, as_cache_spec(spec)) for pattern, spec in given.items())
    if isinstance(given, tuple) and all(isinstance(rule, CacheRule) for rule in given):
        return given
    return (CacheRule("**", as_cache_spec(given)),)


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """The decision for one state variable.

    Attributes:
        name: its path.
        shape, dtype: of the float value.
        spec: the format, or None where it stays float.
        axis: the vector axis, counted from the end; set with `spec`.
        reason: why it stays float, or what else there is to know.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: CacheSpec | None
    axis: int | None = None
    reason: str = ""

    @property
    def float_bytes(self) -> int:
        """Bytes of the float value."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes after conversion: those of the arrays that are allocated."""
        if self.spec is None or self.axis is None:
            return self.float_bytes
        return kv_cache.packed_nbytes(self.shape, self.spec, self.axis)

    def pack(self, value: Any) -> QCache:
        """The packed form of a float cache; of a `jax.ShapeDtypeStruct`, that of zeros."""
        assert self.spec is not None
        assert self.axis is not None
        if isinstance(value, jax.ShapeDtypeStruct):
            return kv_cache.zeros(value.shape, value.dtype, self.spec, self.axis)
        return _quantize_jitted(jnp.asarray(value), self.spec, self.axis)


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The decisions about state.

    Attributes:
        entries: one for each float state variable of at least two axes, in the order of the program's inputs.
        kept: results (equation, number) that stay packed where the operation alone does not tell.
        results: per result of the program, the state of which it is the new value and which is packed, or None.
    """

    entries: tuple[CacheEntry, ...] = ()
    kept: frozenset[tuple[Address, int]] = frozenset()
    results: tuple[CacheEntry | None, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __getitem__(self, name: str) -> CacheEntry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        names = ", ".join(entry.name for entry in self.entries)
        raise KeyError(f"qjax: no cache {name!r} in the plan; it has {names or 'none'}.")

    @property
    def quantized(self) -> tuple[CacheEntry, ...]:
        """The entries that have a format."""
        return tuple(entry for entry in self.entries if entry.spec is not None)

    @property
    def float_bytes(self) -> int:
        """Bytes of all entries in float."""
        return sum(entry.float_bytes for entry in self.entries)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all entries after conversion."""
        return sum(entry.stored_bytes for entry in self.entries)

    def to_json(self) -> list[dict[str, Any]]:
        """The entries as plain data."""
        return [
            {
                "name": e.name,
                "shape": list(e.shape),
                "dtype": e.dtype,
                "format": str(e.spec) if e.spec else None,
                "axis": e.axis,
                "reason": e.reason,
                "bytes": [e.float_bytes, e.stored_bytes],
            }
            for e in self.entries
        ]

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
        table.add_column("cache", footer="total", overflow="fold")
        table.add_column("shape", overflow="fold")
        table.add_column("format")
        table.add_column("float", justify="right", footer=f"{self.float_bytes:,} B")
        table.add_column("stored", justify="right", footer=f"{self.stored_bytes:,} B")
        table.add_column("reason", overflow="fold")
        for e in self.entries:
            shape = f"{e.dtype}[{','.join(map(str, e.shape))}]"
            form = str(e.spec) if e.spec else "float"
            table.add_row(e.name, shape, form, f"{e.float_bytes:,} B", f"{e.stored_bytes:,} B", e.reason)
        return table


NO_CACHES = CachePlan()
"""The plan of a call without packed caches."""


# --- Operations that move vectors as wholes --------------------------------------------------------------------
#
# `p` is where the vectors lie in an operand, `out` where they lie in the result. An operation runs on each array of a
# packed cache, whose vector axis is `width` long: R for codes, 1 for scales.


def _one(p: int) -> dict[int, int]:
    return {0: p}


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


def _shape(eqn: Any, operand: int = 0) -> tuple[int, ...]:
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
    return out if out is not None and eqn.params["shape"][out] == _shape(eqn)[p] else None


def _follow_slice(eqn: Any, operand: int, p: int) -> int | None:
    params = eqn.params
    stride = 1 if params["strides"] is None else params["strides"][p]
    return p if (params["start_indices"][p], params["limit_indices"][p], stride) == (0, _shape(eqn)[p], 1) else None


def _run_slice(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    limits = list(eqn.params["limit_indices"])
    limits[out] = width
    return lax.slice(args[0], eqn.params["start_indices"], limits, eqn.params["strides"])


def _from_zero(starts: Sequence[Any], p: int) -> list[Any]:
    """Start indices that take an axis whole; XLA would clamp this one to 0."""
    return [jnp.zeros_like(start) if i == p else start for i, start in enumerate(starts)]


def _run_dynamic_slice(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    sizes = list(eqn.params["slice_sizes"])
    sizes[out] = width
    return lax.dynamic_slice(args[0], _from_zero(args[1:], out), sizes)


def _follow_update(eqn: Any, operand: int, p: int) -> int | None:
    return p if operand == 0 and _shape(eqn, 1)[p] == _shape(eqn)[p] else None


def _run_update(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    return lax.dynamic_update_slice(args[0], args[1], _from_zero(args[2:], out))


def _run_select(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    which, *cases = args
    if which.ndim:  # constant along the vectors, as the plan has found
        which = jnp.broadcast_to(lax.slice_in_dim(which, 0, 1, axis=out), cases[0].shape)
    return lax.select_n(which, *cases)


def _stays_in_bounds(eqn: Any, p: int, indexed: Sequence[Any]) -> bool:
    """Whether a start index on the vector axis, which is taken whole, can only mean 0."""
    clamped = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return p not in tuple(indexed) or eqn.params["mode"] in clamped


def _window(axes: int, without: Sequence[Any]) -> list[int]:
    return [i for i in range(axes) if i not in without]


def _follow_scatter(eqn: Any, operand: int, p: int) -> int | None:
    numbers = eqn.params["dimension_numbers"]
    away = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    if operand != 0 or p in away or not _stays_in_bounds(eqn, p, numbers.scatter_dims_to_operand_dims):
        return None
    return p if _shape(eqn, 2)[_scatter_holds(eqn, p)[2]] == _shape(eqn)[p] else None


def _scatter_holds(eqn: Any, out: int) -> dict[int, int]:
    numbers = eqn.params["dimension_numbers"]
    window = _window(len(_shape(eqn)), (*numbers.inserted_window_dims, *numbers.operand_batching_dims))
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
    if operand != 0 or p in away or params["slice_sizes"][p] != _shape(eqn)[p]:
        return None
    if not _stays_in_bounds(eqn, p, numbers.start_index_map):
        return None
    fill = params["fill_value"]  # NaN, also by default, becomes a NaN scale
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP and not (fill is None or fill != fill):
        return None
    return int(numbers.offset_dims[_window(len(_shape(eqn)), away).index(p)])


def _run_gather(eqn: Any, args: list[Any], out: int, width: int) -> Array:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    away = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    sizes = list(params["slice_sizes"])
    p = _window(len(sizes), away)[list(numbers.offset_dims).index(out)]
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
            None if eqn.params.get("dimensions") else _regrouped(_shape(eqn), eqn.params["new_sizes"], p)
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
        lambda eqn, operand, p: p if operand == 0 and eqn.params["slice_sizes"][p] == _shape(eqn)[p] else None,
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


def _holds(move: Move, eqn: Any, out: int, operand: int, p: int) -> dict[int, int]:
    return {operand: p} if move.holds is None else move.holds(eqn, out)


def _dot_reads(eqn: Any, operand: int, p: int) -> str | None:
    """Whether a dot contracts the vectors ("scores") or produces them ("values"); None where it needs floats."""
    contract, batch = (dims[operand] for dims in eqn.params["dimension_numbers"])
    if eqn.params.get("out_sharding") is not None:
        return None
    return reading(_shape(eqn, operand), p, contract, batch)


# --- Analysis --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tracked:
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
        kept = _window(len(_shape(eqn)), eqn.params["dimensions"])
        found = {i for i, p in enumerate(kept) if p in first}
    elif eqn.primitive is prims.reshape_p:
        before = [i for i, n in enumerate(_shape(eqn)) if n != 1]
        after = [i for i, n in enumerate(shape) if n != 1]
        if [_shape(eqn)[i] for i in before] == [shape[i] for i in after]:
            found = {j for i, j in zip(before, after, strict=True) if i in first}
    elif eqn.primitive in _ELEMENTWISE:
        found = set(range(len(shape)))
        for value, var in zip(operands, eqn.invars, strict=True):
            if var.aval.shape:
                found &= value.same if isinstance(value, _Plain) else set()
    return frozenset(found) | _units(shape)


_CALLS = {prims.jit_p, prims.remat_p, prims.closed_call_p}
_LOOPS = {prims.scan_p, prims.while_p}


class _Walk:
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
                values.append(_Tracked(path, tuple((axis, axis + len(jnp.shape(aval))) for axis in axes[path])))
            else:
                values.append(_Plain(_units(getattr(aval, "shape", ()))))
        self.results = self.walk(program.jaxpr, values, ())

    def walk(self, jaxpr: Any, values: Sequence[Any], address: Address) -> list[Any]:
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
        inner = control_flow.bodies(eqn)
        tracked = any(isinstance(v, _Tracked) for v in operands)
        if inner and eqn.primitive in _CALLS:
            return self.walk(inner[0].jaxpr, operands, (*address, inner[0].name))
        if inner and eqn.primitive in _LOOPS:
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
        for i, value in enumerate(results):
            if isinstance(value, _Tracked):
                self.kept += [(value.path, axis, address, i) for axis, _ in value.at]

    def move(self, eqn: Any, operands: list[Any], address: Address) -> list[Any] | None:
        move = MOVES.get(eqn.primitive)
        for i, value in enumerate(operands) if move is not None else ():
            if not isinstance(value, _Tracked):
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
                results = [_Tracked(value.path, tuple(at))] * len(eqn.outvars)
                if eqn.primitive is prims.select_n_p:
                    self.keep(results, address)
                return results
        return None

    def moves_whole(
        self, move: Move, eqn: Any, operands: list[Any], path: str, axis: int, out: int, own: tuple[int, int]
    ) -> bool:
        """Whether the other operands go with it: parts of the same state alike, a mask constant along vectors."""
        for j, where in _holds(move, eqn, out, *own).items():
            other = operands[j]
            if isinstance(other, _Tracked) and (other.path != path or (axis, where) not in other.at):
                return False
        if eqn.primitive is prims.select_n_p and _shape(eqn):
            mask = operands[0]
            return isinstance(mask, _Plain) and out in mask.same
        return True

    def plain(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The results of an equation that reads floats, or codes in a dot."""
        depends: set[str] = set()
        lost: dict[str, str] = {}
        dot = eqn.primitive is prims.dot_general_p
        for i, (value, var) in enumerate(zip(operands, eqn.invars, strict=True)):
            if isinstance(value, _Tracked):
                depends.add(value.path)
                for axis, p in value.at:
                    codes = dot and _dot_reads(eqn, i, p) is not None
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
        if all(isinstance(v, _Tracked) and v.path == first.path for v in values):
            at = tuple(pair for pair in first.at if all(pair in v.at for v in rest))
            if at:
                return _Tracked(first.path, at)
        depends: set[str] = set()
        lost: dict[str, str] = {}
        same: frozenset[int] | None = None
        for value in values:
            if isinstance(value, _Tracked):
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
        n_carry = _carries(eqn)
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
                if isinstance(before, _Tracked) and not isinstance(value, _Tracked):
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
            _Tracked(v.path, tuple((axis, p + 1) for axis, p in v.at))
            if isinstance(v, _Tracked)
            else dataclasses.replace(v, same=frozenset(i + 1 for i in v.same))
            for v in outs[n_carry:]
        ]
        self.keep(results, address)
        return results

    def enter(self, value: Any, how: str, eqn: Any) -> Any:
        """An operand as a body of a loop gets it."""
        if how != "scanned":
            return value
        if not isinstance(value, _Tracked):
            return dataclasses.replace(value, same=frozenset(i - 1 for i in value.same if i))
        at = tuple((axis, p - 1) for axis, p in value.at if p)
        self.reads += [(value.path, axis, eqn.primitive.name, False) for axis, p in value.at if not p]
        if at:
            return _Tracked(value.path, at)
        return _Plain(frozenset(), frozenset({value.path}), ((value.path, eqn.primitive.name),))


def _carries(eqn: Any) -> int:
    """Number of carries of a loop: its first results."""
    return len(eqn.outvars) if eqn.primitive is prims.while_p else control_flow.scan_counts(eqn.params)[1]


def _out_avals(program: Program) -> list[Any]:
    return [var.aval for var in program.jaxpr.jaxpr.outvars]


_NOT_RETURNED = "it is not returned, or computed anew"


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What a walk found about one state variable: the axes that can hold its vectors, or why none can."""

    axes: tuple[int, ...]
    reason: str = ""


def _outcome(program: Program, walk: _Walk, results: Sequence[str | None] | None, path: str) -> _Outcome:
    aval: Any = program.jaxpr.in_avals[program.state.index(path)]
    rank = len(aval.shape)
    every = tuple(i - rank for i in range(rank) if aval.shape[i] > 1)
    if results is None:  # a function does not say which result is what state: a cache is what comes back as one
        where = [i for i, v in enumerate(walk.results) if isinstance(v, _Tracked) and v.path == path]
        if not where:
            return _Outcome((), _NOT_RETURNED)
    else:
        where = [i for i, name in enumerate(results) if name == path]
    axes = every
    for i in where:
        value: Any = walk.results[i]
        if isinstance(value, _Tracked) and value.path == path:
            out = _out_avals(program)[i]
            if (out.shape, out.dtype) != (aval.shape, aval.dtype):
                return _Outcome((), f"it is returned as {out.dtype}{list(out.shape)}")
            axes = tuple(axis for axis, p in value.at if p - rank == axis and axis in axes)
            if not any(p - rank == axis for axis, p in value.at):
                return _Outcome((), "it is returned with its axes in another order")
        elif isinstance(value, _Tracked):
            return _Outcome((), f"its new value is that of {value.path!r}")
        elif path in value.depends:
            operation = dict(value.lost).get(path)
            how = f"'{operation}' of its old one" if operation else "its old one"
            return _Outcome((), f"its new value is computed from {how}, which would have to be quantized again")
    return _Outcome(axes)


def _choose(program: Program, walk: _Walk, results: Sequence[str | None] | None, path: str) -> tuple[int | None, str]:
    """The vector axis of a state variable and what to say of it, or None and why it stays float.

    A dot tells which axes hold vectors: it contracts them, or makes them. Where no dot reads the state, the last does.
    """
    outcome = _outcome(program, walk, results, path)
    if outcome.reason:
        return None, outcome.reason
    floats: dict[int, dict[str, int]] = {axis: {} for axis in _candidates(program)[path]}
    dots = dict.fromkeys(floats, 0)
    for own, axis, what, codes in walk.reads:
        if own == path and codes:
            dots[axis] += 1
        elif own == path:
            floats[axis][what] = floats[axis].get(what, 0) + 1
    likely = [axis for axis in floats if dots[axis]] if any(dots.values()) else [max(floats, default=-1)]
    choices = [axis for axis in likely if axis in outcome.axes]
    if not choices:
        cuts = ", ".join(f"'{what}'" for axis in likely for what in floats.get(axis, ()))
        return None, f"its vectors are cut by {cuts}" if cuts else "it has no vectors"
    axis = min(choices, key=lambda axis: (sum(floats[axis].values()), -axis))
    noted = ", ".join(f"'{what}'" for what in floats[axis])
    return axis, f"dequantized for {noted}" if noted else ""


def _kept(walk: _Walk, axes: Mapping[str, int]) -> frozenset[tuple[Address, int]]:
    return frozenset((address, i) for path, axis, address, i in walk.kept if axes.get(path) == axis)


def _candidates(program: Program) -> dict[str, tuple[int, ...]]:
    """Float state of at least two axes, with its axes longer than 1."""
    found = {}
    for path, aval in zip(program.state, program.jaxpr.in_avals, strict=True):
        if path is None or not hasattr(aval, "shape") or not jnp.issubdtype(aval.dtype, jnp.floating):
            continue
        if len(aval.shape) >= 2:
            found[path] = tuple(i - len(aval.shape) for i, n in enumerate(aval.shape) if n > 1)
    return found


def plan_caches(
    program: Program, results: Sequence[str | None] | None, rules: Sequence[CacheRule], *, strict: bool = True
) -> CachePlan:
    """Decides for every float state variable of at least two axes; integers, scalars and vectors are left as they are.

    Args:
        program: what `trace` gave, with the paths of its state.
        results: per result of the program, the path of the state of which it is the new value, or None; None as a
            whole where that is not known (a function): a cache is then what comes back as one.
        rules: first match wins; state that none matches stays float.
        strict: make an error of a rule that does nothing and of a state variable that a rule names (not sweeps) but
            that cannot be quantized.

    Raises:
        PlanError: as `strict` says.
    """
    candidates = _candidates(program)
    walk = _Walk(program, candidates)
    entries, problems, applied = [], [], [0] * len(rules)
    for path in candidates:
        aval: Any = program.jaxpr.in_avals[program.state.index(path)]
        entry = CacheEntry(path, tuple(aval.shape), jnp.dtype(aval.dtype).name, None)
        index = next((i for i, rule in enumerate(rules) if rule.matches(path)), None)
        if index is None or (spec := rules[index].spec) is None:
            why = "no rule matches it" if index is None else f"kept float by {rules[index].pattern!r}"
            entries.append(dataclasses.replace(entry, reason=why))
            continue
        axis, reason = _choose(program, walk, results, path)
        if axis is None:
            entries.append(dataclasses.replace(entry, reason=reason))
            if not rules[index].sweeps:
                problems.append(
                    f"{path!r} is matched by {rules[index]} but cannot be quantized: {reason}. Put {path!r}: None "
                    "before it, or update the cache with dynamic_update_slice, .at[].set or a where between vectors."
                )
            continue
        applied[index] += 1
        entries.append(dataclasses.replace(entry, spec=spec, axis=axis, reason=reason))
    problems += _idle(rules, applied, entries)
    if strict and problems:
        head = "qjax: the cache rules do not fit the model (strict=True):"
        raise PlanError("\n  - ".join([head, *problems]))
    return _carried_out(program, results, walk, entries)


def _idle(rules: Sequence[CacheRule], applied: Sequence[int], entries: Sequence[CacheEntry]) -> list[str]:
    """A sentence for each rule that quantizes nothing."""
    problems = []
    for rule, count in zip(rules, applied, strict=True):
        if count or rule.spec is None:
            continue
        matched = [e for e in entries if rule.matches(e.name)]
        if any(e.spec for e in matched):
            continue  # an earlier rule took what it matches
        if not matched:
            names = ", ".join(e.name for e in entries)
            problems.append(f"{rule} matches no float state of this call, which has {names or 'none'}.")
        elif rule.sweeps:
            why = "; ".join(f"{e.name!r}: {e.reason}" for e in matched[:4])
            problems.append(f"{rule} quantizes nothing. {why}.")
    return problems


def plan_given(program: Program, results: Sequence[str | None] | None, given: Mapping[str, QCache]) -> CachePlan:
    """The plan of a call whose variables hold packed caches.

    Args:
        program, results: as for `plan_caches`.
        given: the packed caches, by path of the state.

    Raises:
        ValueError: the program does to a cache what cannot be done to a packed one; the message says what.
    """
    walk = _Walk(program, {path: (cache.axis,) for path, cache in given.items()})
    entries = []
    for path, cache in given.items():
        outcome = _outcome(program, walk, results, path)
        # what a function only reads need not come back
        if not outcome.axes and not (results is None and outcome.reason == _NOT_RETURNED):
            reason = outcome.reason or "its vectors are cut"
            raise ValueError(
                f"qjax: {path!r} is packed ({cache!r}), but in this call it cannot stay so: {reason}. Pass the "
                "float cache here, or update it with dynamic_update_slice, .at[].set or a where between vectors."
            )
        entries.append(CacheEntry(path, cache.shape, jnp.dtype(cache.dtype).name, cache.spec, cache.axis))
    return _carried_out(program, results, walk, entries)


def _carried_out(
    program: Program, results: Sequence[str | None] | None, walk: _Walk, entries: Sequence[CacheEntry]
) -> CachePlan:
    packed = {entry.name: entry for entry in entries if entry.spec is not None}
    if results is None:
        names: list[str | None] = [v.path if isinstance(v, _Tracked) else None for v in walk.results]
        avals = dict(zip(program.state, program.jaxpr.in_avals, strict=True))
        outs = _out_avals(program)
        names = [n if n is None or avals[n].shape == out.shape else None for n, out in zip(names, outs, strict=True)]
    else:
        names = list(results)
    axes = {name: entry.axis for name, entry in packed.items() if entry.axis is not None}
    return CachePlan(tuple(entries), _kept(walk, axes), tuple(None if n is None else packed.get(n) for n in names))


# --- Replay ----------------------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Cached:
    """A packed cache, or a part of one, in flight.

    Attributes:
        stored: the packed arrays.
        layer: where the cache is one of a stack, which `stored` is: its index along the first axis.
        stack: says which stack, where there is a layer.
    """

    stored: QCache
    layer: Any = None
    stack: Any = None
    shadow = None

    def tree_flatten(self):
        """The packed cache and the index are its children."""
        return (self.stored, self.layer), self.stack

    @classmethod
    def tree_unflatten(cls, stack, children):
        """Rebuilds from `tree_flatten`."""
        stored, layer = children
        return cls(stored, layer, stack)

    @property
    def base(self) -> QCache:
        """The packed cache by itself: a copy, where it is one of a stack."""
        return self.stored if self.layer is None else kv_cache.layer_of(self.stored, self.layer)

    @property
    def whole(self) -> Cached:
        """All caches of the stack."""
        return Cached(self.stored)

    @property
    def position(self) -> int:
        """The vector axis, counted from the front."""
        return self.stored.axis + self.stored.ndim - (self.layer is not None)

    def materialize(self) -> Array:
        """The float value."""
        return jax.jit(kv_cache.dequantize)(self.base)

    def can_index(self, axis: int) -> bool:
        """Whether `at_layer` has the elements of this axis."""
        return axis == 0 and self.position > 0 and self.layer is None

    def at_layer(self, layer: Array, stack: Any) -> Cached:
        """One element of the first axis, which is not taken out of the stack: it is read and updated there."""
        return Cached(self.stored, layer, stack)

    def shard(self, spec: Any, mesh: Any) -> None:
        """A `shard_map` gets the float value."""
        return None


def _float(value: Any) -> Any:
    return value.materialize() if hasattr(value, "materialize") else value


def entering(eqn: Any, values: Sequence[Any], address: Address, plan: CachePlan) -> list[Any]:
    """Operands of a higher-order equation, with each cache in the form in which it enters the bodies.

    Where a loop carries it, that is the `QCache`: a pytree like any other to the loop. What is closed over or handed on
    stays a `Cached`, and so does a stack of which a loop has one element at a time.
    """
    if eqn.primitive not in _LOOPS:
        return list(values)
    body = control_flow.bodies(eqn)[-1]
    first = len(body.feeds) - _carries(eqn) - sum(feed.how == "scanned" for feed in body.feeds)
    out = list(values)
    for i, feed in enumerate(body.feeds):
        value = out[feed.operand]
        if not isinstance(value, Cached) or feed.how == "whole":
            continue
        if feed.how == "scanned":
            out[feed.operand] = Cached(value.base) if value.position > 0 else value.materialize()
        else:
            out[feed.operand] = value.base if (address, i - first) in plan.kept else value.materialize()
    return out


def inside(values: Sequence[Any]) -> list[Any]:
    """Inputs of a body: a cache that a loop carried is one in flight again."""
    return [Cached(value) if isinstance(value, QCache) else value for value in values]


def leaving(eqn: Any, body: str, values: Sequence[Any], address: Address, plan: CachePlan) -> list[Any]:
    """Results of a body, with each cache in the form in which it leaves: packed where the plan keeps it so.

    One of a stack, of which a scan makes a stack again, is left there.
    """
    if eqn.primitive in _CALLS:
        return list(values)
    kept = plan.kept if body != "while_cond" else ()
    stacked = _carries(eqn) if eqn.primitive is prims.scan_p else len(values)
    out = []
    for i, value in enumerate(values):
        if isinstance(value, Cached):
            if (address, i) not in kept:
                value = value.materialize()
            elif value.layer is None or i < stacked:
                value = value.base
        out.append(value)
    return out


def equation(eqn: Any, values: Sequence[Any], kept: bool) -> list[Any]:
    """A first-order equation of which at least one operand is a cache.

    Args:
        eqn: the equation.
        values: its operands; others may be packed parameters, which are dequantized.
        kept: whether the plan keeps its result packed, where the operation alone does not tell.
    """
    move = MOVES.get(eqn.primitive)
    caches = [(i, v) for i, v in enumerate(values) if isinstance(v, Cached)]
    if move is not None and (kept or eqn.primitive is not prims.select_n_p):
        for i, cached in caches:
            out = move.follow(eqn, i, cached.position)
            if out is None:
                continue
            where = _holds(move, eqn, out, i, cached.position)
            if all(_alike(v.stored, cached.stored) and where.get(j) == v.position for j, v in caches):
                if eqn.primitive is prims.dynamic_update_slice_p and cached.layer is not None and len(caches) == 1:
                    return [_updated(cached, values[1], values[2:])]
                return [_moved(move, eqn, values, cached.base, out, where)]
    if eqn.primitive is prims.dot_general_p:
        i, cached = caches[0]
        if (result := _dot(eqn, [v if j == i else _float(v) for j, v in enumerate(values)], i)) is not None:
            return [result]
    return control_flow.bind(eqn, [_float(v) for v in values])


def _alike(a: QCache, b: QCache) -> bool:
    return (a.spec, a.size) == (b.spec, b.size)


def _updated(cached: Cached, new: Any, starts: Sequence[Any]) -> Cached:
    """A cache of a stack with new vectors from these indices on, in the stack as it is then."""
    with jax.named_scope("quantize_cache"):
        update = kv_cache.quantize(jnp.asarray(_float(new)), cached.stored.spec, cached.position)
    at = [jnp.asarray(i, jnp.int32) for i in (cached.layer, *_from_zero(starts, cached.position))]
    stored = [
        lax.dynamic_update_slice(stack, part[None], at)
        for stack, part in zip(kv_cache.leaves(cached.stored), kv_cache.leaves(update), strict=True)
    ]
    axis = cached.position + 1
    like = cached.stored
    return dataclasses.replace(cached, stored=kv_cache.from_leaves(stored, like, axis, like.dtype))


def _moved(move: Move, eqn: Any, values: Sequence[Any], like: QCache, out: int, where: Mapping[int, int]) -> Cached:
    arrays: dict[int, list[Array]] = {}
    for j, p in where.items():
        value = values[j]
        if not isinstance(value, Cached):
            with jax.named_scope("quantize_cache"):
                value = Cached(kv_cache.quantize(jnp.asarray(_float(value)), like.spec, p))
        arrays[j] = kv_cache.leaves(value.base)
    first, p = next(iter(where.items()))
    moved = []
    for number in range(len(arrays[first])):
        args = [arrays[j][number] if j in arrays else _float(v) for j, v in enumerate(values)]
        moved.append(move.run(eqn, args, out, args[first].shape[p]))
    return Cached(kv_cache.from_leaves(moved, like, out, eqn.outvars[0].aval.dtype))


def dot_reads(eqn: Any, operand: int, cached: Cached) -> str | None:
    """How a dot reads this operand: "scores" or "values" (`cache_dot.reading`), or None where it needs floats.

    Values of codebooks are exact in float32 only.
    """
    codebook = cached.stored.spec.format.kind == "codebook"
    return None if codebook else _dot_reads(eqn, operand, cached.position)


def _dot(eqn: Any, values: Sequence[Any], operand: Any) -> Array | None:
    """A product with codes, or None where it needs floats."""
    cached, x = values[operand], values[1 - operand]
    if dot_reads(eqn, operand, cached) is None:
        return None
    return cache_dot_general(
        jnp.asarray(x),
        cached.base,
        eqn.params["dimension_numbers"],
        operand=operand,
        precision=eqn.params["precision"],
        out_dtype=eqn.outvars[0].aval.dtype,
    )


def returned(values: Sequence[Any], plan: CachePlan) -> list[Any]:
    """The program's results: packed where they are the new values of packed state, else float.

    A new value that does not come from the old one (a cache filled at once) is quantized here.
    """
    results = plan.results or (None,) * len(values)
    out = []
    for value, entry in zip(values, results, strict=True):
        if entry is None:
            out.append(value.materialize() if isinstance(value, Cached) else value)
        else:
            out.append(value.base if isinstance(value, Cached) else entry.pack(_float(value)))
    return out
