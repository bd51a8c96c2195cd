"""The TPU kernel of `quantized_matmul`, interpreted on CPU, against float64 NumPy; `test_tpu_compile` compiles it.

Where Pallas runs a kernel with XLA operations, what lies beyond the edge of an array is NaN, or the lowest integer:
what leaks into a result shows.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from qjax.pallas_kernels.backends import tpu_tile
from qjax.pallas_kernels.chips.tpu import target_chip
from qjax.pallas_kernels.numbers import numerics, packing, stored_scales
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, Format, PerChannel, PerGroup, PerTensor, QuantSpec
from qjax.pallas_kernels.numbers.packing import PLANES
from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu_tiles as matmul_tpu_tiles
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.ops.matmul.tpu_tiles import Blocks
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

pytestmark = pytest.mark.usefixtures("compile_quickly")

BF16, F32 = jnp.bfloat16, jnp.float32
# Each program runs once. Excess precision would drop the rounding to bfloat16 that an interpreted kernel asks for.
_QUICK = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


def _spec(name: str, granularity: Any, **options: Any) -> QuantSpec:
    return QuantSpec(FORMATS[name], granularity, scale_rule=AbsMax(), **options)


def _array(*shape: int, dtype: Any = F32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


def _layout(k: int, n: int) -> Layout:
    return Layout((((k, "k"),), ((n, "n"),)))


def _pack(spec: QuantSpec, *stack: int, k: int, n: int, order: Any = "kn", dtype: Any = F32) -> QTensor:
    packed = jax.jit(lambda w: quantize(w, spec, _layout(k, n), order), compiler_options=_QUICK)
    return packed(_array(*stack, k, n, dtype=dtype))


def _product(x: jax.Array, w: QTensor, **options: Any) -> jax.Array:
    """What the kernel gives, interpreted; options are those of `matmul_tpu.matmul`."""
    defaults = {"layer": None, "casts": (), "precision": None, "preferred_element_type": None, "transpose": False}
    options = {**defaults, "interpret": True, **options}
    casts, preferred = options["casts"], options["preferred_element_type"]
    out_dtype = jnp.dtype(preferred or jnp.promote_types(x.dtype, casts[-1] if casts else w.dtype))
    assert matmul_tpu.unsupported(x, w, casts, out_dtype) is None
    out = matmul_tpu.matmul(x, w, **options)
    assert out.dtype == out_dtype
    return out


def _run(x: jax.Array, w: QTensor, **options: Any) -> jax.Array:
    return jax.jit(lambda x, w: _product(x, w, **options), compiler_options=_QUICK)(x, w)


def assert_product(actual: jax.Array, x: jax.Array, m: Any, weight_eps: float = 0.0) -> None:
    """Within the rounding of float32 sums and of the result, and of weights that are only known up to `weight_eps`.

    One wrong term of a sum is about a K-th of the sum of magnitudes: far more, at the sizes of these tests.
    """
    x64, m64 = np.asarray(x, np.float64), np.asarray(m, np.float64)
    expected, size = x64 @ m64, np.abs(x64) @ np.abs(m64)
    sums = 4 * np.sqrt(x64.shape[-1]) * float(jnp.finfo(F32).eps)
    bound = (sums + weight_eps) * size + float(jnp.finfo(actual.dtype).eps) * np.abs(expected) + 1e-30
    assert actual.shape == expected.shape
    np.testing.assert_array_less(np.abs(np.asarray(actual, np.float64) - expected), bound)


def _multiplied(w: QTensor, position: str, rounded_first: bool = False) -> np.ndarray:
    """The matrix that a bfloat16 product stands for: rounded before the product, or exact codes scaled after it.

    The values of a codebook are rounded to bfloat16 where scales come after, or where they are `rounded_first`.
    """
    if position == "before" and not rounded_first:
        return np.asarray(jax.jit(lambda w: w.matrix().astype(BF16), compiler_options=_QUICK)(w), np.float64)
    group = np.arange(w.layout.k) // w.group_size

    def parts(w: QTensor) -> tuple[Any, ...]:
        words, scales = w.matrix_arrays()
        values = numerics.decode_codes(packing.unpack(words, w.spec.format, w.layout.k), w.spec.format).astype(BF16)
        return (
            values,
            jnp.zeros(()) if scales.zero is None else scales.zero[..., group, :],
            stored_scales.resolve_scales(scales),
        )

    values, zero, scale = (np.asarray(a, np.float64) for a in jax.jit(parts, compiler_options=_QUICK)(w))
    matrix = (values - zero) * scale[..., group, :]
    return np.float64(np.float32(matrix).astype(BF16)) if rounded_first else matrix


# --- Tiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "k"),
    [(f, k) for f in FORMATS.values() for k in (512, 300) if k == 300 or len(PLANES.get(f.bits, ())) > 1],
    ids=str,
)
def test_a_tile_has_the_codes_that_unpack_gives(format: Format, k: int):
    """Two tiles of K; with K = 300 the planes of 3-, 5-, 6- and 7-bit formats start within a register."""
    n, bk = 128, 256
    codes = np.random.default_rng(0).integers(0, 2**format.bits, (k, n))
    codes = jnp.asarray(codes if format.kind == "codebook" else codes - 2 ** (format.bits - 1), jnp.int8)
    words, windows = packing.pack(codes, format), tpu_tile.windows(format, k, bk)
    expected = codes if format.kind == "int" else numerics.decode_codes(codes, format)

    dtypes = (jnp.int8, BF16) if format.kind == "int" else (BF16, F32)

    def kernel(*refs: Any) -> None:
        tile = tpu_tile.load(refs[:-2], format, k, bk, pl.program_id(0))
        for out in refs[-2:]:
            out[...] = tpu_tile.codes(tile, format, out.dtype)

    outs = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((k, n), dtype) for dtype in dtypes],
        grid=(2,),
        in_specs=[pl.BlockSpec((w.rows, n), lambda i, w=w: (w.first + w.step * i, 0)) for w in windows],
        out_specs=[pl.BlockSpec((bk, n), lambda i: (i, 0))] * 2,
        interpret=True,
    )(*[words] * len(windows))
    for out in outs:
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(expected.astype(out.dtype), np.float32))


BIASED = [
    (_spec("int4", PerGroup(128)), "kn"),
    (_spec("int4", PerGroup(64), zero_point=True), "kn"),
    (_spec("int4", PerGroup(256)), "nk"),
    (_spec("int4", PerChannel()), "kn"),
    (_spec("int3", PerGroup(128), zero_point=True), "kn"),
]


@pytest.mark.parametrize(("spec", "order"), BIASED, ids=str)
def test_codes_with_a_bias(spec: QuantSpec, order: str):
    """On v5e sums are of `code + 136`: exact but for the digits that float32 loses to the bias."""
    k, n = 1200, 130
    x, w = (_array(7, k) ** 5).astype(BF16), _pack(spec, k=k, n=n, order=order)  # of all magnitudes, or sums are exact
    blocks = Blocks(16, 128, 512, "after")
    with target_chip("v5e"):
        actual = _run(x, w, blocks=blocks, preferred_element_type=F32)
    plain = _run(x, w, blocks=blocks, preferred_element_type=F32)
    assert (np.asarray(actual) != np.asarray(plain)).any()  # or there is no bias

    exact, x64 = _multiplied(w, "after"), np.asarray(x, np.float64)
    _, scales = w.matrix_arrays()
    biased = (2 * 8 + tpu_tile.BIAS) * np.repeat(np.asarray(scales.values, np.float64), w.group_size, axis=0)[:k]
    rounding = float(jnp.finfo(F32).eps) * np.sqrt(k) * (np.abs(x64) @ biased)
    np.testing.assert_array_less(np.abs(np.asarray(actual) - x64 @ exact), rounding)
    assert rounding.max() < 2e-3 * (np.abs(x64) @ np.abs(exact)).max()  # a quarter of bfloat16's


DEEP = [
    (8, _spec("int4", PerGroup(128)), "kn", "after"),
    (16, _spec("int4", PerGroup(128), zero_point=True), "nk", "after"),
    (8, _spec("int3", PerGroup(64), zero_point=True), "kn", "after"),
    (16, _spec("int4", PerGroup(32)), "kn", "after"),
    (8, _spec("int8", PerChannel(), zero_point=True), "nk", "after"),
    (16, _spec("int8", PerGroup(64), scale_dtype="bfloat16", zero_point=True), "kn", "before"),
    (16, _spec("int4", PerGroup(32), scale_dtype="bfloat16"), "kn", "before"),
    (8, _spec("nf4", PerGroup(64)), "kn", "after"),
    (16, _spec("fp4_e2m1", PerGroup(32)), "nk", "after"),
    (16, _spec("nf4", PerChannel()), "kn", "after"),
    (16, _spec("nf4", PerGroup(64), scale_dtype="bfloat16"), "kn", "before"),
    (16, _spec("nf4", PerGroup(32), double_quant=True), "kn", "before"),
    (16, _spec("nf4", PerGroup(128), scale_dtype="bfloat16"), "nk", "before"),
    (16, _spec("fp4_e2m1", PerGroup(16)), "kn", "before"),
    (16, _spec("nf4", PerGroup(256)), "kn", "before"),
]


@pytest.mark.parametrize(("m", "spec", "order", "position"), DEEP, ids=str)
def test_a_deep_matrix_unit(m: int, spec: QuantSpec, order: str, position: Any):
    """On v6e groups go through the matrix unit side by side, tiles in parts, and codebooks are gathered as bytes."""
    k, n = 700, 130
    x, w = _array(m, k, dtype=BF16), _pack(spec, k=k, n=n, order=order)
    with target_chip("v6e"):
        out = _run(x, w, blocks=Blocks(m, 128, 512, position), preferred_element_type=F32)
    rounded_first = bool(spec.format.values) and position == "before" and w.group_size > 16
    assert_product(out, x, _multiplied(w, position, rounded_first))


@pytest.mark.parametrize(
    "spec", [_spec(f, g) for f in FORMATS for g in (PerChannel(), PerGroup(32), PerGroup(768))], ids=str
)
@pytest.mark.parametrize("m", [1, 17, 300, 5000])
def test_default_blocks(spec: QuantSpec, m: int):
    """Tiles that a kernel can have, for sizes from one value to a large model's."""
    for k, n, form in itertools.product((1, 100, 4096, 11000, 28672), (1, 130, 8192), ((BF16, "kn"), (F32, "nk"))):
        dtype, order = form
        blocks = matmul_tpu_tiles.default_blocks(m, k, n, spec, dtype, order)
        assert (
            blocks is not None and (blocks.m == 8 or blocks.m % 16 == 0) and blocks.n % 128 == 0 and blocks.k % 256 == 0
        )
        group = spec.group_size(k)
        assert group == k or blocks.k % group == 0 or group % blocks.k == 0
        # twice the words, x, sums and result of a tile
        held = 2 * blocks.k * blocks.n * spec.format.bits / 8 + 2 * blocks.m * blocks.k * jnp.dtype(dtype).itemsize
        assert held + 3 * blocks.m * blocks.n * 4 < 16 * 2**20


