"""`quantized_matmul` on NVIDIA GPUs before and after Hopper: a Pallas kernel for Triton, on words in either order.

One program of the grid makes a tile of the result, or of one of the parts that what is contracted is split into where
tiles are few. Words are unpacked as integers, multiplied as exact bfloat16 or float16 codes with zero points taken off,
and scales go into the float32 sums of each group: weights are not rounded at all, other than the values of a codebook.
Edges are masked. The layer of a scanned stack is an operand that offsets the loads, so that nothing is sliced.

**Formats.** int4, int8, codebooks of 4 bits (NF4, fp4) and floats of 8 bits, these from compute capability 8.9 on,
which has an instruction that converts them. Values of a codebook are read from a table that stays in the first cache:
with NF4 a warp on Ampere has 258 instructions for 64 x 64 weights and 16 rows of x, and 247 with int4 (what jax 0.10.2
makes, `scripts/gpu/gpu_compile.py`).

**The transposed product**, the gradient in x, contracts N. Scales differ along it, so they go into x, a tile of which
is smaller than one of the weight; that product is rounded to the type of the operands. Each tile along K lies in one
group.

**Epilogues.** Products of one x with two weights that are packed alike share its tiles, and what a program does with
the results (`pallas_kernels.backends.epilogue`) is done to finished sums in registers; to sums that are finished
outside of the kernel, those of splits and of float32 in halves, it is done there. `max` and `min` of Triton give the
number where one operand is NaN.

Triton carries the unpacked tile through shared memory, and takes `wgmma` for tiles of many rows only: on Hopper this
is the kernel for what `ops.matmul.mosaic` does not take. Pallas will lose its Triton backend in a version of JAX that
is not named yet, and products run on the reference then; `compiler_params` says which backend is meant, as the default
has changed between versions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.core import primitives as prims
from jaxtyping import Array, Float, Int, Num

from qjax.pallas_kernels.backends import gpu_operands, triton
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.triton import Blocks, pltriton
from qjax.pallas_kernels.backends.triton_operands import Packed, Weight, beside
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.ops.matmul import reference
from qjax.pallas_kernels.packed.qtensor import QTensor


def matmul(
    x: Float[Array, "*stack M _"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M _"]:
    """What `reference.matmul` computes, up to rounding; the reference itself where `unsupported` says why.

    Args:
        x, w, layer, casts, precision, preferred_element_type, transpose: as for the reference.
        blocks: how to cut the product, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform.

    Raises:
        ValueError: `blocks` cuts a group.
    """
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    how: dict[str, Any] = {"casts": casts, "precision": precision, "preferred_element_type": preferred_element_type}
    if unsupported(x, w, casts, out_dtype, precision=precision, transpose=transpose):
        return reference.matmul(x, w, layer=layer, transpose=transpose, **how)
    return fused_matmul(x, [w], [], layers=[layer], transpose=transpose, blocks=blocks, interpret=interpret, **how)


def fused_matmul(
    x: Float[Array, "*stack M _"],
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    epilogue: Epilogue | None = None,
    transpose: bool = False,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M _"]:
    """The epilogue of the products of x with one or two weights, in one kernel.

    Args:
        x, casts, precision, preferred_element_type, transpose, blocks, interpret: as for `matmul`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products, none that is `unsupported_epilogue`; None for the product of a single
            one.

    Raises:
        ValueError: `blocks` cuts a group.
    """
    w, *_ = weights
    out_dtype = epilogue.out_dtype if epilogue else reference.result_dtype(x, w, casts, preferred_element_type)
    *stack, m, inner = x.shape
    k, n = w.layout.k, w.layout.n
    x = gpu_operands.split(x.reshape(-1, m, inner), gpu_operands.operand_dtype(x.dtype, (w.dtype, *casts)))
    batch, rows, _ = x.shape
    blocks = blocks or default_blocks(rows, k, n, w.group_size, batch=batch, transpose=transpose, weights=len(weights))
    if w.group_size != k and w.group_size % blocks.k:
        raise ValueError(f"qjax: {blocks}: the size {w.group_size} of a group must be a multiple of k.")
    finished = rows == m and blocks.splits == 1  # sums are whole in the kernel
    inside = epilogue if finished else None
    kept = out_dtype if finished else jnp.dtype(jnp.float32)
    product = Product(k, n, w.spec.format, w.group_size, w.order, transpose, kept, blocks, len(weights), inside)
    packed = [Packed.of(w, layer) for w, layer in zip(weights, layers, strict=True)]
    results = _call(product, x, packed, others if inside else [], interpret)
    (out,) = gpu_operands.finished(results, m, None if inside else epilogue, others)
    return out.reshape(*stack, m, out.shape[-1]).astype(out_dtype)


def unsupported(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, *, precision: Any = None, transpose: bool = False
) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape and a dtype."""
    if reason := gpu_operands.unsupported(x, w, casts, out_dtype, precision):
        return reason
    if pltriton is None:
        return "this version of JAX has no Triton"
    if w.spec.format.kind == "float" and (chip := gpu_chips.target()) is not None and chip.capability < 89:
        return "GPUs before compute capability 8.9 do not convert floats of 8 bits"
    if w.group_size != w.layout.k and w.group_size % _LEAST_K:
        return f"the size of a group must be a multiple of {_LEAST_K}"
    return triton.unaddressable(w.words)


