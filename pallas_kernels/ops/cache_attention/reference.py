"""What attention on packed caches means: the equations of the program, on the dequantized caches."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from qjax.pallas_kernels.ops.cache_dot.api import cache_dot_general
from qjax.pallas_kernels.packed.qcache import QCache, layer_of


@dataclasses.dataclass(frozen=True)
class CacheDot:
    """A product with a cache; attributes as the arguments of `cache_dot_general`."""

    numbers: Any
    operand: Literal[0, 1]
    precision: Any
    out_dtype: Any

    def __call__(self, x: Float[Array, "*_"], cache: QCache) -> Float[Array, "*_"]:
        """The product."""
        return cache_dot_general(
            x, cache, self.numbers, operand=self.operand, precision=self.precision, out_dtype=self.out_dtype
        )


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is computed between queries and result; hashable.

    Attributes:
        scores: the product of queries and keys.
        order: the axes of the scores in the order of the softmax: a permutation of those of the product.
        steps: from scores to what the softmax takes: ("multiply", by), ("divide", by), ("cast", dtype) and at most one
            ("mask", what stands where the mask is False), of Python numbers and dtypes.
        weights: dtype of the probabilities in the second product, which has them in the order of the softmax.
        result: the product of probabilities and values.
    """

    scores: CacheDot
    order: tuple[int, ...]
    steps: tuple[tuple[Literal["multiply", "divide", "cast", "mask"], Any], ...]
    weights: Any
    result: CacheDot


def attention(
    q: Float[Array, "*_"],
    keys: QCache,
    values: QCache,
    mask: Bool[Array, "*_"] | None,
    spec: AttentionSpec,
    layers: tuple[Any, Any] | None = None,
) -> Float[Array, "*_"]:
    """What `cache_attention` means; arguments as there."""
    keys, values = by_themselves(keys, values, layers)
    scores = spec.scores(q, keys).transpose(spec.order)
    for step, by in spec.steps:
        if step == "multiply":
            scores = scores * by
        elif step == "divide":
            scores = scores / by
        elif step == "cast":
            scores = scores.astype(by)
        else:
            assert mask is not None
            scores = jnp.where(mask, scores, jnp.asarray(by, scores.dtype))
    most = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - most)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return spec.result(weights.astype(spec.weights), values)


def by_themselves(keys: QCache, values: QCache, layers: tuple[Any, Any] | None) -> tuple[QCache, QCache]:
    """The two caches, taken out of their stacks where they are in some."""
    return (keys, values) if layers is None else (layer_of(keys, layers[0]), layer_of(values, layers[1]))
