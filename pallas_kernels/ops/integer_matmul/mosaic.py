"""`integer_matmul` on NVIDIA Hopper: int8 codes times int8 or int4 codes, by a Mosaic GPU kernel, bit for bit.

What is computed is `out.T = w.T @ x.T`, as in `ops.matmul.mosaic`: `wgmma` multiplies 64 columns of the weight with up
to 256 rows of x, s8 times s8 into s32. For 8 bit operands it wants K contiguous in both, which is order "nk"
(`qtensor.reorder`). int8 codes are multiplied from shared memory, where TMA puts them; int4 codes go to registers, are
widened to int8 there, and are multiplied from registers.

**Epilogues.** As in `ops.matmul.mosaic`, for products with one weight, and with two that have one scale for a column.
Mosaic GPU does not write a tile of bytes that is transposed, so codes of the next product's x are made by XLA.

**Edges.** As in `ops.matmul.mosaic`: TMA reads zeros beyond the end and writes nothing there; K and N are multiples of
64, and x gets rows up to a multiple of 8. The last tile along N is moved back to end with the matrix.

Nothing here has run on a GPU: the kernel was interpreted, and compiled for sm_90a.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Int8

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.mosaic import WGMMA_ROWS, whole_rows
from qjax.pallas_kernels.backends.mosaic_blocks import Blocks
from qjax.pallas_kernels.backends.mosaic_epilogue import Beside, as_read
from qjax.pallas_kernels.backends.mosaic_operands import Packed
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.ops.integer_matmul import gpu_operands, mosaic_kernel
from qjax.pallas_kernels.ops.integer_matmul.mosaic_product import Product
from qjax.pallas_kernels.ops.integer_matmul.mosaic_tiles import MOST_K, ONES, PART, check, default_blocks
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.packed.qtensor import QTensor


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
        x, scale, zero, w, layer, out_dtype: as for `integer_matmul`.
        blocks: how to cut the product, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform; jax 0.11 or newer.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    how: dict[str, Any] = {"blocks": blocks, "interpret": interpret}
    return _multiplied(Activation(x, scale, zero), [w], [], [layer], None, jnp.dtype(out_dtype), **how)


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
    """The epilogue of the products of x with one or two weights; see "Epilogues" above.

    Args:
        x: codes `(*stack, M, K)`, with scales and zero points `(*stack, M, 1)`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products, none that is `unsupported_epilogue`.
        blocks, interpret: as for `matmul`.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    inside = dataclasses.replace(epilogue, codes=None)
    out = _multiplied(x, weights, others, layers, inside, inside.out_dtype, blocks=blocks, interpret=interpret)
    if epilogue.codes is None:
        return out
    *stack, m, n = out.shape
    return epilogue.encoded(out.reshape(-1, m, n).astype(jnp.float32), others).reshape(*stack, m, n)


def _multiplied(
    x: Activation,
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    layers: Sequence[Int[Array, ""] | int | None],
    epilogue: Epilogue | None,
    out_dtype: jnp.dtype,
    *,
    blocks: Blocks | None,
    interpret: bool,
) -> Float[Array, "*stack M N"]:
    """What the epilogue makes of the products, or the only product, in this dtype."""
    w, *_ = weights
    *stack, m, k = x.codes.shape
    n, group = w.layout.n, w.group_size
    batch = math.prod(stack)
    rows = whole_rows(m)
    ones = 0 if x.zero is None else ONES
    beside = Beside.of(len(weights), others)
    blocks = blocks or default_blocks(rows, w, ones=ones, batch=batch, beside=beside)
    check(blocks, w, ones, beside)
    whole = blocks.splits == 1
    kept, inside = (out_dtype, epilogue) if whole else (jnp.dtype(jnp.int32), None)
    beside = beside if whole else Beside(len(weights))
    product = Product(rows, k, n, w.spec.format.bits, group, kept, blocks, ones, beside, inside)
    codes = jnp.pad(x.codes.reshape(batch, m, k), ((0, 0), (0, rows - m), (0, 0)))
    beyond = pl.cdiv(rows, blocks.m) * blocks.m - m

    def by_row(a: Array, dtype: Any) -> Array:
        """One number for each row, and for those that fill the last tile: `(B, rows)`."""
        return jnp.pad(a.reshape(batch, m), ((0, 0), (0, beyond))).astype(dtype)

    of_x, sums = {"x": codes, "scale": by_row(x.scale, jnp.float32)}, None
    if x.zero is not None:
        of_x["zero"] = by_row(x.zero, jnp.int32)
        of_x["ones"] = jnp.ones((ONES, blocks.k), jnp.int8)
    if w.scales.zero is not None:
        zero = None if x.zero is None else x.zero.reshape(batch, m, 1)
        sums = gpu_operands.row_sums(codes[:, :m], zero, group)
        if whole:
            of_x["sums"] = jnp.pad(sums, ((0, 0), (0, 0), (0, beyond)))
    packed = [Packed.of(w, layer, zeros=whole) for w, layer in zip(weights, layers, strict=True)]
    read = [as_read(a, blocks.m) for a in others] if inside else []
    results = [out[..., :m, :] for out in mosaic_kernel.call(product, of_x, packed, read, interpret)]
    if whole:
        return results[0][0].reshape(*stack, m, n)
    return gpu_operands.finish_parts(results, x.scale, sums, weights, layers, others, epilogue, out_dtype)


def unsupported(x: Any, w: QTensor, out_dtype: Any) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape."""
    group, k = w.group_size, w.layout.k
    if reason := gpu_operands.unsupported(x, w, out_dtype):
        return reason
    if w.order != "nk":
        return 'the words of a column do not lie together: `reorder(w, "nk")` once, when the model is loaded'
    if w.layout.n % WGMMA_ROWS or k % 64:
        return f"N must be a multiple of {WGMMA_ROWS}, and K of 64"
    if group != k and (group % 64 or math.lcm(group, PART) > MOST_K):
        return f"the size of a group must be a multiple of 64, and its multiples of {PART} at most {MOST_K}"
    return None


def unsupported_epilogue(epilogue: Epilogue, w: QTensor) -> str | None:
    """Why the kernel does not apply an epilogue to products with weights like this one, or None."""
    if epilogue.products > 1 and w.group_size != w.layout.k:
        return "two sums over groups and those of a group do not fit into registers"
    return matmul_mosaic.unsupported_epilogue(epilogue)
