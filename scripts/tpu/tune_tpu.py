"""Chooses the tiles of the TPU kernels for each chip from schedules of the TPU compiler; nothing runs on a TPU.

Writes `pallas_kernels/chips/tpu.json`, row by row.

    python scripts/tpu/tune_tpu.py                     all of it: about 20 minutes on 2 busy cores
    python scripts/tpu/tune_tpu.py --resume            keeps the rows that are there
    python scripts/tpu/tune_tpu.py --chip v6e          keeps those of the other chips

What is counted is what `scripts/tpu/bench_tpu.py` counts: the instruction bundles that one more weight in a tile costs,
as the difference between tiles of two depths, and the bundles that a step of the grid costs beside them. Registers that
are spilled are in that count; of tiles that take about as many bundles, those that spill least are chosen. What does
not fit into VMEM or does not compile is no candidate.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import bench_tpu
import jax
import jax.numpy as jnp
from bench_tpu import UNIT, K, Shape
from rich.progress import Progress

from qjax.pallas_kernels.chips import table
from qjax.pallas_kernels.chips import tpu as tpu_chips
from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu_tiles as matmul_tpu_tiles
from qjax.pallas_kernels.packed.qtensor import QTensor

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "pallas_kernels" / "chips" / "tpu.json"
WIDTHS = (512, 1024)
# Two depths of a tile for few rows of x and for many; half of each is compiled too.
FEW = 64
DEPTHS = {
    "quantized_matmul": {True: (1024, 2048), False: (512, 1024)},
    "integer_matmul": {True: (2048, 4096), False: (512, 1024)},
}
# Bundles of a step of the grid with 16 rows of x, less those of its weights.
STEP = 200
# Tiles with so many times the fewest bundles count as good as the best.
ABOUT = 1.03


@dataclasses.dataclass(frozen=True)
class Key:
    """What a row of the table is for; `group` is None where all of K shares a scale."""

    chip: str
    kernel: str
    format: str
    group: int | None
    order: Literal["kn", "nk"]
    m: int

    @property
    def values(self) -> tuple[Any, ...]:
        """Those of the columns `chips.tpu.KEY`."""
        x = "bfloat16" if self.kernel == "quantized_matmul" else "int8"
        return (self.chip, self.kernel, table.weight(self.packed.spec, K), self.order, x, self.m)

    @property
    def packed(self) -> QTensor:
        """The weight, shapes only."""
        return bench_tpu.packed(self.format, self.group, self.order)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A candidate; `scale` is None for integer products."""

    n: int
    k: int
    scale: Literal["before", "after"] | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bundles for 512 x 512 weights, those of the steps of the grid included, and the registers spilled."""

    bundles: float
    spills: int


WEIGHTS: list[tuple[str, str, int | None, Literal["kn", "nk"]]] = [
    ("quantized_matmul", "int8", None, "kn"),
    ("quantized_matmul", "int4", None, "kn"),
    ("quantized_matmul", "int4", 128, "kn"),
    ("quantized_matmul", "int4", 64, "kn"),
    ("quantized_matmul", "int4", 32, "kn"),
    ("quantized_matmul", "nf4", 64, "kn"),
    ("integer_matmul", "int8", None, "nk"),
    ("integer_matmul", "int4", None, "kn"),
    ("integer_matmul", "int4", 128, "kn"),
]
KEYS = [Key(chip, *weight, m) for chip in tpu_chips.CHIPS for weight in WEIGHTS for m in tpu_chips.ROWS]


# --- Candidates ------------------------------------------------------------------------------------------------


def program(key: Key, tile: Tile) -> tuple[Callable[..., Any], list[Any]] | None:
    """The product in such tiles and its operands; None if they do not fit into VMEM."""
    w = key.packed
    if key.kernel == "quantized_matmul":
        assert tile.scale is not None
        blocks = matmul_tpu_tiles.Blocks(key.m, tile.n, tile.k, tile.scale)
        if not matmul_tpu_tiles.fits(blocks, K, w.spec, jnp.bfloat16, key.order):
            return None
        options = {"layer": None, "casts": (), "precision": None, "preferred_element_type": None, "transpose": False}
        call = functools.partial(matmul_tpu.matmul, **options, blocks=blocks)
        return call, [Shape((key.m, K), jnp.bfloat16), w]
    cut = integer_matmul_tpu.Blocks(max(key.m, 32), tile.n, tile.k)
    if not integer_matmul_tpu.fits(cut, w):
        return None

    def integer(x: Any, scale: Any, w: QTensor) -> Any:
        return integer_matmul_tpu.matmul(x, scale, None, w, layer=None, out_dtype=jnp.bfloat16, blocks=cut)

    return integer, [Shape((key.m, K), jnp.int8), Shape((key.m, 1), jnp.float32), w]


def costs(key: Key, tiles: Sequence[Tile]) -> dict[Tile, Cost]:
    """Of the tiles that fit and compile."""

    @functools.cache
    def schedule(tile: Tile) -> Any:
        product = program(key, tile)
        return product and bench_tpu.schedule(*product, chip=key.chip)

    found = {}
    for tile in tiles:
        try:
            whole = schedule(tile)
            half = whole and schedule(dataclasses.replace(tile, k=tile.k // 2))
        except jax.errors.JaxRuntimeError:  # Mosaic or the compiler refuses
            continue
        if half:
            weights = tile.n * tile.k / UNIT
            slope = (whole.step.bundles - half.step.bundles) / (weights / 2)
            found[tile] = Cost(slope + STEP / weights, whole.text.spills)
    return found


def choose(key: Key) -> dict[str, Any] | None:
    """The row of the table, or None if nothing compiles.

    Where scales go is decided first, with the narrower of the deep tiles.
    """
    depths = DEPTHS[key.kernel][key.m <= FEW]
    positions = (None,) if key.kernel == "integer_matmul" else ("after",) if key.group is None else ("after", "before")
    found = costs(key, [Tile(WIDTHS[0], k, scale) for k in depths for scale in positions])
    if len(positions) > 1 and found:
        positions = (min(found, key=lambda tile: found[tile].bundles).scale,)
    found |= costs(key, [Tile(WIDTHS[1], k, scale) for k in depths for scale in positions])
    if not found:
        return None
    least = min(cost.bundles for cost in found.values())
    near = [tile for tile, cost in found.items() if cost.bundles <= ABOUT * least]
    tile = min(near, key=lambda tile: (found[tile].spills, found[tile].bundles))
    found_by = dict(zip(tpu_chips.KEY, key.values, strict=True))
    scale = {"scale": tile.scale} if tile.scale else {}
    return {**found_by, "n": tile.n, "k": tile.k, **scale, "bundles": round(found[tile].bundles)}


# --- The table -------------------------------------------------------------------------------------------------


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in tpu_chips.KEY)


def write(rows: list[dict[str, Any]]) -> None:
    """Replaces the table in one step, its rows in the order of `KEYS`."""
    place = {key.values: i for i, key in enumerate(KEYS)}
    rows = sorted(rows, key=lambda row: place[key_of(row)])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    note = (
        "Written by scripts/tpu/tune_tpu.py. m: rows of x, at most. bundles: for 512 x 512 weights, counted, not timed."
    )
    head = f'{{\n"note": {json.dumps(note)},\n"versions": {json.dumps(versions)},\n"rows": [\n'
    with tempfile.NamedTemporaryFile("w", dir=TARGET.parent, suffix=".json", delete=False) as file:
        file.write(head + ",\n".join(map(json.dumps, rows)) + "\n]\n}\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--chip", choices=tuple(tpu_chips.CHIPS), help="only the rows of this one")
    parser.add_argument("--resume", action="store_true", help="only the rows that are not there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (one for each core)")
    options = parser.parse_args()
    keys = [key for key in KEYS if options.chip in (None, key.chip)]
    old = json.loads(TARGET.read_text())["rows"] if TARGET.exists() else []
    replaced = set() if options.resume else {key.values for key in keys}
    rows = [row for row in old if key_of(row) in {key.values for key in KEYS} - replaced]
    there = set(map(key_of, rows))
    keys = [key for key in keys if key.values not in there]
    spawn = multiprocessing.get_context("spawn")  # libtpu is loaded once in each process
    with Progress() as progress, concurrent.futures.ProcessPoolExecutor(options.jobs, spawn) as pool:
        task = progress.add_task("compiling", total=len(keys))
        for done in concurrent.futures.as_completed([pool.submit(choose, key) for key in keys]):
            row = done.result()
            if row:
                rows.append(row)
                write(rows)
                progress.console.print(" ".join(map(str, row.values())), highlight=False)
            progress.advance(task)


if __name__ == "__main__":
    main()
