"""`activations` against NumPy, the formulas of the papers, and compressed-tensors where it is installed."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.numbers import activation_ranges
from qjax.pallas_kernels.numbers.activation_ranges import (
    ActSpec,
    Dynamic,
    EntropyRange,
    LearnedClip,
    LearnedStep,
    MinMax,
    MovingAverage,
    MseRange,
    Percentile,
)
from qjax.pallas_kernels.numbers.activations import fake_quant, quantize, ranges_from_extremes
from qjax.pallas_kernels.numbers.formats import FORMATS

INT8, INT4, FP8 = FORMATS["int8"], FORMATS["int4"], FORMATS["fp8_e4m3"]
TOKENS, K = 7, 96

VALID = [
    ActSpec(INT8),
    ActSpec(INT8, zero_point=True),
    ActSpec(INT4, per="tensor"),
    ActSpec(FP8),
    ActSpec(INT8, MinMax(), "tensor", True),
    ActSpec(INT8, MovingAverage(0.9), "tensor"),
    ActSpec(FP8, Percentile(99.0), "tensor"),
    ActSpec(INT4, MseRange(), "tensor", True),
    ActSpec(INT8, EntropyRange(), "tensor"),
    ActSpec(INT4, LearnedStep(), "tensor"),
    ActSpec(INT4, LearnedStep(), "tensor", True),
    ActSpec(INT4, LearnedClip(), "tensor"),
    ActSpec(INT4, LearnedClip(), "tensor", True),
]


def _array(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Normal values with an outlier, in tokens of very different size."""
    x = np.random.default_rng([seed, *shape]).standard_normal(shape)
    x[..., -1] *= 6
    return jnp.asarray(x * 10.0 ** np.arange(-3, -3 + shape[0]).reshape(-1, *[1] * (len(shape) - 1)), dtype)


def _ranges(spec: ActSpec) -> dict[str, jax.Array] | None:
    return None if spec.is_dynamic else ranges_from_extremes(-1.5, 2.0, spec)


# --- ActSpec ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", VALID, ids=str)
def test_json_makes_a_round_trip(spec: ActSpec):
    assert ActSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert hash(spec) == hash(ActSpec.from_json(spec.to_json()))


def test_names_tell_specs_apart():
    assert len({str(spec) for spec in VALID}) == len(VALID)
    assert str(VALID[0]) == "int8/token" and str(VALID[7]) == "int4z/tensor mse"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FORMATS["nf4"],), "integers or fp8"),
        ((INT8, MinMax()), "per='tensor'"),
        ((FP8, Dynamic(), "token", True), "no zero point"),
        ((FP8, LearnedStep(), "tensor"), "integer formats"),
        ((FP8, LearnedClip(), "tensor"), "integer formats"),
    ],
    ids=str,
)
def test_a_spec_without_meaning_is_an_error(arguments: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message):
        ActSpec(*arguments)


@pytest.mark.parametrize("make", [lambda: MovingAverage(1.0), lambda: MovingAverage(-0.1), lambda: Percentile(50.0)])
def test_a_range_out_of_bounds_is_an_error(make: Any):
    with pytest.raises(ValueError, match="qjax"):
        make()


@pytest.mark.parametrize("change", [{"format": "int9"}, {"range": {"name": "median"}}])
def test_json_of_another_version_is_an_error(change: dict[str, Any]):
    with pytest.raises(ValueError, match="does not know"):
        ActSpec.from_json({**ActSpec(INT8).to_json(), **change})


# --- Codes and scales ------------------------------------------------------------------------------------------


def _expected(x: np.ndarray, bits: int, zero_point: bool, axes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Dynamic codes, scale and zero point of integers in float32 NumPy, as the module's docstring has them."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    half = np.float32((2**bits - 1) / 2)
    low = np.minimum(x.min(axes, keepdims=True), 0)
    high = np.maximum(x.max(axes, keepdims=True), 0)
    if zero_point:
        scale = (high / 2 - low / 2) / half
        zero = np.clip(np.round(qmin - low / scale), qmin, qmax)
    else:
        scale, zero = np.maximum(-low, high) / half, np.zeros_like(low)
    return np.clip(np.round(x / scale + zero), qmin, qmax), scale, zero


@pytest.mark.parametrize("axes", [(1,), (0, 1), (0,)], ids=str)
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_integers(bits: int, zero_point: bool, axes: tuple[int, ...]):
    x = np.asarray(_array(TOKENS, K))
    spec = ActSpec(FORMATS[f"int{bits}"], zero_point=zero_point)
    codes, scale, zero = _expected(x, bits, zero_point, axes)
    found = jax.jit(lambda x: quantize(x, spec, axes))(x)
    assert found.codes.dtype == jnp.int8 and found.scale.dtype == jnp.float32
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale, scale)
    if zero_point:
        np.testing.assert_array_equal(found.zero, zero)
    else:
        assert found.zero is None


