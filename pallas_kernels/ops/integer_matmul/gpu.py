"""`integer_matmul` on NVIDIA GPUs: which kernel a product runs on.

`integer_matmul_mosaic_gpu` on Hopper, where the words of a column lie together (order "nk"); `integer_matmul_triton` on
Ampere and later for everything else that it takes; the reference for the rest. `kernel` says which, and why. All of
them give the same bits.

x comes as codes. They are made before, by XLA: for a scale for each token it reads x twice, for its extremes and to
round it, and writes a byte for each value: 5 bytes for each value of a bfloat16 x, 3 where the range is known, and
nothing for what it fuses with the operation before. On an H100 that takes as long, from memory, as the product with
some 1500 columns would at its peak: with several matmuls that share an input, it is done once.

What a program does with the results is done in the kernel (`fused_kernel`). Where the next product takes codes with a
range known before, Triton's writes them, and that rounding costs no reading and writing; on Hopper XLA makes them.

**Only in `target_chip`**, as the kernels of `matmul_gpu`: none of them has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.pallas_kernels.backends import triton
from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.chips.gpu import HOPPER
from qjax.pallas_kernels.packed.qtensor import QTensor


def kernel(x: Any, w: QTensor, out_dtype: Any) -> tuple[Any, str | None]:
    """The module whose `matmul` computes a product, or None, and what speaks against a faster one.

    Args:
        x: codes of the activations, or anything with their shape.
        w: the packed weight; arrays or anything with a shape and a dtype.
        out_dtype: of the result.
    """
    chip = gpu_chips.asked_for()
    reason = None
    if chip is not None and chip.capability == HOPPER:
        from qjax.pallas_kernels.ops.integer_matmul import (
            mosaic as integer_matmul_mosaic,  # a backend that every other platform can do without
        )

        reason = integer_matmul_mosaic.unsupported(x, w, out_dtype)
        if reason is None:
            return integer_matmul_mosaic, None
    if slower := triton.unavailable():
        return None, slower
    from qjax.pallas_kernels.ops.integer_matmul import triton as integer_matmul_triton

    slower = integer_matmul_triton.unsupported(x, w, out_dtype)
    return (None, slower) if slower else (integer_matmul_triton, reason)


def fused_kernel(x: Any, weights: Sequence[QTensor], epilogue: Epilogue) -> tuple[Any, str | None]:
    """The module whose `fused_matmul` computes products with their epilogue, or None, and why there is none.

    Args:
        x: as for `kernel`.
        weights: packed alike.
        epilogue: what is made of the products.
    """
    found, reason = kernel(x, weights[0], epilogue.dtype)
    reason = found.unsupported_epilogue(epilogue, weights[0]) if found else reason
    return (None, reason) if reason else (found, None)
