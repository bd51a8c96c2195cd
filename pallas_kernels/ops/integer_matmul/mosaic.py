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

**Epilogues.** As in `matmul_mosaic_gpu`, for products with one weight, and with two that have one scale for a column.
Mosaic GPU does not write a tile of bytes that is transposed, so codes of the next product's x are made by XLA.

**Edges.** As in `matmul_mosaic_gpu`: TMA reads zeros beyond the end and writes nothing there; K and N are multiples of
64, and x gets rows up to a multiple of 8. The last tile along N is moved back to end with the matrix.

Nothing here has run on a GPU: the kernel was interpreted, and compiled for sm_90a.
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
from jaxtyping import Array, Float, Int, Int8, Int32

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.gpu_operands import layer_operand
from qjax.pallas_kernels.backends.mosaic import (
    CACHE_BYTES,
    DELAY,
    LAUNCH_CLOCKS,
    MEMORY_BYTES,
    SMEM_BYTES,
    TILE_CLOCKS,
    WGMMA_ROWS,
    interpreter,
    load,
    next_stage,
    place,
    registers_for,
    swizzled,
    whole_rows,
)
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.ops.integer_matmul import gpu_operands as integer_matmul_gpu_operands
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.matmul.mosaic import ALONE, Beside, OtherTiles
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index

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
        return self.n // WGMMA_ROWS * self.ways


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
    """The epilogue of the products of x with one or two weights; see "Epilogues" above.

    Args:
        x: codes `(*stack, M, K)`, with scales and zero points `(*stack, M, 1)`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products, none that is `unsupported_epilogue`.
        blocks, interpret: as for `matmul`.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    inside = dataclasses.replace(epilogue, codes=None)
    out = _multiplied(x, weights, others, layers, inside, inside.out_dtype, blocks=blocks, interpret=interpret)
    if epilogue.codes is None:
        return out
    *stack, m, n = out.shape
    return epilogue.encoded(out.reshape(-1, m, n).astype(jnp.float32), others).reshape(*stack, m, n)


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
) -> Float[Array, "*stack M N"]:
    """What the epilogue makes of the products, or the only product, in this dtype."""
    w, *_ = weights
    *stack, m, k = x.codes.shape
    n, group = w.layout.n, w.group_size
    batch = math.prod(stack)
    rows = whole_rows(m)
    ones = 0 if x.zero is None else _ONES
    beside = Beside(len(weights), tuple((a.shape[-2] > 1, a.shape[-1] > 1, a.dtype) for a in others))
    blocks = blocks or default_blocks(rows, w, ones=ones, batch=batch, beside=beside)
    _check(blocks, w, ones, beside)
    whole = blocks.splits == 1
    kept, inside = (out_dtype, epilogue) if whole else (jnp.dtype(jnp.int32), None)
    beside = beside if whole else Beside(len(weights))
    product = _Product(rows, k, n, w.spec.format.bits, group, kept, blocks, ones, beside, inside)
    codes = jnp.pad(x.codes.reshape(batch, m, k), ((0, 0), (0, rows - m), (0, 0)))
    beyond = pl.cdiv(rows, blocks.m) * blocks.m - m

    def by_row(a: Array, dtype: Any) -> Array:
        """One number for each row, and for those that fill the last tile: `(B, rows)`."""
        return jnp.pad(a.reshape(batch, m), ((0, 0), (0, beyond))).astype(dtype)

    of_x, sums = {"x": codes, "scale": by_row(x.scale, jnp.float32)}, None
    if x.zero is not None:
        of_x["zero"] = by_row(x.zero, jnp.int32)
        of_x["ones"] = jnp.ones((_ONES, blocks.k), jnp.int8)
    if w.scales.zero is not None:
        zero = None if x.zero is None else x.zero.reshape(batch, m, 1)
        sums = integer_matmul_gpu_operands.row_sums(codes[:, :m], zero, group)
        if whole:
            of_x["sums"] = jnp.pad(sums, ((0, 0), (0, 0), (0, beyond)))

    def of_weight(w: QTensor, layer: Any) -> dict[str, Array]:
        words = w.words
        if w.spec.format.bits == 4:
            words = lax.bitcast_convert_type(words, jnp.int4)  # (..., N, K / 8, 8), which moves nothing
        arrays = {
            "layer": layer_operand(layer),
            "words": words.reshape(-1, n, k),
            "values": w.scales.values.reshape(-1, *w.scales.values.shape[-2:]),
        }
        if whole and w.scales.zero is not None:
            arrays["zero"] = w.scales.zero.reshape(-1, *w.scales.zero.shape[-2:])
        return arrays

    packed = [of_weight(w, layer) for w, layer in zip(weights, layers, strict=True)]
    read = [matmul_mosaic.as_read(a, blocks.m) for a in others] if inside else []
    results = [out[..., :m, :] for out in _call(product, of_x, packed, read, interpret)]
    if whole:
        return results[0][0].reshape(*stack, m, n)
    return integer_matmul_gpu_operands.finish_parts(
        results, x.scale, sums, weights, layers, others, epilogue, out_dtype
    )


def unsupported(x: Any, w: QTensor, out_dtype: Any) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape."""
    group, k = w.group_size, w.layout.k
    if reason := integer_matmul_gpu_operands.unsupported(x, w, out_dtype):
        return reason
    if w.order != "nk":
        return 'the words of a column do not lie together: `reorder(w, "nk")` once, when the model is loaded'
    if w.layout.n % WGMMA_ROWS or k % 64:
        return f"N must be a multiple of {WGMMA_ROWS}, and K of 64"
    if group != k and (group % 64 or math.lcm(group, _PART) > _MOST_K):
        return f"the size of a group must be a multiple of 64, and its multiples of {_PART} at most {_MOST_K}"
    return None


