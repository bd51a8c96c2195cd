"""Functions of parameters: `QuantizedFunction`, `LoraFunction` and their binding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax.core import meta
from jaxtyping import Array

from qjax.compile.adapters import LORA
from qjax.compile.calibration import Calibration
from qjax.compile.call import Call, Variables
from qjax.compile.ranges import KEPT, LEARNED, flatten, nest
from qjax.models import verbs
from qjax.models.binding import Binding, Inputs, Invocation, Parts
from qjax.passes.jaxpr.listing import Listing
from qjax.passes.jaxpr.trace import path_name
from qjax.passes.plan.adapters import AdapterPlan, AdapterSpec
from qjax.passes.plan.decisions import Plan
from qjax.recipes import Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class _Functions(Binding):
    """Functions `fn(params, *args, **kwargs)`: variables are the params, which may be any tree of arrays.

    With ranges or adapters beside them, they are the entry "params" of a dict.
    """

    def recognises(self, model: Any) -> bool:
        return callable(model) and not isinstance(model, type)

    def adapt(self, q: QuantizedFunction, spec: AdapterSpec) -> LoraFunction:
        return LoraFunction(q.fn, q.recipe, spec)

    def split(self, q: QuantizedFunction, variables: Variables) -> Parts:
        names = set(variables) if isinstance(variables, Mapping) else set()
        adapted = isinstance(q, LoraFunction) and LORA in names
        beside = names & {KEPT, LEARNED, *([LORA] if adapted else [])}
        if not beside or names != {"params", *beside}:
            return Parts(variables)
        ranges = {name: variables[name] for name in (KEPT, LEARNED) if name in beside}
        return Parts(variables["params"], ranges, flatten(variables[LORA]) if adapted else None)

    def join(self, q: QuantizedFunction, parts: Parts) -> Variables:
        if not parts.ranges and parts.adapters is None:
            return parts.own
        adapters = {} if parts.adapters is None else {LORA: nest(parts.adapters)}
        return {"params": parts.own, **parts.ranges, **adapters}

    def invocation(self, q: QuantizedFunction, own: Any, inputs: Inputs) -> Invocation:
        call = Call(
            lambda params, args, kwargs: q.fn(params, *args, **kwargs),
            (own, inputs.args, dict(inputs.kwargs)),
            is_param=lambda path: path[0].idx == 0,
            name=lambda path: path_name(path[1:]),
            state=lambda path: None if path[0].idx == 0 else path_name(path[1:]),
        )
        # caches are arguments, which the caller packs
        return Invocation(call, lambda out, kept: out, has_caches=False)

    def tree(self, model: Any, variables: Variables) -> Any:
        return meta.unbox(variables)

    def run(self, model: Any, tree: Any, inputs: Inputs, carried: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
        return model(tree, *inputs.args, **inputs.kwargs), {}

    def changing(self, tree: Any, inputs: Inputs) -> list[str]:
        return []

    def callee(self, q: QuantizedFunction, inputs: Inputs) -> Callable[..., Any]:
        return q.fn

    def parameters(self, model: Any, variables: Variables) -> Any:
        return variables


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A function `fn(params, *args, **kwargs)` that runs quantized; `params` is any tree of arrays.

    Where ranges of activations are kept, what `calibrate` gives takes the place of `params`: a dict with the entries
    "params", "quant_stats" and "quant".
    """

    fn: Callable[..., Any]
    recipe: Recipe

    def apply(self, params: Variables, *args: Any, **kwargs: Any) -> Any:
        """Runs the function: fake-quant on float parameters, packed kernels on packed ones."""
        return verbs.run(FUNCTION, self, FUNCTION.split(self, params), Inputs(args, kwargs))

    __call__ = apply

    def plan(self, params: Variables, *args: Any, **kwargs: Any) -> Plan:
        """Every parameter with its format, or why it stays float; arguments as for `apply`."""
        return verbs.plan(FUNCTION, self, FUNCTION.split(self, params), Inputs(args, kwargs))

    def show(self, params: Variables, *args: Any, after: str, **kwargs: Any) -> Listing:
        """The program as it is after a pass; `after` as for `QuantizedLinen.show`, the rest as for `apply`."""
        return verbs.show(FUNCTION, self, FUNCTION.split(self, params), Inputs(args, kwargs), after)

    def convert(
        self, params: Variables, *args: Any, calibration: Iterable[Any] | None = None, **kwargs: Any
    ) -> Variables:
        """The parameters with every planned one packed; arguments and errors as for `QuantizedLinen.convert`."""
        parts = FUNCTION.split(self, params)
        return FUNCTION.join(self, verbs.convert(FUNCTION, self, parts, Inputs(args, kwargs), calibration))

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
        parts = FUNCTION.split(self, params)
        return verbs.observe(FUNCTION, self, parts, Inputs((), kwargs), batches, start=start, progress=progress)

    def calibrate(
        self, params: Variables, batches: Iterable[Any] | Calibration, *, progress: bool = True, **kwargs: Any
    ) -> Variables:
        """`{"params": params, "quant_stats": ..., "quant": ...}`, or the params alone where no range is kept.

        Arguments and errors as for `QuantizedLinen.calibrate`.
        """
        if not isinstance(batches, Calibration):
            batches = self.observe(params, batches, progress=progress, **kwargs)
        return FUNCTION.join(self, verbs.calibrate(self, FUNCTION.split(self, params), batches))