def test_per_tensor_is_one_scale():
    x = np.asarray(_array(TOKENS, K))
    found = quantize(jnp.asarray(x), ActSpec(INT8, per="tensor"), (1,))
    codes, scale, _ = _expected(x, 8, False, (0, 1))
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale, scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_dynamic_tokens_equal_compressed_tensors(symmetric: bool):
    """Range to scale, zero point, codes and values of its dynamic per-token scheme."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    args = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=symmetric, strategy="token", dynamic=True)
    x = np.asarray(_array(TOKENS, K))
    theirs = torch.from_numpy(x[None].copy())  # it takes the first two axes for batch and token
    scale, zero = helpers.compute_dynamic_scales_and_zp(theirs, args, None)
    codes = forward.quantize(theirs, scale, zero, args)
    values = forward.dequantize(codes, scale, zero, args)
    ours, value = fake_quant(jnp.asarray(x), ActSpec(INT8, zero_point=not symmetric), (1,))
    np.testing.assert_array_equal(ours.scale, scale[0].numpy())
    if not symmetric:
        np.testing.assert_array_equal(ours.zero, zero[0].numpy())
    np.testing.assert_array_equal(ours.codes, codes[0].numpy())
    np.testing.assert_array_equal(value, values[0].numpy())


def test_float8_is_scaled_to_its_largest_number():
    import ml_dtypes

    x = np.asarray(_array(TOKENS, K))
    found = quantize(jnp.asarray(x), ActSpec(FP8), (1,))
    scale = np.abs(x).max(1, keepdims=True) / np.float32(448)
    np.testing.assert_array_equal(found.scale, scale)
    values = (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(found.codes).view(ml_dtypes.float8_e4m3fn), values)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=4, max_size=4), st.booleans()
)
def test_dynamic_values_are_within_half_a_step(values: list[float], zero_point: bool):
    x = np.asarray([values], np.float32)
    spec = ActSpec(INT8, zero_point=zero_point)
    found, value = fake_quant(jnp.asarray(x), spec, (1,))
    steps = 0.5 + (0.5 if zero_point else 0.0)  # a rounded zero point moves all values by up to half a step
    error = np.abs(np.asarray(value, np.float64) - x)
    assert (error <= steps * np.asarray(found.scale, np.float64) * (1 + 1e-5) + 1e-36).all()


@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "asymmetric"])
def test_unusual_tokens(zero_point: bool):
    """Each token is alone with its zeros, subnormal or huge numbers, NaN or infinity."""
    largest = float(np.finfo(np.float32).max)
    x = np.ones((7, 4), np.float32)
    x[1] = 0.0
    x[2] = 1e-40
    x[3] = [largest, -largest, 0.0, largest / 2]
    x[4, 1] = np.nan
    x[5, 2] = np.inf
    found, value = jax.jit(lambda x: fake_quant(x, ActSpec(INT8, zero_point=zero_point), (1,)))(x)
    value = np.asarray(value)
    ones = quantize(jnp.ones((1, 4)), ActSpec(INT8, zero_point=zero_point), (1,)).dequantize(INT8, jnp.float32)
    np.testing.assert_array_equal(value[[0, 6]], np.broadcast_to(ones, (2, 4)))
    np.testing.assert_array_equal(value[1:3], np.zeros((2, 4)))
    assert np.isfinite(value[3]).all()
    np.testing.assert_allclose(value[3], x[3], rtol=0, atol=1.01 * float(found.scale[3, 0]))
    assert np.isnan(value[4:6]).all()  # such a token must not come back as ordinary numbers


@pytest.mark.parametrize("spec", [s for s in VALID if not s.is_dynamic], ids=str)
def test_a_known_range_saturates(spec: ActSpec):
    x = jnp.asarray([[jnp.inf, -jnp.inf, 1e30, -1e30, jnp.nan, 0.0]])
    value = np.asarray(fake_quant(x, spec, (1,), _ranges(spec))[1])
    assert np.isnan(value[0, 4]) == (spec.format.kind == "float")
    value = np.delete(value, 4, axis=1)
    assert np.isfinite(value).all()
    assert value[0, 0] == value[0, 2] == value.max() and value[0, 1] == value[0, 3] == value.min()
    assert value[0, 4] == 0


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("spec", [VALID[1], VALID[3], VALID[4], VALID[10], VALID[12]], ids=str)
def test_empty_arrays(spec: ActSpec, shape: tuple[int, ...]):
    found, value = fake_quant(jnp.zeros(shape), spec, (len(shape) - 1,), _ranges(spec))
    assert found.codes.shape == value.shape == shape


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(s, d) for s in VALID for d in (jnp.float32, jnp.bfloat16)] + [(s, jnp.float16) for s in VALID[:2]],
    ids=str,
)
def test_fake_quant_is_quantize_and_dequantize(spec: ActSpec, dtype: Any):
    """Bit for bit, eager, jitted, and next to other arithmetic that XLA could fuse with it."""
    x, ranges = _array(TOKENS, K, dtype=dtype), _ranges(spec)

    def pair(x: jax.Array, ranges: Any) -> tuple[jax.Array, jax.Array]:
        return fake_quant(x, spec, (1,), ranges)[1], quantize(x, spec, (1,), ranges).dequantize(spec.format, dtype)

    fake, parts = pair(x, ranges)
    assert fake.dtype == dtype
    np.testing.assert_array_equal(fake, parts)

    other = jnp.asarray(np.random.default_rng(6).standard_normal((TOKENS, K)), jnp.float32)

    @jax.jit
    def jitted(x: jax.Array, ranges: Any, other: jax.Array) -> tuple[jax.Array, ...]:
        fake, parts = pair(x, ranges)
        return fake, parts, fake.astype(jnp.float32) + other

    *same, added = jitted(x, ranges, other)
    for a in same:
        np.testing.assert_array_equal(a, fake)
    np.testing.assert_array_equal(added, np.asarray(fake, np.float32) + np.asarray(other))


# --- Gradients -------------------------------------------------------------------------------------------------


def _gradients(spec: ActSpec, x: np.ndarray, g: np.ndarray, ranges: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Of sum(g * fake_quant(x)), in x and in the arrays of the range."""

    def loss(x: jax.Array, ranges: Any) -> jax.Array:
        return jnp.sum(g * fake_quant(x, spec, (1,), ranges)[1])

    dx, dr = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x), ranges)
    return np.asarray(dx), jax.tree.map(np.asarray, dr)


