"""The Mosaic GPU kernel of weight-only products: words are unpacked in registers, and multiplied from there.

    x_ring   (stages, bm, bk)            tiles of x, in shared memory, by TMA
    w_ring   (stages, weights, bn, bk)   packed words, by TMA; 64 columns of them for a warpgroup
    sums     (64, bm) float32            of a warpgroup and a weight, in registers: a part of `out.T`
    parts    (ways - 1, weights, bn / 64, 64, bm) float32   sums of warpgroups that share columns, on their way together
    out      (bn / 64, strip, 64)        what is written, a strip of rows at a time

**Roles.** A block is one warpgroup that starts TMA copies of tiles of x and of words, and up to four that multiply. A
ring of stages in shared memory lies between them. Those that multiply share a tile along N, and along K
(`Blocks.ways`), where there are few columns and more warps are needed to unpack than there are rows of 64; their sums
meet in shared memory. Blocks are as many as the chip has multiprocessors and take one tile of the result after the
other, so that copies for the next one start while the last one is written. Few tiles are split along K too
(`Blocks.splits`), to give every multiprocessor work; the parts are float32 and are added up afterwards, in the same
order each time.

**Scales.** Those of a group are read from global memory before the wait for the tile that they belong to, and go into
the weights. One scale for all of K goes into the float32 sums. A scanned stack is not sliced: the index of the layer is
read in the kernel, and picks words and scales out of the whole stack.
"""

from __future__ import annotations

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
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.backends import mosaic_ring, mosaic_tile
from qjax.pallas_kernels.backends.mosaic import WGMMA_ROWS, launch, load, place, registers_for, swizzled
from qjax.pallas_kernels.backends.mosaic_epilogue import OtherTiles
from qjax.pallas_kernels.backends.mosaic_operands import Packed, Tile, Weight, each_tile
from qjax.pallas_kernels.backends.mosaic_ring import Ring
from qjax.pallas_kernels.ops.matmul.mosaic_product import Product
from qjax.pallas_kernels.ops.matmul.mosaic_tiles import strip_of

_BAND = 4  # tiles along M that follow each other before the next one along N: so many share words in the cache


def call(
    product: Product,
    x: Float[Array, "B M K"],
    panels: Sequence[Sequence[Packed]],
    others: Sequence[Array],
    interpret: bool,
) -> list[Float[Array, "splits B M _"]]:
    """What is made of the products with each matrix of one layer of the stack, in parts along K.

    Args:
        product: what is computed.
        x, panels: operands.
        others: what else the epilogue reads, `(B or 1, M, N)`, `(B or 1, M)`, `(B or 1, N)` or `(B or 1, 1)` each.
        interpret: as for `matmul`.
    """
    blocks, dtype, stack = product.blocks, product.dtype, x.shape[0]
    columns, strip, weights = blocks.n // WGMMA_ROWS, strip_of(blocks.m), product.beside.weights
    units = stack * math.prod(product.grid) * blocks.splits
    scratch = {
        "x_ring": plgpu.SMEM((blocks.stages, blocks.m, blocks.k), dtype, transforms=swizzled(16, product.chunk)),
        "w_ring": plgpu.SMEM(
            (blocks.stages, weights, blocks.n, blocks.k),
            panels[0][0].words.dtype,
            transforms=swizzled(product.bits, math.gcd(product.part, product.k)),
        ),
        "out_tile": plgpu.SMEM(
            (columns, strip, WGMMA_ROWS),
            product.out_dtype,
            transforms=swizzled(8 * product.out_dtype.itemsize, WGMMA_ROWS),
        ),
        **mosaic_ring.barriers(blocks, weights),
    }
    if blocks.ways > 1:
        shape, transforms = (
            (blocks.ways - 1, weights, columns, WGMMA_ROWS, blocks.m),
            swizzled(32, math.gcd(blocks.m, 32)),
        )
        scratch["parts"] = plgpu.SMEM(shape, jnp.float32, transforms=transforms)
        scratch["parts_full"] = plgpu.Barrier(num_arrivals=blocks.ways - 1, num_barriers=columns)
        scratch["parts_empty"] = plgpu.Barrier(num_arrivals=1, num_barriers=columns)
    scratch |= product.beside.scratch(columns, strip, product.buffers)
    if interpret:  # an interpreted `wgmma` has no operand in registers
        shape = (blocks.warpgroups, WGMMA_ROWS, product.chunk)
        scratch["unpacked"] = plgpu.SMEM(shape, dtype, transforms=swizzled(16, product.chunk))
    packed = list(itertools.chain(*panels))
    operands = [x, *itertools.chain(*(w.arrays for w in packed)), *others]
    return launch(
        functools.partial(_kernel, product, len(packed[0].arrays), units, stack),
        operands,
        out_type=[
            jax.ShapeDtypeStruct((blocks.splits, stack, product.m, width), product.out_dtype)
            for width in product.widths
            for _ in range(product.results)
        ],
        units=units,
        warpgroups=blocks.warpgroups,
        scratch=scratch,
        name="fused_matmul" if product.epilogue else "joint_matmul" if len(panels) > 1 else "quantized_matmul",
        interpret=interpret,
    )


