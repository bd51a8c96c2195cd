"""The model card of an exported folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.artifact.bound import BoundCall
from qjax.artifact.signature import Signature
from qjax.checkpoint.leaves import Leaf, describe
from qjax.report.compare import Comparison

# --- The model card ------------------------------------------------------------------------------------------------


_CARD = """\
# {name}

A model packed by [qjax](https://pypi.org/project/qjax-compiler/) {qjax} and exported by JAX {jax} for {platforms}.

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


def model_card(
    name: str,
    manifest: Mapping[str, Any],
    signatures: Sequence[Signature],
    call: BoundCall,
    comparison: Comparison | None,
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