def unsupported_epilogue(epilogue: Epilogue, w: QTensor) -> str | None:
    """Why the kernel does not apply an epilogue to products with weights like this one, or None."""
    if epilogue.products > 1 and w.group_size != w.layout.k:
        return "two sums over groups and those of a group do not fit into registers"
    return matmul_mosaic.unsupported_epilogue(epilogue)


# --- Tiles ----------------------------------------------------------------------------------------------------------

_SMEM = SMEM_BYTES - 4 * 1024  # without barriers, ones and what Mosaic GPU keeps for itself

_PART = 128  # values along K that a row of a tile in shared memory holds

_MOST_K, _MOST_GROUPS = 512, 4  # in a tile: more would be longer code, and no faster

_SIZES = (8, 16, 24, *range(32, 257, 16))  # of rows that `wgmma` multiplies integers with

_HEIGHTS = (64, 96, 128, 192, 256)

_SHAPES = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4))  # warpgroups along N and along K

_STRIP = 32  # rows of a tile of the result that are scaled and written at a time

_BUFFERS = 2  # strips of another operand of the epilogue in shared memory

# Counted in the machine code: instructions of a warp for 64 x 128 int4 weights; clocks of a scheduler for each element
# of a tile and each group, as conversions and comparisons take two.
_UNPACK, _SCALE = 100, 7

_STEP, _TURN = 60, 120  # guesses: clocks to begin a step, and to take a turn at a shared sum


