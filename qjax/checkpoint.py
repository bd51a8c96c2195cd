"""`save` and `restore`: packed models as Orbax checkpoints.

A checkpoint is a folder with
    manifest.json   format version, recipe, library versions and, for every leaf, what it is (packed: format,
                    layout, order) and shape, dtype and CRC-32 of each of its arrays;
    arrays/         an Orbax PyTree checkpoint of the packed arrays, readable without qjax.

It is written beside its destination and renamed into place, so a run that dies leaves the old one or none. The
arrays are int32 words, int8 and float scales only: Orbax stores neither uint4 nor int4 faithfully.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.core import meta
from jax.tree_util import DictKey, SequenceKey

from pallas_kernels import numerics
from pallas_kernels.formats import QuantSpec
from pallas_kernels.kv_cache import QCache
from pallas_kernels.qtensor import FoldedParam, Layout, QTensor, is_packed
from passes.trace import key_name
from qjax.model import QuantizedNNX, nnx_state, quantize, with_nnx_values
from qjax.recipes import Recipe

FORMAT_VERSION = 1
"""Version of the checkpoint format; a reader takes its own and older ones."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the file or parameter."""


Shardings = jax.sharding.Sharding | Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding | None]
"""One sharding for every array, or a function of an array's name ("layers/up/kernel.words") and its shape."""


# --- Leaves to plain arrays and back -----------------------------------------------------------------------


