"""What the Mosaic GPU kernels for NVIDIA Hopper have in common, differences between versions of JAX among it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

WGMMA_ROWS = 64  # of a result of `wgmma`: columns of the weight that one warpgroup multiplies

SMEM_BYTES = 227 * 1024  # bytes of shared memory that a block may have

_TILE_ROWS = 8  # TMA writes tiles of so many rows, which have to cut an array, unless it has fewer, without a rest

# NVIDIA H100 SXM, in clocks of 1.75 GHz: bytes that a multiprocessor gets of 3.35 TB/s, of which copies reach nine
# tenths, and of about twice that from the cache.
MEMORY_BYTES, CACHE_BYTES = 13.0, 26.0

# Guesses: clocks to fill the ring and to write a tile; clocks of the kernel that adds up splits; how much of what runs
# beside the slowest part of a step it delays.
TILE_CLOCKS, LAUNCH_CLOCKS, DELAY = 2000, 3500, 0.25


def load(ref: Any, layout: Any, *, optimized: bool) -> Array:
    """What memory holds, in registers; if `optimized`, without conflicts of banks, or it is an error."""
    at = ((),) if jax.__version_info__ < (0, 11) else ()  # an index was required
    return plgpu.load(ref, *at, layout=layout, optimized=optimized)


def interpreter() -> Any:
    """What makes a kernel run as XLA operations, on any platform.

    Raises:
        NotImplementedError: this version of JAX has none.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError("qjax: jax 0.10 does not interpret this kernel; jax 0.11 and newer do.")
    return plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]


def swizzled(bits: int, width: int) -> tuple[Any, ...]:
    """How an array lies in shared memory whose rows are cut and read in multiples of `width` values."""
    swizzle = min(128, width * bits // 8)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def whole_rows(m: int) -> int:
    """Rows that an array of m rows has to have for TMA to write it."""
    return m if m <= _TILE_ROWS else pl.cdiv(m, _TILE_ROWS) * _TILE_ROWS


def registers_for(warpgroups: int) -> tuple[int, int] | None:
    """Registers of a thread that copies and of one that multiplies; None if each may have as many as there are."""
    if warpgroups == 1:
        return None
    copies, launched = 40, 65536 // (128 * (warpgroups + 1)) // 8 * 8
    return copies, (launched * (warpgroups + 1) - copies) // warpgroups // 8 * 8


def place(columns: int, ways: int) -> tuple[Any, Any]:
    """Which columns of a tile, counted in `WGMMA_ROWS`, and which part of it along K this warpgroup takes.

    Args:
        columns: how many such parts a tile has along N.
        ways: warpgroups that share a tile along K.
    """
    warpgroup = lax.axis_index("warpgroup")
    return (warpgroup, 0) if ways == 1 else (lax.rem(warpgroup, columns), lax.div(warpgroup, columns))


def next_stage(stage: Int32[Array, ""], stages: int) -> Int32[Array, ""]:
    """The one that follows in a ring of so many."""
    return jnp.where(stage == stages - 1, 0, stage + 1)
