"""Tiles of the Mosaic GPU kernel of integer products: which ones there are, what fits, and which to take.

`Blocks` that the kernel takes have

* `m` rows of x: with those of ones 8, 16, 24 or a multiple of 16, at most 256; fewer with groups;
* `k`, a multiple of 128 * `ways`; with groups, of their size times `ways`;
* `ways` 1 without groups, and with more than 32 rows; `splits` 1 with groups.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from jax.experimental import pallas as pl

from qjax.pallas_kernels.backends.mosaic import SMEM_BYTES, WGMMA_ROWS
from qjax.pallas_kernels.backends.mosaic_blocks import CACHE_BYTES, MEMORY_BYTES, Blocks, clocks, in_parts
from qjax.pallas_kernels.backends.mosaic_epilogue import ALONE, Beside
from qjax.pallas_kernels.packed.qtensor import QTensor

ONES = 8  # rows of ones below those of x: as many as `wgmma` counts in

_SMEM = SMEM_BYTES - 4 * 1024  # without barriers, ones and what Mosaic GPU keeps for itself

PART = 128  # values along K that a row of a tile in shared memory holds

MOST_K, _MOST_GROUPS = 512, 4  # in a tile: more would be longer code, and no faster

_SIZES = (8, 16, 24, *range(32, 257, 16))  # of rows that `wgmma` multiplies integers with

_HEIGHTS = (64, 96, 128, 192, 256)

_SHAPES = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4))  # warpgroups along N and along K

STRIP = 32  # rows of a tile of the result that are scaled and written at a time

BUFFERS = 2  # strips of another operand of the epilogue in shared memory

# Counted in the machine code: instructions of a warp for 64 x 128 int4 weights; clocks of a scheduler for each element
# of a tile and each group, as conversions and comparisons take two.
_UNPACK, _SCALE = 100, 7

_STEP, _TURN = 60, 120  # guesses: clocks to begin a step, and to take a turn at a shared sum


def default_blocks(m: int, w: QTensor, *, ones: int = 0, batch: int = 1, beside: Beside = ALONE) -> Blocks:
    """Tiles that should take the fewest clocks, by a count of what each multiprocessor has to do. Nothing was timed.

    What is done in a step at the same time is its product, its instructions, turns at a shared sum, its words from
    memory and its tiles from the cache.

    Args:
        m: rows of x.
        w: the weight.
        ones: rows of ones, 8 where x has zero points.
        batch: products of this size.
        beside: what else a tile needs.
    """
    count = beside.weights
    k, n, bits, group = w.layout.k, w.layout.n, w.spec.format.bits, w.group_size

    def estimate(blocks: Blocks) -> float:
        words = count * blocks.n * blocks.k * bits / 8
        weights = count * blocks.n / WGMMA_ROWS * blocks.k / PART  # tiles of 64 x 128 of them
        unpacking = _STEP + (weights * _UNPACK if bits == 4 else 0)
        scaling = blocks.k / group * blocks.n / WGMMA_ROWS * blocks.m / 2 * _SCALE if group < k else 0

        def parts(share: float) -> tuple[float, ...]:
            return (
                weights * 2 * (blocks.m + ones),  # a product of 64 x 128 with 8 rows takes 16 clocks
                unpacking * max(1.0, 4 / blocks.warpgroups) + scaling,  # with fewer, nothing runs while one waits
                float(blocks.ways * _TURN if blocks.ways > 1 else 0),
                words / MEMORY_BYTES * share,
                (words + min(m, blocks.m) * blocks.k) / CACHE_BYTES,
            )

        return clocks(blocks, m, k, n, batch=batch, weights=count, parts=parts)

    return min(candidates(m, w, ones=ones, beside=beside), key=estimate)


def candidates(m: int, w: QTensor, *, ones: int = 0, beside: Beside = ALONE) -> list[Blocks]:
    """Tiles that fit the operands, registers and shared memory; arguments as for `default_blocks`."""
    k, group = w.layout.k, w.group_size
    whole = group == k
    heights = _HEIGHTS
    if m + ones <= _HEIGHTS[0]:
        heights = [next(size for size in _SIZES if size >= m + ones)]
    depth = PART if whole else math.lcm(group, PART)
    found = []
    for height, (columns, ways), parts in itertools.product(heights, _SHAPES, (1, 2, 4)):
        part = parts * depth
        blocks = Blocks(m=height - ones, n=WGMMA_ROWS * columns, k=ways * part, ways=ways, stages=2, splits=1)
        if blocks.n > w.layout.n or (parts > 1 and part > min(k, MOST_K, _MOST_GROUPS * group)):
            continue
        if height > _tallest(blocks.warpgroups, w, ones, beside.weights) or blocks.m >= m + _HEIGHTS[0]:
            continue
        if ways > 1 and (whole or blocks.m > STRIP or blocks.k > min(k, 2 * MOST_K)):
            continue
        stages = min(8, (_SMEM - _kept(blocks, beside)) // _stage(blocks, w, ones, beside.weights))
        if stages >= 3:  # one that is multiplied, one that is filled, and one for when memory is late
            most = min(16, pl.cdiv(k, blocks.k) // stages) if m <= 256 and whole else 1
            found += in_parts(dataclasses.replace(blocks, stages=stages), most)
    return found


def _stage(blocks: Blocks, w: QTensor, ones: int, weights: int) -> int:
    """Bytes of shared memory of a stage."""
    return blocks.k * (blocks.m + ones + weights * blocks.n * w.spec.format.bits // 8)


def _kept(blocks: Blocks, beside: Beside) -> int:
    """Bytes of shared memory of what is written, of sums that warpgroups share, and of what an epilogue reads."""
    others = BUFFERS * sum(dtype.itemsize for _, dtype in beside.tiles)
    return blocks.n * ((4 + others) * min(STRIP, blocks.m) + (4 * blocks.m if blocks.ways > 1 else 0))


def _tallest(warpgroups: int, w: QTensor, ones: int, weights: int) -> int:
    """The most rows of x and of ones whose sums fit into the registers of so many warpgroups."""
    if warpgroups > 2:
        return 64 // weights
    if w.group_size == w.layout.k:
        return 256 // weights
    return 96 if ones and w.scales.zero is not None else 128  # both have zero points: numbers for each row and group


def check(blocks: Blocks, w: QTensor, ones: int, beside: Beside = ALONE) -> None:
    """Raises ValueError where blocks do not fit the operands, or not into shared memory."""
    n, whole = w.layout.n, w.group_size == w.layout.k
    tallest = _tallest(blocks.warpgroups, w, ones, beside.weights)
    if not (
        blocks.m > 0
        and blocks.m + ones in _SIZES
        and blocks.m + ones <= tallest
        and blocks.n in range(WGMMA_ROWS, min(n, 256) + 1, WGMMA_ROWS)
        and blocks.warpgroups <= 4
        and blocks.k % (PART * blocks.ways) == 0
        and (blocks.ways == 1 or (not whole and blocks.m <= STRIP))
        and (whole or (blocks.k % (w.group_size * blocks.ways) == 0 and blocks.splits == 1))
        and blocks.stages >= 2
    ):
        rows = f"m + {ones}" if ones else "m"
        along_k = f"{PART} * ways" if whole else f"{PART} * ways and {w.group_size} * ways"
        only = "ways 1" if whole else f"splits 1, ways 1 if m is above {STRIP}"
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
