"""Quality of post-training quantization: qjax beside qwix 0.1.8, same weights, same text, same layers.

What this script gives: `benchmarks/quality.md`, a table of both tools' KL and top-1 agreement to the float model,
bits per byte on held-out text and bits per weight, with the goals for the ratio of the KLs.

    pip install -e '.[bench]'
    python scripts/bench/bench_quality.py

Both quantize the demonstration model with unrolled layers (the peer cannot take trained weights of scanned ones), each
with its defaults for the format. The embedding, which is only looked up, stays float in both: the peer does not
quantize it. Rows with a goal but no peer are compared with another row of qjax's.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm
import numpy as np
import qwix
from flax.traverse_util import flatten_dict
from quickstart import EXAMPLE
from qwix._src.providers.ptq import WithAux  # what marks a quantized leaf; the package does not export it
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qjax
from qjax.report.compare import Comparison, compare

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "benchmarks" / "quality.md"
FLOAT_EMBEDDING = qjax.Rule("embed/**", None)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to quantize, in both tools or in qjax alone.

    Attributes:
        name: of the row.
        rules: qjax's.
        peer: qwix's rule, or None.
        goal: the ratio of KLs that is aimed at: over the peer, or over the row `against`.
        against: name of an earlier row.
    """

    name: str
    rules: tuple[qjax.Rule, ...]
    peer: qwix.QuantizationRule | None
    goal: float | None
    against: str = ""


def weights(name: str, spec: qjax.QuantSpec, goal: float | None, **peer: Any) -> Case:
    """Quantized weights, float activations."""
    return Case(name, (qjax.Rule("**", spec),), qwix.QuantizationRule(**peer), goal)


(W8A8,), (W4A8,), (FP8,), (STATIC,) = (qjax.RECIPES[name] for name in ("w8a8", "w4a8", "w8a8_fp8", "w8a8_static"))
ATTENTION = qjax.Rule("matmul:*", activations=qjax.dynamic())
ALL_STATIC = dataclasses.replace(STATIC, activations=qjax.static())
CASES = (
    weights("int8 per channel", qjax.int8(), 1.0, weight_qtype=jnp.int8),
    weights("int4 g64", qjax.int4(), 0.9, weight_qtype=jnp.int4, tile_size=64),
    weights("NF4 g64", qjax.nf4(), 0.9, weight_qtype="nf4", tile_size=64),
    weights("int3 g64", qjax.int3(), 0.8, weight_qtype="int3", tile_size=64),
    weights("int2 g64", qjax.int2(), None, weight_qtype="int2", tile_size=64),
    Case(
        "w8a8 dynamic, attention too",
        (ATTENTION, W8A8),
        qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8),
        0.8,
    ),
    Case(
        "w4a8 g64 dynamic, attention too",
        (ATTENTION, W4A8),
        qwix.QuantizationRule(weight_qtype=jnp.int4, act_qtype=jnp.int8, tile_size=64),
        None,
    ),
    Case("w4a8 g64 dynamic", (W4A8,), None, 1.2, "int4 g64"),
    Case("w8a8 dynamic", (W8A8,), None, None),
    Case("w8a8 fp8 dynamic", (FP8,), None, None, "w8a8 dynamic"),
    Case("w8a8 static", (STATIC,), None, 3.0, "w8a8 dynamic"),
    Case("w8a8 static, every input", (ALL_STATIC,), None, None, "w8a8 dynamic"),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One tool on one format.

    Attributes:
        layers: paths of the parameters that it quantized.
        bits: stored bits per quantized weight: codes in the dtype in which the tool keeps them, and scales.
        scale_bits: the scales' part of `bits`.
        comparison: to the float model; its score is the bits per byte on held-out text.
    """

    layers: frozenset[str]
    bits: float
    scale_bits: float
    comparison: Comparison


def dtype_bits(dtype: Any) -> int:
    """Bits of one value: 4 for int4, whatever the host's arrays take for it."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize


def array_bits(tree: Any) -> int:
    """Bits of all arrays of a tree."""
    return sum(leaf.size * dtype_bits(leaf.dtype) for leaf in jax.tree.leaves(tree))


def stored(leaves: dict[str, tuple[int, Any, Any]]) -> tuple[float, float]:
    """Bits per weight with and of scales, from (weights, codes, scales) of each quantized parameter."""
    weights = sum(size for size, _, _ in leaves.values())
    codes, scales = (array_bits([leaf[i] for leaf in leaves.values()]) / weights for i in (1, 2))
    return codes + scales, scales


def run_qjax(case: Case, model: lm.LM, variables: Any, batches: list[lm.Tokens], text: list[lm.Tokens]) -> Result:
    q = qjax.quantize(model, [FLOAT_EMBEDDING, *case.rules])
    packed = q.convert(variables, EXAMPLE, calibration=text)
    flat = flatten_dict(packed["params"], sep="/").items()
    leaves = {path: (w.size, w.words, w.scales) for path, w in flat if isinstance(w, qjax.QTensor)}
    measured = compare(model, variables, q, packed, batches, score=lm.bits_per_byte)
    return Result(frozenset(leaves), *stored(leaves), measured)


