"""Statistics of inputs, tapped while the float model runs."""

from __future__ import annotations

from typing import Any

from qjax.passes.calibration import statistic
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.values import AtRule, Scope, as_float
from qjax.passes.plan.decisions import QuantizedSite


def observed(site: QuantizedSite) -> AtRule:
    """The rule of calibration: the program's own equation, and the statistics of its inputs."""

    def rule(eqn: Any, values: list[Any], scope: Scope) -> list[Any]:
        tap_input(site, values, scope)
        return control_flow.bind(eqn, [as_float(v) for v in values])

    return rule


def tap_input(site: QuantizedSite, values: list[Any], scope: Scope) -> None:
    """Lets out the statistic of each input of a site, once for those that share a range."""
    for entering in site.inputs:
        key = ("tapped", entering.range)
        if entering.range is not None and key not in scope.memo:
            scope.memo[key] = True
            seen = statistic.observe(as_float(values[entering.operand]), site.spec, entering.axes)
            scope.tap(entering.range, seen, site.loops)
