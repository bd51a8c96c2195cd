"""`save` and `restore`: packed models as Orbax checkpoints (the folder is described in `qjax.checkpoint.leaves`).

A checkpoint is written beside its destination and renamed into place, so a run that dies leaves the old one or none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qjax.checkpoint.folder import CheckpointError, library_versions, new_folder
from qjax.checkpoint.leaves import Leaf, Shardings, assemble, group, nested, read_leaves, steps_of, write_leaves
from qjax.checkpoint.manifest import read_manifest
from qjax.models.arrange import arrange
from qjax.models.binding import RANGES, Binding
from qjax.models.frameworks import binding_of
from qjax.models.quantize import quantize
from qjax.pallas_kernels.ops.partition import check_placement
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.passes.jaxpr.trace import key_name
from qjax.recipes import Recipe


def leaves_of(binding: Binding, q: Any, tree: Any) -> list[Leaf]:
    """The variables of a model, given as `Binding.tree`, or a part of it.

    Raises:
        TypeError: a container that a checkpoint cannot rebuild, or a packed key-value cache.
    """
    leaves = []
    for path, value in binding.key_paths(q, tree):
        name = "/".join(map(key_name, path))
        leaves.append(Leaf(name, steps_of(path, name), value if hasattr(value, "dtype") else np.asarray(value)))
    for leaf in leaves:
        if isinstance(leaf.value, QCache):
            raise TypeError(
                f"qjax: {leaf.path!r} is a packed key-value cache, which is not saved: it belongs to one conversation. "
                "Leave its collection out; convert makes an empty one from shapes."
            )
    return leaves


def check_unadapted(binding: Binding, q: Any, verb: str) -> None:
    """Refuses a model that holds adapters among its variables: they have no place in the float model."""
    if binding.holds_variables and isinstance(q, binding.adapted):
        raise TypeError(f"qjax: {verb} takes {binding.title} without adapters: merge them first, q = q.merge(...).")


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
        TypeError: `q` is no quantized model, or a container in `variables` is no dict, list or tuple.
    """
    binding = binding_of(q)
    if binding is None:
        raise TypeError(f"qjax: save takes what qjax.quantize gave, not {type(q).__name__}.")
    check_unadapted(binding, q, "save")
    binding.check_held(variables, "save(path, q)")
    if not binding.holds_variables and variables is None:
        raise TypeError("qjax: save needs the packed variables: save(path, q, packed).")
    leaves = leaves_of(binding, q, binding.tree(q, variables))
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
    binding = binding_of(q)
    assert binding is not None, "quantize gave it"
    if not binding.holds_variables:
        return q, nested([(entry["steps"], value) for entry, value in leaves])
    values = {entry["path"]: value for entry, value in leaves}
    _check_variables(binding.tree(q, None), values, partial=subtree is not None)
    return binding.with_tree(q, values)


def _check_variables(expected: Mapping[str, Any], values: Mapping[str, Any], *, partial: bool) -> None:
    """The values of a checkpoint are those of a model that holds its variables; it begins without ranges."""
    values = {path: value for path, value in values.items() if not path.startswith(RANGES)}
    if extra := sorted(set(values) - set(expected)):
        raise CheckpointError(f"qjax: the checkpoint has {extra[0]!r}, the model has not: another model was saved.")
    if not partial and (missing := sorted(set(expected) - set(values))):
        raise CheckpointError(f"qjax: the model has {missing[0]!r}, the checkpoint has not: another model was saved.")
    for name, value in values.items():
        shape = tuple(expected[name].shape)
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"qjax: {name!r} is {list(value.shape)} in the checkpoint but {list(shape)} in the model."
            )
