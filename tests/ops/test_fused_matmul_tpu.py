"""The TPU kernel of `fused_matmul`, interpreted on CPU, against float64; `test_tpu_compile` compiles it for chips."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.extend.core import primitives as prims
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.pallas_kernels.backends.epilogue import OPERATIONS, Constant, Epilogue, Step
from qjax.pallas_kernels.backends.tpu_operands import Beside
from qjax.pallas_kernels.numbers import activations
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MinMax
from qjax.pallas_kernels.numbers.activations import Activation
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops import partition
from qjax.pallas_kernels.ops.epilogue_matmul.api import on_each_device
from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu as matmul_tpu
from qjax.pallas_kernels.ops.matmul import tpu_tiles as matmul_tpu_tiles
from qjax.pallas_kernels.ops.matmul.tpu_tiles import Blocks
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
# Each program runs once. Excess precision would drop the rounding to bfloat16 that an interpreted kernel asks for.
_QUICK = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


def _array(*shape: int, dtype: Any = F32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((*shape, seed)).standard_normal(shape), dtype)


def _pack(name: str, granularity: Any, *lead: int, k: int, n: int, seed: int = 0, **options: Any) -> QTensor:
    spec = QuantSpec(FORMATS[name], granularity, scale_rule=AbsMax(), **options)
    layout = Layout((*(((size, "stack"),) for size in lead[1:]), ((k, "k"),), ((n, "n"),)))
    packed = jax.jit(lambda w: quantize(w, spec, layout), compiler_options=_QUICK)
    return packed(_array(*lead, k, n, seed=seed) / math.sqrt(k))


def _matrix(w: QTensor) -> np.ndarray:
    return np.asarray(jax.jit(QTensor.matrix, compiler_options=_QUICK)(w), np.float64)


def _step(primitive: Any, *operands: Any, dtype: Any = F32, **params: Any) -> Step:
    return Step(primitive, operands, tuple(params.items()), dtype)


def _run(x: jax.Array, weights: Sequence[QTensor], others: Sequence[jax.Array], epilogue: Any, **options: Any) -> Any:
    """What the kernel gives, interpreted."""
    defaults = {"layers": [None] * len(weights), "casts": (), "precision": "highest", "preferred_element_type": None}
    options = {**defaults, "interpret": True, **options}

    def run(x: jax.Array, weights: Sequence[QTensor], others: Sequence[jax.Array]) -> Any:
        return matmul_tpu.fused_matmul(x, weights, others, epilogue=epilogue, **options)

    return jax.jit(run, compiler_options=_QUICK)(x, list(weights), list(others))


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


HALF = Constant(0.5, F32)
# name: the epilogue; shapes of other operands, of rows M and columns N; what it means
EPILOGUES: dict[str, tuple[Epilogue, Callable[[int, int], list[tuple[int, int, int]]], Callable[..., Any]]] = {
    "bias": (
        Epilogue(F32, 1, 1, (_step(prims.add_p, 0, 1),), 2),
        lambda m, n: [(1, 1, n)],
        lambda y, b: y + b,
    ),
    "scalar and scale of each row": (
        Epilogue(F32, 1, 2, (_step(prims.mul_p, 1, 0), _step(prims.mul_p, 3, 2)), 4),
        lambda m, n: [(1, 1, 1), (1, m, 1)],
        lambda y, s, r: y * s * r,
    ),
    "bias, gelu, residual": (
        Epilogue(
            F32,
            1,
            2,
            (
                _step(prims.add_p, 0, 1),
                _step(prims.mul_p, 3, Constant(-math.sqrt(0.5), F32)),
                _step(prims.erfc_p, 4),
                _step(prims.mul_p, HALF, 3),
                _step(prims.mul_p, 6, 5),
                _step(prims.add_p, 7, 2),
            ),
            8,
        ),
        lambda m, n: [(1, 1, n), (1, m, n)],
        lambda y, b, r: _gelu(y + b) + r,
    ),
    "gated pair": (
        Epilogue(F32, 2, 1, (*(_step(prims.logistic_p, 0, accuracy=None), _step(prims.mul_p, 0, 3)), *(
            _step(prims.add_p, 1, 2), _step(prims.mul_p, 4, 5))), 6),
        lambda m, n: [(1, 1, n)],
        lambda gate, up, b: _silu(gate) * (up + b),
    ),
    "leaky relu": (
        Epilogue(F32, 1, 0, (
            _step(prims.ge_p, 0, Constant(0.0, F32), dtype=jnp.dtype(bool)),
            _step(prims.mul_p, Constant(0.01, F32), 0),
            _step(prims.select_n_p, 1, 2, 0),
        ), 3),
        lambda m, n: [],
        lambda y: np.where(y >= 0, y, 0.01 * y),
    ),
}  # fmt: skip


@pytest.mark.parametrize("blocks", [None, Blocks(32, 128, 256, "after")], ids=["default", "several tiles"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str, blocks: Any):
    """Awkward sizes: what lies beyond the edges of the operands does not get into the result."""
    epilogue, shapes, meaning = EPILOGUES[name]
    m, k, n = 50, 300, 200
    weights = [_pack("int4", PerGroup(64), k=k, n=n, seed=i) for i in range(epilogue.products)]
    x, others = _array(m, k), [_array(*shape, seed=i) for i, shape in enumerate(shapes(m, n))]
    out = _run(x, weights, others, epilogue, blocks=blocks)
    x64 = np.asarray(x, np.float64)
    expected = meaning(*(x64 @ _matrix(w) for w in weights), *(np.asarray(a[0], np.float64) for a in others))
    assert out.dtype == F32
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2e-5, atol=2e-5)


def test_bfloat16_is_rounded_where_the_program_rounds():
    """To the last bit what the plain kernel and the operations after it give, each rounded to bfloat16."""
    m, k, n = 20, 256, 128
    steps = (
        _step(prims.add_p, 0, 1, dtype=BF16),
        _step(prims.mul_p, 3, 3, dtype=BF16),
        _step(prims.convert_element_type_p, 4, dtype=F32),
        _step(prims.add_p, 5, 2, dtype=F32),
        _step(prims.convert_element_type_p, 6, dtype=BF16),
    )
    w, x = _pack("int4", PerGroup(64), k=k, n=n), _array(m, k, dtype=BF16)
    others = [_array(1, 1, n, dtype=BF16), _array(1, m, n)]
    how: dict[str, Any] = {"casts": (BF16,), "precision": None, "preferred_element_type": None}
    out = _run(x, [w], others, Epilogue(BF16, 1, 2, steps, 7), **how)

    def unfused(x: jax.Array, w: QTensor, bias: jax.Array, residual: jax.Array) -> jax.Array:
        y = matmul_tpu.matmul(x, w, layer=None, transpose=False, interpret=True, **how) + bias[0]
        return ((y * y).astype(F32) + residual[0]).astype(BF16)

    expected = jax.jit(unfused, compiler_options=_QUICK)(x, w, *others)
    assert out.dtype == expected.dtype == BF16
    np.testing.assert_array_equal(np.asarray(out, F32), np.asarray(expected, F32))


GATED = Epilogue(F32, 2, 2, (_step(prims.add_p, 0, 2), _step(prims.mul_p, 4, 1), _step(prims.add_p, 5, 3)), 6)


@pytest.mark.parametrize(
    ("name", "granularity", "options"),
    [
        ("int8", PerChannel(), {}),
        ("nf4", PerGroup(32), {"double_quant": True}),
        ("int4", PerGroup(32), {"zero_point": True, "scale_dtype": "float16"}),
        ("int3", PerGroup(256), {}),
    ],
    ids=str,
)
def test_pairs_of_experts_in_layers(name: str, granularity: Any, options: Any):
    """Each weight is that of its own layer; operands have the experts' axis or not."""
    experts, m, k, n = 3, 18, 256, 130
    weights = [_pack(name, granularity, 2, experts, k=k, n=n, seed=i, **options) for i in range(2)]
    x, bias, scale = _array(experts, m, k), _array(experts, 1, n), _array(1, m, n)
    out = _run(x, weights, [bias, scale], GATED, layers=[1, jnp.asarray(-2)])
    one, two = (np.asarray(x, np.float64) @ _matrix(w)[layer] for w, layer in zip(weights, (1, 0), strict=True))
    expected = (one + np.asarray(bias, np.float64)) * two + np.asarray(scale, np.float64)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2e-5, atol=2e-5)


