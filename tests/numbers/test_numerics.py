"""Quantize, dequantize and fake-quantize against float64 NumPy and ml_dtypes, written from the formulas."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from qjax.pallas_kernels.numbers import numerics, stored_scales
from qjax.pallas_kernels.numbers.formats import (
    FORMATS,
    AbsMax,
    MseSearch,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    QuickSearch,
    SignedMax,
)
from qjax.pallas_kernels.numbers.numerics import dequantize, fake_quant, quantize

STACK, K, N, GROUP = 2, 100, 24, 32  # 32 does not divide 100: the last group has 4 values
GRANULARITIES = {"group": PerGroup(GROUP), "channel": PerChannel(), "tensor": PerTensor()}
VARIANTS = [(f, z) for f in FORMATS.values() for z in (False, True) if f.kind == "int" or not z]


def variant_id(variant):
    return f"{variant[0]}{'z' if variant[1] else ''}"


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)


def make_weights(seed=0, shape=(STACK, K, N)):
    """Groups of all sizes of number: normal, heavy tailed, shifted, with one outlier."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * 0.05
    w[..., :, 5:10] = rng.standard_t(3, w[..., :, 5:10].shape) * 3.0
    w[..., :, 10:13] += 0.1
    w[..., 40, 13] = 50.0
    w[..., :, 14] = np.abs(w[..., :, 14])
    return w.astype(np.float32)


W = make_weights()


def numpy_values(format):
    """The unscaled value of each code, float64, by code for codebooks and in ascending order."""
    if format.kind == "int":
        return np.arange(-(2 ** (format.bits - 1)), 2 ** (format.bits - 1), dtype=np.float64)
    if format.kind == "codebook":
        return np.unique(np.asarray(format.values, np.float64))
    patterns = np.arange(256, dtype=np.uint8).view(format.dtype).astype(np.float64)
    return np.unique(patterns[np.isfinite(patterns)])


def numpy_decode(codes, format):
    codes = np.asarray(codes)
    if format.kind == "int":
        return codes.astype(np.float64)
    if format.kind == "codebook":
        return np.asarray(format.values, np.float64)[codes]
    return codes.view(format.dtype).astype(np.float64)


def group_slices(spec, k=K):
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else k
    return [slice(i, min(i + size, k)) for i in range(0, k, size)]


def per_value(s, spec, k=K):
    """Scales or zero points `(..., G, N)` for each of the values, in float64."""
    s = np.asarray(s).astype(np.float64)
    parts = [np.repeat(s[..., i : i + 1, :], g.stop - g.start, axis=-2) for i, g in enumerate(group_slices(spec, k))]
    return np.concatenate(parts, axis=-2)


def group_errors(w, w_hat, spec):
    """Sum of squared errors of each group, float64."""
    d = np.square(np.asarray(w_hat).astype(np.float64) - np.asarray(w).astype(np.float64))
    if isinstance(spec.granularity, PerTensor):
        return d.sum((-2, -1))
    return np.stack([d[..., g, :].sum(-2) for g in group_slices(spec, w.shape[-2])], axis=-2)


@functools.cache
def on_weights(spec):
    codes, scales = quantize(W, spec)
    return np.asarray(codes), scales, np.asarray(dequantize(codes, scales, spec))


def relative_error(w, spec):
    w_hat = dequantize(*quantize(w, spec), spec)
    return float(np.linalg.norm(np.asarray(w_hat) - w) / np.linalg.norm(w))


# --- The formulas ----------------------------------------------------------------------------------------------


def numpy_abs_max(w, format, zero_point):
    """Scale and zero point of one group, float64."""
    top = 2**format.bits - 1
    if zero_point:
        low, high = min(w.min(), 0.0), max(w.max(), 0.0)
        scale = (high - low) / top
        lowest = -(2 ** (format.bits - 1))
        return scale, np.clip(np.round(lowest - low / scale), lowest, lowest + top)
    return np.abs(w).max() / (top / 2 if format.kind == "int" else numpy_values(format)[-1]), 0.0


