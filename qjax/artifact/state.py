"""State that an exported model keeps between calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from qjax.artifact.signature import show
from qjax.checkpoint.leaves import Leaf, write_leaves


def changed_state(call: Callable[[Any, Any], Any], values: Mapping[str, Any], inputs: Any) -> list[str]:
    """Which of the values a call changes, such that its results or those of later calls depend on them.

    A counter that nothing reads and running statistics that only training writes are none of them.

    Args:
        call: `(values, inputs) -> (results, the values after the call)`.
        values, inputs: what to trace it with.
    """
    program = jax.make_jaxpr(call)(values, inputs).jaxpr
    results, after = jax.eval_shape(call, values, inputs)
    going_in, coming_out = iter(program.invars), iter(program.outvars)
    before = {name: [next(going_in) for _ in jax.tree.leaves(values[name])] for name in sorted(values)}
    live = [next(coming_out) for _ in results]
    left = {name: [next(coming_out) for _ in jax.tree.leaves(after[name])] for name in sorted(after)}
    written = [name for name in left if left[name] != before[name]]
    found: set[str] = set()
    while True:
        reached = _reached(program, [*live, *(v for name in found for v in left[name])])
        new = {name for name in written if reached & set(before[name])} - found
        if not new:
            return sorted(found)
        found |= new


def _reached(program: Any, wanted: Sequence[Any]) -> set[Any]:
    """The variables of a jaxpr on which some of its results may depend."""
    reached = {atom for atom in wanted if not isinstance(atom, Literal)}
    for equation in reversed(program.eqns):
        if equation.effects or reached & set(equation.outvars):
            reached |= {atom for atom in equation.invars if not isinstance(atom, Literal)}
    return reached


def check_state(before: Any, after: Any) -> None:
    """The state after a call is to be what the next call takes."""
    shapes = [
        {jax.tree_util.keystr(p): show(a) for p, a in jax.tree_util.tree_leaves_with_path(t)} for t in (before, after)
    ]
    for name in sorted(set(shapes[0]) | set(shapes[1])):
        old, new = (s.get(name, "nothing") for s in shapes)
        if old != new:
            raise TypeError(
                f"qjax: the call makes {new} of the state {name}, which is {old}, so that its result cannot be the "
                "state of the next call. Give variables whose state has the shapes that a call leaves."
            )


def write_state(folder: Path, state: Any) -> list[dict[str, Any]]:
    """Describes the first values of the state; those that are not one number over and over are written."""
    described, written = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            described.append({"path": name, "fill": 0})
            continue
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = None if key else np.asarray(leaf)
        if value is not None and value.size and np.isfinite(value.flat[0]) and (value == value.flat[0]).all():
            described.append({"path": name, "fill": value.flat[0].item()})
        else:
            described.append({"path": name})
            written.append(Leaf(name, [["d", name]], leaf))
    if written:
        folder.mkdir()
        write_leaves(folder, {}, written, host=True)
    return described
