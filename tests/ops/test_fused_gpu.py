"""Epilogues and joint products in the kernels for NVIDIA GPUs, interpreted, against float64.

The Mosaic GPU kernels run in a process of their own, as in `test_matmul_gpu`; the operations of an epilogue by
themselves are in `test_fused_matmul_tpu`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as prims
from test_matmul_gpu import interprets, run_apart

import qjax
from qjax.pallas_kernels.backends import gpu_operands, triton
from qjax.pallas_kernels.backends.epilogue import Constant, Epilogue, Step
from qjax.pallas_kernels.backends.mosaic_epilogue import Beside
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.matmul import mosaic_tiles
from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

pytestmark = pytest.mark.usefixtures("compile_quickly")

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
HOW: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None}


def _step(primitive: Any, *operands: Any, **params: Any) -> Step:
    return Step(primitive, operands, tuple(params.items()), F32)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


# name: the epilogue, in float32; shapes of other operands, of the stack, rows M and columns N; what it means
EPILOGUES: dict[str, tuple[Epilogue, Callable[[int, int, int], list[tuple[int, int, int]]], Callable[..., Any]]] = {
    "bias": (
        Epilogue(F32, 1, 1, (_step(prims.add_p, 0, 1), _step(prims.max_p, 2, Constant(0.0, F32))), 3),
        lambda b, m, n: [(1, 1, n)],
        lambda y, bias: np.maximum(y + bias, 0),
    ),
    "everything": (
        Epilogue(F32, 1, 4, (
            _step(prims.mul_p, 0, 1),
            _step(prims.mul_p, 5, 2),
            _step(prims.tanh_p, 6, accuracy=None),
            _step(prims.add_p, 7, 3),
            _step(prims.sub_p, 8, 4),
        ), 9),
        lambda b, m, n: [(1, 1, 1), (b, m, 1), (1, m, n), (b, 1, n)],
        lambda y, s, r, z, bias: np.tanh(y * s * r) + z - bias,
    ),
    "gated pair": (
        Epilogue(F32, 2, 1, (
            _step(prims.logistic_p, 0, accuracy=None),
            _step(prims.mul_p, 0, 3),
            _step(prims.mul_p, 4, 1),
            _step(prims.add_p, 5, 2),
        ), 6),
        lambda b, m, n: [(b, m, n)],
        lambda gate, up, residual: _silu(gate) * up + residual,
    ),
    "gelu": (
        Epilogue(F32, 1, 0, (
            _step(prims.mul_p, 0, Constant(-math.sqrt(0.5), F32)),
            _step(prims.erfc_p, 1),
            _step(prims.mul_p, 0, Constant(0.5, F32)),
            _step(prims.mul_p, 3, 2),
        ), 4),
        lambda b, m, n: [],
        lambda y: y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2))),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """How x and weights are stored; `stack` counts experts, `layer` picks one of two."""

    format: str = "int4"
    dtype: Any = BF16
    zero_point: bool = False
    stack: int | None = None
    layer: int | None = None
    order: Any = "nk"

    @property
    def experts(self) -> tuple[int, ...]:
        return () if self.stack is None else (self.stack,)

    def x(self, m: int, k: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(1).standard_normal((*self.experts, m, k)), self.dtype)

    def weight(self, granularity: Any, k: int, n: int, seed: int) -> QTensor:
        spec = QuantSpec(FORMATS[self.format], granularity, scale_rule=AbsMax(), zero_point=self.zero_point)
        layout = Layout((*(((size, "stack"),) for size in self.experts), ((k, "k"),), ((n, "n"),)))
        lead = () if self.layer is None else (2,)
        values = np.random.default_rng((k, n, seed)).standard_normal((*lead, *self.experts, k, n)) / math.sqrt(k)
        return jax.jit(lambda w: quantize(w, spec, layout, self.order))(jnp.asarray(values, self.dtype))


@dataclasses.dataclass(frozen=True)
class Case(Operands):
    """Products and an epilogue, and how they are cut."""

    epilogue: str
    m: int
    k: int
    n: int
    granularity: Any
    blocks: Any

    def __str__(self) -> str:
        fields = (self.epilogue, f"{self.format}/{self.granularity}", jnp.dtype(self.dtype).name)
        return "-".join(map(str, (*fields, f"{self.m}x{self.k}x{self.n}", self.order)))

    @property
    def weights(self) -> list[QTensor]:
        products = EPILOGUES[self.epilogue][0].products
        return [self.weight(self.granularity, self.k, self.n, seed) for seed in range(products)]

    def error(self, kernel: Any) -> float:
        """The largest error, in parts of what rounding the operands of the dot to 8 bits may do to the result."""
        epilogue, shapes, meaning = EPILOGUES[self.epilogue]
        generator, weights, x = np.random.default_rng(2), self.weights, self.x(self.m, self.k)
        others = [
            jnp.asarray(generator.standard_normal(shape), dtype)
            for shape, dtype in zip(shapes(self.stack or 1, self.m, self.n), (F32, BF16) * 2, strict=False)
        ]
        layers = [self.layer] * len(weights)
        assert kernel.unsupported(x, weights[0], (), F32) is None
        assert kernel.unsupported_epilogue(epilogue) is None

        def run(x: Any, weights: Any, others: Any) -> Any:
            return kernel.fused_matmul(
                x, weights, others, layers=layers, epilogue=epilogue, blocks=self.blocks, interpret=True, **HOW
            )

        got = jax.jit(run, compiler_options={"xla_allow_excess_precision": False})(x, weights, others)
        assert got.dtype == F32
        matrices = [np.asarray(w.dequantize(), np.float64) for w in weights]
        matrices = matrices if self.layer is None else [a[self.layer] for a in matrices]
        products = [np.asarray(x, np.float64) @ a for a in matrices]
        eps = float(jnp.finfo(gpu_operands.operand_dtype(x.dtype, (BF16,))).eps)
        want = meaning(*products, *(np.asarray(a, np.float64)[0 if a.shape[0] == 1 else ...] for a in others))
        assert got.shape == want.shape
        # Each of the products may be off by this; the functions above have slopes of at most about 1.1 in each.
        off = [2 * eps * (np.abs(np.asarray(x, np.float64)) @ np.abs(a)) for a in matrices]
        slopes = [np.abs(p) for p in products[::-1]] if len(products) == 2 else [1.0]
        bound = 1e-5 * (1 + np.abs(want)) + 1.1 * sum(e * s for e, s in zip(off, slopes, strict=True))
        return float((np.abs(np.asarray(got, np.float64) - want) / bound).max())


# --- Triton ---------------------------------------------------------------------------------------------------------

T = matmul_triton.Blocks
TRITON = (
    Case("bias", 5, 200, 70, PerGroup(64), T(16, 32, 64, 1, 4, 2), order="kn"),
    Case("everything", 20, 96, 40, PerGroup(32), T(16, 32, 32, 1, 4, 2), stack=2, layer=1, zero_point=True),
    Case("gated pair", 17, 128, 40, PerChannel(), T(16, 32, 64, 1, 4, 2), format="int8", order="kn", stack=2),
    Case("gated pair", 3, 256, 40, PerGroup(64), T(16, 32, 64, 2, 4, 2)),  # splits: after the kernel
    Case("gelu", 9, 64, 33, PerGroup(32), None, dtype=F32),  # float32 in halves: after the kernel
)


@pytest.mark.parametrize("case", TRITON, ids=str)
def test_triton_against_float64(case: Case):
    assert case.error(matmul_triton) < 1


# --- Mosaic GPU -----------------------------------------------------------------------------------------------------

G = matmul_mosaic.Blocks
MOSAIC = (
    Case("bias", 5, 128, 128, PerGroup(64), G(8, 128, 128, 1, 2, 1)),
    Case("everything", 70, 128, 64, PerGroup(64), G(64, 64, 128, 1, 2, 1), zero_point=True),  # two strips, an edge
    Case("everything", 3, 256, 64, PerGroup(128), G(8, 64, 256, 2, 2, 1), stack=2, layer=1),
    Case("gated pair", 20, 128, 192, PerChannel(), G(24, 128, 128, 1, 2, 1), format="int8"),  # the last tile moves back
    Case("gated pair", 9, 256, 64, PerGroup(64), G(16, 64, 256, 2, 2, 1), stack=2),
    Case("gated pair", 3, 512, 64, PerGroup(128), G(8, 64, 128, 1, 2, 2)),
    Case("gelu", 5, 192, 64, PerGroup(32), None, dtype=F32),
)


@dataclasses.dataclass(frozen=True)
class Joint(Operands):
    """Products of one x with weights of these widths."""

    m: int
    k: int
    widths: tuple[int, ...]
    granularity: Any
    blocks: Any

    def same(self) -> bool:
        """Whether each result has the bits of that product alone."""
        weights = [self.weight(self.granularity, self.k, n, seed) for seed, n in enumerate(self.widths)]
        x = self.x(self.m, self.k)
        layers = [self.layer] * len(weights)
        how = {"blocks": self.blocks, "interpret": True, **HOW}
        together = jax.jit(lambda x, ws: matmul_mosaic.joint_matmul(x, ws, layers=layers, **how))(x, weights)
        alone = functools.partial(matmul_mosaic.matmul, layer=self.layer, transpose=False, **how)
        apart = [jax.jit(alone)(x, w) for w in weights]
        return all(bool(a.dtype == b.dtype and (a == b).all()) for a, b in zip(together, apart, strict=True))


JOINT = (
    Joint(5, 128, (192, 64, 64), PerGroup(64), G(8, 64, 128, 1, 2, 1), layer=-1),
    Joint(9, 256, (64, 128), PerChannel(), G(16, 64, 128, 1, 2, 2), format="int8", zero_point=True, stack=2),
)


def run_mosaic() -> None:
    """Writes the error of each case, in a process that the fixture below starts."""
    gpu_chips.CHIPS["h100"] = dataclasses.replace(gpu_chips.CHIPS["h100"], processors=2)  # threads are few
    for case in MOSAIC:
        print(json.dumps(case.error(matmul_mosaic)), flush=True)
    for joint in JOINT:
        print(json.dumps(joint.same()), flush=True)


@pytest.fixture(scope="module")
def mosaic() -> list[Any]:
    return run_apart("import test_fused_gpu; test_fused_gpu.run_mosaic()")


@interprets
@pytest.mark.parametrize("case", range(len(MOSAIC)), ids=lambda i: str(MOSAIC[i]))
def test_mosaic_gpu_against_float64(case: int, mosaic: list[Any]):
    assert mosaic[case] < 1


@interprets
def test_joint_products_have_the_bits_of_each_alone(mosaic: list[Any]):
    assert mosaic[len(MOSAIC) :] == [True] * len(JOINT)


# --- Which programs -------------------------------------------------------------------------------------------------


def test_tiles_of_a_pair_leave_room_for_both_sums():
    pair = Beside(2, ((True, True, BF16),))
    for m in (1, 16, 64, 256, 2048):
        for blocks in mosaic_tiles.candidates(m, 4096, 14336, 4, beside=pair):
            mosaic_tiles.check(blocks, 14336, 4, F32, pair)
            assert 2 * 64 * blocks.m * 4 / 128 + 64 <= 4 * (255 if blocks.warpgroups <= 2 else 104)
    with pytest.raises(ValueError, match="at most 128"):
        mosaic_tiles.check(G(136, 64, 128, 1, 2, 1), 64, 4, F32, pair)


def _gated(p: Any, x: Any) -> Any:
    return jax.nn.silu(x @ p["gate"]) * (x @ p["up"])


def _gated_by_log1p(p: Any, x: Any) -> Any:
    return jnp.log1p(jnp.abs(x @ p["gate"])) * (x @ p["up"])


def _gated_by_erf(p: Any, x: Any) -> Any:
    return jax.lax.erf(x @ p["gate"]) * (x @ p["up"])


INT4 = qjax.Rule("*", qjax.int4(group=64, scale=qjax.AbsMax()))


@pytest.mark.parametrize(
    ("model", "rule", "chip", "kernels"),
    [
        (_gated, INT4, "h100", 1),
        (_gated, INT4, "a100", 1),
        (_gated_by_log1p, INT4, "h100", 2),  # which Mosaic GPU has not
        (_gated_by_erf, INT4, "a100", 2),  # which Triton has not
        (_gated, qjax.Rule("*", qjax.int8(), qjax.dynamic()), "h100", 1),
        (_gated, qjax.Rule("*", qjax.int4(group=64), qjax.dynamic()), "h100", 2),  # sums that no registers hold
        (_gated, qjax.Rule("*", qjax.int4(group=64), qjax.dynamic()), "a100", 1),
        (_gated_by_erf, qjax.Rule("*", qjax.int8(), qjax.dynamic()), "a100", 2),
    ],
)
def test_a_gated_model_calls_one_kernel(model: Any, rule: Any, chip: str, kernels: int):
    if chip == "a100" and not triton.finds_device():
        pytest.skip("from jax 0.11 on Triton's lowering asks for a device")
    generator = np.random.default_rng(0)
    params = {name: jnp.asarray(generator.standard_normal((128, 64)), BF16) for name in ("gate", "up")}
    x = jnp.asarray(generator.standard_normal((3, 128)), BF16)
    q = qjax.quantize(model, [rule])
    packed = qjax.arrange(q.convert(params, x), chip)
    with qjax.target_chip(chip):
        text = jax.jit(q.apply).trace(packed, x).lower(lowering_platforms=("cuda",)).as_text()
    target = {"h100": "mosaic_gpu_v2", "a100": "__gpu$xla.gpu.triton"}[chip]
    assert text.count(f"custom_call @{target}(") == kernels


def test_what_no_kernel_takes_follows_the_products():
    """On the part of a device whose sizes no kernel takes, the epilogue still means the same."""
    epilogue, _, meaning = EPILOGUES["gated pair"]
    case = Case("gated pair", 3, 48, 20, PerGroup(24), None, dtype=F32, stack=2)
    weights = case.weights
    generator = np.random.default_rng(2)
    x, residual = (jnp.asarray(generator.standard_normal(shape), F32) for shape in ((2, 3, 48), (1, 3, 20)))
    got = matmul_gpu.fused_matmul(x, weights, [residual], layers=[None, None], epilogue=epilogue, **HOW)
    products = [np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64) for w in weights]
    np.testing.assert_allclose(got, meaning(*products, np.asarray(residual)[0]), rtol=1e-4, atol=1e-4)
