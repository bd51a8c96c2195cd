"""`integer_matmul` on NVIDIA GPUs before and after Hopper: a Pallas kernel for Triton, bit for bit.

One program of the grid makes a tile of the result: int8 codes times int8 codes, or int4 ones that become int8 in
registers, by `mma` into s32. With one scale for a column, all of K is added up in s32 and scaled once; where tiles are
few, K is split among programs, and XLA adds up the parts. With groups, each is added up in s32, scaled, and added to a
float32 sum, in ascending order. Zero points of x need the sums of the columns of the weight: a product with 16 rows of
ones. Edges are masked, and the layer of a scanned stack is an operand that offsets the loads.

On Hopper this is the kernel for what `integer_matmul_mosaic_gpu` does not take; `matmul_triton` says more on Triton's
place there and in versions of JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Int8, Int32

from pallas_kernels import integer_operands_gpu, tile_triton
from pallas_kernels.exact import finite
from pallas_kernels.integer_matmul_cpu import rescale
from pallas_kernels.qtensor import QTensor

pltriton: Any
try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:
    pltriton = None

_ONES = 16  # rows of ones: the least that is multiplied with


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut; powers of two, but `splits`.

    Attributes:
        m: rows of x in a tile, at least 16.
        n: columns of the weight in a tile, at least 16.
        k: how much of K is multiplied at a time, at least 32; the size of a group is a multiple of it.
        splits: parts that K is cut into, for different programs; 1 with groups.
        warps: of a program.
        stages: tiles that are loaded ahead.
    """

    m: int
    n: int
    k: int
    splits: int
    warps: int
    stages: int


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
    """What `integer_matmul.matmul_reference` computes, bit for bit; `unsupported` must have nothing against it.

    Args:
        x, scale, zero, w, layer, out_dtype: as for `integer_matmul`.
        blocks: how to cut the product, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform.

    Raises:
        ValueError: `blocks` cuts groups.
    """
    *stack, m, k = x.shape
    n, group = w.layout.n, w.group_size
    batch = math.prod(stack)
    blocks = blocks or default_blocks(m, w, batch=batch)
    if group != k and (group % blocks.k or blocks.splits > 1):
        raise ValueError(f"qjax: {blocks}: the size {group} of a group must be a multiple of k, and splits 1.")
    codes = x.reshape(batch, m, k)
    operands = {
        "layer": jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), 1),
        "x": codes,
        "words": w.words.reshape(-1, *w.words.shape[-2:]),
        "values": w.scales.values.reshape(-1, *w.scales.values.shape[-2:]),
        "scale": scale.reshape(batch, m),
    }
    if zero is not None:
        operands["zero"] = zero.reshape(batch, m)
    sums = None
    if w.scales.zero is not None:
        sums = integer_operands_gpu.row_sums(codes, None if zero is None else zero.reshape(batch, m, 1), group)
        if blocks.splits == 1:
            operands["sums"] = sums
            operands["weight_zero"] = w.scales.zero.reshape(-1, *w.scales.zero.shape[-2:])
    kept = jnp.dtype(out_dtype) if blocks.splits == 1 else jnp.dtype(jnp.int32)
    product = _Product(k, n, w.spec.format.bits, group, w.order, kept, blocks)
    out = _call(product, operands, interpret)
    if blocks.splits == 1:
        return out[0].reshape(*stack, m, n)
    return integer_operands_gpu.rescale_parts(out, scale, sums, w, layer, out_dtype)


def unsupported(x: Any, w: QTensor, out_dtype: Any) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape."""
    if reason := integer_operands_gpu.unsupported(x, w, out_dtype):
        return reason
    if pltriton is None:
        return "this version of JAX has no Triton"
    if w.group_size != w.layout.k and w.group_size % _LEAST_K:
        return f"the size of a group must be a multiple of {_LEAST_K}"
    return tile_triton.unaddressable(w.words)


_LEAST_K, _MOST_K = 32, 128
_PROCESSORS = 108  # streaming multiprocessors of an NVIDIA A100


def default_blocks(m: int, w: QTensor, *, batch: int = 1) -> Blocks:
    """Tiles by shape alone: tall ones for many rows of x, enough programs for every multiprocessor. Nothing was timed.

    Args:
        m: rows of x.
        w: the weight.
        batch: products of this size.
    """
    k, n, group = w.layout.k, w.layout.n, w.group_size
    rows = min(128, max(16, pl.next_power_of_2(m)))
    columns = min(128 if rows > 16 else 64, max(16, pl.next_power_of_2(n)))
    depth = _MOST_K if group == k else min(_MOST_K, group & -group)
    splits = 1
    if group == k:
        tiles = batch * pl.cdiv(m, rows) * pl.cdiv(n, columns)
        splits = max(1, min(2 * _PROCESSORS // tiles, pl.cdiv(k, 8 * depth), 16))
    return Blocks(m=rows, n=columns, k=depth, splits=splits, warps=8 if rows * columns >= 128 * 128 else 4, stages=3)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What the kernel has to know beside its operands."""

    k: int
    n: int
    bits: int
    group: int
    order: str
    out_dtype: jnp.dtype
    blocks: Blocks


