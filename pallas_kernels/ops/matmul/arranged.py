"""The storage order that the kernels of a GPU read."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.chips.gpu import AMPERE, HOPPER
from qjax.pallas_kernels.packed.qtensor import QTensor, reorder, widen


def arranged(w: QTensor) -> QTensor:
    """The same parameter, bit for bit, stored as a kernel for `target_chip` reads it; as it is if none takes it."""
    chip = gpu_chips.asked_for()
    if chip is None or chip.capability < AMPERE:
        return w
    from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
    from qjax.pallas_kernels.ops.matmul import triton as matmul_triton

    x, out_dtype = jax.ShapeDtypeStruct((1, w.layout.k), w.dtype), jnp.dtype(w.dtype)
    wide = jax.eval_shape(widen, w)
    columns = jax.eval_shape(lambda w: reorder(w, "nk"), wide)
    if chip.capability == HOPPER and matmul_mosaic.unsupported(x, columns, (), out_dtype) is None:
        return reorder(widen(w), "nk")
    return w if matmul_triton.unsupported(x, wide, (), out_dtype) else widen(w)
