"""`quantize`: wraps a Linen module, an NNX module or a function so that it runs quantized.

A wrapped model is polymorphic in its variables: on float ones it runs fake-quant nodes (training), on packed ones
the packed kernels (serving). Every call traces the model anew, so the jit around it is the only cache. Ranges of
activations travel in collections of their own beside the parameters (`qjax.ranges`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
from flax import linen, nnx
from flax.core.scope import in_filter

from passes.kv_cache import as_cache_rules
from passes.plan import Plan
from passes.trace import path_name
from qjax.call import (
    Call,
    Variables,
    calibrate_over,
    calibrated,
    convert_caches,
    convert_call,
    kept_after,
    observe_call,
    param_paths,
    plan_call,
    ranges_of,
    run_call,
    take_ranges,
)
from qjax.ranges import (
    KEPT,
    LEARNED,
    STEP,
    Calibration,
    Flat,
    Schedule,
    flatten,
    nest,
)
from qjax.recipes import Recipe, as_recipe


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
        packed = convert_call(call, self.recipe, ranges.known)
        return {**call.with_params(packed, convert_caches(call, self.recipe))[0], **ranges_of(variables)}

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

    def convert(
        self, params: Variables, *args: Any, calibration: Iterable[Any] | None = None, **kwargs: Any
    ) -> Variables:
        """The parameters with every planned one packed; arguments and errors as for `QuantizedLinen.convert`."""
        if calibration is not None:
            params = self.calibrate(params, calibration, progress=False, **kwargs)
        own, ranges = self._split(params)
        call = self._call(own, args, kwargs)
        values = convert_call(call, self.recipe, take_ranges(ranges)[1].known)
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


def _is_nnx(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Rngs)


class QuantParam(nnx.Param):
    """A learned range of an activation."""


class QuantStat(nnx.Variable):
    """A calibrated or averaged range of an activation, or the step of a schedule."""


class Ranges(nnx.Module):
    """The ranges of a `QuantizedNNX`: a variable for each array, named 'quant_stats/path/of/the/kernel/low'."""

    def values(self) -> dict[str, Any]:
        """Their arrays, by name."""
        variables = {n: v for n, v in vars(self).items() if isinstance(v, QuantStat | QuantParam)}
        return {name: variable.get_value() for name, variable in variables.items()}

    def set(self, values: Mapping[str, Any]) -> None:
        """Takes over arrays, by name."""
        for name, value in values.items():
            kind = QuantParam if name.startswith(f"{LEARNED}/") else QuantStat
            if isinstance(old := getattr(self, name, None), kind):
                old.set_value(value)
            else:
                setattr(self, name, kind(value))

    def collections(self) -> dict[str, dict[str, Any]]:
        """Their arrays as the collections "quant_stats" and "quant"."""
        found: dict[str, Flat] = {KEPT: {}, LEARNED: {}}
        steps = {}
        for name, value in self.values().items():
            collection, _, rest = name.partition("/")
            path, _, part = rest.rpartition("/")
            if path:
                found[collection].setdefault(path, {})[part] = value
            else:
                steps[part] = value
        return {KEPT: {**nest(found[KEPT]), **steps}, LEARNED: nest(found[LEARNED])}

    def keep(self, collections: Mapping[str, Any]) -> None:
        """Takes over collections, in the place of all that there is."""
        values = {}
        for collection in (KEPT, LEARNED):
            tree = collections.get(collection) or {}
            named = {f"{name}/{part}": a for name, arrays in flatten(tree).items() for part, a in arrays.items()}
            named |= {STEP: tree[STEP]} if STEP in tree else {}
            values |= {f"{collection}/{name}": value for name, value in named.items()}
        for stale in set(self.values()) - set(values):
            delattr(self, stale)
        self.set(values)


class QuantizedNNX(nnx.Module):
    """An NNX module that runs quantized, itself an `nnx.Module`.

    `nnx.jit`, `nnx.grad`, `nnx.split`, `nnx.merge` and optimizers work on it as on the module that it wraps
    (`model`, whose parameters it shares); other state (batch statistics, random counters, caches) is updated in
    place by a call. Ranges of activations are in `ranges`: learned ones are `nnx.Param`s; moving averages and the
    step of a schedule are updated by a call while `use_running_average` is False, which `train()` and `eval()` set as
    they do for `nnx.BatchNorm`.
    """

    def __init__(self, model: nnx.Module, recipe: Recipe):
        self.model = model
        self.recipe = recipe
        self.ranges = Ranges()
        self.use_running_average = True

    def _call(self, args: tuple, kwargs: dict[str, Any], method: Any) -> tuple[Call, Callable[[Any], None]]:
        """The call, whose results are the method's and the state after it, and a function that keeps that state.

        NNX objects among the arguments (`rngs=`) have state too.
        """
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_nnx)
        objects = [self.model, *(leaf for leaf in leaves if _is_nnx(leaf))]
        graphs = [nnx.graphdef(o) for o in objects]
        states = [nnx_state(o) for o in objects]
        params = {name for name, _, variable in states[0] if isinstance(variable, nnx.Param)}
        after: list[list[Any]] = []

        def fn(values: Any, inputs: list[Any], others: list[Any]) -> Any:
            merged = []
            for graph, state, new in zip(graphs, states, [values, *others], strict=True):
                flat = [(path, variable.replace(new[name])) for name, path, variable in state]
                merged.append(nnx.merge(graph, nnx.from_flat_state(flat)))
            rest, arguments = iter(merged[1:]), iter(inputs)
            args, kwargs = jax.tree.unflatten(tree, [next(rest if _is_nnx(x) else arguments) for x in leaves])
            model = merged[0]
            bound = getattr(type(model), method) if isinstance(method, str) else method or type(model).__call__
            out = bound(model, *args, **kwargs)
            kept = [[v for v in nnx_state(o) if i > 0 or v[0] not in params] for i, o in enumerate(merged)]
            after[:] = kept
            return out, [[variable.get_value() for _, _, variable in state] for state in kept]

        first, *others = [{name: variable.get_value() for name, _, variable in state} for state in states]
        call = Call(
            fn,
            (first, [leaf for leaf in leaves if not _is_nnx(leaf)], others),
            is_param=lambda path: path[0].idx == 0 and path[1].key in params,
            name=lambda path: path_name(path[1:]),
            state=lambda path: path_name(path[1:]) if path[0].idx == 0 else None,
            # (result, the state of the module and of other objects after the call)
            updates=lambda path: after[0][path[2].idx][0] if path[0].idx == 1 and path[1].idx == 0 else None,
        )

        def keep(values: Any) -> None:
            for o, state, new in zip(objects, after, values, strict=True):
                flat = [(path, variable.replace(v)) for (_, path, variable), v in zip(state, new, strict=True)]
                nnx.update(o, nnx.from_flat_state(flat))

        return call, keep

    def __call__(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """Runs the module: fake-quant on float parameters, packed kernels on packed ones.

        `method` is another method of the module to run, or its name.
        """
        return self._execute(*self._call(args, kwargs, method))

    def _execute(self, call: Call, keep: Callable[[Any], None]) -> Any:
        collections = self.ranges.collections()
        (out, values), after = run_call(call, self.recipe, take_ranges(collections, not self.use_running_average)[1])
        keep(values)
        if after.update:
            self.ranges.keep({**collections, KEPT: kept_after(collections, after)})
        return out

    def plan(self, *args: Any, method: Any = None, **kwargs: Any) -> Plan:
        """Every parameter with its format, or why it stays float; arguments as for a call."""
        known = take_ranges(self.ranges.collections())[1].known
        return plan_call(self._call(args, kwargs, method)[0], self.recipe, known)

    def convert(
        self, *args: Any, calibration: Iterable[Any] | None = None, method: Any = None, **kwargs: Any
    ) -> QuantizedNNX:
        """A copy of this module with every planned parameter packed; this one is left as it is.

        Arguments as for a call, and `calibration` as for `QuantizedLinen.convert`; errors as there.
        """
        collections = self.ranges.collections()
        if calibration is not None:
            seen = self.observe(calibration, progress=False, method=method, **kwargs)
            collections = calibrated(seen, self.recipe)
        known = take_ranges(collections)[1].known
        call, _ = self._call(args, kwargs, method)
        packed, caches = convert_call(call, self.recipe, known), convert_caches(call, self.recipe)
        out = QuantizedNNX(with_nnx_values(self.model, {**packed, **caches}), self.recipe)
        out.ranges.keep(ranges_of(collections))
        return out

    def observe(
        self,
        batches: Iterable[Any],
        *,
        start: Calibration | None = None,
        progress: bool = True,
        method: Any = None,
        **kwargs: Any,
    ) -> Calibration:
        """Collects what the ranges of activations need; arguments as for `QuantizedLinen.observe`.

        State that a call changes (batch statistics, random counters) is left as it is.
        """
        graph, state = nnx.split(self)

        def step(state: Any, args: tuple) -> tuple[dict[str, Any], Plan]:
            module = nnx.merge(graph, state)
            return observe_call(module._call(args, kwargs, method)[0], module.recipe)

        return calibrate_over(step, state, batches, start, progress)

    def calibrate(
        self, batches: Iterable[Any] | Calibration, *, progress: bool = True, method: Any = None, **kwargs: Any
    ) -> QuantizedNNX:
        """Sets the ranges of activations to what batches show, in place; returns this module.

        Arguments and errors as for `QuantizedLinen.calibrate`.
        """
        if not isinstance(batches, Calibration):
            batches = self.observe(batches, progress=progress, method=method, **kwargs)
        self.ranges.keep(calibrated(batches, self.recipe))
        return self


def nnx_state(model: Any) -> list[tuple[str, tuple[Any, ...], nnx.Variable]]:
    """Every variable of an NNX object: path name, path, variable; a shared one once."""
    flat = nnx.to_flat_state(nnx.state(model))
    return [("/".join(map(str, path)), path, variable) for path, variable in flat]


def with_nnx_values(model: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """A copy of an NNX module with the values of some variables replaced, by path name."""
    state = [(path, v.replace(values.get(name, v.get_value()))) for name, path, v in nnx_state(model)]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(state))


def quantize(
    model: Any,
    recipe: Any,
    *,
    strict: bool = True,
    fold_batch_norm: bool = False,
    schedule: Schedule | None = None,
    kv_cache: Any = None,
) -> Any:
    """Wraps a model so that it runs quantized.

    Args:
        model: a Linen module, an NNX module, or a function `fn(params, *args, **kwargs)`.
        recipe: a name (see `qjax.RECIPES`), a format such as `qjax.int4(group=64)`, or a sequence of
            `qjax.Rule`s, of which the first that matches a parameter wins.
        strict: raise a `PlanError` for a rule that does nothing, and for a parameter that a rule names (its pattern
            does not end in a wildcard) but that cannot be quantized.
        fold_batch_norm: multiply batch normalisation into the convolution or matmul before it, in training as in
            serving (`passes.batch_norm`).
        schedule: when training begins to quantize and stops to update moving averages.
        kv_cache: how key-value caches are stored: "int8", "int4" or any other format, `qjax.cache(...)`, or
            {pattern: one of these or None}, where a pattern is a path such as "cache/**/cached_key". `convert` packs
            them; a call takes packed and float ones.

    Returns:
        `QuantizedLinen`, `QuantizedNNX` or `QuantizedFunction`, each with `plan`, `convert` and a call.

    Raises:
        TypeError: `model` or `recipe` is none of these.
        ValueError: no recipe of that name.

    Example:
        >>> q = qjax.quantize(model, "int4")
        >>> print(q.plan(variables, tokens))
        >>> packed = q.convert(variables, tokens)
        >>> logits = q.apply(packed, tokens)
    """
    resolved = as_recipe(recipe, strict=strict)
    if fold_batch_norm or schedule is not None:
        resolved = dataclasses.replace(resolved, fold_batch_norm=fold_batch_norm, schedule=schedule)
    if kv_cache is not None:
        resolved = dataclasses.replace(resolved, kv_cache=as_cache_rules(kv_cache))
    if isinstance(model, linen.Module):
        return QuantizedLinen(model, resolved)
    if isinstance(model, nnx.Module):
        return QuantizedNNX(model, resolved)
    if isinstance(model, type):
        raise TypeError(f"qjax: quantize takes a module instance, not the class {model.__name__}.")
    if callable(model):
        return QuantizedFunction(model, resolved)
    raise TypeError(f"qjax: quantize takes a Linen module, an NNX module or a function, not {type(model).__name__}.")
