"""Packs what the plan of a call quantizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.compile.call import Call
from qjax.compile.compiled import Wanted, compile_call
from qjax.compile.ranges import Flat
from qjax.compile.ranges import check as check_ranges
from qjax.pallas_kernels.numbers import numerics
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor, is_packed
from qjax.pallas_kernels.packed.qtensor import quantize as pack
from qjax.passes.analysis.folds import evaluate_fold
from qjax.passes.plan.decisions import Entry
from qjax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Converted:
    """The packed form of what the plan quantizes: parameters by path, and caches by the path of their state."""

    params: dict[str, Any]
    caches: dict[str, QCache]


def convert_call(call: Call, recipe: Recipe, ranges: Flat, *, caches: bool = True) -> Converted:
    """Packs the parameters of a call, and with `caches` its state; what is packed of that already stays as it is.

    Raises:
        PlanError: the recipe does not fit the model.
        TypeError: a parameter is packed already.
        ValueError: a parameter has NaN or infinite values, or a range is missing; the message names it.
    """
    compiled = compile_call(call, recipe, Wanted(caches=caches), strict=recipe.strict, ranges=ranges)
    sites, plan = compiled.sites, compiled.plan
    check_ranges(plan, ranges)
    params = compiled.params
    for path, leaf in params.items():
        if is_packed(leaf):
            raise TypeError(f"qjax: {path!r} is packed already ({leaf!r}); convert takes float variables.")
        if isinstance(leaf, jax.ShapeDtypeStruct) or path not in call.paths:
            continue
        if plan[path].spec is not None or plan[path].folded_into:
            numerics.check_finite(leaf, path)

    packed: dict[str, Any] = {}
    for entry in plan.quantized:
        if entry.sources:
            continue
        packed[entry.name] = _pack(jnp.asarray(params[entry.name]), entry)
    derived: dict[str, dict[str, QTensor]] = {}
    for fold in sites.folds.values():
        entry = plan[fold.name]
        if entry.spec is None:
            continue
        floats = {p: jnp.asarray(params[p]) for p in fold.expr.params}
        value = evaluate_fold(fold, floats.__getitem__)
        numerics.check_finite(value, fold.name)
        own_parts = [path for path in fold.expr.params if path in call.paths]  # state stays where it is
        derived.setdefault(own_parts[0], {})[fold.name] = _pack(value, entry)
        for path in own_parts:
            derived.setdefault(path, {})
    for path, matrices in derived.items():
        leaf = params[path]
        keep = path in packed or plan[path].kept
        own = (packed.get(path, leaf)) if keep else None
        packed[path] = FoldedParam(own, matrices, tuple(leaf.shape), jnp.dtype(leaf.dtype))
    state = dict(zip(call.state_paths, call.leaves, strict=True))
    floats = [e for e in (plan.caches.quantized if plan.caches else ()) if not isinstance(state[e.name], QCache)]
    return Converted(packed, {entry.name: entry.pack(state[entry.name]) for entry in floats})


pack_jitted = jax.jit(pack, static_argnames=("spec", "layout", "order"))


def _pack(w: Any, entry: Entry) -> QTensor:
    return pack_jitted(w, spec=entry.spec, layout=entry.layout, order=entry.order)
