"""Quantized key-value caches: numerics, what can be packed and why not, decoding step by step, what is allocated."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import qjax
from qjax.pallas_kernels.numbers.formats import FORMATS
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.qcache import CacheSpec, QCache
from qjax.passes.jaxpr.replay import replay
from qjax.passes.jaxpr.trace import trace
from qjax.passes.plan.caches import plan_caches, plan_given
from qjax.passes.plan.rules import CacheRule, PlanError, as_cache_rules
from qjax.passes.rewrites import lower
from qjax.passes.rewrites.caches import PackedCaches

INT8, INT4 = CacheSpec(FORMATS["int8"]), CacheSpec(FORMATS["int4"])
SPECS = {
    "int8": INT8,
    "int4": INT4,
    "int8z": CacheSpec(FORMATS["int8"], zero_point=True),
    "int4z bf16": CacheSpec(FORMATS["int4"], zero_point=True, scale_dtype="bfloat16"),
    "fp8": CacheSpec(FORMATS["fp8_e4m3"]),
    "nf4": CacheSpec(FORMATS["nf4"]),
}


# eager, each of their operations would be compiled by itself
quantize = jax.jit(qcache.quantize, static_argnums=(1, 2))
dequantize = jax.jit(qcache.dequantize)


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


# --- An independent simulation, in NumPy ---------------------------------------------------------------------------


def simulated(x: np.ndarray, bits: int, zero_point: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points of vectors along the last axis, in float32 as the formulas say."""
    x = x.astype(np.float32)
    qmin, qmax, steps = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, np.float32((2**bits - 1) / 2)
    if zero_point:
        low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
        scale = (high / 2 - low / 2) / steps
        zero = np.clip(np.round(qmin - low / np.where(scale == 0, 1, scale)), qmin, qmax)
    else:
        scale = np.abs(x).max(-1, keepdims=True) / steps
        zero = np.zeros_like(scale)
    codes = np.clip(np.round(x / np.where(scale == 0, 1, scale) + zero), qmin, qmax)
    return codes, scale, zero


def unpacked(cache: QCache) -> np.ndarray:
    """Codes of an int4 or int8 cache whose vector axis is the last, from the bytes alone."""
    words = np.asarray(cache.codes)
    if cache.spec.format.bits == 8:
        return words
    fields = (words[..., None].view(np.uint32) >> (4 * np.arange(8, dtype=np.uint32))) & 15
    codes = fields.reshape(*words.shape[:-1], -1)[..., : cache.size].astype(np.int32)
    return np.where(codes > 7, codes - 16, codes)


def value(cache: QCache) -> np.ndarray:
    """The float value of an integer cache whose vector axis is the last, in float64."""
    zero = 0 if cache.zero is None else np.asarray(cache.zero, np.float64)[..., None]
    return (unpacked(cache) - zero) * np.asarray(cache.scale, np.float64)[..., None]


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_codes_are_those_of_the_formula(format: str, zero_point: bool):
    x = normal(0, 3, 5, 2, 12) + 0.3
    spec = CacheSpec(FORMATS[format], zero_point)
    cache = quantize(x, spec, -1)
    codes, scale, zero = simulated(np.asarray(x), spec.format.bits, zero_point)
    np.testing.assert_array_equal(unpacked(cache), codes)
    np.testing.assert_array_equal(cache.scale, scale[..., 0])
    assert (cache.zero is None) == (not zero_point)
    if zero_point:
        np.testing.assert_array_equal(cache.zero, zero[..., 0])
    back = np.asarray(dequantize(cache))
    np.testing.assert_allclose(back, value(cache), rtol=1e-6, atol=1e-7)
    # half a step; with a zero point the ends of the range may lie half a step outside the codes
    assert (np.abs(back - x) <= scale * (1.0 if zero_point else 0.5) * (1 + 1e-3)).all()


@pytest.mark.parametrize(("name", "axis"), [*((name, -2) for name in SPECS), ("int4", 1), ("int4", -1)])
def test_any_axis_can_hold_the_vectors(name: str, axis: int):
    x, spec = normal(1, 2, 6, 3, 10), SPECS[name]
    cache = quantize(x, spec, axis)
    last = quantize(jnp.moveaxis(x, axis, -1), spec, -1)
    np.testing.assert_array_equal(dequantize(cache), jnp.moveaxis(dequantize(last), -1, axis))
    assert cache.shape == x.shape
    assert cache.nbytes == qcache.packed_nbytes(x.shape, spec, axis)
    assert cache.scale.dtype == spec.scale_dtype
    assert dequantize(jax.tree.map(lambda a: a[1], cache)).shape == x.shape[1:]
    again = qcache.from_leaves(qcache.leaves(cache), cache, axis % 4, x.dtype)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, cache))


def test_zeros_are_exact_and_share_no_buffer():
    cache = qcache.zeros((2, 8, 2, 16), jnp.bfloat16, INT4, -1)
    assert not np.asarray(dequantize(cache)).any()
    assert dequantize(cache).dtype == jnp.bfloat16
    assert cache.codes.dtype == jnp.int32
    assert cache.codes.shape == (2, 8, 2, 2)
    assert "int4/vector, bfloat16[2,8,2,16]" in repr(cache)


