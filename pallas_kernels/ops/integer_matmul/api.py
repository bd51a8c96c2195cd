"""`integer_matmul(x, w)`: quantized activations times a packed integer weight, as one JAX primitive.

What it means, for each matrix of the stack, with groups g along K, codes c, zero points z (or 0) and scales s:

    out[m, n] = (sum over g of  acc[g, m, n] * s_w[g, n]) * s_x[m]
    acc[g, m, n] = sum over k in g of  (c_x[m, k] - z_x[m]) * (c_w[k, n] - z_w[g, n])      exact, in integers

`acc` is converted to float32 once; the groups are added in float32 in ascending order, each product rounded before it
is added; a sum of 0 is +0. So every lowering gives the same bits (`partition` says where several devices add groups in
another order), and what training simulates is what is served. It has no derivative of its own:
`passes.rewrites.quantized_products` gives it the straight-through one.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from qjax.pallas_kernels.ops import partition, primitive
from qjax.pallas_kernels.ops.integer_matmul import cpu as integer_matmul_cpu
from qjax.pallas_kernels.ops.integer_matmul import gpu as integer_matmul_gpu
from qjax.pallas_kernels.ops.integer_matmul import reference
from qjax.pallas_kernels.ops.integer_matmul import sharded as integer_matmul_sharded
from qjax.pallas_kernels.ops.primitive import Choice, Runs
from qjax.pallas_kernels.packed.qtensor import QTensor


def integer_matmul(
    x: Int8[Array, "*stack M K"],
    scale: Float[Array, "*stack M _"],
    zero: Float[Array, "*stack M _"] | None,
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None = None,
    out_dtype: Any = jnp.float32,
) -> Float[Array, "*stack M N"]:
    """The product of dequantized `x` and `w`, accumulated in integers.

    Args:
        x: codes of the activations, signed integers of at most 8 bits.
        scale: their scales, float32, `(*stack, M, 1)`.
        zero: their zero points, float32 integers shaped like `scale`, or None.
        w: packed weight of an integer format; its matrix is `(*stack, K, N)`, or `(L, *stack, K, N)` with `layer`.
        layer: picks one matrix of the leading axis of `w`.
        out_dtype: the float32 result is rounded to it.

    Raises:
        TypeError: the shapes do not fit, the weight's format has no integers, or the sum of a group may not fit into
            32 bits.
    """
    stack = w.words.shape[:-2][layer is not None :]
    if w.spec.format.kind != "int":
        raise TypeError(f"qjax: integer_matmul takes an integer weight, not {w.spec.format}.")
    if x.ndim < 2 or x.shape[:-2] != stack or x.shape[-1] != w.layout.k or scale.shape != (*x.shape[:-1], 1):
        raise TypeError(
            f"qjax: integer_matmul of x{list(x.shape)} with scales {list(scale.shape)} and a packed matrix of stack "
            f"{list(stack)}, K={w.layout.k}, N={w.layout.n}: x must be (*stack, rows, {w.layout.k}), one scale a row."
        )
    levels = -w.spec.format.qmin if w.scales.zero is None else 2 * -w.spec.format.qmin
    largest = w.group_size * (128 if zero is None else 255) * levels
    if largest >= 2**31:
        raise TypeError(
            f"qjax: integer_matmul sums {w.group_size} products of 8-bit activations and {w.spec} weights, up to "
            f"{largest}, which does not fit into 32 bits. Give the weight a scale for each group: PerGroup(128)."
        )
    return _INTEGER_MATMUL(x, scale, zero, w, layer=layer, out_dtype=jnp.dtype(out_dtype))


def runs_as(
    platform: str, x: Any, scale: Any, zero: Any, w: QTensor, *, layer: Any = None, out_dtype: Any = jnp.float32
) -> Runs:
    """What `integer_matmul` runs as on "cpu", "tpu" or "cuda", and why not on its best kernel.

    Args:
        platform: where one device has the operands.
        x, scale, zero, w, layer: the operands or their types.
        out_dtype: as for `integer_matmul`.
    """
    return _INTEGER_MATMUL.runs_as(platform, x, scale, zero, w, layer=layer, out_dtype=jnp.dtype(out_dtype))


def _type(x: Any, scale: Any, zero: Any, w: QTensor, *, layer: Any, out_dtype: Any) -> Any:
    return partition.result((*x.shape[:-1], w.layout.n), out_dtype, x, w, indexed=layer is not None)


def _cpu(x: Any, scale: Any, zero: Any, w: QTensor, *, layer: Any, **_: Any) -> Choice | str:
    name = integer_matmul_cpu.formulation(x, w, layer)[0]
    return Choice(Runs(name), integer_matmul_cpu.matmul)


def _cuda(x: Any, scale: Any, zero: Any, w: QTensor, *, out_dtype: Any, **_: Any) -> Choice | str:
    module, runs = integer_matmul_gpu.kernel(x, w, out_dtype)
    return Choice(runs, (module or reference).matmul)


def _tpu(x: Any, scale: Any, zero: Any, w: QTensor, **_: Any) -> Choice | str:
    from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_matmul_tpu

    reason = integer_matmul_tpu.unsupported(x.shape, w)
    return reason or Choice(Runs(primitive.TPU_KERNEL), integer_matmul_tpu.matmul)


_INTEGER_MATMUL = primitive.define(
    "integer_matmul",
    meaning=reference.matmul,
    platforms={"cpu": _cpu, "cuda": _cuda, "tpu": _tpu},
    otherwise=primitive.XLA_CODES,
    type_of_result=_type,
    derivative=primitive.no_derivative(
        "qjax: integer_matmul has no derivative of its own: codes are integers. Call it on stop_gradient values and "
        "add the straight-through derivative, as passes.rewrites.quantized_products does."
    ),
    batch=primitive.batched_product,
    plain={None: integer_matmul_sharded.plain_integer_matmul},
    on_mesh=integer_matmul_sharded.integer_matmul,
)

integer_matmul_p = _INTEGER_MATMUL.primitive