def _x_and_g() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.standard_normal((16, 12)).astype(np.float32) * 2, rng.standard_normal((16, 12)).astype(np.float32)


@pytest.mark.parametrize("zero_point", [False, True])
def test_a_dynamic_range_clips_nothing(zero_point: bool):
    x, g = _x_and_g()
    dx, _ = _gradients(ActSpec(INT4, zero_point=zero_point), x, g, {})
    np.testing.assert_array_equal(dx, g)


@pytest.mark.parametrize("zero_point", [False, True])
def test_straight_through_is_zero_where_clipped(zero_point: bool):
    x, g = _x_and_g()
    low, high = np.float32(-0.75), np.float32(1.5)
    spec = ActSpec(INT4, MinMax(), "tensor", zero_point)
    dx, dr = _gradients(spec, x, g, {"low": jnp.asarray(low), "high": jnp.asarray(high)})
    scale = (high - low) / 15 if zero_point else high / 7.5
    zero = np.round(-8 - low / scale) if zero_point else 0.0
    y = x.astype(np.float64) / scale + zero
    inside = (y >= -8.5) & (y <= 7.5)
    assert 0.2 < inside.mean() < 0.9
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))
    assert all((d == 0).all() for d in dr.values())


def test_lsq_gradient_is_that_of_the_paper():
    """arXiv 1902.08153: equation 3 for the step, equation 5 for x, and the gradient scale 1 / sqrt(N Q_P)."""
    x, g = _x_and_g()
    s = np.float32(0.23)
    q_n, q_p = 8, 7
    dx, dr = _gradients(ActSpec(INT4, LearnedStep(), "tensor"), x, g, {"step": jnp.asarray(s)})
    v = x.astype(np.float64) / s
    of_step = np.where(v <= -q_n, -q_n, np.where(v >= q_p, q_p, -v + np.round(v)))
    expected = (g * of_step).sum() / np.sqrt(x.size * q_p)
    assert (v < -q_n).any() and (v > q_p + 0.5).any() and np.abs(v).min() < 1
    # The paper clips at Q_P, we at half a step beyond, as values up to there are rounded to it: between, its of_step is
    # Q_P and ours the rounding error.
    between = ((v > q_p) & (v <= q_p + 0.5)) | ((v < -q_n) & (v >= -q_n - 0.5))
    ours = np.where(between, np.round(v) - v, of_step)
    np.testing.assert_allclose(dr["step"], (g * ours).sum() / np.sqrt(x.size * q_p), rtol=1e-5)
    if not between.any():
        np.testing.assert_allclose(dr["step"], expected, rtol=1e-5)
    np.testing.assert_array_equal(dx, np.where((v >= -q_n - 0.5) & (v <= q_p + 0.5), g, 0))


