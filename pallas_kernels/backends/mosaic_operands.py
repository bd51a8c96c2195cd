"""Operands of Mosaic GPU kernels in global memory: packed weights, and where the tiles of a result lie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.backends.gpu_operands import layer_operand
from qjax.pallas_kernels.backends.mosaic import WGMMA_ROWS, load
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index


@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays of a weight as a kernel reads them, `(layers * stack, N, _)`, and the index of the layer."""

    layer: Int[Array, " 1"]
    words: Int[Array, "LB N K"]
    scales: Float[Array, "LB _ _"]
    zeros: Int[Array, "LB _ _"] | None

    @staticmethod
    def of(w: QTensor, layer: Int[Array, ""] | int | None, *, zeros: bool = True) -> Packed:
        """From a weight in order "nk"; without its zero points where something else takes them off."""
        words = w.words
        if w.spec.format.bits == 4:
            words = lax.bitcast_convert_type(words, jnp.int4)  # (..., N, K / 8, 8), which moves nothing
        small = (w.scales.values, w.scales.zero if zeros else None)
        scales, zero = (None if a is None else a.reshape(-1, *a.shape[-2:]) for a in small)
        assert scales is not None
        return Packed(layer_operand(layer), words.reshape(-1, w.layout.n, w.layout.k), scales, zero)

    @property
    def arrays(self) -> list[Array]:
        """Index of the layer, words, scales, and zero points if there are any."""
        return [self.layer, self.words, self.scales, *([] if self.zeros is None else [self.zeros])]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight in a kernel: references to its arrays, and the index of the first matrix of its layer."""

    words: Any
    scales: Any
    zeros: Any
    first: Any

    @staticmethod
    def of(refs: Sequence[Any], stack: int) -> Weight:
        """From references to `Packed.arrays`, with so many matrices in a layer."""
        layer_ref, words, scales, *zeros = refs
        layer = layer_index(layer_ref[0], words.shape[0] // stack)
        return Weight(words, scales, zeros[0] if zeros else None, layer * stack)

    def of_group(self, ref: Any, matrix: Any, columns: Any, group: Any) -> Array:
        """Scales or zero points, by column, from global memory.

        Args:
            ref: to one or the other.
            matrix: index in the stack.
            columns: which ones, of a warpgroup.
            group: index of the group, the last one is taken beyond it; None where all of K shares a scale.
        """
        at = self.first + matrix
        if ref.shape[-2] == 1:  # one for the whole matrix
            one = jnp.broadcast_to(ref[at, 0, 0], (WGMMA_ROWS,))
            return plgpu.layout_cast(one, plgpu.Layout.WGMMA.reduce(1))
        group = 0 if group is None else jnp.minimum(group, ref.shape[-1] - 1)
        return load(ref.at[at, columns, group], plgpu.Layout.WGMMA.reduce(1), optimized=False)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile of a result lies: index in the stack, index of the split; row and column."""

    matrix: Any
    split: Any
    m: Any
    n: Any


def each_tile(
    units: int, stack: int, grid: tuple[int, int], band: int, body: Callable[[Any, Any, Any, Any, Array], Array]
) -> Array:
    """Calls `body` with each tile of this block: matrix and split, number along M and along N, and a carry from 0 on.

    Args:
        units: tiles of the results, times matrices and splits.
        stack: how many matrices there are.
        grid: tiles along M and N.
        band: tiles along M that follow each other before the next one along N: so many share words in the cache.
        body: what is done with a tile; returns the carry for the next one.
    """

    def with_tile(info: Any, carry: Array) -> Array:
        (unit,) = info.index
        unit = jnp.asarray(unit, jnp.int32)
        i, j = plgpu.planar_snake(lax.rem(unit, math.prod(grid)), grid, 0, min(band, grid[0]))
        unit = lax.div(unit, math.prod(grid))
        return body(lax.rem(unit, stack), lax.div(unit, stack), i, j, carry)

    return plgpu.nd_loop((units,), collective_axes="block", init_carry=jnp.int32(0))(with_tile)
