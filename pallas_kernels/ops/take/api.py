"""`quantized_take(w, indices)`: rows of a packed lookup table, dequantized after they were picked."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.numbers import numerics, packing
from qjax.pallas_kernels.ops.primitive import XLA, Runs
from qjax.pallas_kernels.packed.qtensor import QTensor


@functools.partial(jax.jit, static_argnames=("fill_value",))
def quantized_take(w: QTensor, indices: Int[Array, "*B"], *, fill_value: float | None = None) -> Float[Array, "*B K"]:
    """Rows `indices` of the table whose matrix is `(K, N)`: row n is column n of the matrix.

    Only the packed words of those rows are read.

    Args:
        w: packed table without stack axes; any storage order ("nk" keeps a row contiguous).
        indices: which of the N rows; out-of-range ones are clamped, or give `fill_value` if there is one.
        fill_value: value of out-of-range rows, as for `jnp.take(mode="fill")`.

    Returns:
        `(*B, K)` in the dtype of the float table.
    """
    n, flat = w.layout.n, indices.reshape(-1)
    inside = (flat >= 0) & (flat < n)
    rows = jnp.clip(flat, 0, n - 1)
    words, scales = w.select_columns(rows)  # the matrix of those columns only: (K, B)
    codes = packing.unpack(words, w.spec.format, w.layout.k)
    out = numerics.dequantize(codes, scales, w.spec, w.dtype).T  # (B, K)
    if fill_value is not None:
        out = jnp.where(inside[:, None], out, jnp.asarray(fill_value, out.dtype))
    return out.reshape(*indices.shape, w.layout.k)


def runs_as(platform: str, w: QTensor, indices: Any) -> Runs:
    """What `quantized_take` runs as: XLA picks rows and dequantizes them, on every platform."""
    return Runs(XLA)
