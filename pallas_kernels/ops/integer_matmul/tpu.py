"""`integer_matmul` on TPU: the same bits as `reference.matmul`, as one Pallas kernel.

Products of one x with two weights that are packed alike share its tiles, and what a program does with the results
(`pallas_kernels.backends.epilogue`) is done to scaled sums, a strip of rows at a time: codes of x come in, and codes of
the next product's x may go out.

No array is copied before the kernel, but scales that it cannot read: float16 and double-quantized ones. A stack axis is
a grid axis, and `layer` a prefetched scalar that index maps read, so no matrix is sliced out of a stack. What lies
beyond the edge of an array is undefined there: x is set to 0, so that the weight does not count, and scales are; rows
and columns of the result are not stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.tpu_operands import Beside, Packed
from qjax.pallas_kernels.backends.tpu_tile import K_MULTIPLE, LANES
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.ops.integer_matmul import tpu_kernel
from qjax.pallas_kernels.ops.integer_matmul.tpu_product import Product
from qjax.pallas_kernels.ops.integer_matmul.tpu_tiles import Blocks, default_blocks, fits
from qjax.pallas_kernels.packed.qtensor import QTensor

# Groups are multiples of LANES or divide it down to this: x is stacked 8 times.
_LEAST_GROUP = 16

_ALONE = Beside()


def unsupported(shape: tuple[int, ...], w: QTensor, beside: Beside = _ALONE) -> str | None:
    """Why x of this shape times this weight is left to the reference; None if it is not."""
    k, group = w.layout.k, w.group_size
    if 0 in (*shape, w.layout.n):
        return "there is nothing to multiply"
    if w.order == "nk" and (w.spec.format.bits < 8 or group < k):
        return "words that are packed along the lanes are not unpacked here"
    if group < k and group % LANES and (group < _LEAST_GROUP or LANES % group):
        return f"groups of {group} values neither divide a register of {LANES} lanes nor fill several"
    if group < k and group % LANES == 0 and group % K_MULTIPLE and group > 4 * K_MULTIPLE:
        return f"groups of {group} values are cut by tiles of {K_MULTIPLE}"
    if beside != _ALONE and not fits(default_blocks(shape[-2], w, beside), w, beside):
        return "what the epilogue reads does not fit into VMEM"
    return None


def matmul(
    x: Int8[Array, "*stack M K"],
    scale: Float[Array, "*stack M 1"],
    zero: Float[Array, "*stack M 1"] | None,
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    out_dtype: Any,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M N"]:
    """What `reference.matmul` computes, bit for bit; `unsupported` must have nothing against it.

    Args:
        x, scale, zero, w, layer, out_dtype: as for `integer_matmul`; no axis is empty.
        blocks: sizes of the tiles; by default `default_blocks` chooses.
        interpret: run the kernel as plain JAX operations, on any platform.
    """
    stored = jnp.dtype(jnp.float32 if out_dtype == jnp.float16 else out_dtype)
    how: dict[str, Any] = {"blocks": blocks, "interpret": interpret}
    return _multiplied(Activation(x, scale, zero), [w], [], [layer], None, stored, **how).astype(out_dtype)


def fused_matmul(
    x: Activation,
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    epilogue: Epilogue,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M N"] | Int8[Array, "*stack M N"]:
    """The epilogue of the products of x with one or two weights, in one kernel; it starts from the bits of `matmul`.

    Args:
        x: codes `(*stack, M, K)`, with scales and zero points `(*stack, M, 1)`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products.
        blocks, interpret: as for `matmul`.
    """
    return _multiplied(x, weights, others, layers, epilogue, epilogue.out_dtype, blocks=blocks, interpret=interpret)


def _multiplied(
    x: Activation,
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    layers: Sequence[Int[Array, ""] | int | None],
    epilogue: Epilogue | None,
    out_dtype: Any,
    *,
    blocks: Blocks | None,
    interpret: bool,
) -> Array:
    """What the epilogue makes of the products, or the only product, in a dtype that the kernel writes."""
    w, *_ = weights
    *stack, m, k = x.codes.shape
    size = blocks or default_blocks(m, w, Beside.of(len(weights), [a.shape for a in others]))
    packed = [Packed.of(w, layer, len(stack), w.order) for w, layer in zip(weights, layers, strict=True)]
    zeros = x.zero is not None, w.scales.zero is not None
    product = Product(m, k, w.spec.format, w.order, w.group_size, *zeros, size, len(weights), epilogue)
    merged = Activation(x.codes.reshape(-1, m, k), x.scale, x.zero)
    out = tpu_kernel.call(product, merged, packed, others, w.layout.n, out_dtype, interpret)
    return out.reshape(*stack, m, w.layout.n)
