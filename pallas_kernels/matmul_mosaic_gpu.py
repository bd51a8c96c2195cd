"""`quantized_matmul` on NVIDIA Hopper: a Mosaic GPU kernel that unpacks words in registers, and multiplies from there.

What is computed is `out.T = w.T @ x.T`, because the left operand of `wgmma` may come from registers: packed int4 or
int8 go from shared memory to registers, become bfloat16 or float16 there, are scaled there, and are multiplied. So K
has to lie contiguous in the words: order "nk" (`qtensor.reorder`), made when a model is loaded. No other order is
taken: to transpose words in every call would cost more than the product.

**Roles.** A block is one warpgroup that starts TMA copies of tiles of x and of words, and up to four that multiply. A
ring of stages in shared memory lies between them. Those that multiply share a tile along N, and along K
(`Blocks.ways`), where there are few columns and more warps are needed to unpack than there are rows of 64; their sums
meet in shared memory. Blocks are as many as the chip has multiprocessors and take one tile of the result after the
other, so that copies for the next one start while the last one is written. Few tiles are split along K too
(`Blocks.splits`), to give every multiprocessor work; the parts are float32 and are added up afterwards, in the same
order each time.

**Edges.** TMA reads zeros beyond the end of an array and writes nothing there, which is all that M and K need, where
its own tiles cut them: K and N have to be multiples of 64, and x gets rows up to a multiple of 8. The last tile along N
is moved back to end with the matrix: some columns are computed twice, to the same bits.

**Scales.** Those of a group are read from global memory before the wait for the tile that they belong to, and go into
the weights. One scale for all of K goes into the float32 sums. A scanned stack is not sliced: the index of the layer is
read in the kernel, and picks words and scales out of the whole stack.

**Precision.** Sums are float32, operands what `gpu_operands` says. A weight with a scale for each group is rounded to
the type of the product; a scale of another type is rounded to it before. From `matmul_reference`, a result differs by
at most 2 eps of that type of what is multiplied in each product, as `2 * eps * (abs(x) @ abs(w))`.
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
from jaxtyping import Array, Float, Int

from pallas_kernels import blocks_gpu, gpu_operands, matmul_reference
from pallas_kernels.qtensor import QTensor

ROWS = 64  # columns of the weight that one warpgroup multiplies: the height of `wgmma`
_TILE_ROWS = 8  # TMA writes tiles of so many rows, which have to cut an array, unless it has fewer, without a rest


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Attributes:
        m: rows of x in a tile, a multiple of 8, at most 256.
        n: columns of the weight in a tile, a multiple of 64, at most 256.
        k: how much of K is in a tile, a multiple of 128 * `ways`.
        ways: warpgroups that share a tile along K.
        stages: tiles of x and of the weight in shared memory, at least 2.
        splits: parts that K is cut into, for different blocks.
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


# --- Versions of JAX ------------------------------------------------------------------------------------------------


def _load(ref: Any, layout: Any, *, optimized: bool) -> Array:
    """What memory holds, in registers; if `optimized`, without conflicts of banks, or it is an error."""
    at = ((),) if jax.__version_info__ < (0, 11) else ()  # an index was required
    return plgpu.load(ref, *at, layout=layout, optimized=optimized)


def _interpreter() -> Any:
    """What makes a kernel run as XLA operations, on any platform."""
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError("qjax: jax 0.10 does not interpret this kernel; jax 0.11 and newer do.")
    return plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]


# --- The product ----------------------------------------------------------------------------------------------------


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
    """What `matmul_reference.matmul` computes, up to rounding; the reference itself where `unsupported` says why.

    Args:
        x, w, layer, casts, precision, preferred_element_type, transpose: as for the reference.
        blocks: how to cut the product, if not as `default_blocks` says.
        interpret: runs the kernel as XLA operations, on any platform; jax 0.11 or newer.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    chain = (w.dtype, *casts)
    out_dtype = jnp.dtype(preferred_element_type or jnp.promote_types(x.dtype, chain[-1]))
    if unsupported(x, w, casts, out_dtype, precision=precision, transpose=transpose):
        return matmul_reference.matmul(
            x,
            w,
            layer=layer,
            casts=casts,
            precision=precision,
            preferred_element_type=preferred_element_type,
            transpose=transpose,
        )
    *stack, m, k = x.shape
    n, bits = w.layout.n, w.spec.format.bits
    x = gpu_operands.split(x.reshape(-1, m, k), gpu_operands.operand_dtype(x.dtype, chain))
    rows = x.shape[1]
    if rows > _TILE_ROWS:
        x = jnp.pad(x, ((0, 0), (0, -rows % _TILE_ROWS), (0, 0)))
    if blocks is None and (entry := blocks_gpu.lookup(rows, k, n, w.spec, x.dtype)):
        blocks = Blocks(**entry)
    blocks = blocks or default_blocks(rows, k, n, bits, batch=x.shape[0], out_dtype=out_dtype)
    kept = jnp.dtype(jnp.float32) if rows > m or blocks.splits > 1 else out_dtype
    _check(blocks, n, bits, kept)
    words = w.words
    if bits == 4:
        words = lax.bitcast_convert_type(words, jnp.int4)  # (..., N, K / 8, 8), which moves nothing
    words = words.reshape(-1, n, k)
    scales, zeros = (None if a is None else a.reshape(-1, *a.shape[-2:]) for a in (w.scales.values, w.scales.zero))
    assert scales is not None
    product = _Product(x.shape[1], k, n, bits, w.group_size, x.dtype, kept, blocks)
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), 1)
    out = _call(product, index, x, words, scales, zeros, interpret)
    out = (out[0] if blocks.splits == 1 else out.sum(axis=0))[:, :rows]
    return gpu_operands.join(out, m).reshape(*stack, m, n).astype(out_dtype)


