"""A call of a wrapped model as a function of arrays, ready to be exported."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import meta
from flax.core.scope import in_filter

from qjax.artifact.signature import is_array, plain, split_fixed
from qjax.artifact.state import changed_state
from qjax.checkpoint.leaves import Leaf
from qjax.checkpoint.orbax import is_leaf, leaves_of
from qjax.models.function import QuantizedFunction
from qjax.models.linen import QuantizedLinen
from qjax.models.lora import LoraNNX
from qjax.models.nnx import QuantizedNNX, nnx_state, with_nnx_values

# --- A model as a function of weights and state ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BoundCall:
    """A call of a model in parts.

    Attributes:
        leaves: the variables that a call does not change.
        state: a tree of those that it changes, or None.
        run: `(values of the leaves, state, args, kwargs) -> (out, state)`.
        plan: what is quantized.
        names: of the positional arguments, as far as they are known.
    """

    leaves: list[Leaf]
    state: Any
    run: Callable[[list[Any], Any, tuple, dict[str, Any]], tuple[Any, Any]]
    plan: Any
    names: tuple[str, ...]


def bind_call(q: Any, variables: Any, args: tuple, kwargs: dict[str, Any], method: Any, mutable: Any) -> BoundCall:
    """The call of any kind of wrapped model as a function of arrays."""
    if isinstance(q, LoraNNX):
        raise TypeError("qjax: export takes an NNX module without adapters: merge them first, q = q.merge(...).")
    if isinstance(q, QuantizedNNX):
        return _bind_nnx(q, variables, args, kwargs, method, mutable)
    if not isinstance(q, QuantizedLinen | QuantizedFunction):
        raise TypeError(f"qjax: export takes what qjax.quantize gave, not {type(q).__name__}.")
    if variables is None:
        raise TypeError(f"qjax: export needs packed variables for {type(q).__name__}: export(path, q, packed, ...).")
    variables = meta.unbox(variables)
    if isinstance(q, QuantizedFunction):
        if method is not None or mutable is not False:
            raise TypeError("qjax: a function has neither method nor mutable; pass what it takes as its own arguments.")
        how, changed, names = {}, [], _names(q.fn)
    else:
        how = {"method": method, "mutable": mutable}
        changed = sorted(name for name in variables if name != "params" and in_filter(mutable, name))
        names = _names(method if callable(method) else getattr(type(q.module), method or "__call__"))
    weights = {name: tree for name, tree in variables.items() if name not in changed} if changed else variables
    tree = jax.tree.structure(weights, is_leaf=is_leaf)

    def run(values: list[Any], state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        own = jax.tree.unflatten(tree, values)
        out = q.apply({**own, **state} if changed else own, *args, **how, **kwargs)
        if mutable is False:
            return out, None
        out, updates = out
        rest = {name: tree for name, tree in updates.items() if name not in (*changed, "params")}
        return ((out, rest) if rest else out), {name: updates[name] for name in changed}

    plan = q.plan(variables, *args, **how, **kwargs)
    state = {name: variables[name] for name in changed} or None
    return BoundCall(leaves_of(q, weights), state, run, plan, names)


def _bind_nnx(
    q: QuantizedNNX, variables: Any, args: tuple, kwargs: dict[str, Any], method: Any, mutable: Any
) -> BoundCall:
    if variables is not None:
        raise TypeError("qjax: an NNX module holds its own variables: export(path, q, None, *inputs).")
    if mutable is not False:
        raise TypeError("qjax: mutable is for Linen modules; an NNX module holds its own state.")
    names = [name for name, _, _ in nnx_state(q.model)]
    ranges = list(q.ranges.values())

    def run_all(values: Mapping[str, Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        model = with_nnx_values(q.model, {name: values[name] for name in names})
        module = QuantizedNNX(model, q.recipe)
        module.ranges.set({name: values[name] for name in ranges})
        out = module(*args, method=method, **kwargs)
        return out, {name: v.get_value() for name, _, v in nnx_state(module.model) if name in names}

    def traced(values: Mapping[str, Any], given: Any) -> tuple[list[Any], dict[str, Any]]:
        out, after = run_all(values, *original_call((args, kwargs), given))
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)], after

    values = {name: v.get_value() for name, _, v in nnx_state(q.model)} | q.ranges.values()
    changed = changed_state(traced, values, array_inputs(args, kwargs)[0])
    kept = [name for name in values if name not in changed]

    def run(given: list[Any], state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        out, after = run_all({**dict(zip(kept, given, strict=True)), **(state or {})}, args, kwargs)
        return out, {name: after[name] for name in changed} or None

    names_of_inputs = _names(method if callable(method) else getattr(type(q.model), method or "__call__"))
    plan = q.plan(*args, method=method, **kwargs)
    state = {name: values[name] for name in changed} or None
    return BoundCall(leaves_of(q, None, without=changed), state, run, plan, names_of_inputs)


def _names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the positional parameters after the first: `self`, or the params of a function."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return tuple(p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds)[1:]
    except (TypeError, ValueError):  # some callables have no signature
        return ()


# --- One program ---------------------------------------------------------------------------------------------------


def check_inputs(args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuses inputs that an exported program cannot take."""
    for leaf in jax.tree.leaves((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Module | nnx.Rngs)):
        if isinstance(leaf, nnx.Module | nnx.Rngs):
            raise TypeError(
                f"qjax: the inputs of an exported model are arrays, not {type(leaf).__name__}; make it a part of the "
                "module, whose state the exported program carries."
            )


def array_inputs(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple[tuple, dict[str, Any]], dict[str, str]]:
    """The arrays among the inputs of a call, in plain trees, and what is fixed."""
    inputs, named, fixed = split_fixed(*plain((args, dict(kwargs))))
    return (inputs, named), fixed


def original_call(example: Any, given: Any) -> Any:
    """The tree of `example` with the arrays of a plain one, `plain(example)`, in the place of its own."""
    leaves, tree = jax.tree.flatten(example)
    places = [i if is_array(leaf) else None for i, leaf in enumerate(leaves)]
    order = jax.tree.leaves(plain(jax.tree.unflatten(tree, places)))
    for i, leaf in zip(order, jax.tree.leaves(given), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)
