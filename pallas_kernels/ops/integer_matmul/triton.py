"""`integer_matmul` on NVIDIA GPUs before and after Hopper: a Pallas kernel for Triton, bit for bit.

One program of the grid makes a tile of the result: int8 codes times int8 codes, or int4 ones that become int8 in
registers, by `mma` into s32. With one scale for a column, all of K is added up in s32 and scaled once; where tiles are
few, K is split among programs, and XLA adds up the parts. With groups, each is added up in s32, scaled, and added to a
float32 sum, in ascending order. Zero points of x need the sums of the columns of the weight: a product with 16 rows of
ones. Edges are masked, and the layer of a scanned stack is an operand that offsets the loads. Products of one x with
two weights share its tiles, and epilogues are what they are in `ops.matmul.triton`.

On Hopper this is the kernel for what `ops.integer_matmul.mosaic` does not take; `ops.matmul.triton` says more on
Triton's place there and in versions of JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Int8, Int32

from qjax.pallas_kernels.backends import triton
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.triton import Blocks, pltriton
from qjax.pallas_kernels.backends.triton_operands import Packed, Weight, beside
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.ops.integer_matmul import gpu_operands
from qjax.pallas_kernels.ops.integer_matmul.reference import rescale
from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
from qjax.pallas_kernels.packed.qtensor import QTensor

_ONES = 16  # rows of ones: the least that is multiplied with


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
        interpret: runs the kernel as XLA operations, on any platform.

    Raises:
        ValueError: `blocks` cuts groups.
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
    """The epilogue of the products of x with one or two weights, in one kernel; it starts from the bits of `matmul`.

    Args:
        x: codes `(*stack, M, K)`, with scales and zero points `(*stack, M, 1)`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products, none that is `unsupported_epilogue`.
        blocks, interpret: as for `matmul`.

    Raises:
        ValueError: `blocks` cuts groups.
    """
    return _multiplied(x, weights, others, layers, epilogue, epilogue.out_dtype, blocks=blocks, interpret=interpret)


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
) -> Array:
    """What the epilogue makes of the products, or the only product, in this dtype."""
    w, *_ = weights
    *stack, m, k = x.codes.shape
    n, group = w.layout.n, w.group_size
    batch = math.prod(stack)
    blocks = blocks or default_blocks(m, w, batch=batch, weights=len(weights))
    if group != k and (group % blocks.k or blocks.splits > 1):
        raise ValueError(f"qjax: {blocks}: the size {group} of a group must be a multiple of k, and splits 1.")
    whole = blocks.splits == 1
    codes = x.codes.reshape(batch, m, k)
    of_x, sums = {"x": codes, "scale": x.scale.reshape(batch, m)}, None
    if x.zero is not None:
        of_x["zero"] = x.zero.reshape(batch, m)
    if w.scales.zero is not None:
        sums = gpu_operands.row_sums(codes, None if x.zero is None else x.zero.reshape(batch, m, 1), group)
        if whole:
            of_x["sums"] = sums

    packed = [Packed.of(w, layer, zeros=whole) for w, layer in zip(weights, layers, strict=True)]
    kept, inside = (out_dtype, epilogue) if whole else (jnp.dtype(jnp.int32), None)
    product = _Product(k, n, w.spec.format.bits, group, w.order, kept, blocks, len(weights), inside)
    results = _call(product, of_x, packed, others if inside else [], interpret)
    if whole:
        return results[0][0].reshape(*stack, m, n)
    return gpu_operands.finish_parts(results, x.scale, sums, weights, layers, others, epilogue, out_dtype)


def unsupported(x: Any, w: QTensor, out_dtype: Any) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape."""
    if reason := gpu_operands.unsupported(x, w, out_dtype):
        return reason
    if pltriton is None:
        return "this version of JAX has no Triton"
    if w.group_size != w.layout.k and w.group_size % _LEAST_K:
        return f"the size of a group must be a multiple of {_LEAST_K}"
    return triton.unaddressable(w.words)


def unsupported_epilogue(epilogue: Epilogue, w: QTensor) -> str | None:
    """Why the kernel does not apply an epilogue to products with weights like this one, or None."""
    return matmul_triton.unsupported_epilogue(epilogue)


