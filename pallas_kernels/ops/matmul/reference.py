"""What `quantized_matmul` means, in plain `jax.numpy`; also the CPU implementation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer


def result_dtype(x: Any, w: QTensor, casts: tuple[Any, ...], preferred_element_type: Any) -> jnp.dtype:
    """The dtype of a product; x is anything with a dtype."""
    return jnp.dtype(preferred_element_type or jnp.promote_types(x.dtype, (w.dtype, *casts)[-1]))


def weight_matrix(w: QTensor, casts: tuple[Any, ...]) -> Float[Array, "*stack K N"]:
    """The dequantized matrix after the casts that the program applies to the parameter."""
    m = w.matrix()
    for dtype in casts:
        m = m.astype(dtype)
    return m


def matmul(
    x: Float[Array, "*stack M K"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
) -> Float[Array, "*stack M N"]:
    """Dequantizes the matrix (of one layer) and multiplies: `x @ w`, or `x @ w.T` with `transpose`."""
    m = weight_matrix(pick_layer(w, layer), casts)
    stack = tuple(range(x.ndim - 2))
    contract = x.ndim - 1 if transpose else x.ndim - 2
    return lax.dot_general(
        x,
        m,
        (((x.ndim - 1,), (contract,)), (stack, stack)),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
