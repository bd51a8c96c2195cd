"""Products with packed key-value caches: both lowerings against float64 NumPy on what the packed bytes say.

The TPU kernel is interpreted on CPU (`test_tpu_compile` compiles it). There, what lies beyond the edge of an array is
NaN, or the lowest integer: what leaks into a result shows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax.pallas_kernels.numbers.formats import FORMATS
from qjax.pallas_kernels.ops.cache_dot import reference as cache_dot_reference
from qjax.pallas_kernels.ops.cache_dot import tpu as cache_dot_tpu
from qjax.pallas_kernels.ops.cache_dot.api import cache_dot_general
from qjax.pallas_kernels.packed import qcache
from qjax.pallas_kernels.packed.qcache import CacheSpec, QCache

pytestmark = pytest.mark.usefixtures("compile_quickly")

BF16, F32 = jnp.bfloat16, jnp.float32
# Each program runs once. Excess precision would drop the rounding to bfloat16 that an interpreted kernel asks for.
_QUICK = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


def array(seed: int, *shape: int, dtype: Any = F32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def packed(x: jax.Array, spec: CacheSpec, axis: int) -> QCache:
    return qcache.quantize(x + 0.3, spec, axis)


def value(cache: QCache) -> np.ndarray:
    """The float value of an integer cache, in float64, from its bytes alone."""
    words, bits = np.moveaxis(np.asarray(cache.codes), cache.axis, -1), cache.spec.format.bits
    if bits == 8:
        codes = words.astype(np.int64)
    else:
        fields = words[..., None].view(np.uint32) >> (bits * np.arange(32 // bits, dtype=np.uint32))
        codes = (fields & (2**bits - 1)).astype(np.int64).reshape(*words.shape[:-1], -1)[..., : cache.size]
        codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    zero = 0 if cache.zero is None else np.asarray(cache.zero, np.float64)[..., None]
    scale = np.asarray(cache.scale.astype(F32), np.float64)[..., None]
    return np.moveaxis((codes - zero) * scale, -1, cache.axis)


def numbers(x: str, cache: str, out: str) -> tuple[Any, str]:
    """Dimension numbers of an einsum of x and a cache, in this order, and its result as `lax.dot_general` gives it."""
    contract = [a for a in x if a in cache and a not in out]
    batch = [a for a in x if a in cache and a in out]
    own = tuple(tuple(tuple(s.index(a) for a in axes) for s in (x, cache)) for axes in (contract, batch))
    rest = [a for s in (x, cache) for a in s if a not in (*contract, *batch)]
    return own, "".join([*batch, *rest])


def product(x: jax.Array, cache: QCache, spec: str, kernel: bool, **options: Any) -> tuple[jax.Array, str]:
    """`einsum(spec, x, cache)` by the kernel, interpreted, or by the reference; and the axes of the result."""
    left, right, out = (part.strip() for part in spec.replace("->", ",").split(","))
    own, order = numbers(left, right, out)
    options = {"numbers": own, "operand": 1, "precision": None, "out_dtype": jnp.dtype(x.dtype), **options}
    if kernel:
        assert cache_dot_tpu.unsupported(x, cache, **options) is None
        fn = functools.partial(cache_dot_tpu.dot_general, interpret=True, **options)
    else:
        fn = functools.partial(cache_dot_reference.dot, **options)
    return jax.jit(fn, compiler_options=_QUICK)(x, cache), order


def assert_product(actual: jax.Array, order: str, spec: str, x: Any, cache: QCache, x_eps: float) -> None:
    """Within the rounding of float32 sums and of the result, and of what is multiplied up to `x_eps`.

    With a zero point, sums of codes and of zero points are each larger than their difference.
    """
    x64, c64 = np.asarray(x.astype(F32), np.float64), value(cache)
    to = f"{spec.split('->')[0]}->{order}"
    expected, size = np.einsum(to, x64, c64), np.einsum(to, np.abs(x64), np.abs(c64))
    if cache.zero is not None:
        step = np.expand_dims(np.asarray(cache.scale.astype(F32), np.float64), cache.axis)
        size = size + np.einsum(to, np.abs(x64), 2.0**cache.spec.format.bits * np.broadcast_to(step, c64.shape))
    bound = (x_eps + 2e-6) * size + float(jnp.finfo(actual.dtype).eps) * np.abs(expected) + 1e-30
    assert actual.shape == expected.shape
    np.testing.assert_array_less(np.abs(np.asarray(actual.astype(F32), np.float64) - expected), bound)


SIZES = {"b": 2, "g": 3, "q": 2}
# Format, zero point, dtype of scales; how the cache is stored, positions, heads, dim; scores, then values.
CASES: list[tuple[str, bool, str, str, int, int, int, str, str]] = [
    # heads by fours in a lane
    ("int8", True, "float32", "bthd", 300, 8, 128, "bhgd,bthd->bhgt", "bhgt,bthd->bhgd"),
    ("int8", False, "bfloat16", "bthd", 256, 4, 128, "bqhgd,bthd->bhqgt", "bhqgt,bthd->bhqgd"),
    ("int8", False, "float32", "bthd", 130, 8, 256, "bhgd,bthd->bhgt", "bhgt,bthd->bhgd"),
    # positions in rows
    ("int8", True, "float16", "bthd", 300, 2, 128, "bhgd,bthd->bhgt", "bhgt,bthd->bhgd"),
    ("int8", False, "float32", "bhtd", 100, 3, 128, "bhgd,bhtd->bhgt", "bhgt,bhtd->bhgd"),
    # positions in lanes
    ("int8", False, "float32", "bthd", 200, 2, 64, "bhgd,bthd->bhgt", "bhgt,bthd->bhgd"),
    ("int8", True, "float32", "bhdt", 130, 2, 128, "bhgd,bhdt->bhgt", "bhgt,bhdt->bhgd"),
    ("int4", True, "float32", "bthd", 300, 4, 64, "hbgd,bthd->hbgt", "gbht,bthd->bhgd"),
    ("int4", False, "bfloat16", "hbtd", 256, 2, 128, "bhgd,hbtd->bhgt", "bhgt,hbtd->bhgd"),
    ("int2", True, "float32", "bdth", 200, 2, 128, "bhgd,bdth->bhgt", "bhgt,bdth->bhgd"),
    ("int4", False, "float32", "btd", 130, 1, 128, "bgd,btd->bgt", "bgt,btd->bgd"),
    ("int4", True, "float32", "td", 130, 1, 64, "gd,td->gt", "gt,td->gd"),
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of positions, and of rows of x, at sizes that are quick."""
    monkeypatch.setattr(cache_dot_tpu, "_TILE", 1)
    monkeypatch.setattr(cache_dot_tpu, "_MOST_ROWS", 2)


