"""What the TPU kernels of weight-only products know beside their operands: sizes, dtypes, and how tiles are made."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.tpu_operands import Packed
from qjax.pallas_kernels.backends.tpu_tile import K_MULTIPLE, LANES
from qjax.pallas_kernels.chips import tpu as tpu_chips
from qjax.pallas_kernels.numbers.formats import QuantSpec
from qjax.pallas_kernels.ops.matmul.tpu_tiles import (
    EARLIER,
    LATER,
    MOST_BIASED,
    Blocks,
    cuts_depth,
    cuts_groups,
)
from qjax.pallas_kernels.packed.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Product:
    """A product as the kernel is compiled for it: sizes K and N, and dtypes.

    Attributes:
        order: of the words, "kn" or "nk".
        dtype: of the operands of the dot.
        rounding: narrower dtypes that a weight is rounded to before.
        codes: how a tile of codes is made: `tpu_tile.codes`, `biased_codes` or `gathered_codes`.
    """

    spec: QuantSpec
    k: int
    n: int
    order: str
    transpose: bool
    blocks: Blocks
    dtype: Any
    rounding: tuple[Any, ...]
    codes: Literal["plain", "biased", "gathered"]

    @staticmethod
    def of(w: QTensor, casts: tuple[Any, ...], dtype: Any, order: str, transpose: bool, blocks: Blocks) -> Product:
        """With matrices of this weight, for the chip that programs are made for; scales go in before if they have to.

        Raises:
            ValueError: such tiles do not cut the weight.
        """
        group, rounding = w.group_size, ()
        whole = group == w.layout.k
        if blocks.k % K_MULTIPLE or blocks.n % LANES or not (whole or cuts_groups(blocks.k, group)):
            raise ValueError(
                f"qjax: {blocks} for a packed {w.spec} matrix with K={w.layout.k}: k must be a multiple of "
                f"{K_MULTIPLE}, and of the group size or the group size of it; n must be a multiple of {LANES}."
            )
        if dtype == jnp.float32:
            rounding = tuple(d for d in (w.dtype, *casts) if d == jnp.bfloat16)
        if transpose or rounding or not (whole or cuts_depth(group)):
            blocks = dataclasses.replace(blocks, scale="before")
        codes, after, chip = "plain", blocks.scale == "after", tpu_chips.chip()
        if dtype == jnp.bfloat16 and not transpose:
            few = group >= LANES // 2 and blocks.m <= MOST_BIASED
            if chip in EARLIER and tpu_tile.can_bias(w.spec.format) and after and few:
                codes = "biased"
            whole_registers = group % LANES == 0 or group in (32, 64)  # also of every fourth row
            if chip in LATER and tpu_tile.can_gather_bytes(w.spec.format) and (after or whole_registers):
                codes = "gathered"
        return Product(w.spec, w.layout.k, w.layout.n, order, transpose, blocks, dtype, rounding, codes)

    def ordered(self, x: Float[Array, "*B K"]) -> Float[Array, "*B _"]:
        """x as the kernel takes it: with many rows the order of gathered codes costs least outside."""
        if not self.moved:
            return x
        x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % LANES)])
        parts = x.reshape(*x.shape[:-1], -1, LANES)
        return parts[..., tpu_tile.origin(jnp.arange(LANES))].reshape(x.shape)

    @property
    def narrow(self) -> bool:
        """Whether scales are multiplied in as bfloat16.

        Of integers and 8-bit floats, a value and a scale that are bfloat16 have a product that is rounded once.
        """
        exact = self.codes == "gathered" or not self.spec.format.values
        return exact and self.spec.scale_dtype == "bfloat16" and self.dtype == jnp.bfloat16

    @property
    def paired(self) -> bool:
        """Whether the copies of scales and zero points are `_paired`, so that rows of them need no conversion."""
        whole_registers = self.group % (LANES // 2) == 0  # also where four rows out of order share a group
        return self.blocks.scale == "before" and self.narrow and whole_registers and tpu_chips.chip() in LATER

    @property
    def moved(self) -> bool:
        """Whether x is in the order of `tpu_tile.reordered` when it enters the kernel."""
        return self.codes == "gathered" and self.blocks.scale == "before"

    @property
    def group(self) -> int:
        """Values along K that share a scale."""
        return self.spec.group_size(self.k)

    @property
    def whole(self) -> bool:
        """Whether all of K shares a scale."""
        return self.group == self.k

    @property
    def rows_of_codes(self) -> bool:
        """Whether the tile of codes is `(N, K)`: in order "nk", where they are not packed."""
        return self.order == "nk" and self.spec.format.bits == 8

    @property
    def rows_of_words(self) -> bool:
        """Whether the windows of words are `(N, R)`, to be transposed: in order "nk", where they are packed."""
        return self.order == "nk" and self.spec.format.bits < 8

    @property
    def windows(self) -> list[tpu_tile.Window]:
        """Those of the words along K."""
        return tpu_tile.windows(self.spec.format, self.k, self.blocks.k, LANES if self.rows_of_words else 1)

    @property
    def contracted(self) -> tuple[int, int]:
        """Size of the contracted axis, and of its tiles."""
        return (self.n, self.blocks.n) if self.transpose else (self.k, self.blocks.k)

    @property
    def produced(self) -> tuple[int, int]:
        """Size of the other axis of the weight, and of its tiles."""
        return (self.k, self.blocks.k) if self.transpose else (self.n, self.blocks.n)

    @property
    def ragged(self) -> bool:
        """Whether the last tile reaches beyond the contracted axis."""
        size, tile = self.contracted
        return size % tile != 0

    def copied(self, w: Packed) -> list[bool]:
        """Which of scales and zero points have a float32 copy.

        Mosaic takes a single row at an index that is only known at run time from float32, but not from narrower dtypes.
        """
        return [self.transpose or not w.by_column or a.dtype != jnp.float32 for a in w.small]

    def copies(self, w: Packed) -> list[Any]:
        """The scratch for them."""
        small = itertools.compress(w.small, self.copied(w))
        return [pltpu.VMEM((a.shape[-2], self.blocks.n), jnp.float32) for a in small]
