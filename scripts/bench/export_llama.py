"""Exports a decoder of the shape of Llama 3 8B for TPU from abstract weights, and compiles the artifact for a v5e chip.

What this script gives: `benchmarks/export.md`. Nothing of that size is allocated and nothing runs: weights are shapes,
and the compiler in `libtpu` says what one step of decoding takes in the 16 GB of the chip's memory. The artifact is
compiled as a server would, from the exported file alone.

    python scripts/bench/export_llama.py            a few minutes on 2 cores
    python scripts/bench/export_llama.py --quick    two layers, one case, and nothing is written
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tpu"))

import jax
import jax.numpy as jnp
import tpu_compile
from jax import export as jax_export
from llama import Config, Decoder, nbytes

import qjax

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks" / "export.md"
CHIP = "v5e"


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: recipe (None for the float model) and cache, sequences at a time, tokens in the cache."""

    recipe: str | None
    kv_cache: str | None
    batch: int
    cache: int


CASES = (
    Case(None, None, 1, 2048),
    Case(None, None, 4, 2048),
    Case("int8", None, 4, 2048),
    Case("int4", None, 1, 2048),
    Case("int4", None, 4, 2048),
    Case("int4", None, 16, 2048),
    Case("int4", "int8", 16, 2048),
    Case("int4", "int8", 16, 4096),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one case takes, in bytes.

    Attributes:
        weights, cache: of the arrays.
        artifact: the exported file.
        arguments, temporary, peak: what the compiler plans; 0 where it refuses.
        kernels: Pallas kernels in the compiled program.
        seconds: to compile.
        refused: what the compiler says where memory does not suffice; else empty.
    """

    weights: int
    cache: int
    artifact: int
    arguments: int = 0
    temporary: int = 0
    peak: int = 0
    kernels: int = 0
    seconds: float = 0.0
    refused: str = ""


def run(case: Case, config: Config) -> Result:
    """Exports one case from shapes, and compiles the file."""
    config = dataclasses.replace(config, cache=case.cache)
    model = Decoder(config)
    inputs = jax.ShapeDtypeStruct((case.batch, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    if case.recipe is None:  # the float program, exported in the same form
        variables, cache = {"params": variables["params"]}, {"cache": variables["cache"]}

        def step(weights: Any, state: Any, *inputs: jax.Array) -> Any:
            return model.apply({**weights, **state}, *inputs, mutable=["cache"])

        exported = jax_export.export(jax.jit(step, donate_argnums=1), platforms=["tpu"])(variables, cache, *inputs)
        program = exported.serialize()
    else:
        recipe = {"int4": qjax.int4(group=128), "int8": qjax.int8()}[case.recipe]
        q = qjax.quantize(model, recipe, kv_cache=case.kv_cache)
        packed = jax.eval_shape(lambda v: q.convert(v, *inputs, mutable=["cache"]), variables)
        with tempfile.TemporaryDirectory() as folder:
            qjax.export(f"{folder}/llama", q, packed, *inputs, mutable=["cache"], platforms=["tpu"])
            program = Path(f"{folder}/llama/programs/0.jax_export").read_bytes()
    exported = jax_export.deserialize(bytearray(program))
    (weights, state, *rest), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    sizes = Result(nbytes(weights), nbytes(state), len(program))
    start = time.perf_counter()
    try:
        step = jax.jit(exported.call, donate_argnums=1)
        compiled = tpu_compile.compile(step, weights, state, *rest, chip=CHIP)
    except jax.errors.JaxRuntimeError as error:
        sizes_in_gib = re.findall(r"(\d+\.\d+)G", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes_in_gib) < 2:
            raise
        refused = f"needs {sizes_in_gib[0]} of {sizes_in_gib[1]} GiB"
        return dataclasses.replace(sizes, refused=refused, seconds=time.perf_counter() - start)
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return dataclasses.replace(
        sizes,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs,
        kernels=compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        seconds=time.perf_counter() - start,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, one case, and nothing is written")
    quick = parser.parse_args().quick
    config = Config(layers=2) if quick else Config()
    rows = []
    for case in [Case("int4", None, 16, 2048)] if quick else CASES:
        result = run(case, config)
        rows.append((case, result))
        print(case, result, flush=True)
    if not quick:
        TARGET.write_text(report(rows))


def report(rows: list[tuple[Case, Result]]) -> str:
    """The page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu", "flax"))
    intro = (
        "A decoder of the shape of Llama 3 8B (32 scanned layers, 8.03 B parameters, grouped-query attention, a "
        "key-value cache), one step of decoding for `batch` sequences with room for `tokens` each, exported by "
        "`qjax.export` from shapes alone and compiled from the exported file alone for one core of TPU "
        f"{CHIP}, on a machine without a TPU. Python {platform.python_version()}, {versions}, {datetime.date.today()}. "
        "Embedding and head are quantized like the rest; norms stay bfloat16. The bfloat16 rows are the float model, "
        "exported in the same form."
    )
    how = (
        "Memory is what the TPU compiler plans (`memory_analysis`); nothing ran, so nothing here says how fast it is. "
        "Arguments are weights, cache and tokens as they lie in the chip's memory, then as a multiple of the bytes of "
        "the arrays. The cache is donated: the new one takes its place. Peak = arguments + temporary + outputs that "
        "are no donated arguments. Kernels: calls of Pallas kernels in the compiled program, those in the body of the "
        "scan counted once. Of a bfloat16 cache, temporary is a second copy, in the float model too: XLA does not "
        "update the stack of caches that the scan over layers reads and writes in place. Packed caches are updated in "
        "their stack."
    )
    columns = {
        "weights": lambda c, r: {None: "bfloat16", "int4": "int4/g128", "int8": "int8/channel"}[c.recipe],
        "cache": lambda c, r: c.kv_cache or "bfloat16",
        "batch": lambda c, r: c.batch,
        "tokens": lambda c, r: f"{c.cache:,}",
        "weights (GB)": lambda c, r: f"{r.weights / 1e9:.3f}",
        "cache (GB)": lambda c, r: f"{r.cache / 1e9:.3f}",
        "arguments (GB)": lambda c, r: f"{r.arguments / 1e9:.3f}" if r.arguments else "-",
        "of arrays": lambda c, r: f"{r.arguments / (r.weights + r.cache):.4f}" if r.arguments else "-",
        "temporary (GB)": lambda c, r: f"{r.temporary / 1e9:.3f}" if r.arguments else "-",
        "peak (GB)": lambda c, r: f"{r.peak / 1e9:.3f}" if r.arguments else "-",
        "fits": lambda c, r: f"no: {r.refused}" if r.refused else "yes",
        "kernels": lambda c, r: r.kernels if r.arguments else "-",
        "artifact (kB)": lambda c, r: f"{r.artifact / 1e3:.0f}",
        "compile (s)": lambda c, r: f"{r.seconds:.0f}",
    }
    lines = [list(columns), ["---"] * 2 + ["--:"] * (len(columns) - 2)]
    lines += [[column(case, result) for column in columns.values()] for case, result in rows]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return (
        "<!-- Written by scripts/bench/export_llama.py; run it again instead of editing. -->\n"
        f"# An exported 8 B decoder on one 16 GB chip\n\n{intro}\n\n{how}\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
