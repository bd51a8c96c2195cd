"""Observers: what calibration learns of an activation, and the range that follows from it.

A `Statistic` is tapped from the float program while it runs (`passes.replay`). It is a pytree of fixed size, so memory
does not grow with the number of batches, and it merges: over the steps of a loop, the batches of a run, the replicas
of a data-parallel one, and runs that were saved. `ranges` turns one into the arrays that `pallas_kernels.activations`
reads.

The histogram counts magnitudes, negative and positive ones apart, in bins from 0 to a power of two. When a larger value
comes, the power of two doubles and neighbouring bins join, so merging is exact in whatever order it is done.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import activations
from pallas_kernels.activations import (
    ActSpec,
    EntropyRange,
    LearnedStep,
    MovingAverage,
    MseRange,
    Percentile,
)

BINS = 4096
"""Bins for each sign of a histogram."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistic:
    """What was seen of an activation; arrays of shape `(*stack, *rest)`, where `stack` are the layers of a scan.

    Attributes:
        low, high: the extremes, float32; +inf and -inf before anything was seen.
        average_low, average_high, weight: exponential averages of each batch's extremes, and the sum of their weights:
            1 - decay**n after n batches, as in the bias correction of Adam.
        limit: the upper end of the histogram, a power of two; 0 before anything was seen.
        counts: `(*stack, 2, BINS)`, how many values of each sign fell into each bin; None where not needed.
        finite: whether every value was finite.
        token_error: the sum of squared errors that a dynamic scale for each token would make; None where not needed.
    """

    low: Any
    high: Any
    average_low: Any
    average_high: Any
    weight: Any
    limit: Any
    counts: Any
    finite: Any
    token_error: Any = None

    def nothing(self) -> Statistic:
        """The statistic of no values, shaped like this one: the identity of `merge` and `follow`."""
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self)
        shape = self.low.shape
        return dataclasses.replace(
            zeros,
            low=jnp.full(shape, jnp.inf, jnp.float32),
            high=jnp.full(shape, -jnp.inf, jnp.float32),
            finite=jnp.ones(self.finite.shape, bool),
        )

    def _join(self, other: Statistic) -> dict[str, Any]:
        limit = jnp.maximum(self.limit, other.limit)
        counts = None
        if self.counts is not None:
            counts = _rebin(self.counts, self.limit, limit) + _rebin(other.counts, other.limit, limit)
        return {
            "low": jnp.minimum(self.low, other.low),
            "high": jnp.maximum(self.high, other.high),
            "limit": limit,
            "counts": counts,
            "finite": self.finite & other.finite,
            "token_error": None if self.token_error is None else self.token_error + other.token_error,
        }

    def merge(self, other: Statistic) -> Statistic:
        """Of values that belong to one batch, such as the steps of a loop."""
        joined = self._join(other)
        weight = jnp.maximum(self.weight, other.weight)
        return Statistic(average_low=joined["low"], average_high=joined["high"], weight=weight, **joined)

    def combine(self, other: Statistic) -> Statistic:
        """Of different batches, seen side by side: the averages count as much as their weights."""
        weight = self.weight + other.weight

        def average(a: Any, b: Any) -> Array:
            parts = jnp.where(self.weight > 0, self.weight * a, 0.0), jnp.where(other.weight > 0, other.weight * b, 0.0)
            return (parts[0] + parts[1]) / jnp.where(weight > 0, weight, 1.0)

        low = average(self.average_low, other.average_low)
        return Statistic(
            average_low=low,
            average_high=average(self.average_high, other.average_high),
            weight=weight,
            **self._join(other),
        )

    def follow(self, batch: Statistic, decay: float) -> Statistic:
        """Of earlier batches and a further one."""
        older = dataclasses.replace(self, weight=decay * self.weight)
        return older.combine(dataclasses.replace(batch, weight=(1 - decay) * jnp.minimum(batch.weight, 1.0)))

    def reduce(self) -> Statistic:
        """Merges over the leading axis: the steps of a loop that runs the same layer."""

        def step(total: Statistic, i: Array) -> tuple[Statistic, None]:
            return total.merge(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), self)), None

        first = jax.tree.map(lambda a: a[0], self)
        return lax.scan(step, first, jnp.arange(1, self.low.shape[0]))[0]


def _rebin(counts: Any, limit: Any, wider: Any) -> Array:
    """Counts of a histogram up to `limit` as those of one up to `wider`, both powers of two (or 0: nothing yet)."""
    doublings = jnp.where(limit > 0, jnp.log2(wider / jnp.where(limit > 0, limit, 1.0)), 0.0)
    shift = jnp.clip(jnp.round(doublings), 0, 31).astype(jnp.int32)[..., None, None]
    where = jnp.broadcast_to(jnp.arange(BINS, dtype=jnp.int32) >> shift, counts.shape)
    flat, index = jnp.asarray(counts).reshape(-1, BINS), where.reshape(-1, BINS)
    return jax.vmap(lambda c, i: jnp.zeros_like(c).at[i].add(c))(flat, index).reshape(counts.shape)


