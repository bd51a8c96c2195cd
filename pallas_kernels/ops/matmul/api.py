"""`quantized_matmul(x, w)`: a product with a packed weight, as one JAX primitive.

A primitive, so that each platform has a lowering of its own and one exported program can carry several
(`lax.platform_dependent` cannot be exported for more than one platform). All platforms mean
`matmul_reference.matmul`; a kernel is a faster way to say it. It is linear in x: JVP and transpose are defined in
x, and asking for a gradient in the packed weight is an error. `vmap` over x, the weight or both gives one batched
product.
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
from qjax.pallas_kernels.ops.matmul import cpu as matmul_cpu
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.ops.matmul import reference
from qjax.pallas_kernels.ops.matmul import sharded as matmul_sharded
from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu
from qjax.pallas_kernels.ops.primitive import batched_matmul, unflatten, with_options
from qjax.pallas_kernels.packed.qtensor import QTensor

quantized_matmul_p = Primitive("quantized_matmul")


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
    leaves, tree = jax.tree.flatten(w)
    stack = w.words.shape[:-2][layer is not None :]
    k, n = w.layout.k, w.layout.n
    inner = n if transpose else k
    if x.ndim < 2 or x.shape[:-2] != stack or x.shape[-1] != inner:
        raise TypeError(
            f"qjax: quantized_matmul of x{list(x.shape)} with a packed matrix of stack {list(stack)}, K={k}, "
            f"N={n}{', transposed' if transpose else ''}: x must be (*stack, rows, {inner})."
        )
    if layer is not None:
        leaves = [*leaves, jnp.asarray(layer, jnp.int32)]
    return quantized_matmul_p.bind(
        x,
        *leaves,
        tree=tree,
        indexed=layer is not None,
        casts=tuple(jnp.dtype(c) for c in casts),
        precision=precision,
        preferred_element_type=preferred_element_type,
        transpose=transpose,
    )


@functools.cache
def _jitted(**params: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(quantized_matmul_p.bind, **params))


@quantized_matmul_p.def_impl
def _impl(*operands: Array, **params: Any) -> Array:
    return _jitted(**params)(*operands)


@quantized_matmul_p.def_abstract_eval
def _abstract_eval(x: Any, *leaves: Any, **params: Any) -> Any:
    w, _, _ = unflatten(leaves, params)
    transpose, indexed = params["transpose"], params["indexed"]
    shape = (*x.shape[:-1], w.layout.k if transpose else w.layout.n)
    dtype = reference.result_dtype(x, w, params["casts"], params["preferred_element_type"])
    return partition.result(shape, dtype, x, w, indexed=indexed, transpose=transpose)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Any]:
    for primal, tangent in zip(primals[1:], tangents[1:], strict=True):
        if type(tangent) is not ad.Zero and jnp.issubdtype(primal.dtype, jnp.inexact):
            raise TypeError(
                "qjax: quantized_matmul has no gradient in its packed weight: the codes are integers. "
                "Differentiate with respect to other variables, or train the float variables (fake-quant) "
                "and convert afterwards."
            )
    out = quantized_matmul_p.bind(*primals, **params)
    if type(tangents[0]) is ad.Zero:
        return out, ad.Zero(tangents[0].aval.update(shape=out.shape, dtype=out.dtype))
    return out, quantized_matmul_p.bind(tangents[0], *primals[1:], **params)


def _transpose(cotangent: Any, x: Any, *leaves: Any, **params: Any) -> list[Any]:
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval)] + [None] * len(leaves)
    params = {**params, "transpose": not params["transpose"], "preferred_element_type": None}
    out = quantized_matmul_p.bind(cotangent, *leaves, **params)
    return [partition.like(lax.convert_element_type(out, x.aval.dtype), x.aval)] + [None] * len(leaves)


ad.primitive_jvps[quantized_matmul_p] = _jvp

ad.primitive_transposes[quantized_matmul_p] = _transpose

batching.primitive_batchers[quantized_matmul_p] = functools.partial(batched_matmul, quantized_matmul_p)

# A kernel is a row: what one device runs on that platform.
_KERNELS = {
    None: reference.matmul,
    "cpu": matmul_cpu.matmul,
    "cuda": matmul_gpu.matmul,
    "tpu": matmul_tpu.matmul,
}

for _platform, _kernel in _KERNELS.items():
    _rule = partition.lowering(with_options(matmul_sharded.matmul(_kernel)), plain=with_options(reference.matmul))
    mlir.register_lowering(quantized_matmul_p, _rule, platform=_platform)
