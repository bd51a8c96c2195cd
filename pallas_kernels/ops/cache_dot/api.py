"""`cache_dot_general(x, cache, ...)`: a `lax.dot_general` with a packed key-value cache, as one JAX primitive.

A dot reads a cache in one of two ways: it contracts the vectors, or it makes them.

    scores[.., h, t] = (sum over d of q[.., h, d] codes[t, h, d]) scale[t, h]
    out[.., h, d]    = sum over t of (p[.., h, t] scale[t, h]) codes[t, h, d]

(`code - zero` for codes where there are zero points.) So codes are multiplied as they are, and scales go on what is
small. Sums are in float32. What that means is `reference`, in plain operations; on TPU a kernel reads the codes as
they are stored, and nothing of the cache's size is written.

The primitive is linear in x, and a program that is differentiated has `reference` in its place. `vmap` over x, the
cache or both gives one product. Where operands are on several devices XLA partitions `reference`; inside a `shard_map`
each device runs its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.pallas_kernels.ops import primitive
from qjax.pallas_kernels.ops.cache_dot import reference
from qjax.pallas_kernels.ops.cache_dot.axes import reading
from qjax.pallas_kernels.ops.primitive import Choice, Operation, Runs
from qjax.pallas_kernels.packed.qcache import QCache


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
    numbers = tuple(tuple(tuple(int(i) for i in axes) for axes in pair) for pair in dimension_numbers)
    params = {"numbers": numbers, "operand": operand, "precision": precision, "out_dtype": jnp.dtype(out_dtype)}
    return _CACHE_DOT_GENERAL(x, cache, **params)


def runs_as(
    platform: str,
    x: Any,
    cache: QCache,
    dimension_numbers: Any,
    *,
    operand: Literal[0, 1],
    precision: Any = None,
    out_dtype: Any,
) -> Runs:
    """What `cache_dot_general` runs as on "cpu", "tpu" or "cuda", and why not on its best kernel.

    Args:
        platform: where one device has the operands.
        x, cache: the operands or their types.
        dimension_numbers, operand, precision, out_dtype: as for `cache_dot_general`.
    """
    params = {"numbers": dimension_numbers, "operand": operand, "precision": precision, "out_dtype": out_dtype}
    return _CACHE_DOT_GENERAL.runs_as(platform, x, cache, **params)


def _batch(
    operation: Operation, leaves: Sequence[Any], dims: Sequence[Any], params: dict[str, Any]
) -> tuple[Array, int]:
    size = primitive.size_of_batch(leaves, dims)
    shared = any(d is not None for d in dims[1:])  # else one cache for all, and x has another free axis
    operand = params["operand"]
    contract, batch = params["numbers"]

    def later(axes: tuple[int, ...], which: int) -> tuple[int, ...]:
        return tuple(i + 1 for i in axes) if shared or which != operand else axes

    added = (0,) if shared else ()
    numbers = (
        tuple(later(axes, which) for which, axes in enumerate(contract)),
        tuple((*added, *later(axes, which)) for which, axes in enumerate(batch)),
    )
    count = len(leaves) if shared else 1
    moved = [primitive.lead(a, d, size) for a, d in zip(leaves[:count], dims[:count], strict=True)]
    out = operation.primitive.bind(*moved, *leaves[count:], **{**params, "numbers": numbers})
    if shared:
        return out, 0
    (_, cache), _ = primitive.unflatten(leaves, **params)
    free = cache.ndim - len(contract[operand]) - len(batch[operand]) if operand == 0 else 0
    return out, len(batch[0]) + free


def _tpu(x: Any, cache: QCache, **options: Any) -> Choice | str:
    from qjax.pallas_kernels.ops.cache_dot import tpu as cache_dot_tpu

    reason = cache_dot_tpu.unsupported(x, cache, **options)
    return reason or Choice(Runs(primitive.TPU_KERNEL), cache_dot_tpu.dot_general)


_CACHE_DOT_GENERAL = primitive.define(
    "cache_dot_general",
    meaning=reference.dot,
    platforms={"tpu": _tpu},
    otherwise=primitive.XLA_CODES,
    batch=_batch,
)

cache_dot_general_p = _CACHE_DOT_GENERAL.primitive
