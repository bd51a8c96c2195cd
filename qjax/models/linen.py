"""Flax Linen: `QuantizedLinen`, `LoraLinen` and their binding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import linen
from flax.core import meta
from flax.core.scope import in_filter
from jaxtyping import Array

from qjax.compile.adapters import LORA, take_adapters
from qjax.compile.calibration import Calibration
from qjax.compile.call import Call, Variables
from qjax.compile.ranges import KEPT, LEARNED, flatten, nest, param_paths
from qjax.models import verbs
from qjax.models.binding import Binding, Inputs, Invocation, Parts
from qjax.passes.jaxpr.listing import Listing
from qjax.passes.jaxpr.trace import path_name
from qjax.passes.plan.adapters import AdapterPlan, AdapterSpec
from qjax.passes.plan.decisions import Plan
from qjax.recipes import Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class _Linen(Binding):
    """Linen modules: variables are collections beside the module."""

    def recognises(self, model: Any) -> bool:
        return isinstance(model, linen.Module)

    def adapt(self, q: QuantizedLinen, spec: AdapterSpec) -> LoraLinen:
        return LoraLinen(q.module, q.recipe, spec)

    def split(self, q: QuantizedLinen, variables: Variables) -> Parts:
        if not isinstance(variables, Mapping):
            raise TypeError(
                "qjax: the first argument is the variables as Module.apply takes them, {'params': ...}; got "
                f"{type(variables).__name__}."
            )
        adapters = None
        if isinstance(q, LoraLinen):  # in other models "lora" is a collection of their own
            variables, adapters = take_adapters(variables)
        ranges = {name: variables[name] for name in (KEPT, LEARNED) if name in variables}
        return Parts({n: t for n, t in variables.items() if n not in ranges}, ranges, adapters)

    def join(self, q: QuantizedLinen, parts: Parts) -> Variables:
        adapters = {} if parts.adapters is None else {LORA: nest(parts.adapters)}
        return {**parts.own, **parts.ranges, **adapters}

    def invocation(self, q: QuantizedLinen, own: Any, inputs: Inputs) -> Invocation:
        how, kwargs = dict(inputs.options), dict(inputs.kwargs)
        mutable, rngs = how.pop("mutable", False), how.pop("rngs", None)
        if rngs is None:  # an exported model takes them as a keyword argument among others
            rngs = kwargs.pop("rngs", None)
        update = mutable is not False and in_filter(mutable, KEPT)
        if mutable == KEPT:
            mutable = []
        elif not isinstance(mutable, bool | str):
            mutable = [name for name in mutable if name != KEPT]

        def fn(variables: Any, args: tuple, kwargs: dict[str, Any], rngs: Any) -> Any:
            return q.module.apply(variables, *args, rngs=rngs, mutable=mutable, **how, **kwargs)

        def collection(path: tuple) -> str | None:
            return getattr(path[1], "key", None) if path[0].idx == 0 else None

        def state(path: tuple) -> str | None:
            name = collection(path)
            return None if name in (None, "params") else f"{name}/{path_name(path[2:])}"

        def finish(out: Any, kept: dict[str, Any] | None) -> Any:
            if kept is None:
                return out
            result, updates = out
            return result, {**updates, KEPT: kept}

        call = Call(
            fn,
            (own, inputs.args, kwargs, rngs),
            is_param=lambda path: collection(path) == "params",
            name=lambda path: path_name(path[2:]),
            state=state,
            # with `mutable`, apply returns its result and the collections
            updates=lambda path: None if mutable is False or path[0].idx == 0 else path_name(path[1:]),
        )
        return Invocation(call, finish, update)

    def tree(self, model: Any, variables: Variables) -> Any:
        return meta.unbox(variables)

    def run(self, model: Any, tree: Any, inputs: Inputs, carried: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
        out = model.apply(tree, *inputs.args, **inputs.options, **inputs.kwargs)
        if inputs.options.get("mutable", False) is False:
            return out, {}
        result, updates = out
        rest = {name: value for name, value in updates.items() if name not in (*carried, "params")}
        return ((result, rest) if rest else result), {name: updates[name] for name in carried}

    def changing(self, tree: Any, inputs: Inputs) -> list[str]:
        mutable = inputs.options.get("mutable", False)
        return sorted(name for name in tree if name != "params" and in_filter(mutable, name))

    def callee(self, q: QuantizedLinen, inputs: Inputs) -> Callable[..., Any]:
        method = inputs.options.get("method") or "__call__"
        return method if callable(method) else getattr(type(q.module), method)

    def parameters(self, model: Any, variables: Variables) -> Any:
        return variables["params"] if isinstance(variables, Mapping) and "params" in variables else {}


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedLinen:
    """A Linen module that runs quantized; `apply` has the signature of `Module.apply`."""

    module: linen.Module
    recipe: Recipe

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

        Raises:
            TypeError: `variables` are no collections.
            ValueError: a range is missing, or adapters are given to a model that does not apply them.
        """
        parts = LINEN.split(self, variables)
        if parts.adapters is None:
            adapters = set(flatten(variables.get(LORA))) & set(param_paths(variables.get("params")))
            if adapters:
                raise ValueError(
                    f"qjax: the variables have an adapter for {min(adapters)!r} in 'lora', which only the model that "
                    "qjax.lora gave applies. Call that one, or leave the collection out."
                )
        options = {"rngs": rngs, "method": method, "mutable": mutable, "capture_intermediates": capture_intermediates}
        return verbs.run(LINEN, self, parts, Inputs(args, kwargs, options))

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
        inputs = Inputs(args, kwargs, {"rngs": rngs, "method": method, "mutable": mutable})
        return verbs.plan(LINEN, self, LINEN.split(self, variables), inputs)

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
        inputs = Inputs(args, kwargs, {"rngs": rngs, "method": method, "mutable": mutable})
        return verbs.show(LINEN, self, LINEN.split(self, variables), inputs, after)

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
        inputs = Inputs(args, kwargs, {"rngs": rngs, "method": method, "mutable": mutable})
        return LINEN.join(self, verbs.convert(LINEN, self, LINEN.split(self, variables), inputs, calibration))

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
        inputs = Inputs((), kwargs, {"rngs": rngs, "method": method, "mutable": mutable})
        parts = LINEN.split(self, variables)
        return verbs.observe(LINEN, self, parts, inputs, batches, start=start, progress=progress)

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
        return LINEN.join(self, verbs.calibrate(self, LINEN.split(self, variables), batches))


