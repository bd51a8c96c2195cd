"""`QuantizedNNX`: a Flax NNX module that runs quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from qjax.compile.calibrate import calibrate_over, observe_call
from qjax.compile.calibration import Calibration, calibrated
from qjax.compile.call import Call
from qjax.compile.convert import convert_call
from qjax.compile.plan import plan_call
from qjax.compile.ranges import KEPT, LEARNED, STEP, Flat, flatten, kept_after, nest, ranges_of, take_ranges
from qjax.compile.run import run_call
from qjax.compile.stages import show_call
from qjax.passes.jaxpr.listing import Listing
from qjax.passes.jaxpr.trace import path_name
from qjax.passes.plan.decisions import Plan
from qjax.recipes import Recipe


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

    def show(self, *args: Any, after: str, method: Any = None, **kwargs: Any) -> Listing:
        """The program as it is after a pass; `after` as for `QuantizedLinen.show`, the rest as for a call."""
        ranges = take_ranges(self.ranges.collections())[1]
        return show_call(self._call(args, kwargs, method)[0], self.recipe, ranges, after)

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
        converted = convert_call(call, self.recipe, known)
        out = QuantizedNNX(with_nnx_values(self.model, {**converted.params, **converted.caches}), self.recipe)
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