@every_variant
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_absmax_matches_the_formulas_in_float64(variant, granularity):
    format, zero_point = variant
    spec = QuantSpec(format, GRANULARITIES[granularity], zero_point, scale_rule=AbsMax())
    codes, scales, w_hat = on_weights(spec)
    groups = len(group_slices(spec))
    assert scales.values.shape == ((STACK, 1, 1) if granularity == "tensor" else (STACK, groups, N))
    assert scales.values.dtype == jnp.float32
    assert codes.shape == w_hat.shape == W.shape

    w = W.astype(np.float64)
    for s in range(STACK):
        for i, g in enumerate(group_slices(spec)):
            for n in range(1 if granularity == "tensor" else N):
                values = w[s] if granularity == "tensor" else w[s, g, n]
                scale, zero = numpy_abs_max(values, format, zero_point)
                assert float(scales.values[s, i, n]) == pytest.approx(scale, rel=3e-7)
                if zero_point:
                    assert int(scales.zero[s, i, n]) == zero

    # given the stored scale, each code is the nearest one (ties within float32 rounding may go either way) ...
    scale = per_value(scales.values, spec)
    zero = per_value(scales.zero, spec) if zero_point else 0.0
    decoded = numpy_decode(codes, format)
    unscaled = w / scale + zero
    nearest = np.abs(unscaled[..., None] - numpy_values(format)).min(-1)
    slack = 1e-6 * np.maximum(np.abs(unscaled), 1e-3)
    assert (np.abs(unscaled - decoded) <= nearest + slack).all()
    # ... and the value is (code - zero) * scale, rounded once to float32
    np.testing.assert_array_equal(w_hat, ((decoded - zero) * scale).astype(np.float32))


@every_variant
def test_error_is_at_most_half_a_step_under_absmax(variant):
    format, zero_point = variant
    spec = QuantSpec(format, PerGroup(GROUP), zero_point, scale_rule=AbsMax())
    _, scales, w_hat = on_weights(spec)
    values = numpy_values(format)
    step = np.diff(values).max() / 2
    # a rounded zero point moves the range by up to half a step, so one end may be clipped by as much
    limit = step * (2 if zero_point else 1) * per_value(scales.values, spec)
    assert (np.abs(w_hat - W.astype(np.float64)) <= limit + 1e-6 * np.abs(W)).all()


def test_signed_max_is_the_rule_of_gguf_q4_0():
    spec = QuantSpec(FORMATS["int4"], PerGroup(GROUP), scale_rule=SignedMax())
    codes, scales, _ = on_weights(spec)
    for s, n in [(0, 0), (0, 7), (1, 13), (1, 20)]:
        for i, g in enumerate(group_slices(spec)):
            x = W[s, g, n]
            d = x[np.abs(x).argmax()] / np.float32(-8)
            assert float(scales.values[s, i, n]) == d
            # gguf stores trunc(x / d + 8.5), unsigned: ties away from our even ones do not occur in this data
            np.testing.assert_array_equal(codes[s, g, n] + 8, np.clip(np.trunc(x / d + np.float32(8.5)), 0, 15))
    assert {-1, 1} <= set(np.sign(np.asarray(scales.values)).ravel())


# --- Codes of single numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_decoding_a_code_and_encoding_it_again_gives_the_code(format):
    if format.kind == "int":
        codes = np.arange(format.qmin, format.qmax + 1).astype(np.int8)
    else:
        codes = np.arange(2**format.bits).astype(np.uint8).view(np.int8)
        values = numpy_decode(codes, format)
        codes = codes[np.isfinite(values) & ~((values == 0) & np.signbit(values))]  # -0 is stored as 0
    values = numerics.decode_codes(jnp.asarray(codes), format)
    np.testing.assert_array_equal(values, numpy_decode(codes, format))
    np.testing.assert_array_equal(numerics.encode(values, format), codes)