# --- Operations --------------------------------------------------------------------------------------------------

VALUES = np.concatenate([-np.logspace(-4, 1, 100), np.logspace(-4, 1, 100)])
# What NumPy has no ufunc for; `pair` is a second operand.
MEANINGS: dict[Any, Callable[..., Any]] = {
    prims.neg_p: np.negative,
    prims.logistic_p: lambda x: 1 / (1 + np.exp(-x)),
    prims.erf_p: np.vectorize(math.erf),
    prims.erfc_p: np.vectorize(math.erfc),
    prims.rsqrt_p: lambda x: 1 / np.sqrt(x),
    prims.integer_pow_p: lambda x: x**3,
    prims.select_n_p: lambda which, x, y: np.where(which, y, x),
    prims.clamp_p: lambda low, x, high: np.clip(x, low, high),
    prims.copy_p: lambda x: x,
    prims.convert_element_type_p: lambda x: x,
    prims.sub_p: np.subtract,
    prims.mul_p: np.multiply,
    prims.div_p: np.divide,
    prims.max_p: np.maximum,
    prims.min_p: np.minimum,
    prims.eq_p: np.equal,
    prims.ne_p: np.not_equal,
    prims.lt_p: np.less,
    prims.le_p: np.less_equal,
    prims.gt_p: np.greater,
    prims.ge_p: np.greater_equal,
}
UNARY = {"neg", "abs", "exp", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sqrt", "rsqrt", "square"}
PARAMETERS = {"integer_pow": {"y": 3}} | {
    name: {"accuracy": None} for name in ("exp", "log", "log1p", "tanh", "logistic", "sqrt", "rsqrt")
}


@pytest.mark.parametrize("primitive", OPERATIONS, ids=lambda p: p.name)
def test_operations(primitive: Any):
    """Each means what NumPy computes in float64, with small relative error where the result is small."""
    name = primitive.name
    x = VALUES[VALUES > 0] if name in ("log", "log1p", "sqrt", "rsqrt") else VALUES
    pair = np.roll(x, 1)
    operands = [x] if name in UNARY | {"integer_pow", "copy", "convert_element_type"} else [x, pair]
    operands = [x > 0, x, pair] if name == "select_n" else [-1 + 0 * x, x, 1 + 0 * x] if name == "clamp" else operands
    truth = prims.gt_p if name == "select_n" else None

    dtype = jnp.dtype(bool) if name in ("eq", "ne", "lt", "le", "gt", "ge") else F32
    first = len(operands)
    given = tuple(range(len(operands)))
    steps = [_step(primitive, *given, dtype=dtype, **PARAMETERS.get(name, {}))]
    if truth is not None:
        steps = [
            _step(truth, 0, Constant(0.0, F32), dtype=jnp.dtype(bool)),
            _step(primitive, first, 1, 2, dtype=F32),
        ]
    if dtype != F32:
        steps.append(_step(prims.convert_element_type_p, first, dtype=F32))
    epilogue = Epilogue(F32, 1, len(operands) - 1, tuple(steps), first + len(steps) - 1)
    arrays = [jnp.asarray(np.where(a, 1.0, -1.0) if a.dtype == bool else a, F32)[None] for a in operands]
    out = epilogue(arrays[:1], arrays[1:])
    exact = [a if a.dtype == bool else np.asarray(b[0], np.float64) for a, b in zip(operands, arrays, strict=True)]
    expected = MEANINGS.get(primitive, getattr(np, name, None))(*exact)  # type: ignore[misc]
    np.testing.assert_allclose(np.asarray(out[0], np.float64), expected, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 2.0**-4 * 255), (0.0, 0.0)])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("format", ["int8", "int4", "int3"])