def unsupported(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, *, precision: Any = None, transpose: bool = False
) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape and a dtype."""
    if reason := gpu_operands.unsupported(x, w, casts, out_dtype, precision, transpose):
        return reason
    if w.order != "nk":
        return 'the words of a column do not lie together: `reorder(w, "nk")` once, when the model is loaded'
    if w.layout.n % ROWS or w.layout.k % _CHUNKS[0]:
        return f"N must be a multiple of {ROWS}, and K of {_CHUNKS[0]}"
    if w.group_size != w.layout.k and w.group_size % _CHUNKS[-1]:
        return f"the size of a group must be a multiple of {_CHUNKS[-1]}"
    return None


# --- Tiles ----------------------------------------------------------------------------------------------------------

# A block may have 227 KiB of shared memory, of which barriers and what Mosaic GPU keeps for itself take less than 3.
_SMEM = 224 * 1024
_PART = 128  # a warpgroup takes a multiple of so much of K from a tile
_CHUNKS = (64, 32)  # of it that are unpacked while the one before is multiplied; one of them divides the group
_HEIGHTS = (64, 96, 128, 192, 256)
_SHAPES = ((2, 1), (4, 1), (2, 2), (1, 4), (1, 2), (1, 1))  # warpgroups along N and along K

# NVIDIA H100 SXM, in clocks of 1.75 GHz: bytes that a multiprocessor gets of 3.35 TB/s, of which copies reach nine
# tenths, and of about twice that from the cache.
_MEMORY, _CACHE = 13.0, 26.0
_UNPACK = 240  # instructions of a warp for 64 x 128 weights: counted in the machine code
# Guesses: clocks to fill the ring and to write a tile; clocks of the kernel that adds up splits; how much of what runs
# beside the slowest part of a step it delays.
_TILE, _LAUNCH, _DELAY = 2000, 3500, 0.25


def default_blocks(m: int, k: int, n: int, bits: int, *, batch: int = 1, out_dtype: Any = jnp.float32) -> Blocks:
    """The first of `ranked`, arguments as for it."""
    return ranked(m, k, n, bits, batch=batch, out_dtype=out_dtype)[0]


def ranked(m: int, k: int, n: int, bits: int, *, batch: int = 1, out_dtype: Any = jnp.float32) -> list[Blocks]:
    """Tiles in the order of the clocks that a product should take, by a count of what each multiprocessor has to do.

    A step takes about as long as the slowest of its product, its instructions, its words from memory and its tiles from
    the cache; tiles are given out in waves. Nothing of this was timed.

    Args:
        m: rows of x.
        k, n: sizes of the weight's matrix; `n` at least 64.
        bits: of a code.
        batch: products of this size.
        out_dtype: of the result.
    """
    processors = _processors()

    def clocks(blocks: Blocks) -> float:
        tiles = batch * _ceil(m, blocks.m) * _ceil(n, blocks.n) * blocks.splits
        waves, steps = _ceil(tiles, processors), _ceil(_ceil(k, blocks.k), blocks.splits)
        weights = blocks.n / ROWS * blocks.k / _PART  # tiles of 64 x 128 of them
        words = blocks.n * blocks.k * bits / 8
        parts = (
            weights * 4 * blocks.m,  # a product of 64 x 128 with 8 rows takes 32 clocks
            weights * _UNPACK * max(1.0, 4 / blocks.warpgroups),  # with fewer warps, nothing runs while one waits
            words / _MEMORY * min(1.0, tiles / processors),
            (words + min(m, blocks.m) * blocks.k * 2) / _CACHE,
        )
        step = (1 - _DELAY) * max(parts) + _DELAY * sum(parts)
        sums = 2 * 4 * blocks.splits * batch * m * n / (_MEMORY * processors)
        return waves * (steps * step + _TILE) + (_LAUNCH + sums if blocks.splits > 1 else 0)

    return sorted(candidates(m, k, n, bits, out_dtype=out_dtype), key=clocks)


def candidates(m: int, k: int, n: int, bits: int, *, out_dtype: Any = jnp.float32) -> list[Blocks]:
    """Tiles that fit the operands, registers and shared memory; arguments as for `ranked`."""
    heights = [_ceil(m, 8) * 8] if m <= _HEIGHTS[0] else [b for b in _HEIGHTS if b < m + _HEIGHTS[0]]
    found = []
    for height, (columns, ways), parts in itertools.product(heights, _SHAPES, (1, 2)):
        part = parts * _PART
        blocks = Blocks(m=height, n=ROWS * columns, k=ways * part, ways=ways, stages=2, splits=1)
        if blocks.n > n or (blocks.k > k and blocks.k > _PART) or height > _tallest(blocks):
            continue
        stages = min(8, (_SMEM - _smem(blocks, bits, out_dtype, 0)) // _smem(blocks, bits, None, 1))
        if stages >= 2:
            most = min(16, _ceil(k, blocks.k) // stages) if m <= 256 else 1
            found += [
                dataclasses.replace(blocks, stages=stages, splits=splits) for splits in range(1, max(most, 1) + 1)
            ]
    return found


def _smem(blocks: Blocks, bits: int, out_dtype: Any, stages: int) -> int:
    """Bytes of shared memory of so many stages, and of the result unless its type is None."""
    rings = stages * blocks.k * (blocks.m * 2 + blocks.n * bits // 8)
    if out_dtype is None:
        return rings
    parts = (blocks.ways - 1) * blocks.n * blocks.m * 4
    return rings + parts + blocks.n * _strip(blocks.m) * jnp.dtype(out_dtype).itemsize


def _tallest(blocks: Blocks) -> int:
    """The most rows of x whose sums fit into the registers of so many warpgroups."""
    return 256 if blocks.warpgroups <= 2 else 64


def _strip(m: int) -> int:
    """Rows of a tile of the result that are written at a time."""
    return next(rows for rows in (32, 24, 16, 8) if m % rows == 0)


def _check(blocks: Blocks, n: int, bits: int, out_dtype: Any) -> None:
    if not (
        blocks.m in range(8, _tallest(blocks) + 1, 8)
        and blocks.n in range(ROWS, min(n, 256) + 1, ROWS)
        and blocks.k % (_PART * blocks.ways) == 0
        and blocks.stages >= 2
    ):
        raise ValueError(
            f"qjax: {blocks} for a packed matrix with N={n}: m must be a multiple of 8 and at most {_tallest(blocks)}, "
            f"n a multiple of {ROWS} and at most 256 and N, k a multiple of {_PART} * ways, stages at least 2."
        )
    needed = _smem(blocks, bits, out_dtype, blocks.stages)
    if needed > _SMEM:
        raise ValueError(
            f"qjax: {blocks} take {needed} bytes of shared memory, of which there are {_SMEM}: use fewer stages or "
            "smaller tiles."
        )


def _processors() -> int:
    """Multiprocessors of the GPU that programs are made for."""
    return (blocks_gpu.target() or blocks_gpu.CHIPS["h100"]).processors


def _ceil(size: int, tile: int) -> int:
    return -(-size // tile)


# --- The kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Product:
    """What the kernel has to know beside its operands: sizes, and dtypes of operands of the dot and of the result."""

    m: int
    k: int
    n: int
    bits: int
    group: int
    dtype: Any
    out_dtype: jnp.dtype
    blocks: Blocks

    @property
    def whole(self) -> bool:
        """Whether all of K shares a scale."""
        return self.group == self.k

    @property
    def part(self) -> int:
        """How much of K of a tile a warpgroup takes."""
        return self.blocks.k // self.blocks.ways

    @property
    def chunk(self) -> int:
        """How much of K is unpacked at a time."""
        return next(size for size in _CHUNKS if self.whole or self.group % size == 0)

    @property
    def steps(self) -> int:
        """Tiles along K that a block takes for a tile of the result."""
        return _ceil(_ceil(self.k, self.blocks.k), self.blocks.splits)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the result along M and N."""
        return _ceil(self.m, self.blocks.m), _ceil(self.n, self.blocks.n)


