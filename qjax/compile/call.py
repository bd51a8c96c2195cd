"""One call of a model: traced, compiled by the passes, run, converted, observed.

What the three kinds of wrapped models (`qjax.models`) and models with adapters (`qjax.models.lora`) have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.passes.jaxpr.trace import Program, trace

Variables = Any
"""A tree of arrays (float or packed) as `Module.apply` takes it."""


def is_array(value: Any) -> bool:
    """Whether a leaf of a call is traced: an array, float or packed, or its shape."""
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or _is_leaf(value)


def _is_leaf(value: Any) -> bool:
    return is_packed(value) or isinstance(value, QCache)


@dataclasses.dataclass
class Call:
    """One call of a model as a flat function: its array inputs, which of them are parameters, and its results.

    Whatever is no array (flags, strings, None, Python numbers) is part of the call, as it is for `Module.apply`.
    """

    fn: Callable[..., Any]
    inputs: Any  # a tree; the arguments of fn
    is_param: Callable[[tuple], bool]  # says of a key path into `inputs` whether its leaf is a parameter
    name: Callable[[tuple], str]  # the path name of such a leaf
    state: Callable[[tuple], str | None] = lambda path: None  # the path name of a variable that is no parameter
    # says of a key path into the results of fn of which variable it is the new value; None where that is not known
    updates: Callable[[tuple], str | None] | None = None
    rewrite: Callable[..., tuple[list[Any], dict[Any, Any]]] | None = None  # (compiled, values, at) -> (values, at)

    def __post_init__(self):
        flat, self.tree = jax.tree_util.tree_flatten_with_path(self.inputs, is_leaf=_is_leaf)
        self.static = {i: leaf for i, (_, leaf) in enumerate(flat) if not is_array(leaf)}
        dynamic = [(path, leaf) for path, leaf in flat if is_array(leaf)]
        self.leaves = [leaf for _, leaf in dynamic]
        self.paths = [
            self.name(path) if self.is_param(path) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None
            for path, leaf in dynamic
        ]
        self.state_paths = [
            self.state(path) if own is None else None for own, (path, _) in zip(self.paths, dynamic, strict=True)
        ]
        for path, state, leaf in zip(self.paths, self.state_paths, self.leaves, strict=True):
            if path is None and is_packed(leaf):
                raise TypeError("qjax: a packed tensor was passed where the model takes no parameter.")
            if state is None and isinstance(leaf, QCache):
                raise TypeError("qjax: a packed cache was passed where the model takes no state.")

    def _flat(self, *leaves: Any) -> list[Any]:
        rest, size = iter(leaves), len(self.static) + len(leaves)
        whole = [self.static[i] if i in self.static else next(rest) for i in range(size)]
        flat, self.out_tree = jax.tree_util.tree_flatten_with_path(self.fn(*jax.tree.unflatten(self.tree, whole)))
        self.out_static = {i: leaf for i, (_, leaf) in enumerate(flat) if not is_array(leaf)}
        self.out_paths = [path for path, leaf in flat if is_array(leaf)]
        return [leaf for _, leaf in flat if is_array(leaf)]

    def trace(self) -> Program:
        """The float program: packed parameters stand in it as the float arrays they were."""
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_leaf(x) else x for x in self.leaves]
        return trace(self._flat, avals, self.paths, self.state_paths)

    def results(self, flat: Sequence[Any]) -> Any:
        """The results of the call as the model's own structure."""
        rest, size = iter(flat), len(self.out_static) + len(flat)
        whole = [self.out_static[i] if i in self.out_static else next(rest) for i in range(size)]
        return jax.tree.unflatten(self.out_tree, whole)

    def new_state(self) -> list[str | None] | None:
        """After `trace`: per result, the variable of which it is the new value."""
        return None if self.updates is None else [self.updates(path) for path in self.out_paths]

    def with_params(self, values: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> Any:
        """`inputs` with some parameters and some state replaced."""
        state = state or {}
        rest = iter(
            values.get(path, leaf) if path is not None else state.get(other, leaf) if other is not None else leaf
            for path, other, leaf in zip(self.paths, self.state_paths, self.leaves, strict=True)
        )
        size = len(self.static) + len(self.leaves)
        whole = [self.static[i] if i in self.static else next(rest) for i in range(size)]
        return jax.tree.unflatten(self.tree, whole)
