"""`packed_dots`: the products of packed weights in a program, body by body."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from qjax.passes.analysis.sites import Site, Sites
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.plan.decisions import Entry, Plan, QuantizedSite

# --- The decision ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PackedDot:
    """A dot with a packed weight.

    Attributes:
        site, entry: the weight, and the decision for it.
        quantized: the decision for the other operand, where integers are multiplied.
    """

    site: Site
    entry: Entry
    quantized: QuantizedSite | None


def packed_dots(program: Program, sites: Sites, plan: Plan) -> Iterator[tuple[Address, Any, dict[int, PackedDot]]]:
    """The dots of packed weights: address and jaxpr of each body that has some, and they by number."""
    quantized = {site.address: site for site in plan.sites}
    dots: dict[Address, dict[int, PackedDot]] = {}
    for site in sites.sites:
        entry, inputs = plan[site.source], quantized.get(site.address)
        alone = entry.spec is None or entry.layout != site.layout or (inputs and inputs.product != "integer")
        if site.op == "dot" and not alone and "shard_map" not in site.address:
            number = site.address[-1]
            assert isinstance(number, int)
            dots.setdefault(site.address[:-1], {})[number] = PackedDot(site, entry, inputs)
    for address, jaxpr in _bodies(program.jaxpr, (), {body[:i] for body in dots for i in range(len(body) + 1)}):
        if address in dots:
            yield address, jaxpr, dots[address]


def _bodies(jaxpr: Any, address: Address, wanted: set[Address]) -> Iterator[tuple[Address, Any]]:
    """The bodies at the wanted addresses and on the way to them."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    yield address, jaxpr
    for i, eqn in enumerate(jaxpr.eqns):
        if (*address, i) in wanted:
            for body in control_flow.bodies(eqn):
                if (*address, i, body.name) in wanted:
                    yield from _bodies(body.jaxpr, (*address, i, body.name), wanted)