_BAND = 4  # tiles along M that follow each other before the next one along N: so many share words in the cache


def _call(
    product: _Product,
    layer: Int[Array, " 1"],
    x: Float[Array, "B M K"],
    words: Int[Array, "LB N K"],
    scales: Float[Array, "LB _ _"],
    zeros: Int[Array, "LB _ _"] | None,
    interpret: bool,
) -> Float[Array, "splits B M N"]:
    """The product with each matrix of one layer of the stack, in parts along K."""
    blocks, dtype, stack = product.blocks, product.dtype, x.shape[0]
    columns, strip = blocks.n // ROWS, _strip(blocks.m)
    units = stack * math.prod(product.grid) * blocks.splits
    scratch = {
        "x_ring": plgpu.SMEM((blocks.stages, blocks.m, blocks.k), dtype, transforms=_swizzled(16, product.chunk)),
        "w_ring": plgpu.SMEM(
            (blocks.stages, blocks.n, blocks.k),
            words.dtype,
            transforms=_swizzled(product.bits, math.gcd(product.part, product.k)),
        ),
        "out_tile": plgpu.SMEM(
            (columns, strip, ROWS), product.out_dtype, transforms=_swizzled(8 * product.out_dtype.itemsize, ROWS)
        ),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        "empty": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
    }
    if blocks.ways > 1:
        shape, transforms = (blocks.ways - 1, columns, ROWS, blocks.m), _swizzled(32, math.gcd(blocks.m, 32))
        scratch["parts"] = plgpu.SMEM(shape, jnp.float32, transforms=transforms)
        scratch["parts_full"] = plgpu.Barrier(num_arrivals=blocks.ways - 1, num_barriers=columns)
        scratch["parts_empty"] = plgpu.Barrier(num_arrivals=1, num_barriers=columns)
    if interpret:  # an interpreted `wgmma` has no operand in registers
        shape = (blocks.warpgroups, ROWS, product.chunk)
        scratch["unpacked"] = plgpu.SMEM(shape, dtype, transforms=_swizzled(16, product.chunk))
    operands = [layer, x, words, scales, *([] if zeros is None else [zeros])]
    run = plgpu.kernel(
        functools.partial(_kernel, product, units, stack, zeros is not None),
        out_type=jax.ShapeDtypeStruct((blocks.splits, stack, product.m, product.n), product.out_dtype),
        grid=(min(units, _processors()),),
        grid_names=("block",),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # what is shared has barriers of its own
        ),
        interpret=_interpreter() if interpret else None,
        kernel_name="quantized_matmul",
    )
    return run(*operands)


