"""What the Mosaic GPU kernels for NVIDIA Hopper have in common, differences between versions of JAX among it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from qjax.pallas_kernels.chips import gpu as gpu_chips

WGMMA_ROWS = 64  # of a result of `wgmma`: columns of the weight that one warpgroup multiplies

SMEM_BYTES = 227 * 1024  # bytes of shared memory that a block may have

_TILE_ROWS = 8  # TMA writes tiles of so many rows, which have to cut an array, unless it has fewer, without a rest


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


def launch(
    kernel: Callable[..., None],
    operands: Sequence[Array],
    *,
    out_type: Any,
    units: int,
    warpgroups: int,
    scratch: dict[str, Any],
    name: str,
    interpret: bool,
) -> list[Array]:
    """Runs a kernel of as many blocks as the chip has multiprocessors, if there is work for them.

    Args:
        kernel: of one warpgroup, from references to operands and results, and scratch by name.
        operands: in global memory.
        out_type: of the results.
        units: tiles of the results, which blocks take one after the other.
        warpgroups: those that multiply; one more copies.
        scratch: shared memory and barriers of a block, by name.
        name: of the kernel.
        interpret: runs it as XLA operations, on any platform; jax 0.11 or newer.
    """
    run = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(min(units, gpu_chips.processors()),),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # what is shared has barriers of its own
        ),
        interpret=interpreter() if interpret else None,
        kernel_name=name,
    )
    return list(run(*operands))