encode_jit = jax.jit(numerics.encode, static_argnums=1)


def interesting_numbers(format, seed):
    """Values of the format, midpoints between them, their neighbours in float32, and random numbers."""
    rng = np.random.default_rng(seed)
    values = numpy_values(format).astype(np.float32)
    if len(values) > 40:
        values = np.sort(rng.choice(values, 40, replace=False))
    middles = (values[:-1] + values[1:]) / 2
    points = np.concatenate([values, middles])
    near = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    wild = rng.standard_normal(64) * 10.0 ** rng.integers(-6, 6, 64)
    x = np.concatenate([points, *near, wild]).astype(np.float32)
    return np.resize(x, 400)


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp8_e4m3", "fp8_e5m2"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_small_floats_round_as_ml_dtypes_does(name, seed):
    format = FORMATS[name]
    dtype = ml_dtypes.float4_e2m1fn if name == "fp4_e2m1" else format.dtype
    x = interesting_numbers(format, seed)
    x = x[np.abs(x) >= np.finfo(np.float32).tiny]
    expected = np.clip(x, -format.largest, format.largest).astype(dtype).astype(np.float32)
    x = np.resize(x, 400)
    got = numerics.decode_codes(encode_jit(jnp.asarray(x), format), format)
    np.testing.assert_array_equal(got, np.resize(expected, 400))


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if f.kind != "float"], ids=str)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_encoding_is_nearest_monotone_and_idempotent(format, seed):
    x = np.sort(interesting_numbers(format, seed))
    decoded = np.asarray(numerics.decode_codes(encode_jit(jnp.asarray(x), format), format), np.float64)
    best = np.abs(x.astype(np.float64)[:, None] - numpy_values(format)).min(-1)
    np.testing.assert_allclose(np.abs(decoded - x), best, rtol=1e-6, atol=1e-7)
    assert (np.diff(decoded) >= 0).all()
    again = numerics.decode_codes(encode_jit(jnp.asarray(decoded, jnp.float32), format), format)
    np.testing.assert_array_equal(again, decoded)


def test_integers_round_half_to_even_and_nf4_ties_go_down():
    np.testing.assert_array_equal(
        numerics.encode(jnp.asarray([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 99.0]), FORMATS["int4"]), [-2, -2, 0, 0, 2, 2, 7]
    )
    values = np.asarray(FORMATS["nf4"].values, np.float32)
    middle = (values[7] + values[8]) / 2
    x = jnp.asarray([middle, np.nextafter(middle, np.float32(1))])
    np.testing.assert_array_equal(numerics.encode(x, FORMATS["nf4"]), [7, 8])


# --- Equality of all the ways to compute it --------------------------------------------------------------------

SEARCHED = [
    QuantSpec(FORMATS["int4"], PerGroup(GROUP), scale_dtype="bfloat16"),
    QuantSpec(FORMATS["int3"], PerGroup(GROUP), zero_point=True),
    QuantSpec(FORMATS["nf4"], PerGroup(GROUP), double_quant=True),
    QuantSpec(FORMATS["int2"], PerTensor(), scale_rule=QuickSearch()),
    QuantSpec(FORMATS["fp8_e4m3"], PerChannel(), scale_rule=QuickSearch(), scale_dtype="float16"),
]
ONE_PASS = [QuantSpec(f, PerGroup(GROUP), z, scale_rule=AbsMax()) for f, z in VARIANTS]


@pytest.mark.parametrize("spec", [*ONE_PASS, *SEARCHED], ids=lambda s: f"{s}-{type(s.scale_rule).__name__}")
def test_fake_quant_equals_dequantize_of_quantize_bit_for_bit(spec):
    _, _, expected = on_weights(spec)

    @jax.jit
    def larger_program(w):
        stacked = fake_quant(jnp.flip(jnp.flip(w, 0), 0), spec)
        _, scanned = lax.scan(lambda carry, m: (carry, fake_quant(m, spec)), 0, w)
        # an addition that XLA would like to fuse with the last product of fake_quant
        return stacked, scanned, stacked + 0.75

    stacked, scanned, added = larger_program(W)
    np.testing.assert_array_equal(stacked, expected)
    np.testing.assert_array_equal(scanned, expected)
    np.testing.assert_array_equal(added, expected + np.float32(0.75))
    np.testing.assert_array_equal(fake_quant(jnp.asarray(W), spec), expected)


