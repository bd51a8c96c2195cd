"""Fine-tuning in full, with adapters on float weights and with adapters on NF4 weights (QLoRA): memory and loss.

What this script gives: `benchmarks/lora.md`. Memory is what the compiler plans for one step of training, state donated
(`Compiled.memory_analysis`); nothing of that size is allocated, so that a large model can be asked about. The loss is
that of the demonstration model, trained on Python source, after a few steps on Python's reference documentation.

    python scripts/bench/bench_lora.py            about ten minutes on 2 cores
    python scripts/bench/bench_lora.py --quick    a few steps, the small model only, and nothing is written
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import lm
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table

import qjax
from qjax.pallas_kernels.packed.qtensor import quantize
from qjax.passes.analysis.sites import find_sites
from qjax.passes.jaxpr.replay import replay
from qjax.passes.jaxpr.trace import path_name, trace
from qjax.passes.rewrites.adapters import attach

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks" / "lora.md"
RANK, ALPHA = 16, 32.0
RULES = [qjax.Rule("layers/**", qjax.nf4(group=64, double_quant=True))]
TARGETS = "layers/**"
LARGE = lm.LMConfig(
    vocab_size=32_000, d_model=2048, num_layers=16, num_heads=16, num_kv_heads=8, head_dim=128, mlp_dim=5632
)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: of the row.
        apply: `apply(trained, frozen, tokens) -> logits`.
        trained, frozen: the leaves that the optimizer changes, and those that it does not; arrays or their shapes.
        rate: of Adam.
    """

    name: str
    apply: Callable[[Any, Any, jax.Array], jax.Array]
    trained: Any
    frozen: Any
    rate: float


def float_lora(model: lm.LM, spec: Any) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """The same adapters on the same matmuls of the float model."""

    def apply(lora: Any, params: Any, tokens: jax.Array) -> jax.Array:
        leaves, tree = jax.tree.flatten_with_path(params)
        paths = [path_name(path) for path, _ in leaves]

        def flat(*arrays: Any) -> list[jax.Array]:
            *own, tokens = arrays
            return [model.apply({"params": jax.tree.unflatten(tree, own)}, tokens)]

        values = [*(leaf for _, leaf in leaves), tokens]
        program = trace(flat, values, [*paths, None])
        sites = find_sites(program)
        plan = qjax.quantize(model, RULES).plan({"params": params}, tokens)
        pairs = {"/".join(path[:-1]): {} for path in flatten_dict(lora)}
        for (*path, part), value in flatten_dict(lora).items():
            pairs["/".join(path)][part] = value
        values, at = attach(program, sites, plan, values, {}, pairs, spec.scale)
        return replay(program, values, rules={}, at=at)[0][0]

    return apply


def packed_shapes(q: Any, params: Any, tokens: Any) -> Any:
    """The packed parameters as shapes."""
    flat = flatten_dict(params, sep="/")
    for entry in q.plan({"params": params}, tokens).quantized:
        flat[entry.name] = jax.eval_shape(
            lambda w, e=entry: quantize(w, e.spec, e.layout, e.order), jax.ShapeDtypeStruct(entry.shape, jnp.float32)
        )
    return unflatten_dict(flat, sep="/")


def methods(model: lm.LM, params: Any, tokens: Any) -> list[Method]:
    """The three ways, from float parameters (or their shapes)."""
    q = qjax.quantize(model, RULES)
    m = qjax.lora(q, rank=RANK, alpha=ALPHA, targets=TARGETS)
    abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    packed = packed_shapes(q, params, tokens) if abstract else q.convert({"params": params}, tokens)["params"]
    key = jax.random.key(0)

    def init() -> Any:
        return m.init(key, {"params": params}, tokens)["lora"]

    lora = jax.eval_shape(init) if abstract else init()
    return [
        Method("full, float32", lambda p, _, t: model.apply({"params": p}, t), params, {}, 5e-4),
        Method("LoRA, float32 base", float_lora(model, m.spec), lora, params, 3e-3),
        Method("QLoRA, NF4 base", lambda a, p, t: m.apply({"params": p, "lora": a}, t), lora, packed, 3e-3),
    ]


def trainer(method: Method) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """`step((trained, optimizer state), frozen, tokens) -> (state, loss)`; the state is donated."""
    optimizer = optax.adam(method.rate)

    def step(state: Any, frozen: Any, tokens: jax.Array) -> Any:
        trained, moments = state

        def loss(trained: Any) -> jax.Array:
            return lm.bits_per_byte(method.apply(trained, frozen, tokens), tokens)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, moments = optimizer.update(gradient, moments, trained)
        return (optax.apply_updates(trained, updates), moments), value

    return jax.jit(step, donate_argnums=0), optimizer


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory(method: Method, tokens: Any) -> dict[str, int]:
    """Bytes that the compiled step needs."""
    step, optimizer = trainer(method)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (method.trained, method.frozen, tokens))
    trained, frozen, tokens = shapes
    state = (trained, jax.eval_shape(optimizer.init, trained))
    found = step.lower(state, frozen, tokens).compile().memory_analysis()
    arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "trained": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "weights": nbytes(frozen) if frozen else nbytes(trained),
        "arguments": arguments,
        "temporary": temporary,
        "peak": arguments + temporary + fresh,
    }


