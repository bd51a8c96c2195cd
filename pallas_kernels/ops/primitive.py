"""What every packed primitive repeats: its results' type, flattening, batching and derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad
from jaxtyping import Array

from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.packed.qtensor import QTensor


def type_of_result(function: Callable[..., Array], operands: Sequence[Any]) -> ShapedArray:
    """The type of a function's result, from those of its operands."""
    placed = any(map(partition.is_explicit, operands))
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if placed else None) for a in operands]
    out = jax.eval_shape(function, *given)
    return ShapedArray(out.shape, out.dtype, sharding=out.sharding) if placed else ShapedArray(out.shape, out.dtype)


def differentiated(function: Callable[..., Array], primals: Any, tangents: Any) -> tuple[Array, Array]:
    """A JVP rule: that of the function which stands for the primitive."""
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of(*floats: Array) -> Array:
        operands = list(primals)
        for i, value in zip(moving, floats, strict=True):
            operands[i] = value
        return function(*operands)

    return jax.jvp(of, [primals[i] for i in moving], [tangents[i] for i in moving])


def unflatten(leaves: Any, params: dict[str, Any]) -> tuple[QTensor, Any, dict[str, Any]]:
    """The packed weight, the layer and what remains of the parameters."""
    leaves, rest = list(leaves), dict(params)
    layer = leaves.pop() if rest.pop("indexed") else None
    return jax.tree.unflatten(rest.pop("tree"), leaves), layer, rest


def with_options(implementation: Callable[..., Array]) -> Callable[..., Array]:
    """An implementation on a packed weight as a function of the operands and parameters of a primitive."""

    def lowered(x: Array, *leaves: Array, **params: Any) -> Array:
        w, layer, rest = unflatten(leaves, params)
        return implementation(x, w, layer=layer, **rest)

    return lowered


def batched_matmul(primitive: Primitive, operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    """`vmap` of a primitive that multiplies x, its first operand, by a packed weight."""
    size = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)
    x, *leaves = operands
    d, *leaf_dims = dims
    if all(dim is None for dim in leaf_dims):  # one weight, more rows: (B, *stack, M, K) -> (*stack, B*M, K)
        x = jnp.moveaxis(x, d, -3)  # (*stack, B, M, K)
        *stack, b, m, inner = x.shape
        out = primitive.bind(x.reshape(*stack, b * m, inner), *leaves, **params)
        return out.reshape(*stack, b, m, out.shape[-1]), len(stack)

    def lead(a: Any, dim: int | None) -> Array:
        return jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)

    x = lead(x, d)  # (B, *stack, M, K): the batch joins the stack
    leaves = [lead(a, dim) for a, dim in zip(leaves, leaf_dims, strict=True)]
    if params["indexed"]:  # each element has its own layer: pick it before the product
        index = leaves.pop()
        leaves = [jax.vmap(lambda a, i: lax.dynamic_index_in_dim(a, i, 0, False))(a, index) for a in leaves]
        params = {**params, "indexed": False}
    return primitive.bind(x, *leaves, **params), 0