_MISSING = {prims.erf_p}  # of the operations of an epilogue, those that Triton lacks


def unsupported_epilogue(epilogue: Epilogue) -> str | None:
    """Why the kernel does not apply an epilogue, or None."""
    return gpu_operands.unsupported_epilogue(epilogue, _MISSING, "Triton")


_LEAST_K, _MOST_K = 32, 64

_FEW_M = 16  # rows of a tile up to which `triton.unpack` is shorter than `spread`


def default_blocks(
    m: int, k: int, n: int, group: int, *, batch: int = 1, transpose: bool = False, weights: int = 1
) -> Blocks:
    """Tiles by shape alone: tall ones for many rows of x, enough programs for every multiprocessor. Nothing was timed.

    Args:
        m: rows of x.
        k, n: sizes of the weight's matrix.
        group: values that share a scale, k if all of K does.
        batch: products of this size.
        transpose: whether N is contracted.
        weights: how many are multiplied with a tile of x.
    """
    rows = min(128 // weights, max(16, pl.next_power_of_2(m)))
    depth = _MOST_K if group == k or group % _MOST_K == 0 else _LEAST_K
    columns = min(64 if rows == 16 or transpose else 128, max(16, pl.next_power_of_2(n)))
    (produced, tile), (contracted, step) = ((k, depth), (n, columns)) if transpose else ((n, columns), (k, depth))
    tiles = batch * pl.cdiv(m, rows) * pl.cdiv(produced, tile)
    splits = triton.splits_of(contracted, step, tiles)
    return Blocks(m=rows, n=columns, k=depth, splits=splits, warps=8 if rows * tile >= 128 * 128 else 4, stages=4)


@dataclasses.dataclass(frozen=True)
class Product:
    """What the kernel has to know beside its operands.

    Attributes:
        k, n: sizes of the weight's matrix.
        format, group, order: of the weights.
        transpose: whether N is contracted.
        out_dtype: of what is written.
        blocks: how it is cut.
        weights: how many are multiplied.
        epilogue: what is made of the sums in the kernel, if not the results themselves.
    """

    k: int
    n: int
    format: Format
    group: int
    order: str
    transpose: bool
    out_dtype: Any
    blocks: Blocks
    weights: int
    epilogue: Epilogue | None

    @property
    def contracted(self) -> tuple[int, int]:
        """Size of the axis that the dot sums over, and of its tiles."""
        return (self.n, self.blocks.n) if self.transpose else (self.k, self.blocks.k)

    @property
    def produced(self) -> tuple[int, int]:
        """Size of the other axis of the weight, and of its tiles."""
        return (self.k, self.blocks.k) if self.transpose else (self.n, self.blocks.n)


def _call(
    product: Product,
    x: Float[Array, "B M _"],
    weights: Sequence[Packed],
    others: Sequence[Array],
    interpret: bool,
) -> list[Float[Array, "splits B M _"]]:
    """What is made of the products with each matrix of one layer of the stack, in parts of what is contracted."""
    blocks, (stack, m, _), (size, tile) = product.blocks, x.shape, product.produced
    table = [jnp.asarray(product.format.values, x.dtype)] if product.format.values else []
    operands = [x, *table, *itertools.chain(*(w.arrays for w in weights)), *others]
    shape = jax.ShapeDtypeStruct((blocks.splits, stack, m, size), product.out_dtype)
    count = 1 if product.epilogue else product.weights
    return triton.launch(
        functools.partial(_kernel, product, len(weights[0].arrays), len(others)),
        operands,
        out_shape=[shape] * count,
        grid=(pl.cdiv(size, tile), pl.cdiv(m, blocks.m), stack * blocks.splits),
        blocks=blocks,
        name="fused_matmul" if product.epilogue else "quantized_matmul",
        interpret=interpret,
    )


def _kernel(product: Product, arrays: int, others: int, x_ref: Any, *refs: Any) -> None:
    """A tile of the result.

    Args:
        product: what is computed.
        arrays: of each weight.
        others: other operands of the epilogue.
        x_ref: x.
        refs: values of a codebook; index of the layer, words, scales, and zero points where there are some, of each
            weight; other operands; the results.
    """
    rest = iter(refs)
    table = next(rest) if product.format.values else None
    weights = [list(itertools.islice(rest, arrays)) for _ in range(product.weights)]
    other_refs, out_refs = list(itertools.islice(rest, others)), list(rest)
    blocks, stack, height = product.blocks, x_ref.shape[0], x_ref.shape[1]
    (inner, inner_tile), (outer, outer_tile) = product.contracted, product.produced
    matrix, part = lax.rem(pl.program_id(2), stack), lax.div(pl.program_id(2), stack)
    rows = pl.program_id(1) * blocks.m + jnp.arange(blocks.m)
    first = pl.program_id(0) * outer_tile
    produced = first + jnp.arange(outer_tile)
    steps = pl.cdiv(pl.cdiv(inner, inner_tile), blocks.splits)

    each = [Tiles(product, Weight.of(refs, matrix, stack, product.n, product.order), table) for refs in weights]

    def step(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        start = (part * steps + i) * inner_tile
        along = start + jnp.arange(inner_tile)
        x = pltriton.load(
            x_ref.at[matrix, rows[:, None], along[None, :]],
            mask=(rows[:, None] < height) & (along[None, :] < inner),
            other=0,
        )
        k, n = (first, along) if product.transpose else (start, produced)
        return tuple(total + own.product_with(x, k, n) for total, own in zip(sums, each, strict=True))

    zeros = jnp.zeros((blocks.m, outer_tile), jnp.float32)
    sums = lax.fori_loop(0, steps, step, (zeros,) * product.weights)
    results = [own.finished(total, produced) for own, total in zip(each, sums, strict=True)]

    if product.epilogue:
        read = [beside(ref, matrix, rows, produced, (height, outer)) for ref in other_refs]
        results = [product.epilogue(results, read)]
    for out_ref, result in zip(out_refs, results, strict=True):
        pltriton.store(
            out_ref.at[part, matrix, rows[:, None], produced[None, :]],
            result.astype(product.out_dtype),
            mask=(rows[:, None] < height) & (produced[None, :] < outer),
        )


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of a weight in global memory.

    Attributes:
        product: what is computed.
        weight: its arrays.
        table: reference to the values of a codebook, or None.
    """

    product: Product
    weight: Weight
    table: Any

    def product_with(self, x: Float[Array, "M _"], k: Any, n: Int[Array, " N"]) -> Float[Array, "M _"]:
        """What a tile that starts at k, with these columns, adds to the sums; one scale for all of K is left out."""
        group = 0 if self.product.group == self.product.k else lax.div(k, self.product.group)
        codes = self._codes(k, n, x.dtype)
        if self.weight.zeros is not None:
            codes -= self._small(self.weight.zeros, group, n).astype(x.dtype)[None, :]
        scale = self._small(self.weight.scales, group, n).astype(jnp.float32)[None, :]
        if self.product.transpose:
            return pltriton.dot((x.astype(jnp.float32) * scale).astype(x.dtype), codes.T)
        added = pltriton.dot(x, codes)
        return added if self.product.group == self.product.k else added * scale

    def finished(self, sums: Float[Array, "M _"], produced: Int[Array, " _"]) -> Float[Array, "M _"]:
        """The sums with the scale that `product_with` left out."""
        if self.product.transpose or self.product.group != self.product.k:
            return sums
        return sums * self._small(self.weight.scales, 0, produced).astype(jnp.float32)[None, :]

    def _small(self, ref: Any, group: Any, n: Int[Array, " N"]) -> Num[Array, " N"]:
        """Scales or zero points of a group, the last one beyond it, by column."""
        last = ref.shape[-2 if self.product.order == "kn" else -1] - 1
        return self.weight.of_group(ref, jnp.minimum(group, last), n)

    def _codes(self, k: Any, n: Int[Array, " N"], dtype: Any) -> Float[Array, "K N"]:
        """Unscaled values; finite ones beyond the matrix."""
        product, kn = self.product, self.product.order == "kn"
        words = self.weight.words_of(k, product.blocks.k, n, 8 if product.format.bits == 4 else 1)
        if product.format.bits == 8:
            return (words if kn else words.T).astype(dtype)
        if self.table is not None:
            return pltriton.load(self.table.at[triton.spread(words if kn else words.T) & 15])
        if product.blocks.m > _FEW_M and not product.transpose:
            return triton.spread(words if kn else words.T).astype(dtype)
        return triton.unpack(words.T if kn else words, 4).T.astype(dtype)