def observe(x: Float[Array, "*S"], spec: ActSpec, axes: Sequence[int], keep: Sequence[int] = ()) -> Statistic:
    """What one batch shows of an activation.

    Args:
        x: the activation.
        spec: says what its range needs beside the extremes.
        axes: those that the product contracts: a token has its values along them.
        keep: axes that are observed apart, for statistics per channel or per token; the others are reduced.
    """
    x = lax.stop_gradient(x).astype(jnp.float32)
    finite = jnp.isfinite(x)
    over = tuple(i for i in range(x.ndim) if i not in keep)
    x = jnp.where(finite, x, 0.0)
    low, high = jnp.min(x, over, initial=jnp.inf), jnp.max(x, over, initial=-jnp.inf)
    limit, counts, token_error = jnp.zeros_like(low), None, None
    compared = spec.dynamic_above is not None
    if compared or isinstance(spec.range, Percentile | MseRange | EntropyRange | LearnedStep):
        if keep:
            raise ValueError("qjax: histograms are kept per tensor: statistics per channel or token are extremes.")
        largest = jnp.maximum(jnp.maximum(-low, high), 2.0**-100)
        limit = jnp.exp2(jnp.ceil(jnp.log2(largest)))
        limit = jnp.where(limit < largest, 2 * limit, limit)  # log2 may round down
        bins = jnp.clip(jnp.floor(jnp.abs(x) * (BINS / limit)), 0, BINS - 1).astype(jnp.int32)
        bins = jnp.where(x < 0, 0, BINS) + bins
        counts = jnp.zeros((2 * BINS,), jnp.float32).at[bins.reshape(-1)].add(1.0).reshape(2, BINS)
    if compared:
        value = activations.quantize(x, spec.by_token, axes).dequantize(spec.format, jnp.float32)
        token_error = jnp.sum((value - x) ** 2)
    weight = jnp.ones_like(low)
    return Statistic(low, high, low, high, weight, limit, counts, jnp.all(finite, over), token_error)


# --- From a statistic to a range ---------------------------------------------------------------------------------


def extremes(statistic: Statistic, spec: ActSpec) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the range that a spec chooses, each of the statistic's stack shape, float32."""
    rule = spec.range
    low, high = (np.asarray(a, np.float32) for a in (statistic.low, statistic.high))
    if isinstance(rule, MovingAverage):
        return np.asarray(statistic.average_low, np.float32), np.asarray(statistic.average_high, np.float32)
    if statistic.counts is None:
        return low, high
    counts = np.asarray(statistic.counts, np.float64).reshape(-1, 2, BINS)
    limits = np.asarray(statistic.limit, np.float64).reshape(-1)
    ends = []
    for c, limit, lo, hi in zip(counts, limits, low.reshape(-1), high.reshape(-1), strict=True):
        if isinstance(rule, Percentile):
            found = _percentile(c, limit, float(rule.percent), spec)
        elif isinstance(rule, EntropyRange):
            found = _entropy(c, limit, spec)
        else:
            found = _least_error(c, limit, float(lo), float(hi), spec)
        ends.append((max(found[0], float(lo)), min(found[1], float(hi))))
    both = np.asarray(ends, np.float32)
    return both[:, 0].reshape(low.shape), both[:, 1].reshape(low.shape)


def error_over_dynamic(statistic: Statistic, low: np.ndarray, high: np.ndarray, spec: ActSpec) -> float:
    """Squared error of the range `low` to `high` over that of scales by token; of stacked layers, the worst one's."""
    counts = np.asarray(statistic.counts, np.float64).reshape(-1, 2, BINS)
    ends = zip(counts, *(np.asarray(a, np.float64).reshape(-1) for a in (statistic.limit, low, high)), strict=True)
    by_token = np.asarray(statistic.token_error, np.float64).reshape(-1)
    ratios = []
    for (c, limit, lo, hi), least in zip(ends, by_token, strict=True):
        # In units of the limit, as in `_least_error`.
        values, weights = jnp.asarray(_centres(1.0).reshape(-1), jnp.float32), jnp.asarray(c.reshape(-1), jnp.float32)
        one = [jnp.asarray([end / limit], jnp.float32) for end in (min(lo, 0.0), max(hi, 0.0))]
        error = float(_errors(values, weights, *one, spec=spec)[0]) * limit**2
        ratios.append(error / least if least else 1.0)  # no error: nothing but zeros, or values of the grid itself
    return max(ratios)