def default_blocks(m: int, w: QTensor, *, ones: int = 0, batch: int = 1, beside: Beside = ALONE) -> Blocks:
    """Tiles that should take the fewest clocks, by a count of what each multiprocessor has to do. Nothing was timed.

    A step takes about as long as the slowest of its product, its instructions, its words from memory and its tiles from
    the cache; tiles are given out in waves.

    Args:
        m: rows of x.
        w: the weight.
        ones: rows of ones, 8 where x has zero points.
        batch: products of this size.
        beside: what else a tile needs.
    """
    count = beside.weights
    k, n, bits, group = w.layout.k, w.layout.n, w.spec.format.bits, w.group_size
    processors = gpu_chips.processors()

    def clocks(blocks: Blocks) -> float:
        tiles = batch * pl.cdiv(m, blocks.m) * pl.cdiv(n, blocks.n) * blocks.splits
        waves, steps = pl.cdiv(tiles, processors), pl.cdiv(pl.cdiv(k, blocks.k), blocks.splits)
        words = count * blocks.n * blocks.k * bits / 8
        parts = count * blocks.n / WGMMA_ROWS * blocks.k / _PART  # 64 x 128 weights
        unpacking = _STEP + (parts * _UNPACK if bits == 4 else 0)
        scaling = blocks.k / group * blocks.n / WGMMA_ROWS * blocks.m / 2 * _SCALE if group < k else 0
        each = (
            parts * 2 * (blocks.m + ones),  # a product of 64 x 128 with 8 rows takes 16 clocks
            unpacking * max(1.0, 4 / blocks.warpgroups) + scaling,  # with fewer warps, nothing runs while one waits
            blocks.ways * _TURN if blocks.ways > 1 else 0,
            words / MEMORY_BYTES * min(1.0, tiles / processors),
            (words + min(m, blocks.m) * blocks.k) / CACHE_BYTES,
        )
        step = (1 - DELAY) * max(each) + DELAY * sum(each)
        sums = 2 * 4 * blocks.splits * count * batch * m * n / (MEMORY_BYTES * processors)
        return waves * (steps * step + TILE_CLOCKS) + (LAUNCH_CLOCKS + sums if blocks.splits > 1 else 0)

    return min(candidates(m, w, ones=ones, beside=beside), key=clocks)