@pytest.mark.parametrize("kind", ["scores", "values"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:7])))
def test_products_are_those_of_float64(case: Any, kind: str, small_tiles: None):
    format, zero_point, scale, stored, t, h, d, *specs = case
    sizes = {**SIZES, "t": t, "h": h, "d": d}
    spec = specs[kind == "values"]
    cache = packed(
        array(1, *(sizes[a] for a in stored)), CacheSpec(FORMATS[format], zero_point, scale), stored.index("d")
    )
    x = array(2, *(sizes[a] for a in spec.split(",")[0]), dtype=BF16)
    eps = float(jnp.finfo(BF16).eps) if kind == "values" else 0.0  # x times a scale is rounded to bfloat16
    for kernel in (True, False):
        out, order = product(x, cache, spec, kernel, out_dtype=jnp.dtype(F32))
        assert_product(out, order, spec, x, cache, eps)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_float32_at_its_own_precision_and_float16(dtype: str):
    """Nothing but sums is rounded."""
    cache, x = packed(array(3, 2, 140, 2, 64), CacheSpec(FORMATS["int4"]), -1), array(4, 2, 2, 3, 64, dtype=dtype)
    out, order = product(x, cache, "bhgd,bthd->bhgt", True, precision=lax.Precision.HIGHEST)
    assert out.dtype == dtype
    assert_product(out, order, "bhgd,bthd->bhgt", x, cache, 0.0)


def test_float32_at_default_precision_is_one_pass_of_bfloat16():
    cache, x = packed(array(3, 2, 140, 2, 64), CacheSpec(FORMATS["int8"]), -1), array(4, 2, 2, 3, 64)
    out, order = product(x, cache, "bhgd,bthd->bhgt", True)
    assert_product(out, order, "bhgd,bthd->bhgt", x.astype(BF16), cache, 0.0)


def test_what_was_never_written_gives_zeros():
    """As in a cache of zeros: its scales are zero too."""
    cache = qcache.zeros((2, 200, 4, 128), F32, CacheSpec(FORMATS["int8"], zero_point=True), -1)
    for spec in ("bhgd,bthd->bhgt", "bhgt,bthd->bhgd"):
        x = array(5, 2, 4, 2, 128 if spec.endswith("t") else 200)
        assert not np.asarray(product(x, cache, spec, True)[0]).any()


