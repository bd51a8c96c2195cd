"""Products of 8-bit floats against float64 on the codes: the primitive, plans, training, serving, files."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from test_inputs import trained_and_served

import qjax
from qjax.pallas_kernels.numbers import activations
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, PerTensor, QuantSpec
from qjax.pallas_kernels.numbers.stored_scales import Scales
from qjax.pallas_kernels.ops.fp8_matmul import reference as fp8_matmul_reference
from qjax.pallas_kernels.ops.fp8_matmul.api import fp8_matmul, fp8_matmul_p
from qjax.pallas_kernels.ops.matmul import cpu as matmul_cpu
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.passes.plan.rules import Rule

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
EPS = float(np.finfo(np.float32).eps)
CHANNEL = PerChannel()
W8 = qjax.fp8_e4m3(scale=AbsMax())
X8 = qjax.dynamic("fp8_e4m3")
pytestmark = pytest.mark.usefixtures("compile_quickly")


# --- The primitive -----------------------------------------------------------------------------------------------


class Case:
    """Random operands of one product, every finite code as likely, and the product in float64."""

    def __init__(
        self,
        formats: str = "e4m3 e4m3",
        granularity: Any = CHANNEL,
        order: Any = "nk",
        rows: int = 3,
        k: int = 40,
        n: int = 17,
        stack: tuple[int, ...] = (),
        layers: int | None = None,
    ):
        self.rng = np.random.default_rng([rows, k, n])
        of_x, of_w = formats.split()
        lead = stack if layers is None else (layers, *stack)
        self.codes, self.weights = self._codes(of_x, (*stack, rows, k)), self._codes(of_w, (*lead, k, n))
        shape = (*lead, 1, 1 if isinstance(granularity, PerTensor) else n)
        self.scales = self.rng.uniform(0.001, 0.1, shape).astype(np.float32)
        self.scale = jnp.asarray(self.rng.uniform(0.001, 0.1, (*stack, rows, 1)), jnp.float32)
        spec = QuantSpec(FORMATS[f"fp8_{of_w}"], granularity, scale_rule=AbsMax())
        arrays = (self.weights.view(np.int8), self.scales)
        words, values = (jnp.asarray(a if order == "kn" else np.swapaxes(a, -1, -2)) for a in arrays)
        layout = Layout((((k, "k"),), ((n, "n"),)))
        self.w = QTensor(words, Scales(values), spec, layout, jnp.dtype("bfloat16"), order)
        self.x = jnp.asarray(self.codes)

    def _codes(self, format: str, shape: tuple[int, ...]) -> np.ndarray:
        codes = self.rng.integers(0, 256, shape).astype(np.uint8).view(DTYPES[format])
        return np.where(np.isfinite(codes.astype(np.float32)), codes, np.zeros_like(codes))

    def check(self, actual: Any, layer: int | None = None) -> None:
        """Within the error of a float32 sum in any order, and of the two products with scales."""
        weights, scales = (a if layer is None else a[layer] for a in (self.weights, self.scales))
        factors = scales.astype(np.float64) * np.asarray(self.scale)
        x, w = self.codes.astype(np.float64), weights.astype(np.float64)
        assert actual.dtype == jnp.float32
        error = np.abs(np.asarray(actual, np.float64) - x @ w * factors)
        bound = EPS * (x.shape[-1] / 2 + 2) * (np.abs(x) @ np.abs(w)) * factors
        assert (error <= bound).all(), (error / bound).max()


def reference(x: Any, scale: Any, w: QTensor, layer: Any = None) -> jax.Array:
    """What platforms with a matrix unit for 8-bit floats run; XLA CPU converts it."""
    return fp8_matmul_reference.matmul(x, w, layer=layer, precision=lax.Precision.DEFAULT) * scale


@pytest.mark.parametrize("options", [{"order": "kn", "k": 100}, {"layers": 2, "stack": (2,)}], ids=str)
def test_cpu_converts_block_by_block(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """No float32 array in the program has as many values as the weight."""
    monkeypatch.setattr(matmul_cpu, "BLOCK_VALUES", 128)
    case = Case(**options)
    layer = 1 if "layers" in options else None
    program = jax.jit(fp8_matmul, static_argnames="layer").lower(case.x, case.scale, case.w, layer=layer)
    case.check(program.compile()(case.x, case.scale, case.w), layer)
    assert f"tensor<{case.w.layout.k}x{case.w.layout.n}xf32>" not in program.as_text()
    assert "f8E4M3FN" in program.as_text()


@pytest.mark.parametrize("kernel", ["mosaic", "triton"])
def test_few_rows_of_layers_on_nvidia_gpus(kernel: str):
    """What they run on in `target_chip`: kernels of weight-only products, exact codes, scales after the sums."""
    module: Any = {"mosaic": matmul_mosaic, "triton": matmul_triton}[kernel]
    if kernel == "mosaic" and jax.__version_info__ < (0, 11):
        pytest.skip("Mosaic GPU is interpreted from jax 0.11 on")
    case = Case("e4m3 e5m2", layers=3, rows=5, k=192, n=64)
    how: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": jnp.float32, "transpose": False}
    x, w = case.x.astype(jnp.bfloat16), dataclasses.replace(case.w, dtype=jnp.dtype(jnp.float32))
    assert module.unsupported(x, w, (), jnp.dtype(jnp.float32)) is None
    case.check(module.matmul(x, w, layer=jnp.int32(1), interpret=True, **how) * case.scale, 1)


def test_vmap():
    """Rows share a weight; each element has its own weight; each has its own layer of one stack."""
    shared, own, stacked = Case(rows=6), Case(stack=(2,)), Case(layers=2)
    rows = jnp.stack([shared.x, shared.x[::-1]]), jnp.stack([shared.scale, shared.scale[::-1]])
    layers = jnp.asarray([1, 0])
    picked = jax.vmap(lambda i: fp8_matmul(stacked.x, stacked.scale, stacked.w, layer=i))
    out, each, layered = jax.jit(
        lambda: (
            jax.vmap(fp8_matmul, in_axes=(0, 0, None))(*rows, shared.w),
            jax.vmap(fp8_matmul)(own.x, own.scale, own.w),
            picked(layers),
        )
    )()
    shared.check(out[0])
    shared.check(out[1][::-1])
    own.check(each)
    stacked.check(layered[0], 1)
    stacked.check(layered[1], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_result_is_rounded_once(dtype: Any):
    case = Case()
    scale = case.scale * 2.0**-12  # within float16

    @jax.jit
    def both(x: Any, w: QTensor) -> tuple[jax.Array, jax.Array]:
        return fp8_matmul(x, scale, w, out_dtype=dtype), fp8_matmul(x, scale, w)

    narrow, wide = both(case.x, case.w)
    np.testing.assert_array_equal(np.asarray(narrow), np.asarray(wide).astype(dtype))


@pytest.mark.parametrize(
    ("platform", "precision", "expected"),
    [
        ("cuda", None, "DEFAULT"),
        ("cuda", (lax.Precision.DEFAULT, lax.Precision.HIGH), "HIGHEST"),
        ("tpu", lax.Precision.HIGHEST, "DEFAULT"),
    ],
)
def test_what_xla_is_given(platform: str, precision: Any, expected: str):
    """One dot of float8 numbers, at a precision that changes something on NVIDIA GPUs alone."""
    case = Case()
    program = jax.jit(lambda x, w: fp8_matmul(x, case.scale, w, precision=precision)).trace(case.x, case.w)
    text = program.lower(lowering_platforms=(platform,)).as_text()
    (dot,) = (line for line in text.splitlines() if "dot_general" in line)
    assert f"precision = [{expected}, {expected}]" in dot
    assert "tensor<3x40xf8E4M3FN>, tensor<17x40xf8E4M3FN>) -> tensor<3x17xf32>" in dot


def test_misuse_is_an_error():
    case = Case()
    int8 = qjax.int8(scale=AbsMax())
    groups = QuantSpec(FORMATS["fp8_e4m3"], PerGroup(8), scale_rule=AbsMax())
    for spec in (int8, groups):
        other = dataclasses.replace(case.w, spec=spec)
        with pytest.raises(TypeError, match=f"not {spec} with K=40"):
            fp8_matmul(case.x, case.scale, other)
    with pytest.raises(TypeError, match="not float32"):
        fp8_matmul(case.x.astype(jnp.float32), case.scale, case.w)
    with pytest.raises(TypeError, match=r"x\[3, 39\].*K=40"):
        fp8_matmul(case.x[:, :-1], case.scale, case.w)
    with pytest.raises(TypeError, match="no derivative"):
        jax.grad(lambda scale: jnp.sum(fp8_matmul((case.x * scale).astype(case.x.dtype), case.scale, case.w)))(
            jnp.ones((), case.x.dtype)
        )


# --- What is planned ---------------------------------------------------------------------------------------------


def array(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng([2, *shape]).normal(size=shape), jnp.float32)


def exact(x: Any, spec: qjax.ActSpec, axes: tuple[int, ...], ranges: Any = None) -> np.ndarray:
    """The dequantized input in float64."""
    found = activations.quantize(jnp.asarray(x), spec, axes, ranges)
    codes = np.asarray(found.codes).view(np.dtype(spec.format.dtype))
    return codes.astype(np.float64) * np.asarray(found.scale, np.float64)


CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
SIZES = np.asarray([3, 0, 2], np.int32)
# name -> function, shapes of x and w, axes that x contracts, why it is a float product
OPERATIONS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "dense": (lambda p, x: x @ p["w"], (5, 24), (24, 16), (1,), ""),
    "weight on the left": (lambda p, x: jnp.einsum("io,bi->ob", p["w"], x), (5, 24), (24, 16), (1,), ""),
    "two axes": (lambda p, x: jnp.einsum("bthd,hdo->bto", x, p["w"]), (2, 3, 4, 8), (4, 8, 16), (2, 3), ""),
    "experts": (lambda p, x: jnp.einsum("ebi,eio->beo", x, p["w"]), (3, 5, 24), (3, 24, 16), (2,), ""),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], **CONV),
        (2, 6, 5, 8),
        (3, 3, 8, 16),
        (1, 2, 3),
        "a 'conv' of 8-bit floats",
    ),
    "ragged dot": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.asarray(SIZES)),
        (5, 24),
        (3, 24, 16),
        (1,),
        "a 'ragged' of 8-bit floats",
    ),
}


@pytest.mark.parametrize(
    ("name", "formats"),
    [*((name, "e4m3 e4m3") for name in OPERATIONS), ("dense", "e5m2 e4m3"), ("experts", "e4m3 e5m2")],
)
def test_trained_and_served_model_multiply_the_codes(name: str, formats: str):
    """Against float64 on the dequantized operands; the derivative against that of the same float product."""
    fn, x_shape, w_shape, axes, why = OPERATIONS[name]
    of_x, of_w = formats.split()
    spec = qjax.dynamic(f"fp8_{of_x}")
    params, x = {"w": array(*w_shape)}, array(*x_shape) + 0.5
    q = qjax.quantize(fn, [Rule("**", getattr(qjax, f"fp8_{of_w}")(scale=AbsMax()), spec)])
    plan = q.plan(params, x)
    assert [site.product for site in plan.sites] == ["float" if why else "fp8"]
    assert plan["w"].reason == (f"float product: {why}" if why else "")
    assert plan["w"].order == "nk"
    packed = q.convert(params, x)

    run = trained_and_served(q)
    assert (str(jax.make_jaxpr(run)(params, packed, x)).count("fp8_matmul[") > 0) == (not why)
    trained, served, (w_grad, x_grad), served_grad = run(params, packed, x)
    w_hat, x_hat = np.asarray(packed["w"].dequantize(), np.float64), exact(x, spec, axes)
    with jax.enable_x64(True):
        expected = np.asarray(fn({"w": jnp.asarray(w_hat)}, jnp.asarray(x_hat)))
        weights = np.cos(np.arange(expected.size)).reshape(expected.shape)
        pullback = jax.vjp(lambda w, x: fn({"w": w}, x), jnp.asarray(w_hat), jnp.asarray(x_hat))[1]
        expected_grads = [np.asarray(g) for g in pullback(jnp.asarray(weights))]
    for out in (trained, served):
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    for actual, wanted in zip((w_grad["w"], x_grad, served_grad), (*expected_grads, expected_grads[1]), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("weights", "inputs", "why"),
    [
        (qjax.fp8_e4m3(group=8, scale=AbsMax()), X8, "scales change along what the 'dot' contracts"),
        (qjax.int8(scale=AbsMax()), X8, "int8 times fp8_e4m3"),
        (W8, qjax.dynamic(), "fp8_e4m3 times int8"),
        (qjax.fp4_e2m1(scale=AbsMax()), X8, "fp4_e2m1 times fp8_e4m3"),
    ],
    ids=str,
)
def test_other_products_are_float_and_say_why(weights: Any, inputs: Any, why: str):
    params, x = {"w": array(24, 16)}, array(5, 24)
    q = qjax.quantize(lambda p, x: x @ p["w"], Rule("**", weights, inputs))
    assert q.plan(params, x)["w"].reason == f"float product: {why}"
    packed = q.convert(params, x)
    found = activations.quantize(x, inputs, (1,)).dequantize(inputs.format, jnp.float32)
    expected = np.asarray(found, np.float64) @ np.asarray(packed["w"].dequantize(), np.float64)
    np.testing.assert_allclose(jax.jit(q.apply)(packed, x), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_models_in_half_precision(dtype: Any):
    params, x = {"w": array(24, 16).astype(dtype)}, array(5, 24).astype(dtype)
    q = qjax.quantize(lambda p, x: x @ p["w"], "w8a8_fp8_qat")
    packed = q.convert(params, x)
    trained, served = jax.jit(lambda p, packed, x: (q(p, x), q(packed, x)))(params, packed, x)
    assert trained.dtype == served.dtype == dtype
    words, scales = packed["w"].matrix_arrays()
    weights = np.asarray(words).view(DTYPES["e4m3"]).astype(np.float64) * np.asarray(scales.values, np.float64)
    expected = exact(x, X8, (1,)) @ weights
    for out in (trained, served):  # one rounding: weights are never rounded to the model's dtype
        error = np.abs(np.asarray(out, np.float64) - expected)
        assert (error <= 0.51 * float(jnp.finfo(dtype).eps) * np.abs(expected) + 1e-6).all()


@pytest.mark.parametrize("equation", ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "ij,jk->ik"])
def test_matmul_of_two_activations(equation: str):
    shapes = {"bqhd,bkhd->bhqk": ((2, 5, 3, 8), (2, 7, 3, 8)), "bhqk,bkhd->bqhd": ((2, 3, 5, 7), (2, 7, 3, 8))}
    x, y = (array(*shape) for shape in shapes.get(equation, ((5, 8), (8, 6))))
    q = qjax.quantize(lambda p, x, y: jnp.einsum(equation, x, y) * p["s"], Rule("matmul:0", activations=X8))
    params = {"s": jnp.float32(1)}
    plan = q.plan(params, x, y)
    assert [site.product for site in plan.sites] == ["fp8"]
    assert "both inputs fp8_e4m3/token" in str(plan)
    left, right = equation.split("->")[0].split(",")
    contracted = set(left) & set(right) - set(equation.split("->")[1])
    operands = (
        exact(a, X8, tuple(i for i, name in enumerate(names) if name in contracted))
        for a, names in ((x, left), (y, right))
    )
    expected = np.einsum(equation, *operands)
    np.testing.assert_allclose(jax.jit(q.apply)(params, x, y), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_scanned_layers_are_indexed_in_the_stack():
    params, x = {"w": array(3, 24, 16)}, array(3, 5, 24)

    def fn(p, x):
        return lax.scan(lambda c, each: (c, each[0] @ each[1]), 0, (x, p["w"]))[1]

    q = qjax.quantize(fn, Rule("**", W8, X8))
    packed = q.convert(params, x)
    trained, served = jax.jit(lambda p, packed, x: (q(p, x), q(packed, x)))(params, packed, x)
    expected = exact(x, X8, (2,)) @ np.asarray(packed["w"].dequantize(), np.float64)
    for out in (trained, served):
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    (eqn,) = (e for e in jax.make_jaxpr(q.apply)(packed, x).eqns if e.primitive.name == "scan")
    products = str(eqn.params["jaxpr"]).split("fp8_matmul[")[1:]
    assert len(products) == 1
    assert "indexed=True" in products[0]
    assert f"i8[3,16,24] {fp8_matmul_p.name}" not in str(eqn.params["jaxpr"])


# --- Unusual inputs ------------------------------------------------------------------------------------------------


def test_rows_that_are_not_numbers_zero_or_large():
    """A dynamic scale makes NaN of a token with NaN or infinity; its neighbours, zeros and large numbers stay."""
    params, x = {"w": array(24, 16)}, np.array(array(7, 24))
    x[1] = 0
    x[2, 3], x[3, 0], x[3, 1], x[4] = np.nan, np.inf, -np.inf, 1e30 * x[0]
    x[5] = 1e-42  # subnormal, which counts as zero
    q = qjax.quantize(lambda p, x: x @ p["w"], Rule("**", W8, X8))
    packed = q.convert(params, x)
    trained, served = (np.asarray(a) for a in jax.jit(lambda p, c, x: (q(p, x), q(c, x)))(params, packed, x))
    w = np.asarray(packed["w"].dequantize(), np.float64)
    for out in (trained, served):
        assert np.isnan(out[2:4]).all()
        assert (out[[1, 5]] == 0).all()
        for i in (0, 4, 6):
            expected = exact(x[i : i + 1], X8, (1,))[0] @ w
            np.testing.assert_allclose(out[i], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_calibrated_range_saturates():
    """Beyond the range is 448 scales; NaN stays NaN."""
    params, batch = {"w": array(24, 16)}, array(32, 24)
    q = qjax.quantize(lambda p, x: x @ p["w"], Rule("**", W8, qjax.static("fp8_e4m3", observer=qjax.MinMax())))
    variables = q.calibrate(params, [batch], progress=False)
    limit = float(jnp.abs(batch).max())
    assert q.plan(variables, batch).sites[0].product == "fp8"
    packed = q.convert(variables, batch)
    x = np.zeros((4, 24), np.float32)
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = np.inf, -3 * limit, limit, np.nan
    served = np.asarray(jax.jit(q.apply)(packed, x))
    row = np.asarray(packed["params"]["w"].dequantize(), np.float64)[0]
    for i, factor in enumerate((limit, -limit, limit)):
        np.testing.assert_allclose(served[i], factor * row, rtol=1e-6)
    assert np.isnan(served[3]).all()


# --- Files ---------------------------------------------------------------------------------------------------------


def test_saved_restored_and_exported(tmp_path):
    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    params, x = {"up": array(24, 40), "down": array(40, 16)}, array(5, 24)
    q = qjax.quantize(fn, "w8a8_fp8")
    packed = q.convert(params, x)
    expected = np.asarray(jax.jit(q.apply)(packed, x))
    assert packed["up"].words.dtype == jnp.int8
    assert packed["up"].words.shape == (40, 24)  # a column's codes in a row
    qjax.save(tmp_path / "saved", q, packed)
    again, restored = qjax.restore(tmp_path / "saved", fn)
    jax.tree.map(np.testing.assert_array_equal, restored, packed)
    np.testing.assert_array_equal(jax.jit(again.apply)(restored, x), expected)
    arranged = qjax.arrange(packed, "h100")  # as it is: XLA has a product of it, and reads it in this order
    assert all(a is b for a, b in zip(jax.tree.leaves(arranged), jax.tree.leaves(packed), strict=True))
    qjax.export(tmp_path / "exported", q, packed, x, platforms=("cuda", "tpu", "cpu"))
    served = qjax.load_exported(tmp_path / "exported")(np.asarray(x))
    np.testing.assert_allclose(served, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
