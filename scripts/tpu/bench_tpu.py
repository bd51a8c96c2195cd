"""What the TPU kernels ask of the chip, counted in the compiler's schedules; nothing runs on a TPU.

Writes `benchmarks/tpu_static.md`: for each chip and kernel the instruction bundles and operations that 512 x 512 more
weights in a tile cost, next to a bfloat16 kernel of the same tiling, and the spilled registers.

    python scripts/tpu/bench_tpu.py                    about five minutes on 2 cores
    python scripts/tpu/bench_tpu.py --chip v6e         one chip, and nothing is written
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tpu_compile
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console
from rich.table import Table

from qjax.pallas_kernels.chips.tpu import target_chip
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu_tiles as matmul_tpu_tiles
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks" / "tpu_static.md"
K, N = 8192, 65536  # matrices that no VMEM holds: of smaller ones XLA puts some there, which the kernel then copies
TILE_N = 512
# Rows of x, and two depths of a tile: their difference is what weights cost, without what every tile costs.
ROWS = {8: (1024, 2048), 16: (1024, 2048), 256: (512, 1024)}
DECODE = 16  # rows of x
VALU_SLOTS = 4  # operations of the vector unit in a bundle
PART = 256  # what the bfloat16 kernel may be cut into along K
UNIT = 512 * 512
BFLOAT16 = "bfloat16"

Shape = jax.ShapeDtypeStruct


# --- Kernels ---------------------------------------------------------------------------------------------------


def bfloat16(m: int, depth: int, *, rows: int, cut: bool) -> tuple[Callable[..., Any], list[Any]]:
    """A product of bfloat16 matrices, with the grid and the float32 accumulator of `matmul_tpu`.

    Args:
        m: rows of x.
        depth: of a tile.
        rows: of a tile, if not fewer than m.
        cut: whether a tile is multiplied in parts along K.
    """
    m, part = max(m, rows), PART if cut else depth

    def kernel(x: Any, w: Any, out: Any, acc: Any) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            acc[...] = jnp.zeros_like(acc)

        dots = [
            jnp.dot(x[:, i : i + part], w[i : i + part, :], preferred_element_type=jnp.float32)
            for i in range(0, depth, part)
        ]
        acc[...] += functools.reduce(jnp.add, dots)

        @pl.when(step == K // depth - 1)
        def _() -> None:
            out[...] = acc[...].astype(out.dtype)

    call = pl.pallas_call(
        kernel,
        out_shape=Shape((m, N), jnp.bfloat16),
        grid=(1, N // TILE_N, K // depth),
        in_specs=[
            pl.BlockSpec((m, depth), lambda i, j, t: (i, t)),
            pl.BlockSpec((depth, TILE_N), lambda i, j, t: (t, j)),
        ],
        out_specs=pl.BlockSpec((m, TILE_N), lambda i, j, t: (i, j)),
        scratch_shapes=[pltpu.VMEM((m, TILE_N), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    return call, [Shape((m, K), jnp.bfloat16), Shape((K, N), jnp.bfloat16)]


def packed(format: str, group: int | None, order: Any = "kn") -> QTensor:
    granularity, scale = (PerGroup(group), "bfloat16") if group else (PerChannel(), "float32")
    spec = QuantSpec(FORMATS[format], granularity, scale_dtype=scale, scale_rule=AbsMax())
    layout = Layout((((K, "k"),), ((N, "n"),)))
    return jax.eval_shape(lambda w: quantize(w, spec, layout, order), Shape((K, N), jnp.bfloat16))


def weight_only(m: int, depth: int, *, format: str, group: int | None) -> tuple[Callable[..., Any], list[Any]]:
    w = packed(format, group)
    chosen = matmul_tpu_tiles.default_blocks(m, K, N, w.spec, jnp.bfloat16)
    blocks = dataclasses.replace(chosen, n=TILE_N, k=depth)
    options = {"layer": None, "casts": (), "precision": None, "preferred_element_type": None, "transpose": False}
    call = functools.partial(matmul_tpu.matmul, **options, blocks=blocks)
    return call, [Shape((m, K), jnp.bfloat16), w]


def integer(
    m: int, depth: int, *, format: str, group: int | None, order: Any = "kn"
) -> tuple[Callable[..., Any], list[Any]]:
    w = packed(format, group, order)
    blocks = integer_matmul_tpu.Blocks(max(m, 32), TILE_N, depth)

    def call(x: Any, scale: Any, w: QTensor) -> Any:
        options: dict[str, Any] = {"layer": None, "out_dtype": jnp.bfloat16, "blocks": blocks}
        return integer_matmul_tpu.matmul(x, scale, None, w, **options)

    return call, [Shape((m, K), jnp.int8), Shape((m, 1), jnp.float32), w]


Kernel = Callable[..., tuple[Callable[..., Any], list[Any]]]
# Of these the one with the fewest bundles is what the others are compared with.
BASELINES: list[Kernel] = [functools.partial(bfloat16, rows=rows, cut=cut) for rows in (8, 16) for cut in (False, True)]
KERNELS: dict[str, Kernel] = {
    "int8, per channel": functools.partial(weight_only, format="int8", group=None),
    "int4, per channel": functools.partial(weight_only, format="int4", group=None),
    "int4, groups of 128": functools.partial(weight_only, format="int4", group=128),
    "int4, groups of 64": functools.partial(weight_only, format="int4", group=64),
    "int3, groups of 128": functools.partial(weight_only, format="int3", group=128),
    "NF4, groups of 64": functools.partial(weight_only, format="nf4", group=64),
    "fp8 e4m3, per channel": functools.partial(weight_only, format="fp8_e4m3", group=None),
    "w8a8, per channel": functools.partial(integer, format="int8", group=None, order="nk"),
    "w4a8, per channel": functools.partial(integer, format="int4", group=None),
    "w4a8, groups of 128": functools.partial(integer, format="int4", group=128),
    "w4a8, groups of 32": functools.partial(integer, format="int4", group=32),
}


# Kernel, rows of x, for each chip how many times the bundles of bfloat16 it may take, and whether it may spill.
GOALS: list[tuple[str, int, dict[str, float], bool]] = [
    ("int4, groups of 128", 8, {"v6e": 1.05, "7x": 1.05}, False),
    ("int4, groups of 128", 16, {"v5e": 1.2, "v6e": 1.05, "7x": 1.05}, False),
    ("NF4, groups of 64", 16, {"v5e": 2.5, "v6e": 2.5, "7x": 2.5}, True),
    ("w8a8, per channel", 256, {"v5e": 1.0, "v6e": 1.0}, True),
]


# --- Counting --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """What 512 x 512 weights of a tile ask for, and the registers that the deeper tile spills."""

    bundles: float
    mxu: float
    valu: float
    xlu: float
    spills: int


def cost(kernel: Kernel, m: int, chip: str) -> Cost:
    with target_chip(chip):  # tiles are chosen for it
        programs = [kernel(m, depth) for depth in ROWS[m]]
    small, large = (schedule(*program, chip=chip) for program in programs)
    weights = (ROWS[m][1] - ROWS[m][0]) * TILE_N / UNIT

    def slope(unit: str) -> float:
        return (getattr(large.step, unit) - getattr(small.step, unit)) / weights

    return Cost(*(slope(unit) for unit in ("bundles", "mxu", "valu", "xlu")), spills=large.text.spills)


def costs_on(chip: str) -> dict[str, dict[int, Cost]]:
    """By kernel and rows of x."""

    def baseline(m: int) -> Cost:
        return min((cost(kernel, m, chip) for kernel in BASELINES), key=lambda cost: cost.bundles)

    own = {name: {m: cost(kernel, m, chip) for m in ROWS} for name, kernel in KERNELS.items()}
    return {BFLOAT16: {m: baseline(m) for m in ROWS}, **own}


def schedule(call: Callable[..., Any], operands: list[Any], chip: str) -> tpu_compile.Schedule:
    """That of the one kernel in a program."""
    compiled, schedules = tpu_compile.compile_scheduled(call, *operands, chip=chip)
    (name,) = re.findall(r'%([\w.\-]+) = [^\n]*custom_call_target="tpu_custom_call"', compiled.as_text())
    return schedules[name]


# --- Tables ----------------------------------------------------------------------------------------------------

COLUMNS = {m: ("bundles", "spills") if m == 8 else ("bundles", "MXU", "VALU", "XLU", "spills") for m in ROWS}
HEADER = ("kernel", *(f"{m} rows: {column}" for m, columns in COLUMNS.items() for column in columns))


def cells(name: str, costs: dict[int, Cost], base: dict[int, Cost]) -> list[str]:
    out = [name]
    for m, c in costs.items():
        counts = {column: f"{getattr(c, column.lower()):.0f}" for column in COLUMNS[m]}
        counts["bundles"] += f" ({c.bundles / base[m].bundles:.2f})"
        out += counts.values()
    return out


def goals(costs: dict[str, dict[str, dict[int, Cost]]]) -> list[str]:
    """What was aimed at, and what was reached."""
    lines = ["| kernel | rows | chip | goal | bundles | spills | |", "|---|--:|---|--:|--:|--:|---|"]
    for kernel, m, most, may_spill in GOALS:
        for chip, limit in most.items():
            one = costs[chip][kernel][m]
            ratio = one.bundles / costs[chip][BFLOAT16][m].bundles
            met = ratio <= limit and (may_spill or one.spills == 0)
            lines.append(
                f"| {kernel} | {m} | {chip} | {limit:.2f} | {ratio:.2f} | {one.spills} | {'' if met else 'missed'} |"
            )
    return lines


def why(costs: dict[str, dict[str, dict[int, Cost]]]) -> list[str]:
    """What stands between the kernels and the goals that they miss, as far as the counts say it."""

    def of(chip: str, kernel: str) -> Cost:
        return costs[chip][kernel][DECODE]

    grouped, codebook = "int4, groups of 128", "NF4, groups of 64"
    fill = ", ".join(
        f"{of(chip, grouped).valu / VALU_SLOTS:.0f} of {of(chip, grouped).bundles:.0f} on {chip}"
        for chip in ("v6e", "7x")
    )
    most = VALU_SLOTS * 2.5 * of("v5e", BFLOAT16).bundles / (UNIT / 1024)
    return [
        f"With {DECODE} rows and groups of 128 no unit is full on the chips with a matrix unit 256 deep: the vector "
        f"arithmetic would fit into {fill} bundles. What is missing is order: the compiler pushes few weights while it "
        "scales values or sums. Per channel, where nothing is scaled on the way, there is no gap.",
        "",
        "On v5e and v5p, which do not gather bytes, NF4 is bound by vector arithmetic: 1024 values take "
        f"{of('v5e', codebook).valu / (UNIT / 1024):.1f} operations (a lookup in a register of 8 rows of pairs, what "
        "makes of a code an index and the choice of one of the pair, that choice, packing, and scales), and the goal "
        f"leaves {most:.1f}.",
    ]


def rich_table(title: str, rows: list[list[str]]) -> Table:
    out = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(HEADER):
        out.add_column(name, justify="right" if i else "left")
    for row in rows:
        out.add_row(*row)
    return out


def markdown(costs: dict[str, dict[str, dict[int, Cost]]]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    lines = [
        "<!-- Written by scripts/tpu/bench_tpu.py; run it again instead of editing. -->",
        "# Kernels for TPU: static counts",
        "",
        "**Nothing here ran on a TPU.** These are counts of instructions in the schedules of the TPU compiler, made on "
        "a machine without one. A bundle is one instruction of all units and takes a cycle if nothing stalls. Waiting "
        "for memory is not in it: with few rows of x, a kernel that has as many bundles as bfloat16 and a quarter of "
        "its bytes to read is as fast as it is, four times as fast, or anything in between.",
        "",
        "Each number is what 512 x 512 more weights in a tile cost: the difference of a step of the grid with tiles of "
        f"two depths ({' and '.join(f'{a} and {b} for {m} rows' for m, (a, b) in ROWS.items())}; {TILE_N} columns), "
        "without what a step costs for itself. In parentheses the ratio to a bfloat16 kernel: the fewest bundles of "
        f"tiles with as many rows and with 16, multiplied at once and in parts of {PART} along K. MXU, VALU and XLU "
        "are operations of the matrix unit, the vector arithmetic and the lane shuffles; spills those of the text of "
        "the kernel with the deeper tile. The first kernel multiplies bfloat16, those after it bfloat16 with packed "
        "weights, the last four int8 with packed weights. TPU 7x has no integer matrix unit: the compiler "
        "emulates it. An integer product rounds and adds each group on its own, as training does: that costs vector "
        "arithmetic for each group and result, so with many rows and small groups it is far slower than bfloat16.",
        "",
        f"{versions}, Python {platform.python_version()}, {datetime.date.today().isoformat()}.",
    ]
    for chip, kernels in costs.items():
        lines += ["", f"## {chip}", "", f"| {' | '.join(HEADER)} |", "|---|" + "--:|" * (len(HEADER) - 1)]
        lines += [f"| {' | '.join(cells(name, row, kernels[BFLOAT16]))} |" for name, row in kernels.items()]
    lines += ["", "## Goals", "", "Bundles as a multiple of those of bfloat16; for int4, no spills either.", ""]
    lines += [*goals(costs), "", *why(costs)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--chip", choices=tuple(tpu_compile.CHIPS), help="only this one; print only")
    only = parser.parse_args().chip
    measured, console = {}, Console(width=200)
    for chip in [only] if only else tpu_compile.CHIPS:
        costs = measured[chip] = costs_on(chip)
        console.print(rich_table(chip, [cells(name, row, costs[BFLOAT16]) for name, row in costs.items()]), "")
    if not only:
        TARGET.write_text(markdown(measured))
        console.print(f"Wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