def _swizzled(bits: int, width: int) -> tuple[Any, ...]:
    """How an array lies in shared memory whose rows are cut and read in multiples of `width` values."""
    swizzle = min(128, width * bits // 8)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _registers(warpgroups: int) -> tuple[int, int] | None:
    """Registers of a thread that copies and of one that multiplies; None if each may have as many as there are."""
    if warpgroups == 1:
        return None
    copies, launched = 40, 65536 // (128 * (warpgroups + 1)) // 8 * 8
    return copies, (launched * (warpgroups + 1) - copies) // warpgroups // 8 * 8


def _kernel(
    product: _Product, units: int, stack: int, has_zeros: bool, layer_ref: Any, *refs: Any, **scratch: Any
) -> None:
    """What one warpgroup does.

    Args:
        product: what is computed.
        units: tiles of the result, times splits.
        stack: matrices of a layer.
        has_zeros: whether weights have zero points.
        layer_ref: index of the layer.
        refs: x, words, scales, zero points, the result, in global memory.
        scratch: shared memory and barriers.
    """
    blocks, columns = product.blocks, product.blocks.n // ROWS
    x_ref, w_ref, *small_refs, out_ref = refs
    warpgroup, registers = lax.axis_index("warpgroup"), _registers(blocks.warpgroups)
    layers = w_ref.shape[0] // stack
    layer = layer_ref[0]
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
        stage = each_tile(functools.partial(_copy_tiles, product, x_ref, w_ref, **scratch))
        for _ in range(blocks.stages - 1):  # until all has been multiplied
            plgpu.barrier_wait(scratch["empty"].at[stage])
            stage = _next(stage, product)

    @pl.when(warpgroup < blocks.warpgroups)
    def _multiply() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        for stage in range(blocks.stages - 1):  # a stage is free when the step after it begins; so is the last one
            plgpu.barrier_arrive(scratch["empty"].at[stage])
        if blocks.ways > 1:

            @pl.when(warpgroup < columns)
            def _free() -> None:
                plgpu.barrier_arrive(scratch["parts_empty"].at[warpgroup])

        scales, zeros = small_refs if has_zeros else (small_refs[0], None)
        each_tile(functools.partial(_multiply_tiles, product, scales, zeros, out_ref, **scratch))
        plgpu.wait_smem_to_gmem(0)
        if blocks.ways > 1:

            @pl.when(warpgroup >= columns)
            def _read() -> None:
                plgpu.barrier_wait(scratch["parts_empty"].at[lax.rem(warpgroup, columns)])


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Where a tile of the result lies: indices of x and of the weight in their stacks, of the split; row and column."""

    x: Any
    w: Any
    split: Any
    m: Any
    n: Any


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
            x_ref.at[tile.x, pl.ds(tile.m, blocks.m), ks], scratch["x_ring"].at[stage], full.at[stage]
        )
        return _next(stage, product)

    return lax.fori_loop(0, product.steps, step, stage)


def _multiply_tiles(
    product: _Product, scales: Any, zeros: Any, out_ref: Any, tile: _Tile, stage: Array, **scratch: Any
) -> Array:
    """A tile of the result: sums over all steps, over the warpgroups that share them, and out."""
    blocks = product.blocks
    columns = blocks.n // ROWS
    warpgroup = lax.axis_index("warpgroup")
    column, way = (warpgroup, 0) if blocks.ways == 1 else (lax.rem(warpgroup, columns), lax.div(warpgroup, columns))
    rows = pl.ds(tile.n + column * ROWS, ROWS)

    def small(ref: Any, k: Any) -> Array:
        """Scales or zero points of the group that k belongs to, by column."""
        if ref.shape[-2] == 1:  # one for the whole matrix
            return jnp.broadcast_to(ref[tile.w, 0, 0], (ROWS,))
        group = 0 if product.whole else jnp.minimum(lax.div(k, product.group), ref.shape[-1] - 1)
        return _load(ref.at[tile.w, rows, group], plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def accumulate(sums: Any) -> tuple[Array, Array]:
        def step(i: Any, stage: Array) -> Array:
            k = (tile.split * product.steps + i) * blocks.k + way * product.part
            starts = range(0, product.part, math.gcd(product.group, product.part))
            scale = None if product.whole else {start: small(scales, k + start) for start in starts}
            zero = None if zeros is None else {start: small(zeros, k + start) for start in starts}
            _multiply_step(product, sums, scale, zero, column, way, stage, **scratch)
            return _next(stage, product)

        return lax.fori_loop(0, product.steps, step, stage), sums[...]

    stage, sums = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((ROWS, blocks.m), jnp.float32))

    @pl.when(way > 0)
    def _give() -> None:
        plgpu.barrier_wait(scratch["parts_empty"].at[column])
        scratch["parts"][way - 1, column] = sums
        plgpu.barrier_arrive(scratch["parts_full"].at[column])

    @pl.when(way == 0)
    def _write() -> None:
        result = sums
        if blocks.ways > 1:
            plgpu.barrier_wait(scratch["parts_full"].at[column])
            for other in range(blocks.ways - 1):
                result += _load(scratch["parts"].at[other, column], plgpu.Layout.WGMMA, optimized=True)
            plgpu.barrier_arrive(scratch["parts_empty"].at[column])
        if product.whole:
            result *= lax.broadcast_in_dim(small(scales, 0).astype(jnp.float32), sums.shape, (0,))
        result = result.astype(product.out_dtype)
        out_tile, strip = scratch["out_tile"].at[column], _strip(blocks.m)
        for start in range(0, blocks.m, strip):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_tile.T[...] = plgpu.layout_cast(result[:, start : start + strip], plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, out_ref.at[tile.split, tile.x, pl.ds(tile.m + start, strip), rows])

    return stage


def _multiply_step(
    product: _Product,
    sums: Any,
    scale: dict[int, Array] | None,
    zero: dict[int, Array] | None,
    column: Any,
    way: Any,
    stage: Array,
    **scratch: Any,
) -> None:
    """Adds the product of two tiles, or of what this warpgroup takes of them, to the sums.

    One chunk of the weight is unpacked while the one before it is multiplied, in other registers.

    Args:
        product: what is computed.
        sums: the accumulator.
        scale, zero: by where a group starts in the tile; scales are None if all of K shares one.
        column, way: what part of the tile this warpgroup takes.
        stage: of the ring.
        scratch: shared memory and barriers.
    """
    blocks, chunk = product.blocks, product.chunk
    shape, length = (ROWS, chunk), math.gcd(product.group, product.part)
    upcast = plgpu.Layout.WGMMA_UPCAST_4X if product.bits == 4 else plgpu.Layout.WGMMA_UPCAST_2X

    def along_k(start: int, size: int) -> Any:
        return pl.ds(way * product.part + start, size)

    plgpu.barrier_wait(scratch["full"].at[stage])
    w_tile = scratch["w_ring"].at[stage, pl.ds(column * ROWS, ROWS), along_k(0, product.part)]
    codes = _load(w_tile, upcast, optimized=True)
    for start in range(0, product.part, chunk):
        group = start // length * length
        values = plgpu.layout_cast(codes[:, start : start + chunk], plgpu.Layout.WGMMA)
        if product.bits == 4:  # integers to bfloat16 is the conversion that Mosaic GPU has in few instructions
            values = values.astype(jnp.bfloat16)
        values = values.astype(product.dtype)
        if zero is not None:
            values -= lax.broadcast_in_dim(zero[group].astype(product.dtype), shape, (0,))
        if scale is not None:
            values *= lax.broadcast_in_dim(scale[group].astype(product.dtype), shape, (0,))
        x_tile = scratch["x_ring"].at[stage, :, along_k(start, chunk)].T
        if "unpacked" in scratch:  # interpreted
            unpacked = scratch["unpacked"].at[lax.axis_index("warpgroup")]
            unpacked[...] = values
            plgpu.commit_smem()
            plgpu.wgmma(sums, unpacked, x_tile)
            plgpu.wgmma_wait(0)
        else:
            plgpu.wgmma(sums, values, x_tile)
            plgpu.wgmma_wait(1)
        if start == 0:  # the stage before this one was read: its words are in registers, its x was multiplied
            before = jnp.where(stage == 0, blocks.stages - 1, stage - 1)
            plgpu.barrier_arrive(scratch["empty"].at[before])
