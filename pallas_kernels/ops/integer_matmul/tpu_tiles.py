"""Tiles of the TPU kernel of integer products: how large they are, and what fits into VMEM."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.backends.tpu_operands import Beside
from qjax.pallas_kernels.backends.tpu_tile import K_MULTIPLE, LANES, SUBLANES, round_up
from qjax.pallas_kernels.chips import tpu as tpu_chips
from qjax.pallas_kernels.packed.qtensor import QTensor

ROWS = 32
"""Rows of int8 in a register."""

# What tiles may take of VMEM: every chip gives a kernel 16 MiB.
_VMEM = 12 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the tiles.

    `m` is a multiple of 32 (where M takes several tiles, of 128), `n` of 128, `k` of 256; `k` divides a group or holds
    whole ones.
    """

    m: int
    n: int
    k: int


def default_blocks(m: int, w: QTensor, beside: Beside = Beside()) -> Blocks:
    """Tiles for `m` rows of x: those that `chips/tpu.json` has for this chip, cut to the matrix, or chosen by size.

    With few rows the time goes to reading the weight, and tiles are deep. With many, the larger the tile of the result
    the fewer times anything is read.

    Args:
        m: rows of x.
        w: the weight.
        beside: what else is in the kernel.
    """
    k, n = w.layout.k, w.layout.n
    bm = round_up(m, ROWS) if m <= 512 else round_up(pl.cdiv(m, pl.cdiv(m, 512)), LANES)
    entry = tpu_chips.lookup("integer_matmul", min(m, bm), k, w.spec, w.order, jnp.int8)
    most_n, most_k = (entry.n, entry.k) if entry else (512, 4096 if m <= 64 else 1024)
    chosen = Blocks(bm, min(round_up(n, LANES), most_n), _depth(k, w.group_size, most_k))
    while not fits(chosen, w, beside) and max(chosen.m, chosen.n) > LANES:
        if chosen.n > LANES and chosen.n >= chosen.m:
            chosen = dataclasses.replace(chosen, n=round_up(chosen.n // 2, LANES))
        else:
            chosen = dataclasses.replace(chosen, m=round_up(chosen.m // 2, LANES))
    return chosen


def fits(blocks: Blocks, w: QTensor, beside: Beside = Beside()) -> bool:
    """Whether a kernel with such tiles has enough VMEM, by an estimate."""
    return _vmem_bytes(blocks, w, beside) <= _VMEM


def _depth(k: int, group: int, most: int) -> int:
    """Values of a tile along K, about `most`."""
    unit = math.lcm(group, K_MULTIPLE) if group < k else K_MULTIPLE
    if unit > most and group % K_MULTIPLE == 0:  # part of a group
        return max(size for size in range(K_MULTIPLE, most + 1, K_MULTIPLE) if group % size == 0)
    tiles = pl.cdiv(k, max(1, most // unit) * unit)
    return round_up(pl.cdiv(k, tiles), unit)


def _vmem_bytes(blocks: Blocks, w: QTensor, beside: Beside) -> int:
    """What windows (twice, as the next is read meanwhile), scratch and the largest values take."""
    m, n, k = blocks.m + ROWS, blocks.n + LANES, blocks.k
    rows = k if w.order == "nk" else sum(part.rows for part in tpu_tile.windows(w.spec.format, w.layout.k, k))
    words = rows * n * (1 if w.spec.format.bits == 8 else 4)
    groups = pl.cdiv(w.layout.k, w.group_size)
    copies = max(1, LANES // w.group_size) if groups > 1 else 1
    others = sum((m if rows else SUBLANES) * (n if columns else LANES) * 4 for rows, columns in beside.others)
    windows = 2 * (m * k + beside.weights * (words + 6 * groups * n) + others + 4 * m * n)
    held = beside.weights * (8 * groups * n + 2 * 4 * m * n)
    return windows + held + k * n + copies * m * LANES + copies * 4 * m * n
