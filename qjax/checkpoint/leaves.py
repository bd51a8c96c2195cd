"""Packed variables on disk: the folder that `qjax.save` writes, read and written without the model's framework.

A folder has
    manifest.json   format version, recipe, library versions and, for every leaf, what it is (packed: format,
                    layout, order) and shape, dtype and CRC-32 of each of its arrays;
    arrays/         an Orbax PyTree checkpoint of the packed arrays, readable without qjax.

The arrays are int32 words, int8 and float scales only: Orbax stores neither uint4 nor int4 faithfully.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import DictKey, SequenceKey

from qjax.checkpoint.folder import FORMAT_VERSION, CheckpointError
from qjax.pallas_kernels.numbers import stored_scales
from qjax.pallas_kernels.numbers.formats import QuantSpec
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor

Shardings = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None]
"""One sharding for every array, or a function of an array's name ("layers/up/kernel.words") and its shape."""

# --- Leaves to plain arrays and back -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One variable of a model.

    Attributes:
        path: its path name.
        steps: its path as JSON, from which `nested` rebuilds the tree.
        value: an array, or a packed parameter; the arrays may be `jax.ShapeDtypeStruct`s.
    """

    path: str
    steps: list[list[Any]]
    value: Any


def describe(leaf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The value of a leaf as a JSON description and its arrays by name."""
    if isinstance(leaf, QTensor):
        arrays = {"words": leaf.words, **stored_scales.scales_to_arrays(leaf.scales)}
        info = {
            "kind": "packed",
            "spec": leaf.spec.to_json(),
            "layout": leaf.layout.to_json(),
            "dtype": jnp.dtype(leaf.dtype).name,
            "order": leaf.order,
        }
        return info, arrays
    if isinstance(leaf, FoldedParam):
        parts = {"own": leaf.own, **{f"derived:{name}": q for name, q in leaf.derived.items()}}
        described = {name: describe(part) for name, part in parts.items() if part is not None}
        info = {
            "kind": "folded",
            "parts": {name: d[0] for name, d in described.items()},
            "shape": list(leaf.shape),
            "dtype": jnp.dtype(leaf.dtype).name,
        }
        numbered = enumerate(described.values())
        return info, {f"part{i}_{name}": a for i, (_, arrays) in numbered for name, a in arrays.items()}
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return {"kind": "key", "impl": str(jax.random.key_impl(leaf))}, {"data": jax.random.key_data(leaf)}
    if not leaf.size:  # Orbax stores no empty arrays
        return {"kind": "empty", "shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name}, {}
    return {"kind": "array"}, {"value": leaf}


def assemble(info: dict[str, Any], arrays: Mapping[str, Any]) -> Any:
    """The inverse of `describe`."""
    match info["kind"]:
        case "packed":
            scales = stored_scales.scales_from_arrays({k: v for k, v in arrays.items() if k != "words"})
            return QTensor(
                arrays["words"],
                scales,
                QuantSpec.from_json(info["spec"]),
                Layout.from_json(info["layout"]),
                jnp.dtype(info["dtype"]),
                info["order"],
            )
        case "folded":
            parts = {}
            for i, (name, part) in enumerate(info["parts"].items()):
                prefix = f"part{i}_"
                mine = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
                parts[name] = assemble(part, mine)
            own = parts.pop("own", None)
            derived = {name.removeprefix("derived:"): q for name, q in parts.items()}
            return FoldedParam(own, derived, tuple(info["shape"]), jnp.dtype(info["dtype"]))
        case "key":
            return jax.random.wrap_key_data(jnp.asarray(arrays["data"]), impl=info["impl"])
        case "array":
            return arrays["value"]
        case "empty":
            return jnp.zeros(info["shape"], info["dtype"])
        case kind:
            raise CheckpointError(f"qjax: the manifest has a leaf of unknown kind {kind!r}.")


def group(index: int, path: str) -> str:
    """The name of a leaf's arrays in the Orbax tree: a number that makes it unique, and its path to read."""
    return f"{index:05d}." + path.replace("/", ".")


def steps_of(path: tuple, name: str) -> list[list[Any]]:
    """A key path as JSON: ["d", key] for a dict, ["l", i] for a list or tuple."""
    steps: list[list[Any]] = []
    for key in path:
        match key:
            case DictKey(key=str() as k):
                steps.append(["d", k])
            case DictKey(key=int() as k):
                steps.append(["i", k])
            case SequenceKey(idx=i):
                steps.append(["l", i])
            case _:
                raise TypeError(
                    f"qjax: {name!r} lies in a container that a checkpoint cannot rebuild (step {key!r}). Save trees "
                    "of dicts, lists and tuples."
                )
    return steps


def nested(leaves: Sequence[tuple[list[list[Any]], Any]]) -> Any:
    """The tree of values given with their steps; tuples come back as lists."""
    if len(leaves) == 1 and not leaves[0][0]:
        return leaves[0][1]
    root: dict = {}
    for steps, value in leaves:
        node = root
        for step in steps[:-1]:
            node = node.setdefault(tuple(step), {})
        node[tuple(steps[-1])] = value
    return _finish(root)


def _finish(tree: Any) -> Any:
    """List nodes are dicts with ("l", i) keys up to here."""
    if not isinstance(tree, dict) or not all(isinstance(k, tuple) for k in tree):
        return tree
    if tree and all(kind == "l" for kind, _ in tree):
        return [_finish(tree[k]) for k in sorted(tree, key=lambda k: k[1])]
    return {k: _finish(v) for (_, k), v in tree.items()}


def write_leaves(folder: Path, header: dict[str, Any], leaves: Sequence[Leaf], *, host: bool = False) -> None:
    """Writes manifest and arrays of a model; of abstract leaves (`jax.ShapeDtypeStruct`) the manifest alone.

    Args:
        folder: where to; it exists.
        header: what the manifest says of the model as a whole.
        leaves: its variables.
        host: write NumPy arrays, which Orbax by itself restores on any platform; it wants the devices of JAX arrays
            back.
    """
    manifest = {"format": "qjax", "format_version": FORMAT_VERSION, **header, "leaves": []}
    tree: dict[str, dict[str, Any]] = {}
    for i, leaf in enumerate(leaves):
        info, arrays = describe(leaf.value)
        manifest["leaves"].append(
            {
                "path": leaf.path,
                "steps": leaf.steps,
                "leaf": info,
                "arrays": {
                    name: {"shape": list(a.shape), "dtype": jnp.dtype(a.dtype).name}
                    | ({} if isinstance(a, jax.ShapeDtypeStruct) else {"crc32": _crc(a)})
                    for name, a in arrays.items()
                },
            }
        )
        if arrays:
            tree[group(i, leaf.path)] = arrays
    if not any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(tree)):
        stored = jax.tree.map(np.asarray if host else jnp.asarray, tree)
        with _checkpointer() as checkpointer:
            checkpointer.save(folder / "arrays", args=ocp.args.PyTreeSave(stored))
    text = json.dumps(manifest, indent=1)
    (folder / "manifest.json").write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "manifest": text}))