def _percentile(counts: np.ndarray, limit: float, percent: float, spec: ActSpec) -> tuple[float, float]:
    width, cut = limit / BINS, 1 - percent / 100
    if not spec.zero_point:
        magnitudes = counts.sum(axis=0)
        inside = np.cumsum(magnitudes) >= magnitudes.sum() * (1 - cut)
        end = (int(np.argmax(inside)) + 1) * width
        return -end, end
    total, ends = counts.sum(), []
    for side in counts:  # negative, positive: each may lose half of what is cut
        beyond = np.cumsum(side[::-1])[::-1]  # values in this bin and further out
        kept = np.nonzero(beyond > total * cut / 2)[0]
        ends.append((int(kept[-1]) + 1) * width if kept.size else 0.0)
    return -ends[0], ends[1]


def _centres(limit: float) -> np.ndarray:
    """The middle of every bin, negative ones first, `(2, BINS)`."""
    middle = (np.arange(BINS) + 0.5) * (limit / BINS)
    return np.stack([-middle, middle])


@functools.partial(jax.jit, static_argnames="spec")
def _errors(values: Array, counts: Array, low: Array, high: Array, *, spec: ActSpec) -> Array:
    """Mean squared error of the values, weighted by counts, for each candidate range."""
    plain = dataclasses.replace(spec, range=activations.MinMax(), per="tensor")

    def error(low: Array, high: Array) -> Array:
        quantized = activations.quantize(values, plain, (), {"low": low, "high": high})
        return jnp.sum(counts * (quantized.dequantize(spec.format, jnp.float32) - values) ** 2)

    return lax.map(lambda ends: error(*ends), (low, high))


_CANDIDATES = np.float32(2.0) ** np.linspace(-6, 0, 97, dtype=np.float32)


def _least_error(counts: np.ndarray, limit: float, low: float, high: float, spec: ActSpec) -> tuple[float, float]:
    """Each end in turn is drawn in to where the error of the histogram is least, the other held."""
    # In units of the limit, so that squares neither overflow nor vanish.
    values = jnp.asarray(_centres(1.0).reshape(-1), jnp.float32)
    weights = jnp.asarray(counts.reshape(-1) / max(counts.sum(), 1.0), jnp.float32)
    lo, hi = np.float32(min(low, 0.0) / limit), np.float32(max(high, 0.0) / limit)
    if not spec.zero_point:
        ends = _CANDIDATES * max(-lo, hi)
        best = int(np.argmin(_errors(values, weights, jnp.asarray(-ends), jnp.asarray(ends), spec=spec)))
        return -float(ends[best]) * limit, float(ends[best]) * limit
    for _ in range(2):
        ends = _CANDIDATES * np.float32(max(high, 0.0) / limit)
        fixed = np.full_like(ends, lo)
        hi = ends[int(np.argmin(_errors(values, weights, jnp.asarray(fixed), jnp.asarray(ends), spec=spec)))]
        ends = _CANDIDATES * np.float32(min(low, 0.0) / limit)
        fixed = np.full_like(ends, hi)
        lo = ends[int(np.argmin(_errors(values, weights, jnp.asarray(ends), jnp.asarray(fixed), spec=spec)))]
    return float(lo) * limit, float(hi) * limit


def _entropy(counts: np.ndarray, limit: float, spec: ActSpec) -> tuple[float, float]:
    """The clipping point of least KL(clipped || quantized): S. Migacz, "8-bit inference with TensorRT", GTC 2017."""
    magnitudes = counts.sum(axis=0)
    levels = 2 ** (spec.format.bits - 1)
    if not magnitudes.any() or levels >= BINS:
        return -limit, limit
    magnitudes[0] = magnitudes[1]  # exact zeros cost no precision and would outweigh everything
    best, best_end = np.inf, BINS
    for end in range(levels, BINS + 1, max(1, BINS // 512)):
        reference = magnitudes[:end].copy()
        shape = magnitudes[:end]
        reference[-1] += magnitudes[end:].sum()
        which = np.arange(end) * levels // end
        total = np.bincount(which, shape, levels)
        filled = np.bincount(which, shape > 0, levels)
        spread = np.where(shape > 0, (total / np.maximum(filled, 1))[which], 0.0)
        if not spread.any():
            continue
        p, q = reference / reference.sum(), spread / spread.sum()
        floor = 1e-9  # a clipped value in a bin that was empty has no mass in q
        divergence = float(np.sum(np.where(p > 0, p * np.log(np.maximum(p, floor) / np.maximum(q, floor)), 0.0)))
        if divergence < best:
            best, best_end = divergence, end
    point = best_end * limit / BINS
    return -point, point
