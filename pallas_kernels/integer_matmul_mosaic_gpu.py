"""`integer_matmul` on NVIDIA Hopper: int8 codes times int8 or int4 codes, by a Mosaic GPU kernel, bit for bit.

What is computed is `out.T = w.T @ x.T`, as in `matmul_mosaic_gpu`: `wgmma` multiplies 64 columns of the weight with up
to 256 rows of x, s8 times s8 into s32. For 8 bit operands it wants K contiguous in both, which is order "nk"
(`qtensor.reorder`). int8 codes are multiplied from shared memory, where TMA puts them; int4 codes go to registers, are
widened to int8 there, and are multiplied from registers.

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

**Edges.** As in `matmul_mosaic_gpu`: TMA reads zeros beyond the end and writes nothing there; K and N are multiples of
64, and x gets rows up to a multiple of 8. The last tile along N is moved back to end with the matrix.

Nothing here has run on a GPU: the kernel was interpreted, and compiled for sm_90a.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int8, Int32

from pallas_kernels import blocks_gpu, integer_operands_gpu
from pallas_kernels.exact import finite
from pallas_kernels.mosaic_gpu import interpreter, load, registers_for, swizzled
from pallas_kernels.qtensor import QTensor

ROWS = 64  # columns of the weight that one warpgroup multiplies: the height of `wgmma`
_TILE_ROWS = 8  # TMA writes tiles of so many rows, which have to cut an array, unless it has fewer, without a rest
_ONES = 8  # rows of ones below those of x: as many as `wgmma` counts in


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Attributes:
        m: rows of x in a tile. With those of ones, 8, 16, 24 or a multiple of 16, at most 256; fewer with groups.
        n: columns of the weight in a tile, a multiple of 64, at most 256.
        k: how much of K is in a tile, a multiple of 128 * `ways`; with groups, of their size times `ways`.
        ways: warpgroups that share a tile along K; 1 without groups, and with more than 32 rows.
        stages: tiles of x and of the weight in shared memory, at least 2.
        splits: parts that K is cut into, for different blocks; 1 with groups.
    """

    m: int
    n: int
    k: int
    ways: int
    stages: int
    splits: int

    @property
    def warpgroups(self) -> int:
        """Those that multiply."""
        return self.n // ROWS * self.ways


# --- The product ----------------------------------------------------------------------------------------------------


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
        interpret: runs the kernel as XLA operations, on any platform; jax 0.11 or newer.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    *stack, m, k = x.shape
    n, group = w.layout.n, w.group_size
    batch = math.prod(stack)
    rows = m if m <= _TILE_ROWS else m + -m % _TILE_ROWS
    ones = 0 if zero is None else _ONES
    blocks = blocks or default_blocks(rows, w, ones=ones, batch=batch)
    _check(blocks, w, ones)
    kept = jnp.dtype(out_dtype if blocks.splits == 1 else jnp.int32)
    product = _Product(rows, k, n, w.spec.format.bits, group, kept, blocks, ones)
    x = jnp.pad(x.reshape(batch, m, k), ((0, 0), (0, rows - m), (0, 0)))
    words = w.words
    if w.spec.format.bits == 4:
        words = lax.bitcast_convert_type(words, jnp.int4)  # (..., N, K / 8, 8), which moves nothing
    beyond = _ceil(rows, blocks.m) * blocks.m - m

    def by_row(a: Array, dtype: Any) -> Array:
        """One number for each row, and for those that fill the last tile: `(B, rows)`."""
        return jnp.pad(a.reshape(batch, m), ((0, 0), (0, beyond))).astype(dtype)

    operands = {
        "layer": jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), 1),
        "x": x,
        "words": words.reshape(-1, n, k),
        "values": w.scales.values.reshape(-1, *w.scales.values.shape[-2:]),
        "scale": by_row(scale, jnp.float32),
    }
    if zero is not None:
        operands["zero"] = by_row(zero, jnp.int32)
        operands["ones"] = jnp.ones((_ONES, blocks.k), jnp.int8)
    sums = None
    if w.scales.zero is not None:
        sums = integer_operands_gpu.row_sums(x[:, :m], None if zero is None else zero.reshape(batch, m, 1), group)
        if blocks.splits == 1:
            operands["sums"] = jnp.pad(sums, ((0, 0), (0, 0), (0, beyond)))
            operands["weight_zero"] = w.scales.zero.reshape(-1, *w.scales.zero.shape[-2:])
    out = _call(product, operands, interpret)[..., :m, :]
    if blocks.splits == 1:
        return out[0].reshape(*stack, m, n)
    return integer_operands_gpu.rescale_parts(out, scale, sums, w, layer, out_dtype)