def test_codes_are_those_of_activations(format: str, zero_point: bool, low: float, high: float):
    """Ties between two codes, what no code is large enough for, what is no number."""
    spec = ActSpec(FORMATS[format], MinMax(), "tensor", zero_point)
    ranges = {"low": low, "high": high}
    numbers = np.concatenate([np.arange(-300, 300) / 32, VALUES, [0.0, -0.0, 1e30, -1e30, np.inf, -np.inf, np.nan]])
    x = jnp.asarray(numbers, F32)[None]
    scale, zero = activations.known_scale(spec, ranges, 2)
    others = [scale] if zero is None else [scale, zero]
    epilogue = Epilogue(F32, 1, len(others), (), 0, spec)
    expected = jax.jit(lambda x: activations.quantize(x, spec, (1,), ranges).codes)(x)
    got = jax.jit(lambda x, others: epilogue([x], others))(x, others)
    assert got.dtype == epilogue.out_dtype == jnp.int8
    np.testing.assert_array_equal(got, expected)


# --- Tiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 64, 600, 4096])
def test_tiles_leave_room_for_what_is_beside_the_product(m: int):
    spec = QuantSpec(FORMATS["int4"], PerGroup(128))
    beside = Beside(2, ((False, True), (True, True), (True, True)))
    for dtype in (BF16, F32):
        blocks = matmul_tpu_tiles.default_blocks(m, 8192, 28672, spec, dtype, beside=beside)
        assert blocks is not None
        # twice x, the words, the other operands and the result; the sums
        tile, words = blocks.m * blocks.n * 4, blocks.k * blocks.n // 2
        assert 2 * (blocks.m * blocks.k * dtype.itemsize + 2 * words + 3 * tile) + 2 * tile < 16 * 2**20
    many = Beside(2, ((True, True),) * 2000)
    assert matmul_tpu_tiles.default_blocks(m, 8192, 28672, spec, BF16, beside=many) is None


