"""`integer_matmul` on NVIDIA GPUs: which kernel a product runs on.

`mosaic` on Hopper, where the words of a column lie together (order "nk"); `triton` on Ampere and later for everything
else that it takes; the reference for the rest. `kernel` says which, and why. All of them give the same bits.

x comes as codes. They are made before, by XLA: for a scale for each token it reads x twice, for its extremes and to
round it, and writes a byte for each value: 5 bytes for each value of a bfloat16 x, 3 where the range is known, and
nothing for what it fuses with the operation before. On an H100 that takes as long, from memory, as the product with
some 1500 columns would at its peak: with several matmuls that share an input, it is done once.

What a program does with the results is done in the kernel (`fused_kernel`). Where the next product takes codes with a
range known before, Triton's writes them, and that rounding costs no reading and writing; on Hopper XLA makes them.

**Only in `target_chip`**, as the kernels of `quantized_matmul`: none of them has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.ops import primitive
from qjax.pallas_kernels.ops.primitive import Runs
from qjax.pallas_kernels.packed.qtensor import QTensor


def kernel(x: Any, w: QTensor, out_dtype: Any) -> tuple[Any, Runs]:
    """The module whose `matmul` computes a product, or None where the reference does, and what that runs as.

    Args:
        x: codes of the activations, or anything with their shape.
        w: the packed weight; arrays or anything with a shape and a dtype.
        out_dtype: of the result.
    """
    return primitive.gpu_kernel(_KERNELS, lambda module: module.unsupported(x, w, out_dtype), primitive.XLA_CODES)


def fused_kernel(x: Any, weights: Sequence[QTensor], epilogue: Epilogue) -> tuple[Any, Runs]:
    """The module whose `fused_matmul` computes products with their epilogue, or None, and what that runs as.

    Args:
        x: as for `kernel`.
        weights: packed alike.
        epilogue: what is made of the products.
    """
    module, runs = kernel(x, weights[0], epilogue.dtype)
    if module is None:
        return None, Runs(primitive.SEPARATE, runs.reason)
    reason = module.unsupported_epilogue(epilogue, weights[0])
    return (None, Runs(primitive.SEPARATE, reason)) if reason else (module, runs)


def _mosaic() -> Any:
    from qjax.pallas_kernels.ops.integer_matmul import mosaic as integer_matmul_mosaic

    return integer_matmul_mosaic


def _triton() -> Any:
    from qjax.pallas_kernels.ops.integer_matmul import triton as integer_matmul_triton

    return integer_matmul_triton


_KERNELS = {primitive.HOPPER_KERNEL: _mosaic, primitive.TRITON_KERNEL: _triton}
"""A row for each kernel, the fastest first."""
