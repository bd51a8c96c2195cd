"""`export`: a packed model as a folder that is served without the model's code (the folder: `qjax.exported`).

The weights are arguments of the exported programs and never constants in them, so that the programs stay small, several
share one set of weights, and a fine-tuned set replaces another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from flax.core.scope import in_filter
from jax import export as jax_export
from jax.extend.core import Literal

from pallas_kernels.qtensor import is_packed
from qjax.checkpoint import header, is_leaf, leaves_of
from qjax.exported import (
    EXPORT_VERSION,
    Signature,
    file_info,
    is_array,
    manifest_crc,
    plain,
    show,
    split_fixed,
)
from qjax.lora import LoraNNX
from qjax.model import QuantizedFunction, QuantizedLinen, QuantizedNNX, nnx_state, with_nnx_values
from qjax.ranges import arguments
from qjax.report import Comparison
from qjax.storage import Leaf, assemble, describe, group, new_folder, write_leaves

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
    _check_inputs(args, kwargs)
    with _knowing_sizes(variables, args, kwargs):
        call = _bind(q, variables, args, kwargs, method, mutable)
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
        state = _write_state(folder / "state", plain(call.state)) if call.state is not None else []
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
        card = _model_card(Path(path).name, manifest, signatures, call, comparison)
        (folder / "README.md").write_text(card)
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        manifest["files"] = {f.relative_to(folder).as_posix(): file_info(f) for f in files}
        manifest["crc32"] = manifest_crc(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


# --- A model as a function of weights and state ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a model in parts.

    Attributes:
        leaves: the variables that a call does not change.
        state: a tree of those that it changes, or None.
        run: `(values of the leaves, state, args, kwargs) -> (out, state)`.
        plan: what is quantized.
        names: of the positional arguments, as far as they are known.
    """

    leaves: list[Leaf]
    state: Any
    run: Callable[[list[Any], Any, tuple, dict[str, Any]], tuple[Any, Any]]
    plan: Any
    names: tuple[str, ...]


