"""`quantized_matmul` on NVIDIA Hopper: a Mosaic GPU kernel that unpacks words in registers, and multiplies from there.

What is computed is `out.T = w.T @ x.T`, because the left operand of `wgmma` may come from registers: packed codes of 4
or 8 bits go from shared memory to registers, become bfloat16 or float16 there, are scaled there, and are multiplied. So
K has to lie contiguous in the words: order "nk" (`qtensor.reorder`), made when a model is loaded. No other order is
taken: to transpose words in every call would cost more than the product. Nor is N contracted.

**Formats.** int4, int8, codebooks of 4 bits (NF4, fp4: `tile_mosaic_gpu`) and floats of 8 bits. For 64 x 128 weights in
groups of 64 a warp has 264 instructions with int4 and 397 with NF4, in groups of 128 it has 288 with fp8 (what jax
0.10.2 makes, `scripts/gpu/gpu_compile.py`). To read as many bfloat16 weights from memory takes an H100 some 1260
clocks.

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

**Epilogues.** Products of one x with two weights that are packed alike, a gate and what it gates, share tiles of x;
each has sums of its own, so that tiles are half as high. What a program does with the results
(`pallas_kernels.backends.epilogue`) is done to finished sums in registers, a strip of rows at a time. Vectors that it
reads come from global memory; arrays of the size of the result (a residual connection) by TMA, two strips ahead, the
first ones while all is multiplied. Sums that are finished outside of the kernel, those of splits and of float32 in
halves, get their epilogue there, in the XLA operation that adds them up.

**Joint products.** Several weights of one K and format are multiplied in one launch: tiles along N run over all of
them. The program of a tile is there once for each weight, so that each address is known.

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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import primitives as prims
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.backends import gpu_operands, mosaic_tile
from qjax.pallas_kernels.backends.epilogue import Epilogue
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
from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.ops.matmul import reference
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index


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
        return self.n // WGMMA_ROWS * self.ways


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a tile of the result needs beside one weight.

    Attributes:
        weights: how many are multiplied with a tile of x.
        others: of each other operand of the epilogue, whether it has rows, whether it has columns, and its dtype.
    """

    weights: int = 1
    others: tuple[tuple[bool, bool, Any], ...] = ()

    @property
    def tiles(self) -> list[tuple[int, Any]]:
        """Numbers and dtypes of the operands that have both, which are copied by tiles."""
        return [(i, dtype) for i, (rows, columns, dtype) in enumerate(self.others) if rows and columns]


ALONE = Beside()
"""Of a product alone."""

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
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    if unsupported(x, w, casts, out_dtype, precision=precision, transpose=transpose):
        return reference.matmul(
            x,
            w,
            layer=layer,
            casts=casts,
            precision=precision,
            preferred_element_type=preferred_element_type,
            transpose=transpose,
        )
    (out,) = _multiplied(
        x,
        [[w]],
        [[layer]],
        [],
        None,
        operand=gpu_operands.operand_dtype(x.dtype, (w.dtype, *casts)),
        out_dtype=out_dtype,
        blocks=blocks,
        interpret=interpret,
    )
    return out


