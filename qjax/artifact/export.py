"""`export`: a packed model as a folder that is served without the model's code (the folder: `qjax.artifact.exported`).

The weights are arguments of the exported programs and never constants in them, so that the programs stay small, several
share one set of weights, and a fine-tuned set replaces another.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from qjax.artifact.bound import BoundCall, array_inputs, bind_call, check_inputs, original_call
from qjax.artifact.card import model_card
from qjax.artifact.signature import Signature, is_array, plain
from qjax.artifact.state import check_state, write_state
from qjax.checkpoint.folder import file_info, manifest_crc, new_folder
from qjax.checkpoint.leaves import assemble, describe, group, write_leaves
from qjax.checkpoint.manifest import EXPORT_VERSION
from qjax.checkpoint.orbax import header
from qjax.compile.calibration import arguments
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.report.compare import Comparison

PLATFORMS = ("tpu", "cuda", "cpu")

UNSTABLE_CALLS = ("__gpu$xla.gpu.triton",)
"""Custom calls of our own kernels whose meaning JAX may change from one version to the next."""


def export(
    path: str | os.PathLike[str],
    q: Any,
    variables: Any,
    *args: Any,
    platforms: Sequence[str] = PLATFORMS,
    buckets: Sequence[Any] = (),
    method: Any = None,
    rngs: Any = None,
    mutable: Any = False,
    donate_argnums: Sequence[int] = (),
    comparison: Comparison | None = None,
    disabled_checks: Sequence[jax_export.DisabledSafetyCheck] = (),
    overwrite: bool = False,
    **kwargs: Any,
) -> None:
    """Writes a packed model so that `qjax.load_exported`, or JAX alone, runs it without the model's code; atomically.

    Of the example inputs only shapes and dtypes matter; `jax.ShapeDtypeStruct`s will do. A size may be symbolic, as
    `jax.export` has it, where the kernels need not know it:

        tokens = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 128"), jnp.int32)

    Kernels for TPU are cut by shape alone, unless the export stands in `with qjax.target_chip("v5e"):`, which takes the
    tiles that were found for that chip; it still runs on the others.

    Whatever is no array (flags, strings) is fixed in the program; among the results it becomes None. State is what one
    call leaves for the next: the collections of a Linen module that `mutable` names, the variables of an NNX module
    that its call writes and its results depend on. It is no weight but an argument and a result of the program, and is
    donated; a state given as shapes begins with zeros.

    Args:
        path: the folder to make.
        q: what `qjax.quantize` or `convert` gave.
        variables: the packed variables, state included; None for an NNX module. Given as shapes, the program is
            exported without weights.
        args, method, rngs, mutable, kwargs: as for `q.apply` (of an NNX module: as for a call).
        platforms: any of "tpu", "cuda", "rocm", "cpu"; all of them in each program.
        buckets: further example inputs of other shapes, one program for each: a tuple of arguments, or the only one.
        donate_argnums: which of `args` a call may overwrite, as for `jax.jit`, counted without the variables.
        comparison: what `qjax.compare` found, for the model card.
        disabled_checks: as for `jax.export.export`, for custom calls of the model's own.
        overwrite: replace what is at `path`; otherwise an existing path is an error.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
        TypeError: `q` is no quantized model, or arguments do not go with it.
        ValueError: the variables are not packed; an unknown platform; symbolic sizes that a kernel has to know.

    Example:
        >>> qjax.export("model", q, packed, tokens)
        >>> logits = qjax.load_exported("model")(tokens)
    """
    if unknown := sorted(set(platforms) - {"tpu", "cuda", "rocm", "cpu"}):
        raise ValueError(f"qjax: {unknown[0]!r} is no platform; there are 'tpu', 'cuda', 'rocm' and 'cpu'.")
    if rngs is not None:
        kwargs["rngs"] = rngs
    check_inputs(args, kwargs)
    with _knowing_sizes(variables, args, kwargs):
        call = bind_call(q, variables, args, kwargs, method, mutable)
    abstract = [isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves([leaf.value for leaf in call.leaves])]
    if not any(is_packed(leaf.value) for leaf in call.leaves):
        raise ValueError("qjax: export takes packed variables: packed = q.convert(variables, *inputs).")
    if any(abstract) and not all(abstract):
        raise ValueError("qjax: some of the variables are arrays and some only shapes; export takes all of one kind.")
    checks = [*disabled_checks, *map(jax_export.DisabledSafetyCheck.custom_call, UNSTABLE_CALLS)]

    with new_folder(path, overwrite) as folder:
        (folder / "programs").mkdir()
        infos, signatures, custom_calls, convention = [], [], set(), 0
        for i, inputs in enumerate((args, *map(arguments, buckets))):
            with _knowing_sizes(variables, inputs, kwargs):
                exported, info = _program(call, inputs, kwargs, tuple(donate_argnums), platforms, checks)
            file = f"programs/{i}.jax_export"
            (folder / file).write_bytes(exported.serialize())
            signature = Signature.of(exported, info)
            infos.append({"file": file, **info, **_described(signature)})
            signatures.append(signature)
            custom_calls |= set(re.findall(r'custom_call @"?([^"( ]+)', exported.mlir_module()))
            convention = exported.calling_convention_version
        (folder / "weights").mkdir()
        write_leaves(folder / "weights", header(q), call.leaves, host=True)
        state = write_state(folder / "state", plain(call.state)) if call.state is not None else []
        stable = {name: not any(check.is_custom_call() == name for check in checks) for name in sorted(custom_calls)}
        manifest = {
            "format": "qjax exported model",
            "format_version": EXPORT_VERSION,
            "libraries": header(q)["libraries"],
            "calling_convention": convention,
            "platforms": list(platforms),
            "custom_calls": {name: "stable" if ok else "this JAX version only" for name, ok in stable.items()},
            "has_weights": not any(abstract),
            "state": state,
            "programs": infos,
            "program_bytes": sum((folder / info["file"]).stat().st_size for info in infos),
        }
        card = model_card(Path(path).name, manifest, signatures, call, comparison)
        (folder / "README.md").write_text(card)
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        manifest["files"] = {f.relative_to(folder).as_posix(): file_info(f) for f in files}
        manifest["crc32"] = manifest_crc(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _program(
    call: BoundCall,
    args: tuple,
    kwargs: dict[str, Any],
    donate_argnums: tuple[int, ...],
    platforms: Sequence[str],
    checks: Sequence[jax_export.DisabledSafetyCheck],
) -> tuple[jax_export.Exported, dict[str, Any]]:
    """The program for one set of shapes, and its entry in the manifest."""
    described = [(group(i, leaf.path), *describe(leaf.value)) for i, leaf in enumerate(call.leaves)]
    stateful = call.state is not None

    def apply(weights: dict[str, dict[str, Any]], *inputs: Any, **named: Any) -> Any:
        values = [assemble(info, weights.get(name, {})) for name, info, _ in described]
        state = None
        if stateful:
            state, *inputs = inputs  # type: ignore[assignment]
            state = original_call(call.state, state)
        out, after = call.run(values, state, *original_call((args, kwargs), (inputs, named)))
        out = jax.tree.map(lambda x: x if isinstance(x, jax.Array | np.ndarray | int | float) else None, plain(out))
        if not stateful:
            return out
        after = plain(after)
        check_state(plain(call.state), after)
        return out, after

    (inputs, named), fixed = array_inputs(args, kwargs)
    own = [plain(call.state)] if stateful else []
    donated = (*range(1, 1 + len(own)), *(1 + len(own) + i for i in donate_argnums))
    shapes = _shapes(({name: arrays for name, _, arrays in described if arrays}, own, inputs, named))
    traced = jax_export.export(jax.jit(apply, donate_argnums=donated), platforms=platforms, disabled_checks=checks)
    exported = traced(shapes[0], *shapes[1], *shapes[2], **shapes[3])
    names = (*call.names[: len(inputs)], *(f"args[{i}]" for i in range(len(call.names), len(inputs))))
    info = {"arguments": list(names), "stateful": stateful, "fixed": fixed, "donated": list(donate_argnums)}
    return exported, info


@contextlib.contextmanager
def _knowing_sizes(*inputs: Any) -> Iterator[None]:
    """Says what to do where a symbolic size among the inputs is in the way."""
    try:
        yield
    except Exception as error:
        leaves = [leaf for leaf in jax.tree.leaves(inputs) if is_array(leaf)]
        symbols = sorted({str(d) for a in leaves for d in a.shape if jax_export.is_symbolic_dim(d)})
        if not symbols:
            raise
        raise ValueError(
            f"qjax: the model cannot be exported with the symbolic size{'s' * (len(symbols) > 1)} "
            f"{', '.join(symbols)}: something has to know it ({type(error).__name__}: {str(error)[:600]}). Export "
            "the sizes that you serve: qjax.export(..., first, buckets=[second, ...])."
        ) from error


def _described(signature: Signature) -> dict[str, Any]:
    """The arrays of a signature as plain data, for readers that are not JAX."""

    def arrays(named: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"name": n, "shape": [d if isinstance(d, int) else str(d) for d in a.shape], "dtype": str(a.dtype)}
            for n, a in named
        ]

    outputs = jax.tree_util.tree_leaves_with_path(signature.out)
    return {
        "inputs": arrays(signature.named((signature.state, signature.args, signature.kwargs))),
        "outputs": arrays([(f"out{jax.tree_util.keystr(path)}", a) for path, a in outputs]),
    }