def _kernel(product: Product, arrays: int, units: int, stack: int, *refs: Any, **scratch: Any) -> None:
    """What one warpgroup does.

    Args:
        product: what is computed.
        arrays: of each weight.
        units: tiles of the results, times matrices and splits.
        stack: matrices of a layer.
        refs: x; index of the layer, words, scales, zero points of each weight; other operands; the results: in global
            memory.
        scratch: shared memory and barriers.
    """
    blocks, columns, count = product.blocks, product.blocks.n // WGMMA_ROWS, product.beside.weights
    rest = iter(refs)
    (x_ref,) = itertools.islice(rest, 1)
    panels = [[Weight.of(list(itertools.islice(rest, arrays)), stack) for _ in range(count)] for _ in product.widths]
    others = list(itertools.islice(rest, len(product.beside.others)))
    results = [list(itertools.islice(rest, product.results)) for _ in panels]
    warpgroup, registers = lax.axis_index("warpgroup"), registers_for(blocks.warpgroups)
    ring = Ring.of(blocks, scratch)

    def each(body: Callable[[int, Tile, Array], None]) -> Array:
        """Calls `body` with each tile of this block, its panel, and the next stage of the ring, which it returns."""

        def with_tile(matrix: Any, split: Any, i: Any, j: Any, stage: Array) -> Array:
            m = i * blocks.m
            for panel, (first, end) in enumerate(itertools.pairwise(product.bounds)):
                n = jnp.minimum((j - first) * blocks.n, product.widths[panel] - blocks.n)
                here = functools.partial(body, panel, Tile(matrix, split, m, n), stage)
                if len(panels) == 1:
                    here()
                else:
                    pl.when((first <= j) & (j < end))(here)
            return lax.rem(stage + product.steps, blocks.stages)

        return each_tile(units, stack, product.grid, _BAND, with_tile)

    @pl.when(warpgroup == blocks.warpgroups)
    def _copy() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="decrease")

        def fill(panel: int, tile: Tile, stage: Array) -> None:
            ring.fill(x_ref, panels[panel], tile, product.steps, stage)

        ring.drain(each(fill))

    @pl.when(warpgroup < blocks.warpgroups)
    def _multiply() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        ring.begin()
        if blocks.ways > 1:

            @pl.when(warpgroup < columns)
            def _free() -> None:
                plgpu.barrier_arrive(scratch["parts_empty"].at[warpgroup])

        each(
            lambda panel, tile, stage: _multiply_tiles(
                product, panels[panel], others, results[panel], tile, stage, **scratch
            )
        )
        plgpu.wait_smem_to_gmem(0)
        if blocks.ways > 1:

            @pl.when(warpgroup >= columns)
            def _read() -> None:
                plgpu.barrier_wait(scratch["parts_empty"].at[lax.rem(warpgroup, columns)])


def _multiply_tiles(
    product: Product,
    weights: Sequence[Weight],
    others: Sequence[Any],
    results: Sequence[Any],
    tile: Tile,
    stage: Array,
    **scratch: Any,
) -> None:
    """A tile of a result: sums over all steps, over the warpgroups that share them, what is made of them, and out.

    Args:
        product: what is computed.
        weights: those of the panel.
        others: other operands of the epilogue.
        results: what is written, one for each weight or that of the epilogue.
        tile: where it lies.
        stage: the next one of the ring.
        scratch: shared memory and barriers.
    """
    blocks = product.blocks
    ring = Ring.of(blocks, scratch)
    column, way = place(blocks.n // WGMMA_ROWS, blocks.ways)
    rows = pl.ds(tile.n + column * WGMMA_ROWS, WGMMA_ROWS)

    def small(w: Weight, ref: Any, k: Any) -> Array:
        """Scales or zero points of the group that k belongs to, by column."""
        return w.of_group(ref, tile.matrix, rows, None if product.whole else lax.div(k, product.group))

    def accumulate(*sums: Any) -> list[Array]:
        def step(i: Any, stage: Array) -> Array:
            k = (tile.split * product.steps + i) * blocks.k + way * product.part
            starts = range(0, product.part, math.gcd(product.group, product.part))
            scales, zeros = (
                [None if ref is None else {start: small(w, ref, k + start) for start in starts} for w, ref in refs]
                for refs in (
                    [(w, None if product.whole else w.scales) for w in weights],
                    [(w, w.zeros) for w in weights],
                )
            )
            _multiply_step(product, sums, scales, zeros, column, way, stage, **scratch)
            return ring.next(stage)

        lax.fori_loop(0, product.steps, step, stage)
        return [each[...] for each in sums]

    other_tiles = OtherTiles(product, others, tile, column, rows, scratch)
    pl.when(way == 0)(other_tiles.start)
    accumulators = [plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, blocks.m), jnp.float32) for _ in weights]
    sums = pl.run_scoped(accumulate, *accumulators)

    @pl.when(way > 0)
    def _give() -> None:
        plgpu.barrier_wait(scratch["parts_empty"].at[column])
        for i, own in enumerate(sums):
            scratch["parts"][way - 1, i, column] = own
        plgpu.barrier_arrive(scratch["parts_full"].at[column])

    @pl.when(way == 0)
    def _write() -> None:
        whole = list(sums)
        if blocks.ways > 1:
            plgpu.barrier_wait(scratch["parts_full"].at[column])
            for other, i in itertools.product(range(blocks.ways - 1), range(len(whole))):
                whole[i] += load(scratch["parts"].at[other, i, column], plgpu.Layout.WGMMA, optimized=True)
            plgpu.barrier_arrive(scratch["parts_empty"].at[column])
        if product.whole:
            scales = [small(w, w.scales, 0).astype(jnp.float32) for w in weights]
            whole = [own * lax.broadcast_in_dim(s, own.shape, (0,)) for own, s in zip(whole, scales, strict=True)]
        out_tile = scratch["out_tile"].at[column]
        for i, (start, strip) in enumerate(product.strips):
            values = [own[:, start : start + strip] for own in whole]
            if product.epilogue:
                values = [product.epilogue(values, other_tiles.read(i))]
            for value, result in zip(values, results, strict=True):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                value = value.astype(product.out_dtype)
                out_tile.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    out_tile, result.at[tile.split, tile.matrix, pl.ds(tile.m + start, strip), rows]
                )
            other_tiles.copy(i + product.buffers)


