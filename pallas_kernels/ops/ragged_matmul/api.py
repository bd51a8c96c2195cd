"""`quantized_ragged_matmul(x, w, group_sizes)`: sorted rows times the packed matrix of their expert, as one primitive.

What `lax.ragged_dot` is to `lax.dot_general`, this is to `quantized_matmul`: rows of x are sorted by expert, the first
`group_sizes[0]` of them meet matrix 0 of the stack, the next `group_sizes[1]` matrix 1, and rows beyond the sum of the
sizes give 0. All platforms mean `reference.matmul`, which is `lax.ragged_dot` on the dequantized weight; on TPU, and on
NVIDIA GPUs in `target_chip`, a kernel reads the packed words of those experts that have rows. It is linear in x: JVP
and transpose are defined in x, and asking for a gradient in the packed weight is an error. `vmap` sorts the rows of all
elements by expert, so that one product serves them.

With Auto mesh axes the lowering is the reference, which XLA partitions. Operands on Explicit axes are an error:
`lax.ragged_dot` cannot infer where its result is either, and takes an `out_sharding`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, Integer

from qjax.pallas_kernels.ops import primitive
from qjax.pallas_kernels.ops.matmul.reference import result_dtype
from qjax.pallas_kernels.ops.primitive import Choice, Operation, Runs, lead, own_layers
from qjax.pallas_kernels.ops.ragged_matmul import reference
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor


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
    stack = w.words.shape[:-2][layer is not None :]
    k, n = w.layout.k, w.layout.n
    inner = n if transpose else k
    if x.ndim != 2 or x.shape[1] != inner or stack != group_sizes.shape or len(stack) != 1:
        raise TypeError(
            f"qjax: quantized_ragged_matmul of x{list(x.shape)} in groups{list(group_sizes.shape)} with a packed "
            f"matrix of stack {list(stack)}, K={k}, N={n}{', transposed' if transpose else ''}: x must be (rows, "
            f"{inner}), the stack one axis of experts, and group_sizes have a size for each."
        )
    return _RAGGED_MATMUL(
        x,
        w,
        group_sizes.astype(jnp.int32),
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
    group_sizes: Any,
    *,
    casts: tuple[Any, ...] = (),
    precision: Any = None,
    preferred_element_type: Any = None,
    transpose: bool = False,
) -> Runs:
    """What `quantized_ragged_matmul` runs as on "cpu", "tpu" or "cuda", and why not on its best kernel.

    Args:
        platform: where one device has the operands.
        x, w, group_sizes: the operands or their types.
        casts, precision, preferred_element_type, transpose: as for `quantized_ragged_matmul`.
    """
    how: dict[str, Any] = {"casts": casts, "precision": precision, "preferred_element_type": preferred_element_type}
    return _RAGGED_MATMUL.runs_as(platform, x, w, group_sizes, layer=None, transpose=transpose, **how)


def _type(
    x: Any,
    w: QTensor,
    group_sizes: Any,
    *,
    layer: Any,
    casts: Any,
    preferred_element_type: Any,
    transpose: bool,
    **_: Any,
) -> ShapedArray:
    if any(AxisType.Explicit in a.sharding.mesh.axis_types for a in jax.tree.leaves((x, w, group_sizes, layer))):
        raise ValueError(
            f"qjax: quantized_ragged_matmul of x{list(x.shape)} with a packed {w.spec} matrix on a mesh with Explicit "
            "axes: sizes of groups do not say which device has which rows. Call it inside jax.shard_map, or give "
            "lax.ragged_dot w.dequantize() and an out_sharding."
        )
    dtype = result_dtype(x, w, casts, preferred_element_type)
    return ShapedArray((x.shape[0], w.layout.k if transpose else w.layout.n), dtype)


def _batch(
    operation: Operation, leaves: Sequence[Any], dims: Sequence[Any], params: dict[str, Any]
) -> tuple[Array, int]:
    """One product of the rows of all elements, sorted by expert; an element with own weights has own experts."""
    size = primitive.size_of_batch(leaves, dims)
    (x, w, group_sizes), options = primitive.unflatten(leaves, **params)
    count = len(jax.tree.leaves(w))
    packed, packed_dims = leaves[1 : count + 1], dims[1 : count + 1]
    layer_dim = dims[-1] if options["layer"] is not None else None
    x, group_sizes = lead(x, dims[0], size), lead(group_sizes, dims[count + 1], size)  # (B, M, _), (B, E)
    m, experts = x.shape[1], group_sizes.shape[1]
    rows = jnp.broadcast_to(jnp.arange(m), (size, m))
    expert = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(jnp.cumsum(group_sizes, axis=1), rows)
    none = expert == experts
    if any(dim is not None for dim in (*packed_dims, layer_dim)):
        own = [lead(a, dim, size) for a, dim in zip(packed, packed_dims, strict=True)]
        if options["layer"] is not None:  # each element has its own layer: pick it before the product
            own = own_layers(own, lead(options["layer"], layer_dim, size))
            options["layer"] = None
        w = jax.tree.unflatten(jax.tree.structure(w), [a.reshape(-1, *a.shape[2:]) for a in own])
        # the layout no longer has to say where an axis of experts was in the parameter
        w = dataclasses.replace(w, layout=Layout((((w.layout.k, "k"),), ((w.layout.n, "n"),))))
        expert += experts * jnp.arange(size)[:, None]
        experts *= size
    expert = jnp.where(none, experts, expert).reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=experts + 1)[:-1].astype(jnp.int32)
    out = operation(x.reshape(size * m, -1)[order], w, sizes, **options)
    return out[jnp.argsort(order)].reshape(size, m, -1), 0


def _cuda(x: Any, w: QTensor, group_sizes: Any, *, layer: Any, **options: Any) -> Choice | str:
    from qjax.pallas_kernels.ops.ragged_matmul import triton as ragged_matmul_triton

    reason = ragged_matmul_triton.unsupported(x, w, **options)
    return reason or Choice(Runs(primitive.TRITON_KERNEL), ragged_matmul_triton.matmul)


def _tpu(x: Any, w: QTensor, group_sizes: Any, *, casts: Any, preferred_element_type: Any, **_: Any) -> Choice | str:
    from qjax.pallas_kernels.ops.ragged_matmul import tpu as ragged_matmul_tpu

    reason = ragged_matmul_tpu.unsupported(x, w, casts, preferred_element_type)
    return reason or Choice(Runs(primitive.TPU_KERNEL), ragged_matmul_tpu.matmul)


_RAGGED_MATMUL = primitive.define(
    "quantized_ragged_matmul",
    meaning=reference.matmul,
    platforms={"cuda": _cuda, "tpu": _tpu},
    otherwise=primitive.XLA,
    type_of_result=_type,
    derivative=primitive.linear_in_x,
    batch=_batch,
)

quantized_ragged_matmul_p = _RAGGED_MATMUL.primitive
