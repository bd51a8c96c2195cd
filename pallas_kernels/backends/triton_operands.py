"""Operands of Triton's kernels in global memory: packed weights, and what epilogues read beside sums of products."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Num

from qjax.pallas_kernels.backends.gpu_operands import layer_operand
from qjax.pallas_kernels.backends.triton import pltriton
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index


@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays of a weight as a kernel reads them, with all matrices along one axis, and the index of the layer."""

    layer: Int[Array, " 1"]
    words: Num[Array, "LB _ _"]
    scales: Num[Array, "LB _ _"]
    zeros: Int[Array, "LB _ _"] | None

    @staticmethod
    def of(w: QTensor, layer: Int[Array, ""] | int | None, *, zeros: bool = True) -> Packed:
        """From a weight in either order; without its zero points where something else takes them off."""
        words = w.words
        if w.spec.format.kind == "float":
            words = lax.bitcast_convert_type(words, jnp.dtype(w.spec.format.dtype))
        index, arrays = layer_operand(layer), (words, w.scales.values, w.scales.zero if zeros else None)
        words, scales, *zero = (a.reshape(-1, *a.shape[-2:]) for a in arrays if a is not None)
        return Packed(index, words, scales, zero[0] if zero else None)

    @property
    def arrays(self) -> list[Array]:
        """Index of the layer, words, scales, and zero points if there are any."""
        return [self.layer, self.words, self.scales, *([] if self.zeros is None else [self.zeros])]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix of a weight in a kernel.

    Attributes:
        words, scales, zeros: references to the arrays; zeros are None if there are none.
        at: index of the matrix.
        n: columns of the matrix.
        order: of the words, "kn" or "nk".
    """

    words: Any
    scales: Any
    zeros: Any
    at: Any
    n: int
    order: str

    @staticmethod
    def of(refs: Sequence[Any], matrix: Any, stack: int, n: int, order: str) -> Weight:
        """This matrix of the layer, which has so many, from references to `Packed.arrays`."""
        layer_ref, words, scales, *zeros = refs
        at = layer_index(layer_ref[0], words.shape[0] // stack) * stack + matrix
        return Weight(words, scales, zeros[0] if zeros else None, at, n, order)

    def of_group(self, ref: Any, group: Any, columns: Int[Array, " N"]) -> Num[Array, " N"]:
        """Scales or zero points of a group, by column; 0 beyond the matrix."""
        of, kn = columns, self.order == "kn"
        if ref.shape[-1 if kn else -2] == 1:  # one for the whole matrix
            of = jnp.zeros_like(columns)
        index = (self.at, group, of) if kn else (self.at, of, group)
        return pltriton.load(ref.at[index], mask=columns < self.n, other=0)

    def words_of(self, k: Any, count: int, columns: Int[Array, " N"], per_word: int) -> Num[Array, "_ _"]:
        """The words of `count` values from k on, `(count / per_word, N)`, or turned in order "nk"; 0 beyond the array.

        Args:
            k, count: multiples of `per_word`.
            columns: of the tile.
            per_word: values in a word.
        """
        kn = self.order == "kn"
        units = lax.div(k, per_word) + jnp.arange(count // per_word)
        across, along = (columns[None, :], units[:, None]) if kn else (columns[:, None], units[None, :])
        return pltriton.load(
            self.words.at[(self.at, along, across) if kn else (self.at, across, along)],
            mask=(across < self.n) & (along < self.words.shape[-2 if kn else -1]),
            other=jnp.zeros((), self.words.dtype),
        )


def beside(
    ref: Any, matrix: Any, rows: Int[Array, " M"], columns: Int[Array, " N"], size: tuple[int, int]
) -> Num[Array, "_ _"]:
    """What an epilogue reads of another operand for a tile of the result.

    Args:
        ref: `(stack or 1, M or 1, N or 1)`, in global memory.
        matrix, rows, columns: of the tile.
        size: rows and columns of the result.
    """
    one = jnp.zeros((1, 1), jnp.int32)
    across = rows[:, None] if ref.shape[1] > 1 else one
    along = columns[None, :] if ref.shape[2] > 1 else one
    at = matrix if ref.shape[0] > 1 else 0
    return pltriton.load(ref.at[at, across, along], mask=(across < size[0]) & (along < size[1]), other=0)
