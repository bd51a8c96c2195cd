"""A call after tracing: what is in it, and what is decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.compile.call import Call
from qjax.compile.ranges import Flat, not_served
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor
from qjax.passes.analysis.sites import Sites, find_sites
from qjax.passes.jaxpr.trace import Program
from qjax.passes.plan.attention import plan_attention
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


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which decisions a verb needs beside what becomes of each parameter and input.

    Attributes:
        caches: how float caches are stored; what is packed already is decided always.
        products: which products of packed weights are carried out with what follows them, or side by side.
    """

    caches: bool = False
    products: bool = False


EVERYTHING = Wanted(caches=True, products=True)


def compile_call(call: Call, recipe: Recipe, wanted: Wanted, *, strict: bool, ranges: Flat | None = None) -> Compiled:
    """Traces a call once and decides what is wanted.

    Args:
        call: with float variables, packed ones (of which the plan says what is stored), or some of each.
        recipe: its rules.
        wanted: the decisions that are needed.
        strict: as for `make_plan`.
        ranges: those of the variables: the inputs that calibration found none for are dynamic.

    Raises:
        PlanError: as `make_plan` and `plan_caches`.
    """
    program = call.trace()
    program, folded, norms = _fold_norms(program, recipe, strict)
    known = {path: leaf for path, leaf in zip(call.state_paths, call.leaves, strict=True) if path in folded}
    sites = find_sites(program, frozenset(known))
    params = {path: leaf for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None}
    plan = make_plan(sites, recipe.rules, strict=strict, packed=packed_matrices(params))
    plan = dataclasses.replace(with_dynamic(plan, not_served(ranges or {})), norms=norms)

    state = {name: leaf for name, leaf in zip(call.state_paths, call.leaves, strict=True) if name is not None}
    given = {name: leaf for name, leaf in state.items() if isinstance(leaf, QCache)}
    if given:
        plan = dataclasses.replace(plan, caches=plan_given(program, call.new_state(), given))
    elif recipe.kv_cache and wanted.caches:
        caches = plan_caches(program, call.new_state(), recipe.kv_cache, strict=strict)
        plan = dataclasses.replace(plan, caches=caches)

    if wanted.products:
        fusions = plan_fusions(program, sites, plan)
        joints = plan_joints(program, sites, plan, fusions)
        plan = dataclasses.replace(plan, fusions=fusions, joints=joints)
    if plan.caches and (given or wanted.products):
        names = {matmul.address: matmul.name for matmul in sites.unweighted}
        attentions = plan_attention(program, plan.caches, {site.address for site in plan.sites}, names)
        plan = dataclasses.replace(plan, attentions=attentions)
    return Compiled(program, sites, plan, {**known, **params})


def _fold_norms(
    program: Program, recipe: Recipe, strict: bool
) -> tuple[Program, frozenset[str], tuple[tuple[str, str], ...]]:
    """The program with its batch normalisations folded, the state that they read, and what the plan says of each."""
    if not recipe.fold_batch_norm:
        return program, frozenset(), ()
    program, folded, unfolded = fold_batch_norm(program)
    norms = [(n.name, f"folded into {', '.join(n.weight)} ({n.statistics} statistics)") for n in folded]
    norms += [(n.name, n.reason) for n in unfolded]
    if strict and not norms:
        raise PlanError("qjax: fold_batch_norm=True, but this call has no batch normalisation. Leave it out.")
    return program, frozenset(path for norm in folded for path in norm.state), tuple(norms)


def packed_matrices(params: Mapping[str, Any]) -> dict[str, QTensor]:
    """The packed parameters and folds among these variables, by the name that they have in a plan."""
    found: dict[str, QTensor] = {}
    for path, leaf in params.items():
        if isinstance(leaf, FoldedParam):
            found.update(leaf.derived)
            leaf = leaf.own
        if isinstance(leaf, QTensor):
            found[path] = leaf
    return found
