"""`trace`: a function and its inputs to a `Program`, a jaxpr whose parameters are known by path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey

Address = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function.

    Attributes:
        jaxpr: closed; its inputs are the leaves given to `trace`, parameters among them. No parameter is a
            constant of it.
        paths: per input, the path of the parameter, or None for any other input.
        state: per input, the path of the variable that is no parameter (running statistics and the like, known when
            a model is converted), or None for any other input.
    """

    jaxpr: Any
    paths: tuple[str | None, ...]
    state: tuple[str | None, ...]


def key_name(key: Any) -> str:
    """One step of a key path as it stands in a parameter path."""
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name) | SequenceKey(idx=name):
            return str(name)
        case _:
            return str(key)


def path_name(path: KeyPath) -> str:
    """A key path as 'layers/attn/kernel'; the `.value` that a metadata box adds at its end is left out."""
    keys = list(path)
    if len(keys) > 1 and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "value":
        keys.pop()
    return "/".join(map(key_name, keys))


def trace(
    fn: Callable[..., Sequence[Any]],
    leaves: Sequence[Any],
    paths: Sequence[str | None],
    state: Sequence[str | None] | None = None,
) -> Program:
    """Traces `fn(*leaves)`, which returns a flat sequence of arrays.

    Args:
        fn: a function of flat array arguments.
        leaves: arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes matter.
        paths: per leaf, the path of the parameter or None.
        state: per leaf, the path of a variable that is no parameter or None; None where there are none.
    """
    return Program(jax.make_jaxpr(fn)(*leaves), tuple(paths), tuple(state or (None,) * len(leaves)))
