"""`quantized_matmul` on NVIDIA Hopper: a Mosaic GPU kernel that unpacks words in registers, and multiplies from there.

What is computed is `out.T = w.T @ x.T`, because the left operand of `wgmma` may come from registers: packed codes of 4
or 8 bits go from shared memory to registers, become bfloat16 or float16 there, are scaled there, and are multiplied. So
K has to lie contiguous in the words: order "nk" (`qtensor.reorder`), made when a model is loaded. No other order is
taken: to transpose words in every call would cost more than the product. Nor is N contracted.

**Formats.** int4, int8, codebooks of 4 bits (NF4, fp4: `mosaic_tile`) and floats of 8 bits. For 64 x 128 weights in
groups of 64 a warp has 264 instructions with int4 and 397 with NF4, in groups of 128 it has 288 with fp8 (what jax
0.10.2 makes, `scripts/gpu/gpu_compile.py`). To read as many bfloat16 weights from memory takes an H100 some 1260
clocks.

**Edges.** TMA reads zeros beyond the end of an array and writes nothing there, which is all that M and K need, where
its own tiles cut them: K and N have to be multiples of 64, and x gets rows up to a multiple of 8. The last tile along N
is moved back to end with the matrix: some columns are computed twice, to the same bits.

**Epilogues.** Products of one x with two weights that are packed alike, a gate and what it gates, share tiles of x;
each has sums of its own, so that tiles are half as high. What a program does with the results
(`pallas_kernels.backends.epilogue`) is done to finished sums in registers, a strip of rows at a time. Vectors that it
reads come from global memory; arrays of the size of the result (a residual connection) by TMA, two strips ahead, the
first ones while all is multiplied. Sums that are finished outside of the kernel, those of splits and of float32 in
halves, get their epilogue there, in the XLA operation that adds them up.

**Joint products.** Several weights of one K and format are multiplied in one launch: tiles along N run over all of
them. The program of a tile is there once for each weight, so that each address is known.

**Precision.** Sums are float32, operands what `gpu_operands` says. A weight with a scale for each group is rounded to
the type of the product; a scale of another type is rounded to it before. From `reference.matmul`, a result differs by
at most 2 eps of that type of what is multiplied in each product, as `2 * eps * (abs(x) @ abs(w))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.backends import gpu_operands
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.mosaic import WGMMA_ROWS
from qjax.pallas_kernels.backends.mosaic_blocks import Blocks
from qjax.pallas_kernels.backends.mosaic_epilogue import Beside, as_read, whole_tiles
from qjax.pallas_kernels.backends.mosaic_operands import Packed
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.ops.matmul import mosaic_kernel, reference
from qjax.pallas_kernels.ops.matmul.mosaic_product import Product
from qjax.pallas_kernels.ops.matmul.mosaic_tiles import CHUNKS, check, default_blocks
from qjax.pallas_kernels.packed.qtensor import QTensor


def matmul(
    x: Float[Array, "*stack M K"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M N"]:
    """What `reference.matmul` computes, up to rounding; the reference itself where `unsupported` says why.

    Args:
        x, w, layer, casts, precision, preferred_element_type, transpose: as for the reference.
        blocks: how to cut the product, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform; jax 0.11 or newer.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    if unsupported(x, w, casts, out_dtype, precision=precision, transpose=transpose):
        return reference.matmul(
            x,
            w,
            layer=layer,
            casts=casts,
            precision=precision,
            preferred_element_type=preferred_element_type,
            transpose=transpose,
        )
    (out,) = _multiplied(
        x,
        [[w]],
        [[layer]],
        [],
        None,
        operand=gpu_operands.operand_dtype(x.dtype, (w.dtype, *casts)),
        out_dtype=out_dtype,
        blocks=blocks,
        interpret=interpret,
    )
    return out