def run_peer(case: Case, model: lm.LM, variables: Any, batches: list[lm.Tokens]) -> Result:
    assert case.peer is not None
    quantized = qwix.quantize_model(model, qwix.PtqProvider([case.peer]))
    # Not EXAMPLE: its attention is shorter than a tile, which the peer refuses.
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), jnp.zeros(batches[0].shape, batches[0].dtype))
    params = qwix.quantize_params(variables["params"], abstract["params"])
    flat = {"/".join(path): w.array for path, w in flatten_dict(params).items() if isinstance(w, WithAux)}
    leaves = {path: (w.qvalue.size, w.qvalue, (w.scale, w.zero_point)) for path, w in flat.items()}
    measured = compare(model, variables, quantized, {"params": params}, batches, score=lm.bits_per_byte)
    return Result(frozenset(leaves), *stored(leaves), measured)


HEADER = ("format", "tool", "KL (nats)", "KL ratio", "goal", "top-1", "bits per byte", "bits/weight", "of it scales")


def lines(case: Case, ours: Result, theirs: Result | None, rows: dict[str, Result]) -> Iterator[tuple[str, ...]]:
    """The rows of a case: qjax's, and the peer's where there is one."""
    base = theirs or rows.get(case.against)
    ratio, goal = "", ""
    if base is not None:
        assert ours.comparison.kl is not None
        assert base.comparison.kl is not None
        number = ours.comparison.kl / base.comparison.kl
        over = f" of {case.against}" if case.against else ""
        ratio = f"{number:.2f}{over}"
        goal = "" if case.goal is None else f"<= {case.goal} {'met' if number <= case.goal else 'MISSED'}"
    for tool, result, extra in (("qjax", ours, (ratio, goal)), ("qwix", theirs, ("", ""))):
        if result is None:
            continue
        c = result.comparison
        measures = (f"{c.top1:.2%}", f"{c.quantized_score:.4f}", f"{result.bits:.3f}", f"{result.scale_bits:.3f}")
        yield (case.name, tool, f"{c.kl:.3g}", *extra, *measures)


def rich_table(rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(rows: list[tuple[str, ...]], notes: list[str]) -> str:
    head = ["| " + " | ".join(HEADER) + " |", "|" + "|".join(["---"] * 2 + ["---:"] * (len(HEADER) - 2)) + "|"]
    body = ["| " + " | ".join(row) + " |" for row in rows]
    title = "# Quality of post-training quantization"
    return "\n".join([title, "", *head, *body, "", *(f"- {note}" for note in notes)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=12, help="of 8 windows of 256 held-out bytes (%(default)s)")
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write (%(default)s)")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)

    model = lm.LM(scan_layers=False)
    variables = {"params": lm.unstack_params(lm.load_weights())}
    corpus, held_out = lm.load_corpus()
    every = list(lm.eval_batches(held_out, 8, 256))
    training = lm.batches(corpus, np.random.default_rng(0), batch=8, length=256)
    text = [next(training) for _ in range(8)]
    batches = [every[i * len(every) // arguments.batches] for i in range(arguments.batches)]

    rows: list[tuple[str, ...]] = []
    layers: set[frozenset[str]] = set()
    done: dict[str, Result] = {}
    for case in track(CASES, "cases", console=console):
        ours = run_qjax(case, model, variables, batches, text)
        theirs = run_peer(case, model, variables, batches) if case.peer else None
        layers |= {ours.layers, (theirs or ours).layers}
        rows += lines(case, ours, theirs, done)
        done[case.name] = ours
        score = ours.comparison.float_score
    if len(layers) != 1:
        different = sorted(frozenset.union(*layers) - frozenset.intersection(*layers))
        raise SystemExit(f"the tools did not quantize the same layers, so they cannot be compared: {different}")

    count = len(next(iter(layers)))
    # Not from the installed metadata: a source tree that is on the path without being installed has none.
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("qwix", "jax", "flax"))
    notes = [
        f"{datetime.date.today().isoformat()}, {os.cpu_count()}-core {platform.machine()} CPU, Python "
        f"{platform.python_version()}, qjax {own}, {versions}. Generated by scripts/bench/bench_quality.py.",
        f"Model: the language model of the quickstart, unrolled; {arguments.batches * 8 * 256:,} bytes of held-out "
        f"text, {score:.4f} bits per byte in float32.",
        f"Both tools quantized the same {count} kernels; embedding and norms stay float in both. (qwix leaves the "
        "embedding float; qjax would quantize it, so the table keeps it out by a rule.)",
        "KL is KL(float || quantized), the mean per position; its ratio is qjax over qwix, or over the row "
        "that is named.",
        "w8a8, w4a8: inputs of the matmuls in int8; fp8: inputs and weights in e4m3, with no peer here. "
        "Dynamic: a scale for each token, in qjax with a zero point for integers (its "
        "recipe), in qwix symmetric (its default). Static: a range for each input, calibrated on 8 batches of training "
        "text; an input for which one range has more than 5 times the squared error of a scale for each token stays "
        "dynamic. 'attention too': the products of scores and values are quantized as well, as qwix does by default.",
        "Those inputs are that of mlp/down in every layer: a gated product, with rare values a hundred times its "
        "standard deviation. The last row gives it one range nevertheless.",
        "g64 is a scale for each 64 weights along the contracted axes. The attention output kernels contract two, "
        "heads and head_dim; qwix tiles the last one only and shares a scale among the 4 heads, 256 weights, hence "
        "fewer bits of scales.",
        "Each tool runs with its default for choosing scales: qjax searches each group's scale for the least squared "
        "error, qwix takes it from the largest magnitude (`absmax`).",
        "bits/weight counts the quantized kernels only: codes in the dtype in which each tool keeps them (qwix keeps "
        "int2 and int3 as int4) and scales (qjax: bfloat16 per group, float32 per channel; qwix: float32).",
    ]
    console.print(rich_table(rows))
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(markdown(rows, notes))
    console.print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
