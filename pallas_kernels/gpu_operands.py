"""What the kernels for NVIDIA GPUs have in common: which products they compute, and operands of 16 bits for them.

bfloat16 and float16 are multiplied as they are. float32 is multiplied as two bfloat16 numbers, the nearest one and the
nearest to what that leaves, in one pass over the weight: 16 bits of each number, where TF32, JAX's default for float32
on these chips, has 11.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.qtensor import QTensor

_HALVES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
# Of those that `lax.dot_general` takes, in capitals, the precisions that are no better than TF32.
_FAST = {
    "NONE",
    "DEFAULT",
    "FASTEST",
    "BFLOAT16",
    "BF16_BF16_F32",
    "BF16_BF16_F32_X3",
    "TENSORFLOAT32",
    "TF32_TF32_F32",
}


def unsupported(
    x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, precision: Any, transpose: bool
) -> str | None:
    """Why no kernel computes this product, or None; x is anything with a shape and a dtype."""
    chain, floats = (w.dtype, *casts), (jnp.dtype(jnp.float32), *_HALVES)
    if w.spec.format.kind != "int" or w.spec.format.bits not in (4, 8):
        return "the kernels for GPUs read int4 and int8"
    if w.spec.double_quant:
        return "the kernels for GPUs do not read scales that are quantized themselves"
    if transpose:
        return "the kernels for GPUs contract K"
    if any(dtype not in floats for dtype in (x.dtype, out_dtype, *chain)):
        return "the kernels for GPUs multiply float32, bfloat16 and float16"
    if any(dtype in _HALVES and dtype != operand_dtype(x.dtype, chain) for dtype in chain):
        return "weights are rounded to another type than that of the product"
    if jnp.promote_types(x.dtype, chain[-1]) == jnp.float32 and not _fast(precision):
        return "the kernels for GPUs multiply float32 about as TF32 does, and a higher precision is asked for"
    if 0 in (*x.shape, *w.words.shape):
        return "empty"
    return None


def operand_dtype(x: Any, chain: tuple[Any, ...]) -> jnp.dtype:
    """The type of both operands of the dot, from that of x and those that a weight passes through."""
    return jnp.dtype(jnp.float16 if jnp.promote_types(x, chain[-1]) == jnp.float16 else jnp.bfloat16)


def split(x: Float[Array, "B M K"], dtype: jnp.dtype) -> Float[Array, "B _ K"]:
    """x in this type: `(B, M, K)`, or `(B, 2 * M, K)`, whose halves add up to x, where the type does not hold it."""
    if jnp.promote_types(x.dtype, dtype) == dtype:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    high = lax.reduce_precision(x, 8, 7)  # to a cast and back, XLA may do nothing
    return jnp.concatenate([high, x - high], axis=1).astype(dtype)


def join(out: Float[Array, "B _ N"], m: int) -> Float[Array, "B {m} N"]:
    """The product with x from the one with `split(x)`."""
    return out if out.shape[1] == m else out[:, :m] + out[:, m:]


def _fast(precision: Any) -> bool:
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    each = precision if isinstance(precision, tuple) else (precision,)
    return {str(getattr(p, "name", p)).upper() for p in each} <= _FAST