# --- Several devices, in a process apart ---------------------------------------------------------------------------


def _mesh(devices: Any) -> Mesh:
    return Mesh(np.asarray(devices).reshape(2, -1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def check_devices() -> None:
    """Each of eight devices runs the kernel on its rows and columns."""
    mesh, m, k, n = _mesh(jax.devices()), 40, 256, 512
    weights = [_pack("int4", PerGroup(64), k=k, n=n, seed=i) for i in range(2)]
    x, others = _array(m, k), [_array(1, n), _array(m, 1)]

    def put(a: jax.Array, *spec: Any) -> jax.Array:
        return jax.device_put(a, NamedSharding(mesh, P(*spec)))

    def run(x: jax.Array, weights: list[QTensor], others: list[jax.Array]) -> jax.Array:
        how: dict[str, Any] = {"casts": (), "precision": "highest", "preferred_element_type": None, "interpret": True}
        kernel = functools.partial(matmul_tpu.fused_matmul, epilogue=GATED, **how)
        split = partition.Split.of(jax.typeof(x), jax.tree.map(jax.typeof, weights[0]), indexed=False)
        assert split is not None
        shaped = [(a, a.shape) for a in others]
        return on_each_device(kernel, split, x, weights, shaped, [None, None])

    placed = [jax.tree.map(lambda a: put(a, None, "model"), w) for w in weights]
    out = jax.jit(run)(put(x, "data"), placed, [put(others[0], None, "model"), put(others[1])])
    one, two = (np.asarray(x, np.float64) @ _matrix(w) for w in weights)
    expected = (one + np.asarray(others[0], np.float64)) * two + np.asarray(others[1], np.float64)
    assert out.sharding.spec == P("data", "model")
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2e-5, atol=2e-5)

    spec = ActSpec(FORMATS["int8"], MinMax(), "tensor")
    epilogue = Epilogue(
        F32, 2, 3, (_step(prims.add_p, 0, 2), _step(prims.mul_p, 5, 1), _step(prims.add_p, 6, 3)), 7, spec
    )
    codes = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (m, k)), jnp.int8)
    scale = jnp.abs(_array(m, 1)) / 128
    weights = [_pack("int8", PerChannel(), k=k, n=n, seed=i) for i in range(2)]
    others = [*others, jnp.full((1, 1), 0.04)]

    def integers(x: Activation, weights: list[QTensor], others: list[jax.Array]) -> jax.Array:
        kernel = functools.partial(integer_matmul_tpu.fused_matmul, epilogue=epilogue, interpret=True)
        split = partition.Split.of(jax.typeof(x.codes), jax.tree.map(jax.typeof, weights[0]), indexed=False)
        assert split is not None
        return on_each_device(kernel, split, x, weights, [(a, a.shape) for a in others], [None, None])

    whole = jax.jit(
        functools.partial(integer_matmul_tpu.fused_matmul, layers=[None] * 2, epilogue=epilogue, interpret=True)
    )
    x = Activation(codes, scale)
    placed = [jax.tree.map(lambda a: put(a, None, "model"), w) for w in weights]
    spread = [put(others[0], None, "model"), put(others[1]), put(others[2])]
    out = jax.jit(integers)(jax.tree.map(lambda a: put(a, "data"), x), placed, spread)
    assert out.sharding.spec == P("data", "model")
    np.testing.assert_array_equal(out, whole(x, weights, [a[None] for a in others]))


