"""Quantized weights and activations in training: qjax beside qwix 0.1.8, same weights, same text, same loop.

What this script gives: `benchmarks/activations.md`. For w8a8 and w4a8 (groups of 64): post-training and after a short
quantization-aware fine-tune, each tool's KL to the float model and bits per byte on held-out text; how far the model
that was trained lies from the model that is served; and the time of a training step relative to a float one.

    pip install -e '.[bench]'
    python scripts/bench/bench_qat.py

Both tools quantize every matmul, those of attention scores and values included, as the peer does by default.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm
import numpy as np
import optax
import qwix
from rich.console import Console
from rich.table import Table

import qjax
from qjax.report.compare import compare

TARGET = Path(__file__).resolve().parents[2] / "benchmarks" / "activations.md"
FLOAT_EMBEDDING = qjax.Rule("embed/**", None)  # the peer leaves the embedding float
BATCH, LENGTH, SEED = 8, 128, 0
LEARNING_RATE = {"w8a8": 2e-5, "w4a8": 1e-4}

Apply = Callable[[Any, Any], Any]  # (variables, tokens) -> logits


@dataclasses.dataclass(frozen=True)
class Tool:
    """One tool on one recipe.

    Attributes:
        name: of the tool.
        train: the model that is trained, a function of float params and tokens.
        convert: float params to what `serve` takes.
        serve: the model that is served.
    """

    name: str
    train: Apply
    convert: Callable[[Any], Any]
    serve: Apply


def ours(recipe: str, model: lm.LM, example: Any, scale: Any = None) -> Tool:
    """The recipe of that name; `scale` is the scale rule of the weights, by default the recipe's."""
    (rule,) = qjax.RECIPES[recipe]
    assert rule.weights is not None
    weights = rule.weights if scale is None else dataclasses.replace(rule.weights, scale_rule=scale)
    attention = qjax.Rule("matmul:*", activations=qjax.dynamic())
    q = qjax.quantize(model, [attention, FLOAT_EMBEDDING, dataclasses.replace(rule, weights=weights)])
    return Tool(
        "qjax",
        lambda params, tokens: q.apply({"params": params}, tokens),
        lambda params: q.convert({"params": params}, example),
        q.apply,
    )


def peer(recipe: str, model: lm.LM, example: Any) -> Tool:
    options = {"weight_qtype": jnp.int8} if recipe == "w8a8" else {"weight_qtype": jnp.int4, "tile_size": 64}
    trained = qwix.quantize_model(model, qwix.QtProvider([qwix.QtRule(act_qtype=jnp.int8, **options)]))
    served = qwix.quantize_model(model, qwix.PtqProvider([qwix.QuantizationRule(act_qtype=jnp.int8, **options)]))
    abstract = jax.eval_shape(served.init, jax.random.key(0), jnp.zeros(example.shape, example.dtype))["params"]
    return Tool(
        "qwix",
        lambda params, tokens: trained.apply({"params": params}, tokens),
        lambda params: {"params": qwix.quantize_params(params, abstract)},
        served.apply,
    )


def make_step(model: lm.LM, variables: Any, apply: Apply, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A training step whose loss is KL(float || model): the model learns to be quantized, nothing else."""

    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        logits: Any = model.apply(variables, tokens)
        target = jax.nn.log_softmax(logits)

        def loss(params: Any) -> jax.Array:
            predicted = jax.nn.log_softmax(apply(params, tokens))
            return optax.losses.kl_divergence_with_log_targets(predicted, target).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    return step


def fine_tune(step: Callable[..., Any], tx: Any, params: Any, text: lm.Bytes, steps: int) -> Any:
    state = tx.init(params)
    batches = lm.batches(text, np.random.default_rng(SEED), batch=BATCH, length=LENGTH)
    for _ in range(steps):
        params, state, _ = step(params, state, jnp.asarray(next(batches)))
    return params


def mismatch(tool: Tool, params: Any, packed: Any, tokens: Any) -> float:
    """Largest difference of a logit between the trained and the served model, in one compiled program."""
    both = jax.jit(lambda params, packed, tokens: (tool.train(params, tokens), tool.serve(packed, tokens)))
    trained, served = both(params, packed, tokens)
    return float(jnp.max(jnp.abs(trained - served)))


def step_times(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of the time of each step over that of the float step of the same round; steps take turns."""
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        times = {}
        for name, run in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name] = time.perf_counter() - start
        for name, seconds in times.items():
            ratios[name].append(seconds / times["float"])
    return {name: statistics.median(values) for name, values in ratios.items()}


