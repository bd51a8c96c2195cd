"""Products of 8-bit floats over several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.ops.partition import Split
from qjax.pallas_kernels.packed.qtensor import QTensor


def fp8_matmul(implementation: Callable[..., Array]) -> Callable[..., Array]:
    """`fp8_matmul.matmul_reference`, or another implementation of it, on the shards of each device."""

    def product(
        x: Float[Array, "*stack M K"], w: QTensor, *, layer: Int[Array, ""] | None, precision: lax.Precision
    ) -> Float[Array, "*stack M N"]:
        split = Split.of(jax.typeof(x), jax.tree.map(jax.typeof, w), indexed=layer is not None)
        if split is None:
            return implementation(x, w, layer=layer, precision=precision)

        def local(x: Array, w: QTensor, layer: Any) -> Array:
            w, layer = split.local(w, layer)
            out = implementation(x, w, layer=layer, precision=precision)
            return lax.psum(out, split.k) if split.k else out

        specs = (split.rows(split.k), split.weight(w), None if layer is None else P())
        return split.run(local, (x, w, layer), specs, split.rows(split.n))

    return product
