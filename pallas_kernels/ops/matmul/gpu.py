"""`quantized_matmul` and `fused_matmul` on NVIDIA GPUs: which kernel a product runs on.

`mosaic` on Hopper, where the words of a column lie together (order "nk"); `triton` on Ampere and later for everything
else that it takes; the reference for the rest. `kernel` says which, and why. Products with an epilogue run on the same
kernel as those without; what its operations are not made for stays the program that it was.

**Only in `target_chip`.** None of these kernels has run on a GPU yet: they were interpreted on CPU and compiled. So a
program on a GPU runs the reference, unless it is made in `with target_chip("h100"):` or the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.ops import primitive
from qjax.pallas_kernels.ops.matmul import reference
from qjax.pallas_kernels.ops.primitive import Runs
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
    module, _ = kernel(x, w, casts, out_dtype, precision=precision, transpose=transpose)
    return (module or reference).matmul(
        x,
        w,
        layer=layer,
        casts=casts,
        precision=precision,
        preferred_element_type=preferred_element_type,
        transpose=transpose,
    )


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
    module, _ = fused_kernel(x, weights, casts, epilogue, precision=precision)
    if module is not None:
        return module.fused_matmul(x, weights, others, layers=layers, epilogue=epilogue, **how)
    *stack, m, _ = x.shape
    products = [matmul(x, w, layer=layer, transpose=False, **how) for w, layer in zip(weights, layers, strict=True)]
    products = [a.reshape(-1, m, a.shape[-1]).astype(jnp.float32) for a in products]
    return epilogue(products, others).reshape(*stack, m, -1)


def kernel(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, *, precision: Any = None, transpose: bool = False
) -> tuple[Any, Runs]:
    """The module whose `matmul` computes a product, or None where the reference does, and what that runs as.

    Args:
        x: activations, or anything with a shape and a dtype.
        w: the packed weight; arrays or anything with a shape and a dtype.
        casts, precision, transpose: as for `matmul`.
        out_dtype: of the result.
    """

    def unsupported(module: Any) -> str | None:
        return module.unsupported(x, w, casts, out_dtype, precision=precision, transpose=transpose)

    return primitive.gpu_kernel(_KERNELS, unsupported, primitive.XLA)


def fused_kernel(
    x: Any, weights: Sequence[QTensor], casts: tuple[Any, ...], epilogue: Epilogue, *, precision: Any = None
) -> tuple[Any, Runs]:
    """The module whose `fused_matmul` computes products with their epilogue, or None, and what that runs as.

    Args:
        x, casts, precision: as for `kernel`.
        weights: packed alike.
        epilogue: what is made of the products.
    """
    module, runs = kernel(x, weights[0], casts, epilogue.dtype, precision=precision)
    if module is None:
        return None, Runs(primitive.SEPARATE, runs.reason)
    reason = module.unsupported_epilogue(epilogue)
    return (None, Runs(primitive.SEPARATE, reason)) if reason else (module, runs)


def joint_kernel(
    x: Any, weights: Sequence[QTensor], casts: tuple[Any, ...], out_dtypes: Sequence[Any], *, precision: Any = None
) -> tuple[Any, Runs]:
    """The module whose `joint_matmul` computes several products at once, or None, and what that runs as.

    Args:
        x, casts, precision: as for `kernel`.
        weights: alike but for N.
        out_dtypes: of the results.
    """

    def unsupported(module: Any) -> str | None:
        reasons = (
            module.unsupported(x, w, casts, out_dtype, precision=precision)
            for w, out_dtype in zip(weights, out_dtypes, strict=True)
        )
        return next(filter(None, reasons), None)

    hopper = {primitive.HOPPER_KERNEL: _KERNELS[primitive.HOPPER_KERNEL]}
    return primitive.gpu_kernel(hopper, unsupported, primitive.SEPARATE)


def _mosaic() -> Any:
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic

    return matmul_mosaic


def _triton() -> Any:
    from qjax.pallas_kernels.ops.matmul import triton as matmul_triton

    return matmul_triton


_KERNELS = {primitive.HOPPER_KERNEL: _mosaic, primitive.TRITON_KERNEL: _triton}
"""A row for each kernel, the fastest first."""
