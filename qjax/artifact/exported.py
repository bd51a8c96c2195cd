"""`load_exported`: runs what `qjax.export` wrote, without the model's code, its recipe or Flax.

An exported model is a folder with
    README.md       the model card: plan, sizes, quality, how to run it, what is guaranteed;
    manifest.json   versions, platforms, signatures, and size and SHA-256 of every other file;
    programs/       one serialized `jax.export` artifact for each set of input shapes;
    weights/        the packed variables, as `qjax.save` writes them (`qjax.checkpoint.leaves`);
    state/          first values of the state (a key-value cache), where they are not constant.

A program is a function of plain trees, dicts, lists and tuples of arrays, so that JAX runs it without qjax:
    program(weights, *args, **kwargs) -> out
    program(weights, state, *args, **kwargs) -> (out, state)     for a model with state, which is donated
`weights` is the Orbax tree in weights/arrays: {"00000.params.up.kernel": {"words": ..., "scale": ...}, ...}. Of other
nodes (a packed cache, a named tuple, a dataclass) the trees hold dicts of their fields.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from qjax.artifact.signature import Signature, is_array, plain, split_fixed
from qjax.checkpoint.folder import CheckpointError, check_files
from qjax.checkpoint.leaves import assemble, describe, group, nested, read_leaves
from qjax.checkpoint.manifest import EXPORTED, EXPORTS, LEAVES_ALONE, read_manifest
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.passes.jaxpr.trace import path_name


class ExportedModel:
    """An exported model with its weights; call it like the model that was exported.

    `m(*args, **kwargs)` gives what the model gives. With state (a key-value cache), `m(state, *args, **kwargs)` gives
    `(out, state)`: begin with `m.init_state()` and go on with the state of the last call. The buffers of the state that
    is passed in are taken over, so that a cache is updated in place.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
        signatures: what the model takes and gives, one for each set of shapes.
        exported: the programs, in the same order, as `jax.export.Exported`.
        platforms: those that it was compiled for: "tpu", "cuda", "rocm", "cpu".
        weights: the first argument of the programs, a plain tree of arrays; None if only the program was exported.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        entries: list[dict[str, Any]],
        exported: Sequence[jax_export.Exported],
        weights: dict[str, dict[str, jax.Array]] | None,
    ):
        self.path = path
        self.manifest = manifest
        self.exported = tuple(exported)
        self.signatures = tuple(map(Signature.of, self.exported, manifest["programs"]))
        self.platforms: tuple[str, ...] = tuple(manifest["platforms"])
        self.weights = weights
        self._entries = entries
        first = int(self.stateful)
        self._run = [
            jax.jit(e.call, donate_argnums=(*range(1, 1 + first), *(1 + first + i for i in s.donated)))
            for e, s in zip(self.exported, self.signatures, strict=True)
        ]

    @property
    def stateful(self) -> bool:
        """Whether calls take and give a state."""
        return self.signatures[0].state is not None

    @functools.cached_property
    def variables(self) -> Any:
        """The stored variables as `q.convert` gave them: a tree of `QTensor`s and arrays on the buffers of `weights`.

        Raises:
            ValueError: the program was exported without weights.
        """
        weights = self._stored()
        named = [(entry, weights.get(group(i, entry["path"]), {})) for i, entry in enumerate(self._entries)]
        return nested([(entry["steps"], assemble(entry["leaf"], arrays)) for entry, arrays in named])

    def _stored(self) -> dict[str, dict[str, jax.Array]]:
        if self.weights is None:
            raise ValueError(
                f"qjax: {self.path} was exported without weights (from shapes); give them: m.call(packed, ...)."
            )
        return self.weights

    def init_state(self, **sizes: int) -> Any:
        """The state to begin with: that of the variables that were exported, and zeros where only shapes were given.

        Args:
            sizes: of the symbolic dimensions in the shapes of the state.

        Raises:
            TypeError: the model has no state, or sizes are missing or unknown.
        """
        if not self.stateful:
            raise TypeError(f"qjax: {self.path} has no state: call m(...) with the model's inputs alone.")
        leaves, tree = jax.tree.flatten(self.signatures[0].state)
        symbols = {str(d) for leaf in leaves for d in leaf.shape if jax_export.is_symbolic_dim(d)}
        if set(sizes) != symbols:
            wanted = ", ".join(f"{name}=..." for name in sorted(symbols))
            raise TypeError(f"qjax: the state has the symbolic sizes {sorted(symbols)}: call init_state({wanted}).")
        folder = self.path / "state"
        stored = read_manifest(folder, fields=LEAVES_ALONE)["leaves"] if (folder / "manifest.json").exists() else []
        arrays = read_leaves(folder, list(enumerate(stored))) if stored else {}
        values = {e["path"]: assemble(e["leaf"], arrays[group(i, e["path"])]) for i, e in enumerate(stored)}
        out = []
        for info, leaf in zip(self.manifest["state"], leaves, strict=True):
            if info["path"] in values:
                out.append(values[info["path"]])
            elif "fill" not in info:
                raise CheckpointError(
                    f"qjax: {folder} has no first value of the state {info['path']}: copy the folder again, or export "
                    "the model again."
                )
            else:
                shape = tuple(sizes[str(d)] if jax_export.is_symbolic_dim(d) else d for d in leaf.shape)
                out.append(jnp.full(shape, info["fill"], leaf.dtype))
        return jax.tree.unflatten(tree, out)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on the stored weights; with state, the state is the first argument.

        Raises:
            TypeError: the inputs are not those of a signature; the message says which and what was expected.
            ValueError: this is another platform than the model was exported for, or there are no weights.
        """
        weights = self._stored()
        platform = jax_export.default_export_platform()
        if platform not in self.platforms:
            raise ValueError(
                f"qjax: {self.path} was exported for {', '.join(self.platforms)}, and this process runs on {platform}. "
                f'Export it with platforms=(..., "{platform}").'
            )
        return self._call(weights, args, kwargs)

    def call(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on other variables of the same formats and shapes: as `convert` gives them, or plain ones.

        May be traced: `jax.jit(m.call)` is compiled into a larger program, or ahead of time from shapes.

        Raises:
            TypeError: as for a call of the model, and for variables that do not fit.
        """
        return self._call(self._as_weights(variables), args, kwargs)

    def _call(self, weights: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        state: Any = None
        if self.stateful:
            if not args:
                raise TypeError("qjax: the first argument is the state: begin with m.init_state().")
            state, *rest = args
            args, state = tuple(rest), plain(state)
        misfits = []
        for run, signature in zip(self._run, self.signatures, strict=True):
            inputs, named = self._bind(signature, args, kwargs)
            if why := signature.misfit(state, inputs, named):
                misfits.append(f"  {signature}: {why}")
            elif self.stateful:
                return run(weights, state, *inputs, **named)
            else:
                return run(weights, *inputs, **named)
        if len(misfits) > 1:
            misfits.append("Pad the inputs to one of these shapes, or export others too (buckets=...).")
        raise TypeError("qjax: the exported model does not take these inputs:\n" + "\n".join(misfits))

    def _bind(self, signature: Signature, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arrays of a call; what was fixed when the model was exported may be left out."""
        scalars = {
            jax.tree_util.keystr(path): leaf.dtype
            for path, leaf in jax.tree_util.tree_flatten_with_path((signature.args, signature.kwargs))[0]
            if leaf.shape == ()
        }

        def number(path: tuple, leaf: Any) -> Any:
            where = jax.tree_util.keystr(path)
            return np.asarray(leaf, scalars[where]) if where in scalars and not is_array(leaf) else leaf

        args, kwargs = jax.tree_util.tree_map_with_path(number, plain((args, dict(kwargs))))
        inputs, named, fixed = split_fixed(args, kwargs)
        for where, value in fixed.items():
            if signature.fixed.get(where) != value:
                expected = signature.fixed.get(where)
                raise TypeError(
                    f"qjax: {value} is no array, and the exported model takes only arrays"
                    + (f"; it was exported with {expected} there." if expected else ".")
                )
        rest = signature.args[len(inputs) :]
        return (inputs if jax.tree.leaves(rest) else (*inputs, *rest)), named

    def _as_weights(self, variables: Any) -> Any:
        groups = [group(i, entry["path"]) for i, entry in enumerate(self._entries)]
        stored = {name for name, entry in zip(groups, self._entries, strict=True) if entry["arrays"]}
        if isinstance(variables, Mapping) and set(variables) == stored:
            return variables
        flat = jax.tree_util.tree_flatten_with_path(variables, is_leaf=is_packed)[0]
        given = {path_name(path): leaf for path, leaf in flat}
        known = [entry["path"] for entry in self._entries]
        if wrong := sorted(set(given) ^ set(known)):
            whose = "the variables have not" if wrong[0] in known else "the exported model has not"
            raise TypeError(f"qjax: {whose} {wrong[0]!r}: they are of another model, or of another call of it.")
        out = {}
        for name, entry in zip(groups, self._entries, strict=True):
            info, out[name] = describe(given[entry["path"]])
            shapes = {n: (list(a.shape), jnp.dtype(a.dtype).name) for n, a in out[name].items()}
            expected = {n: (a["shape"], a["dtype"]) for n, a in entry["arrays"].items()}
            if json.loads(json.dumps(info)) != entry["leaf"] or shapes != expected:
                raise TypeError(
                    f"qjax: {entry['path']!r} was exported in another format or shape than that of "
                    f"{given[entry['path']]!r}. Convert with the recipe that was exported, or export again."
                )
        return {name: out[name] for name in groups if name in stored}

    def __repr__(self) -> str:
        size = sum(
            math.prod(a["shape"]) * jnp.dtype(a["dtype"]).itemsize for e in self._entries for a in e["arrays"].values()
        )
        lines = [f"ExportedModel({str(self.path)!r}, {size:,} bytes of weights, for {', '.join(self.platforms)})"]
        return "\n".join(lines + [f"  {signature}" for signature in self.signatures])


def load_exported(path: str | os.PathLike[str], *, verify: bool = True) -> ExportedModel:
    """Reads what `export` wrote; needs neither the model's code nor its recipe, nor Flax.

    Args:
        path: the folder.
        verify: check programs and arrays against their checksums.

    Raises:
        FileNotFoundError: nothing is at `path`.
        CheckpointError: damaged, incomplete, or of a newer qjax or JAX; the message names the file.

    Example:
        >>> m = qjax.load_exported("model")
        >>> logits = m(tokens)
    """
    folder = Path(path).absolute()
    manifest = read_manifest(folder, EXPORTS, EXPORTED)
    check_files(folder, manifest["files"], verify)
    lowest = jax_export.minimum_supported_calling_convention_version
    highest = jax_export.maximum_supported_calling_convention_version
    found, writer = manifest["calling_convention"], manifest["libraries"]["jax"]
    if not lowest <= found <= highest:
        raise CheckpointError(
            f"qjax: {folder} has calling convention {found} of jax.export, written by JAX {writer}; JAX "
            f"{jax.__version__} runs {lowest} to {highest}. "
            + ("Upgrade JAX." if found > highest else f"Export the model again, or run it with JAX {writer}.")
        )
    exported = []
    for program in manifest["programs"]:
        file = folder / program["file"]
        try:
            exported.append(jax_export.deserialize(bytearray(file.read_bytes())))
        except Exception as error:  # flatbuffers and jax.export raise many types
            raise CheckpointError(
                f"qjax: JAX {jax.__version__} cannot read {file}, written by JAX {writer}: {type(error).__name__}: "
                f"{str(error)[:400]}. Upgrade JAX, or export the model again."
            ) from error
    _check_programs(folder, manifest, exported)
    entries = read_manifest(folder / "weights")["leaves"]
    weights = None
    if manifest["has_weights"]:
        arrays = read_leaves(folder / "weights", list(enumerate(entries)), verify=verify)
        weights = {name: own for name, own in arrays.items() if own}
    return ExportedModel(folder, manifest, entries, exported, weights)


def _check_programs(folder: Path, manifest: Mapping[str, Any], exported: Sequence[jax_export.Exported]) -> None:
    """What the manifest says of each program fits its signature."""
    for i, (info, program) in enumerate(zip(manifest["programs"], exported, strict=True)):
        (_, *args), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
        state = args[0] if info["stateful"] and args else None
        inputs = len(args) - info["stateful"]
        for field, fits in (
            ("stateful", info["stateful"] == bool(manifest["state"])),
            ("arguments", len(info["arguments"]) == inputs),
            ("donated", all(place < inputs for place in info["donated"])),
            ("state", len(manifest["state"]) == len(jax.tree.leaves(state))),
        ):
            if not fits:
                where = "state" if field == "state" else f"programs[{i}].{field}"
                found = manifest["state"] if field == "state" else info[field]
                raise CheckpointError(
                    f"qjax: {folder / 'manifest.json'}: {where!r} is {found!r}, which does not fit {info['file']}: "
                    "copy the folder again, or export the model again."
                )