def test_specs_are_checked_and_saved():
    with pytest.raises(ValueError, match="no zero point"):
        CacheSpec(FORMATS["fp8_e4m3"], zero_point=True)
    with pytest.raises(TypeError, match="name of a format"):
        as_cache_rules("int9")
    for rule in (CacheRule("**", SPECS["int4z bf16"]), CacheRule("a/b", None)):
        assert CacheRule.from_json(rule.to_json()) == rule


# --- Ways to write a cache -----------------------------------------------------------------------------------------

B, S, H, D = 2, 8, 2, 16
CACHE, NEW = (B, S, H, D), (B, 1, H, D)


def write_slice(cache, new, i):
    return lax.dynamic_update_slice_in_dim(cache, new, i, axis=1)


def write_at(cache, new, i):
    return cache.at[:, i].set(new[:, 0])


def write_each(cache, new, i):
    """Each example has a position of its own."""
    return cache.at[jnp.arange(B), jnp.stack([i, i])].set(new[:, 0])


def write_vmapped(cache, new, i):
    return jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=0))(cache, new, jnp.stack([i, i]))


def write_where(cache, new, i):
    return jnp.where((jnp.arange(S) == i)[None, :, None, None], new, cache)


def write_if_active(cache, new, i):
    """An update of some examples only: both cases are the cache."""
    active = jnp.asarray([True, True]) & (i >= 0)
    return jnp.where(active[:, None, None, None], write_slice(cache, new, i), cache)


def write_cond(cache, new, i):
    return lax.cond(i >= 0, write_slice, lambda cache, new, i: cache, cache, new, i)


def write_transposed(cache, new, i):
    heads_first = cache.transpose(0, 2, 1, 3)
    heads_first = lax.dynamic_update_slice_in_dim(heads_first, new.transpose(0, 2, 1, 3), i, axis=2)
    return heads_first.transpose(0, 2, 1, 3)


def write_flat(cache, new, i):
    flat = cache.reshape(B, S * H, D)
    return lax.dynamic_update_slice_in_dim(flat, new.reshape(B, H, D), i * H, axis=1).reshape(CACHE)


def write_in_fori(cache, new, i):
    """A cache that a loop carries and that a loop's condition leaves alone."""
    return lax.fori_loop(0, 1, lambda _, c: write_slice(c, new, i), cache)


def write_in_scan(cache, new, i):
    def body(c, x):
        return write_slice(c, x, i), None

    return lax.scan(body, cache, new[None])[0]


def write_jit(cache, new, i):
    return jax.jit(jax.checkpoint(write_slice))(cache, new, i)


def write_parts(cache, new, i):
    first, second = cache[:, :, :1], cache[:, :, 1:]
    return jnp.concatenate([write_slice(first, new[:, :, :1], i), write_slice(second, new[:, :, 1:], i)], axis=2)


def write_gathered(cache, new, i):
    """Beams reordered, to where they were."""
    return write_slice(cache[jnp.arange(B)], new, i)


WRITES = [
    write_slice,
    write_at,
    write_each,
    write_vmapped,
    write_where,
    write_if_active,
    write_cond,
    write_transposed,
    write_flat,
    write_in_fori,
    write_in_scan,
    write_jit,
    write_parts,
    write_gathered,
]


def attend(q, keys, values, i):
    """Grouped queries [B, G*H, D] on caches of H heads, the tail masked; the result is [B, G*H, D]."""
    groups = q.reshape(B, H, -1, D)
    scores = jnp.einsum("bhgd,bshd->bhgs", groups, keys) / D**0.5
    p = jax.nn.softmax(jnp.where(jnp.arange(S) <= i, scores, -1e9))
    return jnp.einsum("bhgs,bshd->bhgd", p, values).reshape(q.shape)


def attended(q: Any, keys: Any, values: Any, i: Any) -> np.ndarray:
    """`attend` in NumPy and float64."""
    q, keys, values = (np.asarray(a, np.float64) for a in (q, keys, values))
    scores = np.einsum("bhgd,bshd->bhgs", q.reshape(B, H, -1, D), keys[:, : int(i) + 1]) / D**0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("bhgs,bshd->bhgd", p, values[:, : int(i) + 1]).reshape(q.shape)


def packed_run(fn, spec: CacheSpec, cache: jax.Array, *args: Any) -> tuple[Any, Any, Any]:
    """`fn(cache, *args)` with its first argument packed: plan, packed input, results."""
    program = trace(fn, [cache, *args], [None] * (1 + len(args)), ["cache", *[None] * len(args)])
    plan = plan_caches(program, None, as_cache_rules({"cache": spec}))
    packed = plan["cache"].pack(cache)

    def run(packed, *args):
        caches = plan_given(program, None, {"cache": packed})
        return replay(program, [packed, *args], rules=lower.RULES, state=PackedCaches(caches))[0]

    return plan, packed, jax.jit(run)(packed, *args)


CASES = [(write, ("int8", "int4z bf16")[i % 2]) for i, write in enumerate(WRITES)]


