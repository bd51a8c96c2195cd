"""qjax from end to end on a small language model: plan, convert, compare, fine-tune, save, serve.

What this script gives, in the folder `--out`:

* `table.txt`, `table.json`: for every format the bits per weight, bytes, bits per byte on held-out text and its gap
  to the float model, top-1 agreement and KL to the float model, after post-training quantization and after a short
  quantization-aware fine-tune (QAT);
* `quality.png`: the same as a plot;
* `int4/`: the int4 model as an Orbax checkpoint, which a fresh process restores, checks and samples from.

    scripts/quickstart

Same machine, same versions: same numbers; every random draw has a seed.
"""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import lm
import numpy as np
import optax
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import qjax
from qjax.report.compare import Comparison, compare

SEED = 0
EXAMPLE = jax.ShapeDtypeStruct((1, 8), jnp.int32)  # of the model's input; only its shape and dtype matter
PROMPT = b"def main(argv: list[str]) -> int:\n"
WINDOW = 256  # bytes that the model sees; what it was trained on


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is computed.

    Attributes:
        post_training, qat: the formats; those of `qat` are among both `post_training` and `QAT`.
        eval_batches, batch: held-out text is `eval_batches` batches of `batch` windows.
        qat_steps: optimizer steps of each fine-tune.
        sampled: bytes that the restored model writes.
    """

    post_training: tuple[str, ...]
    qat: tuple[str, ...]
    eval_batches: int
    batch: int
    qat_steps: int
    sampled: int


FULL = Effort(("int8", "int4", "nf4", "int3", "int2"), ("int3", "int2"), 8, 8, 40, 200)
QUICK = Effort(("int4", "int2"), ("int2",), 1, 2, 2, 8)


@dataclasses.dataclass(frozen=True)
class Qat:
    """A fine-tune: the recipe that is trained and then served, and the peak learning rate of Adam."""

    recipe: qjax.QuantSpec
    learning_rate: float


# `QuickSearch` costs a training step next to nothing, where `MseSearch`, the default, is some twenty passes over the
# weights. `convert` follows the recipe that was trained, so what is served is what was trained.
QAT = {
    "int3": Qat(qjax.int3(scale=qjax.QuickSearch()), 2e-4),
    "int2": Qat(qjax.int2(scale=qjax.QuickSearch()), 4e-4),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a format, how it came about, and its measures against the float model."""

    name: str
    training: Literal["post-training", "QAT"]
    measured: Comparison

    @property
    def gap(self) -> float:
        """Bits per byte above the float model."""
        assert self.measured.float_score is not None
        assert self.measured.quantized_score is not None
        return self.measured.quantized_score - self.measured.float_score

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "name": self.name,
            "training": self.training,
            "bits_per_weight": self.measured.bits_per_weight,
            "bytes": self.measured.quantized_bytes,
            "bits_per_byte": self.measured.quantized_score,
            "bits_per_byte_gap": self.gap,
            "top1": self.measured.top1,
            "kl": self.measured.kl,
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder to write to (%(default)s)")
    parser.add_argument("--retrain", action="store_true", help="train the float model first, half an hour on 2 cores")
    parser.add_argument("--quick", action="store_true", help="few formats, batches and steps: tries the script")
    parser.add_argument("--serve", type=Path, metavar="PATH", help="only restore this checkpoint, check and sample")
    parser.add_argument("--sampled", type=int, default=FULL.sampled, help="bytes that --serve samples (%(default)s)")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Steps:
    """Headings and progress bars on a console."""

    console: Console

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A heading before the work and, after it, the seconds that it took."""
        self.console.rule(f"[bold]{title}", align="left")
        start = time.monotonic()
        yield
        self.console.print(f"[dim]{time.monotonic() - start:.0f} s[/dim]\n")

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """A bar; calling what it gives moves it one on and shows a note."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console) as progress:
            task = progress.add_task(what, total=total, note="")
            yield lambda note: progress.update(task, advance=1, note=note)


# --- Measuring -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judge:
    """The float model and the held-out text against which every quantized model is measured."""

    model: lm.LM
    variables: Any
    batches: list[lm.Tokens]

    def float_score(self) -> float:
        """Bits per byte of the float model."""
        score = jax.jit(lambda variables, tokens: lm.bits_per_byte(self.model.apply(variables, tokens), tokens))
        return float(np.mean([score(self.variables, tokens) for tokens in self.batches], dtype=np.float64))

    def row(self, name: str, training: Literal["post-training", "QAT"], q: qjax.QuantizedLinen, packed: Any) -> Row:
        """Measures a quantized model."""
        measured = compare(self.model, self.variables, q, packed, self.batches, score=lm.bits_per_byte)
        return Row(name, training, measured)


