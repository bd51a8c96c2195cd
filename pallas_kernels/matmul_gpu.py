"""`quantized_matmul` on NVIDIA GPUs: which kernel a product runs on.

`matmul_mosaic_gpu` on Hopper, where the words of a column lie together (order "nk"); `matmul_triton` on Ampere and
later for everything else that it takes; the reference for the rest. `unsupported` says why.

**Only in `target_chip`.** None of these kernels has run on a GPU yet: they were interpreted on CPU and compiled. So a
program on a GPU runs the reference, unless it is made in `with target_chip("h100"):` or the like.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import blocks_gpu, matmul_reference
from pallas_kernels.qtensor import QTensor

HOPPER = 90  # the only generation that has `wgmma`


def matmul(
    x: Float[Array, "*stack M _"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
) -> Float[Array, "*stack M _"]:
    """What `matmul_reference.matmul` computes, up to rounding; arguments as for it."""
    out_dtype = jnp.dtype(preferred_element_type or jnp.promote_types(x.dtype, (w.dtype, *casts)[-1]))
    kernel, _ = _choose(x, w, casts, out_dtype, precision, transpose)
    return (kernel or matmul_reference).matmul(
        x,
        w,
        layer=layer,
        casts=casts,
        precision=precision,
        preferred_element_type=preferred_element_type,
        transpose=transpose,
    )


def unsupported(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, *, precision: Any = None, transpose: bool = False
) -> str | None:
    """Why a product is left to the reference, or why it is not on the fastest kernel; None if it is."""
    return _choose(x, w, casts, out_dtype, precision, transpose)[1]


def _choose(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, precision: Any, transpose: bool
) -> tuple[Any, str | None]:
    """The module of the kernel, or None, and what speaks against the faster one."""
    chip = blocks_gpu.asked_for()
    if chip is None:
        return None, 'kernels for GPU, which none has run yet, are used in target_chip("h100") only'
    from pallas_kernels import matmul_mosaic_gpu, matmul_triton  # a backend that every other platform can do without

    operands: dict[str, Any] = {"precision": precision, "transpose": transpose}
    reason = None
    if chip.capability == HOPPER:
        reason = matmul_mosaic_gpu.unsupported(x, w, casts, out_dtype, **operands)
        if reason is None:
            return matmul_mosaic_gpu, None
    if chip.capability < 80:
        return None, "the kernels are for GPUs of compute capability 8.0 and later"
    slower = matmul_triton.unsupported(x, w, casts, out_dtype, **operands)
    if slower is None and not matmul_triton.finds_device():
        slower = "from jax 0.11 on Triton needs a GPU, or the abstract one of a mesh (jax.sharding.use_abstract_mesh)"
    return (None, slower) if slower else (matmul_triton, reason)
