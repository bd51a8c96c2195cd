"""What epilogues in Mosaic GPU kernels read beside sums of products: vectors, and arrays of the size of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from qjax.pallas_kernels.backends.mosaic import WGMMA_ROWS, load, swizzled, whole_rows


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a tile of the result needs beside one weight.

    Attributes:
        weights: how many are multiplied with a tile of x.
        others: of each other operand of the epilogue, whether it has rows, whether it has columns, and its dtype.
    """

    weights: int = 1
    others: tuple[tuple[bool, bool, Any], ...] = ()

    @staticmethod
    def of(weights: int, others: Sequence[Array]) -> Beside:
        """For other operands `(stack or 1, M or 1, N or 1)`."""
        return Beside(weights, tuple((a.shape[-2] > 1, a.shape[-1] > 1, a.dtype) for a in others))

    @property
    def tiles(self) -> list[tuple[int, Any]]:
        """Numbers and dtypes of the operands that have both, which are copied by tiles."""
        return [(i, dtype) for i, (rows, columns, dtype) in enumerate(self.others) if rows and columns]

    def scratch(self, columns: int, strip: int, buffers: int) -> dict[str, Any]:
        """Shared memory and barriers for `OtherTiles`.

        Args:
            columns: parts of a tile along N, one for each warpgroup that writes.
            strip: rows that are written at a time.
            buffers: strips that are held.
        """
        kept: dict[str, Any] = {
            f"other_{i}": plgpu.SMEM(
                (columns, buffers, strip, WGMMA_ROWS), dtype, transforms=swizzled(8 * dtype.itemsize, WGMMA_ROWS)
            )
            for i, dtype in self.tiles
        }
        if kept:
            kept["others_full"] = plgpu.Barrier(num_arrivals=len(kept), num_barriers=columns * buffers)
        return kept


ALONE = Beside()
"""Of a product alone."""


def whole_tiles(a: Array) -> Array:
    """The array with as many rows as TMA needs."""
    return jnp.pad(a, ((0, 0), (0, whole_rows(a.shape[-2]) - a.shape[-2]), (0, 0)))


def as_read(a: Float[Array, "_ _ _"], m: int) -> Array:
    """Another operand of the epilogue as a kernel with tiles of m rows reads it: vectors without their axis of 1."""
    if a.shape[-2] > 1 and a.shape[-1] > 1:
        return whole_tiles(a)
    if a.shape[-2] > 1:  # the last tile has no edge that is checked
        return jnp.pad(a[..., 0], ((0, 0), (0, -a.shape[-2] % m)))
    return a[..., 0, :]


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