# --- The product -----------------------------------------------------------------------------------------------


def test_a_tile_of_groups_that_no_smaller_one_holds():
    w, x = _pack(_spec("int4", PerGroup(40)), k=1300, n=130), _array(19, 1300, dtype=BF16)
    out = _run(x, w, casts=(BF16,), preferred_element_type=F32, blocks=Blocks(16, 128, 1280, "before"))
    assert_product(out, x, _multiplied(w, "before"))


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_group_of_several_tiles(position: Any):
    w, x = _pack(_spec("int4", PerGroup(512), zero_point=True), k=600, n=64), _array(5, 600, dtype=BF16)
    out = _run(x, w, preferred_element_type=F32, blocks=Blocks(16, 128, 256, position))
    assert_product(out, x, _multiplied(w, position))


@pytest.mark.parametrize(("m", "position"), [(1, "after"), (600, "before")])
def test_default_schedules(m: int, position: str):
    spec = _spec("int4", PerGroup(64))
    w, x = _pack(spec, k=500, n=200), _array(m, 500, dtype=BF16)
    blocks = matmul_tpu_tiles.default_blocks(m, 500, 200, spec, BF16)
    assert blocks is not None and blocks.scale == position
    out = _run(x, w, casts=(BF16,))
    assert out.dtype == BF16
    assert_product(out, x, _multiplied(w, position))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    m=st.sampled_from([1, 3, 17, 33]),
    k=st.sampled_from([1, 7, 31, 100, 129, 255, 257, 1000]),
    n=st.sampled_from([1, 10, 127, 129]),
    name=st.sampled_from(sorted(FORMATS)),
    granularity=st.sampled_from([PerTensor(), PerChannel(), PerGroup(32), PerGroup(128)]),
    order=st.sampled_from(["kn", "nk"]),
    transpose=st.booleans(),
)
def test_awkward_sizes(m: int, k: int, n: int, name: str, granularity: Any, order: str, transpose: bool):
    w = _pack(_spec(name, granularity), k=k, n=n, order=order)
    x = _array(m, n if transpose else k, dtype=BF16)
    out = _run(x, w, casts=(BF16,), preferred_element_type=F32, transpose=transpose)
    matrix = np.asarray(w.matrix(), np.float64)
    assert_product(out, x, matrix.T if transpose else matrix, weight_eps=float(jnp.finfo(BF16).eps))


