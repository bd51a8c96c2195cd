"""Products of 8-bit floats on NVIDIA GPUs: by cuBLASLt, or on the weight-only kernel for few rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax.pallas_kernels.ops.fp8_matmul import reference
from qjax.pallas_kernels.ops.fp8_matmul.cpu import WEIGHT_ONLY
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.packed.qtensor import QTensor


def xla_cuda_matmul(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    """The product that XLA gives to cuBLASLt; `x` has at least two rows there."""
    m = x.shape[-2]
    # XLA makes a product of a vector of one row, and for that a copy of the weight in float32.
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]) if m == 1 else x
    return reference.matmul(rows, w, layer=layer, precision=precision)[..., :m, :]


# Up to so many rows of x an H100 takes longer to read a weight of a byte, at 3.3 TB/s, than to multiply it in bfloat16.
_FEW_ROWS = 128


def cuda_matmul(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    """What one GPU runs: the weight-only kernel on a layer of a stack for few rows, else `xla_cuda_matmul`."""
    if layer is not None and x.shape[-2] <= _FEW_ROWS:  # XLA copies a layer out of its stack before it reads it
        rows, columns = x.astype(jnp.bfloat16), dataclasses.replace(w, dtype=jnp.dtype(jnp.float32))
        if matmul_gpu.unsupported(rows, columns, (), jnp.dtype(jnp.float32)) is None:
            return matmul_gpu.matmul(rows, columns, layer=layer, **WEIGHT_ONLY)
    return xla_cuda_matmul(x, w, layer=layer, precision=precision)