@pytest.mark.parametrize(("write", "name"), CASES, ids=lambda c: getattr(c, "__name__", c))
def test_every_way_to_write_quantizes_new_vectors_once(write, name: str):
    cache, new, q, i, spec = normal(2, *CACHE), normal(3, *NEW), normal(4, B, 2 * H, D), jnp.int32(3), SPECS[name]

    def fn(cache, new, q, i):
        cache = write(cache, new, i)
        return attend(q, cache, cache, i), cache

    plan, before, (out, after) = packed_run(fn, spec, cache, new, q, i)
    assert plan["cache"].axis == -1
    assert plan["cache"].reason == ""
    assert isinstance(after, QCache)
    for got, old, one in zip(*map(jax.tree.leaves, (after, before, quantize(new, spec, -1))), strict=True):
        got, old, one = (np.asarray(a, np.float32 if a.dtype == jnp.bfloat16 else a.dtype) for a in (got, old, one))
        np.testing.assert_array_equal(np.delete(got, 3, axis=1), np.delete(old, 3, axis=1))
        # Of a vector that is broadcast first, XLA multiplies by 1 / 127.5: the last bit of the scale may differ, and
        # with it the side to which -127.5 is rounded.
        loose = {"rtol": 2e-7} if got.dtype == np.float32 else {"atol": 1 if write is write_where else 0}
        np.testing.assert_allclose(got[:, 3], one[:, 0], **{"rtol": 0, **loose})
    np.testing.assert_allclose(out, attended(q, value(after), value(after), i), rtol=2e-5, atol=2e-5)


def test_a_rolling_window_keeps_its_bits():
    cache, new = normal(5, *CACHE), normal(6, *NEW)

    def fn(cache, new):
        return (jnp.roll(cache, -1, axis=1).at[:, -1].set(new[:, 0]),)

    _, before, (after,) = packed_run(fn, INT4, cache, new)
    np.testing.assert_array_equal(after.codes[:, :-1], before.codes[:, 1:])
    np.testing.assert_array_equal(after.codes[:, -1:], quantize(new, INT4, -1).codes)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "write", [write_slice, write_at, write_cond, write_jit, write_in_scan], ids=lambda write: write.__name__
)
def test_scanned_layers_update_a_stacked_cache(write, reverse: bool):
    cache, new, q, i = normal(7, 3, *CACHE), normal(8, 3, *NEW), normal(9, B, H, D), jnp.int32(2)

    def fn(cache, new, q, i):
        def layer(q, own):
            before, new = own
            after = write(before, new, i)
            q = attend(q, after, after, i)
            return q, (after, before.sum())

        q, (cache, sums) = lax.scan(layer, q, (cache, new), reverse=reverse)
        return q, cache, sums

    _, before, (out, after, sums) = packed_run(fn, INT8, cache, new, q, i)
    assert isinstance(after, QCache)
    for got, old, one in zip(*map(jax.tree.leaves, (after, before, quantize(new, INT8, -1))), strict=True):
        np.testing.assert_array_equal(np.delete(got, 2, axis=2), np.delete(old, 2, axis=2))
        np.testing.assert_array_equal(got[:, :, 2], one[:, :, 0])
    np.testing.assert_allclose(sums, value(before).sum((1, 2, 3, 4)), rtol=1e-4)  # of the caches before the update
    expected = q
    for layer in range(3)[:: -1 if reverse else 1]:
        own = value(after)[layer]
        expected = attended(expected, own, own, i)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


def test_scanned_layers_exchange_and_share_stacked_caches():
    """Results that are another operand's caches, and a stack that is read only."""
    first, second, q, i = normal(7, 3, *CACHE), normal(8, 3, *CACHE), normal(9, B, H, D), jnp.int32(2)

    def fn(both, q, i):
        def layer(q, own):
            a, b = own
            return attend(q, a, b, i), (b, a)

        q, (a, b) = lax.scan(layer, q, (both[:3], both[3:]))
        q, _ = lax.scan(lambda q, own: (attend(q, own, own, i), None), q, a)
        return q, jnp.concatenate([a, b])

    plan, _, (out, after) = packed_run(fn, INT8, jnp.concatenate([first, second]), q, i)
    assert plan["cache"].reason == ""
    a, b = value(quantize(first, INT8, -1)), value(quantize(second, INT8, -1))
    expected = q
    for layer in range(3):
        expected = attended(expected, a[layer], b[layer], i)
    for layer in range(3):
        expected = attended(expected, b[layer], b[layer], i)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(value(after), np.concatenate([b, a]))


def test_layers_without_a_scan_index_a_stacked_cache():
    cache, new, q, i = normal(7, 3, *CACHE), normal(8, 3, *NEW), normal(9, B, H, D), jnp.int32(2)

    def fn(cache, new, q, i):
        for layer in range(3):
            own = write_slice(cache[layer], new[layer], i)
            q = attend(q, own, own, i)
            cache = cache.at[layer].set(own)
        return q, cache

    plan, before, (out, after) = packed_run(fn, INT8, cache, new, q, i)
    assert plan["cache"].reason == ""
    expected = quantize(new, INT8, -1)
    np.testing.assert_array_equal(after.codes[:, :, 2:3], expected.codes)
    kept = np.arange(S) != 2
    np.testing.assert_array_equal(after.codes[:, :, kept], before.codes[:, :, kept])
    want = q
    for layer in range(3):
        want = attended(want, value(after)[layer], value(after)[layer], i)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


def test_keys_that_lie_transposed_are_quantized_along_their_own_axis():
    """[B, H, D, S]: what the scores contract is the vector, not the last axis."""
    cache, new, q = normal(10, B, H, D, S), normal(11, B, H, D, 1), normal(12, B, H, D)

    def fn(cache, new, q):
        cache = lax.dynamic_update_slice_in_dim(cache, new, 1, axis=3)
        return jnp.einsum("bhd,bhds->bhs", q, cache), cache

    plan, _, (scores, after) = packed_run(fn, INT8, cache, new, q)
    assert plan["cache"].axis == -2
    np.testing.assert_allclose(scores, np.einsum("bhd,bhds->bhs", q, dequantize(after)), rtol=1e-5, atol=1e-5)


