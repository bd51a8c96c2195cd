"""Operands of TPU kernels: packed weights and their windows, what else is read, and the dtypes that are computed in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.precision import precision_names
from qjax.pallas_kernels.numbers import stored_scales
from qjax.pallas_kernels.packed.qtensor import QTensor, layer_index


@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays of a weight as a kernel reads them: `(layers, stack, _, _)`, nothing sliced out of a stack.

    Attributes:
        layers: index of the layer of the words, and of that of the scales.
        words: in the order of the product.
        scales: in order "kn".
    """

    layers: Int[Array, " 2"]
    words: Int[Array, "L B _ _"]
    scales: stored_scales.Scales

    @staticmethod
    def of(w: QTensor, layer: Int[Array, ""] | int | None, stack: int, order: str) -> Packed:
        """From a weight with so many axes of a stack."""
        layers = 1 if layer is None else w.words.shape[0]
        index = layer_index(0 if layer is None else layer, layers)
        words, scales = w.matrix_arrays()
        index_of_scales = index
        if layer is not None and (w.spec.double_quant or scales.values.dtype == jnp.float16):
            # they are converted: those of one layer, not of all
            scales = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0), scales)
            index_of_scales = jnp.zeros_like(index)
        words, scales = jax.tree.map(
            lambda a: no_float16(a).reshape(-1, math.prod(a.shape[-2 - stack : -2]), *a.shape[-2:]),
            (words if order == "kn" else w.words, stored_scales.plain_scales(scales)),
        )
        return Packed(jnp.stack([index, index_of_scales]), words, scales)

    @property
    def small(self) -> list[Array]:
        """Scales, and zero points if there are any."""
        return [a for a in (self.scales.values, self.scales.zero) if a is not None]

    @property
    def by_column(self) -> bool:
        """Whether scales differ along N; else there is one for the whole matrix."""
        return self.scales.values.shape[-1] > 1


@dataclasses.dataclass(frozen=True)
class Windows:
    """What a kernel holds of its packed weights at a step of its grid.

    Attributes:
        words: those along K, one operand each.
        order: of the words, "kn" or "nk".
        n: columns of a tile.
        at: from the indices of a step and what is prefetched to `Packed.layers` of all weights, one after the other,
            the index of the matrix, and those of the tile along K and along N.
    """

    words: Sequence[tpu_tile.Window]
    order: str
    n: int
    at: Callable[..., tuple[Any, Any, Any, Any]]

    def of_words(self, number: int) -> list[pl.BlockSpec]:
        """Those of the words of a weight."""

        def window(part: tpu_tile.Window) -> pl.BlockSpec:
            def index(*step: Any) -> tuple[Any, ...]:
                layers, matrix, k, n = self.at(*step)
                layer, along = layers[2 * number], part.first + part.step * k
                return (layer, matrix, *((n, along) if self.order == "nk" else (along, n)))

            shape = (self.n, part.rows) if self.order == "nk" else (part.rows, self.n)
            return pl.BlockSpec((None, None, *shape), index)

        return [window(part) for part in self.words]

    def of_small(self, number: int, w: Packed) -> list[pl.BlockSpec]:
        """Those of the scales and zero points of a weight: of all groups of the columns."""

        def index(*step: Any) -> tuple[Any, ...]:
            layers, matrix, _, n = self.at(*step)
            return (layers[2 * number + 1], matrix, 0, n if w.by_column else 0)

        columns = self.n if w.by_column else 1
        return [pl.BlockSpec((None, None, a.shape[-2], columns), index) for a in w.small]


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a kernel holds in VMEM for more than one product.

    Attributes:
        weights: how many are multiplied.
        others: of each other operand of the epilogue, whether it has rows, and whether it has columns.
    """

    weights: int = 1
    others: tuple[tuple[bool, bool], ...] = ()

    @staticmethod
    def of(weights: int, shapes: Sequence[tuple[int, ...]]) -> Beside:
        """For other operands of these shapes, `(*stack, M or 1, N or 1)`."""
        return Beside(weights, tuple((shape[-2] > 1, shape[-1] > 1) for shape in shapes))


def no_float16(a: Array) -> Array:
    """float32 in place of float16, which no TPU computes with."""
    return a.astype(jnp.float32) if a.dtype == jnp.float16 else a


def operand_dtype(x: Any, weight: Any, precision: Any) -> jnp.dtype:
    """The dtype in which values of these dtypes are multiplied, with a precision as `lax.dot_general` takes it."""
    fast = precision_names(precision) <= {"NONE", "DEFAULT", "FASTEST", "BFLOAT16", "BF16_BF16_F32"}
    one_pass = x != jnp.float16 and fast
    return jnp.dtype(jnp.bfloat16 if one_pass or jnp.promote_types(x, weight) == jnp.bfloat16 else jnp.float32)


STRIP = 16  # rows of a tile that go through an epilogue at a time: a multiple of the rows of a register


def finish_strips(epilogue: Epilogue, sums: Sequence[tuple[Any, Any]], others: Sequence[Any], out_ref: Any) -> None:
    """Writes what is made of the sums, each with a scale or None; `STRIP` rows at a time, or those of a register."""

    height = min(max(STRIP, 32 // out_ref.dtype.itemsize), out_ref.shape[0])

    def strip(i: Any) -> None:
        rows = pl.ds(pl.multiple_of(i * height, height), height)
        products = [ref[rows, :] if scale is None else ref[rows, :] * scale[...] for ref, scale in sums]
        out_ref[rows, :] = epilogue(products, [ref[rows, :] if ref.shape[0] > 1 else ref[...] for ref in others])

    count = out_ref.shape[0] // height
    if count == 1:
        strip(0)
    else:
        lax.fori_loop(0, count, lambda i, _: strip(i), None)
