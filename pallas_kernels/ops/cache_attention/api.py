"""`cache_attention(q, keys, values, mask, spec)`: attention on packed key-value caches, as one JAX primitive.

What it means is `reference`: a `cache_dot_general` with the keys, elementwise operations, a softmax over positions, and
a `cache_dot_general` with the values. On TPU a kernel does that in one pass over both caches, so that scores and
probabilities never leave the chip, and on NVIDIA GPUs, in `target_chip`, another one does. A program that is mapped or
differentiated has `reference` in its place.

What that saves, in a step of 8 sequences at 8192 positions with 8 heads of 128, each for 4 queries, on v5e, as the TPU
compiler has it (jax 0.10.2, libtpu 0.0.42.1; `tests/compile/test_tpu_compile.py` compiles such a step):

    cache     attention by       bytes accessed  temporaries  estimated cycles
    bfloat16  XLA                282 MB          none         0.85 million
    int8      plain operations   1194 MB         135 MB       2.98 million
    int8      this kernel        139 MB          none         0.18 million bundles
    int4      plain operations   243 MB          none         0.42 million
    int4      this kernel        78 MB           none         0.16 million bundles

(Bundles are instructions; v5e reads 139 MB in 0.17 ms, at its nominal 819 GB/s.) Of an int8 cache plain operations
first write a bfloat16 one; an int4 cache they unpack while it is read.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from qjax.pallas_kernels.ops import primitive
from qjax.pallas_kernels.ops.cache_attention import reference
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec
from qjax.pallas_kernels.ops.primitive import Choice, Runs
from qjax.pallas_kernels.packed.qcache import QCache


def cache_attention(
    q: Float[Array, "*_"],
    keys: QCache,
    values: QCache,
    mask: Bool[Array, "*_"] | None,
    spec: AttentionSpec,
    layers: tuple[Any, Any] | None = None,
) -> Float[Array, "*_"]:
    """Attention; the softmax is over the last axis of the scores.

    Args:
        q: queries.
        keys, values: packed caches.
        mask: where a query sees a position; broadcasts with the scores in the order of the softmax, and has their rank.
            Given where the spec has a step for it.
        spec: the rest.
        layers: where keys and values are each one of a stack, which is given: their indices along its first axis. A
            kernel reads codes from the stack; no cache is taken out of it.

    Raises:
        ValueError: as `cache_dot_general`.
    """
    return _CACHE_ATTENTION(q, keys, values, mask, layers, spec=spec)


def runs_as(
    platform: str, q: Any, keys: QCache, values: QCache, mask: Any, spec: AttentionSpec, layers: Any = None
) -> Runs:
    """What `cache_attention` runs as on "cpu", "tpu" or "cuda", and why not as one kernel.

    Args:
        platform: where one device has the operands.
        q, keys, values, mask, layers: the operands or their types.
        spec: as for `cache_attention`.
    """
    return _CACHE_ATTENTION.runs_as(platform, q, keys, values, mask, layers, spec=spec)


def _meaning(q: Any, keys: QCache, values: QCache, mask: Any, layers: Any, *, spec: AttentionSpec) -> Array:
    return reference.attention(q, keys, values, mask, spec, layers)


def _cuda(q: Any, keys: QCache, values: QCache, mask: Any, layers: Any, *, spec: AttentionSpec) -> Choice | str:
    from qjax.pallas_kernels.ops.cache_attention import triton as cache_attention_triton

    reason = cache_attention_triton.unsupported(q, *_types(keys, values, layers), spec)
    return reason or Choice(Runs(primitive.TRITON_KERNEL), _in_one(cache_attention_triton))


def _tpu(q: Any, keys: QCache, values: QCache, mask: Any, layers: Any, *, spec: AttentionSpec) -> Choice | str:
    from qjax.pallas_kernels.ops.cache_attention import tpu as cache_attention_tpu

    reason = cache_attention_tpu.unsupported(q, *_types(keys, values, layers), spec)
    return reason or Choice(Runs(primitive.TPU_KERNEL), _in_one(cache_attention_tpu))


def _types(keys: QCache, values: QCache, layers: Any) -> tuple[QCache, QCache]:
    """Those of the two caches by themselves."""
    first = 0 if layers is None else 1
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[first:], a.dtype), (keys, values))


def _in_one(module: Any) -> Any:
    """The kernel of a module."""

    def attention(q: Any, keys: QCache, values: QCache, mask: Any, layers: Any, *, spec: AttentionSpec) -> Array:
        return module.attention(q, keys, values, mask, spec, layers)

    return attention


_CACHE_ATTENTION = primitive.define(
    "cache_attention",
    meaning=_meaning,
    platforms={"cuda": _cuda, "tpu": _tpu},
    otherwise=primitive.SEPARATE,
)

cache_attention_p = _CACHE_ATTENTION.primitive
