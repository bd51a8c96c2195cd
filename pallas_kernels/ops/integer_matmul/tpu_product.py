"""What the TPU kernel of integer products knows beside its operands: sizes, and what it keeps between tiles."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.tpu_operands import STRIP
from qjax.pallas_kernels.backends.tpu_tile import K_MULTIPLE, LANES, SUBLANES, round_up
from qjax.pallas_kernels.numbers.formats import Format
from qjax.pallas_kernels.ops.integer_matmul.tpu_tiles import ROWS, Blocks

# Rows of sums of groups that one pass of the loop over a tile makes: more would be longer code, and no faster.
_SUMS = 512


@dataclasses.dataclass(frozen=True)
class Product:
    """A product as the kernel is compiled for it.

    Attributes:
        m, k: rows of x and values to contract.
        format: of the weight.
        order: of its words, "kn" or "nk".
        group: values along K that share a scale.
        zero, weight_zero: whether x and the weight have zero points.
        blocks: sizes of the tiles.
        weights: how many are multiplied.
        epilogue: what is made of the products, if not the result itself.
    """

    m: int
    k: int
    format: Format
    order: str
    group: int
    zero: bool
    weight_zero: bool
    blocks: Blocks
    weights: int
    epilogue: Epilogue | None

    @property
    def groups(self) -> int:
        """How many there are."""
        return pl.cdiv(self.k, self.group)

    @property
    def steps(self) -> int:
        """Tiles along K."""
        return pl.cdiv(self.k, self.blocks.k)

    @property
    def stored(self) -> int:
        """Rows of the tile of the result: what fills registers of it; padding of x beyond that is not scaled."""
        if self.epilogue is not None and self.epilogue.codes is not None:
            return self.blocks.m
        strips = self.epilogue is not None and self.m > SUBLANES
        return min(self.blocks.m, round_up(self.m, STRIP if strips else SUBLANES))

    @property
    def ones(self) -> int:
        """The row of the tile of x that is of ones where x has zero points: after the rows of x."""
        return min(self.m, self.blocks.m)

    @property
    def rows(self) -> int:
        """Rows of the tile of x and that of ones."""
        return self.blocks.m + (ROWS if self.zero and self.ones == self.blocks.m else 0)

    @property
    def columns(self) -> int:
        """Columns of the tile of the weight and those of ones."""
        return self.blocks.n + (LANES if self.weight_zero else 0)

    @property
    def part(self) -> int:
        """Values along K of a tile of whole groups that are unpacked at once: what registers hold the sums of."""
        unit = math.lcm(self.group, K_MULTIPLE)
        units, most = self.blocks.k // unit, max(1, _SUMS // (self.rows * (unit // self.group)))
        return unit * max(count for count in range(1, most + 1) if units % count == 0)

    @property
    def windows(self) -> list[tpu_tile.Window]:
        """Those of the words along K."""
        return tpu_tile.windows(self.format, self.k, self.blocks.k)

    @property
    def arrays(self) -> int:
        """How many windows a weight has, those of scales and zero points included."""
        return (2 if self.weight_zero else 1) + len(self.windows)

    def scratch(self) -> dict[str, Any]:
        """By name, what is kept of a weight from one tile along K to the next."""
        n, kept = self.blocks.n, {}
        if self.groups > 1:
            kept["values"] = pltpu.VMEM((self.groups, n), jnp.float32)
            kept["total"] = pltpu.VMEM((self.stored, n), jnp.float32)
            if self.weight_zero:
                kept["weight_zero"] = pltpu.VMEM((self.groups, n), jnp.int32)
        if self.steps > 1 and self.group > self.blocks.k:
            kept["acc"] = pltpu.VMEM((self.rows, self.columns), jnp.int32)
        if self.epilogue is not None and self.groups == 1:
            kept["total"] = pltpu.VMEM((self.stored, n), jnp.float32)
        return kept
