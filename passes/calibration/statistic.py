"""Observers: what calibration learns of an activation, and the range that follows from it.

A `Statistic` is tapped from the float program while it runs (`passes.jaxpr.replay`). It is a pytree of fixed size, so
memory does not grow with the number of batches, and it merges: over the steps of a loop, the batches of a run, the
replicas of a data-parallel one, and runs that were saved. `ranges` turns one into the arrays that
`pallas_kernels.numbers.activations` reads.

The histogram counts magnitudes, negative and positive ones apart, in bins from 0 to a power of two. When a larger value
comes, the power of two doubles and neighbouring bins join, so merging is exact in whatever order it is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.pallas_kernels.numbers import activations
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, EntropyRange, LearnedStep, MseRange, Percentile

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