def _describe(leaf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A leaf as a JSON description and its arrays by name."""
    if isinstance(leaf, QTensor):
        arrays = {"words": leaf.words, **numerics.scales_to_arrays(leaf.scales)}
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
        described = {name: _describe(part) for name, part in parts.items() if part is not None}
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
    return {"kind": "array"}, {"value": leaf}


def _assemble(info: dict[str, Any], arrays: Mapping[str, Any]) -> Any:
    """The inverse of `_describe`."""
    match info["kind"]:
        case "packed":
            scales = numerics.scales_from_arrays({k: v for k, v in arrays.items() if k != "words"})
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
                parts[name] = _assemble(part, mine)
            own = parts.pop("own", None)
            derived = {name.removeprefix("derived:"): q for name, q in parts.items()}
            return FoldedParam(own, derived, tuple(info["shape"]), jnp.dtype(info["dtype"]))
        case "key":
            return jax.random.wrap_key_data(jnp.asarray(arrays["data"]), impl=info["impl"])
        case "array":
            return arrays["value"]
        case kind:
            raise CheckpointError(f"qjax: the manifest has a leaf of unknown kind {kind!r}.")


def _crc(a: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(np.asarray(a)).reshape(-1).view(np.uint8).data)


# --- Trees to flat paths and back --------------------------------------------------------------------------


def _steps(path: tuple, name: str) -> list[list[Any]]:
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


def _insert(tree: dict, steps: list[list[Any]], value: Any) -> None:
    """Puts a value into a nested dict whose list nodes are dicts with ("l", i) keys, until `_finish`."""
    for step in steps[:-1]:
        tree = tree.setdefault(tuple(step), {})
    tree[tuple(steps[-1])] = value


def _finish(tree: Any) -> Any:
    if not isinstance(tree, dict) or not all(isinstance(k, tuple) for k in tree):
        return tree
    if tree and all(kind == "l" for kind, _ in tree):
        return [_finish(tree[k]) for k in sorted(tree, key=lambda k: k[1])]
    return {k: _finish(v) for (_, k), v in tree.items()}


@dataclasses.dataclass(frozen=True)
class _Leaf:
    path: str
    steps: list[list[Any]]
    value: Any


_RANGES = "ranges:"
"""Begins the path of a range of an NNX module, which is no variable of the model."""


def _flatten(q: Any, variables: Any) -> list[_Leaf]:
    if isinstance(q, QuantizedNNX):
        if variables is not None:
            raise TypeError("qjax: an NNX module holds its own variables: save(path, q).")
        own = [
            _Leaf(name, [["d" if isinstance(k, str) else "i", k] for k in path], variable.get_value())
            for name, path, variable in nnx_state(q.model)
        ]
        ranges = {f"{_RANGES}{name}": value for name, value in q.ranges.values().items()}
        return own + [_Leaf(name, [["d", name]], value) for name, value in ranges.items()]
    if variables is None:
        raise TypeError("qjax: save needs the packed variables: save(path, q, packed).")
    unboxed = meta.unbox(variables)
    flat, _ = jax.tree_util.tree_flatten_with_path(unboxed, is_leaf=lambda x: is_packed(x) or isinstance(x, QCache))
    leaves = []
    for path, value in flat:
        name = "/".join(map(key_name, path))
        if isinstance(value, QCache):
            raise TypeError(
                f"qjax: {name!r} is a packed key-value cache, which is not saved: it belongs to one conversation. "
                "Leave its collection out; convert makes an empty one from shapes."
            )
        if not is_packed(value):
            value = value if isinstance(value, jax.Array) else np.asarray(value)
        leaves.append(_Leaf(name, _steps(path, name), value))
    return leaves


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
    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(f"qjax: {target} exists; pass overwrite=True to replace it.")
    leaves = _flatten(q, variables)
    target.parent.mkdir(parents=True, exist_ok=True)

    manifest: dict[str, Any] = {
        "format": "qjax",
        "format_version": FORMAT_VERSION,
        "libraries": {
            "qjax": _version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "orbax-checkpoint": ocp.__version__,
        },
        "recipe": q.recipe.to_json(),
        "leaves": [],
    }
    tree: dict[str, dict[str, Any]] = {}
    for i, leaf in enumerate(leaves):
        info, arrays = _describe(leaf.value)
        manifest["leaves"].append(
            {
                "path": leaf.path,
                "steps": leaf.steps,
                "leaf": info,
                "arrays": {
                    name: {"shape": list(a.shape), "dtype": jnp.dtype(a.dtype).name, "crc32": _crc(a)}
                    for name, a in arrays.items()
                },
            }
        )
        tree[_group(i, leaf.path)] = {name: jnp.asarray(a) for name, a in arrays.items()}

    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(temporary / "arrays", args=ocp.args.PyTreeSave(tree))
        text = json.dumps(manifest, indent=1)
        (temporary / "manifest.json").write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "manifest": text}))
        temporary.chmod(0o755)
        if target.exists():  # two renames: at no time is a half-written checkpoint at `path`
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / "was")
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _group(index: int, path: str) -> str:
    """The name of a leaf's arrays in the Orbax tree: a number that makes it unique, and its path to read."""
    return f"{index:05d}." + path.replace("/", ".")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qjax")
    except PackageNotFoundError:
        return "source"


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        yield checkpointer
    finally:
        checkpointer.close()


# --- Reading -------------------------------------------------------------------------------------------------


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint: recipe, versions, every leaf; reads no arrays.

    Raises:
        FileNotFoundError: nothing is at `path`.
        CheckpointError: no qjax checkpoint, a damaged one, or one of a newer format.
    """
    folder = Path(path).absolute()
    if not folder.exists():
        raise FileNotFoundError(f"qjax: there is no checkpoint at {folder}.")
    file = folder / "manifest.json"
    if not file.is_file():
        raise CheckpointError(
            f"qjax: {folder} is no qjax checkpoint: it has no manifest.json. Write one with qjax.save; a float Orbax "
            "checkpoint is restored with Orbax and converted with q.convert."
        )
    try:
        envelope = json.loads(file.read_text())
        text = envelope["manifest"]
        intact = zlib.crc32(text.encode()) == envelope["crc32"]
        manifest = json.loads(text) if intact else {}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"qjax: {file} is damaged or foreign ({error!r}); save the model again.") from None
    if not intact:
        raise CheckpointError(f"qjax: {file} was changed after it was written (checksum); save the model again.")
    version = manifest.get("format_version")
    if manifest.get("format") != "qjax" or not isinstance(version, int):
        raise CheckpointError(f"qjax: {file} is not a qjax manifest.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"qjax: {folder} has checkpoint format {version}, written by qjax "
            f"{manifest.get('libraries', {}).get('qjax')}; this qjax reads up to {FORMAT_VERSION}. Upgrade qjax."
        )
    return manifest


def restore(
    path: str | os.PathLike[str],
    model: Any,
    *,
    shardings: Shardings | None = None,
    subtree: str | None = None,
    verify: bool = True,
) -> Any:
    """Reads what `save` wrote.

    Args:
        path: the folder.
        model: the module or function that was quantized; an NNX module may be abstract (`nnx.eval_shape`).
        shardings: where to put the arrays; by default on the default device.
        subtree: path of one part of the variables ("params/encoder"); only its arrays are read.
        verify: check every array against its checksum.

    Returns:
        `(q, variables)`, as `qjax.quantize` and `convert` give them; for an NNX module the converted `q` alone.

    Raises:
        FileNotFoundError: nothing is at `path`.
        CheckpointError: damaged, foreign, newer, or not of this model; the message says which.
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
    arrays = _read_arrays(Path(path).absolute(), entries, shardings)
    leaves = []
    for i, entry in entries:
        found = arrays[_group(i, entry["path"])]
        for name, a in found.items():
            if verify and _crc(a) != entry["arrays"][name]["crc32"]:
                raise CheckpointError(
                    f"qjax: {entry['path']!r} ({name}) in {path} does not have the contents that were saved "
                    "(checksum). The file is damaged: restore it from a copy or save the model again."
                )
        leaves.append((entry, _assemble(entry["leaf"], found)))

    if isinstance(q, QuantizedNNX):
        return _into_nnx(q, {e["path"]: value for e, value in leaves}, partial=subtree is not None)
    if len(leaves) == 1 and not leaves[0][0]["steps"]:
        return q, leaves[0][1]
    tree: dict = {}
    for entry, value in leaves:
        _insert(tree, entry["steps"], value)
    return q, _finish(tree)


def _read_arrays(
    folder: Path, entries: list[tuple[int, dict[str, Any]]], shardings: Shardings | None
) -> dict[str, dict[str, jax.Array]]:
    def place(name: str, aval: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        chosen = shardings(name, aval) if callable(shardings) else shardings
        return chosen or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    wanted: dict[str, dict[str, Any]] = {}
    how: dict[str, dict[str, Any]] = {}
    for i, entry in entries:
        group = _group(i, entry["path"])
        avals = {
            name: jax.ShapeDtypeStruct(tuple(a["shape"]), jnp.dtype(a["dtype"])) for name, a in entry["arrays"].items()
        }
        wanted[group] = avals
        how[group] = {
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
    for group, avals in wanted.items():
        for name, aval in avals.items():
            a = arrays[group][name]
            if tuple(a.shape) != aval.shape or a.dtype != aval.dtype:
                raise CheckpointError(
                    f"qjax: {group}.{name} is {a.dtype}{list(a.shape)} on disk but {aval.dtype}{list(aval.shape)} in "
                    "the manifest: the two are from different checkpoints."
                )
    return arrays


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
