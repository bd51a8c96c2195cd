"""`quantize`: wraps a Linen module, an NNX module or a function so that it runs quantized.

A wrapped model is polymorphic in its variables: on float ones it runs fake-quant nodes (training), on packed ones
the packed kernels (serving). Every call traces the model anew, so the jit around it is the only cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.extend.core import Literal

from pallas_kernels import numerics
from pallas_kernels.qtensor import FoldedParam, QTensor, fake_quant, is_packed
from pallas_kernels.qtensor import quantize as pack
from passes import control_flow, lower
from passes.plan import Entry, Plan, make_plan
from passes.replay import Absorbed, FoldValue, replay
from passes.sites import Sites, evaluate_fold, find_sites
from passes.trace import Program, path_name, trace
from qjax.recipes import Recipe, as_recipe

Variables = Any
"""A tree of arrays (float or packed) as `Module.apply` takes it."""


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or is_packed(value)


@dataclasses.dataclass
class _Call:
    """One call of a model as a flat function: its array inputs, which of them are parameters, and its results.

    Whatever is no array (flags, strings, None, Python numbers) is part of the call, as it is for `Module.apply`.
    """

    fn: Callable[..., Any]
    inputs: Any  # a tree; the arguments of fn
    is_param: Callable[[tuple], bool]  # says of a key path into `inputs` whether its leaf is a parameter
    name: Callable[[tuple], str]  # the path name of such a leaf

    def __post_init__(self):
        flat, self.tree = jax.tree_util.tree_flatten_with_path(self.inputs, is_leaf=is_packed)
        self.static = {i: leaf for i, (_, leaf) in enumerate(flat) if not _is_array(leaf)}
        dynamic = [(path, leaf) for path, leaf in flat if _is_array(leaf)]
        self.leaves = [leaf for _, leaf in dynamic]
        self.paths = [
            self.name(path) if self.is_param(path) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None
            for path, leaf in dynamic
        ]
        for path, leaf in zip(self.paths, self.leaves, strict=True):
            if path is None and is_packed(leaf):
                raise TypeError("qjax: a packed tensor was passed where the model takes no parameter.")

    def _flat(self, *leaves: Any) -> list[Any]:
        rest, size = iter(leaves), len(self.static) + len(leaves)
        whole = [self.static[i] if i in self.static else next(rest) for i in range(size)]
        out, self.out_tree = jax.tree.flatten(self.fn(*jax.tree.unflatten(self.tree, whole)))
        self.out_static = {i: leaf for i, leaf in enumerate(out) if not _is_array(leaf)}
        return [leaf for leaf in out if _is_array(leaf)]

    def trace(self) -> Program:
        """The float program: packed parameters stand in it as the float arrays they were."""
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) if is_packed(x) else x for x in self.leaves]
        return trace(self._flat, avals, self.paths)

    def results(self, flat: Sequence[Any]) -> Any:
        """The results of the call as the model's own structure."""
        rest, size = iter(flat), len(self.out_static) + len(flat)
        whole = [self.out_static[i] if i in self.out_static else next(rest) for i in range(size)]
        return jax.tree.unflatten(self.out_tree, whole)

    def with_params(self, values: Mapping[str, Any]) -> Any:
        """`inputs` with some parameters replaced."""
        rest = iter(
            values.get(path, leaf) if path is not None else leaf
            for path, leaf in zip(self.paths, self.leaves, strict=True)
        )
        size = len(self.static) + len(self.leaves)
        whole = [self.static[i] if i in self.static else next(rest) for i in range(size)]
        return jax.tree.unflatten(self.tree, whole)


def _plan(call: _Call, recipe: Recipe) -> Plan:
    return make_plan(find_sites(call.trace()), recipe.rules, strict=recipe.strict)


