"""`cache_dot_general(x, cache, ...)`: a `lax.dot_general` with a packed key-value cache, as one JAX primitive.

A dot reads a cache in one of two ways: it contracts the vectors, or it makes them.

    scores[.., h, t] = (sum over d of q[.., h, d] codes[t, h, d]) scale[t, h]
    out[.., h, d]    = sum over t of (p[.., h, t] scale[t, h]) codes[t, h, d]

(`code - zero` for codes where there are zero points.) So codes are multiplied as they are, and scales go on what is
small. Sums are in float32. What that means is `reference`, in plain operations; on TPU `cache_dot_tpu` reads the codes
as they are stored, and nothing of the cache's size is written.

The primitive is linear in x, and a program that is differentiated has `reference` in its place. `vmap` over x, the
cache or both gives one product. Where operands are on several devices XLA partitions `reference`; inside a `shard_map`
each device runs its kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from pallas_kernels import cache_axes, cache_dot_tpu, kv_cache, partition
from pallas_kernels.kv_cache import QCache

cache_dot_general_p = Primitive("cache_dot_general")


def reading(
    shape: Sequence[Any], axis: int, contract: Sequence[int], batch: Sequence[int]
) -> Literal["scores", "values"] | None:
    """Whether a dot contracts the vectors of a cache ("scores"), makes them ("values"), or does neither (None).

    Args:
        shape: of the float cache.
        axis: its vector axis, counted from the front.
        contract, batch: the axes of the cache that the dot contracts, and that are batch axes of both operands.
    """
    if axis in contract:
        return "scores" if all(i == axis or shape[i] == 1 for i in contract) else None
    others = [i for i in range(len(shape)) if i not in (*contract, *batch, axis) and shape[i] != 1]
    return None if axis in batch or others else "values"


def cache_dot_general(
    x: Float[Array, "*_"],
    cache: QCache,
    dimension_numbers: Any,
    *,
    operand: Literal[0, 1],
    precision: Any = None,
    out_dtype: Any,
) -> Float[Array, "*_"]:
    """`lax.dot_general` of x and the values of a packed cache, without making these.

    Args:
        x: the other operand.
        cache: packed cache; of integers or 8-bit floats.
        dimension_numbers: as for `lax.dot_general`, of its operands in their order.
        operand: which of them is the cache.
        precision: as for `lax.dot_general`.
        out_dtype: of the result; sums are in float32.

    Returns:
        The product, with its axes in the order of `lax.dot_general`.

    Raises:
        ValueError: the dot neither contracts whole vectors nor makes them, or the format is a codebook, whose values
            are exact in float32 only.
    """
    (contract, batch), axis = (dims[operand] for dims in dimension_numbers), cache.axis + cache.ndim
    if reading(cache.shape, axis, contract, batch) is None or cache.spec.format.kind == "codebook":
        raise ValueError(
            f"qjax: cache_dot_general contracts the vectors of {cache!r} (axis {axis}) alone, or makes them; "
            f"dimension_numbers={dimension_numbers} do neither, or the format is a codebook. Use "
            "lax.dot_general with kv_cache.dequantize(cache)."
        )
    leaves, tree = jax.tree.flatten(cache)
    numbers = tuple(tuple(tuple(int(i) for i in axes) for axes in pair) for pair in dimension_numbers)
    params = {"numbers": numbers, "operand": operand, "precision": precision, "out_dtype": jnp.dtype(out_dtype)}
    return cache_dot_general_p.bind(x, *leaves, tree=tree, **params)


def reference(
    x: Float[Array, "*_"], cache: QCache, *, numbers: Any, operand: Literal[0, 1], precision: Any, out_dtype: Any
) -> Float[Array, "*_"]:
    """What `cache_dot_general` means: a `lax.dot_general` of codes, and scales beside it; arguments as there.

    XLA on CPU converts the codes of the operand at hand to floats before it multiplies, as it copies a float operand
    to transpose it.
    """
    (own_contract, own_batch), (x_contract, x_batch) = cache_axes.sides(numbers, operand)
    x_free = [i for i in range(x.ndim) if i not in (*x_contract, *x_batch)]
    free = [i for i in range(cache.ndim) if i not in (*own_contract, *own_batch)]
    contracted = cache.axis + cache.ndim in own_contract
    scale = kv_cache.scales(cache)
    # bfloat16 holds codes less zero points exactly; float16 would lose small scaled probabilities
    dtype = x.dtype if x.dtype == jnp.bfloat16 else jnp.dtype("float32")
    if not contracted:
        of_x = scale.transpose(*own_batch, *own_contract, *free)
        of_x = of_x.reshape(*of_x.shape[: len(own_batch) + len(own_contract)], *(1,) * len(x_free))
        order = [*x_batch, *x_contract, *x_free]
        x = x.astype(jnp.float32) * of_x.transpose(sorted(range(len(order)), key=order.__getitem__))
    codes = kv_cache.unscaled(cache, dtype)
    lhs, rhs = (codes, x.astype(dtype)) if operand == 0 else (x.astype(dtype), codes)
    out = lax.dot_general(lhs, rhs, numbers, precision=precision, preferred_element_type=jnp.float32)
    if contracted:
        of_out = scale.transpose(*own_batch, *free, *own_contract)
        sizes = of_out.shape[: len(own_batch) + len(free)]
        ones = (1,) * len(x_free)
        split = len(own_batch)
        tail = (*sizes[split:], *ones) if operand == 0 else (*ones, *sizes[split:])
        out = out * of_out.reshape(*sizes[:split], *tail)
    return out.astype(out_dtype)


# --- The primitive ---------------------------------------------------------------------------------------------


def _with(implementation: Callable[..., Array]) -> Callable[..., Array]:
    def lowered(x: Array, *leaves: Array, tree: Any, **params: Any) -> Array:
        cache: QCache = jax.tree.unflatten(tree, leaves)
        return implementation(x, cache, **params)

    return lowered


@functools.cache
def _jitted(**params: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(cache_dot_general_p.bind, **params))


@cache_dot_general_p.def_impl
def _impl(*operands: Array, **params: Any) -> Array:
    return _jitted(**params)(*operands)


@cache_dot_general_p.def_abstract_eval
def _abstract_eval(*operands: Any, **params: Any) -> ShapedArray:
    return type_of_result(functools.partial(_with(reference), **params), operands)


def type_of_result(function: Callable[..., Array], operands: Sequence[Any]) -> ShapedArray:
    """The type of a function's result, from those of its operands."""
    placed = any(map(partition.is_explicit, operands))
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if placed else None) for a in operands]
    out = jax.eval_shape(function, *given)
    return ShapedArray(out.shape, out.dtype, sharding=out.sharding) if placed else ShapedArray(out.shape, out.dtype)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Array]:
    return differentiated(functools.partial(_with(reference), **params), primals, tangents)


