"""`QuantizedLinen`: a Flax Linen module that runs quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from flax import linen
from flax.core.scope import in_filter

from qjax.compile.calibrate import calibrate_over, observe_call
from qjax.compile.calibration import Calibration, calibrated
from qjax.compile.call import Call, Variables
from qjax.compile.convert import convert_call
from qjax.compile.plan import plan_call
from qjax.compile.ranges import KEPT, flatten, kept_after, param_paths, ranges_of, take_ranges
from qjax.compile.run import run_call
from qjax.compile.stages import show_call
from qjax.passes.jaxpr.listing import Listing
from qjax.passes.jaxpr.trace import path_name
from qjax.passes.plan.decisions import Plan
from qjax.recipes import Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedLinen:
    """A Linen module that runs quantized; `apply` has the signature of `Module.apply`."""

    module: linen.Module
    recipe: Recipe
    _adapts: ClassVar[bool] = False  # whether "lora" is a collection of its own

    def _call(self, variables: Variables, args: tuple, kwargs: dict[str, Any], how: dict[str, Any]) -> Call:
        rngs = how.pop("rngs", None)

        def fn(variables: Any, args: tuple, kwargs: dict[str, Any], rngs: Any) -> Any:
            return self.module.apply(variables, *args, rngs=rngs, **how, **kwargs)

        def collection(path: tuple) -> str | None:
            return getattr(path[1], "key", None) if path[0].idx == 0 else None

        def state(path: tuple) -> str | None:
            name = collection(path)
            return None if name in (None, "params") else f"{name}/{path_name(path[2:])}"

        return Call(
            fn,
            (variables, args, kwargs, rngs),
            is_param=lambda path: collection(path) == "params",
            name=lambda path: path_name(path[2:]),
            state=state,
            # with `mutable`, apply returns its result and the collections
            updates=lambda path: (
                None if how.get("mutable", False) is False or path[0].idx == 0 else path_name(path[1:])
            ),
        )

    @staticmethod
    def _check(variables: Variables) -> None:
        if not isinstance(variables, Mapping):
            raise TypeError(
                "qjax: the first argument is the variables as Module.apply takes them, {'params': ...}; got "
                f"{type(variables).__name__}."
            )

    def init(self, *args: Any, **kwargs: Any) -> Variables:
        """`Module.init`: float variables."""
        return self.module.init(*args, **kwargs)

    def apply(
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Runs the model: fake-quant on float variables, packed kernels on packed ones.

        Arguments and results are those of `flax.linen.Module.apply`. Where ranges of activations are kept, they are in
        the collections "quant_stats" and "quant"; `mutable=["quant_stats"]` (beside the model's own) updates moving
        averages and the step of a schedule, as "batch_stats" are updated.
        """
        self._check(variables)
        adapters = set(flatten(variables.get("lora"))) & set(param_paths(variables.get("params")))
        if adapters and not self._adapts:
            raise ValueError(
                f"qjax: the variables have an adapter for {min(adapters)!r} in 'lora', which only the model that "
                "qjax.lora gave applies. Call that one, or leave the collection out."
            )
        update = mutable is not False and in_filter(mutable, KEPT)
        if isinstance(mutable, str) and mutable == KEPT:
            inner: Any = []
        else:
            inner = mutable if isinstance(mutable, bool | str) else [m for m in mutable if m != KEPT]
        how = {
            "rngs": rngs,
            "method": method,
            "mutable": inner,
            "capture_intermediates": capture_intermediates,
        }
        own, ranges = take_ranges(variables, update)
        out, after = run_call(self._call(own, args, kwargs, how), self.recipe, ranges)
        if not after.update:
            return out
        result, updates = out
        return result, {**updates, KEPT: kept_after(variables, after)}

    __call__ = apply

    def plan(
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Plan:
        """Every parameter with its format, or why it stays float.

        Args:
            variables: float variables; `jax.ShapeDtypeStruct`s will do.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.

        Raises:
            PlanError: the recipe does not fit the model.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        own, ranges = take_ranges(variables)
        return plan_call(self._call(own, args, kwargs, how), self.recipe, ranges.known)

    def show(
        self,
        variables: Variables,
        *args: Any,
        after: str,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Listing:
        """The program as it is after a pass: print it, or `diff` it against another one.

        Args:
            variables: float variables; for "lower", packed ones too.
            after: "trace" (the model's own program), "fold_batch_norm", "observe" (what calibration runs), "fake_quant"
                (what training runs) or "lower" (what serving runs).
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.

        Raises:
            ValueError: there is no such pass.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        own, ranges = take_ranges(variables)
        return show_call(self._call(own, args, kwargs, how), self.recipe, ranges, after)

    def convert(
        self,
        variables: Variables,
        *args: Any,
        calibration: Iterable[Any] | None = None,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Variables:
        """The variables with every planned parameter packed, in the same tree.

        Args:
            variables: float variables.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.
            calibration: batches to calibrate the ranges of activations with, as for `calibrate`; not needed where
                `variables` have them, or where none is kept.

        Raises:
            PlanError: the recipe does not fit the model.
            ValueError: a parameter has NaN or infinite values, or a range is missing; the message names it.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        if calibration is not None:
            variables = self.calibrate(variables, calibration, progress=False, **how, **kwargs)
        own, ranges = take_ranges(variables)
        call = self._call(own, args, kwargs, how)
        converted = convert_call(call, self.recipe, ranges.known)
        return {**call.with_params(converted.params, converted.caches)[0], **ranges_of(variables)}

    def observe(
        self,
        variables: Variables,
        batches: Iterable[Any],
        *,
        start: Calibration | None = None,
        progress: bool = True,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Calibration:
        """Runs the float model on batches and collects what the ranges of activations need.

        One compiled step for each batch shape; memory does not grow with the number of batches.

        Args:
            variables: float variables.
            batches: what `apply` takes after the variables, one batch at a time: a tuple of arguments, or the only one.
            start: an earlier calibration of the same model and recipe to go on with.
            progress: show a progress bar.
            rngs, method, mutable, kwargs: as for `apply`.
        """
        self._check(variables)
        how = {"rngs": rngs, "method": method, "mutable": mutable}

        def step(own: Any, args: tuple) -> tuple[dict[str, Any], Plan]:
            return observe_call(self._call(own, args, kwargs, dict(how)), self.recipe)

        return calibrate_over(step, take_ranges(variables)[0], batches, start, progress)

    def calibrate(
        self, variables: Variables, batches: Iterable[Any] | Calibration, *, progress: bool = True, **kwargs: Any
    ) -> Variables:
        """The variables with the ranges of activations that batches show: collections "quant_stats" and "quant".

        Args:
            variables: float variables.
            batches: as for `observe`, or what `observe` gave.
            progress, kwargs: as for `observe`.

        Raises:
            ValueError: no batches; NaN or infinity in an activation; an activation that no batch reached.
        """
        if not isinstance(batches, Calibration):
            batches = self.observe(variables, batches, progress=progress, **kwargs)
        return {**take_ranges(variables)[0], **calibrated(batches, self.recipe)}
