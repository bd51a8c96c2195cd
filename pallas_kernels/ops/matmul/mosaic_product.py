"""What the Mosaic GPU kernel of weight-only products knows beside its operands."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.mosaic_blocks import Blocks
from qjax.pallas_kernels.backends.mosaic_epilogue import Beside
from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.ops.matmul.mosaic_tiles import CHUNKS, buffers_of, strip_of


@dataclasses.dataclass(frozen=True)
class Product:
    """A product as the kernel is compiled for it.

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
        return next(size for size in CHUNKS if self.whole or self.group % size == 0)

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
        size = strip_of(self.blocks.m)
        return [(start, size) for start in range(0, self.blocks.m, size)]

    @property
    def buffers(self) -> int:
        """Strips of another operand of the epilogue that are in shared memory."""
        return buffers_of(self.blocks.m)

    @property
    def results(self) -> int:
        """Arrays that are written for each panel."""
        return 1 if self.epilogue else self.beside.weights
