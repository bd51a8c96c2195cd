"""The Mosaic GPU kernel of integer products: codes times codes by `wgmma`, sums scaled in registers.

    x_ring   (stages, bm + ones, bk) int8    tiles of x, in shared memory, by TMA; rows of ones below them
    w_ring   (stages, weights, bn, bk)       codes of 8 bits, or packed ones of 4 that go through registers
    sums     (64, bm + ones) int32           of a warpgroup, in registers: of all of K, or of a group
    totals   (64, bm) float32                the sum over groups, in registers; shared where warpgroups take turns
    out      (bn / 64, strip, 64)            what is written, a strip of rows at a time

**Roles.** A block is a warpgroup that starts TMA copies and one to four that multiply, 64 columns each, with a ring of
stages in shared memory between them. There are as many blocks as multiprocessors, and each takes one tile of the result
after the other. Where tiles are few, K is split among blocks (`Blocks.splits`): sums of integers may be split anywhere.

**Groups.** With one scale for a column, all of K is added up in s32, and scales are applied once, to a tile that is
about to be written. With groups, each is added up in s32, converted, scaled, clamped and added to a float32 sum, in
ascending order, as `integer_matmul` says: six instructions for each element of a tile and each group. By their number
that takes twice as long as the product for groups of 128, and four times as long for groups of 64: with many rows of x,
bfloat16 is faster then. With few rows it hides behind the words that are read. Float32 sums cannot be split among
blocks; warpgroups that share columns of a tile (`Blocks.ways`) make products of different groups at the same time, and
add them one after the other to a sum in shared memory.

**Zero points.** Those of x need the sums of each column of the weight. The same product makes them: below the rows of x
in each stage lie eight rows of ones, which are copied there once. Those of the weight need the sum of each group of
each row of x. XLA makes them before the kernel, and reads x once more for it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32

from qjax.pallas_kernels.backends import mosaic_ring
from qjax.pallas_kernels.backends.mosaic import WGMMA_ROWS, launch, load, place, registers_for, swizzled
from qjax.pallas_kernels.backends.mosaic_epilogue import OtherTiles
from qjax.pallas_kernels.backends.mosaic_operands import Packed, Tile, Weight, each_tile
from qjax.pallas_kernels.backends.mosaic_ring import Ring
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.ops.integer_matmul.mosaic_product import Product
from qjax.pallas_kernels.ops.integer_matmul.mosaic_tiles import STRIP

_BAND = 8  # tiles along M that follow each other before the next one along N: so many share words in the cache


def call(
    product: Product,
    of_x: dict[str, Array],
    weights: Sequence[Packed],
    others: Sequence[Array],
    interpret: bool,
) -> list[Array]:
    """What is made of the products with each matrix of one layer of the stack, `(splits, B, M, N)` each.

    Args:
        product: what is computed.
        of_x: operands that belong to x, by name.
        weights: operands.
        others: what else the epilogue reads, as `as_read` makes it.
        interpret: as for `matmul`.
    """
    blocks, x, words = product.blocks, of_x["x"], weights[0].words
    stack, columns = x.shape[0], blocks.n // WGMMA_ROWS
    width, count = product.width, len(weights)
    units = stack * math.prod(product.grid) * blocks.splits
    strip = min(STRIP, blocks.m)
    scratch = {
        "x_ring": plgpu.SMEM(
            (blocks.stages, blocks.m + product.ones, blocks.k), jnp.int8, transforms=swizzled(8, width)
        ),
        "w_ring": plgpu.SMEM(
            (blocks.stages, count, blocks.n, blocks.k), words.dtype, transforms=swizzled(product.bits, width)
        ),
        "out_tile": plgpu.SMEM(
            (columns, strip, WGMMA_ROWS),
            product.out_dtype,
            transforms=swizzled(8 * product.out_dtype.itemsize, WGMMA_ROWS),
        ),
        **mosaic_ring.barriers(blocks, count),
    }
    if product.ones:
        scratch["ones_full"] = plgpu.Barrier(num_arrivals=blocks.stages, num_barriers=1)
    if blocks.ways > 1:
        transforms = swizzled(32, math.gcd(blocks.m, 32))
        scratch["totals"] = plgpu.SMEM((columns, WGMMA_ROWS, blocks.m), jnp.float32, transforms=transforms)
        scratch["turns"] = plgpu.Barrier(num_arrivals=1, num_barriers=blocks.warpgroups)
    scratch |= product.beside.scratch(columns, strip, product.buffers)
    if interpret and product.bits == 4:  # an interpreted `wgmma` has no operand in registers
        shape = (blocks.warpgroups, WGMMA_ROWS, width)
        scratch["unpacked"] = plgpu.SMEM(shape, jnp.int8, transforms=swizzled(8, width))
    shape = jax.ShapeDtypeStruct((blocks.splits, stack, product.m, product.n), product.out_dtype)
    return launch(
        functools.partial(_kernel, product, tuple(of_x), len(weights[0].arrays), units, stack),
        [*of_x.values(), *itertools.chain(*(w.arrays for w in weights)), *others],
        out_type=[shape] * product.results,
        units=units,
        warpgroups=blocks.warpgroups,
        scratch=scratch,
        name="fused_integer_matmul" if product.epilogue else "integer_matmul",
        interpret=interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Operands:
    """What is in global memory.

    Attributes:
        of_x: references to what belongs to x, by name.
        weights: those that are multiplied.
        others: references to the other operands of the epilogue.
        results: references to what is written.
    """

    of_x: dict[str, Any]
    weights: list[Weight]
    others: list[Any]
    results: list[Any]


def _kernel(
    product: Product, of_x: tuple[str, ...], arrays: int, units: int, stack: int, *refs: Any, **scratch: Any
) -> None:
    """What one warpgroup does.

    Args:
        product: what is computed.
        of_x: names of the operands that belong to x.
        arrays: of each weight.
        units: tiles of the result, times matrices and splits.
        stack: matrices of a layer.
        refs: those operands, other ones of the epilogue, and the results, in global memory.
        scratch: shared memory and barriers.
    """
    blocks, rest = product.blocks, iter(refs)
    x_refs = dict(zip(of_x, itertools.islice(rest, len(of_x)), strict=True))
    weights = [Weight.of(list(itertools.islice(rest, arrays)), stack) for _ in range(product.beside.weights)]
    operands = _Operands(x_refs, weights, list(itertools.islice(rest, len(product.beside.others))), list(rest))
    warpgroup, registers = lax.axis_index("warpgroup"), registers_for(blocks.warpgroups)
    ring = Ring.of(blocks, scratch)

    def each(body: Callable[[Tile, Array], Array]) -> Array:
        """Calls `body` with each tile of this block and the stage of the ring that is next, which both return."""

        def with_tile(matrix: Any, split: Any, i: Any, j: Any, stage: Array) -> Array:
            return body(Tile(matrix, split, i * blocks.m, jnp.minimum(j * blocks.n, product.n - blocks.n)), stage)

        return each_tile(units, stack, product.grid, _BAND, with_tile)

    @pl.when(warpgroup == blocks.warpgroups)
    def _copy() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="decrease")
        for stage in range(blocks.stages if product.ones else 0):
            below = scratch["x_ring"].at[stage, pl.ds(blocks.m, product.ones), :]
            plgpu.copy_gmem_to_smem(x_refs["ones"], below, scratch["ones_full"].at[0])
        ring.drain(each(lambda tile, stage: ring.fill(x_refs["x"], weights, tile, product.steps, stage)))

    @pl.when(warpgroup < blocks.warpgroups)
    def _multiply() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        ring.begin()
        if product.ones:
            plgpu.barrier_wait(scratch["ones_full"].at[0])
        multiply = _add_all if product.whole else _add_groups
        each(functools.partial(multiply, product, operands, **scratch))
        plgpu.wait_smem_to_gmem(0)


def _accumulator(product: Product) -> Any:
    return plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, product.blocks.m + product.ones), jnp.int32)


def _other_tiles(product: Product, operands: _Operands, tile: Tile, scratch: dict[str, Any]) -> OtherTiles:
    column, _ = place(product.blocks.n // WGMMA_ROWS, product.blocks.ways)
    rows = pl.ds(tile.n + column * WGMMA_ROWS, WGMMA_ROWS)
    return OtherTiles(product, operands.others, tile, column, rows, scratch)


def _add_all(product: Product, operands: _Operands, tile: Tile, stage: Array, **scratch: Any) -> Array:
    """A tile of the result, or of a part of it, where all of K shares a scale."""
    blocks, of_x, ring = product.blocks, operands.of_x, Ring.of(product.blocks, scratch)

    def accumulate(*sums: Any) -> tuple[Array, list[Array]]:
        def step(_: Any, stage: Array) -> Array:
            for number, total in enumerate(sums):
                _multiply(product, number, total, stage, 0, blocks.k, **scratch)
            return ring.next(stage)

        return lax.fori_loop(0, product.steps, step, stage), [total[...] for total in sums]

    other_tiles = _other_tiles(product, operands, tile, scratch)
    other_tiles.start()
    stage, sums = pl.run_scoped(accumulate, *(_accumulator(product) for _ in operands.weights))
    columns = [_columns(product, total) for total in sums]
    zeros = _by_row(product, of_x.get("zero"), (tile.matrix,), tile)
    row_sums = _by_row(product, of_x.get("sums"), (tile.matrix, 0), tile)
    scales = _by_row(product, of_x["scale"], (tile.matrix,), tile)
    weight_zeros = [_by_column(product, w, w.zeros, tile, 0) for w in operands.weights]
    for i, (start, size) in enumerate(product.strips):
        parts = []
        for w, total, of_columns, weight_zero in zip(operands.weights, sums, columns, weight_zeros, strict=True):
            part = _centred(total[:, start : start + size], of_columns, zeros[i], weight_zero, row_sums[i])
            if blocks.splits == 1:
                part = _rescaled(_scaled(part, _by_column(product, w, w.scales, tile, 0)), scales[i])
            parts.append(part)
        _finish(product, operands, tile, parts, i, other_tiles, **scratch)
    return stage


def _add_groups(product: Product, operands: _Operands, tile: Tile, stage: Array, **scratch: Any) -> Array:
    """A tile of the result where each group has a scale: groups are added in ascending order."""
    blocks, of_x, (w,) = product.blocks, operands.of_x, operands.weights
    strips, ring = product.strips, Ring.of(blocks, scratch)
    column, way = place(blocks.n // WGMMA_ROWS, blocks.ways)
    zeros = _by_row(product, of_x.get("zero"), (tile.matrix,), tile)
    other_tiles = _other_tiles(product, operands, tile, scratch)
    pl.when(way == 0)(other_tiles.start)

    def scaled(i: Any, stage: Array, first: int) -> list[Array]:
        """The sum of a group, in strips, from `first` of what this warpgroup takes of a stage."""
        group = lax.div(i * blocks.k + way * product.part + first, product.group)
        # from global memory, before the wait for the tile
        values = _by_column(product, w, w.scales, tile, group)
        if product.k % blocks.k:  # the last tile reaches beyond the last group
            values = jnp.where(group * product.group < product.k, values, 0)
        weight_zero = _by_column(product, w, w.zeros, tile, group)
        group = jnp.minimum(group, pl.cdiv(product.k, product.group) - 1)
        row_sums = _by_row(product, of_x.get("sums"), (tile.matrix, group), tile)

        def accumulate(sums: Any) -> Array:
            _multiply(product, 0, sums, stage, first, product.group, **scratch)
            return sums[...]

        sums = pl.run_scoped(accumulate, _accumulator(product))
        columns = _columns(product, sums)
        return [
            _scaled(_centred(sums[:, start : start + size], columns, zero, weight_zero, row_sum), values)
            for (start, size), zero, row_sum in zip(strips, zeros, row_sums, strict=True)
        ]

    def write(totals: list[Array]) -> None:
        scales = _by_row(product, of_x["scale"], (tile.matrix,), tile)
        for i, (total, scale) in enumerate(zip(totals, scales, strict=True)):
            _finish(product, operands, tile, [_rescaled(total, scale)], i, other_tiles, **scratch)

    totals = [plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, size), jnp.float32), plgpu.Layout.WGMMA) for _, size in strips]
    firsts = range(0, product.part, product.group)
    if blocks.ways == 1:

        def step(i: Any, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            stage, totals = carry
            for first in firsts:
                totals = [total + part for total, part in zip(totals, scaled(i, stage, first), strict=True)]
            return ring.next(stage), totals

        stage, totals = lax.fori_loop(0, product.steps, step, (stage, totals))
        write(totals)
        return stage

    shared, turns = scratch["totals"].at[column], scratch["turns"]

    @pl.when(way == 0)
    def _begin() -> None:
        shared[...] = totals[0]

    def step_in_turn(i: Any, stage: Array) -> Array:
        """Warpgroups make sums of groups at the same time, and add them to what is shared one after the other."""
        parts = [scaled(i, stage, first)[0] for first in firsts]

        @pl.when((i > 0) | (way > 0))
        def _wait() -> None:
            plgpu.barrier_wait(turns.at[column * blocks.ways + way])

        total = load(shared, plgpu.Layout.WGMMA, optimized=True)
        for part in parts:
            total += part
        shared[...] = total
        plgpu.barrier_arrive(turns.at[column * blocks.ways + lax.rem(way + 1, blocks.ways)])
        return ring.next(stage)

    stage = lax.fori_loop(0, product.steps, step_in_turn, stage)

    @pl.when(way == 0)
    def _end() -> None:
        plgpu.barrier_wait(turns.at[column * blocks.ways])
        write([load(shared, plgpu.Layout.WGMMA, optimized=True)])

    return stage


def _columns(product: Product, sums: Int32[Array, "64 _"]) -> Int32[Array, " 64"] | None:
    """Sums of the codes of each column of the weight: its products with rows of ones, which are all the same."""
    return jnp.max(sums[:, product.blocks.m :], axis=1) if product.ones else None


def _multiply(product: Product, number: int, sums: Any, stage: Array, first: int, size: int, **scratch: Any) -> None:
    """Adds the product of a stage of the ring, or of a group in it, to the sums.

    Args:
        product: what is computed.
        number: of the weight.
        sums: the accumulator.
        stage: of the ring.
        first, size: what part of what this warpgroup takes of the stage.
        scratch: shared memory and barriers.
    """
    blocks, width = product.blocks, product.width
    column, way = place(blocks.n // WGMMA_ROWS, blocks.ways)

    def along_k(start: int, size: int) -> Any:
        return pl.ds(way * product.part + start, size)

    if first == number == 0:
        plgpu.barrier_wait(scratch["full"].at[stage])
    w_tile = scratch["w_ring"].at[stage, number, pl.ds(column * WGMMA_ROWS, WGMMA_ROWS), :]
    codes = None
    if product.bits == 4:
        codes = load(w_tile.at[:, along_k(first, size)], plgpu.Layout.WGMMA_8BIT, optimized=True)
    for start in range(first, first + size, width):
        if codes is None:
            left = w_tile.at[:, along_k(start, width)]
        else:
            left = codes[:, start - first : start - first + width].astype(jnp.int8)
            if "unpacked" in scratch:  # interpreted
                unpacked = scratch["unpacked"].at[lax.axis_index("warpgroup")]
                unpacked[...] = left
                plgpu.commit_smem()
                left = unpacked
        plgpu.wgmma(sums, left, scratch["x_ring"].at[stage, :, along_k(start, width)].T)
        plgpu.wgmma_wait(0 if "unpacked" in scratch else 1)
        if start == number == 0:  # the stage before this one was multiplied
            Ring.of(blocks, scratch).free_before(stage)


def _by_column(product: Product, w: Weight, ref: Any, tile: Tile, group: Any) -> Any:
    """Scales or zero points of a group, by column of the weight; None where there are none."""
    if ref is None:
        return None
    column, _ = place(product.blocks.n // WGMMA_ROWS, product.blocks.ways)
    columns = pl.ds(tile.n + column * WGMMA_ROWS, WGMMA_ROWS)
    return w.of_group(ref, tile.matrix, columns, None if product.whole else group)


def _by_row(product: Product, ref: Any, at: tuple[Any, ...], tile: Tile) -> list[Any]:
    """What is known of the rows of x, for each strip of a tile; Nones where there is nothing."""
    if ref is None:
        return [None for _ in product.strips]
    layout = plgpu.Layout.WGMMA.reduce(0)
    return [load(ref.at[*at, pl.ds(tile.m + start, size)], layout, optimized=False) for start, size in product.strips]


def _centred(
    sums: Int32[Array, "64 strip"],
    columns: Int32[Array, " 64"] | None,
    zero: Int32[Array, " strip"] | None,
    weight_zero: Int[Array, " 64"] | None,
    row_sums: Int32[Array, " strip"] | None,
) -> Int32[Array, "64 strip"]:
    """Sums of products of codes, zero points taken off.

    Args:
        sums: of products of codes of the weight and of x.
        columns, zero: sums of the codes of the weight, and zero points of x; or None.
        weight_zero, row_sums: zero points of the weight, and what `gpu_operands.row_sums` are; or None.
    """
    for by_column, by_row in ((columns, zero), (weight_zero, row_sums)):
        if by_column is not None and by_row is not None:
            by_column = lax.broadcast_in_dim(by_column.astype(jnp.int32), sums.shape, (0,))
            sums -= by_column * lax.broadcast_in_dim(by_row, sums.shape, (1,))
    return sums


def _scaled(sums: Int32[Array, "64 strip"], values: Float[Array, " 64"]) -> Float[Array, "64 strip"]:
    """A group in float32: the clamp keeps the product from being fused with an addition."""
    values = lax.broadcast_in_dim(values.astype(jnp.float32), sums.shape, (0,))
    return finite(sums.astype(jnp.float32) * values)


def _rescaled(total: Float[Array, "64 strip"], scale: Float[Array, " strip"]) -> Float[Array, "64 strip"]:
    """The sum of groups times the scales of x: `reference.rescale` of a transposed tile."""
    return jnp.where(total == 0, 0.0, total) * lax.broadcast_in_dim(scale, total.shape, (1,))


def _finish(
    product: Product,
    operands: _Operands,
    tile: Tile,
    parts: list[Array],
    i: int,
    other_tiles: OtherTiles,
    **scratch: Any,
) -> None:
    """Writes strip i of the results, or what is made of them."""
    start, _ = product.strips[i]
    if product.epilogue:
        parts = [product.epilogue(parts, other_tiles.read(i))]
    for part, result in zip(parts, operands.results, strict=True):
        _write(result, tile, part.astype(product.out_dtype), start, **scratch)
    other_tiles.copy(i + product.buffers)


def _write(out_ref: Any, tile: Tile, part: Array, start: int, **scratch: Any) -> None:
    """Copies a strip of a tile out, once the strip before it has left shared memory."""
    warpgroup = lax.axis_index("warpgroup")  # of those that share a tile along K, the first
    size = part.shape[1]
    out_tile = scratch["out_tile"].at[warpgroup, pl.ds(0, size), :]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_tile.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    rows = pl.ds(tile.n + warpgroup * WGMMA_ROWS, WGMMA_ROWS)
    plgpu.copy_smem_to_gmem(out_tile, out_ref.at[tile.split, tile.matrix, pl.ds(tile.m + start, size), rows])
