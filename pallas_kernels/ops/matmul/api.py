"""`quantized_matmul(x, w)`: a product with a packed weight, as one JAX primitive.

All platforms mean `reference.matmul`; a kernel is a faster way to say it. It is linear in x: JVP and transpose are
defined in x, and asking for a gradient in the packed weight is an error. `vmap` over x, the weight or both gives one
batched product.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.pallas_kernels.ops import partition, primitive
from qjax.pallas_kernels.ops.matmul import cpu as matmul_cpu
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.ops.matmul import reference
from qjax.pallas_kernels.ops.matmul import sharded as matmul_sharded
from qjax.pallas_kernels.ops.primitive import Choice, Runs
from qjax.pallas_kernels.packed.qtensor import QTensor


def quantized_matmul(
    x: Float[Array, "*stack M K"],
    w: QTensor,
    *,
    layer: Int[Array, ""] | int | None = None,
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
    transpose: bool = False,
) -> Float[Array, "*stack M N"]:
    """`x @ w` for a packed weight, one product per element of the stack.

    Args:
        x: activations, shape `(*stack, M, K)` (`(*stack, M, N)` with `transpose`).
        w: packed weight; its matrix is `(*stack, K, N)`, or `(L, *stack, K, N)` with `layer`.
        layer: picks one matrix of the leading axis of `w` without slicing the packed arrays first, so that a
            kernel can stream that layer from the whole stack.
        casts: dtypes that the dequantized weight passes through before the product, in order.
        precision: as for `lax.dot_general`.
        preferred_element_type: as for `lax.dot_general`.
        transpose: multiply by the transposed matrix: `(*stack, M, N) -> (*stack, M, K)`.

    Returns:
        The product, `(*stack, M, N)`, dtype as `lax.dot_general` would give.

    Raises:
        TypeError: the shapes do not fit.
    """
    stack = w.words.shape[:-2][layer is not None :]
    k, n = w.layout.k, w.layout.n
    inner = n if transpose else k
    if x.ndim < 2 or x.shape[:-2] != stack or x.shape[-1] != inner:
        raise TypeError(
            f"qjax: quantized_matmul of x{list(x.shape)} with a packed matrix of stack {list(stack)}, K={k}, "
            f"N={n}{', transposed' if transpose else ''}: x must be (*stack, rows, {inner})."
        )
    return _MATMUL(
        x,
        w,
        layer=layer,
        casts=tuple(jnp.dtype(c) for c in casts),
        precision=precision,
        preferred_element_type=preferred_element_type,
        transpose=transpose,
    )


def runs_as(
    platform: str,
    x: Any,
    w: QTensor,
    *,
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
    transpose: bool = False,
) -> Runs:
    """What `quantized_matmul` runs as on "cpu", "tpu" or "cuda", and why not on its best kernel.

    Args:
        platform: where one device has the operands.
        x, w: the operands or their types.
        casts, precision, preferred_element_type, transpose: as for `quantized_matmul`.
    """
    how: dict[str, Any] = {"casts": casts, "precision": precision, "preferred_element_type": preferred_element_type}
    return _MATMUL.runs_as(platform, x, w, layer=None, transpose=transpose, **how)


def _type(x: Any, w: QTensor, *, layer: Any, casts: Any, preferred_element_type: Any, transpose: bool, **_: Any) -> Any:
    shape = (*x.shape[:-1], w.layout.k if transpose else w.layout.n)
    dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    return partition.result(shape, dtype, x, w, indexed=layer is not None, transpose=transpose)


def _cpu(x: Any, w: QTensor, *, casts: Any, preferred_element_type: Any, transpose: bool, **_: Any) -> Choice | str:
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    formulation = matmul_cpu.formulation(x, w, casts, out_dtype, transpose)
    return Choice(Runs(formulation.name), matmul_cpu.matmul)


def _cuda(
    x: Any, w: QTensor, *, casts: Any, precision: Any, preferred_element_type: Any, transpose: bool, **_: Any
) -> Choice | str:
    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    module, runs = matmul_gpu.kernel(x, w, casts, out_dtype, precision=precision, transpose=transpose)
    return Choice(runs, (module or reference).matmul)


def _tpu(x: Any, w: QTensor, *, casts: Any, preferred_element_type: Any, **_: Any) -> Choice | str:
    from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu

    out_dtype = reference.result_dtype(x, w, casts, preferred_element_type)
    return matmul_tpu.unsupported(x, w, casts, out_dtype) or Choice(Runs(primitive.TPU_KERNEL), matmul_tpu.matmul)


_MATMUL = primitive.define(
    "quantized_matmul",
    meaning=reference.matmul,
    platforms={"cpu": _cpu, "cuda": _cuda, "tpu": _tpu},
    otherwise=primitive.XLA,
    type_of_result=_type,
    derivative=primitive.linear_in_x,
    batch=primitive.batched_product,
    on_mesh=matmul_sharded.matmul,
)

quantized_matmul_p = _MATMUL.primitive