# Sizes whose words fill registers, or the table would be read as any other weight: tiles that have windows of their
# own, and tiles that are cut out of all the words of a column.
TABLES = [
    (_spec("int4", PerGroup(64)), 1024, Blocks(16, 128, 256, "before")),
    (_spec("int4", PerGroup(128), zero_point=True, scale_dtype="float16"), 2044, Blocks(16, 128, 1024, "after")),
    (_spec("nf4", PerGroup(64), double_quant=True), 1024, Blocks(16, 128, 512, "after")),
    (_spec("int7", PerGroup(128), scale_dtype="bfloat16"), 1168, Blocks(16, 128, 512, "after")),
    (_spec("int3", PerChannel()), 4096, Blocks(16, 128, 4096, "after")),
    (_spec("int8", PerGroup(128), zero_point=True), 384, Blocks(16, 128, 256, "after")),
    (_spec("int8", PerGroup(64)), 384, Blocks(16, 128, 256, "before")),
    (_spec("int8", PerTensor()), 384, Blocks(16, 128, 256, "after")),
    (_spec("fp8_e4m3", PerChannel()), 384, Blocks(16, 128, 256, "before")),
    (_spec("fp8_e5m2", PerGroup(64)), 384, Blocks(16, 128, 256, "after")),
]


@pytest.mark.parametrize(("spec", "k", "blocks"), TABLES, ids=str)
def test_tables(spec: QuantSpec, k: int, blocks: Blocks):
    """Words along rows, as lookups read them: the logits are the product with the transposed table."""
    w, x = _pack(spec, k=k, n=130, order="nk"), _array(19, k, dtype=BF16)
    assert w.words.shape[-1] % 128 == 0
    out = _run(x, w, casts=(BF16,), preferred_element_type=F32, blocks=blocks)
    assert_product(out, x, _multiplied(w, blocks.scale))


