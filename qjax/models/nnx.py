"""Flax NNX: `QuantizedNNX`, `LoraNNX` and their binding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.tree_util import DictKey
from jaxtyping import Array

from qjax.compile.calibration import Calibration
from qjax.compile.call import Call
from qjax.compile.ranges import KEPT, LEARNED, STEP, Flat, flatten, nest
from qjax.models import verbs
from qjax.models.binding import RANGES, Binding, Inputs, Invocation, Parts
from qjax.passes.jaxpr.listing import Listing
from qjax.passes.jaxpr.trace import path_name
from qjax.passes.plan.adapters import AdapterPlan, AdapterSpec
from qjax.passes.plan.decisions import Plan
from qjax.recipes import Recipe

# --- The binding -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _NNX(Binding):
    """NNX modules, which hold their variables: `Parts.own` and the tree are dicts by path name."""

    def recognises(self, model: Any) -> bool:
        return isinstance(model, nnx.Module)

    def adapt(self, q: QuantizedNNX, spec: AdapterSpec) -> LoraNNX:
        return LoraNNX(q, spec)

    def split(self, q: QuantizedNNX | LoraNNX, variables: None = None) -> Parts:
        base = _base(q)
        adapters = q.adapters.flat() if isinstance(q, LoraNNX) else None
        return Parts(_values(base.model), base.ranges.collections(), adapters)

    def join(self, q: QuantizedNNX | LoraNNX, parts: Parts) -> Any:
        base = _base(q)
        out = QuantizedNNX(with_nnx_values(base.model, parts.own), base.recipe)
        out.ranges.keep(parts.ranges)
        return LoraNNX(out, q.spec, parts.adapters) if isinstance(q, LoraNNX) else out

    def invocation(self, q: QuantizedNNX | LoraNNX, own: Any, inputs: Inputs) -> Invocation:
        """The results of the call are those of the method and the state after it, which `finish` takes over.

        NNX objects among the arguments (`rngs=`) have state too.
        """
        base, method = _base(q), inputs.options.get("method")
        leaves, tree = jax.tree.flatten((inputs.args, dict(inputs.kwargs)), is_leaf=_is_nnx)
        objects = [base.model, *(leaf for leaf in leaves if _is_nnx(leaf))]
        graphs = [nnx.graphdef(o) for o in objects]
        states = [nnx_state(o) for o in objects]
        params = {name for name, _, variable in states[0] if isinstance(variable, nnx.Param)}
        after: list[list[Any]] = []

        def fn(values: Any, given: list[Any], others: list[Any]) -> Any:
            merged = []
            for graph, state, new in zip(graphs, states, [values, *others], strict=True):
                flat = [(path, variable.replace(new[name])) for name, path, variable in state]
                merged.append(nnx.merge(graph, nnx.from_flat_state(flat)))
            rest, arguments = iter(merged[1:]), iter(given)
            args, kwargs = jax.tree.unflatten(tree, [next(rest if _is_nnx(x) else arguments) for x in leaves])
            out = _run(merged[0], method, args, kwargs)
            kept = [[v for v in nnx_state(o) if i > 0 or v[0] not in params] for i, o in enumerate(merged)]
            after[:] = kept
            return out, [[variable.get_value() for _, _, variable in state] for state in kept]

        call = Call(
            fn,
            (own, [leaf for leaf in leaves if not _is_nnx(leaf)], list(map(_values, objects[1:]))),
            is_param=lambda path: path[0].idx == 0 and path[1].key in params,
            name=lambda path: path_name(path[1:]),
            state=lambda path: path_name(path[1:]) if path[0].idx == 0 else None,
            # (result, the state of the module and of other objects after the call)
            updates=lambda path: after[0][path[2].idx][0] if path[0].idx == 1 and path[1].idx == 0 else None,
        )

        def finish(results: Any, kept: dict[str, Any] | None) -> Any:
            out, values = results
            for o, state, new in zip(objects, after, values, strict=True):
                flat = [(path, variable.replace(v)) for (_, path, variable), v in zip(state, new, strict=True)]
                nnx.update(o, nnx.from_flat_state(flat))
            if kept is not None:
                base.ranges.keep({**base.ranges.collections(), KEPT: kept})
            return out

        return Invocation(call, finish, not base.use_running_average)

    def tree(self, model: nnx.Module, variables: None = None) -> dict[str, Any]:
        if not isinstance(model, QuantizedNNX):
            return _values(model)
        return {**_values(model.model), **{f"{RANGES}{name}": a for name, a in model.ranges.values().items()}}

    def key_paths(self, model: nnx.Module, tree: Mapping[str, Any]) -> list[tuple[tuple, Any]]:
        paths = {name: path for name, path, _ in nnx_state(model.model if isinstance(model, QuantizedNNX) else model)}
        return [(tuple(map(DictKey, paths.get(name, (name,)))), tree[name]) for name in sorted(tree)]

    def with_tree(self, model: nnx.Module, tree: Mapping[str, Any]) -> nnx.Module:
        if not isinstance(model, QuantizedNNX):
            return with_nnx_values(model, tree)
        out = QuantizedNNX(with_nnx_values(model.model, tree), model.recipe)
        out.ranges.set({n.removeprefix(RANGES): value for n, value in tree.items() if n.startswith(RANGES)})
        return out

    def run(
        self, model: nnx.Module, tree: Any, inputs: Inputs, carried: Sequence[str] = ()
    ) -> tuple[Any, dict[str, Any]]:
        module = self.with_tree(model, tree)
        out = _run(module, inputs.options.get("method"), inputs.args, inputs.kwargs)
        after = self.tree(module)
        return out, {name: after[name] for name in carried}

    def changing(self, tree: Any, inputs: Inputs) -> None:
        return None

    def callee(self, q: QuantizedNNX, inputs: Inputs) -> Callable[..., Any]:
        return _method(q.model, inputs.options.get("method"))

    def parameters(self, model: nnx.Module, variables: None) -> Any:
        return nnx.state(model, nnx.Param)


def _is_nnx(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Rngs)


def _base(q: QuantizedNNX | LoraNNX) -> QuantizedNNX:
    return q.base if isinstance(q, LoraNNX) else q


def _method(module: nnx.Module, method: Any) -> Callable[..., Any]:
    return getattr(type(module), method) if isinstance(method, str) else method or type(module).__call__


def _run(module: nnx.Module, method: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Runs a module of any kind; a wrapped one finds the method in the module that it wraps."""
    if isinstance(module, QuantizedNNX | LoraNNX):
        return module(*args, method=method, **kwargs)
    return _method(module, method)(module, *args, **kwargs)


