"""What quantization costs on CPU: tracing, a training step, a packed forward, a packed layer, each against float.

What this script gives: `benchmarks/overhead.md`, four tables of medians, each row beside the float program that ran
interleaved with it, with the goal for the ratio where there is one and whether it was met.

    python scripts/bench/bench_overhead.py            about five minutes on 2 cores
    python scripts/bench/bench_overhead.py --quick    fewer runs, and nothing is written

With qwix 0.1.8 installed (`pip install -e '.[bench]'`) the forward table has its rows too, on the same model with
unrolled layers: it cannot take trained weights of scanned ones.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from timing import medians

import qjax
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import quantize

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks" / "overhead.md"
FLOAT = "float32"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured program.

    Attributes:
        what: the program.
        seconds: its median time.
        ratio: to the median of the float program that ran interleaved with it.
        goal: the largest ratio wanted, or None.
    """

    what: str
    seconds: float
    ratio: float
    goal: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text: what, milliseconds, ratio, goal."""
        if self.goal is None:
            verdict = ""
        else:
            verdict = f"<= {self.goal:.2f} " + ("met" if self.ratio <= self.goal else "missed")
        return self.what, f"{self.seconds * 1e3:.2f}", f"{self.ratio:.2f}", verdict


def rows(
    programs: Mapping[str, Callable[[], Any]],
    runs: int,
    goals: Mapping[str, float] | None = None,
    baseline: str = FLOAT,
) -> list[Row]:
    """Measures programs, of which `baseline` is what the others are compared with."""
    times = medians(programs, runs)
    return [Row(name, t, t / times[baseline], (goals or {}).get(name)) for name, t in times.items()]


def tokens(batch: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, 128)), jnp.int32)


# --- The four tables -------------------------------------------------------------------------------------------


def tracing(variables: Any, runs: int) -> list[Row]:
    """Python time of trace, plan and replay, against one compilation of the float model."""
    model, example = lm.LM(), tokens(1)
    # lowered anew for each run: jax keeps what it compiled of one
    lowered = iter([jax.jit(lambda *a: model.apply(*a)).lower(variables, example) for _ in range(runs + 1)])
    q = qjax.quantize(model, qjax.int4(scale=qjax.SignedMax()))
    packed = q.convert(variables, example)
    compile_float = "compile the float model"

    def trace(fn: Callable[..., Any], variables: Any) -> Callable[[], Any]:
        # a new function each time, as jax would otherwise answer from its cache
        return lambda: jax.make_jaxpr(lambda *args: fn(*args))(variables, example) and None

    programs = {
        compile_float: lambda: next(lowered).compile() and None,
        "trace the float model": trace(model.apply, variables),
        "trace q.apply, float variables": trace(q.apply, variables),
        "trace q.apply, packed variables": trace(q.apply, packed),
    }
    goals = dict.fromkeys(list(programs)[2:], 0.25)
    return rows(programs, runs, goals, baseline=compile_float)


def training(params: Any, runs: int) -> list[Row]:
    """One step of AdamW on 8x128 tokens."""
    model, batch, optimizer = lm.LM(), tokens(8), optax.adamw(1e-3)
    state = optimizer.init(params)

    def step_of(apply: Callable[..., Any]) -> Callable[[], Any]:
        @jax.jit
        def step(params: Any, state: Any) -> Any:
            def loss(params: Any) -> jax.Array:
                return lm.bits_per_byte(apply({"params": params}, batch), batch)

            value, gradient = jax.value_and_grad(loss)(params)
            updates, new_state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), new_state, value

        return lambda: step(params, state)

    programs, goals = {FLOAT: step_of(model.apply)}, {}
    for name, make in (("int4 g64", qjax.int4), ("int3 g64", qjax.int3)):
        for rule in (qjax.SignedMax(), qjax.MseSearch()):
            what = f"QAT {name}, {type(rule).__name__}"
            programs[what] = step_of(qjax.quantize(model, make(scale=rule)).apply)
            if isinstance(rule, qjax.SignedMax):
                goals[what] = 1.25
    return rows(programs, runs, goals)


FORMATS = {"int8 per channel": qjax.int8(), "int4 g64": qjax.int4(), "NF4 g64": qjax.nf4()}


def forward(params: Any, batch: int, runs: int) -> list[Row]:
    """The demonstration model on `batch` x 128 tokens, weights as arguments of the compiled program."""
    model, inputs, variables = lm.LM(), tokens(batch), {"params": params}

    def run_of(apply: Callable[..., Any], variables: Any) -> Callable[[], Any]:
        compiled = jax.jit(apply)
        return lambda: compiled(variables, inputs)

    programs = {FLOAT: run_of(model.apply, variables)}
    for name, spec in FORMATS.items():
        q = qjax.quantize(model, spec)
        programs[f"qjax {name}"] = run_of(q.apply, q.convert(variables, inputs))
    out = rows(programs, runs, {name: 1.2 for name in programs if name != FLOAT})
    if importlib.util.find_spec("qwix") is None:
        return out

    import qwix  # optional

    unrolled, variables = lm.LM(scan_layers=False), {"params": lm.unstack_params(params)}
    peers = (
        ("int8 per channel", qwix.QuantizationRule(weight_qtype=jnp.int8)),
        ("int4 g64", qwix.QuantizationRule(weight_qtype=jnp.int4, tile_size=64)),
        ("NF4 g64", qwix.QuantizationRule(weight_qtype="nf4", tile_size=64)),
    )
    programs = {f"{FLOAT}, unrolled": run_of(unrolled.apply, variables)}
    for name, rule in peers:
        quantized = qwix.quantize_model(unrolled, qwix.PtqProvider([rule]))
        abstract = jax.eval_shape(quantized.init, jax.random.key(0), inputs)
        packed = {"params": qwix.quantize_params(variables["params"], abstract["params"])}
        programs[f"qwix {name}, unrolled"] = run_of(quantized.apply, packed)
    return out + rows(programs, runs, baseline=f"{FLOAT}, unrolled")


def layer(m: int, runs: int, size: int = 4096) -> list[Row]:
    """One product of `m` rows with a `size` x `size` matrix."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((size, size)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((m, size)), jnp.float32)
    specs = {
        "int8 per channel": qjax.int8(scale=qjax.AbsMax()),
        "int4 per channel": qjax.int4(group=None, scale=qjax.AbsMax()),
        "int4 g128": qjax.int4(group=128, scale=qjax.AbsMax()),
        "NF4 g64": qjax.nf4(scale=qjax.AbsMax()),
    }
    layout = Layout((((size, "k"),), ((size, "n"),)))
    dot, packed_dot = jax.jit(jnp.matmul), jax.jit(quantized_matmul)
    programs: dict[str, Callable[[], Any]] = {FLOAT: lambda: dot(x, w)}
    for name, spec in specs.items():
        q = quantize(w, spec, layout)
        programs[name] = lambda q=q: packed_dot(x, q)
    return rows(programs, runs)