def test_quantizing_is_the_same_under_vmap_and_for_a_part_of_the_columns():
    spec = SEARCHED[1]
    codes, scales, w_hat = on_weights(spec)
    mapped = jax.jit(jax.vmap(lambda m: quantize(m, spec)))(W)
    jax.tree.map(np.testing.assert_array_equal, mapped, (codes, scales))
    np.testing.assert_array_equal(jax.jit(lambda w: fake_quant(w, spec))(W[:, :, :7]), w_hat[:, :, :7])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_narrow_inputs_are_upcast_first_and_rounded_once_at_the_end(name, dtype):
    spec = QuantSpec(FORMATS[name], PerGroup(GROUP), scale_rule=AbsMax())
    w = np.clip(W, -40, 40).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    codes, scales = quantize(jnp.asarray(w), spec)
    jax.tree.map(np.testing.assert_array_equal, (codes, scales), quantize(w.astype(np.float32), spec))
    exact = dequantize(codes, scales, spec)
    narrow = jax.jit(lambda w: (fake_quant(w, spec), fake_quant(w, spec).astype(jnp.float32) * 3.0))(jnp.asarray(w))
    assert narrow[0].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(narrow[0], np.asarray(exact).astype(w.dtype))
    # rounding to the narrow dtype is not skipped where XLA could compute on in float32
    np.testing.assert_array_equal(narrow[1], np.asarray(exact).astype(w.dtype).astype(np.float32) * np.float32(3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_casts_round_as_numpy_does_including_subnormals_and_overflow(dtype, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(256) * 10.0 ** rng.integers(-9, 6, 256)).astype(np.float32)
    half_units = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25, 65519.0, 65520.0, 1 + 2.0**-8]
    ties = np.asarray(half_units, np.float32)
    x = np.concatenate([x, ties, -ties])
    spec = QuantSpec(FORMATS["int8"], PerGroup(1), scale_rule=AbsMax())
    codes = jnp.ones((x.size, 1), jnp.int8)  # each value is its own scale
    got = dequantize(codes, stored_scales.Scales(jnp.asarray(x)[:, None]), spec, dtype)
    with np.errstate(over="ignore"):
        expected = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(np.asarray(got)[:, 0], expected)


# --- Groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rule"), [("int4", MseSearch()), ("nf4", AbsMax())], ids=["int4", "nf4"])
def test_a_short_last_group_is_quantized_as_if_it_stood_alone(name, rule):
    spec = QuantSpec(FORMATS[name], PerGroup(GROUP), scale_rule=rule)
    codes, scales, _ = on_weights(spec)
    last = K // GROUP * GROUP
    alone_codes, alone_scales = quantize(W[:, last:], dataclasses.replace(spec, granularity=PerChannel()))
    np.testing.assert_array_equal(codes[:, last:], alone_codes)
    np.testing.assert_array_equal(scales.values[:, -1:], alone_scales.values)


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_any_group_size_is_valid(size):
    spec = QuantSpec(FORMATS["int4"], PerGroup(size), scale_rule=AbsMax())
    codes, scales = quantize(W, spec)
    assert scales.values.shape == (STACK, -(-K // size), N)
    assert codes.shape == W.shape
    if size >= K:
        per_channel = quantize(W, dataclasses.replace(spec, granularity=PerChannel()))
        jax.tree.map(np.testing.assert_array_equal, (codes, scales), per_channel)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (2, 0, 8)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_empty_matrices_stay_empty(shape, granularity):
    spec = QuantSpec(FORMATS["int4"], GRANULARITIES[granularity], scale_rule=AbsMax())
    assert fake_quant(jnp.zeros(shape), spec).shape == shape


# --- Small, large and special numbers --------------------------------------------------------------------------

TINY = float(np.finfo(np.float32).tiny)
SPECIAL = {
    "zero": np.zeros(8),
    "negative zero": np.full(8, -0.0),
    "denormal": np.linspace(-1, 1, 8) * TINY / 2,
    "one outlier": np.asarray([1000.0, 1, -1, 0.5, 0, 0, 0.1, -0.1]),
    "constant": np.full(8, 0.3),
    "constant, negative": np.full(8, -0.3),
    "very large": np.linspace(-1, 1, 8) * 1e37,
    "very small": np.linspace(-1, 1, 8) * 1e-30,
}
SPECIAL_W = np.stack(list(SPECIAL.values()), axis=1).astype(np.float32)
SPECIAL_SPECS = [
    QuantSpec(FORMATS[name], PerGroup(8), zero, dtype, rule)
    for name, zero, dtype, rule in [
        ("int4", False, "float32", AbsMax()),
        ("int4", False, "float16", AbsMax()),
        ("int4", False, "bfloat16", MseSearch()),
        ("int4", True, "float32", AbsMax()),
        ("int4", True, "float16", QuickSearch()),
        ("int8", False, "float32", SignedMax()),
        ("nf4", False, "float32", AbsMax()),
        ("nf4", False, "float16", MseSearch()),
        ("fp4_e2m1", False, "float32", QuickSearch()),
        ("fp8_e4m3", False, "bfloat16", AbsMax()),
    ]
]


@pytest.mark.parametrize("spec", SPECIAL_SPECS, ids=lambda s: f"{s}-{s.scale_dtype}-{type(s.scale_rule).__name__}")
def test_special_groups_stay_finite_and_keep_their_meaning(spec):
    codes, scales = quantize(SPECIAL_W, spec)
    w_hat = np.asarray(dequantize(codes, scales, spec))
    assert np.isfinite(w_hat).all()
    assert np.isfinite(np.asarray(scales.values, np.float32)).all()
    columns = dict(zip(SPECIAL, w_hat.T, strict=True))
    for name in ("zero", "negative zero", "denormal"):
        np.testing.assert_array_equal(columns[name], 0.0, err_msg=name)
    assert columns["one outlier"][0] == pytest.approx(1000, rel=0.1)
    for name in ("constant", "constant, negative"):
        np.testing.assert_allclose(columns[name], SPECIAL[name], rtol=0.08, err_msg=name)
    if spec.scale_dtype == "float16":  # too narrow for both: one scale saturates, the other is rounded to zero
        assert np.abs(columns["very large"]).max() >= 65504
        np.testing.assert_array_equal(columns["very small"], 0.0)
    else:
        for name in ("very large", "very small"):
            largest = SPECIAL[name].max()
            np.testing.assert_allclose(columns[name] / largest, SPECIAL[name] / largest, atol=0.13, err_msg=name)


def test_a_group_whose_scale_would_be_subnormal_becomes_zero():
    spec = QuantSpec(FORMATS["int8"], PerChannel(), scale_rule=AbsMax())
    w = np.stack([np.linspace(-1, 1, 8) * 120 * TINY, np.linspace(-1, 1, 8) * 130 * TINY], axis=1).astype(np.float32)
    codes, scales = quantize(w, spec)  # the scales would be 0.94 and 1.02 times the smallest normal number
    np.testing.assert_array_equal(scales.values[0] > 0, [False, True])
    np.testing.assert_array_equal(codes[:, 0], 0)
    assert np.abs(np.asarray(codes[:, 1])).max() > 120


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", [AbsMax(), QuickSearch()], ids=lambda r: type(r).__name__)
def test_scales_are_rounded_before_codes_are_chosen(dtype, rule):
    format = FORMATS["int6"]
    spec = QuantSpec(format, PerGroup(GROUP), scale_dtype=dtype, scale_rule=rule)
    codes, scales, w_hat = on_weights(spec)
    assert scales.values.dtype == jnp.dtype(dtype)
    unscaled = W.astype(np.float64) / per_value(scales.values, spec)
    expected = np.clip(np.round(unscaled), format.qmin, format.qmax)
    tie = np.abs(np.abs(unscaled - np.trunc(unscaled)) - 0.5) < 1e-4
    assert ((codes == expected) | tie).all()
    np.testing.assert_array_equal(w_hat, (codes * per_value(scales.values, spec)).astype(np.float32))


def test_subnormal_float16_scales_are_used_not_flushed():
    spec = QuantSpec(FORMATS["int8"], PerChannel(), scale_dtype="float16", scale_rule=AbsMax())
    w = (np.linspace(-1, 1, 64)[:, None] * 1e-4).astype(np.float32)
    assert 0 < float(quantize(w, spec)[1].values[0, 0]) < 2.0**-14
    assert relative_error(w, spec) < 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_parameter_the_count_and_the_first_entry(bad):
    w = np.zeros((4, 5), np.float32)
    numerics.check_finite(w, "layers/0/kernel")
    w[1, 2] = w[3, 4] = bad
    with pytest.raises(ValueError, match="qjax: 'layers/0/kernel' has 2 of 20") as error:
        numerics.check_finite(jnp.asarray(w, jnp.bfloat16), "layers/0/kernel")
    for word in ("first at [1, 2]", "Rule("):
        assert word in str(error.value)


# --- Quality of the scale rules --------------------------------------------------------------------------------


@every_variant
def test_mse_search_is_never_worse_than_absmax_in_any_group(variant):
    format, zero_point = variant
    searched = QuantSpec(format, PerGroup(GROUP), zero_point)
    start = dataclasses.replace(searched, scale_rule=AbsMax())
    error, limit = (group_errors(W, on_weights(s)[2], s) for s in (searched, start))
    assert (error <= limit * (1 + 1e-5) + 1e-30).all()
    assert error.sum() < limit.sum()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(FORMATS["int2"], PerTensor()),
        QuantSpec(FORMATS["int4"], PerChannel(), scale_dtype="float16"),
        QuantSpec(FORMATS["nf4"], PerChannel(), scale_dtype="bfloat16"),
    ],
    ids=lambda s: f"{s}-{s.scale_dtype}",
)
def test_the_guarantee_holds_for_every_granularity_and_scale_dtype(spec):
    start = dataclasses.replace(spec, scale_rule=AbsMax())
    error, limit = (group_errors(W, on_weights(s)[2], s) for s in (spec, start))
    assert (error <= limit * (1 + 1e-5)).all()


DATA = {
    "normal": np.random.default_rng(3).standard_normal((256, 128)),
    "laplace": np.random.default_rng(4).laplace(size=(256, 128)),
    "student t": np.random.default_rng(5).standard_t(4, (256, 128)),
}
DATA = {name: w.astype(np.float32) for name, w in DATA.items()}
# Relative error on normal weights, groups of 64 (int8: per channel). What AbsMax gives: .512 .221 .103 .0920 .0083
LIMITS = {"int2": 0.353, "int3": 0.178, "int4": 0.0905, "nf4": 0.0856, "int8": 0.0081}


@pytest.mark.parametrize("name", LIMITS)
def test_search_reaches_its_error_on_normal_weights(name):
    spec = QuantSpec(FORMATS[name], PerChannel() if name == "int8" else PerGroup(64))
    assert relative_error(DATA["normal"], spec) < LIMITS[name]


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
def test_quick_search_is_within_two_percent_of_the_full_search(name):
    quick, full = (QuantSpec(FORMATS[name], PerGroup(64), scale_rule=rule) for rule in (QuickSearch(), MseSearch()))
    for w in DATA.values():
        assert relative_error(w, quick) < 1.02 * relative_error(w, full)


def test_long_heavy_tailed_channels_are_clipped_far_inside_their_largest_value():
    w = np.random.default_rng(5).standard_t(4, (2048, 8)).astype(np.float32)
    full, start = (
        relative_error(w, QuantSpec(FORMATS["int4"], PerChannel(), scale_rule=r)) for r in (MseSearch(), AbsMax())
    )
    assert full < 0.7 * start


# --- Gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(FORMATS["int2"], PerGroup(GROUP), scale_dtype="bfloat16", scale_rule=QuickSearch()),
        QuantSpec(FORMATS["int3"], PerGroup(GROUP), zero_point=True),
        QuantSpec(FORMATS["nf4"], PerChannel(), scale_rule=QuickSearch()),
        QuantSpec(FORMATS["fp8_e5m2"], PerTensor(), scale_dtype="float16", scale_rule=AbsMax()),
    ],
    ids=str,
)
def test_gradient_is_straight_through_where_rounded_and_zero_where_clipped(spec):
    w = W.copy()
    w[0, 3, :] *= 40  # something to clip
    if spec.format.kind == "float":
        w[0, 3, 0] = 3e38  # beyond what a float16 scale reaches
    weight = np.random.default_rng(1).standard_normal(w.shape).astype(np.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda w: jnp.sum(weight * fake_quant(w, spec))))(w)
    _, scales = quantize(w, spec)
    scale = np.asarray(stored_scales.resolve_scales(scales)).astype(np.float64)
    zero = per_value(scales.zero, spec) if spec.zero_point else 0.0
    scale = scale if isinstance(spec.granularity, PerTensor) else per_value(scale, spec)
    values = numpy_values(spec.format)
    low = values[0] - (values[1] - values[0]) / 2
    high = values[-1] + (values[-1] - values[-2]) / 2
    unscaled = w.astype(np.float64) / scale + zero
    slack = 1 + float(jnp.finfo(spec.scale_dtype).eps)  # for the rounding of the scale itself
    clipped = (unscaled < slack * low) | (unscaled > slack * high)
    assert 0 < clipped.sum() < clipped.size / 4
    np.testing.assert_array_equal(gradient, np.where(clipped, 0, weight))
    assert np.isfinite(value)