@dataclasses.dataclass(frozen=True, eq=False)
class LoraFunction(QuantizedFunction):
    """A quantized function with adapters; its variables are a dict with the entries "params" and "lora".

    Ranges of activations stand beside them, as `QuantizedFunction` says.
    """

    spec: AdapterSpec

    def _adapted(self, variables: Variables) -> Parts:
        """The parts of variables that have adapters."""
        parts = FUNCTION.split(self, variables)
        if parts.adapters is None:
            raise TypeError(
                f"qjax: an adapted function takes {{'params': ..., '{LORA}': ...}}, as init gives them; to run it "
                "without adapters, call the quantized function."
            )
        return parts

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Runs the function with adapters.

        Raises:
            TypeError: `variables` have none.
        """
        return verbs.run(FUNCTION, self, self._adapted(variables), Inputs(args, kwargs))

    __call__ = apply

    def plan(self, params: Variables, *args: Any, **kwargs: Any) -> AdapterPlan:  # type: ignore[override]
        """Which parameters take adapters; arguments and errors as for `LoraLinen.plan`."""
        return verbs.plan_adapted(FUNCTION, self, FUNCTION.split(self, params), Inputs(args, kwargs))

    def init(self, key: Array, params: Variables, *args: Any, loftq_iterations: int = 0, **kwargs: Any) -> Variables:
        """`{"params": params, "lora": adapters}`; arguments and errors as for `LoraLinen.init`."""
        parts, inputs = FUNCTION.split(self, params), Inputs(args, kwargs)
        return FUNCTION.join(self, verbs.init_adapters(FUNCTION, self, parts, inputs, key, loftq_iterations))

    def merge(self, variables: Variables, *args: Any, requantize: bool = False, **kwargs: Any) -> Variables:
        """The params with the adapters added (beside ranges, where there are some); as for `LoraLinen.merge`."""

        def pack() -> Parts:
            return FUNCTION.split(self, self.convert(variables, *args, **kwargs))

        return FUNCTION.join(self, verbs.merge(FUNCTION, self, self._adapted(variables), requantize, pack))


FUNCTION = _Functions(
    "a function",
    False,
    QuantizedFunction,
    LoraFunction,
    dict.fromkeys(
        ("method", "rngs", "mutable"), "a function has neither {options}; pass what it takes as its own arguments."
    ),
)