def unsupported(x: Any, w: QTensor, out_dtype: Any) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape."""
    group, k = w.group_size, w.layout.k
    if reason := integer_operands_gpu.unsupported(x, w, out_dtype):
        return reason
    if w.order != "nk":
        return 'the words of a column do not lie together: `reorder(w, "nk")` once, when the model is loaded'
    if w.layout.n % ROWS or k % 64:
        return f"N must be a multiple of {ROWS}, and K of 64"
    if group != k and (group % 64 or math.lcm(group, _PART) > _MOST_K):
        return f"the size of a group must be a multiple of 64, and its multiples of {_PART} at most {_MOST_K}"
    return None


# --- Tiles ----------------------------------------------------------------------------------------------------------

# A block may have 227 KiB of shared memory, of which barriers, ones and what Mosaic GPU keeps for itself take less
# than 4.
_SMEM = 223 * 1024
_PART = 128  # values along K that a row of a tile in shared memory holds
_MOST_K, _MOST_GROUPS = 512, 4  # in a tile: more would be longer code, and no faster
_SIZES = (8, 16, 24, *range(32, 257, 16))  # of rows that `wgmma` multiplies integers with
_HEIGHTS = (64, 96, 128, 192, 256)
_SHAPES = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4))  # warpgroups along N and along K
_STRIP = 32  # rows of a tile of the result that are scaled and written at a time

# NVIDIA H100 SXM, in clocks of 1.75 GHz, as in `matmul_mosaic_gpu`: bytes that a multiprocessor gets from memory and
# from the cache.
_MEMORY, _CACHE = 13.0, 26.0
# Counted in the machine code: instructions of a warp for 64 x 128 int4 weights; clocks of a scheduler for each element
# of a tile and each group, as conversions and comparisons take two.
_UNPACK, _SCALE = 100, 7
# Guesses: clocks to fill the ring and to write a tile; to begin a step; to take a turn at a shared sum; of the kernel
# that adds up splits; how much of what runs beside the slowest part of a step it delays.
_TILE, _STEP, _TURN, _LAUNCH, _DELAY = 2000, 60, 120, 3500, 0.25


def default_blocks(m: int, w: QTensor, *, ones: int = 0, batch: int = 1) -> Blocks:
    """Tiles that should take the fewest clocks, by a count of what each multiprocessor has to do. Nothing was timed.

    A step takes about as long as the slowest of its product, its instructions, its words from memory and its tiles from
    the cache; tiles are given out in waves.

    Args:
        m: rows of x.
        w: the weight.
        ones: rows of ones, 8 where x has zero points.
        batch: products of this size.
    """
    k, n, bits, group = w.layout.k, w.layout.n, w.spec.format.bits, w.group_size
    processors = (blocks_gpu.target() or blocks_gpu.CHIPS["h100"]).processors

    def clocks(blocks: Blocks) -> float:
        tiles = batch * _ceil(m, blocks.m) * _ceil(n, blocks.n) * blocks.splits
        waves, steps = _ceil(tiles, processors), _ceil(_ceil(k, blocks.k), blocks.splits)
        words = blocks.n * blocks.k * bits / 8
        parts = blocks.n / ROWS * blocks.k / _PART  # 64 x 128 weights
        unpacking = _STEP + (parts * _UNPACK if bits == 4 else 0)
        scaling = blocks.k / group * blocks.n / ROWS * blocks.m / 2 * _SCALE if group < k else 0
        each = (
            parts * 2 * (blocks.m + ones),  # a product of 64 x 128 with 8 rows takes 16 clocks
            unpacking * max(1.0, 4 / blocks.warpgroups) + scaling,  # with fewer warps, nothing runs while one waits
            blocks.ways * _TURN if blocks.ways > 1 else 0,
            words / _MEMORY * min(1.0, tiles / processors),
            (words + min(m, blocks.m) * blocks.k) / _CACHE,
        )
        step = (1 - _DELAY) * max(each) + _DELAY * sum(each)
        sums = 2 * 4 * blocks.splits * batch * m * n / (_MEMORY * processors)
        return waves * (steps * step + _TILE) + (_LAUNCH + sums if blocks.splits > 1 else 0)

    return min(candidates(m, w, ones=ones), key=clocks)


def candidates(m: int, w: QTensor, *, ones: int = 0) -> list[Blocks]:
    """Tiles that fit the operands, registers and shared memory; arguments as for `default_blocks`."""
    k, group = w.layout.k, w.group_size
    whole = group == k
    heights = _HEIGHTS
    if m + ones <= _HEIGHTS[0]:
        heights = [next(size for size in _SIZES if size >= m + ones)]
    depth = _PART if whole else math.lcm(group, _PART)
    found = []
    for height, (columns, ways), parts in itertools.product(heights, _SHAPES, (1, 2, 4)):
        part = parts * depth
        blocks = Blocks(m=height - ones, n=ROWS * columns, k=ways * part, ways=ways, stages=2, splits=1)
        if blocks.n > w.layout.n or (parts > 1 and part > min(k, _MOST_K, _MOST_GROUPS * group)):
            continue
        if height > _tallest(blocks.warpgroups, w, ones) or blocks.m >= m + _HEIGHTS[0]:
            continue
        if ways > 1 and (whole or blocks.m > _STRIP or blocks.k > min(k, 2 * _MOST_K)):
            continue
        stages = min(8, (_SMEM - _kept(blocks)) // _stage(blocks, w, ones))
        if stages >= 3:  # one that is multiplied, one that is filled, and one for when memory is late
            most = min(16, _ceil(k, blocks.k) // stages) if m <= 256 and whole else 1
            found += [
                dataclasses.replace(blocks, stages=stages, splits=splits) for splits in range(1, max(most, 1) + 1)
            ]
    return found


def _stage(blocks: Blocks, w: QTensor, ones: int) -> int:
    """Bytes of shared memory of a stage."""
    return blocks.k * (blocks.m + ones + blocks.n * w.spec.format.bits // 8)


def _kept(blocks: Blocks) -> int:
    """Bytes of shared memory of what is written, and of sums that warpgroups share."""
    return 4 * blocks.n * (min(_STRIP, blocks.m) + (blocks.m if blocks.ways > 1 else 0))


def _tallest(warpgroups: int, w: QTensor, ones: int) -> int:
    """The most rows of x and of ones whose sums fit into the registers of so many warpgroups."""
    if warpgroups > 2:
        return 64
    if w.group_size == w.layout.k:
        return 256
    return 96 if ones and w.scales.zero is not None else 128  # both have zero points: numbers for each row and group


def _strips(m: int) -> list[tuple[int, int]]:
    """First row and number of rows of the parts of a tile that are scaled and written at a time."""
    return [(start, min(_STRIP, m - start)) for start in range(0, m, _STRIP)]


def _check(blocks: Blocks, w: QTensor, ones: int) -> None:
    n, whole = w.layout.n, w.group_size == w.layout.k
    tallest = _tallest(blocks.warpgroups, w, ones)
    if not (
        blocks.m > 0
        and blocks.m + ones in _SIZES
        and blocks.m + ones <= tallest
        and blocks.n in range(ROWS, min(n, 256) + 1, ROWS)
        and blocks.warpgroups <= 4
        and blocks.k % (_PART * blocks.ways) == 0
        and (blocks.ways == 1 or (not whole and blocks.m <= _STRIP))
        and (whole or (blocks.k % (w.group_size * blocks.ways) == 0 and blocks.splits == 1))
        and blocks.stages >= 2
    ):
        rows = f"m + {ones}" if ones else "m"
        along_k = f"{_PART} * ways" if whole else f"{_PART} * ways and {w.group_size} * ways"
        only = "ways 1" if whole else f"splits 1, ways 1 if m is above {_STRIP}"
        raise ValueError(
            f"qjax: {blocks} for a packed matrix with N={n}: {rows} must be 8, 16, 24 or a multiple of 16, at most "
            f"{tallest}; n a multiple of {ROWS}, at most N; k a multiple of {along_k}; stages 2 or more; "
            f"n / {ROWS} * ways at most 4; {only}."
        )
    needed = _kept(blocks) + blocks.stages * _stage(blocks, w, ones)
    if needed > _SMEM:
        raise ValueError(
            f"qjax: {blocks} take {needed} bytes of shared memory, of which there are {_SMEM}: use fewer stages or "
            "smaller tiles."
        )


def _ceil(size: int, tile: int) -> int:
    return -(-size // tile)


# --- The kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Product:
    """What the kernel has to know beside its operands: `ones` are the rows of ones below those of x in a tile."""

    m: int
    k: int
    n: int
    bits: int
    group: int
    out_dtype: jnp.dtype
    blocks: Blocks
    ones: int

    @property
    def whole(self) -> bool:
        """Whether all of K shares a scale."""
        return self.group == self.k

    @property
    def width(self) -> int:
        """Values along K that are multiplied at a time: rows of tiles, and groups, are multiples of it."""
        return math.gcd(_PART, self.k, self.group)

    @property
    def part(self) -> int:
        """How much of K of a tile a warpgroup takes."""
        return self.blocks.k // self.blocks.ways

    @property
    def steps(self) -> int:
        """Tiles along K that a block takes for a tile of the result."""
        return _ceil(_ceil(self.k, self.blocks.k), self.blocks.splits)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the result along M and N."""
        return _ceil(self.m, self.blocks.m), _ceil(self.n, self.blocks.n)