def test_heads_repeated_for_their_groups_stay_codes():
    def fn(cache, new, q, i):
        cache = write_slice(cache, new, i)
        wide = jnp.repeat(cache, 3, axis=2)  # [B, S, 3H, D]
        return jnp.einsum("bhd,bshd->bhs", q, wide), cache

    q = normal(15, B, 3 * H, D)
    plan, _, (scores, after) = packed_run(fn, INT4, normal(13, *CACHE), normal(14, *NEW), q, jnp.int32(0))
    assert plan["cache"].reason == ""
    want = np.einsum("bhd,bshd->bhs", q, np.repeat(value(after), 3, axis=2))
    np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-5)


def test_other_reads_are_dequantized_and_named():
    def fn(cache, new, i):
        cache = write_slice(cache, new, i)
        return (cache * cache).sum(axis=(2, 3)), cache

    plan, _, (out, after) = packed_run(fn, INT8, normal(16, *CACHE), normal(17, *NEW), jnp.int32(0))
    assert plan["cache"].reason == "dequantized for 'mul'"
    np.testing.assert_allclose(out, (value(after) ** 2).sum(axis=(2, 3)), rtol=1e-5)


def test_a_cache_filled_at_once_is_quantized_as_it_leaves():
    def fn(cache, new):
        return (jnp.pad(new, ((0, 0), (0, S - 3), (0, 0), (0, 0))),)

    cache, new = jnp.zeros(CACHE), normal(18, B, 3, H, D)
    program = trace(fn, [cache, new], [None, None], ["cache", None])
    packed = qcache.zeros(CACHE, jnp.float32, INT8, -1)
    plan = plan_given(program, ["cache"], {"cache": packed})
    (after,), _ = replay(program, [packed, new], rules={}, state=PackedCaches(plan))
    np.testing.assert_array_equal(after.codes[:, :3], quantize(new, INT8, -1).codes)
    assert not np.asarray(after.codes[:, 3:]).any()


# --- What cannot be packed -----------------------------------------------------------------------------------------


def add_one_hot(cache, new, i):
    return cache + jax.nn.one_hot(i, S)[None, :, None, None] * new


def decay(cache, new, i):
    return write_slice(0.9 * cache, new, i)