@pytest.mark.parametrize(("spec", "k", "blocks"), [TABLES[0], TABLES[1], TABLES[8]], ids=str)
def test_transposed_tables(spec: QuantSpec, k: int, blocks: Blocks):
    w, x = _pack(spec, k=k, n=130, order="nk"), _array(19, 130, dtype=BF16)
    out = _run(x, w, casts=(BF16,), preferred_element_type=F32, transpose=True, blocks=blocks)
    assert_product(out, x, _multiplied(w, "before").T)


@pytest.mark.parametrize("options", [{"scale_dtype": "float16"}, {"double_quant": True}], ids=str)
def test_scales_of_one_layer_are_converted(options: Any):
    """The kernel reads neither float16 nor nested scales; the layers that it does not multiply by stay as they are."""
    w, x = _pack(_spec("nf4", PerGroup(64), **options), 7, k=300, n=4), _array(3, 300)
    program = jax.make_jaxpr(lambda x, w, layer: _product(x, w, layer=layer))(x, w, 0)
    written = [out.aval for equation in program.eqns for out in equation.outvars]
    assert [a for a in written if 7 in a.shape and jnp.issubdtype(a.dtype, jnp.floating)] == []


# --- Dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "position"),
    [(None, "before"), ("default", "after"), ("highest", "before"), (jax.lax.Precision.HIGH, "after")],
)
def test_float32_is_rounded_as_the_precision_says(precision: Any, position: Any):
    spec = _spec("int4", PerGroup(128))
    w, x = _pack(spec, k=300, n=130), _array(9, 300)
    out = _run(x, w, precision=precision, blocks=Blocks(16, 128, 256, position))
    if precision in (None, "default"):
        assert_product(out, x.astype(BF16), _multiplied(w, position))
    else:
        assert_product(out, x, w.matrix())


