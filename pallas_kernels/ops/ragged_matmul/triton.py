"""`quantized_ragged_matmul` on NVIDIA GPUs: a grouped product (MegaBlocks, Gale et al. 2022) as a kernel for Triton.

Rows of x come sorted by expert, and a visit is a tile of the rows of one expert, cut from its own first row on. XLA
lists the visits before the kernel runs (`plan_visits`): their number is only known then, so the grid has as many as
there can be, and those that are not needed end at once. Nothing is read of an expert without rows. Visits come first in
the grid, so that those of one expert read the same words at about the same time.

The words are those of the whole stack, and a visit finds its matrix by the indices of layer and expert: nothing is
sliced or copied. Tiles of the weight, formats, precision and the transposed product are those of `ops.matmul.triton`,
with what it says about Triton. It has run on no GPU yet, only interpreted on CPU and compiled; `ops.matmul.gpu` says
what follows from that.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Int32

from qjax.pallas_kernels.backends import gpu_operands, triton
from qjax.pallas_kernels.backends.triton import Blocks, pltriton
from qjax.pallas_kernels.backends.triton_operands import Packed, Weight
from qjax.pallas_kernels.ops.matmul import reference as matmul_reference
from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
from qjax.pallas_kernels.packed.qtensor import QTensor

_LEAST_M, _MOST_M = 16, 128  # rows of a tile


def unsupported(
    x: Any, w: QTensor, *, casts: tuple[Any, ...], precision: Any, preferred_element_type: Any, transpose: bool
) -> str | None:
    """Why a product is left to the reference, or None; x is anything with a shape and a dtype."""
    out_dtype = matmul_reference.result_dtype(x, w, casts, preferred_element_type)
    if reason := triton.unavailable():
        return reason
    return matmul_triton.unsupported(x, w, casts, out_dtype, precision=precision, transpose=transpose)


def matmul(
    x: Float[Array, "M _"],
    w: QTensor,
    group_sizes: Int32[Array, " E"],
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "M _"]:
    """What `reference.matmul` computes, up to rounding.

    Args:
        x, w, group_sizes, layer, casts, precision, preferred_element_type, transpose: as for the reference; there is
            no reason why they are `unsupported`.
        blocks: how to cut the product, if not as `default_blocks` says; `splits` is 1.
        interpret: runs the kernel as XLA operations, on any platform.

    Raises:
        ValueError: `blocks` cuts a group, or splits what is contracted.
    """
    out_dtype = matmul_reference.result_dtype(x, w, casts, preferred_element_type)
    m, experts = x.shape[0], group_sizes.shape[0]
    parts = gpu_operands.split(x[None], gpu_operands.operand_dtype(x.dtype, (w.dtype, *casts)))
    count = parts.shape[1] // m
    blocks = blocks or default_blocks(m, experts, w, count, transpose)
    if blocks.splits != 1 or (w.group_size != w.layout.k and w.group_size % blocks.k):
        raise ValueError(f"qjax: {blocks}: splits must be 1, and the size {w.group_size} of a group a multiple of k.")
    kept = out_dtype if count == 1 else jnp.dtype(jnp.float32)
    k, n = w.layout.k, w.layout.n
    product = matmul_triton.Product(k, n, w.spec.format, w.group_size, w.order, transpose, kept, blocks, 1, None)
    visits = plan_visits(group_sizes, m, blocks.m // count)
    out = _call(product, visits, parts[0], Packed.of(w, layer), experts, count, interpret)
    of_an_expert = lax.broadcasted_iota(jnp.int32, (m, 1), 0) < jnp.sum(group_sizes)
    return jnp.where(of_an_expert, gpu_operands.join(out[None], m)[0], 0).astype(out_dtype)


def default_blocks(m: int, experts: int, w: QTensor, parts: int, transpose: bool = False) -> Blocks:
    """Those of `ops.matmul.triton.default_blocks` for as many rows as an expert has on average.

    Args:
        m: rows of x.
        experts: how many there are.
        w: their weights.
        parts: numbers that are multiplied in place of one of x.
        transpose: as for `matmul`.
    """
    rows = min(_MOST_M, max(_LEAST_M, pl.next_power_of_2(parts * pl.cdiv(m, min(m, experts)))))
    blocks = matmul_triton.default_blocks(rows, w.layout.k, w.layout.n, w.group_size, transpose=transpose)
    return dataclasses.replace(blocks, m=rows, splits=1)


class Visits(NamedTuple):
    """Tiles of rows of one expert, in the order of the rows; those that are not needed have no row.

    Attributes:
        expert: whose words a visit reads.
        first: its first row.
        stop: the row after its last one.
    """

    expert: Int32[Array, " V"]
    first: Int32[Array, " V"]
    stop: Int32[Array, " V"]


def plan_visits(group_sizes: Int32[Array, " E"], m: int, rows: int) -> Visits:
    """All visits, and as many more as there can be.

    Sums over comparisons of all pairs, where cumulative sums, a search and gathers would be more kernels than the
    product is worth.

    Args:
        group_sizes: rows of each expert.
        m: rows of x.
        rows: of a tile.
    """
    expert = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)

    def before(counts: Int32[Array, " E"]) -> Int32[Array, " E"]:
        return jnp.sum(jnp.where(expert < expert[:, None], counts, 0), axis=1)

    start = jnp.minimum(before(group_sizes), m)
    end = jnp.minimum(start + group_sizes, m)
    tiles = pl.cdiv(end - start, rows)
    earlier = before(tiles)
    used = min(expert.size, m)
    visit = jnp.arange((m + used * (rows - 1)) // rows, dtype=jnp.int32)[:, None]
    own = (earlier <= visit) & (visit < earlier + tiles)  # (V, E)
    first = start + (visit - earlier) * rows
    stop = jnp.minimum(first + rows, end)
    return Visits(*(jnp.sum(jnp.where(own, a, 0), axis=1) for a in (expert, first, stop)))


def _call(
    product: matmul_triton.Product,
    visits: Visits,
    x: Float[Array, "_ _"],
    weight: Packed,
    experts: int,
    parts: int,
    interpret: bool,
) -> Float[Array, "_ _"]:
    """The product of rows with the matrices of one layer; rows of no expert are not defined.

    Args:
        product: what is computed.
        visits: what is multiplied with what.
        x: rows, and once more for each of the parts that they are a sum of.
        weight: of all layers.
        experts, parts: how many there are.
        interpret: as for `matmul`.
    """
    size, tile = product.produced
    table = [jnp.asarray(product.format.values, x.dtype)] if product.format.values else []
    operands = [x, *visits, *table, *weight.arrays]
    (out,) = triton.launch(
        functools.partial(_kernel, product, experts, parts),
        operands,
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], size), product.out_dtype)],
        grid=(visits.expert.size, pl.cdiv(size, tile)),
        blocks=product.blocks,
        name="quantized_ragged_matmul",
        interpret=interpret,
    )
    return out


def _kernel(product: matmul_triton.Product, experts: int, parts: int, x_ref: Any, *refs: Any) -> None:
    """A tile of the result: the rows of a visit, for each part of x below each other.

    Args:
        product: what is computed.
        experts, parts: how many there are.
        x_ref: x.
        refs: `Visits`; values of a codebook; index of the layer, words, scales, and zero points where there are some;
            the result.
    """
    expert, begin, stop = (ref[pl.program_id(0)] for ref in refs[:3])
    *weight, out_ref = refs[3:]
    table = weight.pop(0) if product.format.values else None
    own = Weight.of(weight, expert, experts, product.n, product.order)
    tiles = matmul_triton.Tiles(product, own, table)
    (inner, inner_tile), (outer, outer_tile), height = product.contracted, product.produced, product.blocks.m // parts
    of_tile = jnp.arange(product.blocks.m)
    row = begin + lax.rem(of_tile, height)
    there = (row < stop)[:, None]
    row += x_ref.shape[0] // parts * lax.div(of_tile, height)
    start = pl.program_id(1) * outer_tile
    produced = start + jnp.arange(outer_tile)

    def step(i: Any, sums: Array) -> Array:
        along = i * inner_tile + jnp.arange(inner_tile)
        x = pltriton.load(x_ref.at[row[:, None], along[None, :]], mask=there & (along[None, :] < inner), other=0)
        return sums + tiles.product_with(x, *((start, along) if product.transpose else (i * inner_tile, produced)))

    steps = pl.cdiv(inner, inner_tile) * jnp.minimum(stop - begin, 1)  # none without rows
    sums = lax.fori_loop(0, steps, step, jnp.zeros((product.blocks.m, outer_tile), jnp.float32))
    pltriton.store(
        out_ref.at[row[:, None], produced[None, :]],
        tiles.finished(sums, produced).astype(product.out_dtype),
        mask=there & (produced[None, :] < outer),
    )
