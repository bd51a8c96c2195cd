"""float32 arithmetic that XLA computes as it is written, so that two programs get the same bits.

A compiler may turn a quotient into a product with a reciprocal, fuse a product and an addition into one rounding, drop
a cast to a narrow float and back (excess precision), and add up in any order. Each function here prevents one of these.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

FLOAT32_MAX = float(np.finfo(np.float32).max)

FLOAT32_TINY = float(np.finfo(np.float32).tiny)


def divide(x: Array, s: Array) -> Array:
    """`x / s` rounded once, and x where s is 0; the select hides that the divisor is a broadcast or a constant."""
    return x / jnp.where((x == 0) | (s == 0), 1.0, s)


def finite(product: Array) -> Array:
    """Saturates what overflowed; the clamp also keeps the product from being fused with an addition."""
    return lax.clamp(-FLOAT32_MAX, product, FLOAT32_MAX)


def reciprocal(s: Array) -> Array:
    """`1 / s`, and 1 where s is 0."""
    return 1 / jnp.where(s == 0, 1.0, s)


def round_to(x: Array, dtype: Any) -> Array:
    """Rounds float32 numbers to those that `dtype` holds, ties to even, so that the cast that follows is exact."""
    info = jnp.finfo(dtype)
    if info.bits == 32:
        return x
    # Only float16 must overflow here as its cast does; float8 is clipped before.
    exponent_bits = 5 if dtype == jnp.float16 else 8
    normal = lax.reduce_precision(x, exponent_bits=exponent_bits, mantissa_bits=info.nmant)
    if dtype == jnp.bfloat16:
        return normal
    # reduce_precision flushes subnormals. Their spacing is a power of two, so this scaling is exact.
    step = 2.0 ** (info.minexp - info.nmant)
    return jnp.where(jnp.abs(x) < 2.0**info.minexp, jnp.round(x * (1 / step)) * step, normal)


def pairwise_sum(x: Array, axis: int) -> Array:
    """Sum over an axis, kept at size 1, in an order that no compiler changes."""
    axis %= x.ndim
    while (size := x.shape[axis]) > 1:
        half = size // 2
        low, high = (lax.slice_in_dim(x, i * half, (i + 1) * half, axis=axis) for i in (0, 1))
        rest = [lax.slice_in_dim(x, 2 * half, size, axis=axis)] if size % 2 else []
        x = lax.concatenate([low + high, *rest], axis) if rest else low + high
    return x