def _multiply_step(
    product: Product,
    sums: Sequence[Any],
    scales: Sequence[dict[int, Array] | None],
    zeros: Sequence[dict[int, Array] | None],
    column: Any,
    way: Any,
    stage: Array,
    **scratch: Any,
) -> None:
    """Adds the products of tiles, or of what this warpgroup takes of them, to the sums.

    One chunk of the weight is unpacked while the one before it is multiplied, in other registers.

    Args:
        product: what is computed.
        sums: the accumulator of each weight.
        scales, zeros: of each weight, by where a group starts in the tile; scales are None if all of K shares one.
        column, way: what part of the tile this warpgroup takes.
        stage: of the ring.
        scratch: shared memory and barriers.
    """
    chunk = product.chunk
    shape, length = (WGMMA_ROWS, chunk), math.gcd(product.group, product.part)
    upcast = plgpu.Layout.WGMMA_UPCAST_4X if product.bits == 4 else plgpu.Layout.WGMMA_UPCAST_2X

    def along_k(start: int, size: int) -> Any:
        return pl.ds(way * product.part + start, size)

    plgpu.barrier_wait(scratch["full"].at[stage])
    for number, (total, scale, zero) in enumerate(zip(sums, scales, zeros, strict=True)):
        w_tile = scratch["w_ring"].at[stage, number, pl.ds(column * WGMMA_ROWS, WGMMA_ROWS), along_k(0, product.part)]
        codes = load(w_tile, upcast, optimized=True)
        for start in range(0, product.part, chunk):
            group = start // length * length
            values = plgpu.layout_cast(codes[:, start : start + chunk], plgpu.Layout.WGMMA)
            values = _converted(values, product, interpret="unpacked" in scratch)
            if zero is not None:
                values -= lax.broadcast_in_dim(zero[group].astype(product.dtype), shape, (0,))
            if scale is not None:
                values *= lax.broadcast_in_dim(scale[group].astype(product.dtype), shape, (0,))
            x_tile = scratch["x_ring"].at[stage, :, along_k(start, chunk)].T
            if "unpacked" in scratch:  # interpreted
                unpacked = scratch["unpacked"].at[lax.axis_index("warpgroup")]
                unpacked[...] = values
                plgpu.commit_smem()
                plgpu.wgmma(total, unpacked, x_tile)
                plgpu.wgmma_wait(0)
            else:
                plgpu.wgmma(total, values, x_tile)
                plgpu.wgmma_wait(1)
            if start == number == 0:  # the stage before this one was read: its words are in registers, x was multiplied
                Ring.of(product.blocks, scratch).free_before(stage)


def _converted(codes: Int[Array, "N K"], product: Product, *, interpret: bool) -> Float[Array, "N K"]:
    """Codes as the operand of a product: integers, values of a codebook, or the floats whose bits they are."""
    if product.format.kind == "codebook":
        return mosaic_tile.look_up(codes, product.format.values, product.dtype, interpret=interpret)
    if product.format.kind == "float":
        codes = lax.bitcast_convert_type(codes, jnp.dtype(product.format.dtype)).astype(jnp.float16)
        return codes if product.dtype == jnp.float16 else codes.astype(jnp.float32).astype(product.dtype)
    if product.bits == 4:  # integers to bfloat16 is the conversion that Mosaic GPU has in few instructions
        codes = codes.astype(jnp.bfloat16)
    return codes.astype(product.dtype)
