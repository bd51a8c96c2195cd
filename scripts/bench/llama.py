"""A decoder of the shape of Llama 3 in Flax Linen: scanned layers, grouped-query attention, a key-value cache.

`scripts/bench/export_llama.py` compiles it for TPU, `scripts/bench/bench_decode.py` runs it on a GPU.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a decoder; those of Llama 3 8B (arXiv 2407.21783, table 3) by default."""

    layers: int = 32
    dim: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256
    theta: float = 500_000.0
    cache: int = 2048  # tokens that a sequence has room for
    dtype: Any = jnp.bfloat16

    @property
    def head_dim(self) -> int:
        """Values in one head."""
        return self.dim // self.heads


def rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotary embedding (arXiv 2104.09864) of [batch, tokens, heads, dim], halves of the last axis paired.

    `sin` and `cos`, [tokens, 1, dim / 2], are those of the angles.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Layer(nn.Module):
    """One layer."""

    config: Config

    @nn.compact
    def __call__(
        self, x: jax.Array, position: jax.Array, angles: tuple[jax.Array, jax.Array], seen: jax.Array
    ) -> tuple[jax.Array, None]:
        """[batch, tokens, dim] to the same, and nothing for the scan to stack.

        `angles` are as for `rope`; `seen`, [tokens, cache], says which entries of the cache a token attends to.
        """
        c = self.config
        dense = partial(nn.DenseGeneral, use_bias=False, dtype=c.dtype, param_dtype=c.dtype)
        norm = partial(nn.RMSNorm, epsilon=1e-5, dtype=c.dtype, param_dtype=c.dtype)
        batch, tokens, _ = x.shape

        h = norm(name="attention_norm")(x)
        q = rope(dense((c.heads, c.head_dim), name="q")(h), *angles)
        k = rope(dense((c.kv_heads, c.head_dim), name="k")(h), *angles)
        v = dense((c.kv_heads, c.head_dim), name="v")(h)
        shape = (batch, c.cache, c.kv_heads, c.head_dim)
        keys = self.variable("cache", "keys", jnp.zeros, shape, c.dtype)
        values = self.variable("cache", "values", jnp.zeros, shape, c.dtype)
        k = keys.value = lax.dynamic_update_slice_in_dim(keys.value, k, position, axis=1)
        v = values.value = lax.dynamic_update_slice_in_dim(values.value, v, position, axis=1)
        grouped = q.reshape(batch, tokens, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k).astype(jnp.float32) / c.head_dim**0.5
        weights = nn.softmax(jnp.where(seen, scores, -jnp.inf)).astype(c.dtype)
        attended = jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(q.shape)
        x += dense(c.dim, axis=(-2, -1), name="out")(attended)

        h = norm(name="mlp_norm")(x)
        h = nn.silu(dense(c.hidden, name="gate")(h)) * dense(c.hidden, name="up")(h)
        return x + dense(c.dim, name="down")(h), None


class Decoder(nn.Module):
    """Tokens [batch, tokens], the first of them at a position, to the logits [batch, 1, vocab] of the next one."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, position: jax.Array) -> jax.Array:
        """Logits of the token after the last one."""
        c = self.config
        x = nn.Embed(c.vocab, c.dim, dtype=c.dtype, param_dtype=c.dtype, name="embed")(tokens)
        positions, half = position + jnp.arange(tokens.shape[1]), c.head_dim // 2
        angles = positions[:, None, None] * c.theta ** (-jnp.arange(half) / half)
        seen = jnp.arange(c.cache) <= positions[:, None]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.layers,
        )
        x, _ = layers(c, name="layers")(x, position, (jnp.sin(angles), jnp.cos(angles)), seen)
        x = nn.RMSNorm(epsilon=1e-5, dtype=c.dtype, param_dtype=c.dtype, name="norm")(x[:, -1:])
        return nn.Dense(c.vocab, use_bias=False, dtype=c.dtype, param_dtype=c.dtype, name="head")(x)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
