"""What the kernels for NVIDIA GPUs have in common: which products they compute, and operands of 16 bits for them.

bfloat16 and float16 are multiplied as they are. float32 is multiplied as two bfloat16 numbers, the nearest one and the
nearest to what that leaves, in one pass over the weight: 16 bits of each number, where TF32, JAX's default for float32
on these chips, has 11.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jaxtyping import Array, Float, Int, Int32

from qjax.pallas_kernels.backends.epilogue import Epilogue
from qjax.pallas_kernels.backends.precision import precision_names
from qjax.pallas_kernels.packed.qtensor import QTensor

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


def unsupported(x: Any, w: QTensor, casts: tuple[Any, ...], out_dtype: Any, precision: Any) -> str | None:
    """Why no kernel computes this product, or None; x is anything with a shape and a dtype."""
    chain, floats = (w.dtype, *casts), (jnp.dtype(jnp.float32), *_HALVES)
    if w.spec.format.bits not in (4, 8):
        return f"the kernels for GPUs read codes of 4 and 8 bits: `qjax.arrange` widens {w.spec.format} to those"
    if w.spec.double_quant:
        return "the kernels for GPUs do not read scales that are quantized themselves: `qjax.arrange` decodes them"
    if any(dtype not in floats for dtype in (x.dtype, out_dtype, *chain)):
        return "the kernels for GPUs multiply float32, bfloat16 and float16"
    if any(dtype in _HALVES and dtype != operand_dtype(x.dtype, chain) for dtype in chain):
        return "weights are rounded to another type than that of the product"
    if jnp.promote_types(x.dtype, chain[-1]) == jnp.float32 and not like_tf32(precision):
        return "the kernels for GPUs multiply float32 about as TF32 does, and a higher precision is asked for"
    if 0 in (*x.shape, *w.words.shape):
        return "empty"
    return None


def unsupported_epilogue(epilogue: Epilogue, missing: Set[Primitive], compiler: str) -> str | None:
    """Why an epilogue cannot be in a kernel, or None.

    Args:
        epilogue: what is made of the products.
        missing: of its operations, those that the compiler of the kernel lacks.
        compiler: its name.
    """
    found = sorted({step.primitive.name for step in epilogue.steps if step.primitive in missing})
    if found:
        return f"{compiler} has no {', '.join(found)}"
    if any(name == "accuracy" and value is not None for step in epilogue.steps for name, value in step.params):
        return f"{compiler} does not choose the accuracy of a function"
    if any(name == "y" and value < -1 for step in epilogue.steps for name, value in step.params):
        return f"{compiler} has no negative powers but the reciprocal"
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


def layer_operand(layer: Int[Array, ""] | int | None) -> Int32[Array, " 1"]:
    """The index of a layer as kernels read it, who make it valid (`qtensor.layer_index`): XLA has nothing to launch."""
    return jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), 1)


def join(out: Float[Array, "B _ N"], m: int) -> Float[Array, "B {m} N"]:
    """The product with x from the one with `split(x)`."""
    return out if out.shape[1] == m else out[:, :m] + out[:, m:]


def finished(
    results: Sequence[Float[Array, "splits B _ _"]], m: int, epilogue: Epilogue | None, others: Sequence[Array]
) -> list[Float[Array, "B {m} _"]]:
    """What a kernel left to do: parts along K are added up, and those of x, and an epilogue that it did not apply.

    Args:
        results: of a kernel, for each weight or those of its epilogue.
        m: rows of x before `split`.
        epilogue: what is made of the products; None if there is none or the kernel applied it.
        others: what else it reads.
    """
    whole = [join(a[0] if a.shape[0] == 1 else a.sum(axis=0), m) for a in results]
    return [epilogue(whole, others)] if epilogue else whole


def like_tf32(precision: Any) -> bool:
    """Whether a precision, as `lax.dot_general` takes it, asks for no more than TF32."""
    return precision_names(precision) <= _FAST
