"""How products are cut for Mosaic GPU kernels, and a count of the clocks that a cut should take. Nothing was timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jax.experimental import pallas as pl

from qjax.pallas_kernels.backends.mosaic import WGMMA_ROWS
from qjax.pallas_kernels.chips import gpu as gpu_chips

# NVIDIA H100 SXM, in clocks of 1.75 GHz: bytes that a multiprocessor gets of 3.35 TB/s, of which copies reach nine
# tenths, and of about twice that from the cache.
MEMORY_BYTES, CACHE_BYTES = 13.0, 26.0

# Guesses: clocks to fill the ring and to write a tile; clocks of the kernel that adds up splits; how much of what runs
# beside the slowest part of a step it delays.
_TILE_CLOCKS, _LAUNCH_CLOCKS, _DELAY = 2000, 3500, 0.25


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut; `check` of a kernel says what it takes.

    Attributes:
        m: rows of x in a tile.
        n: columns of the weight in a tile, a multiple of 64, at most 256.
        k: how much of K is in a tile.
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


def clocks(
    blocks: Blocks,
    m: int,
    k: int,
    n: int,
    *,
    batch: int,
    weights: int,
    parts: Callable[[float], Sequence[float]],
) -> float:
    """Clocks of a product, by a count of what each multiprocessor has to do.

    A step takes about as long as the slowest of its parts, and tiles are given out in waves.

    Args:
        blocks: how it is cut.
        m: rows of x.
        k, n: sizes of the weight's matrix.
        batch: products of this size.
        weights: how many are multiplied with a tile of x.
        parts: clocks of what is done in a step at the same time, for the share of the multiprocessors that have a tile.
    """
    processors = gpu_chips.processors()
    tiles = batch * pl.cdiv(m, blocks.m) * pl.cdiv(n, blocks.n) * blocks.splits
    waves, steps = pl.cdiv(tiles, processors), pl.cdiv(pl.cdiv(k, blocks.k), blocks.splits)
    each = parts(min(1.0, tiles / processors))
    step = (1 - _DELAY) * max(each) + _DELAY * sum(each)
    sums = 2 * 4 * blocks.splits * weights * batch * m * n / (MEMORY_BYTES * processors)
    return waves * (steps * step + _TILE_CLOCKS) + (_LAUNCH_CLOCKS + sums if blocks.splits > 1 else 0)


def in_parts(blocks: Blocks, most: int) -> list[Blocks]:
    """These tiles with K cut into any number of parts up to the most."""
    return [dataclasses.replace(blocks, splits=splits) for splits in range(1, max(most, 1) + 1)]
