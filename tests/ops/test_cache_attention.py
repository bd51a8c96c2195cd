"""Attention on packed caches as one operation: what is taken for it, and the TPU kernel against float64 NumPy.

The kernel is interpreted on CPU (`test_tpu_compile` compiles it). There, what lies beyond the edge of an array is NaN,
or the lowest integer: what leaks into a result shows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from test_cache_dot import _QUICK, array, value

import qjax
from qjax.pallas_kernels.numbers.formats import FORMATS
from qjax.pallas_kernels.ops.cache_attention import tpu as cache_attention_tpu
from qjax.pallas_kernels.ops.cache_attention.api import cache_attention
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec, CacheDot
from qjax.pallas_kernels.ops.cache_dot import tpu as cache_dot_tpu
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.qcache import CacheSpec, QCache
from qjax.passes.jaxpr.replay import replay
from qjax.passes.jaxpr.trace import Program, trace
from qjax.passes.plan.attention import plan_attention
from qjax.passes.plan.caches import plan_given
from qjax.passes.plan.decisions import CachePlan
from qjax.passes.rewrites import attention as rewrites_attention
from qjax.passes.rewrites import lower
from qjax.passes.rewrites.attention import fused_attention
from qjax.passes.rewrites.caches import PackedCaches

pytestmark = pytest.mark.usefixtures("compile_quickly")

BF16, F32 = jnp.bfloat16, jnp.float32


# --- Ways to write attention: q (B, Q, H, D), keys and values (B, T, K, D), mask (B, Q, T) ------------------------


def linen(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    return nn.dot_product_attention(q, keys, values, mask=mask[:, None])


def nnx_grouped(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    return nnx.dot_product_attention(q, keys, values, mask=mask[:, None])


def of_jax(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    return jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None])


def grouped(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """By hand: scores divided, softmax in float32."""
    b, n, h, d = q.shape
    groups = q.reshape(b, n, keys.shape[2], -1, d)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", groups, keys) / d**0.5
    p = jax.nn.softmax(jnp.where(mask[:, None, None], scores.astype(F32), -1e9)).astype(q.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", p, values).reshape(b, n, h, -1)


def keys_transposed(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """Keys as [B, K, D, T], and no mask."""
    scores = jnp.einsum("bqhd,bhds->bhqs", q, keys.transpose(0, 2, 3, 1)) * 0.125
    return jnp.einsum("bhqs,bshd->bqhd", jax.nn.softmax(scores), values)


def attended(q: Any, keys: Any, values: Any, mask: Any, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64, and the same of the magnitudes of the values."""
    q, keys, values = (np.asarray(a, np.float64) for a in (q, keys, values))
    keys, values = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (keys, values))
    scores = np.where(np.asarray(mask)[:, None], np.einsum("bqhd,bshd->bhqs", q, keys) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return tuple(np.einsum("bhqs,bshd->bqhd", p, v) for v in (values, np.abs(values)))  # type: ignore[return-value]


def replayed(program: Program, values: Sequence[Any], plan: CachePlan) -> jax.Array:
    """The first result of a program on packed caches, as qjax runs it."""
    attentions = [fused_attention(found) for found in plan_attention(program, plan)]
    return replay(program, values, rules=lower.RULES, fused=attentions, state=PackedCaches(plan))[0][0]


def traced(fn: Callable[..., Any], q: Any, keys: QCache, values: QCache, mask: Any) -> Callable[..., jax.Array]:
    """`fn` with the caches packed, as qjax replays it."""
    floats = [jnp.zeros(cache.shape, cache.dtype) for cache in (keys, values)]
    program = trace(fn, [q, *floats, mask], [None] * 4, [None, "keys", "values", None])

    def run(q: Any, keys: QCache, values: QCache, mask: Any) -> jax.Array:
        plan = plan_given(program, None, {"keys": keys, "values": values})
        return replayed(program, [q, keys, values, mask], plan)

    return run


def packed(seed: int, format: str, zero_point: bool, *shape: int, dtype: Any = F32) -> QCache:
    spec = CacheSpec(FORMATS[format], zero_point, "bfloat16" if zero_point else "float32")
    return jax.jit(qcache.quantize, static_argnums=(1, 2))(array(seed, *shape, dtype=dtype), spec, -1)


def check_a_program(
    fn: Any,
    of_keys: str,
    of_values: str,
    zero_point: bool,
    queries: int,
    t: int,
    heads: int,
    kv_heads: int,
    d: int,
) -> None:
    """What the replay of a program in bfloat16 attends to, against float64.

    Args:
        fn: how attention is written.
        of_keys, of_values, zero_point: formats of the caches, and whether they have zero points.
        queries: of each of two sequences; each sees a position more than the one before.
        t: positions; the second sequence sees half of them.
        heads, kv_heads: of q and of the caches.
        d: values of a vector.
    """
    keys = packed(1, of_keys, zero_point, 2, t, kv_heads, d, dtype=BF16)
    values = packed(2, of_values, zero_point, 2, t, kv_heads, d, dtype=BF16)
    q = array(3, 2, queries, heads, d, dtype=BF16)
    last = np.asarray([[t - 1], [t // 2]]) - np.arange(queries)[::-1]
    mask = np.arange(t) <= last[..., None]
    if fn is keys_transposed:
        mask[:] = True
    run = traced(fn, q, keys, values, mask)
    assert "cache_attention" in str(jax.make_jaxpr(run)(q, keys, values, mask))
    out = jax.jit(run, compiler_options=_QUICK)(q, keys, values, mask)
    scale = 0.125 if fn is keys_transposed else d**-0.5
    rounded = (q / jnp.sqrt(d).astype(BF16)).astype(F32) * d**0.5 if fn is linen else q.astype(F32)
    want, size = attended(rounded, value(keys), value(values), mask, scale)
    # probabilities and the result are rounded to bfloat16; float32 sums do the rest
    bound = float(jnp.finfo(BF16).eps) * (size + np.abs(want)) + 1e-4 * size
    assert out.dtype == BF16
    np.testing.assert_array_less(np.abs(np.asarray(out, np.float64) - want), bound)


# Arguments of `check_a_program`.
CASES: list[tuple[Any, str, str, bool, int, int, int, int, int]] = [
    (linen, "int8", "int8", False, 1, 300, 4, 4, 128),
    (nnx_grouped, "int4", "int4", True, 3, 200, 2, 2, 64),
    (of_jax, "int8", "int4", False, 2, 140, 6, 2, 128),
    (grouped, "int8", "int8", True, 2, 300, 16, 8, 128),
    (grouped, "int4", "int8", True, 3, 256, 4, 2, 64),
    (keys_transposed, "int4", "int2", False, 1, 130, 2, 2, 128),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (case[0].__name__, *case[1:]))))
def test_the_kernel_attends_as_float64_does(case: Any, monkeypatch: pytest.MonkeyPatch):
    """In tiles of 128 positions and of 2 rows of queries."""
    monkeypatch.setattr(cache_dot_tpu, "_TILE", 1)
    monkeypatch.setattr(cache_dot_tpu, "_MOST_ROWS", 2)
    monkeypatch.setattr(
        rewrites_attention, "cache_attention", functools.partial(cache_attention_tpu.attention, interpret=True)
    )
    check_a_program(*case)


# --- Edges -------------------------------------------------------------------------------------------------------


def spec_of(fill: float, dtype: Any = F32) -> AttentionSpec:
    """Of q (B, H, M, D) and caches (B, T, H, D), with a mask."""
    heads = ((0, 1), (0, 2))
    scores = CacheDot((((3,), (3,)), heads), 1, lax.Precision.HIGHEST, jnp.dtype(F32))
    result = CacheDot((((3,), (1,)), heads), 1, lax.Precision.HIGHEST, jnp.dtype(dtype))
    return AttentionSpec(scores, (0, 1, 2, 3), (("mask", fill),), jnp.dtype(F32), result)


@pytest.mark.parametrize("fill", [-1e9, -np.inf])
def test_positions_that_nothing_was_written_to_do_not_matter(fill: float, monkeypatch: pytest.MonkeyPatch):
    """Whole tiles of them before and after those that are seen, and a row that sees none."""
    monkeypatch.setattr(cache_dot_tpu, "_TILE", 1)
    written = packed(4, "int8", True, 1, 40, 4, 128)
    empty = qcache.zeros((1, 300, 4, 128), F32, written.spec, -1)
    cache = jax.tree.map(lambda whole, part: whole.at[:, 150:190].set(part), empty, written)
    q = array(5, 1, 4, 3, 128)
    seen = jnp.broadcast_to((jnp.arange(300) >= 150) & (jnp.arange(300) < 190), (1, 1, 3, 300)).at[..., 2, :].set(False)
    run = functools.partial(cache_attention_tpu.attention, spec=spec_of(fill), interpret=True)
    out = jax.jit(run, compiler_options=_QUICK)(q, cache, cache, seen)
    want, _ = attended(q.transpose(0, 2, 1, 3), value(written), value(written), np.ones((1, 3, 40), bool), 1.0)
    np.testing.assert_allclose(out[:, :, :2], want.transpose(0, 2, 1, 3)[:, :, :2], rtol=1e-4, atol=1e-4)
    # where nothing is seen, a softmax of equal numbers has equal weights, and one of -inf is NaN
    nothing = value(cache).mean(axis=1) if fill > -np.inf else np.full((1, 4, 128), np.nan)
    np.testing.assert_allclose(out[:, :, 2], nothing, rtol=1e-4, atol=1e-5)


def check_layers(attend: Callable[..., jax.Array], spec: AttentionSpec) -> None:
    """A negative index counts from the end, one beyond the stack is that of its last layer; no other layer is read."""
    layers, read = (-2, 9), (1, 2)
    keys, values = packed(4, "int4", True, 3, 1, 50, 2, 64), packed(5, "int8", False, 3, 1, 50, 2, 64)
    q, mask = array(6, 1, 2, 3, 64) / 8, jnp.ones((1, 1, 3, 50), bool)
    want, _ = attended(
        q.transpose(0, 2, 1, 3), value(keys)[read[0]], value(values)[read[1]], np.ones((1, 3, 50), bool), 1.0
    )
    keys, values = (
        dataclasses.replace(c, scale=jnp.where((jnp.arange(3) == i)[:, None, None, None], c.scale, jnp.nan))
        for c, i in zip((keys, values), read, strict=True)
    )
    run = jax.jit(functools.partial(attend, spec=spec, interpret=True), compiler_options=_QUICK)
    got = run(q, keys, values, mask, layers=tuple(map(jnp.int32, layers)))
    np.testing.assert_allclose(got, want.transpose(0, 2, 1, 3), rtol=1e-4, atol=1e-4)


def test_layers_are_read_in_their_stacks():
    check_layers(cache_attention_tpu.attention, spec_of(-1e9))


def test_caches_that_lie_in_different_ways_are_two_products():
    spec = spec_of(-1e9)
    keys = jax.eval_shape(lambda: qcache.zeros((2, 16, 4, 128), F32, CacheSpec(FORMATS["int8"]), -1))
    values = jax.eval_shape(lambda: qcache.zeros((4, 16, 2, 128), F32, CacheSpec(FORMATS["int4"]), -1))
    q = jax.ShapeDtypeStruct((2, 4, 1, 128), BF16)
    assert cache_attention_tpu.unsupported(q, keys, keys, spec) is None
    swapped = CacheDot((((3,), (1,)), ((0, 1), (2, 0))), 1, None, jnp.dtype(BF16))
    other = AttentionSpec(spec.scores, spec.order, spec.steps, spec.weights, swapped)
    assert cache_attention_tpu.unsupported(q, keys, values, other) == "the caches are laid out in different ways"


# --- Transformations ---------------------------------------------------------------------------------------------


def test_vmap_and_gradients_are_those_of_plain_operations():
    keys, values = packed(6, "int8", True, 3, 2, 20, 2, 16), packed(7, "int4", False, 3, 2, 20, 2, 16)
    q, mask = array(8, 3, 2, 2, 4, 16), jnp.arange(20) < jnp.asarray([[20], [7], [1]])

    def loss(fn: Callable[..., Any], q: Any, keys: Any, values: Any, mask: Any) -> Any:
        return jnp.sum(jnp.sin(fn(q, keys, values, mask[None, None, None])))

    def plain(q: Any, keys: Any, values: Any, mask: Any) -> Any:
        floats = (qcache.dequantize(cache) for cache in (keys, values))
        scores = jnp.einsum("bhmd,bthd->bhmt", q, next(floats), precision="highest")
        return jnp.einsum("bhmt,bthd->bhmd", jax.nn.softmax(jnp.where(mask, scores, -1e9)), next(floats))

    def packed_attention(q: Any, keys: Any, values: Any, mask: Any) -> Any:
        return cache_attention(q, keys, values, mask, spec_of(-1e9))

    for fn in (loss, jax.grad(loss, 1)):
        got, want = (
            jax.jit(jax.vmap(functools.partial(fn, attend)))(q, keys, values, mask)
            for attend in (packed_attention, plain)
        )
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# --- What is found in a program ------------------------------------------------------------------------------------


def biased(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    return nn.dot_product_attention(q, keys, values, bias=jnp.where(mask, 0.0, -1e9)[:, None])


def weights_kept(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    p = nn.dot_product_attention_weights(q, keys, mask=mask[:, None])
    return jnp.einsum("bhqk,bkhd->bqhd", p, values), p


def softmax_over_heads(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, keys), axis=1)
    return jnp.einsum("bhqk,bkhd->bqhd", p, values)


def temperature(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """A factor that is no number."""
    p = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, keys) * q[0, 0, 0, 0])
    return jnp.einsum("bhqk,bkhd->bqhd", p, values)


def no_softmax(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """Divided by a sum of other numbers."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, keys)
    p = jnp.exp(scores - scores.max(-1, keepdims=True)) / jnp.exp(scores).sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", p, values)


def maxima_of_other_rows(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """As many queries as positions: the shapes alone do not tell."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", jnp.repeat(q, 20, axis=1), keys)
    e = jnp.exp(scores - scores.max(-1)[:, :, None, :])
    return jnp.einsum("bhqk,bkhd->bqhd", e / e.sum(-1, keepdims=True), values)


LEFT = [biased, weights_kept, softmax_over_heads, temperature, no_softmax, maxima_of_other_rows]


@pytest.mark.parametrize("fn", LEFT, ids=lambda f: f.__name__)
def test_anything_else_is_left_as_it_is(fn):
    keys, values = packed(9, "int8", False, 2, 20, 2, 16), packed(10, "int8", False, 2, 20, 2, 16)
    q, mask = array(11, 2, 1, 2, 16), np.arange(20) <= np.asarray([[[7]], [[19]]])
    run = traced(fn, q, keys, values, mask)
    text = str(jax.make_jaxpr(run)(q, keys, values, mask))
    assert "cache_attention" not in text
    assert text.count("cache_dot_general[") == 2
    want = fn(q, qcache.dequantize(keys), qcache.dequantize(values), mask)
    np.testing.assert_allclose(jax.jit(run)(q, keys, values, mask), jax.tree.leaves(want)[0], rtol=1e-4, atol=1e-5)


def test_attention_on_float_values_is_two_products():
    """A cache of keys alone, as with `kv_cache={"**/keys": "int8", "**": None}`."""
    keys, values = packed(12, "int8", False, 2, 20, 2, 16), array(13, 2, 20, 2, 16)
    q, mask = array(14, 2, 1, 2, 16), np.ones((2, 1, 20), bool)
    program = trace(linen, [q, qcache.dequantize(keys), values, mask], [None] * 4, [None, "keys", None, None])

    def run(keys: QCache) -> jax.Array:
        plan = plan_given(program, None, {"keys": keys})
        return replayed(program, [q, keys, values, mask], plan)

    text = str(jax.make_jaxpr(run)(keys))
    assert "cache_attention" not in text and text.count("cache_dot_general[") == 1
    np.testing.assert_allclose(
        jax.jit(run)(keys), linen(q, qcache.dequantize(keys), values, mask), rtol=1e-4, atol=1e-5
    )


# --- Models --------------------------------------------------------------------------------------------------------


def test_decoding_models_attend_to_their_packed_caches():
    """Linen and NNX, with the caches of Flax."""
    keep = qjax.Rule("**")
    x = array(15, 2, 1, 16)
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16, decode=True)
    variables = jax.jit(module.init)(jax.random.key(2), array(16, 2, 6, 16))
    q = qjax.quantize(module, keep, kv_cache="int8")
    made = q.convert(variables, x, mutable=["cache"])
    step = functools.partial(q.apply, mutable=["cache"])
    assert str(jax.make_jaxpr(step)(made, x)).count("cache_attention[") == 1
    attend = nnx.MultiHeadAttention(2, 16, decode=True, rngs=nnx.Rngs(0))
    attend.init_cache((2, 6, 16))
    served = qjax.quantize(attend, keep, kv_cache="int4").convert(x)
    graph, state = nnx.split(served)
    assert str(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(x))(state)).count("cache_attention[") == 1
