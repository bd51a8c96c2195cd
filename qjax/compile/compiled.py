"""A call after tracing: what is in it, and what is decided."""

from __future__ import annotations

import dataclasses
from typing import Any

from qjax.compile.call import Call
from qjax.compile.ranges import Flat, not_served
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.passes.analysis.sites import Sites, find_sites
from qjax.passes.jaxpr.trace import Program
from qjax.passes.plan.attention import find as find_attention
from qjax.passes.plan.caches import plan_caches, plan_given
from qjax.passes.plan.decisions import Plan
from qjax.passes.plan.epilogues import plan_fusions
from qjax.passes.plan.horizontal import plan_joints
from qjax.passes.plan.planner import make_plan, with_dynamic
from qjax.passes.plan.rules import PlanError
from qjax.passes.rewrites.batch_norm import fold_batch_norm
from qjax.recipes import Recipe


@dataclasses.dataclass
class Compiled:
    """A call after tracing: its program, what is in it, what is decided, and the values of its variables by path."""

    program: Program
    sites: Sites
    plan: Plan
    params: dict[str, Any]  # parameters, and the state that a folded normalisation reads


def compile_call(
    call: Call, recipe: Recipe, *, strict: bool, ranges: Flat | None = None, deciding: bool = True
) -> Compiled:
    """Traces a call and decides; with `deciding` False nothing about caches that are not packed, and
    nothing about fusing where no weight is.

    `ranges` are those of the variables: the inputs that calibration found none for are dynamic.
    """
    program = call.trace()
    known: dict[str, Any] = {}
    norms: list[tuple[str, str]] = []
    if recipe.fold_batch_norm:
        program, folded, unfolded = fold_batch_norm(program)
        read = {path for norm in folded for path in norm.state}
        known = {path: leaf for path, leaf in zip(call.state_paths, call.leaves, strict=True) if path in read}
        norms = [(n.name, f"folded into {', '.join(n.weight)} ({n.statistics} statistics)") for n in folded]
        norms += [(n.name, n.reason) for n in unfolded]
        if strict and not norms:
            raise PlanError("qjax: fold_batch_norm=True, but this call has no batch normalisation. Leave it out.")
    sites = find_sites(program, frozenset(known))
    plan = with_dynamic(make_plan(sites, recipe.rules, strict=strict), not_served(ranges or {}))
    packed = any(is_packed(leaf) for leaf in call.leaves)
    fusions = plan_fusions(program, sites, plan) if deciding or packed else ()
    joints = plan_joints(program, sites, plan, fusions) if deciding or packed else ()
    plan = dataclasses.replace(plan, norms=tuple(norms), fusions=fusions, joints=joints)
    state = zip(call.state_paths, call.leaves, strict=True)
    given = {name: leaf for name, leaf in state if name is not None and isinstance(leaf, QCache)}
    if given:
        plan = dataclasses.replace(plan, caches=plan_given(program, call.new_state(), given))
    elif recipe.kv_cache and deciding:
        caches = plan_caches(program, call.new_state(), recipe.kv_cache, strict=strict)
        plan = dataclasses.replace(plan, caches=caches)
    if plan.caches:
        attentions = find_attention(program.jaxpr, {site.address for site in plan.sites})
        plan = dataclasses.replace(plan, attentions=tuple(attentions))
    params = {path: leaf for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None}
    return Compiled(program, sites, plan, {**known, **params})


def plan_call(call: Call, recipe: Recipe, ranges: Flat) -> Plan:
    """What the recipe decides about a call."""
    return compile_call(call, recipe, strict=recipe.strict, ranges=ranges).plan