_BAND = 8  # tiles along M that follow each other before the next one along N: so many share words in the cache


def _call(product: _Product, operands: dict[str, Array], interpret: bool) -> Array:
    """The product with each matrix of one layer of the stack, `(splits, B, M, N)`: parts along K are int32 sums."""
    blocks, x, words = product.blocks, operands["x"], operands["words"]
    stack, columns = x.shape[0], blocks.n // ROWS
    width = product.width
    units = stack * math.prod(product.grid) * blocks.splits
    processors = (blocks_gpu.target() or blocks_gpu.CHIPS["h100"]).processors
    scratch = {
        "x_ring": plgpu.SMEM(
            (blocks.stages, blocks.m + product.ones, blocks.k), jnp.int8, transforms=swizzled(8, width)
        ),
        "w_ring": plgpu.SMEM(
            (blocks.stages, blocks.n, blocks.k), words.dtype, transforms=swizzled(product.bits, width)
        ),
        "out_tile": plgpu.SMEM(
            (columns, min(_STRIP, blocks.m), ROWS),
            product.out_dtype,
            transforms=swizzled(8 * product.out_dtype.itemsize, ROWS),
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        "empty": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
    }
    if product.ones:
        scratch["ones_full"] = plgpu.Barrier(num_arrivals=blocks.stages, num_barriers=1)
    if blocks.ways > 1:
        transforms = swizzled(32, math.gcd(blocks.m, 32))
        scratch["totals"] = plgpu.SMEM((columns, ROWS, blocks.m), jnp.float32, transforms=transforms)
        scratch["turns"] = plgpu.Barrier(num_arrivals=1, num_barriers=blocks.warpgroups)
    if interpret and product.bits == 4:  # an interpreted `wgmma` has no operand in registers
        shape = (blocks.warpgroups, ROWS, width)
        scratch["unpacked"] = plgpu.SMEM(shape, jnp.int8, transforms=swizzled(8, width))
    run = plgpu.kernel(
        functools.partial(_kernel, product, tuple(operands), units, stack),
        out_type=jax.ShapeDtypeStruct((blocks.splits, stack, product.m, product.n), product.out_dtype),
        grid=(min(units, processors),),
        grid_names=("block",),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # what is shared has barriers of its own
        ),
        interpret=interpreter() if interpret else None,
        kernel_name="integer_matmul",
    )
    return run(*operands.values())


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Where a tile of the result lies: indices of x and of the weight in their stacks, of the split; row and column."""

    x: Any
    w: Any
    split: Any
    m: Any
    n: Any


def _kernel(product: _Product, names: tuple[str, ...], units: int, stack: int, *refs: Any, **scratch: Any) -> None:
    """What one warpgroup does.

    Args:
        product: what is computed.
        names: of the operands.
        units: tiles of the result, times splits.
        stack: matrices of a layer.
        refs: the operands and the result, in global memory.
        scratch: shared memory and barriers.
    """
    blocks = product.blocks
    operands, out_ref = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    warpgroup, registers = lax.axis_index("warpgroup"), registers_for(blocks.warpgroups)
    layers = operands["words"].shape[0] // stack
    layer = operands["layer"][0]
    layer = jnp.clip(jnp.where(layer < 0, layer + layers, layer), 0, layers - 1)  # as lax.dynamic_index_in_dim

    def each_tile(body: Callable[[_Tile, Array], Array]) -> Array:
        """Calls `body` with each tile of this block and the stage of the ring that is next, which both return."""

        def with_tile(info: Any, carry: Array) -> Array:
            (unit,) = info.index
            grid, unit = product.grid, jnp.asarray(unit, jnp.int32)
            i, j = plgpu.planar_snake(lax.rem(unit, math.prod(grid)), grid, 0, min(_BAND, grid[0]))
            unit = lax.div(unit, math.prod(grid))
            tile = _Tile(
                x=lax.rem(unit, stack),
                w=layer * stack + lax.rem(unit, stack),
                split=lax.div(unit, stack),
                m=i * blocks.m,
                n=jnp.minimum(j * blocks.n, product.n - blocks.n),
            )
            return body(tile, carry)

        return plgpu.nd_loop((units,), collective_axes="block", init_carry=jnp.int32(0))(with_tile)

    @pl.when(warpgroup == blocks.warpgroups)
    def _copy() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="decrease")
        for stage in range(blocks.stages if product.ones else 0):
            below = scratch["x_ring"].at[stage, pl.ds(blocks.m, product.ones), :]
            plgpu.copy_gmem_to_smem(operands["ones"], below, scratch["ones_full"].at[0])
        stage = each_tile(functools.partial(_copy_tiles, product, operands["x"], operands["words"], **scratch))
        for _ in range(blocks.stages - 1):  # until all has been multiplied
            plgpu.barrier_wait(scratch["empty"].at[stage])
            stage = _next(stage, product)

    @pl.when(warpgroup < blocks.warpgroups)
    def _multiply() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        for stage in range(blocks.stages - 1):  # a stage is free when the step after it begins; so is the last one
            plgpu.barrier_arrive(scratch["empty"].at[stage])
        if product.ones:
            plgpu.barrier_wait(scratch["ones_full"].at[0])
        multiply = _add_all if product.whole else _add_groups
        each_tile(functools.partial(multiply, product, operands, out_ref, **scratch))
        plgpu.wait_smem_to_gmem(0)


def _next(stage: Array, product: _Product) -> Array:
    return jnp.where(stage == product.blocks.stages - 1, 0, stage + 1)


def _copy_tiles(product: _Product, x_ref: Any, w_ref: Any, tile: _Tile, stage: Array, **scratch: Any) -> Array:
    """Starts the copies of all steps of a tile of the result."""
    blocks, full = product.blocks, scratch["full"]

    def step(i: Any, stage: Array) -> Array:
        plgpu.barrier_wait(scratch["empty"].at[stage])
        ks = pl.ds((tile.split * product.steps + i) * blocks.k, blocks.k)
        plgpu.copy_gmem_to_smem(
            w_ref.at[tile.w, pl.ds(tile.n, blocks.n), ks], scratch["w_ring"].at[stage], full.at[stage]
        )
        plgpu.copy_gmem_to_smem(
            x_ref.at[tile.x, pl.ds(tile.m, blocks.m), ks],
            scratch["x_ring"].at[stage, pl.ds(0, blocks.m), :],
            full.at[stage],
        )
        return _next(stage, product)

    return lax.fori_loop(0, product.steps, step, stage)


def _accumulator(product: _Product) -> Any:
    return plgpu.WGMMAAccumulatorRef((ROWS, product.blocks.m + product.ones), jnp.int32)


def _add_all(
    product: _Product, operands: dict[str, Any], out_ref: Any, tile: _Tile, stage: Array, **scratch: Any
) -> Array:
    """A tile of the result, or of a part of it, where all of K shares a scale."""
    blocks = product.blocks

    def accumulate(sums: Any) -> tuple[Array, Array]:
        def step(_: Any, stage: Array) -> Array:
            _multiply(product, sums, stage, 0, blocks.k, **scratch)
            return _next(stage, product)

        return lax.fori_loop(0, product.steps, step, stage), sums[...]

    stage, sums = pl.run_scoped(accumulate, _accumulator(product))
    columns = _columns(product, sums)
    zeros = _by_row(product, operands.get("zero"), (tile.x,), tile)
    row_sums = _by_row(product, operands.get("sums"), (tile.x, 0), tile)
    scales = _by_row(product, operands["scale"], (tile.x,), tile)
    weight_zero = _by_column(product, operands.get("weight_zero"), tile, 0)
    for i, (start, size) in enumerate(_strips(blocks.m)):
        part = _centred(sums[:, start : start + size], columns, zeros[i], weight_zero, row_sums[i])
        if blocks.splits == 1:
            part = _rescaled(_scaled(part, _by_column(product, operands["values"], tile, 0)), scales[i])
        _write(out_ref, tile, part.astype(product.out_dtype), start, **scratch)
    return stage


def _add_groups(
    product: _Product, operands: dict[str, Any], out_ref: Any, tile: _Tile, stage: Array, **scratch: Any
) -> Array:
    """A tile of the result where each group has a scale: groups are added in ascending order."""
    blocks = product.blocks
    strips = _strips(blocks.m)
    column, way = _place(product)
    zeros = _by_row(product, operands.get("zero"), (tile.x,), tile)

    def scaled(i: Any, stage: Array, first: int) -> list[Array]:
        """The sum of a group, in strips, from `first` of what this warpgroup takes of a stage."""
        group = lax.div(i * blocks.k + way * product.part + first, product.group)
        # from global memory, before the wait for the tile
        values = _by_column(product, operands["values"], tile, group)
        if product.k % blocks.k:  # the last tile reaches beyond the last group
            values = jnp.where(group * product.group < product.k, values, 0)
        weight_zero = _by_column(product, operands.get("weight_zero"), tile, group)
        group = jnp.minimum(group, _ceil(product.k, product.group) - 1)
        row_sums = _by_row(product, operands.get("sums"), (tile.x, group), tile)

        def accumulate(sums: Any) -> Array:
            _multiply(product, sums, stage, first, product.group, **scratch)
            return sums[...]

        sums = pl.run_scoped(accumulate, _accumulator(product))
        columns = _columns(product, sums)
        return [
            _scaled(_centred(sums[:, start : start + size], columns, zero, weight_zero, row_sum), values)
            for (start, size), zero, row_sum in zip(strips, zeros, row_sums, strict=True)
        ]

    def write(totals: list[Array]) -> None:
        scales = _by_row(product, operands["scale"], (tile.x,), tile)
        for (start, _), total, scale in zip(strips, totals, scales, strict=True):
            _write(out_ref, tile, _rescaled(total, scale).astype(product.out_dtype), start, **scratch)

    totals = [plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA) for _, size in strips]
    firsts = range(0, product.part, product.group)
    if blocks.ways == 1:

        def step(i: Any, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            stage, totals = carry
            for first in firsts:
                totals = [total + part for total, part in zip(totals, scaled(i, stage, first), strict=True)]
            return _next(stage, product), totals

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
        return _next(stage, product)

    stage = lax.fori_loop(0, product.steps, step_in_turn, stage)

    @pl.when(way == 0)
    def _end() -> None:
        plgpu.barrier_wait(turns.at[column * blocks.ways])
        write([load(shared, plgpu.Layout.WGMMA, optimized=True)])

    return stage


def _place(product: _Product) -> tuple[Any, Any]:
    """Which columns of a tile, and which part of it along K, this warpgroup takes."""
    warpgroup, columns = lax.axis_index("warpgroup"), product.blocks.n // ROWS
    return (warpgroup, 0) if product.blocks.ways == 1 else (lax.rem(warpgroup, columns), lax.div(warpgroup, columns))


def _columns(product: _Product, sums: Int32[Array, "64 _"]) -> Int32[Array, " 64"] | None:
    """Sums of the codes of each column of the weight: its products with rows of ones, which are all the same."""
    return jnp.max(sums[:, product.blocks.m :], axis=1) if product.ones else None


def _multiply(product: _Product, sums: Any, stage: Array, first: int, size: int, **scratch: Any) -> None:
    """Adds the product of a stage of the ring, or of a group in it, to the sums.

    Args:
        product: what is computed.
        sums: the accumulator.
        stage: of the ring.
        first, size: what part of what this warpgroup takes of the stage.
        scratch: shared memory and barriers.
    """
    (column, way), width = _place(product), product.width

    def along_k(start: int, size: int) -> Any:
        return pl.ds(way * product.part + start, size)

    if first == 0:
        plgpu.barrier_wait(scratch["full"].at[stage])
    w_tile = scratch["w_ring"].at[stage, pl.ds(column * ROWS, ROWS), :]
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
        if start == 0:  # the stage before this one was multiplied
            before = jnp.where(stage == 0, product.blocks.stages - 1, stage - 1)
            plgpu.barrier_arrive(scratch["empty"].at[before])


def _by_column(product: _Product, ref: Any, tile: _Tile, group: Any) -> Any:
    """Scales or zero points of a group, by column of the weight; None where there are none."""
    if ref is None:
        return None
    if ref.shape[-2] == 1:  # one for the whole matrix
        return jnp.broadcast_to(ref[tile.w, 0, 0], (ROWS,))
    columns = pl.ds(tile.n + _place(product)[0] * ROWS, ROWS)
    group = 0 if product.whole else jnp.minimum(group, ref.shape[-1] - 1)
    return load(ref.at[tile.w, columns, group], plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _by_row(product: _Product, ref: Any, at: tuple[Any, ...], tile: _Tile) -> list[Any]:
    """What is known of the rows of x, for each strip of a tile; Nones where there is nothing."""
    strips = _strips(product.blocks.m)
    if ref is None:
        return [None for _ in strips]
    layout = plgpu.Layout.WGMMA.reduce(0)
    return [load(ref.at[*at, pl.ds(tile.m + start, size)], layout, optimized=False) for start, size in strips]


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
        weight_zero, row_sums: zero points of the weight, and what `integer_operands_gpu.row_sums` are; or None.
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
    """The sum of groups times the scales of x: `integer_matmul_cpu.rescale` of a transposed tile."""
    return jnp.where(total == 0, 0.0, total) * lax.broadcast_in_dim(scale, total.shape, (1,))


def _write(out_ref: Any, tile: _Tile, part: Array, start: int, **scratch: Any) -> None:
    """Copies a strip of a tile out, once the strip before it has left shared memory."""
    warpgroup = lax.axis_index("warpgroup")  # of those that share a tile along K, the first
    size = part.shape[1]
    out_tile = scratch["out_tile"].at[warpgroup, pl.ds(0, size), :]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_tile.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    rows = pl.ds(tile.n + warpgroup * ROWS, ROWS)
    plgpu.copy_smem_to_gmem(out_tile, out_ref.at[tile.split, tile.x, pl.ds(tile.m + start, size), rows])