def documentation() -> tuple[lm.Bytes, lm.Bytes]:
    """The text of Python's reference documentation that `pydoc` shows: training bytes, and the last tenth held out."""
    text = np.frombuffer("\n\n".join(topics[name] for name in sorted(topics)).encode(), dtype=np.uint8)
    cut = text.size * 9 // 10
    return text[:cut], text[cut:]


def losses(ways: list[Method], steps: int, windows: int) -> dict[str, dict[str, float]]:
    """Held-out bits per byte before and after `steps` steps on 8 x 128 tokens, and median seconds per step.

    The methods take their steps in turns, so that all of them see the same text and the same other load.
    """
    train, held_out = documentation()
    parts = [t for _, t in zip(range(windows), lm.eval_batches(held_out, 16, 128), strict=False)]
    found, states, step_of, score_of = {}, {}, {}, {}
    for way in ways:
        step_of[way.name], optimizer = trainer(way)
        evaluate = jax.jit(lambda trained, frozen, t, way=way: lm.bits_per_byte(way.apply(trained, frozen, t), t))
        score_of[way.name] = lambda trained, way=way, evaluate=evaluate: float(
            np.mean([evaluate(trained, way.frozen, t) for t in parts])
        )
        trained = jax.tree.map(jnp.copy, way.trained)  # the state is donated
        states[way.name] = trained, optimizer.init(trained)
        found[way.name] = {"before": score_of[way.name](trained)}
    text = lm.batches(train, np.random.default_rng(0), 8, 128)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _, tokens in zip(range(steps), text, strict=False):
        for way in ways:
            start = time.perf_counter()
            states[way.name], loss = step_of[way.name](states[way.name], way.frozen, tokens)
            loss.block_until_ready()
            seconds[way.name].append(time.perf_counter() - start)
    for way in ways:
        found[way.name]["after"] = score_of[way.name](states[way.name][0])
        found[way.name]["seconds"] = float(np.median(seconds[way.name][1:]))
    return found


# --- Output ----------------------------------------------------------------------------------------------------

MEMORY = ("method", "trained values", "weights (MB)", "arguments (MB)", "temporary (MB)", "peak (MB)", "of full")
LOSS = ("method", "Adam rate", "bits/byte before", "after", "s/step")


def memory_rows(found: dict[str, dict[str, int]]) -> list[tuple[str, ...]]:
    full = next(iter(found.values()))["peak"]
    return [
        (
            name,
            f"{row['trained']:,}",
            *(f"{row[part] / 1e6:,.1f}" for part in ("weights", "arguments", "temporary", "peak")),
            f"{row['peak'] / full:.2f}",
        )
        for name, row in found.items()
    ]


def show(console: Console, title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table, "")


def markdown(tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]], steps: int) -> str:
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "jaxlib", "flax", "optax"))
    lines = [
        "<!-- Written by scripts/bench/bench_lora.py; run it again instead of editing. -->",
        "# Adapters on packed weights: memory and loss of fine-tuning",
        "",
        f"On a {os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU, Python {platform.python_version()}, "
        f"{versions}, {datetime.date.today().isoformat()}. Adapters: rank {RANK}, alpha {ALPHA:g}, on the attention "
        "and feed-forward matrices of all layers. NF4 base: groups of 64, double quantization; embedding, norms and "
        "head stay float32 and frozen.",
        "",
        "Memory is what XLA's CPU compiler plans for one compiled step (`memory_analysis`): peak = arguments + "
        "temporary + outputs that are not donated arguments. No remat. Weights are the frozen ones, or in full "
        "fine-tuning the trained ones; arguments: weights, adapters and Adam's moments. Loss: held-out bits per byte "
        f"of Python's reference documentation (`pydoc_data.topics`) before and after {steps} steps of Adam on 8 x 128 "
        "bytes, from the weights of `scripts/bench/lm.py`, which were trained on source code. One seed; one rate each, "
        "not searched. Seconds are medians of steps taken in turns, on a machine that ran other work.",
    ]
    for title, (header, rows) in tables.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, the small model only; print only")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (%(default)s)")
    options = parser.parse_args()
    steps, windows = (3, 2) if options.quick else (options.steps, 12)
    console = Console()
    tables: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {}

    def report(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        tables[title] = header, rows
        show(console, title, header, rows)

    model, params = lm.LM(), lm.load_weights()
    batch = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    small = methods(model, params, jnp.zeros((8, 128), jnp.int32))
    report(
        "Memory: the demonstration model (5 M), 8 x 128 tokens",
        MEMORY,
        memory_rows({method.name: memory(method, batch) for method in small}),
    )
    rates = {method.name: method.rate for method in small}
    rows = [
        (name, f"{rates[name]:g}", f"{got['before']:.4f}", f"{got['after']:.4f}", f"{got['seconds']:.2f}")
        for name, got in losses(small, steps, windows).items()
    ]
    report(f"Loss: the demonstration model, {steps} steps", LOSS, rows)

    if not options.quick:
        large, batch = lm.LM(LARGE), jax.ShapeDtypeStruct((1, 512), jnp.int32)
        shapes = jax.eval_shape(large.init, jax.random.key(0), batch)["params"]
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        report(
            f"Memory: d_model {LARGE.d_model}, {LARGE.num_layers} layers ({count / 1e6:,.0f} M), 1 x 512 tokens",
            MEMORY,
            memory_rows({method.name: memory(method, batch) for method in methods(large, shapes, batch)}),
        )
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(markdown(tables, steps))
        console.print(f"Wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
