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
  does with float ones. In `target_chip` the kernels of weight-only products (`matmul/gpu.py`) read it in place instead
  where x has few rows; they multiply the codes in bfloat16.

**Hopper adds fp8 products in fewer bits than float32 has**: about 14 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2,
which finds errors of up to 2 % in sums over K = 4096). At `lax.Precision.HIGHEST` XLA has cuBLASLt add partial sums to
float32 ones now and then (openxla/xla#6599); elsewhere the precision changes nothing.

The CPU multiplies in float32, block by block as `matmul_cpu` does.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.ops import partition, primitive
from qjax.pallas_kernels.ops.fp8_matmul import cpu as fp8_matmul_cpu
from qjax.pallas_kernels.ops.fp8_matmul import gpu as fp8_matmul_gpu
from qjax.pallas_kernels.ops.fp8_matmul import reference
from qjax.pallas_kernels.ops.fp8_matmul import sharded as fp8_matmul_sharded
from qjax.pallas_kernels.ops.primitive import Choice, Runs
from qjax.pallas_kernels.packed.qtensor import QTensor


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
    out = _FP8_MATMUL(x, w, layer=layer, precision=_precision(precision))
    return (out * scale).astype(out_dtype)


def runs_as(platform: str, x: Any, scale: Any, w: QTensor, *, layer: Any = None) -> Runs:
    """What `fp8_matmul` runs as on "cpu", "tpu" or "cuda", and why not on a kernel that would serve it better.

    Args:
        platform: where one device has the operands.
        x, scale, w, layer: the operands or their types.
    """
    return _FP8_MATMUL.runs_as(platform, x, w, layer=layer, precision=lax.Precision.DEFAULT)


def _precision(precision: Any) -> lax.Precision:
    """HIGHEST where a `Precision` above the default is asked for, for one operand or both."""
    each = precision if isinstance(precision, tuple) else (precision,)
    above = (lax.Precision.HIGH, lax.Precision.HIGHEST)
    return lax.Precision.HIGHEST if any(p in above for p in each) else lax.Precision.DEFAULT


def _type(x: Any, w: QTensor, *, layer: Any, precision: Any) -> Any:
    shape = (*x.shape[:-1], w.layout.n)
    return partition.result(shape, jnp.dtype(jnp.float32), x, w, indexed=layer is not None)


def _cpu(x: Any, w: QTensor, **_: Any) -> Choice | str:
    return Choice(Runs(fp8_matmul_cpu.formulation(x, w)), fp8_matmul_cpu.cpu_matmul)


_FP8_MATMUL = primitive.define(
    "fp8_matmul",
    meaning=reference.any_precision,
    platforms={"cpu": _cpu, "cuda": fp8_matmul_gpu.choose},
    otherwise=primitive.XLA_CODES,
    type_of_result=_type,
    derivative=primitive.no_derivative(
        "qjax: fp8_matmul has no derivative of its own: codes are rounded. Call it on stop_gradient values and add the "
        "straight-through derivative, as passes.rewrites.quantized_products does."
    ),
    batch=primitive.batched_product,
    plain={"cuda": fp8_matmul_gpu.xla_cuda_matmul},
    on_mesh=fp8_matmul_sharded.fp8_matmul,
)

fp8_matmul_p = _FP8_MATMUL.primitive
