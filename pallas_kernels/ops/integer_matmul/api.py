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

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int, Int8

from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.ops.integer_matmul import cpu as integer_matmul_cpu
from qjax.pallas_kernels.ops.integer_matmul import gpu as integer_matmul_gpu
from qjax.pallas_kernels.ops.integer_matmul import reference
from qjax.pallas_kernels.ops.integer_matmul import sharded as integer_matmul_sharded
from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_matmul_tpu
from qjax.pallas_kernels.packed.qtensor import QTensor

integer_matmul_p = Primitive("integer_matmul")


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
    leaves, tree = jax.tree.flatten(w)
    operands = [x, scale, *([] if zero is None else [zero]), *leaves]
    if layer is not None:
        operands.append(jnp.asarray(layer, jnp.int32))
    return integer_matmul_p.bind(
        *operands, tree=tree, has_zero=zero is not None, indexed=layer is not None, out_dtype=jnp.dtype(out_dtype)
    )


def _tpu(x: Array, scale: Array, zero: Array | None, w: QTensor, **options: Any) -> Array:
    if integer_matmul_tpu.unsupported(x.shape, w) is not None:
        return reference.matmul(x, scale, zero, w, **options)
    return integer_matmul_tpu.matmul(x, scale, zero, w, **options)


def _cuda(x: Array, scale: Array, zero: Array | None, w: QTensor, *, out_dtype: Any, **options: Any) -> Array:
    kernel, _ = integer_matmul_gpu.kernel(x, w, out_dtype)
    matmul = reference.matmul if kernel is None else kernel.matmul
    return matmul(x, scale, zero, w, out_dtype=out_dtype, **options)


def _unflatten(operands: Any, params: dict[str, Any]) -> tuple[Any, Any, Any, QTensor, Any]:
    """x, scale, zero, weight and layer."""
    x, scale, *rest = operands
    zero = rest.pop(0) if params["has_zero"] else None
    layer = rest.pop() if params["indexed"] else None
    return x, scale, zero, jax.tree.unflatten(params["tree"], rest), layer


def _with(implementation: Callable[..., Array]) -> Callable[..., Array]:
    def lowered(*operands: Array, **params: Any) -> Array:
        x, scale, zero, w, layer = _unflatten(operands, params)
        return implementation(x, scale, zero, w, layer=layer, out_dtype=params["out_dtype"])

    return lowered


@functools.cache
def _jitted(**params: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(integer_matmul_p.bind, **params))


@integer_matmul_p.def_impl
def _impl(*operands: Array, **params: Any) -> Array:
    return _jitted(**params)(*operands)


@integer_matmul_p.def_abstract_eval
def _abstract_eval(*operands: Any, **params: Any) -> Any:
    x, _, _, w, _ = _unflatten(operands, params)
    return partition.result((*x.shape[:-1], w.layout.n), params["out_dtype"], x, w, indexed=params["indexed"])


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Any]:
    raise TypeError(
        "qjax: integer_matmul has no derivative of its own: codes are integers. Call it on stop_gradient values and "
        "add the straight-through derivative, as passes.rewrites.quantized_products does."
    )


def _batch(operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
    rows = 3 if params["has_zero"] else 2  # operands that have a row axis

    def lead(a: Any, dim: int | None) -> Array:
        return jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)

    moved = [lead(a, dim) for a, dim in zip(operands[:rows], dims[:rows], strict=True)]
    if all(dim is None for dim in dims[rows:]):  # one weight, more rows: (B, *stack, M, _) -> (*stack, B * M, _)
        folded = []
        for a in moved:
            a = jnp.moveaxis(a, 0, -3)
            folded.append(a.reshape(*a.shape[:-3], -1, a.shape[-1]))
        out = integer_matmul_p.bind(*folded, *operands[rows:], **params)
        *stack, _, n = out.shape
        return out.reshape(*stack, size, -1, n), len(stack)
    leaves = [lead(a, dim) for a, dim in zip(operands[rows:], dims[rows:], strict=True)]
    if params["indexed"]:  # each element has its own layer: pick it before the product
        index = leaves.pop()
        leaves = [jax.vmap(lambda a, i: lax.dynamic_index_in_dim(a, i, 0, False))(a, index) for a in leaves]
        params = {**params, "indexed": False}
    return integer_matmul_p.bind(*moved, *leaves, **params), 0


ad.primitive_jvps[integer_matmul_p] = _jvp

batching.primitive_batchers[integer_matmul_p] = _batch

# A kernel is a row: what one device runs on that platform.
_KERNELS = {None: reference.matmul, "cpu": integer_matmul_cpu.matmul, "cuda": _cuda, "tpu": _tpu}

for _platform, _kernel in _KERNELS.items():
    _rule = partition.lowering(
        _with(integer_matmul_sharded.integer_matmul(_kernel)), plain=_with(integer_matmul_sharded.plain_integer_matmul)
    )
    mlir.register_lowering(integer_matmul_p, _rule, platform=_platform)