def test_gradient_keeps_the_dtype_and_composes_with_vmap_scan_and_second_order():
    spec = QuantSpec(FORMATS["int4"], PerGroup(8), scale_rule=SignedMax())
    w = jnp.asarray(W[0, :16, :4], jnp.bfloat16)
    gradient = jax.grad(lambda w: jnp.sum(fake_quant(w, spec)).astype(jnp.float32))(w)
    assert gradient.dtype == jnp.bfloat16
    stack = jnp.asarray(W[:, :16, :4])

    def loss(w):
        return jnp.sum(jnp.square(fake_quant(w, spec)))

    direct = jax.grad(loss)(stack)
    np.testing.assert_array_equal(jax.vmap(jax.grad(loss))(stack), direct)
    scanned = jax.grad(lambda s: lax.scan(lambda c, w: (c + loss(w), None), 0.0, s)[0])(stack)
    np.testing.assert_array_equal(scanned, direct)
    # d/dw sum(q(w)^2) = 2 q(w) and again straight through: 2 v
    rounded = np.asarray(jax.grad(lambda w: jnp.sum(fake_quant(w, spec)))(stack))
    product = jax.jvp(jax.grad(loss), (stack,), (jnp.ones_like(stack),))[1]
    np.testing.assert_array_equal(product, 2 * rounded)