def _run(call: _Call, recipe: Recipe) -> Any:
    """Runs a call: fake-quant for float parameters that the recipe quantizes, packed kernels for packed ones."""
    if any(not is_packed(leaf) for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None):
        recipe.check_patterns([path for path in call.paths if path is not None])
    program = call.trace()
    sites = find_sites(program)
    plan = make_plan(sites, recipe.rules, strict=False)
    params = {path: leaf for path, leaf in zip(call.paths, call.leaves, strict=True) if path is not None}

    values: list[Any] = []
    for path, leaf in zip(call.paths, call.leaves, strict=True):
        if isinstance(leaf, FoldedParam):
            values.append(Absorbed(str(path)) if leaf.own is None else leaf.own)
        elif isinstance(leaf, QTensor):
            values.append(leaf)
        elif path is None or (entry := plan[path]).spec is None:
            values.append(jnp.asarray(leaf))  # NumPy inputs are welcome
        else:
            assert entry.layout is not None
            values.append(fake_quant(jnp.asarray(leaf), entry.spec, entry.layout))
    folds = _fold_values(sites, plan, params)
    if folds or any(isinstance(v, QTensor | Absorbed) for v in values):
        out = replay(program, values, rules=lower.RULES, folds=folds)
    else:
        out = control_flow.evaluate(program.jaxpr, values)

    # A parameter that the model hands back (mutable=True) is handed back as it came in.
    inputs = dict(zip(program.jaxpr.jaxpr.invars, call.leaves, strict=True))
    returned = program.jaxpr.jaxpr.outvars
    out = [inputs.get(var, value) if _is_var(var) else value for var, value in zip(returned, out, strict=True)]
    return call.results(out)


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _fold_values(sites: Sites, plan: Plan, params: Mapping[str, Any]) -> list[FoldValue]:
    stored: dict[str, QTensor] = {}
    for leaf in params.values():
        if isinstance(leaf, FoldedParam):
            stored.update(leaf.derived)
    out = []
    for fold in sites.folds.values():
        entry = plan[fold.name]
        if fold.name in stored:
            value: Any = stored[fold.name]
        elif absorbed := [p for p in fold.expr.params if isinstance(params[p], FoldedParam)]:
            raise ValueError(
                f"qjax: the model makes {fold.name!r} from {', '.join(absorbed)}, which were packed as part of "
                f"{', '.join(stored) or 'nothing'}. The packed variables come from another call of the model "
                "(another method or other flags): convert with the inputs and flags that apply uses."
            )
        elif entry.spec is None:
            continue
        else:
            assert entry.layout is not None
            value = fake_quant(evaluate_fold(fold, params.__getitem__), entry.spec, entry.layout)
        out.append(FoldValue(fold.address, fold.expr.out, fold.loops, value))
    return out


def _convert(call: _Call, recipe: Recipe) -> dict[str, Any]:
    """The packed form of every parameter that the plan quantizes, by path."""
    program = call.trace()
    sites = find_sites(program)
    plan = make_plan(sites, recipe.rules, strict=recipe.strict)
    params = {p: leaf for p, leaf in zip(call.paths, call.leaves, strict=True) if p is not None}
    for path, leaf in params.items():
        if is_packed(leaf):
            raise TypeError(f"qjax: {path!r} is packed already ({leaf!r}); convert takes float variables.")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        if plan[path].spec is not None or plan[path].folded_into:
            numerics.check_finite(leaf, path)

    packed: dict[str, Any] = {}
    for entry in plan.quantized:
        if entry.sources:
            continue
        packed[entry.name] = _pack(jnp.asarray(params[entry.name]), entry)
    derived: dict[str, dict[str, QTensor]] = {}
    for fold in sites.folds.values():
        entry = plan[fold.name]
        if entry.spec is None:
            continue
        floats = {p: jnp.asarray(params[p]) for p in fold.expr.params}
        value = evaluate_fold(fold, floats.__getitem__)
        numerics.check_finite(value, fold.name)
        derived.setdefault(fold.expr.params[0], {})[fold.name] = _pack(value, entry)
        for path in fold.expr.params:
            derived.setdefault(path, {})
    for path, matrices in derived.items():
        leaf = params[path]
        keep = path in packed or plan[path].kept
        own = (packed.get(path, leaf)) if keep else None
        packed[path] = FoldedParam(own, matrices, tuple(leaf.shape), jnp.dtype(leaf.dtype))
    return packed


_pack_jitted = jax.jit(pack, static_argnames=("spec", "layout", "order"))


def _pack(w: Any, entry: Entry) -> QTensor:
    return _pack_jitted(w, spec=entry.spec, layout=entry.layout, order=entry.order)


