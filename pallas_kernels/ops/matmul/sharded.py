"""Weight-only products over several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.ops.matmul.reference import result_dtype
from qjax.pallas_kernels.ops.partition import Split
from qjax.pallas_kernels.packed.qtensor import QTensor

# --- Explicit axes: the products -------------------------------------------------------------------------------


def matmul(implementation: Callable[..., Array]) -> Callable[..., Array]:
    """`matmul_reference.matmul`, or another implementation of it, on the shards of each device."""

    def product(
        x: Float[Array, "*stack M _"],
        w: QTensor,
        *,
        layer: Int[Array, ""] | None,
        casts: tuple[Any, ...],
        precision: Any,
        preferred_element_type: Any,
        transpose: bool,
    ) -> Float[Array, "*stack M _"]:
        options: dict[str, Any] = {"casts": casts, "precision": precision, "transpose": transpose}
        split = Split.of(jax.typeof(x), jax.tree.map(jax.typeof, w), indexed=layer is not None, transpose=transpose)
        if split is None:
            return implementation(x, w, layer=layer, preferred_element_type=preferred_element_type, **options)
        contracted, produced = (split.n, split.k) if transpose else (split.k, split.n)
        out_dtype = result_dtype(x, w, casts, preferred_element_type)
        dtype = jnp.promote_types(out_dtype, jnp.float32) if contracted else out_dtype

        def local(x: Array, w: QTensor, layer: Any) -> Array:
            w, layer = split.local(w, layer)
            out = implementation(x, w, layer=layer, preferred_element_type=dtype, **options)
            return lax.psum(out, contracted).astype(out_dtype) if contracted else out

        specs = (split.rows(contracted), split.weight(w), None if layer is None else P())
        return split.run(local, (x, w, layer), specs, split.rows(produced))

    return product