def test_lsq_gradient_equals_the_paper_without_borderline_values():
    """As above with no value in the half step beyond the last codes, where the two definitions are the same."""
    _, g = _x_and_g()
    s, q_n, q_p = np.float32(0.5), 8, 7
    v = np.concatenate([np.linspace(-7.9, 6.9, 160), np.linspace(8, 12, 16), np.linspace(-12, -9, 16)])
    x = (v.reshape(16, 12) * s).astype(np.float32)
    v = x.astype(np.float64) / s
    dx, dr = _gradients(ActSpec(INT4, LearnedStep(), "tensor"), x, g, {"step": jnp.asarray(s)})
    of_step = np.where(v <= -q_n, -q_n, np.where(v >= q_p, q_p, -v + np.round(v)))
    np.testing.assert_allclose(dr["step"], (g * of_step).sum() / np.sqrt(x.size * q_p), rtol=1e-5)
    np.testing.assert_array_equal(dx, np.where((v > -q_n) & (v < q_p), g, 0))


def test_lsq_with_an_offset():
    """arXiv 2004.09576, equations 4 and 5: x = code * s + b, b being the value of the lowest code.

    d/db is 1 where clipped and 0 where rounded; d/ds is the rounding error where rounded, and 0 or 2**bits - 1 at the
    low and high end, as codes are counted from b. Both have the gradient scale of LSQ.
    """
    x, g = _x_and_g()
    step, low = np.float32(0.2), np.float32(-0.9)
    spec = ActSpec(INT4, LearnedStep(), "tensor", True)
    dx, dr = _gradients(spec, x, g, {"step": jnp.asarray(step), "low": jnp.asarray(low)})
    zero = np.clip(np.round(-8 - low / step), -8, 7)
    y = x.astype(np.float64) / step + zero
    inside = (y >= -8.5) & (y <= 7.5)
    damp = 1 / np.sqrt(x.size * 7)
    of_step = np.where(inside, np.round(y) - y, np.where(y > 0, 15, 0))
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_allclose(dr["step"], (g * of_step).sum() * damp, rtol=1e-5)
    np.testing.assert_allclose(dr["low"], (g * ~inside).sum() * damp, rtol=1e-5)
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))


@pytest.mark.parametrize("zero_point", [False, True], ids=["both sides", "one side"])
def test_pact(zero_point: bool):
    """arXiv 1805.06085, equation 3: the clipping point has gradient 1 where x is clipped at it and 0 below.

    Symmetric, both ends are the clipping point and the lower has its negative.
    """
    x, g = _x_and_g()
    clip = np.float32(1.25)
    dx, dr = _gradients(ActSpec(INT4, LearnedClip(), "tensor", zero_point), x, g, {"clip": jnp.asarray(clip)})
    scale, zero = (clip / 15, -8) if zero_point else (clip / 7.5, 0)
    y = x.astype(np.float64) / scale + zero
    upper, lower = y > 7.5, y < -8.5
    assert upper.any() and lower.any()
    expected = (g * upper).sum() - (0 if zero_point else (g * lower).sum())
    np.testing.assert_allclose(dr["clip"], expected, rtol=1e-5)
    np.testing.assert_array_equal(dx, np.where(upper | lower, 0, g))


@pytest.mark.parametrize("spec", [s for s in VALID if s.is_learned], ids=str)
def test_a_learned_range_of_either_sign_is_the_same_range(spec: ActSpec):
    """An optimizer may step across 0: the value stays, and the gradient of the magnitude changes its sign."""
    x, g = _x_and_g()
    name = "step" if isinstance(spec.range, LearnedStep) else "clip"
    ranges = ranges_from_extremes(-0.75, 1.0, spec)
    mirrored = {**ranges, name: -ranges[name]}
    for a, b in zip(*(fake_quant(jnp.asarray(x), spec, (1,), r) for r in (ranges, mirrored)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    (dx, dr), (mx, mr) = (_gradients(spec, x, g, r) for r in (ranges, mirrored))
    np.testing.assert_array_equal(dx, mx)
    np.testing.assert_allclose(dr[name], -mr[name], rtol=1e-6)
    assert dr[name] != 0


@pytest.mark.parametrize("spec", [s for s in VALID if not s.is_dynamic], ids=str)
def test_ranges_from_extremes_cover_them(spec: ActSpec):
    """Half a step at the ends, as the codes and a rounded zero point may leave."""
    low, high = -1.5, 2.0
    x = jnp.asarray([[low, high, 0.0]])
    value = np.asarray(fake_quant(x, spec, (1,), ranges_from_extremes(low, high, spec))[1])
    one_sided = isinstance(spec.range, LearnedClip) and spec.zero_point
    expected = np.maximum(x, 0) if one_sided else x
    step = 4.0 / 2 ** (spec.format.bits if spec.format.kind == "int" else 4)
    np.testing.assert_allclose(value, expected, rtol=0, atol=step)
    assert value[0, 2] == 0


def test_the_module_has_a_name_for_each_range():
    assert set(activation_ranges._RANGES.values()) == set(activation_ranges.Range.__args__)