def _bind(q: Any, variables: Any, args: tuple, kwargs: dict[str, Any], method: Any, mutable: Any) -> _Call:
    if isinstance(q, LoraNNX):
        raise TypeError("qjax: export takes an NNX module without adapters: merge them first, q = q.merge(...).")
    if isinstance(q, QuantizedNNX):
        return _bind_nnx(q, variables, args, kwargs, method, mutable)
    if not isinstance(q, QuantizedLinen | QuantizedFunction):
        raise TypeError(f"qjax: export takes what qjax.quantize gave, not {type(q).__name__}.")
    if variables is None:
        raise TypeError(f"qjax: export needs packed variables for {type(q).__name__}: export(path, q, packed, ...).")
    variables = meta.unbox(variables)
    if isinstance(q, QuantizedFunction):
        if method is not None or mutable is not False:
            raise TypeError("qjax: a function has neither method nor mutable; pass what it takes as its own arguments.")
        how, changed, names = {}, [], _names(q.fn)
    else:
        how = {"method": method, "mutable": mutable}
        changed = sorted(name for name in variables if name != "params" and in_filter(mutable, name))
        names = _names(method if callable(method) else getattr(type(q.module), method or "__call__"))
    weights = {name: tree for name, tree in variables.items() if name not in changed} if changed else variables
    tree = jax.tree.structure(weights, is_leaf=is_leaf)

    def run(values: list[Any], state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        own = jax.tree.unflatten(tree, values)
        out = q.apply({**own, **state} if changed else own, *args, **how, **kwargs)
        if mutable is False:
            return out, None
        out, updates = out
        rest = {name: tree for name, tree in updates.items() if name not in (*changed, "params")}
        return ((out, rest) if rest else out), {name: updates[name] for name in changed}

    plan = q.plan(variables, *args, **how, **kwargs)
    state = {name: variables[name] for name in changed} or None
    return _Call(leaves_of(q, weights), state, run, plan, names)


def _bind_nnx(q: QuantizedNNX, variables: Any, args: tuple, kwargs: dict[str, Any], method: Any, mutable: Any) -> _Call:
    if variables is not None:
        raise TypeError("qjax: an NNX module holds its own variables: export(path, q, None, *inputs).")
    if mutable is not False:
        raise TypeError("qjax: mutable is for Linen modules; an NNX module holds its own state.")
    names = [name for name, _, _ in nnx_state(q.model)]
    ranges = list(q.ranges.values())

    def run_all(values: Mapping[str, Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        model = with_nnx_values(q.model, {name: values[name] for name in names})
        module = QuantizedNNX(model, q.recipe)
        module.ranges.set({name: values[name] for name in ranges})
        out = module(*args, method=method, **kwargs)
        return out, {name: v.get_value() for name, _, v in nnx_state(module.model) if name in names}

    def traced(values: Mapping[str, Any], given: Any) -> tuple[list[Any], dict[str, Any]]:
        out, after = run_all(values, *_original((args, kwargs), given))
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)], after

    values = {name: v.get_value() for name, _, v in nnx_state(q.model)} | q.ranges.values()
    changed = _changed(traced, values, _inputs(args, kwargs)[0])
    kept = [name for name in values if name not in changed]

    def run(given: list[Any], state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        out, after = run_all({**dict(zip(kept, given, strict=True)), **(state or {})}, args, kwargs)
        return out, {name: after[name] for name in changed} or None

    names_of_inputs = _names(method if callable(method) else getattr(type(q.model), method or "__call__"))
    plan = q.plan(*args, method=method, **kwargs)
    state = {name: values[name] for name in changed} or None
    return _Call(leaves_of(q, None, without=changed), state, run, plan, names_of_inputs)


def _changed(call: Callable[[Any, Any], Any], values: Mapping[str, Any], inputs: Any) -> list[str]:
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


def _names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the positional parameters after the first: `self`, or the params of a function."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return tuple(p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds)[1:]
    except (TypeError, ValueError):  # some callables have no signature
        return ()


# --- One program ---------------------------------------------------------------------------------------------------


def _check_inputs(args: tuple, kwargs: Mapping[str, Any]) -> None:
    for leaf in jax.tree.leaves((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Module | nnx.Rngs)):
        if isinstance(leaf, nnx.Module | nnx.Rngs):
            raise TypeError(
                f"qjax: the inputs of an exported model are arrays, not {type(leaf).__name__}; make it a part of the "
                "module, whose state the exported program carries."
            )


def _inputs(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple[tuple, dict[str, Any]], dict[str, str]]:
    """The arrays among the inputs of a call, in plain trees, and what is fixed."""
    inputs, named, fixed = split_fixed(*plain((args, dict(kwargs))))
    return (inputs, named), fixed


def _original(example: Any, given: Any) -> Any:
    """The tree of `example` with the arrays of a plain one, `plain(example)`, in the place of its own."""
    leaves, tree = jax.tree.flatten(example)
    places = [i if is_array(leaf) else None for i, leaf in enumerate(leaves)]
    order = jax.tree.leaves(plain(jax.tree.unflatten(tree, places)))
    for i, leaf in zip(order, jax.tree.leaves(given), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _program(
    call: _Call,
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
            state = _original(call.state, state)
        out, after = call.run(values, state, *_original((args, kwargs), (inputs, named)))
        out = jax.tree.map(lambda x: x if isinstance(x, jax.Array | np.ndarray | int | float) else None, plain(out))
        if not stateful:
            return out
        after = plain(after)
        _check_state(plain(call.state), after)
        return out, after

    (inputs, named), fixed = _inputs(args, kwargs)
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


def _check_state(before: Any, after: Any) -> None:
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


def _write_state(folder: Path, state: Any) -> list[dict[str, Any]]:
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


# --- The model card ------------------------------------------------------------------------------------------------


_CARD = """\
# {name}

A model packed by [qjax](https://pypi.org/project/qjax/) {qjax} and exported by JAX {jax} for {platforms}.

## Run

```python
import qjax

m = qjax.load_exported("{name}")  # neither the model's code nor Flax
{qjax_call}
```

Without qjax, with JAX and Orbax alone:

```python
import jax, orbax.checkpoint as ocp
from jax import export

weights = ocp.PyTreeCheckpointer().restore("/absolute/path/of/{name}/weights/arrays")
program = export.deserialize(bytearray(open("{name}/{file}", "rb").read()))
{jax_call}
```

```
{signatures}
```
{fixed}
## Size

| | |
|---|---|
| stored | {stored:,} bytes |
| float | {float:,} bytes |
| bits per weight | {bits:.2f} |
| programs | {programs:,} bytes |
{quality}
## Plan

```
{plan}
```

## Compatibility

The programs are StableHLO modules of `jax.export`, calling convention {convention}, for the platforms {platforms}. JAX
runs a program for at least six months after the release that wrote it, and for three weeks before that release; newer
releases may refuse it after that. The weights are not affected: they are plain arrays, and the model is exported again
from `qjax.restore("{name}/weights", model)`. {calls}
"""


def _model_card(
    name: str, manifest: Mapping[str, Any], signatures: Sequence[Signature], call: _Call, comparison: Comparison | None
) -> str:
    """The text of README.md."""
    signature, stateful = signatures[0], manifest["programs"][0]["stateful"]
    inputs = [n for n, a in zip(signature.names, signature.args, strict=True) if jax.tree.leaves(a)]
    inputs = ", ".join([*inputs, *(f"{n}={n}" for n in signature.kwargs)])
    fixed = [f"`{where}`: {value}" for p in manifest["programs"][:1] for where, value in p["fixed"].items()]
    own = f"state, {inputs}".rstrip(", ")
    if stateful:
        qjax_call = f"state = m.init_state()\nout, state = m({own})  # the buffers of the state are taken over"
        jax_call = (
            "(_, shapes, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)\n"
            "state = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), shapes)  # or as manifest.json says\n"
            f"out, state = jax.jit(program.call, donate_argnums=1)(jax.device_put(weights), {own})"
        )
    else:
        qjax_call, jax_call = f"out = m({inputs})", f"out = jax.jit(program.call)(jax.device_put(weights), {inputs})"
    lines = "\n".join(f"{p['file']}  {s}" for p, s in zip(manifest["programs"], signatures, strict=True))
    stable = [f"`{n}`" for n, how in manifest["custom_calls"].items() if how == "stable"]
    unstable = [f"`{n}`" for n in manifest["custom_calls"] if f"`{n}`" not in stable]
    calls = "The programs have no custom calls."
    if stable or unstable:
        calls = f"Custom calls that JAX keeps stable: {', '.join(stable) or 'none'}."
    if unstable:
        calls += f" **Not stable: {', '.join(unstable)}: run those on JAX {manifest['libraries']['jax']} only.**"
    values, floats, stored = _size(call.leaves)
    return _CARD.format(
        name=name,
        qjax=manifest["libraries"]["qjax"],
        jax=manifest["libraries"]["jax"],
        platforms=", ".join(manifest["platforms"]),
        qjax_call=qjax_call,
        jax_call=jax_call,
        file=manifest["programs"][0]["file"],
        signatures=lines,
        fixed="\nFixed when it was exported: " + "; ".join(fixed) + ".\n" if fixed else "",
        stored=stored,
        float=floats,
        bits=8 * stored / values,
        programs=manifest["program_bytes"],
        quality=f"\n## Quality\n\nAgainst the float model:\n\n```\n{comparison}\n```\n" if comparison else "",
        plan=call.plan,
        convention=manifest["calling_convention"],
        calls=calls,
    )


def _size(leaves: Sequence[Leaf]) -> tuple[int, int, int]:
    """Number of values, and their bytes in float and as they are stored."""
    values = floats = stored = 0
    for leaf in leaves:
        info, arrays = describe(leaf.value)
        own = arrays["data"] if info["kind"] == "key" else leaf.value
        values += math.prod(own.shape)
        floats += math.prod(own.shape) * jnp.dtype(own.dtype).itemsize
        stored += sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in arrays.values())
    return values, floats, stored