_LEAST_K, _MOST_K = 32, 128


def default_blocks(m: int, w: QTensor, *, batch: int = 1, weights: int = 1) -> Blocks:
    """Tiles by shape alone: tall ones for many rows of x, enough programs for every multiprocessor. Nothing was timed.

    Args:
        m: rows of x.
        w: the weight.
        batch: products of this size.
        weights: how many are multiplied with a tile of x.
    """
    k, n, group = w.layout.k, w.layout.n, w.group_size
    rows = min(128 // weights, max(16, pl.next_power_of_2(m)))
    wide = rows > 16 and (weights == 1 or group == k)  # a pair with groups has four arrays of sums in registers
    columns = min(128 if wide else 64, max(16, pl.next_power_of_2(n)))
    depth = _MOST_K if group == k else min(_MOST_K, group & -group)
    splits = 1
    if group == k:
        tiles = batch * pl.cdiv(m, rows) * pl.cdiv(n, columns)
        splits = triton.splits_of(k, depth, tiles)
    return Blocks(m=rows, n=columns, k=depth, splits=splits, warps=8 if rows * columns >= 128 * 128 else 4, stages=3)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What the kernel has to know beside its operands.

    Attributes:
        k, n: sizes of the weight's matrix.
        bits, group, order: of the weights.
        out_dtype: of what is written: int32 sums where K is split.
        blocks: how it is cut.
        weights: how many are multiplied.
        epilogue: what is made of the products in the kernel, if not the results themselves.
    """

    k: int
    n: int
    bits: int
    group: int
    order: str
    out_dtype: jnp.dtype
    blocks: Blocks
    weights: int
    epilogue: Epilogue | None


def _call(
    product: _Product,
    of_x: dict[str, Array],
    weights: Sequence[Packed],
    others: Sequence[Array],
    interpret: bool,
) -> list[Array]:
    """What is made of the products with each matrix of one layer of the stack, `(splits, B, M, N)` each."""
    blocks, (stack, m, _) = product.blocks, of_x["x"].shape
    operands = [*of_x.values(), *itertools.chain(*(w.arrays for w in weights)), *others]
    count = 1 if product.epilogue else product.weights
    return triton.launch(
        functools.partial(_kernel, product, tuple(of_x), len(weights[0].arrays), len(others)),
        operands,
        out_shape=[jax.ShapeDtypeStruct((blocks.splits, stack, m, product.n), product.out_dtype)] * count,
        grid=(pl.cdiv(product.n, blocks.n), pl.cdiv(m, blocks.m), stack * blocks.splits),
        blocks=blocks,
        name="fused_integer_matmul" if product.epilogue else "integer_matmul",
        interpret=interpret,
    )


def _kernel(product: _Product, of_x: tuple[str, ...], arrays: int, others: int, *all_refs: Any) -> None:
    """A tile of the result.

    Args:
        product: what is computed.
        of_x: names of the operands that belong to x.
        arrays: of each weight.
        others: other operands of the epilogue.
        all_refs: those of x, of each weight, and others; the results.
    """
    rest = iter(all_refs)
    refs = dict(zip(of_x, rest, strict=False))
    given = [list(itertools.islice(rest, arrays)) for _ in range(product.weights)]
    other_refs, out_refs = list(itertools.islice(rest, others)), list(rest)
    x_ref, blocks = refs["x"], product.blocks
    stack, height = x_ref.shape[0], x_ref.shape[1]
    matrix, part = lax.rem(pl.program_id(2), stack), lax.div(pl.program_id(2), stack)
    rows = pl.program_id(1) * blocks.m + jnp.arange(blocks.m)
    columns = pl.program_id(0) * blocks.n + jnp.arange(blocks.n)
    in_rows, in_columns = rows < height, columns < product.n
    weights = [_Tiles(product, Weight.of(own, matrix, stack, product.n, product.order), columns) for own in given]

    def by_row(name: str, *index: Any) -> Array:
        return pltriton.load(refs[name].at[(matrix, *index, rows)], mask=in_rows, other=0)

    def multiply(first: Any, carry: Sequence[tuple[Array, ...]]) -> list[tuple[Array, ...]]:
        """Adds what starts at `first` of K to sums of products and, where x has zero points, of columns."""
        ks = first + jnp.arange(blocks.k)
        x = pltriton.load(
            x_ref.at[matrix, rows[:, None], ks[None, :]], mask=in_rows[:, None] & (ks[None, :] < product.k), other=0
        )
        added = []
        for own, (sums, *ones) in zip(weights, carry, strict=True):
            codes = own.codes(first)
            sums += pltriton.dot(x, codes)
            if ones:
                ones = [ones[0] + pltriton.dot(jnp.ones((_ONES, blocks.k), jnp.int8), codes)]
            added.append((sums, *ones))
        return added

    nothing = (jnp.zeros((blocks.m, blocks.n), jnp.int32),)
    if "zero" in refs:
        nothing += (jnp.zeros((_ONES, blocks.n), jnp.int32),)
    nothings = [nothing] * product.weights

    def centred(own: _Tiles, carry: tuple[Array, ...], group: Any) -> Int32[Array, "m n"]:
        """The sums of products, zero points taken off: in parts of K, those of x only."""
        sums, *ones = carry
        if ones:
            sums -= by_row("zero").astype(jnp.int32)[:, None] * jnp.max(ones[0], axis=0)[None, :]
        if "sums" in refs:
            sums -= by_row("sums", group)[:, None] * own.small(own.weight.zeros, group).astype(jnp.int32)[None, :]
        return sums

    def scaled_sums(carries: Sequence[tuple[Array, ...]], group: Any) -> list[Float[Array, "m n"]]:
        """A group in float32: the clamp keeps the product from being fused with an addition."""
        scaled = []
        for own, carry in zip(weights, carries, strict=True):
            sums = centred(own, carry, group).astype(jnp.float32)
            scaled.append(finite(sums * own.small(own.weight.scales, group).astype(jnp.float32)[None, :]))
        return scaled

    if product.group == product.k:
        steps = pl.cdiv(pl.cdiv(product.k, blocks.k), blocks.splits)
        sums = lax.fori_loop(0, steps, lambda i, carry: multiply((part * steps + i) * blocks.k, carry), nothings)
        if blocks.splits > 1:
            results = [centred(own, carry, 0) for own, carry in zip(weights, sums, strict=True)]
        else:
            results = scaled_sums(sums, 0)
    else:
        steps = product.group // blocks.k

        def add_group(group: Any, totals: Sequence[Array]) -> list[Array]:
            first = group * product.group
            if steps == 1:
                sums = multiply(first, nothings)
            else:
                sums = lax.fori_loop(0, steps, lambda i, carry: multiply(first + i * blocks.k, carry), nothings)
            return [total + part for total, part in zip(totals, scaled_sums(sums, group), strict=True)]

        zeros = [jnp.zeros((blocks.m, blocks.n), jnp.float32)] * product.weights
        results = lax.fori_loop(0, pl.cdiv(product.k, product.group), add_group, zeros)
    if blocks.splits == 1:
        kept = jnp.float32 if product.epilogue else product.out_dtype
        results = [rescale(out, by_row("scale")[:, None], kept) for out in results]
    if product.epilogue:
        read = [beside(ref, matrix, rows, columns, (height, product.n)) for ref in other_refs]
        results = [product.epilogue(results, read)]
    for out_ref, out in zip(out_refs, results, strict=True):
        pltriton.store(
            out_ref.at[part, matrix, rows[:, None], columns[None, :]], out, mask=in_rows[:, None] & in_columns[None, :]
        )


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Tiles of a weight in global memory.

    Attributes:
        product: what is computed.
        weight: its arrays.
        columns: of the tile.
    """

    product: _Product
    weight: Weight
    columns: Int[Array, " n"]

    def small(self, ref: Any, group: Any) -> Array:
        """Scales or zero points of a group, by column."""
        return self.weight.of_group(ref, group, self.columns)

    def codes(self, first: Any) -> Int8[Array, "k n"]:
        """Those from `first` of K on."""
        product, kn = self.product, self.product.order == "kn"
        words = self.weight.words_of(first, product.blocks.k, self.columns, 8 if product.bits == 4 else 1)
        if product.bits == 4:
            return triton.unpack(words.T if kn else words, 4).astype(jnp.int8).T
        return words if kn else words.T