def fused_matmul(
    x: Float[Array, "*stack M K"],
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    epilogue: Epilogue,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "*stack M N"]:
    """The epilogue of the products of x with one or two weights, in one kernel; see "Epilogues" above.

    Args:
        x, casts, precision, preferred_element_type, blocks, interpret: as for `matmul`.
        weights: packed alike, so that they differ in values alone; none that is `unsupported`.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products, none that is `unsupported_epilogue`.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    operand = gpu_operands.operand_dtype(x.dtype, (weights[0].dtype, *casts))
    (out,) = _multiplied(
        x,
        [weights],
        [layers],
        others,
        epilogue,
        operand=operand,
        out_dtype=epilogue.out_dtype,
        blocks=blocks,
        interpret=interpret,
    )
    return out


def joint_matmul(
    x: Float[Array, "*stack M K"],
    weights: Sequence[QTensor],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> list[Float[Array, "*stack M _"]]:
    """The products of x with several weights, in one kernel: queries, keys and values, say.

    Few columns give few tiles, and each launch waits for the last of them; tiles of all weights share one launch.

    Args:
        x, casts, precision, preferred_element_type, blocks, interpret: as for `matmul`.
        weights: of one K, format, group and dtype, of any N; none that is `unsupported`.
        layers: for each weight, as for `matmul`.

    Raises:
        ValueError: `blocks` does not fit the operands, or not into shared memory.
    """
    return _multiplied(
        x,
        [[w] for w in weights],
        [[layer] for layer in layers],
        [],
        None,
        operand=gpu_operands.operand_dtype(x.dtype, (weights[0].dtype, *casts)),
        out_dtype=reference.result_dtype(x, weights[0], casts, preferred_element_type),
        blocks=blocks,
        interpret=interpret,
    )


def _multiplied(
    x: Float[Array, "*stack M K"],
    panels: Sequence[Sequence[QTensor]],
    layers: Sequence[Sequence[Int[Array, ""] | int | None]],
    others: Sequence[Float[Array, "_ _ _"]],
    epilogue: Epilogue | None,
    *,
    operand: jnp.dtype,
    out_dtype: jnp.dtype,
    blocks: Blocks | None,
    interpret: bool,
) -> list[Float[Array, "*stack M _"]]:
    """A result for each panel: the product with its only weight, or the epilogue of those with all of its weights.

    Args:
        x, others, epilogue, blocks, interpret: as for `fused_matmul`.
        panels: weights whose products lie side by side in the grid; those of one panel share tiles.
        layers: as for `fused_matmul`, for each weight.
        operand: of the dot.
        out_dtype: of the results.
    """
    *stack, m, k = x.shape
    w, count, widths = panels[0][0], len(panels[0]), tuple(panel[0].layout.n for panel in panels)
    bits = w.spec.format.bits
    x = gpu_operands.split(x.reshape(-1, m, k), operand)
    rows = x.shape[1]
    x = _whole_tiles(x)
    if blocks is None and widths == (w.layout.n,) and count == 1:
        entry = gpu_chips.lookup(rows, k, w.layout.n, w.spec, x.dtype)
        blocks = Blocks(**entry) if entry else None
    beside = Beside(count, tuple((a.shape[-2] > 1, a.shape[-1] > 1, a.dtype) for a in others))
    how: dict[str, Any] = {"kind": w.spec.format.kind, "out_dtype": out_dtype, "narrowest": min(widths)}
    blocks = blocks or default_blocks(rows, k, sum(widths), bits, batch=x.shape[0], beside=beside, **how)
    finished = rows == m and blocks.splits == 1  # sums are whole in the kernel
    inside = epilogue if finished else None
    kept = out_dtype if finished else jnp.dtype(jnp.float32)
    beside = beside if finished else Beside(count)
    _check(blocks, min(widths), bits, kept, beside)
    product = _Product(x.shape[1], k, widths, w.spec.format, w.group_size, operand, kept, blocks, beside, inside)
    packed = [
        [_Packed.of(w, layer) for w, layer in zip(*each, strict=True)] for each in zip(panels, layers, strict=True)
    ]
    results = _call(product, x, packed, [as_read(a, blocks.m) for a in others] if inside else [], interpret)
    results = gpu_operands.finished([a[:, :, :rows] for a in results], m, None if inside else epilogue, others)
    return [a.reshape(*stack, m, a.shape[-1]).astype(out_dtype) for a in results]


def _whole_tiles(a: Array) -> Array:
    """The array with as many rows as TMA needs."""
    return jnp.pad(a, ((0, 0), (0, whole_rows(a.shape[-2]) - a.shape[-2]), (0, 0)))


def as_read(a: Float[Array, "_ _ _"], m: int) -> Array:
    """Another operand of the epilogue as a kernel with tiles of m rows reads it: vectors without their axis of 1."""
    if a.shape[-2] > 1 and a.shape[-1] > 1:
        return _whole_tiles(a)
    if a.shape[-2] > 1:  # the last tile has no edge that is checked
        return jnp.pad(a[..., 0], ((0, 0), (0, -a.shape[-2] % m)))
    return a[..., 0, :]


def unsupported(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, *, precision: Any = None, transpose: bool = False
) -> str | None:
    """Why this kernel does not compute a product, or None; x is anything with a shape and a dtype."""
    if reason := gpu_operands.unsupported(x, w, casts, out_dtype, precision):
        return reason
    if transpose:
        return "this kernel contracts K"
    if w.order != "nk":
        return 'the words of a column do not lie together: `reorder(w, "nk")` once, when the model is loaded'
    if w.layout.n % WGMMA_ROWS or w.layout.k % _CHUNKS[0]:
        return f"N must be a multiple of {WGMMA_ROWS}, and K of {_CHUNKS[0]}"
    if w.group_size != w.layout.k and w.group_size % _CHUNKS[-1]:
        return f"the size of a group must be a multiple of {_CHUNKS[-1]}"
    return None


_MISSING = {prims.sqrt_p, prims.log1p_p}  # of the operations of an epilogue, those that Mosaic GPU of jax 0.10 lacks


def unsupported_epilogue(epilogue: Epilogue) -> str | None:
    """Why the kernel does not apply an epilogue, or None."""
    return gpu_operands.unsupported_epilogue(epilogue, _MISSING, "Mosaic GPU")


# --- Tiles ----------------------------------------------------------------------------------------------------------

_SMEM = SMEM_BYTES - 3 * 1024  # without barriers and what Mosaic GPU keeps for itself

_PART = 128  # a warpgroup takes a multiple of so much of K from a tile

_CHUNKS = (64, 32)  # of it that are unpacked while the one before is multiplied; one of them divides the group

_HEIGHTS = (64, 96, 128, 192, 256)

_SHAPES = ((2, 1), (4, 1), (2, 2), (1, 4), (1, 2), (1, 1))  # warpgroups along N and along K

# Instructions of a warp for 64 x 128 weights, by kind of format: counted in the machine code.
_UNPACK = {"int": 240, "codebook": 370, "float": 260}


def default_blocks(m: int, k: int, n: int, bits: int, **options: Any) -> Blocks:
    """The first of `ranked`, arguments as for it."""
    return ranked(m, k, n, bits, **options)[0]


def ranked(
    m: int,
    k: int,
    n: int,
    bits: int,
    *,
    batch: int = 1,
    kind: str = "int",
    out_dtype: Any = jnp.float32,
    narrowest: int | None = None,
    beside: Beside = Beside(),
) -> list[Blocks]:
    """Tiles in the order of the clocks that a product should take, by a count of what each multiprocessor has to do.

    A step takes about as long as the slowest of its product, its instructions, its words from memory and its tiles from
    the cache; tiles are given out in waves. Nothing of this was timed.

    Args:
        m: rows of x.
        k, n: sizes of the weight's matrix; `n` at least 64.
        bits: of a code.
        batch: products of this size.
        kind: of the format.
        out_dtype: of the result.
        narrowest: columns of the narrowest of the weights that have n columns together, if there are several.
        beside: what else is in the kernel.
    """
    processors = gpu_chips.processors()

    def clocks(blocks: Blocks) -> float:
        tiles = batch * pl.cdiv(m, blocks.m) * pl.cdiv(n, blocks.n) * blocks.splits
        waves, steps = pl.cdiv(tiles, processors), pl.cdiv(pl.cdiv(k, blocks.k), blocks.splits)
        weights = beside.weights * blocks.n / WGMMA_ROWS * blocks.k / _PART  # tiles of 64 x 128 of them
        words = beside.weights * blocks.n * blocks.k * bits / 8
        parts = (
            weights * 4 * blocks.m,  # a product of 64 x 128 with 8 rows takes 32 clocks
            weights * _UNPACK[kind] * max(1.0, 4 / blocks.warpgroups),  # with fewer warps, nothing runs while one waits
            words / MEMORY_BYTES * min(1.0, tiles / processors),
            (words + min(m, blocks.m) * blocks.k * 2) / CACHE_BYTES,
        )
        step = (1 - DELAY) * max(parts) + DELAY * sum(parts)
        sums = 2 * 4 * blocks.splits * beside.weights * batch * m * n / (MEMORY_BYTES * processors)
        return waves * (steps * step + TILE_CLOCKS) + (LAUNCH_CLOCKS + sums if blocks.splits > 1 else 0)

    found = candidates(m, k, n if narrowest is None else narrowest, bits, out_dtype=out_dtype, beside=beside)
    return sorted(found, key=clocks)


def candidates(
    m: int, k: int, n: int, bits: int, *, out_dtype: Any = jnp.float32, beside: Beside = Beside()
) -> list[Blocks]:
    """Tiles that fit the operands, registers and shared memory; arguments as for `ranked`."""
    heights = [pl.cdiv(m, 8) * 8] if m <= _HEIGHTS[0] else [b for b in _HEIGHTS if b < m + _HEIGHTS[0]]
    found = []
    # Scales of a part of each weight are in registers.
    for height, (columns, ways), parts in itertools.product(heights, _SHAPES, (1, 2)[: 3 - beside.weights]):
        part = parts * _PART
        blocks = Blocks(m=height, n=WGMMA_ROWS * columns, k=ways * part, ways=ways, stages=2, splits=1)
        if blocks.n > n or (blocks.k > k and blocks.k > _PART) or height > _tallest(blocks, beside):
            continue
        if bits == 8 and parts == 2 and blocks.warpgroups == 4 and height > 16:
            continue  # products would wait for each other, for want of registers: scripts/gpu/prefilter_gpu.py found it
        left = _SMEM - _smem(blocks, bits, out_dtype, 0, beside)
        stages = min(8, left // _smem(blocks, bits, None, 1, beside))
        if stages >= 2:
            most = min(16, pl.cdiv(k, blocks.k) // stages) if m <= 256 else 1
            found += [
                dataclasses.replace(blocks, stages=stages, splits=splits) for splits in range(1, max(most, 1) + 1)
            ]
    return found


def _smem(blocks: Blocks, bits: int, out_dtype: Any, stages: int, beside: Beside) -> int:
    """Bytes of shared memory of so many stages, and of the result unless its type is None."""
    rings = stages * blocks.k * (blocks.m * 2 + beside.weights * blocks.n * bits // 8)
    if out_dtype is None:
        return rings
    parts = (blocks.ways - 1) * beside.weights * blocks.n * blocks.m * 4
    strips = jnp.dtype(out_dtype).itemsize + _buffers(blocks.m) * sum(dtype.itemsize for _, dtype in beside.tiles)
    return rings + parts + blocks.n * _strip(blocks.m) * strips


def _tallest(blocks: Blocks, beside: Beside) -> int:
    """The most rows of x whose sums fit into the registers of so many warpgroups."""
    return (256 if blocks.warpgroups <= 2 else 64) // beside.weights


def _strip(m: int) -> int:
    """Rows of a tile of the result that are written at a time."""
    return next(rows for rows in (32, 24, 16, 8) if m % rows == 0)


def _buffers(m: int) -> int:
    """Strips of another operand of the epilogue that are in shared memory."""
    return min(2, m // _strip(m))


def _check(blocks: Blocks, n: int, bits: int, out_dtype: Any, beside: Beside = Beside()) -> None:
    tallest = _tallest(blocks, beside)
    if not (
        blocks.m in range(8, tallest + 1, 8)
        and blocks.n in range(WGMMA_ROWS, min(n, 256) + 1, WGMMA_ROWS)
        and blocks.k % (_PART * blocks.ways) == 0
        and blocks.stages >= 2
    ):
        raise ValueError(
            f"qjax: {blocks} for a packed matrix with N={n}: m must be a multiple of 8 and at most {tallest}, "
            f"n a multiple of {WGMMA_ROWS} and at most 256 and N, k a multiple of {_PART} * ways, stages at least 2."
        )
    needed = _smem(blocks, bits, out_dtype, blocks.stages, beside)
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
        m, k: rows of x, and what is contracted.
        widths: columns of the weights of each panel.
        format, group: of the weights.
        dtype, out_dtype: of the operands of the dot, and of what is written.
        blocks, beside: how it is cut, and what is in it.
        epilogue: what is made of the sums in the kernel, if not the result itself.
    """

    m: int
    k: int
    widths: tuple[int, ...]
    format: Format
    group: int
    dtype: Any
    out_dtype: jnp.dtype
    blocks: Blocks
    beside: Beside
    epilogue: Epilogue | None

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.format.bits

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
        return pl.cdiv(pl.cdiv(self.k, self.blocks.k), self.blocks.splits)

    @property
    def bounds(self) -> list[int]:
        """The first tile along N of each panel, and the end of the last one."""
        return [0, *itertools.accumulate(pl.cdiv(width, self.blocks.n) for width in self.widths)]

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the results along M and N."""
        return pl.cdiv(self.m, self.blocks.m), self.bounds[-1]

    @property
    def strips(self) -> list[tuple[int, int]]:
        """First row and number of rows of the parts of a tile that are written at a time."""
        size = _strip(self.blocks.m)
        return [(start, size) for start in range(0, self.blocks.m, size)]

    @property
    def buffers(self) -> int:
        """Strips of another operand of the epilogue that are in shared memory."""
        return _buffers(self.blocks.m)

    @property
    def results(self) -> int:
        """Arrays that are written for each panel."""
        return 1 if self.epilogue else self.beside.weights


@dataclasses.dataclass(frozen=True)
class _Packed:
    """The arrays of a weight as the kernel reads them, `(layers * stack, N, _)`, and the index of the layer."""

    layer: Int[Array, " 1"]
    words: Int[Array, "LB N K"]
    scales: Float[Array, "LB _ _"]
    zeros: Int[Array, "LB _ _"] | None

    @staticmethod
    def of(w: QTensor, layer: Int[Array, ""] | int | None) -> _Packed:
        words = w.words
        if w.spec.format.bits == 4:
            words = lax.bitcast_convert_type(words, jnp.int4)  # (..., N, K / 8, 8), which moves nothing
        scales, zeros = (None if a is None else a.reshape(-1, *a.shape[-2:]) for a in (w.scales.values, w.scales.zero))
        assert scales is not None
        words = words.reshape(-1, w.layout.n, w.layout.k)
        return _Packed(gpu_operands.layer_operand(layer), words, scales, zeros)

    @property
    def arrays(self) -> list[Array]:
        """Index of the layer, words, scales, and zero points if there are any."""
        return [self.layer, self.words, self.scales, *([] if self.zeros is None else [self.zeros])]


_BAND = 4  # tiles along M that follow each other before the next one along N: so many share words in the cache


def _call(
    product: _Product,
    x: Float[Array, "B M K"],
    panels: Sequence[Sequence[_Packed]],
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
    columns, strip, weights = blocks.n // WGMMA_ROWS, _strip(blocks.m), product.beside.weights
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
        "full": plgpu.Barrier(num_arrivals=1 + weights, num_barriers=blocks.stages),
        "empty": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
    }
    if blocks.ways > 1:
        shape, transforms = (
            (blocks.ways - 1, weights, columns, WGMMA_ROWS, blocks.m),
            swizzled(32, math.gcd(blocks.m, 32)),
        )
        scratch["parts"] = plgpu.SMEM(shape, jnp.float32, transforms=transforms)
        scratch["parts_full"] = plgpu.Barrier(num_arrivals=blocks.ways - 1, num_barriers=columns)
        scratch["parts_empty"] = plgpu.Barrier(num_arrivals=1, num_barriers=columns)
    if product.beside.tiles:
        buffers = _buffers(blocks.m)
        for i, own in product.beside.tiles:
            shape, transforms = (columns, buffers, strip, WGMMA_ROWS), swizzled(8 * own.itemsize, WGMMA_ROWS)
            scratch[f"other_{i}"] = plgpu.SMEM(shape, own, transforms=transforms)
        scratch["others_full"] = plgpu.Barrier(num_arrivals=len(product.beside.tiles), num_barriers=columns * buffers)
    if interpret:  # an interpreted `wgmma` has no operand in registers
        shape = (blocks.warpgroups, WGMMA_ROWS, product.chunk)
        scratch["unpacked"] = plgpu.SMEM(shape, dtype, transforms=swizzled(16, product.chunk))
    packed = list(itertools.chain(*panels))
    run = plgpu.kernel(
        functools.partial(_kernel, product, units, stack, packed[0].zeros is not None),
        out_type=[
            jax.ShapeDtypeStruct((blocks.splits, stack, product.m, width), product.out_dtype)
            for width in product.widths
            for _ in range(product.results)
        ],
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
        kernel_name="fused_matmul" if product.epilogue else "joint_matmul" if len(panels) > 1 else "quantized_matmul",
    )
    return list(run(x, *itertools.chain(*(w.arrays for w in packed)), *others))


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight in global memory: references to its arrays, and the index of the first matrix of its layer."""

    words: Any
    scales: Any
    zeros: Any
    first: Any


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Where a tile of a result lies: index in the stack, index of the split; row and column."""

    matrix: Any
    split: Any
    m: Any
    n: Any


def _kernel(product: _Product, units: int, stack: int, has_zeros: bool, *refs: Any, **scratch: Any) -> None:
    """What one warpgroup does.

    Args:
        product: what is computed.
        units: tiles of the results, times splits.
        stack: matrices of a layer.
        has_zeros: whether weights have zero points.
        refs: x; index of the layer, words, scales, zero points of each weight; other operands; the results: in global
            memory.
        scratch: shared memory and barriers.
    """
    blocks, columns, count = product.blocks, product.blocks.n // WGMMA_ROWS, product.beside.weights
    rest = iter(refs)
    (x_ref,) = itertools.islice(rest, 1)

    def weight() -> _Weight:
        layer_ref, words, scales, *zeros = itertools.islice(rest, 3 + has_zeros)
        layer = layer_index(layer_ref[0], words.shape[0] // stack)
        return _Weight(words, scales, zeros[0] if zeros else None, layer * stack)

    panels = [[weight() for _ in range(count)] for _ in product.widths]
    others = list(itertools.islice(rest, len(product.beside.others)))
    results = [list(itertools.islice(rest, product.results)) for _ in panels]
    warpgroup, registers = lax.axis_index("warpgroup"), registers_for(blocks.warpgroups)

    def each_tile(body: Callable[[int, _Tile, Array], None]) -> Array:
        """Calls `body` with each tile of this block, its panel, and the next stage of the ring, which it returns."""

        def with_tile(info: Any, carry: Array) -> Array:
            (unit,) = info.index
            grid, unit = product.grid, jnp.asarray(unit, jnp.int32)
            i, j = plgpu.planar_snake(lax.rem(unit, math.prod(grid)), grid, 0, min(_BAND, grid[0]))
            unit = lax.div(unit, math.prod(grid))
            for panel, (first, end) in enumerate(itertools.pairwise(product.bounds)):
                tile = _Tile(
                    matrix=lax.rem(unit, stack),
                    split=lax.div(unit, stack),
                    m=i * blocks.m,
                    n=jnp.minimum((j - first) * blocks.n, product.widths[panel] - blocks.n),
                )
                here = functools.partial(body, panel, tile, carry)
                if len(panels) == 1:
                    here()
                else:
                    pl.when((first <= j) & (j < end))(here)
            return lax.rem(carry + product.steps, blocks.stages)

        return plgpu.nd_loop((units,), collective_axes="block", init_carry=jnp.int32(0))(with_tile)

    @pl.when(warpgroup == blocks.warpgroups)
    def _copy() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="decrease")
        stage = each_tile(lambda panel, tile, stage: _copy_tiles(product, x_ref, panels[panel], tile, stage, **scratch))
        for _ in range(blocks.stages - 1):  # until all has been multiplied
            plgpu.barrier_wait(scratch["empty"].at[stage])
            stage = next_stage(stage, blocks.stages)

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

        each_tile(
            lambda panel, tile, stage: _multiply_tiles(
                product, panels[panel], others, results[panel], tile, stage, **scratch
            )
        )
        plgpu.wait_smem_to_gmem(0)
        if blocks.ways > 1:

            @pl.when(warpgroup >= columns)
            def _read() -> None:
                plgpu.barrier_wait(scratch["parts_empty"].at[lax.rem(warpgroup, columns)])


def _copy_tiles(
    product: _Product, x_ref: Any, weights: Sequence[_Weight], tile: _Tile, stage: Array, **scratch: Any
) -> None:
    """Starts the copies of all steps of a tile of a result."""
    blocks, full = product.blocks, scratch["full"]

    def step(i: Any, stage: Array) -> Array:
        plgpu.barrier_wait(scratch["empty"].at[stage])
        ks = pl.ds((tile.split * product.steps + i) * blocks.k, blocks.k)
        for number, w in enumerate(weights):
            plgpu.copy_gmem_to_smem(
                w.words.at[w.first + tile.matrix, pl.ds(tile.n, blocks.n), ks],
                scratch["w_ring"].at[stage, number],
                full.at[stage],
            )
        plgpu.copy_gmem_to_smem(
            x_ref.at[tile.matrix, pl.ds(tile.m, blocks.m), ks], scratch["x_ring"].at[stage], full.at[stage]
        )
        return next_stage(stage, blocks.stages)

    lax.fori_loop(0, product.steps, step, stage)


def _multiply_tiles(
    product: _Product,
    weights: Sequence[_Weight],
    others: Sequence[Any],
    results: Sequence[Any],
    tile: _Tile,
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
    column, way = place(blocks.n // WGMMA_ROWS, blocks.ways)
    rows = pl.ds(tile.n + column * WGMMA_ROWS, WGMMA_ROWS)

    def small(w: _Weight, ref: Any, k: Any) -> Array:
        """Scales or zero points of the group that k belongs to, by column."""
        at = w.first + tile.matrix
        if ref.shape[-2] == 1:  # one for the whole matrix
            one = jnp.broadcast_to(ref[at, 0, 0], (WGMMA_ROWS,))
            return plgpu.layout_cast(one, plgpu.Layout.WGMMA.reduce(1))
        group = 0 if product.whole else jnp.minimum(lax.div(k, product.group), ref.shape[-1] - 1)
        return load(ref.at[at, rows, group], plgpu.Layout.WGMMA.reduce(1), optimized=False)

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
            return next_stage(stage, blocks.stages)

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


@dataclasses.dataclass(frozen=True)
class OtherTiles:
    """What the epilogue of a tile reads beside its sums, transposed as they are, and a strip of rows at a time.

    Arrays of the size of the result come by TMA, strips ahead of their use: the first ones while all is multiplied.

    Attributes:
        product, tile, column, rows: what is computed, where, by which warpgroup; its columns of the result. Of the
            product, `beside`, `strips` and `buffers` are read, of the tile `matrix` and `m`.
        refs: other operands of the epilogue.
        scratch: shared memory and barriers.
    """

    product: Any
    refs: Sequence[Any]
    tile: Any
    column: Any
    rows: Any
    scratch: dict[str, Any]

    def start(self) -> None:
        """Starts the first copies."""
        for i in range(self.product.buffers):
            self.copy(i)

    def copy(self, i: int) -> None:
        """Starts the copies of strip i, if there is one; the strip whose place it takes was read by all threads."""
        if i >= len(self.product.strips):
            return
        start, height = self.product.strips[i]
        for number, _ in self.product.beside.tiles:
            source, target = self.refs[number], self._strip(number, i, height)
            source = source.at[self._matrix(source), pl.ds(self.tile.m + start, height), self.rows]
            plgpu.copy_gmem_to_smem(source, target, self.scratch["others_full"].at[self._buffer(i)])

    def read(self, i: int) -> list[Float[Array, "N _"]]:
        """What the epilogue reads for strip i."""
        start, height = self.product.strips[i]
        shape, start = (WGMMA_ROWS, height), self.tile.m + start
        if self.product.beside.tiles:
            plgpu.barrier_wait(self.scratch["others_full"].at[self._buffer(i)])
        values = []
        for number, (ref, (has_rows, has_columns, _)) in enumerate(
            zip(self.refs, self.product.beside.others, strict=True)
        ):
            matrix = self._matrix(ref)
            if has_rows and has_columns:
                tile = self._strip(number, i, height).T
                value = plgpu.layout_cast(load(tile, plgpu.Layout.WGMMA_TRANSPOSED, optimized=True), plgpu.Layout.WGMMA)
            elif has_rows:
                value = load(ref.at[matrix, pl.ds(start, height)], plgpu.Layout.WGMMA.reduce(0), optimized=False)
                value = plgpu.layout_cast(lax.broadcast_in_dim(value, shape, (1,)), plgpu.Layout.WGMMA)
            elif has_columns:
                value = load(ref.at[matrix, self.rows], plgpu.Layout.WGMMA.reduce(1), optimized=False)
                value = lax.broadcast_in_dim(value, shape, (0,))
            else:
                value = jnp.broadcast_to(ref[matrix, 0], shape)
            values.append(value)
        return values

    def _strip(self, number: int, i: int, height: int) -> Any:
        """Where strip i of an operand lies in shared memory."""
        return self.scratch[f"other_{number}"].at[self.column, i % self.product.buffers, pl.ds(0, height), :]

    def _matrix(self, ref: Any) -> Any:
        return 0 if ref.shape[0] == 1 else self.tile.matrix

    def _buffer(self, i: int) -> Any:
        return self.column * self.product.buffers + i % self.product.buffers


def _multiply_step(
    product: _Product,
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
    blocks, chunk = product.blocks, product.chunk
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
                before = jnp.where(stage == 0, blocks.stages - 1, stage - 1)
                plgpu.barrier_arrive(scratch["empty"].at[before])


def _converted(codes: Int[Array, "N K"], product: _Product, *, interpret: bool) -> Float[Array, "N K"]:
    """Codes as the operand of a product: integers, values of a codebook, or the floats whose bits they are."""
    if product.format.kind == "codebook":
        return mosaic_tile.look_up(codes, product.format.values, product.dtype, interpret=interpret)
    if product.format.kind == "float":
        codes = lax.bitcast_convert_type(codes, jnp.dtype(product.format.dtype)).astype(jnp.float16)
        return codes if product.dtype == jnp.float16 else codes.astype(jnp.float32).astype(product.dtype)
    if product.bits == 4:  # integers to bfloat16 is the conversion that Mosaic GPU has in few instructions
        codes = codes.astype(jnp.bfloat16)
    return codes.astype(product.dtype)
