"""`plan_call`: every decision about a call, and what its products run as."""

from __future__ import annotations

import dataclasses

from qjax.compile.call import Call
from qjax.compile.compiled import EVERYTHING, compile_call
from qjax.compile.ranges import Flat
from qjax.compile.served import find_runs, refuse
from qjax.passes.plan.decisions import Plan
from qjax.recipes import Recipe


def plan_call(call: Call, recipe: Recipe, ranges: Flat) -> Plan:
    """What the recipe decides about a call, and what each packed operation runs as on the platform.

    Raises:
        PlanError: the recipe does not fit the model; with `strict="kernels"` also an operation that no kernel takes.
    """
    compiled = compile_call(call, recipe, EVERYTHING, strict=bool(recipe.strict), ranges=ranges)
    runs = find_runs(call, compiled, recipe, ranges)
    if recipe.strict == "kernels":
        refuse(runs)
    return dataclasses.replace(compiled.plan, runs=runs)
