"""What the kernels of `integer_matmul` for NVIDIA GPUs have in common: which products they compute, and what XLA does
before and after them.

Before: the sum of each group of each row of x, where the weight has zero points; x is read once more for it. After:
scales, where K was split among blocks and their parts are sums of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Int32

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.ops.integer_matmul.reference import rescale
from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer


def unsupported(x: Any, w: QTensor, out_dtype: Any) -> str | None:
    """Why no kernel computes this product, or None; x is anything with a shape."""
    if w.spec.format.kind != "int" or w.spec.format.bits not in (4, 8):
        return "the kernels for GPUs read int4 and int8"
    if w.spec.double_quant:
        return "the kernels for GPUs do not read scales that are quantized themselves"
    if jnp.dtype(out_dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return "the kernels for GPUs write float32, bfloat16 and float16"
    if 0 in (*x.shape, *w.words.shape):
        return "empty"
    return None


def row_sums(x: Int8[Array, "B M K"], zero: Float[Array, "B M 1"] | None, group: int) -> Int32[Array, "B G M"]:
    """The sum of `code - zero` of each group of each row, which zero points of the weight are multiplied by."""
    batch, m, k = x.shape
    parts = jnp.pad(x, ((0, 0), (0, 0), (0, -k % group))).reshape(batch, m, -1, group)
    sums = jnp.sum(parts, axis=-1, dtype=jnp.int32)
    if zero is not None:
        sizes = jnp.minimum(k - group * jnp.arange(parts.shape[2]), group)  # the last group may be short
        sums -= zero.astype(jnp.int32) * sizes
    return jnp.swapaxes(sums, 1, 2)


def finish_parts(
    results: Sequence[Int32[Array, "splits B M N"]],
    scale: Float[Array, "*stack M 1"],
    sums: Int32[Array, "B 1 M"] | None,
    weights: Sequence[QTensor],
    layers: Sequence[Int[Array, ""] | int | None],
    others: Sequence[Float[Array, "_ _ _"]],
    epilogue: Epilogue | None,
    out_dtype: Any,
) -> Array:
    """What the epilogue makes of products whose K was split, or the only product.

    Args:
        results: for each weight, as for `_rescale_parts`, whose other arguments are these too.
        scale, sums, weights, layers, out_dtype: see there.
        others, epilogue: as for `fused_matmul` of a kernel; without an epilogue there is one weight.
    """
    dtype = out_dtype if epilogue is None else jnp.dtype(jnp.float32)
    products = [
        _rescale_parts(parts, scale, sums, w, layer, dtype)
        for parts, w, layer in zip(results, weights, layers, strict=True)
    ]
    if epilogue is None:
        return products[0]
    shape = products[0].shape
    return epilogue([a.reshape(-1, *shape[-2:]) for a in products], others).reshape(shape)


def _rescale_parts(
    parts: Int32[Array, "splits B M N"],
    scale: Float[Array, "*stack M 1"],
    sums: Int32[Array, "B 1 M"] | None,
    w: QTensor,
    layer: Int[Array, ""] | int | None,
    out_dtype: Any,
) -> Float[Array, "*stack M N"]:
    """The product with a weight that has one scale for a column, from sums over parts of K.

    Args:
        parts: sums of products of codes, zero points of x taken off.
        scale, w, layer, out_dtype: as for `integer_matmul`.
        sums: `row_sums`, where the weight has zero points.
    """
    acc = parts.sum(axis=0).reshape(*scale.shape[:-1], -1)
    scales = pick_layer(w, layer).matrix_arrays()[1]
    if sums is not None:
        acc -= sums.reshape(scale.shape) * scales.zero.astype(jnp.int32)
    return rescale(finite(acc.astype(jnp.float32) * scales.values.astype(jnp.float32)), scale, out_dtype)