# --- Output ----------------------------------------------------------------------------------------------------

HEADER = ("program", "ms", "ratio", "goal")


def rich_table(title: str, table: list[Row]) -> Table:
    out = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(HEADER):
        out.add_column(name, justify="right" if i in (1, 2) else "left")
    for row in table:
        out.add_row(*row.cells())
    return out


def markdown(tables: Mapping[str, list[Row]]) -> str:
    names = ("jax", "jaxlib", "flax", "optax", *(["qwix"] if importlib.util.find_spec("qwix") else []))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines = [
        "<!-- Written by scripts/bench/bench_overhead.py; run it again instead of editing. -->",
        "# What quantization costs on CPU",
        "",
        f"Medians of interleaved runs on a {os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU, "
        f"Python {platform.python_version()}, {versions}, {datetime.date.today().isoformat()}. "
        "A ratio is to the first row of its table, or of its part.",
    ]
    for title, table in tables.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(HEADER)} |", "|---|--:|--:|---|"]
        lines += [f"| {' | '.join(row.cells())} |" for row in table]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs; print only")
    quick = parser.parse_args().quick
    scale = 1 if quick else 5
    params, console = lm.load_weights(), Console()
    measured: dict[str, list[Row]] = {}

    def show(title: str, table: list[Row]) -> None:
        measured[title] = table
        console.print(rich_table(title, table), "")

    show("Trace, plan and replay", tracing({"params": params}, 3 * scale))
    show("One training step, 8 x 128 tokens, AdamW", training(params, 3 * scale))
    show("Forward, 1 x 128 tokens", forward(params, 1, 12 * scale))
    show("Forward, 16 x 128 tokens", forward(params, 16, 3 * scale))
    for m in (1, 8, 128):
        show(f"One 4096 x 4096 layer, {m} row{'s' if m > 1 else ''}", layer(m, (8 if m < 100 else 4) * scale))
    if not quick:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(markdown(measured))
        console.print(f"Wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
