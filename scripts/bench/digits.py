"""Integer weights and activations on a small convolutional network: float, post-training, quantization-aware.

A network of four convolutions with batch normalisation reads scikit-learn's digits (1797 images of 8 x 8 pixels, a
third of them held out). It is trained in float in a plain Flax loop and then quantized in every way that qjax knows
for integer arithmetic, each with batch normalisation folded into the convolutions. Every accuracy is that of the
converted model, with packed weights and integer activations, on the held-out images.

    scripts/digits            # three seeds, about ten minutes on 2 cores; table in out/digits
    scripts/digits --quick    # one seed, little training: tries the script

One held-out image is 0.17 points; so the table shows the mean over seeds (initial weights, order and shifts of the
training images; the split stays), the worst seed, and how many images each row and the float model judge differently.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import qjax

BATCH = 64
CALIBRATION_BATCHES = 8
EXAMPLE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)  # of the model's input; only its shape and dtype matter

Images = NDArray[np.float32]  # [images, 8, 8, 1], 0 to 1
Labels = NDArray[np.int32]
Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Digits:
    """The images, split once and for all: 1198 to train on, 599 held out, each digit in both by its share."""

    train_x: Images
    train_y: Labels
    test_x: Images
    test_y: Labels

    @staticmethod
    def load() -> "Digits":
        """Scikit-learn's digits; the package holds them, nothing is downloaded."""
        bunch: Any = load_digits()
        x = (bunch.images / 16).astype(np.float32)[..., None]
        y = bunch.target.astype(np.int32)
        train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=599, stratify=y, random_state=0)
        return Digits(train_x, train_y, test_x, test_y)

    def batches(self, rng: np.random.Generator, epochs: int) -> Iterator[tuple[Images, Labels]]:
        """Training batches in random order, each image shifted by up to one pixel each way."""
        padded = np.pad(self.train_x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        for _ in range(epochs):
            order = rng.permutation(len(self.train_x))
            for start in range(0, len(order) - BATCH + 1, BATCH):
                chosen = order[start : start + BATCH]
                row, column = rng.integers(3, size=(2, BATCH, 1))
                rows, columns = row + np.arange(8), column + np.arange(8)
                yield padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]], self.train_y[chosen]

    def steps(self, epochs: int) -> int:
        """How many batches that many epochs have."""
        return epochs * (len(self.train_x) // BATCH)

    def calibration(self) -> list[Images]:
        """Unlabelled training images, in batches."""
        return [self.train_x[i * BATCH : (i + 1) * BATCH] for i in range(CALIBRATION_BATCHES)]


class Net(nn.Module):
    """Images [batch, 8, 8, 1] to logits [batch, 10]."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """With `train`, normalises with the statistics of the batch and updates the running ones."""
        for i, features in enumerate((32, 32, 64, 64)):
            x = nn.Conv(features, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x))
            if i == 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


# --- Training: the same loop for the float model and for a quantized one ---------------------------------------

TRAINED = ("params", "quant")  # collections that the optimizer changes; "quant" holds learned step sizes


def train(
    apply: Callable[..., Any], variables: Variables, digits: Digits, *, epochs: int, learning_rate: float, seed: int
) -> Variables:
    """A plain Flax loop: `apply` is that of the float module or of a quantized model.

    Returns the variables after training; all collections that are not trained are updated by the calls themselves.
    """
    trained = {name: tree for name, tree in variables.items() if name in TRAINED}
    rest = {name: tree for name, tree in variables.items() if name not in TRAINED}
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, digits.steps(epochs) // 10), digits.steps(epochs)
    )
    state = TrainState.create(apply_fn=apply, params=trained, tx=optax.adamw(schedule, weight_decay=1e-4))

    @jax.jit
    def step(state: TrainState, rest: Variables, x: jax.Array, y: jax.Array) -> tuple[TrainState, Variables]:
        def loss(trained: Any) -> tuple[jax.Array, Variables]:
            logits, updated = state.apply_fn({**trained, **rest}, x, train=True, mutable=list(rest))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated

        gradients, updated = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients), updated

    for x, y in digits.batches(np.random.default_rng(seed), epochs):
        state, rest = step(state, rest, x, y)
    return {**state.params, **rest}


def predictions(apply: Callable[..., Any], variables: Variables, images: Images) -> Labels:
    """The digit that a model sees in each image."""
    return np.asarray(jax.jit(apply)(variables, images).argmax(-1))


# --- The rows: each makes a converted model out of the trained float one ---------------------------------------

Quantized = tuple[qjax.QuantizedLinen, Variables]


def post_training(recipe: Any, variables: Variables, digits: Digits) -> Quantized:
    """Quantizes the trained model as it is; ranges of activations, where the recipe keeps any, from training images."""
    q = qjax.quantize(Net(), recipe, fold_batch_norm=True)
    variables = q.calibrate(variables, digits.calibration(), progress=False)
    return q, q.convert(variables, EXAMPLE)


def quantization_aware(
    recipe: Any, variables: Variables, digits: Digits, *, epochs: int, learning_rate: float, seed: int
) -> Quantized:
    """Trains on with fake-quant weights and activations, then converts what was trained."""
    q = qjax.quantize(Net(), recipe, fold_batch_norm=True)
    variables = q.calibrate(variables, digits.calibration(), progress=False)  # where the learned steps start
    variables = train(q.apply, variables, digits, epochs=epochs, learning_rate=learning_rate, seed=seed)
    return q, q.convert(variables, EXAMPLE)


def trained(weights: Callable[..., qjax.QuantSpec], activations: Any) -> list[qjax.Rule]:
    """A scale for each output channel, by a rule that costs a training step next to nothing."""
    return [qjax.Rule("**", weights=weights(group=None, scale=qjax.QuickSearch()), activations=activations)]


def calibrated(weights: Callable[..., qjax.QuantSpec], activations: Any) -> list[qjax.Rule]:
    """A scale for each output channel, by the search that is the default after training."""
    return [qjax.Rule("**", weights=weights(group=None), activations=activations)]


# name, training -> (recipe, learning rate of the fine-tune or None)
ROWS: dict[tuple[str, str], tuple[Any, float | None]] = {
    ("w8a8 dynamic", "post-training"): ("w8a8", None),
    ("w8a8 static", "post-training"): (
        calibrated(qjax.int8, qjax.static("int8", observer=qjax.Percentile(99.99), zero_point=True)),
        None,
    ),
    ("w8a8 learned", "QAT"): (trained(qjax.int8, qjax.lsq("int8")), 3e-4),
    ("w4a4 static", "post-training"): (calibrated(qjax.int4, qjax.static("int4")), None),
    ("w4a4 learned", "QAT"): (trained(qjax.int4, qjax.lsq("int4")), 1e-3),
    ("w2a2 static", "post-training"): (calibrated(qjax.int2, qjax.static("int2")), None),
    ("w2a2 learned", "QAT"): (trained(qjax.int2, qjax.lsq("int2")), 3e-3),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row for one seed: accuracy, images judged differently from the float model, bytes of the parameters."""

    accuracy: float
    changed: int
    bytes: int


def size(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def measure(digits: Digits, seed: int, epochs: int, qat_epochs: int, say: Callable[..., None]) -> dict[Any, Measured]:
    """All rows for one seed, from the same float model."""
    rows: dict[Any, Measured] = {}

    def add(key: tuple[str, str], apply: Callable[..., Any], variables: Variables, expected: Labels | None) -> Labels:
        found = predictions(apply, variables, digits.test_x)
        changed = 0 if expected is None else int((found != expected).sum())
        accuracy = float((found == digits.test_y).mean())
        rows[key] = Measured(accuracy, changed, size(variables["params"]))
        say(f"seed {seed}  {' '.join(key):28}{accuracy:.2%}")
        return found

    net = Net()
    variables = net.init(jax.random.key(seed), jnp.zeros(EXAMPLE.shape))
    variables = train(net.apply, variables, digits, epochs=epochs, learning_rate=3e-3, seed=seed)
    expected = add(("float32", ""), net.apply, variables, None)
    for key, (recipe, learning_rate) in ROWS.items():
        if learning_rate is None:
            q, packed = post_training(recipe, variables, digits)
        else:
            q, packed = quantization_aware(
                recipe, variables, digits, epochs=qat_epochs, learning_rate=learning_rate, seed=seed + 1000
            )
        add(key, q.apply, packed, expected)
    return rows


# --- What comes out ------------------------------------------------------------------------------------------


def mean(rows: list[Measured], field: str) -> float:
    return float(np.mean([getattr(row, field) for row in rows]))


def table(seeds: list[dict[Any, Measured]]) -> Table:
    title = f"Held-out digits, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    out = Table(title=title, box=None, title_justify="left", header_style="bold", pad_edge=False)
    for name in ("weights, activations", "training"):
        out.add_column(name, no_wrap=True)
    for name in ("kB", "accuracy", "gap (points)", "worst gap", "changed images"):
        out.add_column(name, justify="right", no_wrap=True)
    reference = [rows["float32", ""] for rows in seeds]
    for key in seeds[0]:
        rows = [rows[key] for rows in seeds]
        gaps = [100 * (row.accuracy - base.accuracy) for row, base in zip(rows, reference, strict=True)]
        numbers = (f"{mean(rows, 'bytes') / 1e3:.0f}", f"{mean(rows, 'accuracy'):.2%}")
        compared = (f"{np.mean(gaps):+.2f}", f"{min(gaps):+.2f}", f"{mean(rows, 'changed'):.1f}")
        out.add_row(*key, *numbers, *(compared if key[1] else ("", "", "")))
    return out


def explain(console: Console, count: int) -> None:
    console.print(
        "\nkB: parameters as they are stored. gap: accuracy minus that of the float model of the same seed, in points; "
        f"one of the {count} held-out images is {100 / count:.2f}. changed images: those that the float model takes "
        "for another digit, right or wrong. Every convolution has its batch normalisation folded in. dynamic: a range "
        "for each image, from its own values; static: from calibration on training images; learned: step sizes (LSQ), "
        "trained together with the weights."
    )


def write(seeds: list[dict[Any, Measured]], out: Path) -> None:
    with open(out / "table.txt", "w") as file:
        Console(file=file, width=120).print(table(seeds))
    data = {
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "numpy": np.__version__},
        "seeds": [
            [{"name": name, "training": how, **dataclasses.asdict(row)} for (name, how), row in rows.items()]
            for rows in seeds
        ],
    }
    (out / "table.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder to write to (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="models to train (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed and little training: tries the script")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    epochs, qat_epochs, count = (3, 1, 1) if arguments.quick else (40, 20, arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)

    digits = Digits.load()
    start = time.monotonic()
    say = functools.partial(console.print, highlight=False)
    seeds = [measure(digits, seed, epochs, qat_epochs, say) for seed in range(count)]
    console.print()
    console.print(table(seeds))
    explain(console, len(digits.test_y))
    write(seeds, arguments.out)
    console.print(f"\n[dim]{time.monotonic() - start:.0f} s[/dim]; written to {arguments.out}: table.txt, table.json")


if __name__ == "__main__":
    main()
