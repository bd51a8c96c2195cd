"""Tiles of the Mosaic GPU kernel of weight-only products: which ones there are, what fits, and which to take.

`Blocks` that the kernel takes have `m` rows of x, a multiple of 8, and `k` a multiple of 128 * `ways`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from qjax.pallas_kernels.backends.mosaic import SMEM_BYTES, WGMMA_ROWS
from qjax.pallas_kernels.backends.mosaic_blocks import CACHE_BYTES, MEMORY_BYTES, Blocks, clocks, in_parts
from qjax.pallas_kernels.backends.mosaic_epilogue import ALONE, Beside

_SMEM = SMEM_BYTES - 3 * 1024  # without barriers and what Mosaic GPU keeps for itself

PART = 128  # a warpgroup takes a multiple of so much of K from a tile

CHUNKS = (64, 32)  # of it that are unpacked while the one before is multiplied; one of them divides the group

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
    beside: Beside = ALONE,
) -> list[Blocks]:
    """Tiles in the order of the clocks that a product should take, by a count of what each multiprocessor has to do.

    What is done in a step at the same time is its product, its instructions, its words from memory and its tiles from
    the cache. Nothing of this was timed.

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

    def estimate(blocks: Blocks) -> float:
        weights = beside.weights * blocks.n / WGMMA_ROWS * blocks.k / PART  # tiles of 64 x 128 of them
        words = beside.weights * blocks.n * blocks.k * bits / 8

        def parts(share: float) -> tuple[float, ...]:
            return (
                weights * 4 * blocks.m,  # a product of 64 x 128 with 8 rows takes 32 clocks
                weights * _UNPACK[kind] * max(1.0, 4 / blocks.warpgroups),  # with fewer, nothing runs while one waits
                words / MEMORY_BYTES * share,
                (words + min(m, blocks.m) * blocks.k * 2) / CACHE_BYTES,
            )

        return clocks(blocks, m, k, n, batch=batch, weights=beside.weights, parts=parts)

    found = candidates(m, k, n if narrowest is None else narrowest, bits, out_dtype=out_dtype, beside=beside)
    return sorted(found, key=estimate)


def candidates(
    m: int, k: int, n: int, bits: int, *, out_dtype: Any = jnp.float32, beside: Beside = ALONE
) -> list[Blocks]:
    """Tiles that fit the operands, registers and shared memory; arguments as for `ranked`."""
    heights = [pl.cdiv(m, 8) * 8] if m <= _HEIGHTS[0] else [b for b in _HEIGHTS if b < m + _HEIGHTS[0]]
    found = []
    # Scales of a part of each weight are in registers.
    for height, (columns, ways), parts in itertools.product(heights, _SHAPES, (1, 2)[: 3 - beside.weights]):
        part = parts * PART
        blocks = Blocks(m=height, n=WGMMA_ROWS * columns, k=ways * part, ways=ways, stages=2, splits=1)
        if blocks.n > n or (blocks.k > k and blocks.k > PART) or height > _tallest(blocks, beside):
            continue
        if bits == 8 and parts == 2 and blocks.warpgroups == 4 and height > 16:
            continue  # products would wait for each other, for want of registers: scripts/gpu/prefilter_gpu.py found it
        left = _SMEM - _smem(blocks, bits, out_dtype, 0, beside)
        stages = min(8, left // _smem(blocks, bits, None, 1, beside))
        if stages >= 2:
            most = min(16, pl.cdiv(k, blocks.k) // stages) if m <= 256 else 1
            found += in_parts(dataclasses.replace(blocks, stages=stages), most)
    return found


def _smem(blocks: Blocks, bits: int, out_dtype: Any, stages: int, beside: Beside) -> int:
    """Bytes of shared memory of so many stages, and of the result unless its type is None."""
    rings = stages * blocks.k * (blocks.m * 2 + beside.weights * blocks.n * bits // 8)
    if out_dtype is None:
        return rings
    parts = (blocks.ways - 1) * beside.weights * blocks.n * blocks.m * 4
    strips = jnp.dtype(out_dtype).itemsize + buffers_of(blocks.m) * sum(dtype.itemsize for _, dtype in beside.tiles)
    return rings + parts + blocks.n * strip_of(blocks.m) * strips


def _tallest(blocks: Blocks, beside: Beside) -> int:
    """The most rows of x whose sums fit into the registers of so many warpgroups."""
    return (256 if blocks.warpgroups <= 2 else 64) // beside.weights


def strip_of(m: int) -> int:
    """Rows of a tile of the result that are written at a time."""
    return next(rows for rows in (32, 24, 16, 8) if m % rows == 0)


def buffers_of(m: int) -> int:
    """Strips of another operand of the epilogue that are in shared memory."""
    return min(2, m // strip_of(m))


def check(blocks: Blocks, n: int, bits: int, out_dtype: Any, beside: Beside = ALONE) -> None:
    """Raises ValueError where blocks do not fit the operands, or not into shared memory."""
    tallest = _tallest(blocks, beside)
    if not (
        blocks.m in range(8, tallest + 1, 8)
        and blocks.n in range(WGMMA_ROWS, min(n, 256) + 1, WGMMA_ROWS)
        and blocks.k % (PART * blocks.ways) == 0
        and blocks.stages >= 2
    ):
        raise ValueError(
            f"qjax: {blocks} for a packed matrix with N={n}: m must be a multiple of 8 and at most {tallest}, "
            f"n a multiple of {WGMMA_ROWS} and at most 256 and N, k a multiple of {PART} * ways, stages at least 2."
        )
    needed = _smem(blocks, bits, out_dtype, blocks.stages, beside)
    if needed > _SMEM:
        raise ValueError(
            f"qjax: {blocks} take {needed} bytes of shared memory, of which there are {_SMEM}: use fewer stages or "
            "smaller tiles."
        )
