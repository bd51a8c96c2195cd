"""What a product of 8-bit floats means: codes multiplied and added up in float32, scales applied to the result."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.numbers import stored_scales
from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer


def matmul(
    x: Float[Array, "*stack M K"], w: QTensor, *, layer: Int[Array, ""] | int | None, precision: lax.Precision
) -> Float[Array, "*stack M N"]:
    """Sums times the scales of the weight, in float32: one dot of float8 numbers."""
    w = pick_layer(w, layer)
    codes = lax.bitcast_convert_type(w.words, jnp.dtype(w.spec.format.dtype))
    stack = tuple(range(x.ndim - 2))
    contract = x.ndim - 2 if w.order == "kn" else x.ndim - 1
    acc = lax.dot_general(
        x,
        codes,
        (((x.ndim - 1,), (contract,)), (stack, stack)),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return acc * stored_scales.resolve_scales(w.matrix_arrays()[1])


def any_precision(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    """`matmul` where the precision changes nothing."""
    # A higher precision has XLA multiply several parts of each operand; float8 numbers have one.
    return matmul(x, w, layer=layer, precision=lax.Precision.DEFAULT)
