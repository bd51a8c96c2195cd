"""`plan_joints`: packed products of one input, carried out as one; `joined` does it.

What is joined are dots of one body that multiply the same value (an input that each of them casts or moves alike
counts as one) with weights packed alike, of any width: q, k and v, or the gates of a recurrent cell. Those that a
fusion has (`passes.fuse`: a gate and what it gates, a product and its bias) stay there, and products of integers by
themselves. A joint product stands where the first of its dots stood. Nothing has to move for it but how the program
reads the other weights: casts, transposes and the like of a parameter, which a packed one only keeps track of.

A joint is carried out by `joint_matmul`: one kernel on NVIDIA Hopper, the same products as before elsewhere, bit for
bit. (The gradient of an input that each dot casts by itself is added up before the cast.) Only served models have
joints: training runs none of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal
from jaxtyping import Array

from pallas_kernels.joint_matmul import joint_matmul
from passes.fuse import Fusion, packed_dots, packed_forms
from passes.plan import Entry, Plan
from passes.replay import Fused, Scope, as_float
from passes.sites import Address, Input, Site, Sites
from passes.trace import Program
from passes.views import VIEWS


@dataclasses.dataclass(frozen=True)
class Joint:
    """The decision to carry out dots of one body as one product.

    Attributes:
        names: of the parameters or folds that are multiplied.
        body: address of the body.
        dots: numbers of the equations, ascending.
        operands: for each, which operand is the weight.
        before: numbers of equations after the first dot that read weights of the others.
    """

    names: tuple[str, ...]
    body: Address
    dots: tuple[int, ...]
    operands: tuple[int, ...]
    before: tuple[int, ...]

    def __str__(self) -> str:
        return ", ".join(self.names)


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


def joined(joint: Joint) -> Fused:
    """What `passes.replay` does in place of the dots of a joint."""

    def rule(eqns: Sequence[Any], read: Any, scope: Scope) -> list[Array] | None:
        dots = [eqns[i] for i in joint.dots]
        forms = packed_forms(dots, joint.operands, read)
        if forms is None:
            return None
        x = as_float(read(dots[0].invars[1 - joint.operands[0]]))
        products = joint_matmul(
            forms[0][1].rows(x),
            [form.weight for _, form in forms],
            layers=[form.layer for _, form in forms],
            casts=forms[0][0].view.casts,
            precision=dots[0].params["precision"],
            preferred_element_type=dots[0].params["preferred_element_type"],
        )
        return [form.result(product) for (_, form), product in zip(forms, products, strict=True)]

    return Fused(joint.body, joint.dots, rule, place=joint.dots[0], before=joint.before)