def write_half_a_vector(cache, new, i):
    return cache.at[:, i, :, : D // 2].set(new[:, 0, :, : D // 2])


def write_by_element(cache, new, i):
    return jnp.where(jnp.broadcast_to(new, CACHE) + jnp.arange(S)[:, None, None] > 3, new, cache)


def write_sorted(cache, new, i):
    return jnp.sort(write_slice(cache, new, i), axis=1)


def carry_with_arithmetic(cache, new, i):
    return lax.fori_loop(0, 2, lambda _, c: write_slice(c, new, i) * 0.5, cache)


def other_branch_is_new(cache, new, i):
    return lax.cond(i > 0, lambda c: write_slice(c, new, i), lambda c: c * 0.0, cache)


REFUSED = {
    add_one_hot: "computed from 'mul'|computed from 'add'",
    decay: "computed from 'mul' of its old one, which would have to be quantized again",
    write_by_element: "computed from 'select_n'",
    write_sorted: "computed from 'sort'",
    carry_with_arithmetic: "computed from 'mul'|computed from 'while'|computed from 'scan'",
    other_branch_is_new: "computed from 'mul'|computed from 'cond'",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda f: f.__name__)
def test_arithmetic_on_the_old_entries_is_refused(write):
    def fn(cache, new, i):
        cache = write(cache, new, i)
        return jnp.einsum("bhd,bshd->bhs", new[:, 0], cache), cache

    cache, new, i = jnp.zeros(CACHE), jnp.ones(NEW), jnp.int32(1)
    program = trace(fn, [cache, new, i], [None] * 3, ["cache", None, None])
    results = [None, "cache"]
    plan = plan_caches(program, results, as_cache_rules("int8"), strict=False)
    assert plan["cache"].spec is None
    assert re.search(REFUSED[write], plan["cache"].reason), plan["cache"].reason
    with pytest.raises(PlanError, match=r"'cache' is matched by kv_cache=.* cannot be quantized: its new value"):
        plan_caches(program, results, as_cache_rules({"cache": "int8"}))
    with pytest.raises(PlanError, match="quantizes nothing"):
        plan_caches(program, results, as_cache_rules("int8"))
    with pytest.raises(ValueError, match=r"'cache' is packed .* cannot stay so"):
        plan_given(program, results, {"cache": qcache.zeros(CACHE, jnp.float32, INT8, -1)})


def test_an_axis_that_is_cut_holds_no_vectors():
    cache, new, i = jnp.zeros(CACHE), jnp.ones(NEW), jnp.int32(1)

    def fn(cache, new, i):
        cache = write_half_a_vector(cache, new, i)
        return jnp.einsum("bhd,bshd->bhs", new[:, 0], cache), cache

    program = trace(fn, [cache, new, i], [None] * 3, ["cache", None, None])
    plan = plan_caches(program, [None, "cache"], as_cache_rules("int8"), strict=False)
    assert plan["cache"].reason == "its vectors are cut by 'scatter'"
    with pytest.raises(ValueError, match="computed from 'scatter'"):
        plan_given(program, [None, "cache"], {"cache": qcache.zeros(CACHE, jnp.float32, INT8, -1)})


def test_state_that_comes_back_changed_in_form_is_refused():
    cache = jnp.zeros((4, 4, 4))
    program = trace(lambda c: (c.transpose(1, 2, 0),), [cache], [None], ["cache"])
    reason = plan_caches(program, ["cache"], as_cache_rules("int8"), strict=False)["cache"].reason
    assert reason == "it is returned with its axes in another order"
    program = trace(lambda c: (c.astype(jnp.bfloat16),), [cache], [None], ["cache"])
    reason = plan_caches(program, ["cache"], as_cache_rules("int8"), strict=False)["cache"].reason
    assert reason.startswith("it is returned as")
    program = trace(lambda a, b: (b, a), [cache, cache], [None, None], ["a", "b"])
    assert "that of 'b'" in plan_caches(program, ["a", "b"], as_cache_rules("int8"), strict=False)["a"].reason
    program = trace(lambda c: (c.sum(),), [cache], [None], ["cache"])
    with pytest.raises(PlanError, match="not returned"):
        plan_caches(program, None, as_cache_rules("int8"))


# --- Models --------------------------------------------------------------------------------------------------------

VOCAB, DIM, LAYERS, HEADS, KV_HEADS, HEAD, LENGTH = 32, 16, 2, 4, 2, 8, 8


class Layer(nn.Module):
    """Grouped-query attention on a cache; no MLP, so that NumPy can follow."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        dense = partial(nn.DenseGeneral, use_bias=False)
        q = dense((HEADS, HEAD), name="q")(x)
        k, v = (dense((KV_HEADS, HEAD), name=name)(x) for name in "kv")
        shape = (x.shape[0], LENGTH, KV_HEADS, HEAD)
        keys = self.variable("cache", "keys", jnp.zeros, shape)
        values = self.variable("cache", "values", jnp.zeros, shape)
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        keys.value = lax.dynamic_update_slice_in_dim(keys.value, k, index.value, axis=1)
        values.value = lax.dynamic_update_slice_in_dim(values.value, v, index.value, axis=1)
        groups = q.reshape(*q.shape[:2], KV_HEADS, -1, HEAD)
        scores = jnp.einsum("bqkgd,bskd->bkgqs", groups, keys.value) / HEAD**0.5
        seen = jnp.arange(LENGTH) <= index.value + jnp.arange(x.shape[1])[:, None]
        p = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        index.value += x.shape[1]
        out = jnp.einsum("bkgqs,bskd->bqkgd", p, values.value).reshape(q.shape)
        return x + dense(DIM, axis=(-2, -1), name="out")(out), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, DIM, name="embed")(tokens)
        axes = {"params": 0, "cache": 0}
        layers = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs={"params": True}, length=LAYERS)
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(VOCAB, use_bias=False, name="head")(x)


TOKENS = np.asarray([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]], np.int32)
KEEP = qjax.Rule("**")  # float weights: only the cache is quantized


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, Any]:
    module = Decoder()
    variables = jax.jit(module.init)(jax.random.key(1), TOKENS[:, :1])
    cache = jax.tree.map(jnp.zeros_like, variables["cache"])  # init has written a token
    return module, {"params": variables["params"], "cache": cache}


def numpy_decoder(params: Any, cache: Any = None) -> list[np.ndarray]:
    """Logits of each step, in float64: with a float cache, or with the entries that a model left in its packed one.

    Where a value lies between two codes up to the last bits of a sum (a vector's largest does, if it is negative),
    another order of summation takes the other code. So NumPy goes on with the codes of the model, after it has checked
    that each is a nearest one to the value that it has there itself.
    """
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    own = [{name: tree["kernel"][i] for name, tree in p["layers"].items()} for i in range(LAYERS)]
    packed = {} if cache is None else {kind: cache["layers"][kind] for kind in ("keys", "values")}
    codes, stored = ({kind: read(packed[kind]) for kind in packed} for read in (unpacked, value))
    caches = {kind: np.zeros((LAYERS, 2, LENGTH, KV_HEADS, HEAD)) for kind in ("keys", "values")}

    def entry(kind: str, layer: int, step: int, x: np.ndarray) -> np.ndarray:
        if cache is None:
            return x
        at = (layer, slice(None), step)
        scale = np.asarray(packed[kind].scale, np.float64)[at][..., None]
        steps = (2 ** packed[kind].spec.format.bits - 1) / 2
        np.testing.assert_allclose(scale, np.abs(x).max(-1, keepdims=True) / steps, rtol=1e-5)
        np.testing.assert_allclose(codes[kind][at], x / scale, rtol=0, atol=0.5 + 1e-3)
        return stored[kind][at]

    logits = []
    for step in range(TOKENS.shape[1]):
        x = p["embed"]["embedding"][TOKENS[:, step]]  # [B, DIM]
        for layer, weights in enumerate(own):
            q, k, v = (np.einsum("bi,ihd->bhd", x, weights[name]) for name in "qkv")
            for kind, new in (("keys", k), ("values", v)):
                caches[kind][layer, :, step] = entry(kind, layer, step, new)
            keys, values = (caches[kind][layer, :, : step + 1] for kind in ("keys", "values"))
            groups = q.reshape(2, KV_HEADS, -1, HEAD)
            scores = np.einsum("bkgd,bskd->bkgs", groups, keys) / np.sqrt(HEAD)
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            out = np.einsum("bkgs,bskd->bkgd", weight, values).reshape(q.shape)
            x = x + np.einsum("bhd,hdo->bo", out, weights["out"])
        logits.append(x @ p["head"]["kernel"])
    return logits


def decode(q: Any, variables: Any, donate: bool = True) -> tuple[list[np.ndarray], list[Any]]:
    """Logits and caches of each step."""
    step = jax.jit(
        lambda params, cache, tokens: q.apply({"params": params, "cache": cache}, tokens, mutable=["cache"]),
        donate_argnums=(1,) if donate else (),
    )
    cache = jax.tree.map(jnp.copy, variables["cache"])
    logits, caches = [], []
    for i in range(TOKENS.shape[1]):
        given = jax.tree.leaves(cache)
        out, updated = step(variables["params"], cache, TOKENS[:, i : i + 1])
        assert all(a.is_deleted() for a in given) == donate
        cache = updated["cache"]
        logits.append(np.asarray(out[:, 0]))
        caches.append(jax.device_get(jax.tree.map(jnp.copy, cache)))  # a view would keep the buffer from being donated
    return logits, caches


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_scanned_layers_decode_as_numpy_does(decoder, name: str):
    module, variables = decoder
    q = qjax.quantize(module, KEEP, kv_cache=name)
    plan = q.plan(variables, TOKENS[:, :1], mutable=["cache"])
    packed = q.convert(variables, TOKENS[:, :1], mutable=["cache"])
    logits, caches = decode(q, packed)
    bits = SPECS[name].format.bits
    reference, exact = numpy_decoder(variables["params"]), numpy_decoder(variables["params"], caches[-1])
    for got, want in zip(logits, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    error = max(np.abs(a - b).max() for a, b in zip(logits, reference, strict=True))
    assert 1e-5 < error < {"int8": 0.03, "int4": 0.5}[name]

    # old entries keep their bits, the tail is untouched
    for step, cache in enumerate(caches):
        assert cache["layers"]["index"].tolist() == [step + 1] * LAYERS
        for kind in ("keys", "values"):
            now, last = cache["layers"][kind], caches[-1]["layers"][kind]
            assert isinstance(now, QCache)
            for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(last), strict=True):
                np.testing.assert_array_equal(a[:, :, : step + 1], b[:, :, : step + 1])
                assert not a[:, :, step + 1 :].any()

    # what is allocated is what the plan says
    for kind in ("keys", "values"):
        cache, entry = packed["cache"]["layers"][kind], plan.caches[f"cache/layers/{kind}"]
        assert entry.axis == -1
        assert entry.shape == (LAYERS, 2, LENGTH, KV_HEADS, HEAD)
        words = HEAD if name == "int8" else HEAD // 8
        assert cache.codes.shape == (*entry.shape[:-1], words)
        assert cache.codes.dtype == (jnp.int8 if name == "int8" else jnp.int32)
        assert sum(a.nbytes for a in jax.tree.leaves(cache)) == entry.stored_bytes
        assert entry.stored_bytes == entry.float_bytes // 4 * bits // 8 + entry.float_bytes // HEAD
    assert re.search(rf"cache/layers/keys +float32\[2,2,8,2,8\] +{name}/vector +2,048 B +\d+ B", str(plan))
    assert plan.to_json()["caches"][0]["format"] == f"{name}/vector"
    assert q.recipe.from_json(q.recipe.to_json()) == q.recipe


def test_attention_error_is_within_its_bound():
    """A vector is off by half a step d; scores by |q| d, so weights by a factor exp(2 d); values by half a step."""
    keys, values, q, i = normal(20, *CACHE), normal(21, *CACHE), normal(22, B, 2 * H, D), jnp.int32(S - 1)
    for spec in (INT8, INT4):
        k, v = (quantize(x, spec, -1) for x in (keys, values))
        _, _, (out, _, _) = packed_run(
            lambda k, v, q, i: (attend(q, k, v, i), k, q), spec, keys, jnp.asarray(value(v), jnp.float32), q, i
        )
        delta = np.abs(np.asarray(q)).sum(-1).max() * np.asarray(k.scale).max() / 2 / np.sqrt(D)
        bound = np.asarray(v.scale).max() / 2 + (np.exp(2 * delta) - 1) * np.abs(values).max()
        error = np.abs(out - attended(q, keys, values, i)).max()
        assert 0 < error < bound


def test_compiled_step_has_no_float_cache_among_its_inputs_and_outputs(decoder):
    module, variables = decoder
    for name, leaf in (
        ("int8", f"s8[{LAYERS},2,{LENGTH},{KV_HEADS},{HEAD}]"),
        ("int4", f"s32[{LAYERS},2,{LENGTH},{KV_HEADS},1]"),
    ):
        q = qjax.quantize(module, KEEP, kv_cache=name)
        packed = q.convert(variables, TOKENS[:, :1], mutable=["cache"])

        def step(cache, params, tokens, q=q):
            return q.apply({"params": params, "cache": cache}, tokens, mutable=["cache"])

        lowered = jax.jit(step, donate_argnums=0).lower(packed["cache"], packed["params"], TOKENS[:, :1])
        text = lowered.compile().as_text()
        layout = re.search(r"entry_computation_layout=\{(.*)\}", text.split("\n")[0])
        assert layout is not None
        assert layout[1].count(leaf) == 4  # keys and values, in and out
        assert f"f32[{LAYERS},2,{LENGTH},{KV_HEADS},{HEAD}]" not in layout[1]
        assert text.split("\n")[0].count("may-alias") + text.split("\n")[0].count("must-alias") >= 5  # every leaf
        out = jax.eval_shape(step, packed["cache"], packed["params"], TOKENS[:, :1])[1]["cache"]
        assert jax.tree.structure(out) == jax.tree.structure(packed["cache"])
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), out, packed["cache"])
        assert jax.tree.all(same)


def test_prefill_of_several_tokens_fills_the_same_cache(decoder):
    """The prompt at once: another program, the same leaves, which NumPy has token by token."""
    module, variables = decoder
    q = qjax.quantize(module, KEEP, kv_cache="int8")
    packed = q.convert(variables, TOKENS[:, :1], mutable=["cache"])
    logits, updated = jax.jit(partial(q.apply, mutable=["cache"]))(packed, TOKENS)
    assert jax.tree.structure(updated["cache"]) == jax.tree.structure(packed["cache"])
    assert updated["cache"]["layers"]["index"].tolist() == [TOKENS.shape[1]] * LAYERS
    want = np.stack(numpy_decoder(variables["params"], updated["cache"]), axis=1)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
    for kind in ("keys", "values"):
        for a in jax.tree.leaves(updated["cache"]["layers"][kind]):
            assert not np.asarray(a)[:, :, TOKENS.shape[1] :].any()  # the tail is untouched


def test_a_generation_loop_carries_the_packed_cache(decoder):
    module, variables = decoder
    q = qjax.quantize(module, KEEP, kv_cache="int4")
    packed = q.convert(variables, TOKENS[:, :1], mutable=["cache"])

    @jax.jit
    def generate(params, cache, tokens):
        def body(cache, token):
            logits, updated = q.apply({"params": params, "cache": cache}, token[:, None], mutable=["cache"])
            return updated["cache"], logits[:, 0]

        return lax.scan(body, cache, tokens.T)

    cache, logits = generate(packed["params"], packed["cache"], TOKENS)
    assert isinstance(cache["layers"]["keys"], QCache)
    np.testing.assert_allclose(logits, numpy_decoder(variables["params"], cache), rtol=1e-4, atol=1e-4)


def test_packed_weights_inputs_and_caches_together(decoder):
    module, variables = decoder
    weights = qjax.int8(scale=qjax.AbsMax())
    rules = [qjax.Rule("**", weights, qjax.dynamic()), qjax.Rule("matmul:*", activations=qjax.dynamic())]
    q = qjax.quantize(module, rules, kv_cache={"cache/**/keys": "int8", "**": None})
    packed = q.convert(variables, TOKENS[:, :1], mutable=["cache"])
    assert isinstance(packed["cache"]["layers"]["keys"], QCache)
    assert isinstance(packed["cache"]["layers"]["values"], jax.Array)
    plan = q.plan(variables, TOKENS[:, :1], mutable=["cache"])
    assert plan.caches["cache/layers/values"].reason == "kept float by '**'"
    logits, caches = decode(q, packed)
    reference = numpy_decoder(variables["params"])
    assert max(np.abs(a - b).max() for a, b in zip(logits, reference, strict=True)) < 0.2
    assert isinstance(caches[-1]["layers"]["values"], np.ndarray)


def test_zero_caches_from_shapes(decoder):
    """A cache for other sizes needs no float one: shapes will do."""
    module, variables = decoder
    q = qjax.quantize(module, KEEP, kv_cache="int4")
    shapes = jax.eval_shape(lambda: variables)
    made = q.convert(shapes, TOKENS[:, :1], mutable=["cache"])["cache"]["layers"]["keys"]
    real = q.convert(variables, TOKENS[:, :1], mutable=["cache"])["cache"]["layers"]["keys"]
    assert jax.tree.structure(made) == jax.tree.structure(real)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(real), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_packed_caches_are_not_saved(decoder, tmp_path):
    module, variables = decoder
    q = qjax.quantize(module, KEEP, kv_cache="int8")
    packed = q.convert(variables, TOKENS[:, :1], mutable=["cache"])
    with pytest.raises(TypeError, match="'cache/layers/keys' is a packed key-value cache"):
        qjax.save(tmp_path / "model", q, packed)
    qjax.save(tmp_path / "model", q, {"params": packed["params"]})
    restored, _ = qjax.restore(tmp_path / "model", module)
    assert restored.recipe.kv_cache == q.recipe.kv_cache


def test_rules_that_do_nothing_are_errors(decoder):
    module, variables = decoder
    with pytest.raises(PlanError, match="matches no float state of this call, which has cache/layers/keys"):
        qjax.quantize(module, KEEP, kv_cache={"cache/**/cached_key": "int8"}).plan(
            variables, TOKENS[:, :1], mutable=["cache"]
        )
    with pytest.raises(TypeError, match="name of a format"):
        qjax.quantize(module, KEEP, kv_cache=8)
    q = qjax.quantize(module, KEEP, kv_cache="int8")
    with pytest.raises(TypeError, match="packed cache was passed where the model takes no state"):
        q.apply(variables, qcache.zeros(CACHE, jnp.float32, INT8, -1))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_linen_attention_with_its_own_cache(name: str):
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16, decode=True)
    x = normal(30, 2, 6, 16)
    variables = jax.jit(module.init)(jax.random.key(2), x)
    q = qjax.quantize(module, KEEP, kv_cache={"cache/cached_*": name})
    packed = q.convert(variables, x[:, :1], mutable=["cache"])
    step = jax.jit(partial(q.apply, mutable=["cache"]))
    p = variables["params"]
    floats, codes = dict(variables["cache"]), packed["cache"]
    for i in range(x.shape[1]):
        want, floats = step({"params": p, "cache": floats}, x[:, i : i + 1])
        got, codes = step({"params": p, "cache": codes}, x[:, i : i + 1])
        floats, codes = floats["cache"], codes["cache"]
        assert isinstance(floats["cached_key"], jax.Array)
        # half a step of any value, through the output's weights; and the weights' own change, as in the bound above
        steps = [float(codes[n].scale.max()) / 2 for n in ("cached_key", "cached_value")]
        query = np.einsum("bi,ihd->bhd", x[:, i], p["query"]["kernel"]) + np.asarray(p["query"]["bias"])
        delta = np.abs(query).sum(-1).max() * steps[0] / np.sqrt(8)
        through = np.abs(p["out"]["kernel"]).sum((0, 1)).max()
        bound = through * (steps[1] + np.expm1(2 * delta) * float(jnp.abs(floats["cached_value"]).max()))
        assert np.abs(got - want).max() <= bound
    assert codes["cache_index"] == x.shape[1]
    assert codes["cached_key"].nbytes == sum(a.nbytes for a in jax.tree.leaves(codes["cached_key"]))


class NNXStack(nnx.Module):
    """Two attention layers in an nnx.scan, each with the cache of nnx.MultiHeadAttention."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
            attention = nnx.MultiHeadAttention(2, 16, decode=True, rngs=rngs)
            attention.init_cache((2, LENGTH, 16))
            return attention

        self.layers = stack(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: nnx.MultiHeadAttention, x: jax.Array) -> jax.Array:
            return x + layer(x)

        return run(self.layers, x)


def test_nnx_modules_keep_their_caches_packed():
    x = normal(31, 2, 4, 16)
    q = qjax.quantize(NNXStack(nnx.Rngs(0)), KEEP, kv_cache="int8")
    packed = q.convert(x[:, :1])
    names = [entry.name for entry in q.plan(x[:, :1]).caches.quantized]
    assert names == ["layers/cached_key", "layers/cached_value"]
    step = nnx.jit(lambda model, x: model(x))
    for i in range(x.shape[1]):
        want, got = step(q, x[:, i : i + 1]), step(packed, x[:, i : i + 1])
        np.testing.assert_allclose(got, want, atol=0.05)
    key, reference = packed.model.layers.cached_key.get_value(), q.model.layers.cached_key.get_value()
    assert isinstance(key, QCache)
    assert key.codes.dtype == jnp.int8
    np.testing.assert_allclose(dequantize(key)[0], reference[0], atol=float(key.scale.max()) * 0.51)
    assert packed.model.layers.cache_index.get_value().tolist() == [4, 4]


def test_functions_take_packed_caches_as_arguments():
    def fn(params, cache, x, i):
        key = write_slice(cache["keys"], (x @ params["k"]).reshape(B, 1, H, D), i)
        scores = jnp.einsum("bhd,bshd->bhs", (x @ params["q"]).reshape(B, H, D), key)
        return scores, {"keys": key}

    params = {name: normal(i, 4, H * D) for i, name in enumerate("kq")}
    cache, x = {"keys": jnp.zeros(CACHE)}, normal(32, B, 4)
    q = qjax.quantize(fn, KEEP, kv_cache={"**/keys": "int8"})
    entry = q.plan(params, cache, x, 0).caches["0/keys"]
    scores, after = jax.jit(q.apply)(params, {"keys": entry.pack(cache["keys"])}, x, jnp.int32(5))
    want, floats = fn(params, cache, x, 5)
    assert isinstance(after["keys"], QCache)
    np.testing.assert_allclose(
        scores, want, atol=float(np.abs(x @ params["q"]).sum(-1).max() * after["keys"].scale.max())
    )
    assert jnp.abs(dequantize(after["keys"]) - floats["keys"]).max() <= after["keys"].scale.max() / 2 * 1.001


def test_bfloat16_models_read_codes_exactly():
    keys, new = normal(33, *CACHE, dtype=jnp.bfloat16), normal(34, *NEW, dtype=jnp.bfloat16)
    q, i = normal(35, B, 2 * H, D, dtype=jnp.bfloat16), jnp.int32(4)

    def fn(cache, new, q, i):
        cache = write_slice(cache, new, i)
        return attend(q, cache, cache, i), cache

    plan, _, (out, after) = packed_run(fn, INT8, keys, new, q, i)
    assert plan["cache"].dtype == "bfloat16"
    assert out.dtype == jnp.bfloat16
    assert dequantize(after).dtype == jnp.bfloat16
    want = attended(q, value(after), value(after), i)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.03)