def _call(product: _Product, operands: dict[str, Array], interpret: bool) -> Array:
    """The product with each matrix of one layer of the stack, `(splits, B, M, N)`: parts along K are int32 sums."""
    blocks, (stack, m, _) = product.blocks, operands["x"].shape
    return pl.pallas_call(
        functools.partial(_kernel, product, stack, tuple(operands)),
        out_shape=jax.ShapeDtypeStruct((blocks.splits, stack, m, product.n), product.out_dtype),
        grid=(pl.cdiv(product.n, blocks.n), pl.cdiv(m, blocks.m), stack * blocks.splits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(operands),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=pltriton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name="integer_matmul",
        interpret=interpret,
    )(*operands.values())


def _kernel(product: _Product, stack: int, names: tuple[str, ...], *refs: Any) -> None:
    """A tile of the result.

    Args:
        product: what is computed.
        stack: matrices of a layer.
        names: of the operands.
        refs: the operands and the result.
    """
    operands, out_ref = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    x_ref, w_ref = operands["x"], operands["words"]
    blocks, kn = product.blocks, product.order == "kn"
    per_word = 8 if product.bits == 4 else 1
    matrix, part = lax.rem(pl.program_id(2), stack), lax.div(pl.program_id(2), stack)
    layers = w_ref.shape[0] // stack
    layer = operands["layer"][0]
    layer = jnp.clip(jnp.where(layer < 0, layer + layers, layer), 0, layers - 1)  # as lax.dynamic_index_in_dim
    at = layer * stack + matrix
    rows = pl.program_id(1) * blocks.m + jnp.arange(blocks.m)
    columns = pl.program_id(0) * blocks.n + jnp.arange(blocks.n)
    in_rows, in_columns = rows < x_ref.shape[1], columns < product.n

    def small(name: str, group: Any) -> Array:
        """Scales or zero points of a group, by column."""
        ref, of = operands[name], columns
        if ref.shape[-1 if kn else -2] == 1:  # one for the whole matrix
            of = jnp.zeros_like(columns)
        return pltriton.load(ref.at[(at, group, of) if kn else (at, of, group)], mask=in_columns, other=0)

    def by_row(name: str, *index: Any) -> Array:
        return pltriton.load(operands[name].at[(matrix, *index, rows)], mask=in_rows, other=0)

    def multiply(first: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds what starts at `first` of K to sums of products and, where x has zero points, of columns."""
        ks = first + jnp.arange(blocks.k)
        x = pltriton.load(
            x_ref.at[matrix, rows[:, None], ks[None, :]], mask=in_rows[:, None] & (ks[None, :] < product.k), other=0
        )
        units = lax.div(first, per_word) + jnp.arange(blocks.k // per_word)
        across, along = (columns[None, :], units[:, None]) if kn else (columns[:, None], units[None, :])
        words = pltriton.load(
            w_ref.at[(at, along, across) if kn else (at, across, along)],
            mask=(across < product.n) & (along < w_ref.shape[-2 if kn else -1]),
            other=0,
        )
        codes = words
        if product.bits == 4:
            codes = tile_triton.unpack(words.T if kn else words, 4).astype(jnp.int8)
        if product.bits == 4 or not kn:
            codes = codes.T
        sums, *ones = carry
        sums += pltriton.dot(x, codes)
        if ones:
            ones = [ones[0] + pltriton.dot(jnp.ones((_ONES, blocks.k), jnp.int8), codes)]
        return sums, *ones

    nothing = (jnp.zeros((blocks.m, blocks.n), jnp.int32),)
    if "zero" in operands:
        nothing += (jnp.zeros((_ONES, blocks.n), jnp.int32),)

    def centred(carry: tuple[Array, ...], group: Any) -> Int32[Array, "m n"]:
        """The sums of products, zero points taken off: in parts of K, those of x only."""
        sums, *ones = carry
        if ones:
            sums -= by_row("zero").astype(jnp.int32)[:, None] * jnp.max(ones[0], axis=0)[None, :]
        if "weight_zero" in operands:
            sums -= by_row("sums", group)[:, None] * small("weight_zero", group).astype(jnp.int32)[None, :]
        return sums

    def scaled(carry: tuple[Array, ...], group: Any) -> Float[Array, "m n"]:
        """A group in float32: the clamp keeps the product from being fused with an addition."""
        return finite(centred(carry, group).astype(jnp.float32) * small("values", group).astype(jnp.float32)[None, :])

    if product.group == product.k:
        steps = pl.cdiv(pl.cdiv(product.k, blocks.k), blocks.splits)
        carry = lax.fori_loop(0, steps, lambda i, carry: multiply((part * steps + i) * blocks.k, carry), nothing)
        out = centred(carry, 0) if blocks.splits > 1 else scaled(carry, 0)
    else:
        steps = product.group // blocks.k

        def add_group(group: Any, total: Array) -> Array:
            first = group * product.group
            if steps == 1:
                carry = multiply(first, nothing)
            else:
                carry = lax.fori_loop(0, steps, lambda i, carry: multiply(first + i * blocks.k, carry), nothing)
            return total + scaled(carry, group)

        out = jnp.zeros((blocks.m, blocks.n), jnp.float32)
        out = lax.fori_loop(0, pl.cdiv(product.k, product.group), add_group, out)
    if blocks.splits == 1:
        out = rescale(out, by_row("scale")[:, None], product.out_dtype)
    pltriton.store(
        out_ref.at[part, matrix, rows[:, None], columns[None, :]], out, mask=in_rows[:, None] & in_columns[None, :]
    )
