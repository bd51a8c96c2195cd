"""What a product with a packed cache means."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qjax.pallas_kernels.ops.cache_dot import axes as cache_dot_axes
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.qcache import QCache


def dot(
    x: Float[Array, "*_"], cache: QCache, *, numbers: Any, operand: Literal[0, 1], precision: Any, out_dtype: Any
) -> Float[Array, "*_"]:
    """What `cache_dot_general` means: a `lax.dot_general` of codes, and scales beside it; arguments as there.

    XLA on CPU converts the codes of the operand at hand to floats before it multiplies, as it copies a float operand
    to transpose it.
    """
    (own_contract, own_batch), (x_contract, x_batch) = cache_dot_axes.sides(numbers, operand)
    x_free = [i for i in range(x.ndim) if i not in (*x_contract, *x_batch)]
    free = [i for i in range(cache.ndim) if i not in (*own_contract, *own_batch)]
    contracted = cache.axis + cache.ndim in own_contract
    scale = qcache.scales(cache)
    # bfloat16 holds codes less zero points exactly; float16 would lose small scaled probabilities
    dtype = x.dtype if x.dtype == jnp.bfloat16 else jnp.dtype("float32")
    if not contracted:
        of_x = scale.transpose(*own_batch, *own_contract, *free)
        of_x = of_x.reshape(*of_x.shape[: len(own_batch) + len(own_contract)], *(1,) * len(x_free))
        order = [*x_batch, *x_contract, *x_free]
        x = x.astype(jnp.float32) * of_x.transpose(sorted(range(len(order)), key=order.__getitem__))
    codes = qcache.unscaled(cache, dtype)
    lhs, rhs = (codes, x.astype(dtype)) if operand == 0 else (x.astype(dtype), codes)
    out = lax.dot_general(lhs, rhs, numbers, precision=precision, preferred_element_type=jnp.float32)
    if contracted:
        of_out = scale.transpose(*own_batch, *free, *own_contract)
        sizes = of_out.shape[: len(own_batch) + len(free)]
        ones = (1,) * len(x_free)
        split = len(own_batch)
        tail = (*sizes[split:], *ones) if operand == 0 else (*ones, *sizes[split:])
        out = out * of_out.reshape(*sizes[:split], *tail)
    return out.astype(out_dtype)