def differentiated(function: Callable[..., Array], primals: Any, tangents: Any) -> tuple[Array, Array]:
    """A JVP rule: that of the function which stands for the primitive."""
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of(*floats: Array) -> Array:
        operands = list(primals)
        for i, value in zip(moving, floats, strict=True):
            operands[i] = value
        return function(*operands)

    return jax.jvp(of, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    shared = any(d is not None for d in dims[1:])  # else one cache for all, and x has another free axis
    operand = params["operand"]
    contract, batch = params["numbers"]

    def later(axes: tuple[int, ...], which: int) -> tuple[int, ...]:
        return tuple(i + 1 for i in axes) if shared or which != operand else axes

    def lead(a: Any, d: int | None) -> Array:
        return jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)

    added = (0,) if shared else ()
    numbers = (
        tuple(later(axes, which) for which, axes in enumerate(contract)),
        tuple((*added, *later(axes, which)) for which, axes in enumerate(batch)),
    )
    count = len(operands) if shared else 1
    operands = [*map(lead, operands[:count], dims[:count]), *operands[count:]]
    out = cache_dot_general_p.bind(*operands, **{**params, "numbers": numbers})
    if shared:
        return out, 0
    axes_of_cache = jax.tree.unflatten(params["tree"], operands[1:]).ndim
    free = axes_of_cache - len(contract[operand]) - len(batch[operand]) if operand == 0 else 0
    return out, len(batch[0]) + free


def _on_tpu(x: Array, cache: QCache, **params: Any) -> Array:
    explicit = any(partition.is_explicit(jax.typeof(a)) for a in jax.tree.leaves((x, cache)))
    if explicit or cache_dot_tpu.unsupported(x, cache, **params) is not None:
        return reference(x, cache, **params)
    return cache_dot_tpu.dot_general(x, cache, **params)


ad.primitive_jvps[cache_dot_general_p] = _jvp
batching.primitive_batchers[cache_dot_general_p] = _batch
for _platform, _implementation in {None: reference, "tpu": _on_tpu}.items():
    _rule = partition.lowering(_with(_implementation), plain=_with(reference))
    mlir.register_lowering(cache_dot_general_p, _rule, platform=_platform)