HEADER = ("recipe", "tool", "training", "KL (nats)", "top-1", "bits/byte", "trained - served", "step / float step")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=120, help="of fine-tuning (%(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="of 8 windows of 256 held-out bytes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of timing (%(default)s)")
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write (%(default)s)")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)

    model = lm.LM(scan_layers=False)
    variables = {"params": lm.unstack_params(lm.load_weights())}
    text, held_out = lm.load_corpus()
    every = list(lm.eval_batches(held_out, 8, 256))
    batches = [every[i * len(every) // arguments.batches] for i in range(arguments.batches)]
    example = batches[0]
    tokens = jnp.asarray(next(lm.batches(text, np.random.default_rng(1), batch=BATCH, length=LENGTH)))

    rows: list[tuple[str, ...]] = []
    notes: list[str] = []

    def measure(recipe: str, tool: Tool, training: str, params: Any, step: str) -> float:
        packed = tool.convert(params)
        c = compare(model, variables, _Served(tool.serve), packed, batches, score=lm.bits_per_byte)
        apart = mismatch(tool, params, packed, example) if training == "QAT" else None
        difference = "" if apart is None else f"{apart:.2g}"
        assert c.kl is not None
        score = f"{c.quantized_score:.4f}"
        rows.append((recipe, tool.name, training, f"{c.kl:.3g}", f"{c.top1:.2%}", score, difference, step))
        console.print(*rows[-1], sep="  ")
        notes_score.append(c.float_score)
        return c.kl

    notes_score: list[Any] = []
    for recipe in ("w8a8", "w4a8"):
        tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE[recipe], 4, arguments.steps))
        tools = [ours(recipe, model, example, qjax.QuickSearch()), peer(recipe, model, example)]
        apply_float = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
        steps = {"float": make_step(model, variables, apply_float, tx)}
        steps |= {tool.name: make_step(model, variables, tool.train, tx) for tool in tools}
        state = tx.init(variables["params"])
        runs = {n: functools.partial(step, variables["params"], state, tokens) for n, step in steps.items()}
        ratios = step_times(runs, arguments.rounds)
        before: dict[str, float] = {}
        for tool in (ours(recipe, model, example), tools[1]):
            before[tool.name] = measure(recipe, tool, "post-training", variables["params"], "")
        for tool in tools:
            params = fine_tune(steps[tool.name], tx, variables["params"], text, arguments.steps)
            after = measure(recipe, tool, "QAT", params, f"{ratios[tool.name]:.2f}")
            recovered = 1 - after / before[tool.name]
            notes.append(f"{recipe}, {tool.name}: QAT recovers {recovered:.0%} of its post-training KL.")

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("qwix", "jax", "flax"))
    notes += [
        f"{datetime.date.today().isoformat()}, {os.cpu_count()}-core {platform.machine()} CPU, Python "
        f"{platform.python_version()}, {versions}. Generated by scripts/bench/bench_qat.py.",
        f"Model: the language model of the quickstart, unrolled; {arguments.batches * 8 * 256:,} bytes of held-out "
        f"text, {notes_score[0]:.4f} bits per byte in float32. KL is KL(float || quantized), the mean per position.",
        f"QAT: {arguments.steps} steps of Adam on KL to the float model, {BATCH} x {LENGTH} bytes a step, the same "
        "loop, data and learning rate for both tools.",
        "Both tools quantize the same kernels and both matmuls of attention; the embedding stays float. qjax quantizes "
        "inputs per token with a zero point (its recipes' default), qwix per token and symmetric (its default).",
        "'trained - served' is the largest difference of a logit between the model in training and the converted one, "
        f"both in one compiled program, on {example.size:,} bytes.",
        f"'step / float step' is the median ratio over {arguments.rounds} rounds in which the steps take turns.",
    ]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i < 3 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False)
    head = ["| " + " | ".join(HEADER) + " |", "|" + "|".join(["---"] * 3 + ["---:"] * (len(HEADER) - 3)) + "|"]
    body = ["| " + " | ".join(row) + " |" for row in rows]
    title = "# Quantized activations: post-training and in training"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join([title, "", *head, *body, "", *(f"- {note}" for note in notes)]) + "\n")
    console.print(f"Written to {arguments.out}")


@dataclasses.dataclass(frozen=True)
class _Served:
    """A function as `compare` takes it."""

    fn: Apply

    def __call__(self, variables: Any, tokens: Any) -> jax.Array:
        return self.fn(variables, tokens)


if __name__ == "__main__":
    main()
