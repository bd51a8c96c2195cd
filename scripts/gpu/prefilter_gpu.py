"""Compiles every tile of the Hopper kernel that a sweep may try, and says which ones the compiler spoils.

Nothing runs on a GPU. Writes `benchmarks/gpu_tiles.json` and `gpu_tiles.md`: for each kind of weight and each tile the
registers of a thread, the bytes that it spills, whether the compiler made the products wait for each other, and the
instructions for 64 x 128 weights. The sweep of `scripts/gpu_check` leaves out what spills, waits or does not compile:
a minute on a GPU goes to tiles that can win.

    PYTHONPATH=.venv/cuda python scripts/gpu/prefilter_gpu.py    a few minutes; needs what scripts/gpu/gpu_compile.py
    needs
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import gpu_compile
import jax
from rich.progress import track

from qjax.pallas_kernels.chips.gpu import ROWS
from qjax.pallas_kernels.numbers.formats import FORMATS
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.matmul import mosaic_tiles

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks" / "gpu_tiles.json"
K = N = 8192
WEIGHTS: tuple[tuple[str, int | None], ...] = (("int4", 128), ("int4", None), ("int8", 128), ("int8", None))
TILE = ("m", "n", "k", "ways")
"""What the code of a kernel depends on; stages and splits only say how often it runs."""

COLUMNS = ("weight", *TILE, "registers", "spilled", "serialized", "instructions")


def tiles(bits: int) -> list[matmul_mosaic.Blocks]:
    """One of each kind for all numbers of rows that the table of tiles tells apart."""
    found: dict[Any, matmul_mosaic.Blocks] = {}
    for m in ROWS:
        for blocks in mosaic_tiles.candidates(m, K, N, bits):
            found.setdefault(tuple(getattr(blocks, name) for name in TILE), dataclasses.replace(blocks, splits=1))
    return list(found.values())


def compiled(format: str, group: int | None, blocks: matmul_mosaic.Blocks) -> dict[str, Any]:
    """A row of the table."""
    variant = gpu_compile.Variant(format, group, False, "bfloat16", blocks.m, K, N)
    row = {"weight": f"{format} {f'g{group}' if group else 'channel'}", **{n: getattr(blocks, n) for n in TILE}}
    try:
        product = gpu_compile.product(matmul_mosaic, blocks=blocks)
        _, (kernel,) = gpu_compile.compile_counted(product, variant.x(), variant.weight("nk"), chip="h100")
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return row | {"error": str(error).partition("\n")[0][:200]}
    each = kernel.loop and round(kernel.loop * 8192 / (64 * blocks.k // blocks.ways))
    return row | {
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "serialized": kernel.serialized,
        "instructions": each,
    }


def good(row: dict[str, Any]) -> bool:
    """Whether a sweep should try it."""
    return "error" not in row and not row["spilled"] and not row["serialized"]


def markdown(rows: list[dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jax-cuda13-plugin"))
    lines = [
        "<!-- Written by scripts/gpu/prefilter_gpu.py; run it again instead of editing. -->",
        "# Tiles of the Hopper kernel, compiled",
        "",
        f"**Nothing here ran on a GPU.** {sum(map(good, rows))} of {len(rows)} tiles compile for sm_90a without "
        f"spilled registers and without products that wait for each other. Instructions are those of a warp for "
        f"64 x 128 weights. Matrices of {K} x {N}, bfloat16; {versions}, {datetime.date.today().isoformat()}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
    ]
    for row in rows:
        cells = [str(row.get(name, row.get("error", ""))) for name in COLUMNS]
        lines.append(f"| {' | '.join('' if cell == 'None' else cell for cell in cells)} |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """In one step."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=path.suffix, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.parse_args()
    gpu_compile.compile(lambda x: x + 1, jax.ShapeDtypeStruct((8,), "float32"), chip="h100")  # or says what is missing
    work = [(form, group, blocks) for form, group in WEIGHTS for blocks in tiles(FORMATS[form].bits)]
    rows = [compiled(*one) for one in track(work, "compiling")]
    write(TARGET, json.dumps({"rows": rows}, indent=0) + "\n")
    write(TARGET.with_suffix(".md"), markdown(rows))
    print(f"{sum(map(good, rows))} of {len(rows)} tiles are good; wrote {TARGET.relative_to(ROOT)} and gpu_tiles.md")


if __name__ == "__main__":
    main()
