"""`cache_attention(q, keys, values, mask, spec)`: attention on packed key-value caches, as one JAX primitive.

What it means is `reference`: a `cache_dot_general` with the keys, elementwise operations, a softmax over positions, and
a `cache_dot_general` with the values. On TPU `cache_attention_tpu` does that in one pass over both caches, so that
scores and probabilities never leave the chip, and on NVIDIA GPUs, in `target_chip`, `cache_attention_gpu` does. A
program that is mapped or differentiated has `reference` in its place.

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

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float

from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.ops.cache_attention import reference
from qjax.pallas_kernels.ops.cache_attention import tpu as cache_attention_tpu
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec, by_themselves
from qjax.pallas_kernels.ops.primitive import differentiated, type_of_result
from qjax.pallas_kernels.packed.qcache import QCache

cache_attention_p = Primitive("cache_attention")


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
    leaves, tree = jax.tree.flatten((keys, values, mask, layers))
    return cache_attention_p.bind(q, *leaves, tree=tree, spec=spec)


# --- The primitive ---------------------------------------------------------------------------------------------


def _with(implementation: Callable[..., Array]) -> Callable[..., Array]:
    def lowered(q: Array, *leaves: Array, tree: Any, spec: AttentionSpec) -> Array:
        keys, values, mask, layers = jax.tree.unflatten(tree, leaves)
        return implementation(q, keys, values, mask, spec, layers)

    return lowered


@functools.cache
def _jitted(**params: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(cache_attention_p.bind, **params))


@cache_attention_p.def_impl
def _impl(*operands: Array, **params: Any) -> Array:
    return _jitted(**params)(*operands)


@cache_attention_p.def_abstract_eval
def _abstract_eval(*operands: Any, **params: Any) -> Any:
    return type_of_result(functools.partial(_with(reference.attention), **params), operands)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Array]:
    return differentiated(functools.partial(_with(reference.attention), **params), primals, tangents)


def _batch(operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    return jax.vmap(functools.partial(_with(reference.attention), **params), in_axes=tuple(dims))(*operands), 0


def _on_tpu(q: Array, keys: QCache, values: QCache, mask: Any, spec: AttentionSpec, layers: Any) -> Array:
    explicit = any(partition.is_explicit(jax.typeof(a)) for a in jax.tree.leaves((q, keys, values)))
    if explicit or cache_attention_tpu.unsupported(q, *_types(keys, values, layers), spec) is not None:
        return reference.attention(q, keys, values, mask, spec, layers)
    return cache_attention_tpu.attention(q, keys, values, mask, spec, layers)


def _on_gpu(q: Array, keys: QCache, values: QCache, mask: Any, spec: AttentionSpec, layers: Any) -> Array:
    explicit = any(partition.is_explicit(jax.typeof(a)) for a in jax.tree.leaves((q, keys, values)))
    if explicit or gpu_chips.asked_for() is None:
        return reference.attention(q, keys, values, mask, spec, layers)
    from qjax.pallas_kernels.ops.cache_attention import (
        triton as cache_attention_triton,  # a backend that every other platform can do without
    )

    if cache_attention_triton.unsupported(q, *_types(keys, values, layers), spec) is not None:
        return reference.attention(q, keys, values, mask, spec, layers)
    return cache_attention_triton.attention(q, keys, values, mask, spec, layers)


def _types(keys: QCache, values: QCache, layers: Any) -> tuple[QCache, QCache]:
    """Those of the two caches by themselves."""
    return jax.eval_shape(by_themselves, keys, values, layers)


ad.primitive_jvps[cache_attention_p] = _jvp

batching.primitive_batchers[cache_attention_p] = _batch

for _platform, _implementation in {None: reference.attention, "cuda": _on_gpu, "tpu": _on_tpu}.items():
    _rule = partition.lowering(_with(_implementation), plain=_with(reference.attention))
    mlir.register_lowering(cache_attention_p, _rule, platform=_platform)
