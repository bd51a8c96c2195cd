"""`compare`: how far a quantized model's outputs lie from the float model's, and what it saves."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from qjax.compile.calibrate import jit_batches
from qjax.models.binding import Inputs
from qjax.models.frameworks import binding_of, binding_of_float, holders, titles


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A quantized model against the float one; prints as a table.

    Attributes:
        kl: mean of KL(float || quantized) over all positions, in nats; None for outputs that are no logits.
        top1: part of the positions, 0 to 1, at which both models rank the same class first; None as for `kl`.
        relative_error: `|quantized - float| / |float|`, Euclidean norms over all floating outputs of all batches.
        sqnr_db: the same as a signal-to-noise ratio in decibels, `-20 log10(relative_error)`.
        float_score, quantized_score: means over the batches of the `score` that `compare` was given; None without one.
        positions: rows of logits compared; None as for `kl`.
        batches: batches compared.
        float_bytes: bytes of the float model's parameters.
        quantized_bytes: bytes of the quantized model's parameters, scales and what stays float included.
        bits_per_weight: `8 * quantized_bytes` over the number of parameters.
    """

    kl: float | None
    top1: float | None
    relative_error: float
    sqnr_db: float
    float_score: float | None
    quantized_score: float | None
    positions: int | None
    batches: int
    float_bytes: int
    quantized_bytes: int
    bits_per_weight: float

    def to_json(self) -> dict[str, int | float | None]:
        """The fields as plain data; an infinite value, which JSON does not have, is None."""
        fields = dataclasses.asdict(self)
        return {name: value if value is not None and math.isfinite(value) else None for name, value in fields.items()}

    def __rich__(self) -> Table:
        """The table that `print` of rich shows."""
        smaller = f", {self.float_bytes / self.quantized_bytes:.1f} x smaller" if self.quantized_bytes else ""
        compared = f"{self.batches} batch{'es' if self.batches != 1 else ''}"
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="bold")
        table.add_column()
        if self.kl is not None and self.top1 is not None:
            table.add_row("KL(float || quantized)", f"{self.kl:.4g} nats per position")
            table.add_row("top-1 agreement", f"{self.top1:.2%}")
            compared += f", {self.positions:,} positions"
        table.add_row("relative error", f"{self.relative_error:.4g}")
        table.add_row("SQNR", f"{self.sqnr_db:.1f} dB")
        if self.float_score is not None and self.quantized_score is not None:
            gap = self.quantized_score - self.float_score
            table.add_row("score", f"{self.float_score:.4f} -> {self.quantized_score:.4f} ({gap:+.4f})")
        table.add_row("bytes", f"{decimal(self.float_bytes)} -> {decimal(self.quantized_bytes)}{smaller}")
        table.add_row("bits per weight", f"{self.bits_per_weight:.2f}")
        table.add_row("compared on", compared)
        return table

    def __str__(self) -> str:
        """The same table as plain text."""
        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(self)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def compare(
    model: Any,
    variables: Any,
    q: Any,
    packed: Any,
    batches: Iterable[Any],
    *,
    method: Any = None,
    rngs: Any = None,
    logits: Callable[[Any], Any] | None = None,
    score: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Runs a float model and its quantized form on the same batches and measures the difference.

    Both run in one compiled program per batch shape, since the same arithmetic in two programs differs by rounding.
    Whatever state a call updates is dropped: every batch meets the model as it was given.

    Args:
        model: the float model: a Linen module, an NNX module or a function `fn(params, *args, **kwargs)`.
        variables: its variables, or the function's params; None for an NNX module, which holds its own.
        q: what `qjax.quantize` gave for `model`; for an NNX module what `q.convert` gave.
        packed: what `q.convert` gave; None for an NNX module. Float variables here measure the fake-quant model.
        batches: what `apply` takes after the variables, one batch at a time: a tuple of arguments, or the only one.
        method: of a module, the method to run, as for `apply`.
        rngs: of a Linen module, as for `apply`; both models get the same.
        logits: picks the logits `(..., classes)` from the output. By default an output that is one floating array of
            two or more axes is taken for logits, and any other output for none.
        score: what else to measure of an output, as a scalar: `score(output, *args)` with the arguments of the batch,
            such as a loss. Its means over the batches are in the result.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: no batches; NaN in an output (the message says in whose and in which batch); outputs of different
            structure, shape or dtype, or without floating values.
        TypeError: `model` or `q` is no model, or variables, method or rngs do not go with it.

    Example:
        >>> print(qjax.compare(model, variables, q, packed, batches))
    """
    float_tree, run_float, parameters = _bind(model, variables, method, rngs, kwargs)
    quantized_tree, run_quantized, packed_parameters = _bind(q, packed, method, rngs, kwargs)

    @jit_batches
    def measure(float_tree: Any, quantized_tree: Any, args: tuple) -> tuple[_Rows, Any]:
        outputs = run_float(float_tree, args), run_quantized(quantized_tree, args)
        rows = _measure(*outputs, logits)
        scores = None if score is None else jnp.stack([jnp.asarray(score(out, *args)) for out in outputs])
        return rows, scores

    total, scores, count = _Total(), [], 0
    for batch in batches:
        rows, scored = jax.device_get(measure(float_tree, quantized_tree, batch))
        for whose, nan in (("float", rows.float_nan), ("quantized", rows.quantized_nan)):
            if nan:
                raise ValueError(f"qjax: the {whose} model gives NaN in batch {count} (counted from 0).")
        total.add(rows)
        scores.append(scored)
        count += 1
    if not count:
        raise ValueError("qjax: compare got no batches: the iterable is empty (an iterator can be used only once).")

    means: list[float] = [] if score is None else list(np.asarray(scores, np.float64).mean(axis=0))
    weights, float_bytes = _size(parameters)
    _, quantized_bytes = _size(packed_parameters)
    relative = math.sqrt(total.noise / total.signal) if total.signal else math.inf if total.noise else 0.0
    return Comparison(
        kl=total.kl / total.positions if total.positions else None,
        top1=total.agree / total.positions if total.positions else None,
        relative_error=relative,
        sqnr_db=-20 * math.log10(relative) if 0 < relative < math.inf else -math.inf if relative else math.inf,
        float_score=means[0] if means else None,
        quantized_score=means[1] if means else None,
        positions=total.positions or None,
        batches=count,
        float_bytes=float_bytes,
        quantized_bytes=quantized_bytes,
        bits_per_weight=8 * quantized_bytes / weights if weights else 0.0,
    )


# --- Models as functions of a tree of arrays -------------------------------------------------------------------


def _bind(
    model: Any, variables: Any, method: Any, rngs: Any, kwargs: dict[str, Any]
) -> tuple[Any, Callable[[Any, tuple], Any], Any]:
    """The arrays of a model, the model as a function of them and of a batch's arguments, and its parameters."""
    binding = binding_of(model) or binding_of_float(model)
    if binding is None:
        raise TypeError(f"qjax: compare takes {titles(plural=True)}, not {model!r}.")
    binding.check_held(variables, "compare(model, None, q, None, batches)")
    if not binding.holds_variables and variables is None:
        raise TypeError(f"qjax: compare needs variables for {type(model).__name__}; only {holders()} hold their own.")
    options = binding.options(method=method, rngs=rngs)

    def run(tree: Any, args: tuple) -> Any:
        return binding.run(model, tree, Inputs(args, kwargs, options))[0]

    return binding.tree(model, variables), run, binding.parameters(model, variables)


def _size(tree: Any) -> tuple[int, int]:
    """Number of values and of bytes of all arrays."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(leaf.size for leaf in leaves), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


# --- One batch ---------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a batch contributes, row by row: summed within a row in float32 here, over rows in float64 on the host.

    Attributes:
        signal, noise: for each floating output, the squared float values and the squared differences of each row.
        kl: nats, `(positions,)`; None without logits.
        agree: whether the first classes agree, `(positions,)`; None without logits.
        float_nan, quantized_nan: whether the outputs of a model have NaN.
    """

    signal: list[Any]  # arrays, or whatever JAX puts in the leaves of a pytree
    noise: list[Any]
    kl: Any
    agree: Any
    float_nan: Any
    quantized_nan: Any


@dataclasses.dataclass
class _Total:
    signal: float = 0.0
    noise: float = 0.0
    kl: float = 0.0
    agree: int = 0
    positions: int = 0

    def add(self, rows: _Rows) -> None:
        self.signal += sum(float(r.sum(dtype=np.float64)) for r in rows.signal)
        self.noise += sum(float(r.sum(dtype=np.float64)) for r in rows.noise)
        if rows.kl is not None:
            self.kl += float(rows.kl.sum(dtype=np.float64))
            self.agree += int(rows.agree.sum())
            self.positions += rows.kl.size


def _measure(expected: Any, actual: Any, logits: Callable[[Any], Any] | None) -> _Rows:
    """Runs under jit; raises at trace time for outputs that cannot be compared."""
    structures = jax.tree.structure(expected), jax.tree.structure(actual)
    shapes = [[f"{x.dtype}{list(x.shape)}" for x in map(jnp.asarray, jax.tree.leaves(t))] for t in (expected, actual)]
    if structures[0] != structures[1] or shapes[0] != shapes[1]:
        raise ValueError(
            "qjax: the two models give different outputs, so they cannot be compared:\n"
            f"  float:     {structures[0]} of {', '.join(shapes[0])}\n"
            f"  quantized: {structures[1]} of {', '.join(shapes[1])}"
        )
    pairs = [
        (jnp.asarray(e, jnp.float32), jnp.asarray(a, jnp.float32))
        for e, a in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
        if jnp.issubdtype(jnp.asarray(e).dtype, jnp.floating)
    ]
    if not pairs:
        raise ValueError(f"qjax: the models give no floating output to compare, only {', '.join(shapes[0])}.")
    if logits is not None:
        rows = _compare_logits(jnp.asarray(logits(expected)), jnp.asarray(logits(actual)))
    elif jax.tree_util.treedef_is_leaf(structures[0]) and pairs[0][0].ndim >= 2:
        rows = _compare_logits(*pairs[0])
    else:
        rows = None, None
    signal, noise = zip(*(_square_sums(e, a) for e, a in pairs), strict=True)
    nan = [jnp.any(jnp.stack([jnp.isnan(x).any() for x in side])) for side in zip(*pairs, strict=True)]
    return _Rows(list(signal), list(noise), *rows, *nan)


def _square_sums(expected: Float[Array, "*B"], actual: Float[Array, "*B"]) -> tuple[Array, Array]:
    """Squares of the float values and of the differences, summed over the last axis; masked (infinite) values out."""
    finite = jnp.isfinite(expected)
    expected, actual = (jnp.atleast_1d(jnp.where(finite, x, 0.0)) for x in (expected, actual))
    return jnp.sum(expected**2, axis=-1), jnp.sum((actual - expected) ** 2, axis=-1)


def _compare_logits(
    expected: Float[Array, "*B N"], actual: Float[Array, "*B N"]
) -> tuple[Float[Array, " P"], Bool[Array, " P"]]:
    """KL(expected || actual) in nats and agreement of the argmax at each of the P positions."""
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (expected, actual))
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_q - log_p
    # sum(p (log p - log q)) in float32 drowns a KL below 1e-6 in the rounding of the normalizers. With q - p, whose sum
    # is 0, every term is >= 0 and that rounding cancels to first order; expm1 keeps the digits of a small difference.
    far = q - p - jnp.where(p > 0, p * d, 0.0)
    terms = jnp.where(jnp.abs(d) < 1, p * (jnp.expm1(d) - d), far)
    agree = jnp.argmax(expected, axis=-1) == jnp.argmax(actual, axis=-1)
    return jnp.sum(terms, axis=-1).reshape(-1), agree.reshape(-1)