# --- The three kinds of model --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedLinen:
    """A Linen module that runs quantized; `apply` has the signature of `Module.apply`."""

    module: linen.Module
    recipe: Recipe

    def _call(self, variables: Variables, args: tuple, kwargs: dict[str, Any], how: dict[str, Any]) -> _Call:
        if not isinstance(variables, Mapping):
            raise TypeError(
                "qjax: the first argument is the variables as Module.apply takes them, {'params': ...}; got "
                f"{type(variables).__name__}."
            )
        rngs = how.pop("rngs", None)

        def fn(variables: Any, args: tuple, kwargs: dict[str, Any], rngs: Any) -> Any:
            return self.module.apply(variables, *args, rngs=rngs, **how, **kwargs)

        return _Call(
            fn,
            (variables, args, kwargs, rngs),
            is_param=lambda path: path[0].idx == 0 and getattr(path[1], "key", None) == "params",
            name=lambda path: path_name(path[2:]),
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

        Arguments and results are those of `flax.linen.Module.apply`.
        """
        how = {
            "rngs": rngs,
            "method": method,
            "mutable": mutable,
            "capture_intermediates": capture_intermediates,
        }
        return _run(self._call(variables, args, kwargs, how), self.recipe)

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
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        return _plan(self._call(variables, args, kwargs, how), self.recipe)

    def convert(
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Variables:
        """The variables with every planned parameter packed, in the same tree.

        Args:
            variables: float variables.
            args, rngs, method, mutable, kwargs: as for `apply`; only shapes and dtypes matter.

        Raises:
            PlanError: the recipe does not fit the model.
            ValueError: a parameter has NaN or infinite values; the message names it.
        """
        how = {"rngs": rngs, "method": method, "mutable": mutable}
        call = self._call(variables, args, kwargs, how)
        return call.with_params(_convert(call, self.recipe))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedFunction:
    """A function `fn(params, *args, **kwargs)` that runs quantized; `params` is any tree of arrays."""

    fn: Callable[..., Any]
    recipe: Recipe

    def _call(self, params: Variables, args: tuple, kwargs: dict[str, Any]) -> _Call:
        return _Call(
            lambda params, args, kwargs: self.fn(params, *args, **kwargs),
            (params, args, kwargs),
            is_param=lambda path: path[0].idx == 0,
            name=lambda path: path_name(path[1:]),
        )

    def apply(self, params: Variables, *args: Any, **kwargs: Any) -> Any:
        """Runs the function: fake-quant on float parameters, packed kernels on packed ones."""
        return _run(self._call(params, args, kwargs), self.recipe)

    __call__ = apply

    def plan(self, params: Variables, *args: Any, **kwargs: Any) -> Plan:
        """Every parameter with its format, or why it stays float; arguments as for `apply`."""
        return _plan(self._call(params, args, kwargs), self.recipe)

    def convert(self, params: Variables, *args: Any, **kwargs: Any) -> Variables:
        """The parameters with every planned one packed; arguments and errors as for `QuantizedLinen.convert`."""
        call = self._call(params, args, kwargs)
        return call.with_params(_convert(call, self.recipe))[0]


def _is_nnx(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Rngs)


class QuantizedNNX(nnx.Module):
    """An NNX module that runs quantized, itself an `nnx.Module`.

    `nnx.jit`, `nnx.grad`, `nnx.split`, `nnx.merge` and optimizers work on it as on the module that it wraps
    (`model`, whose parameters it shares); other state (batch statistics, random counters, caches) is updated in
    place by a call.
    """

    def __init__(self, model: nnx.Module, recipe: Recipe):
        self.model = model
        self.recipe = recipe

    def _call(self, args: tuple, kwargs: dict[str, Any], method: Any) -> tuple[_Call, Callable[[Any], None]]:
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
        call = _Call(
            fn,
            (first, [leaf for leaf in leaves if not _is_nnx(leaf)], others),
            is_param=lambda path: path[0].idx == 0 and path[1].key in params,
            name=lambda path: path_name(path[1:]),
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
        call, keep = self._call(args, kwargs, method)
        out, values = _run(call, self.recipe)
        keep(values)
        return out

    def plan(self, *args: Any, method: Any = None, **kwargs: Any) -> Plan:
        """Every parameter with its format, or why it stays float; arguments as for a call."""
        return _plan(self._call(args, kwargs, method)[0], self.recipe)

    def convert(self, *args: Any, method: Any = None, **kwargs: Any) -> QuantizedNNX:
        """A copy of this module with every planned parameter packed; this one is left as it is.

        Arguments as for a call; errors as for `QuantizedLinen.convert`.
        """
        packed = _convert(self._call(args, kwargs, method)[0], self.recipe)
        return QuantizedNNX(with_nnx_values(self.model, packed), self.recipe)


def nnx_state(model: Any) -> list[tuple[str, tuple[Any, ...], nnx.Variable]]:
    """Every variable of an NNX object: path name, path, variable; a shared one once."""
    flat = nnx.to_flat_state(nnx.state(model))
    return [("/".join(map(str, path)), path, variable) for path, variable in flat]


def with_nnx_values(model: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """A copy of an NNX module with the values of some variables replaced, by path name."""
    state = [(path, v.replace(values.get(name, v.get_value()))) for name, path, v in nnx_state(model)]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(state))


def quantize(model: Any, recipe: Any, *, strict: bool = True) -> Any:
    """Wraps a model so that it runs quantized.

    Args:
        model: a Linen module, an NNX module, or a function `fn(params, *args, **kwargs)`.
        recipe: a name (see `qjax.RECIPES`), a format such as `qjax.int4(group=64)`, or a sequence of
            `qjax.Rule`s, of which the first that matches a parameter wins.
        strict: raise a `PlanError` for a rule that does nothing, and for a parameter that a rule names (its pattern
            does not end in a wildcard) but that cannot be quantized.

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
    if isinstance(model, linen.Module):
        return QuantizedLinen(model, resolved)
    if isinstance(model, nnx.Module):
        return QuantizedNNX(model, resolved)
    if isinstance(model, type):
        raise TypeError(f"qjax: quantize takes a module instance, not the class {model.__name__}.")
    if callable(model):
        return QuantizedFunction(model, resolved)
    raise TypeError(f"qjax: quantize takes a Linen module, an NNX module or a function, not {type(model).__name__}.")
