"""Tiles of the TPU kernel: how large they are, and what fits into VMEM."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax.numpy as jnp

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.tpu_operands import Beside
from qjax.pallas_kernels.backends.tpu_tile import K_MULTIPLE, LANES, SUBLANES, round_up
from qjax.pallas_kernels.chips import tpu as tpu_chips
from qjax.pallas_kernels.numbers.formats import QuantSpec
from qjax.pallas_kernels.numbers.packing import WORD_BITS


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Attributes:
        m: rows of x in a tile: 8, or a multiple of 16.
        n: columns of the weight in a tile, a multiple of 128.
        k: rows of the weight in a tile, a multiple of 256; a multiple of the group size, or the group size of it.
        scale: whether scales are multiplied in before or after the product.
    """

    m: int
    n: int
    k: int
    scale: Literal["before", "after"]


# A kernel has 16 MiB of VMEM on every chip, if it asks for no more; what `_vmem` does not count gets the rest.
_VMEM = 11 * 2**20

MOST_M, MOST_K = 512, 2048

LATER = ("v6e", "7x")  # matrix units 256 deep instead of 128, a vector unit that has bfloat16 and gathers bytes

EARLIER = ("v5e", "v5p")

MOST_BIASED = 32  # rows of x in a tile: with more, conversion of codes is not what takes the time

MOST_CUT = 64  # rows of x: with so few the compiler overlaps several short dots better than it does the parts of one

_STEP = 128  # a step of the grid takes about as long as so many rows of a tile more


def default_blocks(
    m: int,
    k: int,
    n: int,
    spec: QuantSpec,
    dtype: Any,
    order: str = "kn",
    transpose: bool = False,
    beside: Beside = Beside(),
) -> Blocks | None:
    """What the table of `chips/tpu.json` says for this chip, cut to the matrix and to VMEM, or a choice by shape alone.

    Few rows of x read the weight once: tiles are long, so that there is enough to read in each step. With many rows the
    product takes the time, and large tiles of the result read x and the weight less often.

    Args:
        m: rows of x.
        k, n: sizes of the weight's matrix.
        spec: of the weight.
        dtype: of the operands of the product.
        order: of the words as the kernel reads them.
        transpose: whether N is contracted; the table has no rows for that.
        beside: what else is in the kernel.

    Returns:
        Blocks, or None if no tile fits into VMEM.
    """
    group, unit = spec.group_size(k), k_unit(k, spec, order)
    short = tpu_chips.chip() == "v6e" or (tpu_chips.chip() == "7x" and group < k)  # where tiles of 8 rows take less
    fewest = SUBLANES if m <= SUBLANES and short else 16
    bm = round_up(-(-m // -(-m // MOST_M)), fewest)
    entry = None if transpose else tpu_chips.lookup("quantized_matmul", bm, k, spec, order, dtype)
    most_n, most_k = (entry.n, entry.k) if entry else (512, 2048) if bm <= 64 else (1024, 512)
    halvings = sorted(itertools.product(range(6), range(4), range(4)), key=lambda h: (h[0], sum(h), h))
    for less_m, less_n, less_k in halvings:
        rows = bm if bm <= 16 else max(16, round_up(bm >> less_m, 16))
        by_shape = "after" if group == k or (cuts_depth(group) and 2 * rows <= group) else "before"
        blocks = Blocks(
            m=rows,
            n=_tile(n, LANES, max(LANES, most_n >> less_n)),
            k=_tile(k, unit, max(unit, most_k >> less_k), 1 if group == k else group),
            scale=entry.scale if entry and entry.scale and rows > SUBLANES else by_shape,  # no row is for tiles of 8
        )
        if fits(blocks, k, spec, dtype, order, beside):
            return blocks
    return None


def fits(blocks: Blocks, k: int, spec: QuantSpec, dtype: Any, order: str, beside: Beside = Beside()) -> bool:
    """Whether a kernel with such tiles has enough VMEM, by an estimate; arguments as for `default_blocks`."""
    return _vmem(blocks, k, spec, dtype, order, beside) <= _VMEM


def cuts_depth(group: int) -> bool:
    """Whether groups are whole tiles of the matrix unit, or several of them are one."""
    return group % LANES == 0 or LANES % group == 0


def depth_of_unit(rows: int) -> int:
    """Of the matrix unit, as far as filling it pays with so many rows of x."""
    return 2 * LANES if tpu_chips.chip() in LATER and rows <= 16 else LANES


def k_unit(k: int, spec: QuantSpec, order: str) -> int:
    """Tiles are multiples of this along K, which cuts no word."""
    group, bits = spec.group_size(k), spec.format.bits
    unit = K_MULTIPLE if group == k or group % K_MULTIPLE == 0 else math.lcm(K_MULTIPLE, group)
    if order == "nk" and bits in (2, 4):  # if words of a tile fill lanes, it has a window of its own
        filled = math.lcm(unit, LANES * WORD_BITS // bits)
        if filled < k and filled <= MOST_K and (group == k or cuts_groups(filled, group)):
            return filled
    return unit


def _tile(size: int, unit: int, most: int, group: int = 1) -> int:
    """The multiple of `unit` up to `most` that covers `size` in the least time, in whole groups or parts of one."""
    choices = range(unit, min(most, round_up(size, unit)) + 1, unit)
    allowed = [tile for tile in reversed(choices) if cuts_groups(tile, group)]
    return min(allowed, key=lambda tile: -(-size // tile) * (tile + _STEP))


def cuts_groups(tile: int, group: int) -> bool:
    """Whether a tile of so many rows of K has whole groups, or lies within one."""
    return tile % group == 0 or group % tile == 0


def _vmem(blocks: Blocks, k: int, spec: QuantSpec, dtype: Any, order: str, beside: Beside) -> int:
    """Bytes of the windows, each of which Pallas holds twice, of the scratch and of the tile."""
    size = jnp.dtype(dtype).itemsize
    m, bn, bk = blocks.m, blocks.n, blocks.k
    turned = order == "nk" and spec.format.bits < 8
    windows = tpu_tile.windows(spec.format, k, bk, LANES if turned else 1)
    words = sum(w.rows for w in windows) * bn * (1 if spec.format.bits == 8 else 4)
    scales = -(-k // spec.group_size(k)) * bn * 4 * (2 if spec.zero_point else 1)
    held = m * bn * 4 + scales + (words if turned else 0)
    others = sum((m if rows else SUBLANES) * (bn if columns else LANES) * 4 for rows, columns in beside.others)
    windows = m * max(bk, bn) * 4 + m * max(bn, bk) * size + others + beside.weights * (words + scales)
    return 2 * windows + bk * bn * size + beside.weights * held
