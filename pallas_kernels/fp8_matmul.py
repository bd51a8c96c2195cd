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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from pallas_kernels import matmul_cpu, matmul_gpu, numerics, partition
from pallas_kernels.formats import AbsMax, PerTensor, QuantSpec
from pallas_kernels.matmul import batched_matmul
from pallas_kernels.matmul_reference import pick_layer
from pallas_kernels.numerics import Scales
from pallas_kernels.qtensor import QTensor

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


def matmul_reference(
    x: Float[Array, "*stack M K"], w: QTensor, *, layer: Int[Array, ""] | int | None, precision: lax.Precision
) -> Float[Array, "*stack M N"]:
    """Sums times the scales of the weight, in float32: one dot of float8 numbers."""
    w = pick_layer(w, layer)
    codes = lax.bitcast_convert_type(w.words, jnp.dtype(w.spec.format.dtype))
    stack = tuple(range(x.ndim - 2))
    contract = x.ndim - 2 if w.order == "kn" else x.ndim - 1
    acc = lax.dot_general(
        x,
        codes,
        (((x.ndim - 1,), (contract,)), (stack, stack)),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return acc * numerics.resolve_scales(w.matrix_arrays()[1])


def _any_precision(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    # A higher precision has XLA multiply several parts of each operand; float8 numbers have one.
    return matmul_reference(x, w, layer=layer, precision=lax.Precision.DEFAULT)


# How kernels of weight-only products multiply codes.
_WEIGHT_ONLY: dict[str, Any] = {
    "casts": (),
    "precision": None,
    "preferred_element_type": jnp.float32,
    "transpose": False,
}


def _cpu(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    ones = Scales(jnp.ones((*w.words.shape[:-2], 1, 1), jnp.float32))
    spec = QuantSpec(w.spec.format, PerTensor(), scale_rule=AbsMax())
    codes = dataclasses.replace(w, scales=ones, spec=spec, dtype=jnp.dtype(jnp.float32))
    acc = matmul_cpu.matmul(x.astype(jnp.float32), codes, layer=layer, **_WEIGHT_ONLY)
    return acc * numerics.resolve_scales(pick_layer(w, layer).matrix_arrays()[1])


def _xla_cuda(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    m = x.shape[-2]
    # XLA makes a product of a vector of one row, and for that a copy of the weight in float32.
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]) if m == 1 else x
    return matmul_reference(rows, w, layer=layer, precision=precision)[..., :m, :]


# Up to so many rows of x an H100 takes longer to read a weight of a byte, at 3.3 TB/s, than to multiply it in bfloat16.
_FEW_ROWS = 128


def _cuda(x: Array, w: QTensor, *, layer: Any, precision: lax.Precision) -> Array:
    if layer is not None and x.shape[-2] <= _FEW_ROWS:  # XLA copies a layer out of its stack before it reads it
        rows, columns = x.astype(jnp.bfloat16), dataclasses.replace(w, dtype=jnp.dtype(jnp.float32))
        if matmul_gpu.unsupported(rows, columns, (), jnp.dtype(jnp.float32)) is None:
            return matmul_gpu.matmul(rows, columns, layer=layer, **_WEIGHT_ONLY)
    return _xla_cuda(x, w, layer=layer, precision=precision)


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
        "straight-through derivative, as passes.integer does."
    )


ad.primitive_jvps[fp8_matmul_p] = _jvp
batching.primitive_batchers[fp8_matmul_p] = functools.partial(batched_matmul, fp8_matmul_p)
# A kernel is a row: what one device runs on that platform, and what XLA can split over several.
_KERNELS = {None: (_any_precision, _any_precision), "cpu": (_cpu, _any_precision), "cuda": (_cuda, _xla_cuda)}
for _platform, (_kernel, _plain) in _KERNELS.items():
    _rule = partition.lowering(_with(partition.fp8_matmul(_kernel)), plain=_with(_plain))
    mlir.register_lowering(fp8_matmul_p, _rule, platform=_platform)
