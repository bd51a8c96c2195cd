"""`quantized_ragged_matmul` on TPU: a grouped product (MegaBlocks, Gale et al. 2022) that reads packed words.

Rows of x come sorted by expert, so a tile of rows belongs to one expert or to several that follow each other. The grid
runs over tiles of the result's columns, over visits, and along what is contracted; a visit is one tile of rows under
one of its experts. XLA lists the visits before the kernel runs (`plan_visits`), and the length of the list is the
length of the grid: an expert without rows has no visit, so nothing of it is read. A visit multiplies the whole tile and
stores the rows of its expert; the visits to a tile follow each other, so that it stays in VMEM until its last one.

Index maps read layer, expert and tile from prefetched scalars: words come from the whole stack, and no matrix is sliced
or copied. What a tile of the product is, the precision, and where scales go are those of `ops.matmul.tpu`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from qjax.pallas_kernels.backends import tpu_operands
from qjax.pallas_kernels.backends.tpu_operands import Packed, Windows
from qjax.pallas_kernels.ops.matmul import reference as matmul_reference
from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu_kernel, tpu_tiles
from qjax.pallas_kernels.ops.matmul.tpu_product import Product
from qjax.pallas_kernels.ops.matmul.tpu_tiles import Blocks
from qjax.pallas_kernels.packed.qtensor import QTensor

# To make a tile of the weight takes about as long as to multiply so many rows by it; by the compiler's schedules that
# is too many for int4 on v5e and too few for NF4 on v6e.
_ROWS_OF_A_TILE = 128


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
    """What `reference.matmul` computes, up to the rounding that `ops.matmul.tpu` describes.

    Args:
        x, w, group_sizes, layer, casts, precision, preferred_element_type, transpose: as for the reference; there is
            no reason why they are `unsupported`.
        blocks: how to cut the product, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform.
    """
    out_dtype = matmul_reference.result_dtype(x, w, casts, preferred_element_type)
    dtype = tpu_operands.operand_dtype(x.dtype, casts[-1] if casts else w.dtype, precision)
    m, experts = x.shape[0], group_sizes.shape[0]
    blocks = blocks or default_blocks(m, experts, w, dtype, transpose)
    product = Product.of(w, casts, dtype, "kn", transpose, blocks)
    packed = Packed.of(w, layer, 1, "kn")
    visits, count = plan_visits(group_sizes, m, blocks.m)
    written = jnp.dtype(jnp.float32) if out_dtype == jnp.float16 else out_dtype
    out = _call(product, visits, count, product.ordered(tpu_operands.no_float16(x)), packed, written, interpret)
    of_an_expert = lax.broadcasted_iota(jnp.int32, (m, 1), 0) < visits.end[-1]
    return jnp.where(of_an_expert, out, 0).astype(out_dtype)


def unsupported(x: Any, w: QTensor, casts: tuple[Any, ...], preferred_element_type: Any) -> str | None:
    """Why a product is left to the reference, or None; x is anything with a shape and a dtype."""
    if w.order != "kn":
        return "experts in a lookup table"
    return matmul_tpu.unsupported(x, w, casts, matmul_reference.result_dtype(x, w, casts, preferred_element_type))


def default_blocks(m: int, experts: int, w: QTensor, dtype: Any, transpose: bool = False) -> Blocks:
    """Those of `ops.matmul.tpu_tiles.default_blocks` for as many rows as a tile should have.

    A visit takes as long as its rows and a tile of the weight, however few of the rows belong to the expert. There are
    about M / rows + E visits: the sum is least where a tile has sqrt(M / E * what a tile of the weight costs) rows.

    Args:
        m: rows of x.
        experts: how many there are.
        w: their weights, for which there is no reason to be `unsupported`.
        dtype: of the operands of the product.
        transpose: as for `matmul`.
    """
    rows = min(max(16, math.isqrt(_ROWS_OF_A_TILE * m // experts)), tpu_tiles.MOST_M)
    rows = pl.cdiv(m, pl.cdiv(m, rows))  # tiles of one size
    blocks = tpu_tiles.default_blocks(rows, w.layout.k, w.layout.n, w.spec, dtype, "kn", transpose)
    assert blocks is not None  # `unsupported` asks for fewer rows
    return blocks


class Visits(NamedTuple):
    """Tiles of rows under one of their experts, in the order of the rows.

    Attributes:
        expert: whose words a visit reads.
        tile: number of its tile.
        start, end: rows of x that belong to each expert.
    """

    expert: Int32[Array, " V"]
    tile: Int32[Array, " V"]
    start: Int32[Array, " E"]
    end: Int32[Array, " E"]


def plan_visits(group_sizes: Int32[Array, " E"], m: int, rows: int) -> tuple[Visits, Int32[Array, ""]]:
    """All visits, and how many there are; at least one, which has no row if no expert has any.

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
    first = start // rows
    tiles = jnp.where(start < end, (end - 1) // rows - first + 1, 0)
    earlier = before(tiles)
    visit = jnp.arange(pl.cdiv(m, rows) + min(expert.size, m) - 1, dtype=jnp.int32)[:, None]
    own = (earlier <= visit) & (visit < earlier + tiles)  # (V, E)
    experts, moves = (jnp.sum(jnp.where(own, a, 0), axis=1) for a in (expert, first - earlier))
    return Visits(experts, visit[:, 0] + moves, start, end), jnp.maximum(jnp.sum(tiles), 1)


def _call(
    product: Product,
    visits: Visits,
    count: Int32[Array, ""],
    x: Float[Array, "M _"],
    w: Packed,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "M _"]:
    """The product of rows with the matrices of one layer; rows of no expert are not defined.

    Args:
        product: what is computed.
        visits: what is multiplied with what.
        count: how many visits there are.
        x, w: operands.
        out_dtype: of the result.
        interpret: as for `matmul`.
    """
    (inner, inner_tile), (outer, outer_tile), blocks = product.contracted, product.produced, product.blocks
    m = x.shape[0]

    def at(o: Any, v: Any, s: Any, layers: Any, visits: Any) -> tuple[Any, Any, Any, Any]:
        return (layers, visits.expert[v], *((o, s) if product.transpose else (s, o)))

    windows = Windows(product.windows, product.order, blocks.n, at)
    layers, experts = w.words.shape[:2]
    return pl.pallas_call(
        functools.partial(_kernel, product, product.copied(w)),
        out_shape=jax.ShapeDtypeStruct((m, outer), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(outer, outer_tile), count, pl.cdiv(inner, inner_tile)),
            in_specs=[
                pl.BlockSpec((blocks.m, inner_tile), lambda o, v, s, layers, visits: (visits.tile[v], s)),
                *windows.of_words(0),
                *windows.of_small(0, w),
            ],
            out_specs=pl.BlockSpec((blocks.m, outer_tile), lambda o, v, s, layers, visits: (visits.tile[v], o)),
            scratch_shapes=[pltpu.VMEM((blocks.m, outer_tile), jnp.float32), *product.copies(w)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * product.k * product.n,
            bytes_accessed=x.nbytes
            + w.words.nbytes // (layers * experts) * min(m, experts)
            + m * outer * out_dtype.itemsize,
            transcendentals=0,
        ),
        name="quantized_ragged_matmul",
        interpret=interpret,
    )(w.layers, visits, x, *[w.words] * len(windows.words), *w.small)


def _kernel(product: Product, copied: Sequence[bool], _: Any, visits: Any, x_ref: Any, *refs: Any) -> None:
    """Adds the product of two tiles to the sum; after the last one the rows of the expert are written to the result.

    Args:
        product: what is computed.
        copied: which of scales and zero points have a float32 copy.
        visits: `Visits` of references.
        x_ref: a tile of x.
        refs: words, scales, zero points; the result; the sum, and copies.
    """
    parts, blocks = len(product.windows), product.blocks
    given, (out_ref, sum_ref, *copies) = refs[: parts + len(copied)], refs[parts + len(copied) :]
    column, visit, step = (pl.program_id(axis) for axis in range(3))
    scales = tpu_kernel.accumulate(product, copied, x_ref, given[:parts], given[parts:], sum_ref, copies, step, column)

    expert = visits.expert[visit]
    start, end, first = visits.start[expert], visits.end[expert], visits.tile[visit] * blocks.m

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        result = sum_ref[...]
        if blocks.scale == "after" and product.whole:
            result *= scales[...]
        row = first + lax.broadcasted_iota(jnp.int32, result.shape, 0)
        kept = out_ref[...].astype(jnp.float32)  # as Mosaic has no mask for narrower dtypes
        out_ref[...] = jnp.where((start <= row) & (row < end), result, kept).astype(out_ref.dtype)
