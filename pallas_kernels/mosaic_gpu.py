"""What the Mosaic GPU kernels for NVIDIA Hopper have in common, differences between versions of JAX among it."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


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


def registers_for(warpgroups: int) -> tuple[int, int] | None:
    """Registers of a thread that copies and of one that multiplies; None if each may have as many as there are."""
    if warpgroups == 1:
        return None
    copies, launched = 40, 65536 // (128 * (warpgroups + 1)) // 8 * 8
    return copies, (launched * (warpgroups + 1) - copies) // warpgroups // 8 * 8
