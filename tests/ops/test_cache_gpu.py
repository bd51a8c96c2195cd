"""The kernel for attention on packed caches on NVIDIA GPUs, interpreted, against float64; where it is used.

`test_gpu_compile` compiles it. What the kernel must not read is NaN here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import gpu_check_attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_cache_attention import (
    attended,
    check_a_program,
    check_layers,
    grouped,
    keys_transposed,
    linen,
    nnx_grouped,
    of_jax,
    packed,
)
from test_cache_dot import _QUICK, array, value

from qjax.pallas_kernels.backends import triton
from qjax.pallas_kernels.chips.gpu import target_chip
from qjax.pallas_kernels.numbers.formats import FORMATS
from qjax.pallas_kernels.ops.cache_attention import reference as cache_attention_reference
from qjax.pallas_kernels.ops.cache_attention import triton as cache_attention_triton
from qjax.pallas_kernels.ops.cache_attention.api import cache_attention
from qjax.pallas_kernels.ops.cache_attention.reference import AttentionSpec, CacheDot
from qjax.pallas_kernels.ops.cache_attention.triton import Blocks
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.qcache import CacheSpec, QCache
from qjax.passes.plan import attention

pytestmark = pytest.mark.usefixtures("compile_quickly")

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


# Arguments of `check_a_program`, and how it is cut.
CASES: list[tuple[Any, str, str, bool, int, int, int, int, int, Blocks | None]] = [
    (linen, "int8", "int8", False, 1, 300, 4, 4, 128, None),
    (nnx_grouped, "int4", "int4", True, 3, 100, 2, 2, 64, Blocks(16, 16, 3, 4, 2)),
    (of_jax, "int8", "int4", False, 2, 140, 6, 2, 80, Blocks(16, 32, 2, 4, 2)),
    (grouped, "int8", "int8", True, 5, 90, 16, 4, 128, Blocks(16, 32, 1, 4, 2)),
    (keys_transposed, "int4", "int2", False, 1, 130, 2, 2, 32, Blocks(16, 32, 4, 4, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (case[0].__name__, *case[1:-1]))))
def test_the_kernel_attends_as_float64_does(case: Any, monkeypatch: pytest.MonkeyPatch):
    *program, blocks = case
    interpreted = functools.partial(cache_attention_triton.attention, blocks=blocks, interpret=True)
    monkeypatch.setattr(attention, "cache_attention", interpreted)
    check_a_program(*program)


# --- Operands ----------------------------------------------------------------------------------------------------


def spec_of(fill: float | None, dtype: Any = F32, precision: Any = None, scale: float = 1.0) -> AttentionSpec:
    """Of q (B, H, M, D) and caches (B, T, H, D)."""
    heads = ((0, 1), (0, 2))
    scores = CacheDot((((3,), (3,)), heads), 1, precision, jnp.dtype(F32))
    result = CacheDot((((3,), (1,)), heads), 1, precision, jnp.dtype(dtype))
    steps: Any = (("multiply", scale), *([] if fill is None else [("mask", fill)]))
    return AttentionSpec(scores, (0, 1, 2, 3), steps, jnp.dtype(dtype), result)


def run(
    spec: AttentionSpec, q: Any, keys: QCache, values: QCache, mask: Any, blocks: Blocks | None = None
) -> np.ndarray:
    attend = functools.partial(cache_attention_triton.attention, spec=spec, blocks=blocks, interpret=True)
    out = jax.jit(attend, compiler_options=_QUICK)(q, keys, values, mask)
    assert out.dtype == spec.result.out_dtype
    return np.asarray(out, np.float64)


def expected(q: Any, keys: QCache, values: QCache, mask: Any, scale: float) -> np.ndarray:
    """In float64, of q (B, H, M, D) and a mask (B, M, T)."""
    want, _ = attended(np.asarray(q, np.float64).transpose(0, 2, 1, 3), value(keys), value(values), mask, scale)
    return want.transpose(0, 2, 1, 3)


@pytest.mark.parametrize(("precision", "error"), [(None, 3e-5), (lax.Precision.HIGHEST, 1e-6)])
def test_wide_numbers_are_sums_of_bfloat16(precision: Any, error: float):
    """Two of them by default, which is better than TF32, and three where all of float32 is asked for."""
    keys, values = (packed(seed, "int8", False, 1, 50, 2, 64) for seed in (4, 5))
    q = array(6, 1, 2, 3, 64)
    got = run(spec_of(None, precision=precision, scale=0.125), q, keys, values, None)
    want = expected(q, keys, values, np.ones((1, 3, 50), bool), 0.125)
    assert np.linalg.norm(got - want) < error * np.linalg.norm(want)


def test_float16_is_multiplied_as_it_is():
    keys, values = (packed(seed, "int4", False, 1, 50, 2, 64, dtype=F16) for seed in (4, 5))
    q = array(6, 1, 2, 3, 64, dtype=F16)
    got = run(spec_of(None, dtype=F16, scale=0.125), q, keys, values, None)
    want = expected(q, keys, values, np.ones((1, 3, 50), bool), 0.125)
    assert np.linalg.norm(got - want) < float(jnp.finfo(F16).eps) * np.linalg.norm(want)


def test_layers_are_read_in_their_stacks():
    check_layers(cache_attention_triton.attention, spec_of(-1e9))


# --- Positions that no query sees ----------------------------------------------------------------------------------


def window(t: int, low: int, high: int) -> jax.Array:
    return (jnp.arange(t) >= low) & (jnp.arange(t) < high)


@pytest.mark.parametrize("fill", [-1e9, -np.inf])
@pytest.mark.parametrize("of_head", [False, True])
def test_what_no_query_sees_is_not_read(fill: float, of_head: bool):
    """Where that is whole tiles, before and after what is seen, of each sequence its own; masks for heads, too."""
    keys, values = packed(7, "int8", True, 2, 300, 2, 32), packed(8, "int4", False, 2, 300, 2, 32)
    q = array(9, 2, 2, 2, 32)
    seen = jnp.stack([window(300, 100, 180), window(300, 3, 40)])
    mask = jnp.broadcast_to(seen[:, None, None], (2, 2 if of_head else 1, 1, 300))
    want = expected(q, keys, values, np.broadcast_to(np.asarray(seen)[:, None], (2, 2, 300)), 1.0)
    near = jnp.stack([window(300, 96, 192), window(300, 0, 64)])[..., None]  # tiles of 32 positions
    keys, values = (dataclasses.replace(c, scale=jnp.where(near, c.scale, jnp.nan)) for c in (keys, values))
    got = run(spec_of(fill), q, keys, values, mask, Blocks(16, 32, 2, 4, 2))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_number_that_is_not_far_below_all_scores_hides_nothing():
    cache, q = packed(7, "int8", False, 2, 100, 2, 32), array(9, 2, 2, 2, 32)
    mask = jnp.broadcast_to(window(100, 10, 40), (2, 1, 1, 100))
    got = run(spec_of(-3.0), q, cache, cache, mask, Blocks(16, 32, 2, 4, 2))
    want = cache_attention_reference.attention(q, cache, cache, mask, spec_of(-3.0, precision=lax.Precision.HIGHEST))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fill", [-1e9, -np.inf])
def test_a_query_that_sees_nothing(fill: float):
    """A softmax of equal numbers has equal weights, and one of -inf is NaN, as in the reference."""
    cache = packed(10, "int8", False, 2, 70, 2, 32)
    q = array(11, 2, 2, 3, 32)
    mask = jnp.broadcast_to(window(70, 10, 40), (2, 1, 3, 70)).at[1, 0, 2].set(False)
    got = run(spec_of(fill), q, cache, cache, mask, Blocks(16, 16, 3, 4, 2))
    want = expected(q, cache, cache, np.broadcast_to(np.asarray(window(70, 10, 40)), (2, 3, 70)), 1.0)
    nothing = value(cache)[1].mean(axis=0) if fill > -np.inf else np.full((2, 32), np.nan)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1, :, :2], want[1, :, :2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[1, :, 2], nothing, rtol=1e-4, atol=1e-4)


# --- Where it is used ----------------------------------------------------------------------------------------------


def shapes(format: str = "int8", d: int = 128, t: int = 64, dtype: Any = BF16) -> tuple[Any, QCache]:
    cache = jax.eval_shape(lambda: qcache.zeros((2, t, 4, d), BF16, CacheSpec(FORMATS[format]), -1))
    return jax.ShapeDtypeStruct((2, 4, 1, d), dtype), cache


def test_what_is_left_to_the_reference_has_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton, "finds_device", lambda: True)
    spec = spec_of(-1e9)
    q, cache = shapes()
    assert "target_chip" in (cache_attention_triton.unsupported(q, cache, cache, spec) or "")
    with target_chip("a100"):
        assert cache_attention_triton.unsupported(q, cache, cache, spec) is None
        for reason, operands in (
            ("2, 4 and 8 bits", shapes("int3")),
            ("2, 4 and 8 bits", shapes("fp8_e4m3")),
            ("at most 256", shapes(d=512)),
            ("empty", shapes(t=0)),
            ("between 2 and 4 GiB", shapes(t=2**21 + 1)),
            ("multiplies", shapes(dtype=jnp.float8_e4m3fn)),
        ):
            q, cache = operands
            assert reason in (cache_attention_triton.unsupported(q, cache, cache, spec) or "")
        q, cache = shapes()
        swapped = AttentionSpec(spec.scores, (0, 1, 3, 2), spec.steps, spec.weights, spec.result)
        assert "one axis of positions" in (cache_attention_triton.unsupported(q, cache, cache, swapped) or "")
        monkeypatch.setattr(triton, "finds_device", lambda: False)
        assert "use_abstract_mesh" in (cache_attention_triton.unsupported(q, cache, cache, spec) or "")


def test_on_this_machine_it_is_the_reference():
    cache, q = packed(12, "int8", False, 1, 20, 2, 16), array(13, 1, 2, 1, 16)
    mask = jnp.ones((1, 1, 1, 20), bool)
    with target_chip("h100"):
        got = cache_attention(q, cache, cache, mask, spec_of(-1e9))
    assert (
        got
        == jax.jit(functools.partial(cache_attention_reference.attention, spec=spec_of(-1e9)))(q, cache, cache, mask)
    ).all()


# --- The check on a GPU ----------------------------------------------------------------------------------------------


def test_the_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch):
    case = gpu_check_attention.AttentionCheck("int4", 1, 2, 40, 32, zero_point=True)
    attend = cache_attention_triton.attention
    assert gpu_check_attention.attention(True, **dataclasses.asdict(case))["right"]
    monkeypatch.setattr(cache_attention_triton, "attention", lambda *args, **how: 1.02 * attend(*args, **how))
    assert not gpu_check_attention.attention(True, **dataclasses.asdict(case))["right"]


def test_the_page_says_how_fast_attention_is():
    seconds, sizes = {"bfloat16": 90e-6, "int8": 50e-6}, {"bfloat16": 268e6, "int8": 138e6}
    timed = {"filled": 1024, "t": 8192, "seconds": seconds, "bytes": sizes, "errors": {"int4": "crashed"}}
    checked = {"right": False, "same_again": True, "largest": 3.0, "relative": 0.01, "eps": 0.01}
    found = {"time_attention": [{"result": timed}], "experts": [{"result": checked, "options": {"format": "int4"}}]}
    page = gpu_check_attention.page(lambda kind: found.get(kind, []))
    assert "| 1024 | 8192 | 90.0 | 0.37 | 50.0 | 0.34 | 1.80x | failed |  |  |" in page
    assert "| experts: format int4 | **wrong** | 3.000 | 1.00 eps | yes |" in page
