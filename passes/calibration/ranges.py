"""The two ends of a range, from the statistic of an activation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qjax.pallas_kernels.numbers import activation_ranges, activations
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, EntropyRange, MovingAverage, Percentile
from qjax.passes.calibration.statistic import BINS, Statistic

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
    plain = dataclasses.replace(spec, range=activation_ranges.MinMax(), per="tensor")

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
