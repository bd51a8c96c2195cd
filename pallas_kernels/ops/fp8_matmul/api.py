"""`fp8_matmul(x, w)`: activations in 8-bit floats times a packed weight in 8-bit floats, as one JAX primitive.

What it means, for each matrix of the stack, with codes c, which are float8 numbers, and scales s:

    out[m, n] = (sum over k of  c_x[m, k] * c_w[k, n]) * s_w[n] * s_x[m]

A product of two codes has at most 8 significant bits and is exact; the sum and what follows are float32, rounded once
to the dtype of the result. One scale serves all of K, so that no value is dequantized before the product.

**Equal results.** Training and serving run this primitive, on codes that are equal to the last bit. Their results, and
those of several platforms, are equal up to the order of a float32 sum, which the compiler chooses for each product:
unlike sums of integers, they need not have the same bits.

**Where XLA has a matrix unit for 8-bit floats, the product is one `lax.dot_general` of them**, and the packed words are
read as they lie, a bitcast:

* NVIDIA GPUs of compute capability 8.9 and later: XLA chooses between cuBLASLt and a kernel of its own that scales the
  sums too. Both want the codes of a column in a row (order "nk"); from order "kn", XLA transposes the weight in each
  call. cuBLASLt has no e5m2 times e5m2, which is converted to float16, and takes sizes that are multiples of 16: XLA
  pads others, the weight in each call.
* TPU 7x multiplies every combination. For earlier TPUs XLA makes the conversion a part of the same operation: the
  weight is read once, a byte for each value. For earlier GPUs it first writes a copy of the weight in float16.
* Layers of a stack: on TPU they are read in place. For NVIDIA GPUs XLA copies a layer out before it multiplies, as it
  does with float ones. In `target_chip` the kernels of weight-only products (`matmul_gpu`) read it in place instead
  where x has few rows; they multiply the codes in bfloat16.

**Hopper adds fp8 products in fewer bits than float32 has**: about 14 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2,
which finds errors of up to 2 % in sums over K = 4096). At `lax.Precision.HIGHEST` XLA has cuBLASLt add partial sums to
float32 ones now and then (openxla/xla#6599); elsewhere the precision changes nothing.

The CPU multiplies in float32, block by block as `matmul_cpu` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.ops.fp8_matmul import sharded as fp8_matmul_sharded
from qjax.pallas_kernels.ops.fp8_matmul.cpu import cpu_matmul
from qjax.pallas_kernels.ops.fp8_matmul.gpu import cuda_matmul, xla_cuda_matmul
from qjax.pallas_kernels.ops.fp8_matmul.reference import _any_precision
from qjax.pallas_kernels.ops.primitive import batched_matmul
from qjax.pallas_kernels.packed.qtensor import QTensor

fp8_matmul_p = Primitive("fp8_matmul")


def fp8_matmul(
    x: Float[Array, "*stack M K"],
    scale: Float[Array, "*stack M _"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None = None,
    precision: Any = None,
    out_dtype: Any = jnp.float32,
) -> Float[Array, "*stack M N"]:
    """The product of dequantized `x` and `w`, multiplied as 8-bit floats.

    Args:
        x: codes of the activations, float8_e4m3fn or float8_e5m2.
        scale: their scales, float32, `(*stack, M, 1)`.
        w: packed weight in fp8_e4m3 or fp8_e5m2, with one scale for all of K in each column, or one in all; its matrix
            is `(*stack, K, N)`, or `(L, *stack, K, N)` with `layer`.
        layer: picks one matrix of the leading axis of `w`.
        precision: as the program gave `lax.dot_general`: a `lax.Precision` above the default, of one operand or in a
            tuple, has Hopper add up in more bits; anything else changes nothing.
        out_dtype: the float32 result is rounded to it.

    Raises:
        TypeError: the shapes do not fit, x or the weight has no float8 codes, or scales change along K.
    """
    stack = w.words.shape[:-2][layer is not None :]
    if w.spec.format.kind != "float" or w.group_size != w.layout.k:
        raise TypeError(
            f"qjax: fp8_matmul takes a weight in fp8_e4m3 or fp8_e5m2 with scales per channel or per tensor, not "
            f"{w.spec} with K={w.layout.k}. Multiply {w.spec} by quantized_matmul."
        )
    if jnp.finfo(x.dtype).bits != 8:
        raise TypeError(f"qjax: fp8_matmul takes codes of x in float8_e4m3fn or float8_e5m2, not {x.dtype}.")
    if x.ndim < 2 or x.shape[:-2] != stack or x.shape[-1] != w.layout.k or scale.shape != (*x.shape[:-1], 1):
        raise TypeError(
            f"qjax: fp8_matmul of x{list(x.shape)} with scales {list(scale.shape)} and a packed matrix of stack "
            f"{list(stack)}, K={w.layout.k}, N={w.layout.n}: x must be (*stack, rows, {w.layout.k}), one scale a row."
        )
    leaves, tree = jax.tree.flatten(w)
    if layer is not None:
        leaves = [*leaves, jnp.asarray(layer, jnp.int32)]
    out = fp8_matmul_p.bind(x, *leaves, tree=tree, indexed=layer is not None, precision=_precision(precision))
    return (out * scale).astype(out_dtype)


def _precision(precision: Any) -> lax.Precision:
    """HIGHEST where a `Precision` above the default is asked for, for one operand or both."""
    each = precision if isinstance(precision, tuple) else (precision,)
    above = (lax.Precision.HIGH, lax.Precision.HIGHEST)
    return lax.Precision.HIGHEST if any(p in above for p in each) else lax.Precision.DEFAULT


def _unflatten(leaves: Any, params: dict[str, Any]) -> tuple[QTensor, Any]:
    """The packed weight and the layer."""
    leaves = list(leaves)
    layer = leaves.pop() if params["indexed"] else None
    return jax.tree.unflatten(params["tree"], leaves), layer


def _with(implementation: Callable[..., Array]) -> Callable[..., Array]:
    def lowered(x: Array, *leaves: Array, **params: Any) -> Array:
        w, layer = _unflatten(leaves, params)
        return implementation(x, w, layer=layer, precision=params["precision"])

    return lowered


@functools.cache
def _jitted(**params: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(fp8_matmul_p.bind, **params))


@fp8_matmul_p.def_impl
def _impl(*operands: Array, **params: Any) -> Array:
    return _jitted(**params)(*operands)


@fp8_matmul_p.def_abstract_eval
def _abstract_eval(x: Any, *leaves: Any, **params: Any) -> Any:
    w, _ = _unflatten(leaves, params)
    return partition.result((*x.shape[:-1], w.layout.n), jnp.dtype(jnp.float32), x, w, indexed=params["indexed"])


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Any]:
    raise TypeError(
        "qjax: fp8_matmul has no derivative of its own: codes are rounded. Call it on stop_gradient values and add the "
        "straight-through derivative, as passes.rewrites.quantized_products does."
    )


ad.primitive_jvps[fp8_matmul_p] = _jvp

batching.primitive_batchers[fp8_matmul_p] = functools.partial(batched_matmul, fp8_matmul_p)

# A kernel is a row: what one device runs on that platform, and what XLA can split over several.
_KERNELS = {
    None: (_any_precision, _any_precision),
    "cpu": (cpu_matmul, _any_precision),
    "cuda": (cuda_matmul, xla_cuda_matmul),
}

for _platform, (_kernel, _plain) in _KERNELS.items():
    _rule = partition.lowering(_with(fp8_matmul_sharded.fp8_matmul(_kernel)), plain=_with(_plain))
    mlir.register_lowering(fp8_matmul_p, _rule, platform=_platform)
