"""A call of a wrapped model as a function of arrays, ready to be exported."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from qjax.artifact.signature import is_array, plain, split_fixed
from qjax.artifact.state import changed_state
from qjax.checkpoint.leaves import Leaf
from qjax.checkpoint.orbax import check_unadapted, leaves_of
from qjax.models import verbs
from qjax.models.binding import Binding, Inputs, is_leaf
from qjax.models.frameworks import binding_of

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
    """The call of a wrapped model of any framework as a function of arrays; arguments and errors as for `export`."""
    binding = binding_of(q)
    if binding is None:
        raise TypeError(f"qjax: export takes what qjax.quantize gave, not {type(q).__name__}.")
    check_unadapted(binding, q, "export")
    binding.check_held(variables, "export(path, q, None, *inputs)")
    if not binding.holds_variables and variables is None:
        raise TypeError(f"qjax: export needs packed variables for {type(q).__name__}: export(path, q, packed, ...).")
    inputs = Inputs(args, kwargs, binding.options(method=method, mutable=mutable))
    whole = binding.tree(q, variables)
    changed = binding.changing(whole, inputs)
    if changed is None:
        changed = _found_changing(binding, q, whole, inputs)
    weights = {name: tree for name, tree in whole.items() if name not in changed} if changed else whole
    structure = jax.tree.structure(weights, is_leaf=is_leaf)

    def run(values: list[Any], state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        own = jax.tree.unflatten(structure, values)
        given = Inputs(args, kwargs, inputs.options)
        out, after = binding.run(q, {**own, **state} if changed else own, given, changed)
        return out, after or None

    plan = verbs.plan(binding, q, binding.split(q, None if binding.holds_variables else whole), inputs)
    state = {name: whole[name] for name in changed} or None
    return BoundCall(leaves_of(binding, q, weights), state, run, plan, _names(binding.callee(q, inputs)))


def _found_changing(binding: Binding, q: Any, tree: dict[str, Any], inputs: Inputs) -> list[str]:
    """The entries of a tree that a call changes such that something depends on it, found in its program."""

    def traced(tree: dict[str, Any], given: Any) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = original_call((inputs.args, inputs.kwargs), given)
        out, after = binding.run(q, tree, Inputs(args, kwargs, inputs.options), list(tree))
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)], after

    return changed_state(traced, tree, array_inputs(inputs.args, inputs.kwargs)[0])


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
