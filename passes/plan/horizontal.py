"""`plan_joints`: packed products of one input, carried out as one; `joined` does it.

What is joined are dots of one body that multiply the same value (an input that each of them casts or moves alike
counts as one) with weights packed alike, of any width: q, k and v, or the gates of a recurrent cell. Those that a
fusion has (`passes.plan.epilogues`: a gate and what it gates, a product and its bias) stay there, and products of
integers by themselves. A joint product stands where the first of its dots stood. Nothing has to move for it but how the
program reads the other weights: casts, transposes and the like of a parameter, which a packed one only keeps track of.

A joint is carried out by `joint_matmul`: one kernel on NVIDIA Hopper, the same products as before elsewhere, bit for
bit. (The gradient of an input that each dot casts by itself is added up before the cast.) Only served models have
joints: training runs none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from qjax.passes.analysis.sites import Input, Site, Sites
from qjax.passes.jaxpr.moves import VIEWS
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.plan.decisions import Entry, Fusion, Joint, Plan
from qjax.passes.plan.packed_dots import packed_dots


def plan_joints(program: Program, sites: Sites, plan: Plan, fusions: Sequence[Fusion]) -> tuple[Joint, ...]:
    """The joints of a program in which the weights of `plan` are packed, in program order of their bodies.

    Args:
        program, sites, plan: as for `plan_fusions`.
        fusions: what that decided.
    """
    taken = {(*fusion.body, dot) for fusion in fusions for dot in fusion.dots}
    found = []
    for body, jaxpr, dots in packed_dots(program, sites, plan):
        groups: dict[Any, list[int]] = {}
        for i, dot in dots.items():
            if (*body, i) not in taken and dot.quantized is None and isinstance(dot.site.input, Input):
                groups.setdefault(_alike(jaxpr.eqns[i], dot.site, dot.site.input, dot.entry), []).append(i)
        joints = (_joint(body, jaxpr.eqns, {i: dots[i].site for i in sorted(group)}) for group in groups.values())
        found += sorted((joint for joint in joints if joint is not None), key=lambda joint: joint.dots)
    return tuple(found)


def _alike(eqn: Any, site: Site, entering: Input, entry: Entry) -> Any:
    """What dots that are joined have in common."""
    contract, batch = eqn.params["dimension_numbers"]
    x, w = 1 - site.operand, site.operand
    return (
        entering.flow,
        (contract[x], batch[x], eqn.params["precision"], eqn.params["preferred_element_type"]),
        tuple(site.view.axes[i] for i in (*contract[w], *batch[w])),
        (site.view.casts, len(site.view.indexed)),
        (entry.spec, entry.order, entry.dtype),
    )


def _joint(body: Address, eqns: Sequence[Any], sites: dict[int, Site]) -> Joint | None:
    """All of these dots whose weights can be read where the first one stands."""
    producer = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
    first = min(sites)

    def needed(atom: Any) -> list[int] | None:
        """Equations after the first dot that give this value, each after what it reads; None if they are no views."""
        number = -1 if isinstance(atom, Literal) else producer.get(atom, -1)
        if number < first:
            return []
        found = [needed(operand) for operand in eqns[number].invars]
        if eqns[number].primitive not in VIEWS or None in found:
            return None
        return [*(i for numbers in found if numbers for i in numbers), number]

    dots, before = {}, []
    for i, site in sites.items():
        views = needed(eqns[i].invars[site.operand])
        if views is not None:
            dots[i] = site
            before += views
    if len(dots) < 2:
        return None
    names = (site.source if site.number == 0 else f"{site.source}#{site.number}" for site in dots.values())
    operands = tuple(site.operand for site in dots.values())
    return Joint(tuple(names), body, tuple(dots), operands, tuple(dict.fromkeys(before)))
