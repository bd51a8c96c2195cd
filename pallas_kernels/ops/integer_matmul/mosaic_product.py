"""What the Mosaic GPU kernel of integer products knows beside its operands."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.mosaic_blocks import Blocks
from qjax.pallas_kernels.backends.mosaic_epilogue import Beside
from qjax.pallas_kernels.ops.integer_matmul.mosaic_tiles import BUFFERS, PART, STRIP


@dataclasses.dataclass(frozen=True)
class Product:
    """A product as the kernel is compiled for it.

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
        return math.gcd(PART, self.k, self.group)

    @property
    def part(self) -> int:
        """How much of K of a tile a warpgroup takes."""
        return self.blocks.k // self.blocks.ways

    @property
    def strips(self) -> list[tuple[int, int]]:
        """First row and number of rows of the parts of a tile that are scaled and written at a time."""
        return [(start, min(STRIP, self.blocks.m - start)) for start in range(0, self.blocks.m, STRIP)]

    @property
    def buffers(self) -> int:
        """Strips of another operand of the epilogue that are in shared memory."""
        return min(BUFFERS, len(self.strips))

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
