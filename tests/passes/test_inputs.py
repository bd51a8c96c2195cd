"""Quantized inputs of matmuls: what is planned, shared and computed, how ranges are calibrated, trained and kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import qjax
from qjax.pallas_kernels.numbers import activations
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul_p
from qjax.passes.calibration import ranges, statistic
from qjax.passes.plan.rules import PlanError, Rule

RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("compile_quickly")
W8 = qjax.int8(scale=qjax.AbsMax())
MIN_MAX = qjax.static(observer=qjax.MinMax())


def array(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def walk(jaxpr: Any) -> Iterator[Any]:
    """All equations, sub-jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "eqns"):
                    yield from walk(inner)


def equations(jaxpr: Any) -> list[str]:
    """Names of all primitives, sub-jaxprs included."""
    return [eqn.primitive.name for eqn in walk(jaxpr)]


def codes_of(x: Any, spec: qjax.ActSpec, axes: tuple[int, ...], ranges: Any = None) -> np.ndarray:
    """The dequantized input in float64."""
    return np.asarray(activations.quantize(x, spec, axes, ranges).dequantize(spec.format, jnp.float32), np.float64)


# --- Products --------------------------------------------------------------------------------------------------

CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
GROUPS = np.asarray([3, 0, 2], np.int32)
OPERATIONS = {
    "dense": (lambda p, x: x @ p["w"], (5, 24), (24, 16), (1,)),
    "weight on the left": (lambda p, x: jnp.einsum("io,bi->ob", p["w"], x), (5, 24), (24, 16), (1,)),
    "two contracted axes": (lambda p, x: jnp.einsum("bthd,hdo->bto", x, p["w"]), (2, 3, 4, 8), (4, 8, 16), (2, 3)),
    "batched weights": (lambda p, x: jnp.einsum("ebi,eio->beo", x, p["w"]), (3, 5, 24), (3, 24, 16), (2,)),
    "convolution": (lambda p, x: lax.conv_general_dilated(x, p["w"], **CONV), (2, 6, 5, 8), (3, 3, 8, 16), (1, 2, 3)),
    "large convolution": (  # more products than float32 adds up exactly
        lambda p, x: lax.conv_general_dilated(x, p["w"], **CONV),
        (2, 4, 4, 256),
        (3, 3, 256, 4),
        (1, 2, 3),
    ),
    "grouped convolution": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], **CONV, feature_group_count=4),
        (2, 6, 5, 8),
        (3, 3, 2, 16),
        (1, 2, 3),
    ),
    "ragged dot": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.asarray(GROUPS)), (5, 24), (3, 24, 16), (1,)),
}


def trained_and_served(q: Any) -> Any:
    """Of parameters, packed ones and an input: both results, and gradients, of packed ones in the input alone."""

    @jax.jit
    def run(params, packed, x):
        def loss(params, x):
            out = q(params, x)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

        (_, trained), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        (_, served), x_grad = jax.value_and_grad(loss, argnums=1, has_aux=True)(packed, x)
        return trained, served, grads, x_grad

    return run


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_product_is_that_of_the_codes(name: str, zero_point: bool):
    """Against float64 on the dequantized operands; the derivative against that of the same float product."""
    fn, x_shape, w_shape, axes = OPERATIONS[name]
    spec = qjax.dynamic(zero_point=zero_point)
    rules = [Rule("**", qjax.int8(scale=qjax.AbsMax(), zero_point=zero_point), spec)]
    params, x = {"w": array(*w_shape)}, array(*x_shape) + 0.5
    q = qjax.quantize(fn, rules)
    plan = q.plan(params, x)
    assert [site.product for site in plan.sites] == ["integer"]
    packed = q.convert(params, x)

    run = trained_and_served(q)
    trained, served, (w_grad, x_grad), served_grad = run(params, packed, x)
    w_hat = np.asarray(packed["w"].dequantize(), np.float64)
    x_hat = codes_of(x, spec, axes)
    with jax.enable_x64(True):
        expected = np.asarray(fn({"w": jnp.asarray(w_hat)}, jnp.asarray(x_hat)))
        weights = np.cos(np.arange(expected.size)).reshape(expected.shape)
        pullback = jax.vjp(lambda w, x: fn({"w": w}, x), jnp.asarray(w_hat), jnp.asarray(x_hat))[1]
        expected_grads = [np.asarray(g) for g in pullback(jnp.asarray(weights))]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(served, np.float64), expected, rtol=0, atol=1e-6 * scale)
    np.testing.assert_array_equal(np.asarray(trained), np.asarray(served))
    for actual, wanted in zip((w_grad["w"], x_grad, served_grad), (*expected_grads, expected_grads[1]), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("equation", ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "ij,jk->ik"])