def fused_matmul(
    x: Float[Array, "*stack M K"],
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    epilogue: Epilogue,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M N"]:
    """The epilogue of the products of x with one or two weights, in one kernel; see "Epilogues" above.

    Args:
        x, casts, precision, preferred_element_type, blocks, interpret: as for `matmul`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products, none that is `unsupported_epilogue`.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    operand = gpu_operands.operand_dtype(x.dtype, (weights[0].dtype, *casts))
    (out,) = _multiplied(
        x,
        [weights],
        [layers],
        others,
        epilogue,
        operand=operand,
        out_dtype=epilogue.out_dtype,
        blocks=blocks,
        interpret=interpret,
    )
    return out


def joint_matmul(
    x: Float[Array, "*stack M K"],
    weights: Sequence[QTensor],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> list[Float[Array, "*stack M _"]]:
    """The products of x with several weights, in one kernel: queries, keys and values, say.

    Few columns give few tiles, and each launch waits for the last of them; tiles of all weights share one launch.

    Args:
        x, casts, precision, preferred_element_type, blocks, interpret: as for `matmul`.
        weights: of one K, format, group and dtype, of any N; none that is `unsupported`.
        layers: for each weight, as for `matmul`.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    return _multiplied(
        x,
        [[w] for w in weights],
        [[layer] for layer in layers],
        [],
        None,
        operand=gpu_operands.operand_dtype(x.dtype, (weights[0].dtype, *casts)),
        out_dtype=reference.result_dtype(x, weights[0], casts, preferred_element_type),
        blocks=blocks,
        interpret=interpret,
    )


def _multiplied(
    x: Float[Array, "*stack M K"],
    panels: Sequence[Sequence[QTensor]],
    layers: Sequence[Sequence[Int[Array, ""] | int | None]],
    others: Sequence[Float[Array, "_ _ _"]],
    epilogue: Epilogue | None,
    *,
    operand: jnp.dtype,
    out_dtype: jnp.dtype,
    blocks: Blocks | None,
    interpret: bool,
) -> list[Float[Array, "*stack M _"]]:
    """A result for each panel: the product with its only weight, or the epilogue of those with all of its weights.

    Args:
        x, others, epilogue, blocks, interpret: as for `fused_matmul`.
        panels: weights whose products lie side by side in the grid; those of one panel share tiles.
        layers: as for `fused_matmul`, for each weight.
        operand: of the dot.
        out_dtype: of the results.
    """
    *stack, m, k = x.shape
    w, count, widths = panels[0][0], len(panels[0]), tuple(panel[0].layout.n for panel in panels)
    bits = w.spec.format.bits
    x = gpu_operands.split(x.reshape(-1, m, k), operand)
    rows = x.shape[1]
    x = whole_tiles(x)
    if blocks is None and widths == (w.layout.n,) and count == 1:
        entry = gpu_chips.lookup(rows, k, w.layout.n, w.spec, x.dtype)
        blocks = Blocks(**entry) if entry else None
    beside = Beside.of(count, others)
    how: dict[str, Any] = {"kind": w.spec.format.kind, "out_dtype": out_dtype, "narrowest": min(widths)}
    blocks = blocks or default_blocks(rows, k, sum(widths), bits, batch=x.shape[0], beside=beside, **how)
    finished = rows == m and blocks.splits == 1  # sums are whole in the kernel
    inside = epilogue if finished else None
    kept = out_dtype if finished else jnp.dtype(jnp.float32)
    beside = beside if finished else Beside(count)
    check(blocks, min(widths), bits, kept, beside)
    product = Product(x.shape[1], k, widths, w.spec.format, w.group_size, operand, kept, blocks, beside, inside)
    packed = [
        [Packed.of(w, layer) for w, layer in zip(*each, strict=True)] for each in zip(panels, layers, strict=True)
    ]
    results = mosaic_kernel.call(
        product, x, packed, [as_read(a, blocks.m) for a in others] if inside else [], interpret
    )
    results = gpu_operands.finished([a[:, :, :rows] for a in results], m, None if inside else epilogue, others)
    return [a.reshape(*stack, m, a.shape[-1]).astype(out_dtype) for a in results]


def unsupported(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, *, precision: Any = None, transpose: bool = False
) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape and a dtype."""
    if reason := gpu_operands.unsupported(x, w, casts, out_dtype, precision):
        return reason
    if transpose:
        return "this kernel contracts K"
    if w.order != "nk":
        return 'the words of a column do not lie together: `reorder(w, "nk")` once, when the model is loaded'
    if w.layout.n % WGMMA_ROWS or w.layout.k % CHUNKS[0]:
        return f"N must be a multiple of {WGMMA_ROWS}, and K of {CHUNKS[0]}"
    if w.group_size != w.layout.k and w.group_size % CHUNKS[-1]:
        return f"the size of a group must be a multiple of {CHUNKS[-1]}"
    return None


_MISSING = {prims.sqrt_p, prims.log1p_p}  # of the operations of an epilogue, those that Mosaic GPU of jax 0.10 lacks


def unsupported_epilogue(epilogue: Epilogue) -> str | None:
    """Why the kernel does not apply an epilogue, or None."""
    return gpu_operands.unsupported_epilogue(epilogue, _MISSING, "Mosaic GPU")
