"""Products of integer codes over several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int8, Int32

from qjax.pallas_kernels.numbers import packing, stored_scales
from qjax.pallas_kernels.numbers.exact import finite
from qjax.pallas_kernels.ops.integer_matmul.reference import rescale
from qjax.pallas_kernels.ops.partition import Split
from qjax.pallas_kernels.packed.qtensor import QTensor, pick_layer


def integer_matmul(implementation: Callable[..., Array]) -> Callable[..., Array]:
    """`integer_matmul.matmul_reference`, or another implementation of it, on the shards of each device."""

    def product(
        x: Int8[Array, "*stack M K"],
        scale: Float[Array, "*stack M 1"],
        zero: Float[Array, "*stack M 1"] | None,
        w: QTensor,
        *,
        layer: Int[Array, ""] | None,
        out_dtype: Any,
    ) -> Float[Array, "*stack M N"]:
        split = Split.of(jax.typeof(x), jax.tree.map(jax.typeof, w), indexed=layer is not None)
        if split is None:
            return implementation(x, scale, zero, w, layer=layer, out_dtype=out_dtype)

        def local(x: Array, scale: Array, zero: Array | None, w: QTensor, layer: Any) -> Array:
            w, layer = split.local(w, layer)
            if not split.k:
                return implementation(x, scale, zero, w, layer=layer, out_dtype=out_dtype)
            if w.group_size == w.layout.k:
                w = pick_layer(w, layer)
                sums = lax.psum(_group_sums(x, zero, w), split.k)
                return _scaled(sums, scale, w, out_dtype)
            out = implementation(x, jnp.ones_like(scale), zero, w, layer=layer, out_dtype=jnp.float32)
            return rescale(lax.psum(out, split.k), scale, out_dtype)

        row = split.rows()
        specs = (
            split.rows(split.k),
            row,
            None if zero is None else row,
            split.weight(w),
            None if layer is None else P(),
        )
        return split.run(local, (x, scale, zero, w, layer), specs, split.rows(split.n))

    return product


# --- Auto axes: integers as XLA partitions them -----------------------------------------------------------------


def plain_integer_matmul(
    x: Int8[Array, "*stack M K"],
    scale: Float[Array, "*stack M 1"],
    zero: Float[Array, "*stack M 1"] | None,
    w: QTensor,
    *,
    layer: Int[Array, ""] | None,
    out_dtype: Any,
) -> Float[Array, "*stack M N"]:
    """`integer_matmul.matmul_reference` without its loop over groups, up to the order in which groups are added.

    A loop would take each group in turn from the device that has it. Here all of them are one batched dot, which
    holds the sums of all groups at once, `(*stack, G, M, N)`.
    """
    w = pick_layer(w, layer)
    return _scaled(_group_sums(x, zero, w), scale, w, out_dtype)


def _group_sums(
    x: Int8[Array, "*stack M K"], zero: Float[Array, "*stack M 1"] | None, w: QTensor
) -> Int32[Array, "*stack G M N"]:
    """The exact sums `acc` of `integer_matmul`, for all groups."""
    words, scales = w.matrix_arrays()
    *stack, m, k = x.shape
    n, group = w.layout.n, w.group_size
    groups = scales.values.shape[-2]
    rest = groups * group - k  # the last group may be short
    codes = jnp.pad(packing.unpack(words, w.spec.format, k), [(0, 0)] * len(stack) + [(0, rest), (0, 0)])
    codes = codes.reshape(*stack, groups, group, n)
    x = jnp.pad(x, [(0, 0)] * (len(stack) + 1) + [(0, rest)]).reshape(*stack, m, groups, group)
    batch = tuple(range(len(stack)))
    numbers = (((len(stack) + 2,), (len(stack) + 1,)), ((*batch, len(stack) + 1), (*batch, len(stack))))
    sums = lax.dot_general(x, codes, numbers, preferred_element_type=jnp.int32)  # (*stack, G, M, N)
    columns = None
    if zero is not None:
        columns = jnp.sum(codes, axis=-2, keepdims=True, dtype=jnp.int32)  # (*stack, G, 1, N)
    if scales.zero is not None:
        weight_zero = scales.zero.astype(jnp.int32)[..., None, :]  # (*stack, G, 1, N)
        x_sums = jnp.moveaxis(jnp.sum(x, axis=-1, dtype=jnp.int32), -1, -2)[..., None]  # (*stack, G, M, 1)
        sums -= x_sums * weight_zero
        if columns is not None:
            sizes = jnp.full((groups, 1, 1), group, jnp.int32).at[-1].add(-rest)
            columns -= sizes * weight_zero
    if columns is not None:
        assert zero is not None
        sums -= zero.astype(jnp.int32)[..., None, :, :] * columns
    return sums


def _scaled(
    sums: Int32[Array, "*stack G M N"], scale: Float[Array, "*stack M 1"], w: QTensor, out_dtype: Any
) -> Float[Array, "*stack M N"]:
    values = stored_scales.resolve_scales(w.matrix_arrays()[1])[..., None, :]  # (*stack, G, 1, N)
    return rescale(jnp.sum(finite(sums.astype(jnp.float32) * values), axis=-3), scale, out_dtype)
