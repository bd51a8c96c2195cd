"""`save` and `restore`: packed models as Orbax checkpoints (the folder is described in `qjax.checkpoint.leaves`).

A checkpoint is written beside its destination and renamed into place, so a run that dies leaves the old one or none.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from flax.core import meta

from qjax.checkpoint.folder import CheckpointError, library_versions, new_folder, read_manifest
from qjax.checkpoint.leaves import Leaf, Shardings, assemble, group, nested, read_leaves, steps_of, write_leaves
from qjax.models.arrange import arrange
from qjax.models.nnx import QuantizedNNX, nnx_state, with_nnx_values
from qjax.models.quantize import quantize
from qjax.pallas_kernels.ops.partition import check_placement
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import QTensor, is_packed
from qjax.passes.jaxpr.trace import key_name
from qjax.recipes import Recipe

_RANGES = "ranges:"
"""Begins the path of a range of an NNX module, which is no variable of the model."""


def leaves_of(q: Any, variables: Any, without: Collection[str] = ()) -> list[Leaf]:
    """The variables of a model; arguments as for `save`, and variables of an NNX module that are left out."""
    if isinstance(q, QuantizedNNX):
        if variables is not None:
            raise TypeError("qjax: an NNX module holds its own variables: save(path, q).")
        leaves = [
            Leaf(name, [["d" if isinstance(k, str) else "i", k] for k in path], variable.get_value())
            for name, path, variable in nnx_state(q.model)
            if name not in without
        ]
        leaves += [Leaf(f"{_RANGES}{name}", [["d", f"{_RANGES}{name}"]], a) for name, a in q.ranges.values().items()]
    elif variables is None:
        raise TypeError("qjax: save needs the packed variables: save(path, q, packed).")
    else:
        leaves = []
        for path, value in jax.tree_util.tree_flatten_with_path(meta.unbox(variables), is_leaf=is_leaf)[0]:
            name = "/".join(map(key_name, path))
            leaves.append(Leaf(name, steps_of(path, name), value if hasattr(value, "dtype") else np.asarray(value)))
    for leaf in leaves:
        if isinstance(leaf.value, QCache):
            raise TypeError(
                f"qjax: {leaf.path!r} is a packed key-value cache, which is not saved: it belongs to one conversation. "
                "Leave its collection out; convert makes an empty one from shapes."
            )
    return leaves


def is_leaf(value: Any) -> bool:
    """Whether a node of a tree of variables is one variable."""
    return is_packed(value) or isinstance(value, QCache)


# --- Writing -------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], q: Any, variables: Any = None, *, overwrite: bool = False) -> None:
    """Writes a quantized model, atomically.

    Args:
        path: the folder to make.
        q: what `qjax.quantize` or `convert` gave.
        variables: the packed variables (float ones are stored as they are); None for an NNX module.
        overwrite: replace what is at `path`; otherwise an existing path is an error.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
        TypeError: a container in `variables` that is no dict, list or tuple.
    """
    leaves = leaves_of(q, variables)
    with new_folder(path, overwrite) as folder:
        write_leaves(folder, header(q), leaves)


def header(q: Any) -> dict[str, Any]:
    """What the manifest of a checkpoint says of the model as a whole."""
    return {"libraries": library_versions("flax", "orbax-checkpoint"), "recipe": q.recipe.to_json()}


# --- Reading -------------------------------------------------------------------------------------------------


def restore(
    path: str | os.PathLike[str],
    model: Any,
    *,
    shardings: Shardings | None = None,
    subtree: str | None = None,
    verify: bool = True,
    chip: str | None = None,
) -> Any:
    """Reads what `save` wrote.

    Args:
        path: the folder.
        model: the module or function that was quantized; an NNX module may be abstract (`nnx.eval_shape`).
        shardings: where to put the arrays; by default on the default device.
        subtree: path of one part of the variables ("params/encoder"); only its arrays are read.
        verify: check every array against its checksum.
        chip: the one that will serve, for matrices in the order that its kernels read, as `qjax.arrange` puts them.

    Returns:
        `(q, variables)`, as `qjax.quantize` and `convert` give them; for an NNX module the converted `q` alone.

    Raises:
        FileNotFoundError: nothing is at `path`.
        CheckpointError: damaged, foreign, newer, or not of this model; the message says which.
        ValueError: `shardings` give devices parts of K that are not made of whole words and groups; no such chip is
            known.
    """
    manifest = read_manifest(path)
    recipe = Recipe.from_json(manifest["recipe"])
    q = quantize(model, recipe, strict=recipe.strict)
    entries = list(enumerate(manifest["leaves"]))
    if subtree is not None:
        entries = [(i, e) for i, e in entries if (e["path"] + "/").startswith(subtree.rstrip("/") + "/")]
        if not entries:
            raise CheckpointError(
                f"qjax: the checkpoint has nothing under {subtree!r}; it has "
                f"{', '.join(sorted({e['path'].rpartition('/')[0] for e in manifest['leaves']})[:8])}, ..."
            )
    arrays = read_leaves(path, entries, shardings=shardings, verify=verify)
    leaves = [(entry, assemble(entry["leaf"], arrays[group(i, entry["path"])])) for i, entry in entries]
    for entry, value in leaves:
        for part in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, QTensor)):
            if isinstance(part, QTensor):
                check_placement(part, entry["path"])
    if chip is not None:
        leaves = [(entry, arrange(value, chip)) for entry, value in leaves]
    if isinstance(q, QuantizedNNX):
        return _into_nnx(q, {e["path"]: value for e, value in leaves}, partial=subtree is not None)
    return q, nested([(entry["steps"], value) for entry, value in leaves])


def _into_nnx(q: QuantizedNNX, values: dict[str, Any], *, partial: bool) -> QuantizedNNX:
    ranges = {path.removeprefix(_RANGES): a for path, a in values.items() if path.startswith(_RANGES)}
    values = {path: value for path, value in values.items() if not path.startswith(_RANGES)}
    names = {name: variable for name, _, variable in nnx_state(q.model)}
    if extra := sorted(set(values) - set(names)):
        raise CheckpointError(f"qjax: the checkpoint has {extra[0]!r}, the model has not: another model was saved.")
    if not partial and (missing := sorted(set(names) - set(values))):
        raise CheckpointError(f"qjax: the model has {missing[0]!r}, the checkpoint has not: another model was saved.")
    for name, value in values.items():
        expected = tuple(names[name].get_value().shape)
        if tuple(value.shape) != expected:
            raise CheckpointError(
                f"qjax: {name!r} is {list(value.shape)} in the checkpoint but {list(expected)} in the model."
            )
    out = QuantizedNNX(with_nnx_values(q.model, values), q.recipe)
    out.ranges.set(ranges)
    return out
