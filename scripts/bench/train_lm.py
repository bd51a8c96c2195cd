"""Train the demonstration language model of `lm.py` on the source text of Python's standard library.

What this script gives: `weights.npz` (saved anew at every evaluation, so that a run cut short leaves a usable
model) and `training_log.csv` (step, train and held-out bits per byte, seconds) in the folder `--out`. Its
defaults are the settings that made the committed weights:

    python scripts/bench/train_lm.py
"""

import argparse
import csv
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lm
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVAL_BATCH = 16
# The log's held-out figure comes from every tenth batch of the held-out text; the last one from all of it.
EVAL_STRIDE = 10


class TrainState(NamedTuple):
    """What one training step reads and replaces."""

    params: lm.Params
    optimizer: optax.OptState


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=lm.WEIGHTS.parent, help="folder to write to (%(default)s)")
    parser.add_argument("--steps", type=int, default=2700, help="optimizer steps (%(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=33.0,
        help="end, with the learning rate annealed, after this time even if steps remain (%(default)s)",
    )
    parser.add_argument("--batch", type=int, default=8, help="windows per step (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="bytes per window (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices (%(default)s)")
    parser.add_argument("--warmup", type=int, default=100, help="steps to the peak learning rate (%(default)s)")
    parser.add_argument("--eval-every", type=int, default=250, help="steps between evaluations (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def learning_rate(peak: float, step: int, warmup: int, progress: float) -> float:
    """Return the rate of a linear warmup over `warmup` steps and a cosine over `progress` from 0 to 1."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, step / warmup) * cosine


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """Return AdamW with gradient clipping, up to the learning rate.

    The step multiplies by the rate itself: when `--minutes` binds the rate depends on the clock, which no
    optax schedule sees.
    """

    def is_matrix(params: lm.Params) -> lm.Params:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
    )


def flat_matmul(next_call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """Compute the dense layers, as a Flax method interceptor, by matrix products of two dimensions.

    The values are the same. XLA's CPU backend runs the gradients of products with batch or head dimensions
    far slower: the step takes a quarter less time this way.
    """
    module = context.module
    if not isinstance(module, nn.Dense | nn.DenseGeneral):
        return next_call(*args, **kwargs)
    (x,) = args
    kernel = module.get_variable("params", "kernel")
    contracted = len(module.axis) if isinstance(getattr(module, "axis", None), tuple) else 1
    leading, features = x.shape[:-contracted], kernel.shape[contracted:]
    product = x.reshape(math.prod(leading), -1) @ kernel.reshape(-1, math.prod(features))
    return product.reshape(*leading, *features)


def logits_of(model: lm.LM, params: lm.Params, tokens: jax.Array) -> jax.Array:
    with nn.intercept_methods(flat_matmul):
        return model.apply({"params": params}, tokens)


def stack_params(params: lm.Params, num_layers: int) -> lm.Params:
    """Turn the parameters of `LM(scan_layers=False)` into those of `LM()`: `lm.unstack_params` undone."""
    stacked = {name: value for name, value in params.items() if not name.startswith("layer_")}
    layers = [params[f"layer_{i}"] for i in range(num_layers)]
    return stacked | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def make_train_step(
    model: lm.LM, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, lm.Tokens, float], tuple[TrainState, jax.Array]]:
    """Return the compiled step: (state, tokens, rate) to (new state, bits per byte before the step)."""

    def loss(params: lm.Params, tokens: jax.Array) -> jax.Array:
        return lm.bits_per_byte(logits_of(model, params, tokens), tokens)

    def step(state: TrainState, tokens: jax.Array, rate: float) -> tuple[TrainState, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(state.params, tokens)
        direction, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda leaf, d: leaf - rate * d, state.params, direction)
        return TrainState(params, moments), value

    return jax.jit(step, donate_argnums=0)


def make_scorer(model: lm.LM, held_out: lm.Bytes, length: int) -> Callable[[lm.Params, int], float]:
    """Return (params, stride) to the bits per byte of every `stride`-th batch of the held-out text."""

    @jax.jit
    def score(params: lm.Params, tokens: jax.Array) -> jax.Array:
        return lm.bits_per_byte(logits_of(model, params, tokens), tokens)

    def mean_score(params: lm.Params, stride: int) -> float:
        chosen = itertools.islice(lm.eval_batches(held_out, EVAL_BATCH, length), 0, None, stride)
        return float(np.mean([score(params, tokens) for tokens in chosen]))

    return mean_score


def train(arguments: argparse.Namespace, console: Console) -> lm.Params:
    """Train from scratch, writing the weights and the log as it goes; return the final parameters."""
    # The layers as separate submodules: the scan costs XLA's CPU backend a seventh of the speed.
    config = lm.LMConfig()
    model = lm.LM(config, scan_layers=False)
    train_bytes, held_out = lm.load_corpus()
    console.print(f"{train_bytes.size:,} training bytes, {held_out.size:,} held out")

    variables = model.init(jax.random.key(arguments.seed), jnp.zeros((1, 1), jnp.int32))
    console.print(f"{sum(leaf.size for leaf in jax.tree.leaves(variables)):,} parameters")
    optimizer = make_optimizer(arguments.weight_decay)
    state = TrainState(variables["params"], optimizer.init(variables["params"]))
    train_step = make_train_step(model, optimizer)
    scorer = make_scorer(model, held_out, arguments.length)
    data = lm.batches(train_bytes, np.random.default_rng(arguments.seed), arguments.batch, arguments.length)

    arguments.out.mkdir(parents=True, exist_ok=True)
    score_column = TextColumn("{task.fields[score]}")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), score_column, TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    with open(arguments.out / "training_log.csv", "w", newline="") as log, bar:
        rows = csv.writer(log, lineterminator="\n")
        rows.writerow(("step", "train_bpb", "held_out_bpb", "seconds"))
        task = bar.add_task("training", total=arguments.steps, score="")
        recent: list[float] = []
        progress = 0.0  # of the steps or of the time, whichever is further on
        start = time.monotonic()
        for step in range(1, arguments.steps + 1):
            rate = learning_rate(arguments.learning_rate, step, arguments.warmup, progress)
            state, value = train_step(state, next(data), rate)
            recent.append(float(value))
            minutes = (time.monotonic() - start) / 60
            progress = max(step / arguments.steps, minutes / arguments.minutes)
            bar.update(task, advance=1, score=f"{recent[-1]:.3f} bits per byte")

            last = progress >= 1
            if last or step % arguments.eval_every == 0:
                lm.save_weights(arguments.out / "weights.npz", stack_params(state.params, config.num_layers))
                score = scorer(state.params, 1 if last else EVAL_STRIDE)
                train_score, seconds = float(np.mean(recent)), time.monotonic() - start
                rows.writerow((step, f"{train_score:.4f}", f"{score:.4f}", f"{seconds:.0f}"))
                log.flush()
                console.print(f"step {step}: {train_score:.4f} train, {score:.4f} held out, {seconds:.0f} s")
                recent.clear()
            if last:
                break
    return stack_params(state.params, config.num_layers)


def main() -> None:
    console = Console()
    params = train(parse_arguments(), console)
    sample = lm.generate(lm.LM().apply, {"params": params}, b"def ", 400)
    console.print("def " + sample.decode(errors="replace"), markup=False, highlight=False)


if __name__ == "__main__":
    main()