def check_chips() -> None:
    """The program of a model on a mesh: one kernel where columns are split, and sums first where rows are."""

    def gated(p: Any, x: Any) -> Any:
        return jax.nn.silu(x @ p["g"]) * (x @ p["u"]) + p["b"]

    k, n = 1024, 2048
    q = qjax.quantize(gated, [qjax.Rule("*", qjax.int4(group=128))])
    shape = jax.ShapeDtypeStruct
    params = {"g": shape((k, n), BF16), "u": shape((k, n), BF16), "b": shape((n,), BF16)}
    packed = jax.eval_shape(q.convert, params, shape((4, 8, k), BF16))
    for name in ("v5e:2x2", "v6e:2x4"):
        mesh = _mesh(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        for matrix, vector, rows, kernels in [
            ((None, "model"), ("model",), None, 1),
            (("model", None), (None,), "model", 2),
        ]:

            def put(a: Any, *spec: Any, mesh: Mesh = mesh) -> Any:
                return shape(a.shape, a.dtype, sharding=NamedSharding(mesh, P(*spec)))

            placed = {key: jax.tree.map(lambda a: put(a, *matrix), packed[key]) for key in "gu"}  # noqa: B023
            x = put(shape((4, 8, k), BF16), "data", None, rows)
            traced = jax.jit(q.apply).trace({**placed, "b": put(packed["b"], *vector)}, x)
            text = traced.lower(lowering_platforms=("tpu",)).compile().as_text() or ""
            assert text.count('custom_call_target="tpu_custom_call"') == kernels, (name, matrix)
            assert ("all-reduce" in text) == (kernels == 2)

    # Codes of each device's columns are each device's part of what the next product contracts.
    q = qjax.quantize(lambda p, x: gated(p, x) @ p["d"], [qjax.Rule("**", qjax.int8(), qjax.static())])
    params["d"] = shape((n, k), BF16)
    ranges = {name: {"low": shape((), F32), "high": shape((), F32)} for name in ("g", "d")}
    packed = jax.eval_shape(q.convert, {"params": params, "quant_stats": ranges}, shape((4, 8, k), BF16))
    mesh = _mesh(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)

    def place(a: Any, *spec: Any) -> Any:
        return shape(a.shape, a.dtype, sharding=NamedSharding(mesh, P(*spec)))

    def columns(a: Any) -> Any:
        return place(a, *("model" if size == n else None for size in a.shape))

    placed = {**jax.tree.map(columns, packed["params"]), "b": place(packed["params"]["b"], "model")}
    variables = {"params": placed, "quant_stats": jax.tree.map(place, packed["quant_stats"])}
    traced = jax.jit(q.apply).trace(variables, place(shape((4, 8, k), BF16), "data"))
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert "all-reduce" in text


@pytest.mark.parametrize("check", ["devices", "chips"])
def test_on_meshes(check: str):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }
    done = subprocess.run([sys.executable, __file__, check], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    {"devices": check_devices, "chips": check_chips}[sys.argv[1]]()
