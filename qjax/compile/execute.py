"""`run_compiled`: carries out what is decided about a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from qjax.compile.call import Call
from qjax.compile.compiled import Compiled
from qjax.compile.ranges import KEPT, CallRanges, moved
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor, fake_quant, fake_quant_with_codes, is_packed
from qjax.passes.analysis.folds import evaluate_fold
from qjax.passes.jaxpr import control_flow, listing
from qjax.passes.jaxpr.replay import replay
from qjax.passes.jaxpr.values import Absorbed, FoldValue, Ref
from qjax.passes.jaxpr.views import View
from qjax.passes.plan.decisions import Entry
from qjax.passes.rewrites import lower, quantized_products
from qjax.passes.rewrites.attention import fused_attention
from qjax.passes.rewrites.caches import PackedCaches
from qjax.passes.rewrites.epilogues import carried_out
from qjax.passes.rewrites.horizontal import joined
from qjax.recipes import Recipe


def run_compiled(call: Call, compiled: Compiled, recipe: Recipe, ranges: CallRanges) -> tuple[Any, CallRanges]:
    """Carries out what is decided about a call; results as of `run_call`."""
    plan = compiled.plan
    packed = any(is_packed(leaf) for leaf in compiled.params.values())
    enabled, frozen = None, False
    if recipe.schedule is not None and not packed:
        if ranges.step is None:
            raise ValueError(
                f"qjax: the recipe has a schedule, which counts steps in '{KEPT}': start from q.calibrate(variables, "
                "batches)."
            )
        enabled = ranges.step >= recipe.schedule.start
        frozen = False if recipe.schedule.freeze is None else ranges.step >= recipe.schedule.freeze

    # A weight whose product is one of codes is needed as codes in training too.
    by_codes = {site.address for site in plan.sites if site.product != "float" and site.weight is not None}
    coded = {site.source for site in compiled.sites.sites if site.address in by_codes}

    def simulated(w: Any, entry: Entry) -> tuple[Any, QTensor | None]:
        """The fake-quantized value of a float one, and its codes where they are needed."""
        assert entry.spec is not None
        assert entry.layout is not None
        codes = None
        with listing.scope(f"fake_quant[{entry.spec}]", entry.name):
            if entry.name in coded:
                value, codes = fake_quant_with_codes(w, entry.spec, entry.layout, entry.order)
            else:
                value = fake_quant(w, entry.spec, entry.layout)
            return (value if enabled is None else jnp.where(enabled, value, w)), codes

    values: list[Any] = []
    for path, leaf in zip(call.paths, call.leaves, strict=True):
        if isinstance(leaf, FoldedParam):
            values.append(Absorbed(str(path)) if leaf.own is None else leaf.own)
        elif isinstance(leaf, QTensor | QCache):
            values.append(leaf)
        elif path is None or (entry := plan[path]).spec is None:
            values.append(jnp.asarray(leaf))  # NumPy inputs are welcome
        else:
            value, codes = simulated(jnp.asarray(leaf), entry)
            values.append(value if codes is None else Ref(codes, View.identity(codes.shape), shadow=value))
    folds = _fold_values(compiled, simulated)
    at = {
        site.address: quantized_products.quantized_product(
            site, ranges.known, tap=ranges.update and not packed, enabled=enabled
        )
        for site in plan.sites
    }
    own = at
    if call.rewrite is not None:
        values, at = call.rewrite(compiled, values, at)
    statistics: dict[str, Any] = {}
    if folds or at or any(isinstance(v, QTensor | Absorbed | QCache) for v in values):
        state = PackedCaches(plan.caches) if plan.caches else None
        kept = (f for f in plan.fusions if all(at.get(address) is own.get(address) for address in f.multiplying))
        fused = [carried_out(f, ranges.known) for f in kept]
        fused += [joined(j) for j in plan.joints if not any((*j.body, dot) in at for dot in j.dots)]
        fused += [fused_attention(found) for found in plan.attentions]
        how: dict[str, Any] = {"rules": lower.RULES, "folds": folds, "at": at, "fused": fused, "state": state}
        out, statistics = replay(compiled.program, values, **how)
    else:
        out = control_flow.evaluate(compiled.program.jaxpr, values)

    # A parameter that the model hands back (mutable=True) is handed back as it came in.
    inputs = dict(zip(compiled.program.jaxpr.jaxpr.invars, call.leaves, strict=True))
    given = {var: leaf for (var, leaf), path in zip(inputs.items(), call.paths, strict=True) if path is not None}
    returned = compiled.program.jaxpr.jaxpr.outvars
    out = [given.get(var, value) if _is_var(var) else value for var, value in zip(returned, out, strict=True)]
    after = ranges
    if ranges.update and not packed:
        step = None if ranges.step is None else ranges.step + 1
        after = CallRanges(moved(plan, ranges.known, statistics, frozen), step, True)
    return call.results(out), after


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _fold_values(compiled: Compiled, simulated: Callable[[Any, Entry], tuple[Any, Any]]) -> list[FoldValue]:
    params = compiled.params
    stored: dict[str, QTensor] = {}
    for leaf in params.values():
        if isinstance(leaf, FoldedParam):
            stored.update(leaf.derived)
    out = []
    for fold in compiled.sites.folds.values():
        entry, shadow = compiled.plan[fold.name], None
        if fold.name in stored:
            value: Any = stored[fold.name]
        elif absorbed := [p for p in fold.expr.params if isinstance(params[p], FoldedParam)]:
            raise ValueError(
                f"qjax: the model makes {fold.name!r} from {', '.join(absorbed)}, which were packed as part of "
                f"{', '.join(stored) or 'nothing'}. The packed variables come from another call of the model "
                "(another method or other flags): convert with the inputs and flags that apply uses."
            )
        elif entry.spec is None:
            continue
        else:
            value, codes = simulated(evaluate_fold(fold, params.__getitem__), entry)
            value, shadow = (value, None) if codes is None else (codes, value)
        out.append(FoldValue(fold.address, fold.expr.out, fold.loops, value, shadow))
    return out
