"""`quantized_matmul` and `fused_matmul` on NVIDIA GPUs: which kernel a product runs on.

`matmul_mosaic_gpu` on Hopper, where the words of a column lie together (order "nk"); `matmul_triton` on Ampere and
later for everything else that it takes; the reference for the rest. `unsupported` says why. Products with an epilogue
run on the same kernel as those without; what its operations are not made for stays the program that it was.

**Only in `target_chip`.** None of these kernels has run on a GPU yet: they were interpreted on CPU and compiled. So a
program on a GPU runs the reference, unless it is made in `with target_chip("h100"):` or the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.chips.gpu import AMPERE, HOPPER
from qjax.pallas_kernels.ops.matmul import reference
from qjax.pallas_kernels.packed.qtensor import QTensor


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
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    kernel, _ = _choose(x, w, casts, out_dtype, precision, transpose)
    return (kernel or reference).matmul(
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


def fused_matmul(
    x: Float[Array, "*stack M K"],
    weights: Sequence[QTensor],
    others: Sequence[Float[Array, "_ _ _"]],
    *,
    layers: Sequence[Int[Array, ""] | int | None],
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    epilogue: Epilogue,
) -> Float[Array, "*stack M N"]:
    """The epilogue of the products of x with one or two weights, up to rounding.

    One kernel computes it, or, where none does with the part of the operands that a device has, it follows the products
    as XLA operations.

    Args:
        x, casts, precision, preferred_element_type: as for `matmul`.
        weights: packed alike, so that they differ in values alone.
        others: what else the epilogue reads, `(stack or 1, M or 1, N or 1)` each, the stack merged.
        layers: for each weight, as for `matmul`.
        epilogue: what is made of the products.
    """
    how: dict[str, Any] = {"casts": casts, "precision": precision, "preferred_element_type": preferred_element_type}
    kernel, _ = _choose_fused(x, weights, casts, epilogue, precision)
    if kernel is not None:
        return kernel.fused_matmul(x, weights, others, layers=layers, epilogue=epilogue, **how)
    *stack, m, _ = x.shape
    products = [matmul(x, w, layer=layer, transpose=False, **how) for w, layer in zip(weights, layers, strict=True)]
    products = [a.reshape(-1, m, a.shape[-1]).astype(jnp.float32) for a in products]
    return epilogue(products, others).reshape(*stack, m, -1)


def unsupported_fused(
    x: Any, weights: Sequence[QTensor], casts: tuple[Any, ...], epilogue: Epilogue, *, precision: Any = None
) -> str | None:
    """Why no kernel computes products with their epilogue, or None; operands are anything with shapes and dtypes."""
    kernel, reason = _choose_fused(x, weights, casts, epilogue, precision)
    return None if kernel else reason


def _choose_fused(
    x: Any, weights: Sequence[QTensor], casts: tuple[Any, ...], epilogue: Epilogue, precision: Any
) -> tuple[Any, str | None]:
    """The module of the kernel, or None, and why there is none."""
    kernel, reason = _choose(x, weights[0], casts, epilogue.dtype, precision, transpose=False)
    reason = kernel.unsupported_epilogue(epilogue) if kernel else reason
    return (None, reason) if reason else (kernel, None)


def _choose(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, precision: Any, transpose: bool
) -> tuple[Any, str | None]:
    """The module of the kernel, or None, and what speaks against the faster one."""
    chip = gpu_chips.asked_for()
    if chip is None:
        return None, 'kernels for GPU, which none has run yet, are used in target_chip("h100") only'
    from qjax.pallas_kernels.backends import triton
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.ops.matmul import (
        triton as matmul_triton,  # a backend that every other platform can do without
    )

    operands: dict[str, Any] = {"precision": precision, "transpose": transpose}
    reason = None
    if chip.capability == HOPPER:
        reason = matmul_mosaic.unsupported(x, w, casts, out_dtype, **operands)
        if reason is None:
            return matmul_mosaic, None
    if chip.capability < AMPERE:
        return None, "the kernels are for GPUs of compute capability 8.0 and later"
    slower = matmul_triton.unsupported(x, w, casts, out_dtype, **operands)
    if slower is None and not triton.finds_device():
        slower = "from jax 0.11 on Triton needs a GPU, or the abstract one of a mesh (jax.sharding.use_abstract_mesh)"
    return (None, slower) if slower else (matmul_triton, reason)
