"""Packs what the plan of a call quantizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from qjax.compile.call import Call
from qjax.compile.compiled import Wanted, compile_call
from qjax.compile.packing import packed_params
from qjax.compile.ranges import Flat
from qjax.compile.ranges import check as check_ranges
from qjax.compile.served import refuse_fallbacks
from qjax.pallas_kernels.numbers import numerics
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import QTensor, is_packed, quantize
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
    compiled = compile_call(
        call,
        recipe,
        Wanted(caches=caches, products=recipe.strict == "kernels"),
        strict=bool(recipe.strict),
        ranges=ranges,
    )
    plan = compiled.plan
    check_ranges(plan, ranges)
    refuse_fallbacks(call, compiled, recipe, ranges)
    params = compiled.params
    for path, leaf in params.items():
        if is_packed(leaf):
            raise TypeError(f"qjax: {path!r} is packed already ({leaf!r}); convert takes float variables.")
        if isinstance(leaf, jax.ShapeDtypeStruct) or path not in call.paths:
            continue
        if plan[path].spec is not None or plan[path].folded_into:
            numerics.check_finite(leaf, path)

    def pack(entry: Entry, value: Callable[[], Any]) -> QTensor:
        w = value()
        if entry.sources:
            numerics.check_finite(w, entry.name)
        return pack_jitted(w, spec=entry.spec, layout=entry.layout, order=entry.order)

    packed = packed_params(compiled, pack)
    state = dict(zip(call.state_paths, call.leaves, strict=True))
    floats = [e for e in (plan.caches.quantized if plan.caches else ()) if not isinstance(state[e.name], QCache)]
    return Converted(packed, {entry.name: entry.pack(state[entry.name]) for entry in floats})


pack_jitted = jax.jit(quantize, static_argnames=("spec", "layout", "order"))
