"""What an exported model takes and returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from qjax.passes.jaxpr.trace import key_name

Shape = tuple[Any, ...]
"""Sizes; a symbolic one is an expression of `jax.export.symbolic_shape`."""


def plain(tree: Any) -> Any:
    """The tree with dicts of their fields in place of nodes that are no dict, list or tuple."""
    if tree is None or type(tree) in (list, tuple):
        return tree if tree is None else type(tree)(map(plain, tree))
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(children) == 1 and not children[0][0]:
        return tree
    fields = children if isinstance(tree, Mapping) else [(path, child) for path, child in children if child is not None]
    return {key_name(path[0]): plain(child) for path, child in fields}


def is_array(value: Any) -> bool:
    """Whether an input of a call is an array; anything else is fixed when the model is exported."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def split_fixed(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any], dict[str, str]]:
    """The arrays of a call, and what else there is: by name its `repr`.

    None stands in the place of what is no array; keyword arguments without arrays are left out.
    """
    fixed: dict[str, str] = {}

    def take(path: tuple, leaf: Any) -> Any:
        if is_array(leaf):
            return leaf
        fixed[jax.tree_util.keystr(path)] = repr(leaf)
        return None

    args, kwargs = jax.tree_util.tree_map_with_path(take, (args, dict(kwargs)))
    return args, {name: tree for name, tree in kwargs.items() if jax.tree.leaves(tree)}, fixed


def show(value: Any) -> str:
    """A tree of arrays as text: `(float32[2,16], {'k': int8[4]})`."""
    match value:
        case None:
            return "None"
        case dict():
            return "{" + ", ".join(f"{k!r}: {show(v)}" for k, v in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(show, value)) + "]"
        case tuple():
            return "(" + ", ".join(map(show, value)) + ("," if len(value) == 1 else "") + ")"
        case _:
            return f"{value.dtype}[{','.join(map(str, value.shape))}]"


@dataclasses.dataclass(frozen=True)
class Signature:
    """What one program takes and gives, weights aside; prints like a function's.

    Attributes:
        names: of the positional arguments.
        args, kwargs: trees of shapes and dtypes; None stands for what was fixed when the model was exported.
        out: the same of the result.
        state: the same of the state; None for a model without.
        fixed: what was fixed, by its place in `(args, kwargs)`.
        donated: the positional arguments whose buffers a call takes over; the state's always are.
    """

    names: tuple[str, ...]
    args: tuple
    kwargs: dict[str, Any]
    out: Any
    state: Any
    fixed: dict[str, str]
    donated: tuple[int, ...]

    @staticmethod
    def of(exported: jax_export.Exported, info: Mapping[str, Any]) -> Signature:
        """Of a program and its entry in the manifest."""
        (_, *args), kwargs = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        out = jax.tree.unflatten(exported.out_tree, exported.out_avals)
        state = None
        if info["stateful"]:
            state, *args = args
            out, _ = out
        return Signature(
            tuple(info["arguments"]), tuple(args), kwargs, out, state, info["fixed"], tuple(info["donated"])
        )

    def __str__(self) -> str:
        inputs = [f"{name}: {show(a)}" for name, a in zip(self.names, self.args, strict=True) if jax.tree.leaves(a)]
        inputs += [f"{name}={show(a)}" for name, a in self.kwargs.items()]
        out = show(self.out)
        return f"({', '.join(['state'] * (self.state is not None) + inputs)}) -> " + (
            out if self.state is None else f"({out}, state)"
        )

    def named(self, tree: Any) -> list[tuple[str, Any]]:
        """The arrays of `(state, args, kwargs)` with a name for messages."""
        found = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            first, *rest = path
            if first.idx == 0:
                name = "state"
            elif first.idx == 1:
                name = self.names[rest[0].idx] if rest[0].idx < len(self.names) else f"argument {rest[0].idx}"
                rest = rest[1:]
            else:
                name, rest = rest[0].key, rest[1:]
            found.append((name + jax.tree_util.keystr(tuple(rest)), leaf))
        return found

    def misfit(self, state: Any, args: tuple, kwargs: Mapping[str, Any]) -> str:
        """What keeps the program from taking these inputs; empty if nothing does."""
        expected = dict(self.named((self.state, self.args, self.kwargs)))
        found = dict(self.named((state, args, kwargs)))
        if missing := [name for name in expected if name not in found]:
            return f"{missing[0]!r} is missing"
        if extra := [name for name in found if name not in expected]:
            return f"{extra[0]!r} is not an array input of the model"
        if jax.tree.structure((state, args, kwargs)) != jax.tree.structure((self.state, self.args, self.kwargs)):
            return "the containers of the inputs (dicts, lists, tuples) are others"
        for name, aval in expected.items():
            value = found[name]
            key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
            dtype = value.dtype if key else jax.dtypes.canonicalize_dtype(value.dtype)  # NumPy's int64 is int32 here
            fits = len(value.shape) == len(aval.shape) and all(
                jax_export.is_symbolic_dim(a) or jax_export.is_symbolic_dim(b) or a == b
                for a, b in zip(aval.shape, value.shape, strict=True)
            )
            if not fits or dtype != aval.dtype:
                return f"{name!r} is {dtype}[{','.join(map(str, value.shape))}], not {show(aval)}"
        return ""
