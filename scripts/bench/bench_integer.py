"""Times of one layer with integer activations on CPU, and the table that states them.

Writes `benchmarks/integer.md`: medians of a product of M rows with one weight, the activation quantized in the same
compiled program, next to float32 and to the weight-only int8 product, all interleaved in one process.

    python scripts/bench/bench_integer.py            about two minutes on 2 cores
    python scripts/bench/bench_integer.py --quick    fewer runs, and nothing is written
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from timing import medians

from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
from qjax.pallas_kernels.numbers.activations import quantize
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.pallas_kernels.packed.qtensor import quantize as pack

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks" / "integer.md"
FLOAT = "float32"
SHAPES = ((4096, 4096), (1024, 4096))  # K, N
ROWS = (1, 8, 128, 512)

# What is measured: bits of the weight, its granularity, order of storage, whether the activation has zero points (None:
# it stays float32).
WEIGHTS: dict[str, tuple[int, Any, Literal["kn", "nk"], bool | None]] = {
    "w8a8": (8, PerChannel(), "nk", False),
    "w8a8, activation with zero points": (8, PerChannel(), "nk", True),
    "w4a8 per channel": (4, PerChannel(), "kn", False),
    "w4a8 g64": (4, PerGroup(64), "kn", False),
    "weight-only int8": (8, PerChannel(), "kn", None),
}

Cell = tuple[float, float]  # median milliseconds, and ratio to float32


def integer_layer(x: jax.Array, w: QTensor, spec: ActSpec) -> jax.Array:
    """Quantizes each row of x by its own range, and multiplies."""
    a = quantize(x, spec, (1,))
    return integer_matmul(a.codes, a.scale, a.zero, w)


def measure(k: int, n: int, runs: int) -> dict[str, list[Cell]]:
    """For each program, its cell for each of `ROWS`."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
    layout = Layout((((k, "k"),), ((n, "n"),)))
    packed = {
        name: pack(weight, QuantSpec(FORMATS[f"int{bits}"], granularity, scale_rule=AbsMax()), layout, order)
        for name, (bits, granularity, order, _) in WEIGHTS.items()
    }
    dot, weight_only = jax.jit(jnp.matmul), jax.jit(quantized_matmul)
    integer = {
        zero: jax.jit(lambda x, w, zero=zero: integer_layer(x, w, ActSpec(FORMATS["int8"], zero_point=zero)))
        for zero in (False, True)
    }
    table: dict[str, list[Cell]] = {name: [] for name in (FLOAT, *WEIGHTS)}
    for m in ROWS:
        x = jnp.asarray(rng.standard_normal((m, k)), jnp.float32)
        programs: dict[str, Callable[[], Any]] = {FLOAT: lambda x=x: dot(x, weight)}
        for name, (_, _, _, zero) in WEIGHTS.items():
            run = weight_only if zero is None else integer[zero]
            programs[name] = lambda run=run, x=x, w=packed[name]: run(x, w)
        times = medians(programs, max(3, runs if m <= 8 else runs // 2 if m <= 128 else runs // 4))
        for name, seconds in times.items():
            table[name].append((seconds * 1e3, seconds / times[FLOAT]))
    return table


# --- Output ----------------------------------------------------------------------------------------------------

HEADER = ("program", *(f"{m} row{'s' if m > 1 else ''}" for m in ROWS))


def cells(name: str, row: list[Cell]) -> tuple[str, ...]:
    """A row as text: `milliseconds (ratio)` for each M."""
    return name, *(f"{ms:.2f} ({ratio:.2f})" for ms, ratio in row)


def rich_table(title: str, table: Mapping[str, list[Cell]]) -> Table:
    out = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(HEADER):
        out.add_column(name, justify="right" if i else "left")
    for name, row in table.items():
        out.add_row(*cells(name, row))
    return out


def processor() -> str:
    """The name of the processor and, where it is known, whether it has the integer dot instructions of x86."""
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine()).replace("_", "-")
    if "flags" not in fields:
        return name
    return f"{name} {'with' if 'vnni' in fields['flags'] else 'without'} VNNI"


def markdown(tables: Mapping[str, Mapping[str, list[Cell]]]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    lines = [
        "<!-- Written by scripts/bench/bench_integer.py; run it again instead of editing. -->",
        "# Integer activations on CPU: one layer",
        "",
        "Medians of interleaved runs in milliseconds, and in parentheses the ratio to float32. Activations are "
        f"quantized row by row inside the measured program. {os.cpu_count()} cores ({processor()}), Python "
        f"{platform.python_version()}, {versions}, {datetime.date.today().isoformat()}; load average at the end "
        f"{os.getloadavg()[0]:.1f}.",
    ]
    for title, table in tables.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(HEADER)} |", "|---|" + "--:|" * len(ROWS)]
        lines += [f"| {' | '.join(cells(name, row))} |" for name, row in table.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs; print only")
    quick = parser.parse_args().quick
    measured, console = {}, Console()
    for k, n in SHAPES:
        title = f"K = {k}, N = {n}"
        measured[title] = measure(k, n, 6 if quick else 40)
        console.print(rich_table(title, measured[title]), "")
    if not quick:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(markdown(measured))
        console.print(f"Wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
