"""What a product of integer codes means: an exact sum, then one rescaling."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from qjax.pallas_kernels.numbers import packing, stored_scales
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer


def matmul(
    x: Int8[Array, "*stack M K"],
    scale: Float[Array, "*stack M 1"],
    zero: Float[Array, "*stack M 1"] | None,
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    out_dtype: Any,
) -> Float[Array, "*stack M N"]:
    """`integer_matmul` in plain `jax.numpy`: one int8 dot for each group, zero points as corrections."""
    words, scales = pick_layer(w, layer).matrix_arrays()
    codes = packing.unpack(words, w.spec.format, w.layout.k)  # int8 (*stack, K, N)
    values = stored_scales.resolve_scales(scales)  # (*stack, G, N or 1)
    k = w.layout.k
    size = w.group_size
    whole = k // size
    stack = tuple(range(x.ndim - 2))
    numbers = (((x.ndim - 1,), (x.ndim - 2,)), (stack, stack))
    # A row of ones gives the column sums of the weight in the same dot, where a reduction would read it once more.
    rows = x if zero is None else jnp.concatenate([x, jnp.ones_like(x, shape=(*x.shape[:-2], 1, k))], axis=-2)

    def group(out: Array, g: Any, size: int) -> Array:
        cx = lax.dynamic_slice_in_dim(rows, g * w.group_size, size, axis=-1)
        cw = lax.dynamic_slice_in_dim(codes, g * w.group_size, size, axis=-2)
        dot = lax.dot_general(cx, cw, numbers, preferred_element_type=jnp.int32)
        m = x.shape[-2]
        acc, columns = dot[..., :m, :], dot[..., m:, :]
        zw = None
        if scales.zero is not None:
            zw = lax.dynamic_slice_in_dim(scales.zero, g, 1, axis=-2).astype(jnp.int32)
            acc -= zw * jnp.sum(cx[..., :m, :], axis=-1, keepdims=True, dtype=jnp.int32)
        if zero is not None:
            acc -= zero.astype(jnp.int32) * (columns if zw is None else columns - size * zw)
        return out + finite(acc.astype(jnp.float32) * lax.dynamic_slice_in_dim(values, g, 1, axis=-2))

    out = jnp.zeros((*x.shape[:-1], w.layout.n), jnp.float32)
    if whole == 1:
        out = group(out, 0, size)
    elif whole:
        out = lax.fori_loop(0, whole, lambda g, out: group(out, g, size), out)
    if k % size:
        out = group(out, whole, k % size)
    return rescale(out, scale, out_dtype)


def rescale(
    out: Float[Array, "*stack M N"], scale: Float[Array, "*stack M 1"], out_dtype: Any
) -> Float[Array, "*stack M N"]:
    """The sum over groups times the scales of x, in the dtype of the result."""
    # XLA takes 0 + x for x, which keeps the sign of a zero, where it sees that the sum starts at 0: not in a loop.
    return (jnp.where(out == 0, 0.0, out) * scale).astype(out_dtype)
