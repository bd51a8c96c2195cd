"""`plan_caches`: which state of a program can be a packed key-value cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from qjax.pallas_kernels.packed.qcache import QCache
from qjax.passes.analysis.cache_flow import CacheWalk, TrackedCache
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.plan.decisions import CacheEntry, CachePlan
from qjax.passes.plan.rules import CacheRule, PlanError


def _out_avals(program: Program) -> list[Any]:
    return [var.aval for var in program.jaxpr.jaxpr.outvars]


_NOT_RETURNED = "it is not returned, or computed anew"


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What a walk found about one state variable: the axes that can hold its vectors, or why none can."""

    axes: tuple[int, ...]
    reason: str = ""


def _outcome(program: Program, walk: CacheWalk, results: Sequence[str | None] | None, path: str) -> _Outcome:
    aval: Any = program.jaxpr.in_avals[program.state.index(path)]
    rank = len(aval.shape)
    every = tuple(i - rank for i in range(rank) if aval.shape[i] > 1)
    if results is None:  # a function does not say which result is what state: a cache is what comes back as one
        where = [i for i, v in enumerate(walk.results) if isinstance(v, TrackedCache) and v.path == path]
        if not where:
            return _Outcome((), _NOT_RETURNED)
    else:
        where = [i for i, name in enumerate(results) if name == path]
    axes = every
    for i in where:
        value: Any = walk.results[i]
        if isinstance(value, TrackedCache) and value.path == path:
            out = _out_avals(program)[i]
            if (out.shape, out.dtype) != (aval.shape, aval.dtype):
                return _Outcome((), f"it is returned as {out.dtype}{list(out.shape)}")
            axes = tuple(axis for axis, p in value.at if p - rank == axis and axis in axes)
            if not any(p - rank == axis for axis, p in value.at):
                return _Outcome((), "it is returned with its axes in another order")
        elif isinstance(value, TrackedCache):
            return _Outcome((), f"its new value is that of {value.path!r}")
        elif path in value.depends:
            operation = dict(value.lost).get(path)
            how = f"'{operation}' of its old one" if operation else "its old one"
            return _Outcome((), f"its new value is computed from {how}, which would have to be quantized again")
    return _Outcome(axes)


def _choose(
    program: Program, walk: CacheWalk, results: Sequence[str | None] | None, path: str
) -> tuple[int | None, str]:
    """The vector axis of a state variable and what to say of it, or None and why it stays float.

    A dot tells which axes hold vectors: it contracts them, or makes them. Where no dot reads the state, the last does.
    """
    outcome = _outcome(program, walk, results, path)
    if outcome.reason:
        return None, outcome.reason
    floats: dict[int, dict[str, int]] = {axis: {} for axis in _candidates(program)[path]}
    dots = dict.fromkeys(floats, 0)
    for read in walk.reads:
        if read.path == path and read.codes:
            dots[read.axis] += 1
        elif read.path == path:
            floats[read.axis][read.operation] = floats[read.axis].get(read.operation, 0) + 1
    likely = [axis for axis in floats if dots[axis]] if any(dots.values()) else [max(floats, default=-1)]
    choices = [axis for axis in likely if axis in outcome.axes]
    if not choices:
        cuts = ", ".join(f"'{what}'" for axis in likely for what in floats.get(axis, ()))
        return None, f"its vectors are cut by {cuts}" if cuts else "it has no vectors"
    axis = min(choices, key=lambda axis: (sum(floats[axis].values()), -axis))
    noted = ", ".join(f"'{what}'" for what in floats[axis])
    return axis, f"dequantized for {noted}" if noted else ""


def _kept(walk: CacheWalk, axes: Mapping[str, int]) -> frozenset[tuple[Address, int]]:
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
    walk = CacheWalk(program, candidates)
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
    walk = CacheWalk(program, {path: (cache.axis,) for path, cache in given.items()})
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
    program: Program, results: Sequence[str | None] | None, walk: CacheWalk, entries: Sequence[CacheEntry]
) -> CachePlan:
    packed = {entry.name: entry for entry in entries if entry.spec is not None}
    if results is None:
        names: list[str | None] = [v.path if isinstance(v, TrackedCache) else None for v in walk.results]
        avals = dict(zip(program.state, program.jaxpr.in_avals, strict=True))
        outs = _out_avals(program)
        names = [n if n is None or avals[n].shape == out.shape else None for n, out in zip(names, outs, strict=True)]
    else:
        names = list(results)
    axes = {name: entry.axis for name, entry in packed.items() if entry.axis is not None}
    dots = {
        (read.address, read.operand): read.codes
        for read in walk.reads
        if read.codes and axes.get(read.path) == read.axis and _multiplies_codes(packed[read.path])
    }
    returned = tuple(None if n is None else packed.get(n) for n in names)
    return CachePlan(tuple(entries), _kept(walk, axes), returned, dots)


def _multiplies_codes(entry: CacheEntry) -> bool:
    """Whether a dot takes the codes of a cache as they are; values of codebooks are exact in float32 only."""
    return entry.spec is not None and entry.spec.format.kind != "codebook"
