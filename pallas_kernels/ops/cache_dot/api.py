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
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.ops.cache_dot import reference
from qjax.pallas_kernels.ops.cache_dot import tpu as cache_dot_tpu
from qjax.pallas_kernels.ops.cache_dot.axes import reading
from qjax.pallas_kernels.ops.primitive import differentiated, type_of_result
from qjax.pallas_kernels.packed.qcache import QCache

cache_dot_general_p = Primitive("cache_dot_general")


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
    return type_of_result(functools.partial(_with(reference.dot), **params), operands)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Array]:
    return differentiated(functools.partial(_with(reference.dot), **params), primals, tangents)


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
        return reference.dot(x, cache, **params)
    return cache_dot_tpu.dot_general(x, cache, **params)


ad.primitive_jvps[cache_dot_general_p] = _jvp

batching.primitive_batchers[cache_dot_general_p] = _batch

for _platform, _implementation in {None: reference.dot, "tpu": _on_tpu}.items():
    _rule = partition.lowering(_with(_implementation), plain=_with(reference.dot))
    mlir.register_lowering(cache_dot_general_p, _rule, platform=_platform)
