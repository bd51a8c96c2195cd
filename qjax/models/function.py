"""`QuantizedFunction`: a function of parameters that runs quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qjax.compile.calibrate import calibrate_over, observe_call
from qjax.compile.calibration import Calibration, calibrated
from qjax.compile.call import Call, Variables
from qjax.compile.convert import convert_call
from qjax.compile.plan import plan_call
from qjax.compile.ranges import KEPT, LEARNED, ranges_of, take_ranges
from qjax.compile.run import run_call
from qjax.compile.stages import show_call
from qjax.passes.jaxpr.listing import Listing
from qjax.passes.jaxpr.trace import path_name
from qjax.passes.plan.decisions import Plan
from qjax.recipes import Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A function `fn(params, *args, **kwargs)` that runs quantized; `params` is any tree of arrays.

    Where ranges of activations are kept, what `calibrate` gives takes the place of `params`: a dict with the entries
    "params", "quant_stats" and "quant".
    """

    fn: Callable[..., Any]
    recipe: Recipe

    def _call(self, params: Variables, args: tuple, kwargs: dict[str, Any]) -> Call:
        return Call(
            lambda params, args, kwargs: self.fn(params, *args, **kwargs),
            (params, args, kwargs),
            is_param=lambda path: path[0].idx == 0,
            name=lambda path: path_name(path[1:]),
            state=lambda path: None if path[0].idx == 0 else path_name(path[1:]),
        )

    @staticmethod
    def _split(params: Variables) -> tuple[Variables, dict[str, Any]]:
        """The params, and the collections of ranges that came with them."""
        names = set(params) if isinstance(params, Mapping) else set()
        if "params" in names and names & {KEPT, LEARNED} and names <= {"params", KEPT, LEARNED}:
            return params["params"], {name: params[name] for name in names - {"params"}}
        return params, {}

    def apply(self, params: Variables, *args: Any, **kwargs: Any) -> Any:
        """Runs the function: fake-quant on float parameters, packed kernels on packed ones."""
        own, ranges = self._split(params)
        return run_call(self._call(own, args, kwargs), self.recipe, take_ranges(ranges)[1])[0]

    __call__ = apply

    def plan(self, params: Variables, *args: Any, **kwargs: Any) -> Plan:
        """Every parameter with its format, or why it stays float; arguments as for `apply`."""
        own, ranges = self._split(params)
        return plan_call(self._call(own, args, kwargs), self.recipe, take_ranges(ranges)[1].known)

    def show(self, params: Variables, *args: Any, after: str, **kwargs: Any) -> Listing:
        """The program as it is after a pass; `after` as for `QuantizedLinen.show`, the rest as for `apply`."""
        own, ranges = self._split(params)
        return show_call(self._call(own, args, kwargs), self.recipe, take_ranges(ranges)[1], after)

    def convert(
        self, params: Variables, *args: Any, calibration: Iterable[Any] | None = None, **kwargs: Any
    ) -> Variables:
        """The parameters with every planned one packed; arguments and errors as for `QuantizedLinen.convert`."""
        if calibration is not None:
            params = self.calibrate(params, calibration, progress=False, **kwargs)
        own, ranges = self._split(params)
        call = self._call(own, args, kwargs)
        values = convert_call(call, self.recipe, take_ranges(ranges)[1].known, caches=False).params
        packed = call.with_params(values)[0]
        return {"params": packed, **ranges_of(ranges)} if ranges else packed

    def observe(
        self,
        params: Variables,
        batches: Iterable[Any],
        *,
        start: Calibration | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Calibration:
        """Collects what the ranges of activations need; arguments as for `QuantizedLinen.observe`."""

        def step(own: Any, args: tuple) -> tuple[dict[str, Any], Plan]:
            return observe_call(self._call(own, args, kwargs), self.recipe)

        return calibrate_over(step, self._split(params)[0], batches, start, progress)

    def calibrate(
        self, params: Variables, batches: Iterable[Any] | Calibration, *, progress: bool = True, **kwargs: Any
    ) -> Variables:
        """`{"params": params, "quant_stats": ..., "quant": ...}`; arguments as for `QuantizedLinen.calibrate`."""
        if not isinstance(batches, Calibration):
            batches = self.observe(params, batches, progress=progress, **kwargs)
        return {"params": self._split(params)[0], **calibrated(batches, self.recipe)}