def candidates(m: int, w: QTensor, *, ones: int = 0, beside: Beside = ALONE) -> list[Blocks]:
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
        blocks = Blocks(m=height - ones, n=WGMMA_ROWS * columns, k=ways * part, ways=ways, stages=2, splits=1)
        if blocks.n > w.layout.n or (parts > 1 and part > min(k, _MOST_K, _MOST_GROUPS * group)):
            continue
        if height > _tallest(blocks.warpgroups, w, ones, beside.weights) or blocks.m >= m + _HEIGHTS[0]:
            continue
        if ways > 1 and (whole or blocks.m > _STRIP or blocks.k > min(k, 2 * _MOST_K)):
            continue
        stages = min(8, (_SMEM - _kept(blocks, beside)) // _stage(blocks, w, ones, beside.weights))
        if stages >= 3:  # one that is multiplied, one that is filled, and one for when memory is late
            most = min(16, pl.cdiv(k, blocks.k) // stages) if m <= 256 and whole else 1
            found += [
                dataclasses.replace(blocks, stages=stages, splits=splits) for splits in range(1, max(most, 1) + 1)
            ]
    return found


def _stage(blocks: Blocks, w: QTensor, ones: int, weights: int) -> int:
    """Bytes of shared memory of a stage."""
    return blocks.k * (blocks.m + ones + weights * blocks.n * w.spec.format.bits // 8)


def _kept(blocks: Blocks, beside: Beside) -> int:
    """Bytes of shared memory of what is written, of sums that warpgroups share, and of what an epilogue reads."""
    others = _BUFFERS * sum(dtype.itemsize for _, dtype in beside.tiles)
    return blocks.n * ((4 + others) * min(_STRIP, blocks.m) + (4 * blocks.m if blocks.ways > 1 else 0))


def _tallest(warpgroups: int, w: QTensor, ones: int, weights: int) -> int:
    """The most rows of x and of ones whose sums fit into the registers of so many warpgroups."""
    if warpgroups > 2:
        return 64 // weights
    if w.group_size == w.layout.k:
        return 256 // weights
    return 96 if ones and w.scales.zero is not None else 128  # both have zero points: numbers for each row and group


def _check(blocks: Blocks, w: QTensor, ones: int, beside: Beside = ALONE) -> None:
    n, whole = w.layout.n, w.group_size == w.layout.k
    tallest = _tallest(blocks.warpgroups, w, ones, beside.weights)
    if not (
        blocks.m > 0
        and blocks.m + ones in _SIZES
        and blocks.m + ones <= tallest
        and blocks.n in range(WGMMA_ROWS, min(n, 256) + 1, WGMMA_ROWS)
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
            f"{tallest}; n a multiple of {WGMMA_ROWS}, at most N; k a multiple of {along_k}; stages 2 or more; "
            f"n / {WGMMA_ROWS} * ways at most 4; {only}."
        )
    needed = _kept(blocks, beside) + blocks.stages * _stage(blocks, w, ones, beside.weights)
    if needed > _SMEM:
        raise ValueError(
            f"qjax: {blocks} take {needed} bytes of shared memory, of which there are {_SMEM}: use fewer stages or "
            "smaller tiles."
        )


# --- The kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Product:
    """What the kernel has to know beside its operands.

    Attributes:
        m, k, n: rows of x, what is contracted, columns of the weight.
        bits, group: of the weight.
        out_dtype: of what is written.
        blocks, beside: how it is cut, and what is in it.
        ones: rows of ones below those of x in a tile.
        epilogue: what is made of the products in the kernel, if not the results themselves.
    """

    m: int
    k: int
    n: int
    bits: int
    group: int
    out_dtype: jnp.dtype
    blocks: Blocks
    ones: int
    beside: Beside
    epilogue: Epilogue | None

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
    def strips(self) -> list[tuple[int, int]]:
        """First row and number of rows of the parts of a tile that are scaled and written at a time."""
        return [(start, min(_STRIP, self.blocks.m - start)) for start in range(0, self.blocks.m, _STRIP)]

    @property
    def buffers(self) -> int:
        """Strips of another operand of the epilogue that are in shared memory."""
        return min(_BUFFERS, len(self.strips))

    @property
    def results(self) -> int:
        """Arrays that are written."""
        return 1 if self.epilogue else self.beside.weights

    @property
    def steps(self) -> int:
        """Tiles along K that a block takes for a tile of the result."""
        return pl.cdiv(pl.cdiv(self.k, self.blocks.k), self.blocks.splits)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the result along M and N."""
        return pl.cdiv(self.m, self.blocks.m), pl.cdiv(self.n, self.blocks.n)


_BAND = 8  # tiles along M that follow each other before the next one along N: so many share words in the cache


def _call(
    product: _Product,
    of_x: dict[str, Array],
    weights: Sequence[dict[str, Array]],
    others: Sequence[Array],
    interpret: bool,
) -> list[Array]:
    """What is made of the products with each matrix of one layer of the stack, `(splits, B, M, N)` each.

    Args:
        product: what is computed.
        of_x, weights: operands by name.
        others: what else the epilogue reads, as `matmul_mosaic_gpu.as_read` makes it.
        interpret: as for `matmul`.
    """
    blocks, x, words = product.blocks, of_x["x"], weights[0]["words"]
    stack, columns = x.shape[0], blocks.n // WGMMA_ROWS
    width, count = product.width, len(weights)
    units = stack * math.prod(product.grid) * blocks.splits
    strip = min(_STRIP, blocks.m)
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
        "full": plgpu.Barrier(num_arrivals=1 + count, num_barriers=blocks.stages),
        "empty": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
    }
    if product.ones:
        scratch["ones_full"] = plgpu.Barrier(num_arrivals=blocks.stages, num_barriers=1)
    if blocks.ways > 1:
        transforms = swizzled(32, math.gcd(blocks.m, 32))
        scratch["totals"] = plgpu.SMEM((columns, WGMMA_ROWS, blocks.m), jnp.float32, transforms=transforms)
        scratch["turns"] = plgpu.Barrier(num_arrivals=1, num_barriers=blocks.warpgroups)
    for i, own in product.beside.tiles:
        shape, transforms = (columns, product.buffers, strip, WGMMA_ROWS), swizzled(8 * own.itemsize, WGMMA_ROWS)
        scratch[f"other_{i}"] = plgpu.SMEM(shape, own, transforms=transforms)
    if arrivals := len(product.beside.tiles):
        scratch["others_full"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=columns * product.buffers)
    if interpret and product.bits == 4:  # an interpreted `wgmma` has no operand in registers
        shape = (blocks.warpgroups, WGMMA_ROWS, width)
        scratch["unpacked"] = plgpu.SMEM(shape, jnp.int8, transforms=swizzled(8, width))
    shape = jax.ShapeDtypeStruct((blocks.splits, stack, product.m, product.n), product.out_dtype)
    run = plgpu.kernel(
        functools.partial(_kernel, product, tuple(of_x), tuple(weights[0]), units, stack),
        out_type=[shape] * product.results,
        grid=(min(units, gpu_chips.processors()),),
        grid_names=("block",),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # what is shared has barriers of its own
        ),
        interpret=interpreter() if interpret else None,
        kernel_name="fused_integer_matmul" if product.epilogue else "integer_matmul",
    )
    return list(run(*of_x.values(), *itertools.chain(*(own.values() for own in weights)), *others))


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight in global memory: references to its arrays by name, and the index of the first matrix of its layer."""

    refs: dict[str, Any]
    first: Any


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
    weights: list[_Weight]
    others: list[Any]
    results: list[Any]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Where a tile of the result lies: index in the stack, index of the split; row and column."""

    matrix: Any
    split: Any
    m: Any
    n: Any


def _kernel(
    product: _Product,
    of_x: tuple[str, ...],
    of_weight: tuple[str, ...],
    units: int,
    stack: int,
    *refs: Any,
    **scratch: Any,
) -> None:
    """What one warpgroup does.

    Args:
        product: what is computed.
        of_x, of_weight: names of the operands that belong to x, and to each weight.
        units: tiles of the result, times splits.
        stack: matrices of a layer.
        refs: those operands, other ones of the epilogue, and the results, in global memory.
        scratch: shared memory and barriers.
    """
    blocks, rest = product.blocks, iter(refs)
    x_refs, weights = dict(zip(of_x, itertools.islice(rest, len(of_x)), strict=True)), []
    for _ in range(product.beside.weights):
        own = dict(zip(of_weight, itertools.islice(rest, len(of_weight)), strict=True))
        weights.append(_Weight(own, layer_index(own["layer"][0], own["words"].shape[0] // stack) * stack))
    operands = _Operands(x_refs, weights, list(itertools.islice(rest, len(product.beside.others))), list(rest))
    warpgroup, registers = lax.axis_index("warpgroup"), registers_for(blocks.warpgroups)

    def each_tile(body: Callable[[_Tile, Array], Array]) -> Array:
        """Calls `body` with each tile of this block and the stage of the ring that is next, which both return."""

        def with_tile(info: Any, carry: Array) -> Array:
            (unit,) = info.index
            grid, unit = product.grid, jnp.asarray(unit, jnp.int32)
            i, j = plgpu.planar_snake(lax.rem(unit, math.prod(grid)), grid, 0, min(_BAND, grid[0]))
            unit = lax.div(unit, math.prod(grid))
            tile = _Tile(
                matrix=lax.rem(unit, stack),
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
            plgpu.copy_gmem_to_smem(x_refs["ones"], below, scratch["ones_full"].at[0])
        stage = each_tile(functools.partial(_copy_tiles, product, operands, **scratch))
        for _ in range(blocks.stages - 1):  # until all has been multiplied
            plgpu.barrier_wait(scratch["empty"].at[stage])
            stage = next_stage(stage, blocks.stages)

    @pl.when(warpgroup < blocks.warpgroups)
    def _multiply() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        for stage in range(blocks.stages - 1):  # a stage is free when the step after it begins; so is the last one
            plgpu.barrier_arrive(scratch["empty"].at[stage])
        if product.ones:
            plgpu.barrier_wait(scratch["ones_full"].at[0])
        multiply = _add_all if product.whole else _add_groups
        each_tile(functools.partial(multiply, product, operands, **scratch))
        plgpu.wait_smem_to_gmem(0)


def _copy_tiles(product: _Product, operands: _Operands, tile: _Tile, stage: Array, **scratch: Any) -> Array:
    """Starts the copies of all steps of a tile of the result."""
    blocks, full = product.blocks, scratch["full"]

    def step(i: Any, stage: Array) -> Array:
        plgpu.barrier_wait(scratch["empty"].at[stage])
        ks = pl.ds((tile.split * product.steps + i) * blocks.k, blocks.k)
        for number, w in enumerate(operands.weights):
            plgpu.copy_gmem_to_smem(
                w.refs["words"].at[w.first + tile.matrix, pl.ds(tile.n, blocks.n), ks],
                scratch["w_ring"].at[stage, number],
                full.at[stage],
            )
        plgpu.copy_gmem_to_smem(
            operands.of_x["x"].at[tile.matrix, pl.ds(tile.m, blocks.m), ks],
            scratch["x_ring"].at[stage, pl.ds(0, blocks.m), :],
            full.at[stage],
        )
        return next_stage(stage, blocks.stages)

    return lax.fori_loop(0, product.steps, step, stage)


def _accumulator(product: _Product) -> Any:
    return plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, product.blocks.m + product.ones), jnp.int32)


def _other_tiles(product: _Product, operands: _Operands, tile: _Tile, scratch: dict[str, Any]) -> OtherTiles:
    column, _ = place(product.blocks.n // WGMMA_ROWS, product.blocks.ways)
    rows = pl.ds(tile.n + column * WGMMA_ROWS, WGMMA_ROWS)
    return OtherTiles(product, operands.others, tile, column, rows, scratch)


def _add_all(product: _Product, operands: _Operands, tile: _Tile, stage: Array, **scratch: Any) -> Array:
    """A tile of the result, or of a part of it, where all of K shares a scale."""
    blocks, of_x = product.blocks, operands.of_x

    def accumulate(*sums: Any) -> tuple[Array, list[Array]]:
        def step(_: Any, stage: Array) -> Array:
            for number, total in enumerate(sums):
                _multiply(product, number, total, stage, 0, blocks.k, **scratch)
            return next_stage(stage, blocks.stages)

        return lax.fori_loop(0, product.steps, step, stage), [total[...] for total in sums]

    other_tiles = _other_tiles(product, operands, tile, scratch)
    other_tiles.start()
    stage, sums = pl.run_scoped(accumulate, *(_accumulator(product) for _ in operands.weights))
    columns = [_columns(product, total) for total in sums]
    zeros = _by_row(product, of_x.get("zero"), (tile.matrix,), tile)
    row_sums = _by_row(product, of_x.get("sums"), (tile.matrix, 0), tile)
    scales = _by_row(product, of_x["scale"], (tile.matrix,), tile)
    weight_zeros = [_by_column(product, w, "zero", tile, 0) for w in operands.weights]
    for i, (start, size) in enumerate(product.strips):
        parts = []
        for w, total, of_columns, weight_zero in zip(operands.weights, sums, columns, weight_zeros, strict=True):
            part = _centred(total[:, start : start + size], of_columns, zeros[i], weight_zero, row_sums[i])
            if blocks.splits == 1:
                part = _rescaled(_scaled(part, _by_column(product, w, "values", tile, 0)), scales[i])
            parts.append(part)
        _finish(product, operands, tile, parts, i, other_tiles, **scratch)
    return stage


def _add_groups(product: _Product, operands: _Operands, tile: _Tile, stage: Array, **scratch: Any) -> Array:
    """A tile of the result where each group has a scale: groups are added in ascending order."""
    blocks, of_x, (w,) = product.blocks, operands.of_x, operands.weights
    strips = product.strips
    column, way = place(blocks.n // WGMMA_ROWS, blocks.ways)
    zeros = _by_row(product, of_x.get("zero"), (tile.matrix,), tile)
    other_tiles = _other_tiles(product, operands, tile, scratch)
    pl.when(way == 0)(other_tiles.start)

    def scaled(i: Any, stage: Array, first: int) -> list[Array]:
        """The sum of a group, in strips, from `first` of what this warpgroup takes of a stage."""
        group = lax.div(i * blocks.k + way * product.part + first, product.group)
        # from global memory, before the wait for the tile
        values = _by_column(product, w, "values", tile, group)
        if product.k % blocks.k:  # the last tile reaches beyond the last group
            values = jnp.where(group * product.group < product.k, values, 0)
        weight_zero = _by_column(product, w, "zero", tile, group)
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
            return next_stage(stage, blocks.stages), totals

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
        return next_stage(stage, blocks.stages)

    stage = lax.fori_loop(0, product.steps, step_in_turn, stage)

    @pl.when(way == 0)
    def _end() -> None:
        plgpu.barrier_wait(turns.at[column * blocks.ways])
        write([load(shared, plgpu.Layout.WGMMA, optimized=True)])

    return stage


def _columns(product: _Product, sums: Int32[Array, "64 _"]) -> Int32[Array, " 64"] | None:
    """Sums of the codes of each column of the weight: its products with rows of ones, which are all the same."""
    return jnp.max(sums[:, product.blocks.m :], axis=1) if product.ones else None


def _multiply(product: _Product, number: int, sums: Any, stage: Array, first: int, size: int, **scratch: Any) -> None:
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
            before = jnp.where(stage == 0, blocks.stages - 1, stage - 1)
            plgpu.barrier_arrive(scratch["empty"].at[before])


def _by_column(product: _Product, w: _Weight, name: str, tile: _Tile, group: Any) -> Any:
    """Scales or zero points of a group, by column of the weight; None where there are none."""
    ref, at = w.refs.get(name), w.first + tile.matrix
    if ref is None:
        return None
    if ref.shape[-2] == 1:  # one for the whole matrix
        one = jnp.broadcast_to(ref[at, 0, 0], (WGMMA_ROWS,))
        return plgpu.layout_cast(one, plgpu.Layout.WGMMA.reduce(1))
    column, _ = place(product.blocks.n // WGMMA_ROWS, product.blocks.ways)
    columns = pl.ds(tile.n + column * WGMMA_ROWS, WGMMA_ROWS)
    group = 0 if product.whole else jnp.minimum(group, ref.shape[-1] - 1)
    return load(ref.at[at, columns, group], plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _by_row(product: _Product, ref: Any, at: tuple[Any, ...], tile: _Tile) -> list[Any]:
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


def _finish(
    product: _Product,
    operands: _Operands,
    tile: _Tile,
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


def _write(out_ref: Any, tile: _Tile, part: Array, start: int, **scratch: Any) -> None:
    """Copies a strip of a tile out, once the strip before it has left shared memory."""
    warpgroup = lax.axis_index("warpgroup")  # of those that share a tile along K, the first
    size = part.shape[1]
    out_tile = scratch["out_tile"].at[warpgroup, pl.ds(0, size), :]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_tile.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    rows = pl.ds(tile.n + warpgroup * WGMMA_ROWS, WGMMA_ROWS)
    plgpu.copy_smem_to_gmem(out_tile, out_ref.at[tile.split, tile.matrix, pl.ds(tile.m + start, size), rows])