def test_what_is_left_to_plain_operations():
    spec = CacheSpec(FORMATS["int4"])
    x = jax.ShapeDtypeStruct((2, 4, 1, 128), BF16)
    options: dict[str, Any] = {"numbers": (((3,), (3,)), ((0, 1), (0, 2))), "operand": 1, "precision": None}

    def why(x: Any, spec: CacheSpec, shape: tuple[int, ...], out_dtype: Any = BF16) -> str:
        cache = jax.eval_shape(lambda: qcache.zeros(shape, F32, spec, -1))
        return str(cache_dot_tpu.unsupported(x, cache, out_dtype=jnp.dtype(out_dtype), **options))

    assert why(x, spec, (2, 16, 4, 128)) == "None"
    assert why(x, CacheSpec(FORMATS["int3"]), (2, 16, 4, 128)) == "the kernel reads integers of 2, 4 and 8 bits"
    assert why(x, CacheSpec(FORMATS["fp8_e4m3"]), (2, 16, 4, 128)) == "the kernel reads integers of 2, 4 and 8 bits"
    assert why(x, spec, (2, 16, 4, 128), jnp.int32) == "the kernel multiplies float32, bfloat16 and float16"
    assert why(jax.ShapeDtypeStruct((2, 4, 1, 80), BF16), spec, (2, 16, 4, 80)) == "vectors do not fill whole registers"
    assert why(jax.ShapeDtypeStruct((2, 4, 0, 128), BF16), spec, (2, 16, 4, 128)) == "empty"


def test_a_dot_that_cuts_vectors_is_refused():
    cache = qcache.zeros((2, 16, 4, 128), F32, CacheSpec(FORMATS["int8"]), -1)
    with pytest.raises(ValueError, match=r"contracts the vectors of QCache\(int8/vector, .*alone"):
        cache_dot_general(jnp.ones((2, 4)), cache, (((0, 1), (0, 2)), ((), ())), operand=1, out_dtype=F32)


# --- Transformations -----------------------------------------------------------------------------------------------

SCORES, VALUES = "bhgd,bthd->bhgt", "bhgt,bthd->bhgd"


@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("batched", ["x", "cache", "both"])
def test_vmap(batched: str, operand: Any):
    """Of x along its last axis, of the cache along its second, as one product for all."""
    cache = packed(array(6, 2, 3, 20, 2, 16), CacheSpec(FORMATS["int4"], zero_point=True), -1)
    contract, batch = ((3,), (3,)), ((0, 1), (0, 2))
    own: Any = (contract, batch if operand == 1 else batch[::-1])

    def dot(x: jax.Array, cache: QCache) -> jax.Array:
        return cache_dot_general(x, cache, own, operand=operand, out_dtype=F32)

    whole = jax.tree.map(lambda a: a[:, 0], cache) if batched == "x" else cache
    x = array(7, 2, 2, 4, 16, 3) if batched != "cache" else array(7, 2, 2, 4, 16)
    axes = (None if batched == "cache" else 4, None if batched == "x" else 1)
    mapped = jax.vmap(dot, in_axes=axes, out_axes=1)
    text = str(jax.make_jaxpr(mapped)(x, whole))
    assert text.count("cache_dot_general[") == 1
    out = jax.jit(mapped)(x, whole)
    each = [x if batched == "cache" else x[..., i] for i in range(3)]
    caches = [whole if batched == "x" else jax.tree.map(lambda a, i=i: a[:, i], cache) for i in range(3)]
    for i in range(3):
        np.testing.assert_allclose(out[:, i], dot(each[i], caches[i]), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_plain_operations():
    """In x and in the scales, as of the dequantized cache."""
    cache = packed(array(8, 2, 20, 2, 16), CacheSpec(FORMATS["int8"]), -1)
    x, target = array(9, 2, 2, 3, 16), array(10, 2, 2, 3, 20)
    own: Any = numbers("bhgd", "bthd", "bhgt")[0]

    def loss(x: jax.Array, scale: jax.Array, packed: bool) -> jax.Array:
        given = QCache(cache.codes, scale, None, cache.spec, cache.axis, cache.size, cache.dtype)
        if packed:
            out = cache_dot_general(x, given, own, operand=1, out_dtype=F32)
        else:
            out = lax.dot_general(x, qcache.dequantize(given), own)
        return jnp.sum(jnp.sin(out) * target)

    got, want = (jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, cache.scale, flag) for flag in (True, False))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_programs_with_symbolic_sizes_are_exported_for_tpu():
    """There the kernel has no sizes to be made for, and plain operations stand in."""
    spec = CacheSpec(FORMATS["int8"])
    t = jax.export.symbolic_shape("t")[0]

    def shapes(t: Any) -> tuple[Any, QCache]:
        codes, scale = jax.ShapeDtypeStruct((1, t, 4, 128), jnp.int8), jax.ShapeDtypeStruct((1, t, 4), F32)
        return jax.ShapeDtypeStruct((1, 4, 2, 128), BF16), QCache(codes, scale, None, spec, -1, 128, jnp.dtype(F32))

    def scores(x: jax.Array, cache: QCache) -> jax.Array:
        return cache_dot_general(x, cache, numbers("bhgd", "bthd", "bhgt")[0], operand=1, out_dtype=BF16)

    for size, kernel in ((256, True), (t, False)):
        exported = jax.export.export(jax.jit(scores), platforms=("cpu", "tpu"))(*shapes(size))
        assert ("tpu_custom_call" in exported.mlir_module()) == kernel