def nnx_state(model: Any) -> list[tuple[str, tuple[Any, ...], nnx.Variable]]:
    """Every variable of an NNX object: path name, path, variable; a shared one once."""
    flat = nnx.to_flat_state(nnx.state(model))
    return [("/".join(map(str, path)), path, variable) for path, variable in flat]


def with_nnx_values(model: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """A copy of an NNX module with the values of some variables replaced, by path name."""
    state = [(path, v.replace(values.get(name, v.get_value()))) for name, path, v in nnx_state(model)]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(state))


def _values(model: Any) -> dict[str, Any]:
    """The value of every variable of an NNX object, by path name."""
    return {name: variable.get_value() for name, _, variable in nnx_state(model)}


# --- Wrapped modules ---------------------------------------------------------------------------------------------


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

    def __call__(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """Runs the module: fake-quant on float parameters, packed kernels on packed ones.

        `method` is another method of the module to run, or its name.
        """
        return verbs.run(NNX, self, NNX.split(self), Inputs(args, kwargs, {"method": method}))

    def plan(self, *args: Any, method: Any = None, **kwargs: Any) -> Plan:
        """Every parameter with its format, or why it stays float; arguments as for a call."""
        return verbs.plan(NNX, self, NNX.split(self), Inputs(args, kwargs, {"method": method}))

    def show(self, *args: Any, after: str, method: Any = None, **kwargs: Any) -> Listing:
        """The program as it is after a pass; `after` as for `QuantizedLinen.show`, the rest as for a call."""
        return verbs.show(NNX, self, NNX.split(self), Inputs(args, kwargs, {"method": method}), after)

    def convert(
        self, *args: Any, calibration: Iterable[Any] | None = None, method: Any = None, **kwargs: Any
    ) -> QuantizedNNX:
        """A copy of this module with every planned parameter packed; this one is left as it is.

        Arguments as for a call, and `calibration` as for `QuantizedLinen.convert`; errors as there.
        """
        inputs = Inputs(args, kwargs, {"method": method})
        return NNX.join(self, verbs.convert(NNX, self, NNX.split(self), inputs, calibration))

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
        inputs = Inputs((), kwargs, {"method": method})
        return verbs.observe(NNX, self, NNX.split(self), inputs, batches, start=start, progress=progress)

    def calibrate(
        self, batches: Iterable[Any] | Calibration, *, progress: bool = True, method: Any = None, **kwargs: Any
    ) -> QuantizedNNX:
        """Sets the ranges of activations to what batches show, in place; returns this module.

        Arguments and errors as for `QuantizedLinen.calibrate`.
        """
        if not isinstance(batches, Calibration):
            batches = self.observe(batches, progress=progress, method=method, **kwargs)
        self.ranges.keep(verbs.calibrate(self, NNX.split(self), batches).ranges)
        return self


class Adapters(nnx.Module):
    """The adapters of a `LoraNNX`: an `nnx.LoRAParam` for each array, named 'path/of/the/kernel/a'."""

    def __init__(self, adapters: Flat):
        for name, pair in adapters.items():
            for part, value in pair.items():
                setattr(self, f"{name}/{part}", nnx.LoRAParam(value))

    def flat(self) -> Flat:
        """Path of a parameter -> its arrays `a` and `b`."""
        found: Flat = {}
        for name, variable in vars(self).items():
            if isinstance(variable, nnx.LoRAParam):
                path, _, part = name.rpartition("/")
                found.setdefault(path, {})[part] = variable.get_value()
        return found


class LoraNNX(nnx.Module):
    """A quantized NNX module with adapters, itself an `nnx.Module`.

    `base` is the `QuantizedNNX` whose variables it shares, `adapters` holds an `nnx.LoRAParam` for each array:
    `nnx.Optimizer(m, tx, wrt=nnx.LoRAParam)` and `nnx.DiffState(0, nnx.LoRAParam)` train these and nothing else.
    """

    def __init__(self, base: QuantizedNNX, spec: AdapterSpec, adapters: Flat | None = None):
        self.base = base
        self.spec = spec
        self.adapters = Adapters(adapters or {})

    @property
    def recipe(self) -> Recipe:
        """The recipe of `base`."""
        return self.base.recipe

    def __call__(self, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """Runs the module with adapters; before `init`, without."""
        return verbs.run(NNX, self, NNX.split(self), Inputs(args, kwargs, {"method": method}))

    def plan(self, *args: Any, method: Any = None, **kwargs: Any) -> AdapterPlan:
        """Which parameters take adapters; errors as for `LoraLinen.plan`."""
        return verbs.plan_adapted(NNX, self, NNX.split(self), Inputs(args, kwargs, {"method": method}))

    def init(self, key: Array, *args: Any, loftq_iterations: int = 0, method: Any = None, **kwargs: Any) -> LoraNNX:
        """A module with new adapters on the same base; errors as for `LoraLinen.init`.

        With `loftq_iterations` the base must be float: the new module has a packed copy of it.
        """
        inputs = Inputs(args, kwargs, {"method": method})
        parts = verbs.init_adapters(NNX, self, NNX.split(self), inputs, key, loftq_iterations)
        return LoraNNX(NNX.join(self.base, parts) if loftq_iterations else self.base, self.spec, parts.adapters)

    def merge(self, *args: Any, requantize: bool = False, method: Any = None, **kwargs: Any) -> Any:
        """A copy of the wrapped module with the adapters added to its weights: float, or packed again.

        Float, it is a module of the class that was wrapped; packed, a `QuantizedNNX`. Arguments as for
        `LoraLinen.merge`.
        """

        def pack() -> Parts:
            return NNX.split(self.base.convert(*args, method=method, **kwargs))

        parts = verbs.merge(NNX, self, NNX.split(self), requantize, pack)
        return NNX.join(self.base, parts) if requantize else with_nnx_values(self.base.model, parts.own)


NNX = _NNX(
    "an NNX module",
    True,
    QuantizedNNX,
    LoraNNX,
    {
        "rngs": "rngs is for Linen modules; an NNX module holds its own.",
        "mutable": "mutable is for Linen modules; an NNX module holds its own state.",
    },
)