def test_the_default_precision_is_that_of_the_configuration():
    w, x = _pack(_spec("nf4", PerGroup(64)), k=300, n=130), _array(9, 300)
    with jax.default_matmul_precision("float32"):
        assert_product(_run(x, w), x, w.matrix())


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("multiplies", {"x": jnp.int32}),
        ("float16", {"casts": (jnp.float16,)}),
        ("empty", {"m": 0}),
        ("whole groups", {"spec": _spec("int4", PerGroup(100))}),
        ("VMEM", {"spec": _spec("int7", PerGroup(128)), "k": 200_001}),
    ],
)
def test_what_is_left_to_the_reference_has_a_reason(reason: str, change: dict[str, Any]):
    k, spec = change.get("k", 300), change.get("spec", _spec("int4", PerGroup(64)))
    w = jax.eval_shape(lambda w: quantize(w, spec, _layout(k, 4)), jax.ShapeDtypeStruct((k, 4), F32))
    x = jax.ShapeDtypeStruct((change.get("m", 3), k), change.get("x", F32))
    assert reason in str(matmul_tpu.unsupported(x, w, change.get("casts", ()), jnp.dtype(F32)))


@pytest.mark.parametrize("blocks", [Blocks(16, 128, 384, "after"), Blocks(16, 64, 256, "after")])
def test_blocks_that_cut_registers_or_groups_are_an_error(blocks: Blocks):
    w, x = _pack(_spec("int4", PerGroup(64)), k=300, n=4), _array(3, 300)
    with pytest.raises(ValueError, match="must be a multiple"):
        _run(x, w, blocks=blocks)


def test_what_is_left_to_the_reference_is_multiplied():
    w, x = _pack(_spec("int4", PerGroup(100)), k=300, n=4), _array(3, 300)
    options: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None, "transpose": False}
    assert_product(matmul_tpu.matmul(x, w, layer=None, **options), x, w.matrix())


# --- In a program ----------------------------------------------------------------------------------------------


def test_programs_for_tpu_call_the_kernel():
    """One export for two platforms: the kernel for TPU, the blocked loop for CPU; its gradient too."""
    w, x = _pack(_spec("int4", PerGroup(128)), k=512, n=256), _array(3, 512)
    leaves, tree = jax.tree.flatten(w)

    def loss(x: jax.Array, *leaves: jax.Array) -> jax.Array:
        return jnp.sum(quantized_matmul(x, jax.tree.unflatten(tree, leaves)) ** 2)

    exported = jax.export.export(jax.jit(jax.value_and_grad(loss)), platforms=("tpu", "cpu"))(x, *leaves)
    assert exported.mlir_module().count("tpu_custom_call") == 2
    m = np.asarray(w.matrix(), np.float64)
    y = np.asarray(x, np.float64) @ m
    value, grad = exported.call(x, *leaves)
    np.testing.assert_allclose(value, np.sum(y**2), rtol=1e-5)
    np.testing.assert_allclose(grad, 2 * y @ m.T, rtol=0, atol=1e-4 * np.abs(y).max() * 20)
