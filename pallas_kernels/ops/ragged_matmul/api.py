"""`quantized_ragged_matmul(x, w, group_sizes)`: sorted rows times the packed matrix of their expert, as one primitive.

What `lax.ragged_dot` is to `lax.dot_general`, this is to `quantized_matmul`: rows of x are sorted by expert, the first
`group_sizes[0]` of them meet matrix 0 of the stack, the next `group_sizes[1]` matrix 1, and rows beyond the sum of the
sizes give 0. All platforms mean `matmul_reference`, which is `lax.ragged_dot` on the dequantized weight; on TPU, and on
NVIDIA GPUs in `target_chip`, a kernel reads the packed words of those experts that have rows. It is linear in x: JVP
and transpose are defined in x, and asking for a gradient in the packed weight is an error. `vmap` sorts the rows of all
elements by expert, so that one product serves them.

With Auto mesh axes the lowering is the reference, which XLA partitions. Operands on Explicit axes are an error:
`lax.ragged_dot` cannot infer where its result is either, and takes an `out_sharding`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, Integer

from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.ops.matmul.reference import result_dtype
from qjax.pallas_kernels.ops.ragged_matmul import reference
from qjax.pallas_kernels.ops.ragged_matmul import tpu as ragged_matmul_tpu
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor

quantized_ragged_matmul_p = Primitive("quantized_ragged_matmul")


def quantized_ragged_matmul(
    x: Float[Array, "M _"],
    w: QTensor,
    group_sizes: Integer[Array, " E"],
    *,
    layer: Int[Array, ""] | int | None = None,
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
    transpose: bool = False,
) -> Float[Array, "M _"]:
    """`x[m] @ w[e]` for each row m, where e is the expert whose group of rows m is in.

    Args:
        x: activations `(M, K)`, sorted by expert (`(M, N)` with `transpose`).
        w: packed weight; its matrices are `(E, K, N)`, or `(L, E, K, N)` with `layer`.
        group_sizes: rows of each expert, not negative; what exceeds M does not count.
        layer: picks the experts of one layer without slicing the packed arrays first.
        casts: dtypes that the dequantized weight passes through before the product, in order.
        precision: as for `lax.ragged_dot`.
        preferred_element_type: as for `lax.ragged_dot`.
        transpose: multiply by the transposed matrices: `(M, N) -> (M, K)`.

    Returns:
        The products, `(M, N)`, dtype as `lax.ragged_dot` would give; zeros in rows of no group.

    Raises:
        TypeError: the shapes do not fit.
        ValueError: an operand is on a mesh with Explicit axes.
    """
    leaves, tree = jax.tree.flatten(w)
    stack = w.words.shape[:-2][layer is not None :]
    k, n = w.layout.k, w.layout.n
    inner = n if transpose else k
    if x.ndim != 2 or x.shape[1] != inner or stack != group_sizes.shape or len(stack) != 1:
        raise TypeError(
            f"qjax: quantized_ragged_matmul of x{list(x.shape)} in groups{list(group_sizes.shape)} with a packed "
            f"matrix of stack {list(stack)}, K={k}, N={n}{', transposed' if transpose else ''}: x must be (rows, "
            f"{inner}), the stack one axis of experts, and group_sizes have a size for each."
        )
    if layer is not None:
        leaves = [*leaves, jnp.asarray(layer, jnp.int32)]
    return quantized_ragged_matmul_p.bind(
        x,
        group_sizes.astype(jnp.int32),
        *leaves,
        tree=tree,
        indexed=layer is not None,
        casts=tuple(jnp.dtype(c) for c in casts),
        precision=precision,
        preferred_element_type=preferred_element_type,
        transpose=transpose,
    )


def _tpu(x: Array, w: QTensor, group_sizes: Array, **options: Any) -> Array:
    if ragged_matmul_tpu.unsupported(x, w, options["casts"], options["preferred_element_type"]) is not None:
        return reference.matmul(x, w, group_sizes, **options)
    return ragged_matmul_tpu.matmul(x, w, group_sizes, **options)


def _gpu(x: Array, w: QTensor, group_sizes: Array, *, layer: Any, **options: Any) -> Array:
    if gpu_chips.asked_for() is None:
        return reference.matmul(x, w, group_sizes, layer=layer, **options)
    from qjax.pallas_kernels.ops.ragged_matmul import (
        triton as ragged_matmul_triton,  # a backend that every other platform can do without
    )

    if ragged_matmul_triton.unsupported(x, w, **options) is not None:
        return reference.matmul(x, w, group_sizes, layer=layer, **options)
    return ragged_matmul_triton.matmul(x, w, group_sizes, layer=layer, **options)


def _unflatten(leaves: Any, params: dict[str, Any]) -> tuple[QTensor, Any, dict[str, Any]]:
    """The packed weight, the layer and what remains of the parameters."""
    leaves, rest = list(leaves), dict(params)
    layer = leaves.pop() if rest.pop("indexed") else None
    return jax.tree.unflatten(rest.pop("tree"), leaves), layer, rest


def _with(implementation: Callable[..., Array]) -> Callable[..., Array]:
    def lowered(x: Array, group_sizes: Array, *leaves: Array, **params: Any) -> Array:
        w, layer, rest = _unflatten(leaves, params)
        return implementation(x, w, group_sizes, layer=layer, **rest)

    return lowered


@functools.cache
def _jitted(**params: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(quantized_ragged_matmul_p.bind, **params))


@quantized_ragged_matmul_p.def_impl
def _impl(*operands: Array, **params: Any) -> Array:
    return _jitted(**params)(*operands)


@quantized_ragged_matmul_p.def_abstract_eval
def _abstract_eval(x: Any, group_sizes: Any, *leaves: Any, **params: Any) -> Any:
    w, _, _ = _unflatten(leaves, params)
    if any(AxisType.Explicit in a.sharding.mesh.axis_types for a in (x, group_sizes, *leaves)):
        raise ValueError(
            f"qjax: quantized_ragged_matmul of x{list(x.shape)} with a packed {w.spec} matrix on a mesh with Explicit "
            "axes: sizes of groups do not say which device has which rows. Call it inside jax.shard_map, or give "
            "lax.ragged_dot w.dequantize() and an out_sharding."
        )
    dtype = result_dtype(x, w, params["casts"], params["preferred_element_type"])
    return ShapedArray((x.shape[0], w.layout.k if params["transpose"] else w.layout.n), dtype)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Any]:
    for primal, tangent in zip(primals[1:], tangents[1:], strict=True):
        if type(tangent) is not ad.Zero and jnp.issubdtype(primal.dtype, jnp.inexact):
            raise TypeError(
                "qjax: quantized_ragged_matmul has no gradient in its packed weight: the codes are integers. "
                "Differentiate with respect to other variables, or train the float variables (fake-quant) "
                "and convert afterwards."
            )
    out = quantized_ragged_matmul_p.bind(*primals, **params)
    if type(tangents[0]) is ad.Zero:
        return out, ad.Zero(tangents[0].aval.update(shape=out.shape, dtype=out.dtype))
    return out, quantized_ragged_matmul_p.bind(tangents[0], *primals[1:], **params)


def _transpose(cotangent: Any, x: Any, *others: Any, **params: Any) -> list[Any]:
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval)] + [None] * len(others)
    params = {**params, "transpose": not params["transpose"], "preferred_element_type": None}
    out = quantized_ragged_matmul_p.bind(cotangent, *others, **params)
    return [lax.convert_element_type(out, x.aval.dtype)] + [None] * len(others)


def _batch(operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    """One product of the rows of all elements, sorted by expert; an element with own weights has own experts."""
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)

    def lead(a: Any, dim: int | None) -> Array:
        return jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)

    x, group_sizes, *leaves = operands
    x, group_sizes = lead(x, dims[0]), lead(group_sizes, dims[1])  # (B, M, _), (B, E)
    m, experts = x.shape[1], group_sizes.shape[1]
    rows = jnp.broadcast_to(jnp.arange(m), (size, m))
    expert = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(jnp.cumsum(group_sizes, axis=1), rows)
    none = expert == experts
    if any(dim is not None for dim in dims[2:]):
        leaves = [lead(a, dim) for a, dim in zip(leaves, dims[2:], strict=True)]
        if params["indexed"]:  # each element has its own layer: pick it before the product
            index = leaves.pop()
            leaves = [jax.vmap(lambda a, i: lax.dynamic_index_in_dim(a, i, 0, False))(a, index) for a in leaves]
        w = jax.tree.unflatten(params["tree"], [a.reshape(-1, *a.shape[2:]) for a in leaves])
        # the layout no longer has to say where an axis of experts was in the parameter
        w = dataclasses.replace(w, layout=Layout((((w.layout.k, "k"),), ((w.layout.n, "n"),))))
        leaves, tree = jax.tree.flatten(w)
        params = {**params, "tree": tree, "indexed": False}
        expert += experts * jnp.arange(size)[:, None]
        experts *= size
    expert = jnp.where(none, experts, expert).reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=experts + 1)[:-1].astype(jnp.int32)
    out = quantized_ragged_matmul_p.bind(x.reshape(size * m, -1)[order], sizes, *leaves, **params)
    return out[jnp.argsort(order)].reshape(size, m, -1), 0


ad.primitive_jvps[quantized_ragged_matmul_p] = _jvp

ad.primitive_transposes[quantized_ragged_matmul_p] = _transpose

batching.primitive_batchers[quantized_ragged_matmul_p] = _batch

# A kernel is a row: what one device runs on that platform.
for _platform, _kernel in {None: reference.matmul, "cuda": _gpu, "tpu": _tpu}.items():
    _rule = partition.lowering(_with(_kernel), plain=_with(reference.matmul))
    mlir.register_lowering(quantized_ragged_matmul_p, _rule, platform=_platform)