# --- Double quantization ---------------------------------------------------------------------------------------


def test_double_quantization_follows_the_formula_block_by_block():
    spec = QuantSpec(FORMATS["nf4"], PerGroup(8), scale_rule=AbsMax(), double_quant=True)
    codes, scales, w_hat = on_weights(spec)
    groups = -(-K // 8)
    blocks = -(-groups * N // 256)
    assert blocks == 2
    shapes = {name: (a.shape, a.dtype.name) for name, a in stored_scales.scales_to_arrays(scales).items()}
    assert shapes == {
        "values": ((STACK, groups, N), "uint8"),
        "absmax": ((STACK, blocks, 1), "float32"),
        "offset": ((STACK, 1, 1), "float32"),
    }

    plain_codes, plain, _ = on_weights(dataclasses.replace(spec, double_quant=False))
    np.testing.assert_array_equal(codes, plain_codes)  # codes are chosen by the scales before
    table = stored_scales.dynamic_map().astype(np.float64)
    for s in range(STACK):
        flat = np.asarray(plain.values[s], np.float64).T.reshape(-1)  # (N, G) row-major
        offset = flat.mean()
        assert float(scales.offset[s, 0, 0]) == pytest.approx(offset, rel=1e-6)
        for b in range(blocks):
            block = flat[b * 256 : (b + 1) * 256] - offset
            absmax = np.abs(block).max()
            assert float(scales.absmax[s, b, 0]) == pytest.approx(absmax, rel=1e-6)
            stored = np.asarray(scales.values[s]).T.reshape(-1)[b * 256 : (b + 1) * 256]
            distance = np.abs(table[stored] - block / absmax)
            best = np.abs(table - (block / absmax)[:, None]).min(-1)
            assert (distance <= best + 3.1e-5).all()  # bitsandbytes looks up a grid of 65536 steps over [-1, 1]
    resolved = np.asarray(stored_scales.resolve_scales(scales))
    np.testing.assert_array_equal(
        w_hat, (numpy_decode(codes, spec.format) * per_value(resolved, spec)).astype(np.float32)
    )


def test_double_quantized_scales_survive_slicing_the_stack_and_resolving():
    spec = QuantSpec(FORMATS["nf4"], PerGroup(8), scale_rule=AbsMax(), double_quant=True)
    codes, scales, w_hat = on_weights(spec)
    second = jax.tree.map(lambda a: a[1], scales)
    np.testing.assert_array_equal(dequantize(jnp.asarray(codes[1]), second, spec), w_hat[1])
    _, scanned = lax.scan(lambda c, cs: (c, dequantize(*cs, spec)), 0, (jnp.asarray(codes), scales))
    np.testing.assert_array_equal(scanned, w_hat)
    plain = stored_scales.plain_scales(scales)
    assert set(stored_scales.scales_to_arrays(plain)) == {"values"}
    np.testing.assert_array_equal(dequantize(jnp.asarray(codes), plain, spec), w_hat)
    assert stored_scales.plain_scales(plain) is plain


def test_double_quantized_integers_have_positive_scales_before_quantization():
    spec = QuantSpec(FORMATS["int3"], PerGroup(GROUP), zero_point=False)
    _, signed, _ = on_weights(spec)
    assert (np.asarray(signed.values) < 0).any()
    _, scales, w_hat = on_weights(dataclasses.replace(spec, double_quant=True))
    assert float(scales.offset.min()) > 0
    assert np.linalg.norm(w_hat - W) < 1.1 * np.linalg.norm(on_weights(spec)[2] - W)


# --- The pytree ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (ONE_PASS[0], {"values"}),
        (ONE_PASS[1], {"values", "zero"}),
        (SEARCHED[2], {"values", "absmax", "offset"}),
    ],
    ids=["symmetric", "zero point", "double"],
)
def test_scales_are_a_pytree_of_the_arrays_that_are_there(spec, names):
    _, scales, _ = on_weights(spec)
    arrays = stored_scales.scales_to_arrays(scales)
    assert set(arrays) == names
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(scales)}
    assert paths == {f".{name}" for name in names}
    jax.tree.map(np.testing.assert_array_equal, stored_scales.scales_from_arrays(arrays), scales)