def _crc(a: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(np.asarray(a)).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def read_leaves(
    path: str | os.PathLike[str],
    entries: list[tuple[int, dict[str, Any]]],
    *,
    shardings: Shardings | None = None,
    verify: bool = True,
) -> dict[str, dict[str, jax.Array]]:
    """The arrays of some leaves, by `group`.

    Args:
        path: the folder.
        entries: leaves of its manifest, numbered as they are there.
        shardings: where to put the arrays; by default on the default device.
        verify: check every array against its checksum.

    Raises:
        CheckpointError: arrays are missing or damaged.
    """
    folder = Path(path).absolute()

    def place(name: str, aval: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        chosen = shardings(name, aval) if callable(shardings) else shardings
        return chosen or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    wanted: dict[str, dict[str, Any]] = {}
    how: dict[str, dict[str, Any]] = {}
    for i, entry in entries:
        avals = {
            name: jax.ShapeDtypeStruct(tuple(a["shape"]), jnp.dtype(a["dtype"])) for name, a in entry["arrays"].items()
        }
        if not avals:
            continue
        wanted[group(i, entry["path"])] = avals
        how[group(i, entry["path"])] = {
            name: ocp.ArrayRestoreArgs(sharding=place(f"{entry['path']}.{name}", aval), dtype=aval.dtype)
            for name, aval in avals.items()
        }
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
            arrays = checkpointer.restore(folder / "arrays", args=args)
    except Exception as error:  # Orbax and its storage layer raise many types for missing or short files
        raise CheckpointError(
            f"qjax: the arrays in {folder / 'arrays'} cannot be read: {type(error).__name__}: {str(error)[:400]}. The "
            "checkpoint is incomplete or damaged: restore it from a copy or save the model again."
        ) from error
    for i, entry in entries:
        key = group(i, entry["path"])
        for name, aval in wanted.get(key, {}).items():
            a = arrays[key][name]
            if tuple(a.shape) != aval.shape or a.dtype != aval.dtype:
                raise CheckpointError(
                    f"qjax: {key}.{name} is {a.dtype}{list(a.shape)} on disk but {aval.dtype}{list(aval.shape)} in "
                    "the manifest: the two are from different checkpoints."
                )
            if verify and _crc(a) != entry["arrays"][name].get("crc32"):
                raise CheckpointError(
                    f"qjax: {entry['path']!r} ({name}) in {path} does not have the contents that were saved "
                    "(checksum). The file is damaged: restore it from a copy or save the model again."
                )
    return {group(i, entry["path"]): arrays.get(group(i, entry["path"]), {}) for i, entry in entries}
