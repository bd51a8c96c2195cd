"""What a product of rows sorted by expert with packed experts means."""

from __future__ import annotations

from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int, Int32

from qjax.pallas_kernels.ops.matmul.reference import weight_matrix
from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer


def matmul(
    x: Float[Array, "M _"],
    w: QTensor,
    group_sizes: Int32[Array, " E"],
    *,
    layer: Int[Array, ""] | int | None,
    casts: tuple[Any, ...],
    precision: Any,
    preferred_element_type: Any,
    transpose: bool,
) -> Float[Array, "M _"]:
    """Dequantizes the experts (of one layer) and leaves the rest to `lax.ragged_dot`."""
    return lax.ragged_dot_general(
        x,
        weight_matrix(pick_layer(w, layer), casts),
        group_sizes,
        lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2 if transpose else 1,)), ((), ())),
            lhs_ragged_dimensions=(0,),
            rhs_group_dimensions=(0,),
        ),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