def held_out_batches(held_out: lm.Bytes, effort: Effort) -> list[lm.Tokens]:
    """Batches spread evenly over the held-out text."""
    batches = list(lm.eval_batches(held_out, effort.batch, WINDOW))
    return [batches[i * len(batches) // effort.eval_batches] for i in range(effort.eval_batches)]


# --- Fine-tuning ---------------------------------------------------------------------------------------------


def fine_tune(
    judge: Judge, qat: Qat, text: lm.Bytes, steps: int, advance: Callable[[str], None]
) -> tuple[qjax.QuantizedLinen, Any]:
    """A plain Flax training loop around `q.apply`, from the float weights.

    The loss is KL(float || quantized) on the training text. The float model's whole distribution says more per byte
    than the text does, and the model learns to be quantized, nothing else.

    Returns the wrapped model and its trained float parameters.
    """
    q = qjax.quantize(judge.model, qat.recipe)
    schedule = optax.warmup_cosine_decay_schedule(0.0, qat.learning_rate, max(1, steps // 10), steps)
    state = TrainState.create(apply_fn=q.apply, params=judge.variables["params"], tx=optax.adam(schedule))

    @jax.jit
    def train_step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        target = jax.nn.log_softmax(judge.model.apply(judge.variables, tokens))

        def loss(params: Any) -> jax.Array:
            predicted = jax.nn.log_softmax(state.apply_fn({"params": params}, tokens))
            return optax.losses.kl_divergence_with_log_targets(predicted, target).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    batches = lm.batches(text, np.random.default_rng(SEED), batch=8, length=WINDOW // 2)
    for _ in range(steps):
        state, value = train_step(state, next(batches))
        advance(f"KL {float(value):.4f} nats")
    return q, state.params


# --- Saving and serving ----------------------------------------------------------------------------------------


def digest(q: qjax.QuantizedLinen, packed: Any) -> str:
    """SHA-256 of the logits of the prompt: equal only if every bit of them is."""
    tokens = jnp.asarray(np.frombuffer(PROMPT, np.uint8).astype(np.int32))[None]
    return hashlib.sha256(np.asarray(jax.jit(q.apply)(packed, tokens)).tobytes()).hexdigest()


def digest_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".digest")


def serve(checkpoint: Path, sampled: int, console: Console) -> None:
    """Restores a checkpoint, checks that its logits are those of the process that saved it, and samples."""
    q, packed = qjax.restore(checkpoint, lm.LM())
    expected = digest_file(checkpoint).read_text().strip()
    if (found := digest(q, packed)) != expected:
        sys.exit(f"{checkpoint}: the logits have SHA-256 {found}, but {expected} when the model was saved")
    restored = f"Restored {checkpoint}: the logits equal the saved model's bit for bit. It continues:"
    console.print(restored, soft_wrap=True)  # however long the path is
    text = PROMPT + lm.generate(q.apply, packed, PROMPT, sampled, rng=jax.random.key(SEED))
    console.print(text.decode(errors="replace"), markup=False, highlight=False, style="cyan")


# --- What comes out ------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> Table:
    out = Table(title="Held-out text", box=None, title_justify="left", header_style="bold", pad_edge=False)
    out.add_column("weights", no_wrap=True)
    out.add_column("training", no_wrap=True)
    for name in ("bits/w", "MB", "bits/byte", "gap", "top-1", "KL (nats)"):
        out.add_column(name, justify="right", no_wrap=True)
    first = rows[0].measured
    out.add_row("float32", "", "32.00", f"{first.float_bytes / 1e6:.2f}", f"{first.float_score:.4f}", "", "", "")
    for row in rows:
        m = row.measured
        sizes = f"{m.bits_per_weight:.2f}", f"{m.quantized_bytes / 1e6:.2f}"
        quality = f"{m.quantized_score:.4f}", f"{row.gap:+.4f}", f"{m.top1:.2%}", f"{m.kl:.5f}"
        out.add_row(row.name, row.training, *sizes, *quality)
    return out


def recoveries(rows: list[Row]) -> dict[str, float]:
    """For each QAT row, the part of the post-training gap in bits per byte that is gone."""
    before = {row.name: row.gap for row in rows if row.training == "post-training"}
    after = {row.name: row.gap for row in rows if row.training == "QAT"}
    return {name: 1 - gap / before[name] for name, gap in after.items()}


def plot(rows: list[Row], path: Path) -> None:
    """Gap and KL over bits per weight; an arrow leads from each post-training point to the QAT one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def bits(row: Row) -> float:
        return row.measured.bits_per_weight

    blue, orange = "#1f5fa8", "#d9660a"
    panels = {
        "bits per byte above float32": lambda row: row.gap,
        "KL(float || quantized), nats per byte": lambda row: row.measured.kl,
    }
    before = [row for row in rows if row.training == "post-training"]
    after = [row for row in rows if row.training == "QAT"]
    # NF4 has the bits of int4: a point beside the line of integers, not a corner in it.
    integers = sorted((row for row in before if row.name.startswith("int")), key=bits)
    others = [row for row in before if row not in integers]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (label, value) in zip(axes, panels.items(), strict=True):
        axis.plot([bits(r) for r in integers], [value(r) for r in integers], "o-", color=blue, label="post-training")
        axis.plot([bits(r) for r in others], [value(r) for r in others], "D", color=blue, fillstyle="none")
        axis.plot([bits(r) for r in after], [value(r) for r in after], "o", color=orange, label="after QAT")
        for row in after:
            start = next(r for r in before if r.name == row.name)
            arrow = {"arrowstyle": "->", "color": orange, "shrinkA": 4, "shrinkB": 4}
            axis.annotate("", (bits(row), value(row)), (bits(start), value(start)), arrowprops=arrow)
        for row in before:
            offset, side = ((-7, -15), "right") if row in others else ((7, 5), "left")
            at = (bits(row), value(row))
            axis.annotate(row.name, at, offset, textcoords="offset points", fontsize=9, ha=side, color=blue)
        axis.set(xlabel="bits per weight, scales included", ylabel=label)
        axis.margins(y=0.1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(0, color="black", lw=0.8)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(rows: list[Row], out: Path, console: Console) -> None:
    console.print(table(rows))
    console.print()
    for name, part in recoveries(rows).items():
        console.print(f"{name}: QAT recovers {part:.0%} of the post-training gap in bits per byte")
    with open(out / "table.txt", "w") as file:
        Console(file=file, width=100).print(table(rows))
    data = {
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "numpy": np.__version__},
        "float": {"bytes": rows[0].measured.float_bytes, "bits_per_byte": rows[0].measured.float_score},
        "rows": [row.to_json() for row in rows],
        "recovered": recoveries(rows),
    }
    (out / "table.json").write_text(json.dumps(data, indent=1) + "\n")
    plot(rows, out / "quality.png")
    console.print(f"\nWritten to {out}: table.txt, table.json, quality.png, int4/")


def main() -> None:
    arguments = parse_arguments()
    # A file or pipe has no width: the tables are wider than rich's guess of 80.
    console = Console(width=None if sys.stdout.isatty() else 120)
    if arguments.serve:
        serve(arguments.serve, arguments.sampled, console)
        return
    effort, out = QUICK if arguments.quick else FULL, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    steps = Steps(console)

    weights = lm.WEIGHTS
    if arguments.retrain:
        with steps.step("Train the float model"):
            weights = out / "lm_weights" / "weights.npz"
            script = Path(__file__).with_name("train_lm.py")
            subprocess.run([sys.executable, script, "--out", weights.parent], check=True)

    with steps.step("Load the float model and measure it"):
        model, variables = lm.LM(), {"params": lm.load_weights(weights)}
        text, held_out = lm.load_corpus()
        judge = Judge(model, variables, held_out_batches(held_out, effort))
        count = sum(leaf.size for leaf in jax.tree.leaves(variables))
        console.print(f"{count:,} weights, {judge.float_score():.4f} bits per byte on held-out text")

    with steps.step("What int4 would do: q.plan"):
        console.print(qjax.quantize(model, "int4").plan(variables, EXAMPLE))

    rows: list[Row] = []
    int4 = None
    formats = effort.post_training
    with steps.step("Post-training quantization: q.convert"), steps.bar("converting", len(formats)) as advance:
        for name in formats:
            q = qjax.quantize(model, name)
            packed = q.convert(variables, EXAMPLE)
            rows.append(judge.row(name, "post-training", q, packed))
            if name == "int4":
                int4 = q, packed
            advance(name)

    for name in effort.qat:
        with steps.step(f"Quantization-aware fine-tune, {name}: a plain TrainState loop around q.apply"):
            with steps.bar("training", effort.qat_steps) as advance:
                q, params = fine_tune(judge, QAT[name], text, effort.qat_steps, advance)
            packed = q.convert({"params": params}, EXAMPLE)
            rows.append(judge.row(name, "QAT", q, packed))
            console.print(rows[-1].measured)

    with steps.step("Save the int4 model, restore it in a fresh process"):
        assert int4 is not None
        q, packed = int4
        checkpoint = out / "int4"
        qjax.save(checkpoint, q, packed, overwrite=True)
        digest_file(checkpoint).write_text(digest(q, packed) + "\n")
        serving = ["--serve", checkpoint, "--sampled", str(effort.sampled)]
        subprocess.run([sys.executable, __file__, *serving], check=True)

    with steps.step("Result"):
        write(rows, out, console)


if __name__ == "__main__":
    main()
