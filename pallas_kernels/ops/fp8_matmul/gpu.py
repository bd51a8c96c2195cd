"""Products of 8-bit floats on NVIDIA GPUs: by cuBLASLt, or on the weight-only kernel for few rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax.pallas_kernels.ops.fp8_matmul import reference
from qjax.pallas_kernels.ops.fp8_matmul.cpu import WEIGHT_ONLY
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.ops.primitive import XLA_CODES, Choice, Runs
from qjax.pallas_kernels.packed.qtensor import QTensor


def xla_cuda_matmul(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    """The product that XLA gives to cuBLASLt; `x` has at least two rows there."""
    m = x.shape[-2]
    # XLA makes a product of a vector of one row, and for that a copy of the weight in float32.
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]) if m == 1 else x
    return reference.matmul(rows, w, layer=layer, precision=precision)[..., :m, :]


# Up to so many rows of x an H100 takes longer to read a weight of a byte, at 3.3 TB/s, than to multiply it in bfloat16.
_FEW_ROWS = 128


def choose(x: Any, w: QTensor, *, layer: Any, **_: Any) -> Choice | str:
    """What one GPU runs: the weight-only kernel on a layer of a stack for few rows, else `xla_cuda_matmul`."""
    reason = ""
    if layer is not None and x.shape[-2] <= _FEW_ROWS:  # XLA copies a layer out of its stack before it reads it
        rows, columns = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), _columns(w)
        module, runs = matmul_gpu.kernel(rows, columns, (), jnp.dtype(jnp.float32))
        if not runs.reason:
            return Choice(runs, functools.partial(_few_rows, module))
        reason = runs.reason
    return Choice(Runs(XLA_CODES, reason), xla_cuda_matmul)


def _columns(w: QTensor) -> QTensor:
    """The weight as the weight-only kernels multiply it: by rows in bfloat16, with sums in float32."""
    return dataclasses.replace(w, dtype=jnp.dtype(jnp.float32))


def _few_rows(module: Any, x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    return module.matmul(x.astype(jnp.bfloat16), _columns(w), layer=layer, **WEIGHT_ONLY)
