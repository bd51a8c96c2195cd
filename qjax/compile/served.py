"""What a call runs as when it is served: the program on packed variables, from shapes alone.

Nothing is packed and nothing compiled: the program is traced with the types of the packed arrays, and each packed
operation in it is asked what computes it on the platform (`runs_as` of the operations, which their lowerings ask too).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.compile.call import Call
from qjax.compile.compiled import Compiled
from qjax.compile.execute import run_compiled
from qjax.compile.packing import packed_params
from qjax.compile.ranges import CallRanges, Flat
from qjax.pallas_kernels.chips.target import platform
from qjax.pallas_kernels.ops.primitive import OPERATIONS, SEPARATE, XLA, XLA_CODES, on_leaves, unflatten
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor, is_packed, packed_type
from qjax.passes.jaxpr.operations import PackedOperation, packed_operations
from qjax.passes.plan.decisions import Entry, Run
from qjax.passes.plan.rules import PlanError
from qjax.recipes import Recipe


def with_leaves(call: Call, leaves: Sequence[Any]) -> Call:
    """The same call on other arrays of the same kinds."""
    other = copy.copy(call)
    other.leaves = list(leaves)
    return other


def packed_call(call: Call, compiled: Compiled) -> Call:
    """The call on packed variables, of which all that its plan packs are types."""

    def packed(entry: Entry, _: Any) -> QTensor:
        assert entry.spec is not None
        assert entry.layout is not None
        return packed_type(entry.shape, jnp.dtype(entry.dtype), entry.spec, entry.layout, entry.order)

    params = dict(compiled.params)
    if not any(map(is_packed, params.values())):
        params.update(packed_params(compiled, packed))
    state = dict(zip(call.state_paths, call.leaves, strict=True))
    caches = compiled.plan.caches.quantized if compiled.plan.caches else ()
    floats = [entry for entry in caches if not isinstance(state[entry.name], QCache)]
    types = {e.name: jax.eval_shape(e.pack, jax.ShapeDtypeStruct(e.shape, e.dtype)) for e in floats}
    leaves = [
        params[path] if path is not None else types.get(state or "", leaf)
        for path, state, leaf in zip(call.paths, call.state_paths, call.leaves, strict=True)
    ]
    return with_leaves(call, leaves)


def served_program(call: Call, compiled: Compiled, recipe: Recipe, ranges: Flat) -> tuple[Any, list[str | None]]:
    """The closed jaxpr that serves a call, and which packed parameter, fold or cache each of its inputs belongs to.

    Ranges that calibration has still to find are zero: they change no operation.
    """
    known = {name: arrays for site in compiled.plan.sites for name, arrays in _ranges(site, compiled, ranges)}
    served = packed_call(call, compiled)

    def run(*leaves: Any) -> list[Any]:
        on = with_leaves(served, leaves)
        params = {path: leaf for path, leaf in zip(on.paths, leaves, strict=True) if path is not None}
        what = dataclasses.replace(compiled, params={**compiled.params, **params})
        results = run_compiled(on, what, recipe, CallRanges({**ranges, **known}))[0]
        return [x for x in jax.tree.leaves(results) if hasattr(x, "dtype")]

    names: list[str | None] = []
    for path, state, leaf in zip(served.paths, served.state_paths, served.leaves, strict=True):
        names += _names(path or state, leaf)
    return jax.make_jaxpr(run)(*served.leaves), names


def _names(name: str | None, leaf: Any) -> list[str | None]:
    """The names of the arrays of a leaf, in the order of its leaves."""
    if isinstance(leaf, FoldedParam):
        folds = (_names(fold, leaf.derived[fold]) for fold in sorted(leaf.derived))
        return [*_names(name, leaf.own), *itertools.chain.from_iterable(folds)]
    packed = isinstance(leaf, QTensor | QCache)
    return [name if packed else None] * len(jax.tree.leaves(leaf))


def _ranges(site: Any, compiled: Compiled, ranges: Flat) -> list[tuple[str, dict[str, Any]]]:
    shape = tuple(compiled.sites.lengths[loop] for loop in site.loops)
    names = [i.range for i in site.inputs if i.range is not None and i.range not in ranges]
    return [(name, dict.fromkeys(("low", "high", "step", "clip"), jnp.zeros(shape, jnp.float32))) for name in names]


def find_runs(call: Call, compiled: Compiled, recipe: Recipe, ranges: Flat) -> tuple[Run, ...]:
    """What each use of a packed parameter, fold or cache runs as, in program order.

    The platform is that of `target_chip`, or else the one that JAX runs on.
    """
    plan = compiled.plan
    if not plan.quantized and not plan.caches:
        return ()
    jaxpr, names = served_program(call, compiled, recipe, ranges)
    found = tuple(run for each in packed_operations(jaxpr, names) for run in _runs(each))
    named = {name for run in found for name in run.names}
    codes = {site.name.partition("#")[0] for site in plan.sites if site.product == "integer"}
    others = []  # what has no operation of its own: lookups, and products on the weight dequantized in place
    for entry in plan.quantized:
        for op in dict.fromkeys(entry.ops):
            if op == "take" or entry.name not in named:
                others.append(Run((entry.name,), op, XLA_CODES if op != "take" and entry.name in codes else XLA))
    return found + tuple(others)


def _runs(found: PackedOperation) -> Iterator[Run]:
    """What an operation runs as; where that is the operations that it stands for, each of these."""
    eqn, types = found.eqn, [atom.aval for atom in found.eqn.invars]
    operation = OPERATIONS[eqn.primitive]
    operands, options = unflatten(types, **eqn.params)
    runs = operation.runs_as(platform(), *operands, **options)
    if runs.name != SEPARATE:
        yield Run(found.names, eqn.primitive.name, runs.name, runs.reason)
        return
    meaning = jax.make_jaxpr(functools.partial(on_leaves(operation.meaning), **eqn.params))(*types)
    inner = [run for each in packed_operations(meaning, found.operands) for run in _runs(each)]
    yield from inner
    if runs.reason and all(run.reason != runs.reason for run in inner):
        yield Run(found.names, eqn.primitive.name, SEPARATE, runs.reason)


def refuse_fallbacks(call: Call, compiled: Compiled, recipe: Recipe, ranges: Flat) -> None:
    """With `strict="kernels"`: a `PlanError` for each operation that does not run as the platform's best kernel."""
    if recipe.strict == "kernels":
        refuse(find_runs(call, compiled, recipe, ranges))


def refuse(runs: Sequence[Run]) -> None:
    """A `PlanError` that names all of these that are not the platform's best kernel."""
    alone = [run for run in runs if run.reason and run.runs != SEPARATE]  # only what follows those is by itself
    fallbacks = [f"{', '.join(run.names)} ({run.operation}): {run.reason}" for run in alone]
    if fallbacks:
        head = f"qjax: these products would run without the kernels of {platform()!r} (strict='kernels'):"
        tail = "Give them a format or a size that a kernel takes, or ask for strict=True."
        raise PlanError("\n  - ".join([head, *dict.fromkeys(fallbacks)]) + f"\n{tail}")