def test_matmul_of_two_activations(equation: str):
    shapes = {"bqhd,bkhd->bhqk": ((2, 5, 3, 8), (2, 7, 3, 8)), "bhqk,bkhd->bqhd": ((2, 3, 5, 7), (2, 7, 3, 8))}
    x, y = (array(*shape) for shape in shapes.get(equation, ((5, 8), (8, 6))))
    spec = qjax.dynamic()
    q = qjax.quantize(lambda p, x, y: jnp.einsum(equation, x, y) * p["s"], [Rule("matmul:0", activations=spec)])
    params = {"s": jnp.float32(1)}
    left, right = equation.split("->")[0].split(",")
    out = equation.split("->")[1]
    contracted = set(left) & set(right) - set(out)
    x_hat, y_hat = (
        codes_of(a, spec, tuple(i for i, name in enumerate(names) if name in contracted))
        for a, names in ((x, left), (y, right))
    )
    expected = np.einsum(equation, x_hat, y_hat)
    actual = jax.jit(q.apply)(params, x, y)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert "integer_matmul" in equations(jax.make_jaxpr(q.apply)(params, x, y).jaxpr)
    assert "both inputs int8/token" in str(q.plan(params, x, y))


class SelfAttention(nn.Module):
    """Three projections of one input, each of which casts it for itself."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(16, name=name, dtype=self.dtype)(x) for name in "qkv")
        return nn.Dense(8, name="out", dtype=self.dtype)(jax.nn.softmax(q @ k.T) @ v)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_an_input_that_sites_share_is_quantized_once(dtype: Any):
    model, x = SelfAttention(dtype), array(5, 24)
    variables = model.init(jax.random.key(0), x)
    q = qjax.quantize(model, [Rule("**", W8, qjax.dynamic())])
    packed = q.convert(variables, x)
    for tree, product in ((packed, "fused_matmul"), (variables, "integer_matmul")):  # served ones add their biases
        names = equations(jax.make_jaxpr(q.apply)(tree, x).jaxpr)
        assert names.count(product) == 4
    # each quantization rounds once; the weights of the packed model are not quantized again
    assert equations(jax.make_jaxpr(q.apply)(packed, x).jaxpr).count("round") == 2


def test_sites_that_share_an_input_share_its_range():
    model, x = SelfAttention(), array(5, 24)
    variables = model.init(jax.random.key(0), x)
    q = qjax.quantize(model, [Rule("**", W8, MIN_MAX)])
    stats = q.calibrate(variables, [x], progress=False)["quant_stats"]
    assert set(stats) == {"q", "out"}
    assert float(stats["q"]["kernel"]["low"]) == pytest.approx(float(x.min()))
    assert float(stats["q"]["kernel"]["high"]) == pytest.approx(float(x.max()))


# --- What is planned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("**", None, qjax.dynamic()), "not the weights"),
        (lambda: Rule("**", W8, cast("Any", W8)), "activations"),
        (lambda: Rule("matmul:*", W8), "no weights"),
        (lambda: qjax.dynamic("nf4"), "integers or fp8"),
        (lambda: qjax.dynamic("int9"), "no format named"),
        (lambda: qjax.Percentile(20), "above 50"),
        (lambda: qjax.MovingAverage(1.0), r"\[0, 1\)"),
        (lambda: qjax.static(dynamic_above=0), "ratio of errors"),
        (lambda: qjax.ActSpec(qjax.dynamic().format, dynamic_above=5), "calibration finds"),
        (lambda: qjax.Schedule(start=-1), "counted from 0"),
    ],
)
def test_a_recipe_without_meaning_is_an_error(make: Any, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_inputs_that_stay_float_have_a_reason():
    def fn(p, x):
        _, x = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["loop"])), (0, x))
        return x @ p["nf4"]

    params, x = {"loop": array(8, 8), "nf4": array(8, 8)}, array(3, 8)
    q = qjax.quantize(fn, [Rule("nf4*", qjax.nf4(), qjax.dynamic()), Rule("**", W8, MIN_MAX)])
    plan = q.plan(params, x)
    assert "while loop" in plan["loop"].reason
    assert plan["loop"].activations is None
    assert "float product" in plan["nf4"].reason
    assert plan["nf4"].activations == qjax.dynamic()
    with pytest.raises(PlanError, match="while loop"):
        qjax.quantize(fn, [Rule("loop", W8, MIN_MAX)]).plan(params, x)
    with pytest.raises(PlanError, match="matches no matmul"):
        qjax.quantize(fn, [Rule("matmul:*", activations=qjax.dynamic()), Rule("**", W8)]).plan(params, x)
    dynamic = qjax.quantize(fn, [Rule("**", W8, qjax.dynamic())])
    assert dynamic.plan(params, x)["loop"].activations is not None
    trained, served = jax.jit(lambda p, q, x: (dynamic(p, x), dynamic(q, x)))(params, dynamic.convert(params, x), x)
    np.testing.assert_array_equal(trained, served)


def test_missing_ranges_are_an_error():
    q = qjax.quantize(lambda p, x: x @ p["w"], [Rule("**", W8, MIN_MAX)])
    params, x = {"w": array(8, 8)}, array(3, 8)
    for call in (q.apply, q.convert):
        with pytest.raises(ValueError, match=r"'w'.*q\.calibrate"):
            call(params, x)


# --- Observers -------------------------------------------------------------------------------------------------


def histogram(x: np.ndarray, spec: qjax.ActSpec) -> statistic.Statistic:
    total = None
    for part in np.array_split(x, 5):
        seen = statistic.observe(jnp.asarray(part), spec, (0,))
        total = seen if total is None else total.follow(seen, 0.0)
    assert total is not None
    return total


@pytest.mark.parametrize("zero_point", [False, True])
def test_percentile_is_that_of_the_values(zero_point: bool):
    x = np.sort(RNG.standard_t(3, 20_000).astype(np.float32))  # sorted: later batches widen the histogram
    spec = qjax.static(observer=qjax.Percentile(99.0), zero_point=zero_point)
    seen = histogram(x, spec)
    assert float(jnp.sum(seen.counts)) == x.size
    low, high = ranges.extremes(seen, spec)
    width = float(seen.limit) / statistic.BINS
    expected = np.percentile(x, [0.5, 99.5]) if zero_point else np.percentile(np.abs(x), 99.0) * np.asarray([-1, 1])
    np.testing.assert_allclose([low, high], expected, atol=1.5 * width)


@pytest.mark.parametrize("zero_point", [False, True])
def test_mse_range_is_that_of_least_error(zero_point: bool):
    x = RNG.standard_t(3, 20_000).astype(np.float32) + np.float32(0.5 * zero_point)
    spec = qjax.static("int4", observer=qjax.MseRange(), zero_point=zero_point)
    low, high = ranges.extremes(histogram(x, spec), spec)

    def error(low: float, high: float) -> float:
        ranges = {"low": jnp.float32(low), "high": jnp.float32(high)}
        return float(np.mean((codes_of(jnp.asarray(x), spec, (), ranges) - x) ** 2))

    ends = 2.0 ** np.linspace(-6, 0, 60)
    if zero_point:
        least = min(error(x.min() * a, x.max() * b) for a in ends[::3] for b in ends[::3])
    else:
        least = min(error(-np.abs(x).max() * a, np.abs(x).max() * a) for a in ends)
    assert error(float(low), float(high)) <= 1.03 * least
    assert least < 0.7 * error(float(x.min()), float(x.max()))  # so that the search matters


def test_entropy_range_clips_outliers_and_keeps_a_bell():
    spec = qjax.static(observer=qjax.EntropyRange(), zero_point=False)
    x = RNG.normal(size=100_000).astype(np.float32)
    _, high = ranges.extremes(histogram(x, spec), spec)
    assert 3 < high <= np.abs(x).max() + 1e-3
    x[0] = 100.0
    _, clipped = ranges.extremes(histogram(x, spec), spec)
    assert clipped < 20


def test_histograms_merge_exactly():
    spec = qjax.static(observer=qjax.Percentile(99.0))
    parts = [RNG.normal(size=500).astype(np.float32) * s for s in (1.0, 300.0, 0.01, 7.0)]
    seen = [statistic.observe(jnp.asarray(part), spec, (0,)) for part in parts]
    left = seen[0].combine(seen[1]).combine(seen[2].combine(seen[3]))
    right = seen[3].combine(seen[2]).combine(seen[1]).combine(seen[0])
    np.testing.assert_array_equal(left.counts, right.counts)
    assert float(jnp.sum(left.counts)) == 2000
    edges = np.arange(statistic.BINS + 1) * float(left.limit) / statistic.BINS
    values = np.concatenate(parts)
    np.testing.assert_array_equal(left.counts[1], np.histogram(values[values >= 0], edges)[0])
    nothing = seen[0].nothing()
    np.testing.assert_array_equal(nothing.combine(seen[1]).counts, seen[1].counts)
    assert float(nothing.merge(seen[1]).low) == float(seen[1].low)


@pytest.mark.parametrize("keep", [(1,), (0,)])
def test_extremes_per_channel_and_per_token(keep: tuple[int, ...]):
    x = RNG.normal(size=(7, 5)).astype(np.float32)
    seen = statistic.observe(jnp.asarray(x), MIN_MAX, (1,), keep)
    np.testing.assert_array_equal(seen.low, x.min(axis=1 - keep[0]))
    np.testing.assert_array_equal(seen.high, x.max(axis=1 - keep[0]))


# --- Inputs that one range does not serve ---------------------------------------------------------------------------

UNLESS = qjax.static(observer=qjax.MinMax(), dynamic_above=5)
LOUD = jnp.asarray(10.0 ** np.linspace(-2, 1, 32)[:, None], jnp.float32)  # a factor for each token


def gated(p, x):
    return (LOUD * (x @ p["up"])) @ p["down"]


def test_an_input_that_one_range_does_not_serve_is_dynamic(tmp_path):
    params, x = {"up": array(16, 64), "down": array(64, 8)}, array(32, 16)
    q = qjax.quantize(gated, Rule("**", W8, UNLESS))
    q.observe(params, [x], progress=False).save(tmp_path / "seen.npz")
    variables = q.calibrate(params, qjax.Calibration.load(tmp_path / "seen.npz"))
    assert set(variables["quant_stats"]["up"]) == {"low", "high"}
    assert set(variables["quant_stats"]["down"]) == {"dynamic"}

    h = LOUD * (x @ params["up"])
    ends = {"low": jnp.min(h), "high": jnp.max(h)}
    errors = [
        np.sum((codes_of(h, spec, (1,), ranges) - np.asarray(h, np.float64)) ** 2)
        for spec, ranges in ((UNLESS, ends), (qjax.dynamic(zero_point=True), None))
    ]
    ratio = float(variables["quant_stats"]["down"]["dynamic"])
    assert ratio > 5
    np.testing.assert_allclose(ratio, errors[0] / errors[1], rtol=0.1)  # a histogram knows values to a bin

    plan = q.plan(variables, x)
    assert plan["up"].activations == UNLESS
    assert plan["down"].activations == qjax.dynamic(zero_point=True)
    assert f"{ratio:.1f}x the error" in plan["down"].reason
    by_hand = qjax.quantize(gated, [Rule("down", W8, qjax.dynamic(zero_point=True)), Rule("**", W8, UNLESS)])
    other = by_hand.calibrate(params, [x], progress=False)
    packed = q.convert(variables, x)
    out = jax.jit(lambda v, s, o, x: (q.apply(v, x), q.apply(s, x), by_hand.apply(o, x)))(variables, packed, other, x)
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[0], out[2])


def test_the_worst_of_scanned_layers_decides():
    params, x = {"w": array(2, 16, 16)}, array(32, 16)

    def fn(p, x, loud):
        return lax.scan(lambda x, each: (jnp.tanh((x * each[1]) @ each[0]), None), x, (p["w"], loud))[0]

    q = qjax.quantize(fn, Rule("**", W8, UNLESS))
    quiet, loud = (jnp.stack([jnp.ones_like(LOUD), factor]) for factor in (jnp.ones_like(LOUD), LOUD))
    served = q.calibrate(params, [(x, quiet)], progress=False)
    assert served["quant_stats"]["w"]["low"].shape == (2,)
    variables = q.calibrate(params, [(x, loud)], progress=False)
    assert q.plan(variables, x, loud)["w"].activations == qjax.dynamic(zero_point=True)
    by_hand = qjax.quantize(fn, Rule("**", W8, qjax.dynamic(zero_point=True)))
    out = jax.jit(lambda v, p: (q.apply(v, x, loud), by_hand.apply(p, x, loud)))(variables, params)
    np.testing.assert_array_equal(*out)


def test_an_nnx_module_calibrated_again_forgets_what_it_gave_up():
    class Gated(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.down = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x, loud):
            return self.down(x * loud)

    q, x = qjax.quantize(Gated(nnx.Rngs(0)), Rule("**", W8, UNLESS)), array(32, 16)
    q.calibrate([(x, LOUD)], progress=False)
    assert set(q.ranges.values()) == {"quant_stats/down/kernel/dynamic"}
    assert q.plan(x, LOUD)["down/kernel"].activations == qjax.dynamic(zero_point=True)
    packed = q.convert(x, LOUD)
    out = nnx.jit(lambda a, b, x: (a(x, LOUD), b(x, LOUD)))(q, packed, x)
    np.testing.assert_array_equal(*out)
    q.calibrate([(x, jnp.ones_like(LOUD))], progress=False)
    assert q.plan(x, LOUD)["down/kernel"].activations == UNLESS


# --- Calibration -------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Scanned layers, each step with weights of its own."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + jnp.tanh(nn.Dense(8, name="up")(x)), None

        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scanned(name="layers")(x, None)
        return nn.Dense(4, name="head")(x)


def test_statistics_of_scanned_layers_are_stacked():
    model, x = Layers(), array(5, 8)
    variables = model.init(jax.random.key(0), x)
    q = qjax.quantize(model, [Rule("**", W8, MIN_MAX)])
    calibrated = q.calibrate(variables, [x, 2 * x], progress=False)
    kernel = np.asarray(variables["params"]["layers"]["up"]["kernel"])
    h, highs = np.asarray(2 * x), []
    for i in range(3):
        highs.append(h.max())
        h = h + np.tanh(h @ kernel[i])
    found = calibrated["quant_stats"]["layers"]["up"]["kernel"]["high"]
    np.testing.assert_allclose(found, highs, rtol=1e-5)
    trained, served = jax.jit(lambda c, p, x: (q.apply(c, x), q.apply(p, x)))(calibrated, q.convert(calibrated, x), x)
    np.testing.assert_array_equal(trained, served)


def test_statistics_of_a_recurrence_are_merged_over_its_steps():
    def fn(p, x):
        return lax.scan(lambda h, x: (jnp.tanh(h @ p["w"]) + x, None), x[0], x)[0]

    params, x = {"w": array(8, 8)}, array(6, 3, 8)
    q = qjax.quantize(fn, [Rule("**", W8, MIN_MAX)])
    high = q.calibrate(params, [x], progress=False)["quant_stats"]["w"]["high"]
    h, seen = np.asarray(x[0]), []
    for step in np.asarray(x):
        seen.append(h.max())
        h = np.tanh(h @ np.asarray(params["w"])) + step
    assert float(high) == pytest.approx(max(seen), rel=1e-5)


def test_statistics_of_branches():
    def fn(p, x, which):
        return lax.switch(which, [lambda x: x @ p["a"], lambda x: (2 * x) @ p["b"]], x)

    params, x = {"a": array(8, 8), "b": array(8, 8)}, array(3, 8)
    q = qjax.quantize(fn, [Rule("**", W8, MIN_MAX)])
    first = q.observe(params, [(x, 0)], progress=False)
    with pytest.raises(ValueError, match="'b' was never reached"):
        q.calibrate(params, first)
    both = q.calibrate(params, q.observe(params, [(x, jnp.int32(1)), (x, jnp.int32(0))], progress=False))
    assert float(both["quant_stats"]["b"]["high"]) == pytest.approx(2 * float(x.max()), rel=1e-6)
    assert float(both["quant_stats"]["a"]["high"]) == pytest.approx(float(x.max()), rel=1e-6)


def test_calibration_can_be_saved_merged_and_continued(tmp_path):
    params = {"w": array(8, 8)}
    q = qjax.quantize(lambda p, x: x @ p["w"], [Rule("**", W8, qjax.static(observer=qjax.Percentile(99)))])
    batches = [array(16, 8) * scale for scale in (1, 5, 0.1, 2)]
    whole = q.observe(params, batches, progress=False)
    begun = q.observe(params, iter(batches[:2]), progress=False)
    begun.save(tmp_path / "calibration.npz")
    loaded = qjax.Calibration.load(tmp_path / "calibration.npz")
    continued = q.observe(params, batches[2:], start=loaded, progress=False)
    merged = begun.merge(q.observe(params, batches[2:], progress=False))
    for other in (continued, merged):
        assert other.batches == 4
        np.testing.assert_array_equal(other.statistics["w"].counts, whole.statistics["w"].counts)
        assert q.calibrate(params, other)["quant_stats"] == q.calibrate(params, whole)["quant_stats"]

    data = (tmp_path / "calibration.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "foreign.npz").write_bytes(b"GGUF" + data)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("cut.npz", "foreign.npz", "other.npz"):
        with pytest.raises(ValueError, match=name):
            qjax.Calibration.load(tmp_path / name)
    other = qjax.quantize(lambda p, x: x @ p["w"], [Rule("**", W8, MIN_MAX)])
    with pytest.raises(ValueError, match="different models or recipes"):
        begun.merge(other.observe(params, batches, progress=False))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_calibration_refuses_what_is_not_finite(bad: float):
    params, x = {"w": array(8, 8)}, array(4, 8)
    q = qjax.quantize(lambda p, x: x @ p["w"], [Rule("**", W8, MIN_MAX)])
    with pytest.raises(ValueError, match="'w' has NaN or infinite"):
        q.calibrate(params, [x, x.at[1, 2].set(bad)], progress=False)


def test_calibration_without_batches_is_an_error():
    params = {"w": array(8, 8)}
    q = qjax.quantize(lambda p, x: x @ p["w"], [Rule("**", W8, MIN_MAX)])
    with pytest.raises(ValueError, match="no batch"):
        q.calibrate(params, iter([]), progress=False)


# --- Training --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(16, name="up")(x)))


def start(recipe: Any, **options: Any) -> tuple[Any, Any, jax.Array]:
    model, x = Classifier(), array(32, 8)
    q = qjax.quantize(model, recipe, **options)
    return q, q.calibrate(model.init(jax.random.key(0), x), [x], progress=False), x


def test_moving_averages_follow_training_and_freeze():
    decay = 0.5
    rules = [Rule("**", W8, qjax.static(observer=qjax.MovingAverage(decay)))]
    q, variables, x = start(rules, schedule=qjax.Schedule(start=1, freeze=3))
    step = jax.jit(lambda v, x: q.apply(v, x, mutable=["quant_stats"]))
    weight, average = 1 - decay, float(x.max())  # of the calibration batch
    floats = Classifier().apply({"params": variables["params"]}, x)
    for i in range(5):
        batch = x * (i + 2)
        out, updates = step(variables, batch)
        variables = {**variables, **updates}
        if i < 3:
            grown = decay * weight + (1 - decay)
            average = (decay * weight * average + (1 - decay) * float(batch.max())) / grown
            weight = grown
        kernel = variables["quant_stats"]["up"]["kernel"]
        assert float(kernel["high"]) == pytest.approx(average, rel=1e-5)
        assert int(variables["quant_stats"]["step"]) == i + 1
        expected = Classifier().apply({"params": variables["params"]}, batch)
        assert bool(jnp.all(out == expected)) == (i < 1), "the model is the float one before `start`"
    before = q.apply({**variables, "quant_stats": {**variables["quant_stats"], "step": jnp.int32(0)}}, x)
    np.testing.assert_array_equal(before, floats)
    packed = q.convert(variables, x)
    trained, served = jax.jit(lambda v, p, x: (q.apply(v, x), q.apply(p, x)))(variables, packed, x)
    np.testing.assert_array_equal(trained, served)
    ranges = {name: tree for name, tree in variables["quant_stats"].items() if name != "step"}
    with pytest.raises(ValueError, match="schedule"):
        q.apply({"params": variables["params"], "quant_stats": ranges}, x)


@pytest.mark.parametrize("spec", [qjax.lsq("int4"), qjax.pact("int4"), qjax.lsq("int4", zero_point=False)], ids=str)
def test_learned_ranges_train_in_a_train_state_and_resume_exactly(spec: qjax.ActSpec):
    q, variables, x = start([Rule("**", qjax.int4(group=8, scale=qjax.AbsMax()), spec)])
    labels = jnp.arange(32) % 4
    tx = optax.multi_transform(
        {"params": optax.adam(1e-2), "quant": optax.adam(1e-3)}, {"params": "params", "quant": "quant"}
    )
    state = TrainState.create(apply_fn=q.apply, params=variables, tx=tx)
    assert set(variables) == {"params", "quant"}

    @jax.jit
    def train(state, inputs):
        def loss(params):
            x = 1.5 * inputs  # larger than in calibration: some values are clipped
            return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn(params, x), labels).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses, saved = [], state
    for i in range(12):
        if i == 6:
            saved = jax.device_get(state)
        state, value = train(state, x)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b)), state.params["quant"], variables["quant"])
    assert max(jax.tree.leaves(moved)) > 1e-4
    resumed = saved
    for _ in range(6):
        resumed, _ = train(resumed, x)
    for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    packed = q.convert(state.params, x)
    trained, served = jax.jit(lambda v, p, x: (q.apply(v, x), q.apply(p, x)))(state.params, packed, x)
    np.testing.assert_array_equal(trained, served)


@pytest.mark.parametrize("packed", [False, True], ids=["trained", "packed"])
def test_a_compiled_model_is_differentiated_from_outside(packed: bool):
    """When the trace of `jit` is over, and inside of `scan`: the derivative reads nothing that it closed over."""

    def layers(p, x):
        return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]

    q = qjax.quantize(layers, Rule("**", W8, qjax.dynamic()))
    params, x = {"w": array(2, 16, 16)}, array(3, 16)
    served = q.convert(params, x) if packed else None

    def loss(operand: Any) -> jax.Array:
        return jnp.sum((q.apply(served, operand) if packed else q.apply(operand, x)) ** 2)

    operand, inside, outside = x if packed else params, jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss))
    for one, other in zip(*(jax.tree.leaves(f(operand)) for f in (inside, outside)), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(np.abs(other).max()))


# --- Other kinds of models, and checkpoints ---------------------------------------------------------------------------


class NNXClassifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.head = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.up(x)))


def test_nnx_keeps_ranges_as_variables(tmp_path):
    x = array(32, 8)
    spec = qjax.static(observer=qjax.MovingAverage(0.5))
    q = qjax.quantize(NNXClassifier(nnx.Rngs(0)), [Rule("head/**", W8, qjax.lsq()), Rule("**", W8, spec)])
    q.calibrate([x], progress=False)
    q.train()
    nnx.jit(lambda q, x: q(x))(q, 3 * x)
    stats = q.ranges.collections()["quant_stats"]["up"]["kernel"]
    assert float(stats["high"]) == pytest.approx((0.25 * float(x.max()) + 0.5 * 3 * float(x.max())) / 0.75, rel=1e-5)
    grads = nnx.grad(lambda q: jnp.mean(q(x) ** 2))(q)
    assert any("ranges" in map(str, path) for path, _ in nnx.to_flat_state(grads))
    q.eval()
    packed = q.convert(x)
    qjax.save(tmp_path / "model", packed)
    restored = qjax.restore(tmp_path / "model", NNXClassifier(nnx.Rngs(1)))
    trained, served, again = nnx.jit(lambda q, p, r, x: (q(x), p(x), r(x)))(q, packed, restored, x)
    np.testing.assert_array_equal(trained, served)
    np.testing.assert_array_equal(served, again)


def test_linen_ranges_are_saved_with_the_model(tmp_path):
    q, variables, x = start([Rule("**", W8, qjax.lsq())])
    packed = q.convert(variables, x)
    qjax.save(tmp_path / "model", q, packed)
    r, restored = qjax.restore(tmp_path / "model", Classifier())
    np.testing.assert_array_equal(jax.jit(q.apply)(packed, x), jax.jit(r.apply)(restored, x))
    assert r.recipe.rules == q.recipe.rules


def test_convert_calibrates():
    params, x = {"w": array(8, 8)}, array(4, 8)
    q = qjax.quantize(lambda p, x: x @ p["w"], [Rule("**", W8, MIN_MAX)])
    packed = q.convert(params, x, calibration=[x])
    assert float(packed["quant_stats"]["w"]["high"]) == pytest.approx(float(x.max()))
    assert q(packed, x).shape == (4, 8)


def test_served_model_compiles_to_integer_products():
    """What XLA gets is int8 x int8 -> int32, not a float product of dequantized values."""
    q = qjax.quantize(lambda p, x: x @ p["w"], [Rule("**", W8, qjax.dynamic())])
    params, x = {"w": array(64, 32)}, array(8, 64)
    packed = q.convert(params, x)
    jaxpr = jax.make_jaxpr(q.apply)(packed, x)
    (eqn,) = (e for e in walk(jaxpr.jaxpr) if e.primitive is integer_matmul_p)
    assert eqn.invars[0].aval.dtype == jnp.int8
    assert "dot_general" not in equations(jaxpr.jaxpr)
    assert packed["w"].words.dtype == jnp.int8