@dataclasses.dataclass(frozen=True, eq=False)
class LoraLinen(QuantizedLinen):
    """A quantized Linen module with adapters.

    `apply` is that of `QuantizedLinen` and takes the adapters as the collection "lora"; without it, it is the model
    without adapters.
    """

    spec: AdapterSpec

    def plan(  # type: ignore[override]
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> AdapterPlan:
        """Which parameters take adapters, and why others that a target matches do not.

        Args:
            variables: float or packed; `jax.ShapeDtypeStruct`s will do.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.

        Raises:
            PlanError: the targets do not fit the model.
        """
        inputs = Inputs(args, kwargs, {"rngs": rngs, "method": method, "mutable": mutable})
        return verbs.plan_adapted(LINEN, self, LINEN.split(self, variables), inputs)

    def init(  # type: ignore[override]
        self,
        key: Array,
        variables: Variables,
        *args: Any,
        loftq_iterations: int = 0,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Variables:
        """The variables with new adapters in the collection "lora".

        Args:
            key: for the values of `a`; `b` starts at zero, so that the model starts unchanged.
            variables: packed ones as `convert` gave them; with `loftq_iterations` float ones, which are packed.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.
            loftq_iterations: start from weights and adapters whose sum is close to the float weights (LoftQ, arXiv
                2310.08659), found in so many alternations of quantizing and a singular value decomposition.

        Raises:
            PlanError: the targets do not fit the model.
            TypeError: LoftQ from packed variables.
        """
        inputs = Inputs(args, kwargs, {"rngs": rngs, "method": method, "mutable": mutable})
        parts = LINEN.split(self, variables)
        return LINEN.join(self, verbs.init_adapters(LINEN, self, parts, inputs, key, loftq_iterations))

    def merge(self, variables: Variables, *args: Any, requantize: bool = False, **kwargs: Any) -> Variables:
        """The variables with the adapters added to the weights, without the collection "lora".

        Args:
            variables: with adapters.
            args, kwargs: as for `convert`; needed where the variables are float, which are packed first.
            requantize: pack the sums in the format of their weights again. Otherwise every packed parameter becomes
                float: to serve as it is, or to `convert` with another recipe.
        """

        def pack() -> Parts:
            return LINEN.split(self, self.convert(variables, *args, **kwargs))

        return LINEN.join(self, verbs.merge(LINEN, self, LINEN.split(self, variables), requantize, pack))


LINEN = _Linen("a Linen module", False, QuantizedLinen, LoraLinen, {})
