"""The kernels of `integer_matmul` for NVIDIA GPUs, interpreted, against NumPy: the same bits; which of them is chosen.

Mosaic GPU is interpreted by jax 0.11 and newer, in one process of its own, as in `test_matmul_gpu`. That the kernels
compile is the matter of `test_gpu_compile`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_integer_matmul import Case, Fused

from qjax.pallas_kernels.backends import triton
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MinMax
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, PerTensor, QuantSpec
from qjax.pallas_kernels.ops.integer_matmul import gpu as integer_matmul_gpu
from qjax.pallas_kernels.ops.integer_matmul import gpu_operands as integer_matmul_gpu_operands
from qjax.pallas_kernels.ops.integer_matmul import mosaic as integer_matmul_mosaic
from qjax.pallas_kernels.ops.integer_matmul import mosaic_tiles
from qjax.pallas_kernels.ops.integer_matmul import triton as integer_matmul_triton
from qjax.pallas_kernels.ops.primitive import HOPPER_KERNEL, TRITON_KERNEL, Runs
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = Path(__file__).resolve().parents[2]
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


@dataclasses.dataclass(frozen=True)
class Product:
    """Random operands and how their product is cut; `zeros` says which operands have zero points, x, w or both."""

    bits: int
    granularity: Any
    zeros: str
    rows: int
    k: int
    n: int
    blocks: Any
    order: str = "nk"
    stack: tuple[int, ...] = ()
    layers: int | None = None
    layer: int | None = None
    out_dtype: Any = F32
    extreme: bool = False

    def __str__(self) -> str:
        fields = (f"int{self.bits}", self.granularity, self.zeros, f"{self.rows}x{self.k}x{self.n}", self.order)
        return "-".join(map(str, fields))

    def wrong(self, kernel: Any) -> int:
        """How many elements of the result have other bits than NumPy's."""
        case = Case(
            self.bits,
            self.granularity,
            rows=self.rows,
            stack=self.stack,
            layers=self.layers,
            weight_zero="w" in self.zeros,
            zero="x" in self.zeros,
            order=self.order,
            k=self.k,
            n=self.n,
            extreme=self.extreme,
        )
        assert kernel.unsupported(case.x, case.w, self.out_dtype) is None
        options = {"layer": self.layer, "out_dtype": self.out_dtype, "blocks": self.blocks, "interpret": True}
        got = np.asarray(jax.jit(functools.partial(kernel.matmul, **options))(*case.operands))
        want = case.expected(None if self.layer is None else min(self.layer, (self.layers or 1) - 1))
        with np.errstate(over="ignore"):
            want = want.astype(self.out_dtype)
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        return int((got.view(f"u{got.itemsize}") != want.view(f"u{got.itemsize}")).sum())


# --- Mosaic GPU -----------------------------------------------------------------------------------------------------

G = integer_matmul_mosaic.Blocks
# Tiles: m, n, k, ways, stages, splits.
MOSAIC = (
    Product(8, PerChannel(), "", 1, 256, 64, G(8, 64, 128, 1, 2, 1)),
    Product(8, PerChannel(), "xw", 17, 192, 192, G(24, 128, 128, 1, 3, 1)),  # the last tile moves back
    Product(8, PerTensor(), "xw", 9, 448, 64, G(8, 64, 128, 1, 2, 2)),
    Product(8, PerGroup(192), "x", 5, 448, 64, G(8, 64, 384, 1, 2, 1), out_dtype=BF16),  # a short last group
    Product(8, PerChannel(), "", 2, 1024, 64, G(8, 64, 256, 1, 2, 1), extreme=True),
    Product(4, PerChannel(), "xw", 5, 320, 128, G(8, 128, 256, 1, 2, 2), layers=3, layer=-2, stack=(2,)),
    Product(4, PerGroup(64), "xw", 9, 320, 64, G(8, 64, 128, 1, 2, 1), layers=2, layer=5),
    Product(4, PerGroup(64), "x", 9, 448, 128, G(8, 128, 256, 2, 2, 1)),
    Product(8, PerGroup(64), "w", 3, 576, 64, G(8, 64, 512, 4, 2, 1)),
)


CODES = ActSpec(FORMATS["int8"], MinMax(), "tensor", zero_point=True)
SYMMETRIC = ActSpec(FORMATS["int4"], MinMax(), "tensor")


def _form(bits: int, granularity: Any, **options: Any) -> dict[str, Any]:
    return {"bits": bits, "granularity": granularity, "k": 200, "n": 70, "order": "nk", **options}


MOSAIC_FUSED = (
    (Fused(False, F32, None, _form(8, PerChannel(), rows=5, k=256, n=64, zero=True)), G(8, 64, 128, 1, 2, 1)),
    (Fused(False, BF16, None, _form(4, PerChannel(), rows=60, k=192, n=192)), G(48, 128, 128, 1, 2, 1)),
    (Fused(False, BF16, None, _form(4, PerGroup(64), rows=9, k=448, n=128, zero=True)), G(8, 128, 256, 2, 2, 1)),
    (Fused(True, F32, None, _form(8, PerChannel(), rows=9, k=256, n=64, stack=(2,)), (1, -2)), G(16, 64, 128, 1, 2, 1)),
    (Fused(True, F32, CODES, _form(4, PerChannel(), rows=3, k=256, n=64, zero=True)), G(8, 64, 128, 1, 2, 2)),
    (Fused(True, F32, SYMMETRIC, _form(8, PerChannel(), rows=17, k=128, n=64, weight_zero=True)), None),
)


def run_mosaic() -> None:
    """Writes what is wrong in each case, in a process that the fixture below starts."""
    gpu_chips.CHIPS["h100"] = dataclasses.replace(gpu_chips.CHIPS["h100"], processors=2)  # threads are few
    for product in MOSAIC:
        print(json.dumps(product.wrong(integer_matmul_mosaic)), flush=True)
    for fused, blocks in MOSAIC_FUSED:
        fused.check(integer_matmul_mosaic.fused_matmul, blocks=blocks, interpret=True)
        print(json.dumps(0), flush=True)


@pytest.fixture(scope="module")
def mosaic_wrong() -> list[int]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "ops")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "NPROC": "32"}
    command = [sys.executable, "-c", "import test_integer_gpu; test_integer_gpu.run_mosaic()"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 does not interpret the kernel")
@pytest.mark.parametrize("product", range(len(MOSAIC)), ids=lambda i: str(MOSAIC[i]))
def test_mosaic_gpu_has_the_bits_of_numpy(product: int, mosaic_wrong: list[int]):
    assert mosaic_wrong[product] == 0


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 does not interpret the kernel")
def test_mosaic_gpu_epilogues(mosaic_wrong: list[int]):
    """Each was checked in that process, which ends at the first one that is wrong."""
    assert mosaic_wrong[len(MOSAIC) :] == [0] * len(MOSAIC_FUSED)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.11 interprets the kernel")
def test_interpreting_on_an_old_jax_is_an_error():
    with pytest.raises(NotImplementedError, match=r"jax 0\.11"):
        MOSAIC[0].wrong(integer_matmul_mosaic)


@pytest.mark.parametrize(
    ("granularity", "blocks", "message"),
    [
        (PerChannel(), G(64, 64, 128, 1, 2, 1), r"m \+ 8 must be 8, 16, 24"),
        (PerChannel(), G(256, 64, 128, 1, 2, 1), "at most 256; n"),
        (PerChannel(), G(8, 256, 128, 1, 2, 1), "at most N"),
        (PerChannel(), G(8, 64, 256, 2, 2, 1), "ways 1"),
        (PerChannel(), G(120, 128, 512, 1, 2, 1), "bytes of shared memory"),
        (PerGroup(64), G(8, 64, 128, 1, 2, 2), "splits 1"),
        (PerGroup(192), G(8, 64, 384, 2, 2, 1), r"192 \* ways"),
        (PerGroup(64), G(40, 64, 256, 2, 2, 1), "if m is above 32"),
    ],
)
def test_tiles_that_do_not_fit_are_an_error(granularity: Any, blocks: Any, message: str):
    case = Case(8, granularity, rows=8, k=384, n=128, zero=True, order="nk")
    with pytest.raises(ValueError, match=message):
        integer_matmul_mosaic.matmul(*case.operands, layer=None, out_dtype=F32, blocks=blocks)


def shapes(bits: int, granularity: Any, k: int, n: int, order: Any = "nk", format: str | None = None) -> QTensor:
    """A packed weight without its arrays."""
    spec = QuantSpec(FORMATS[format or f"int{bits}"], granularity, scale_rule=AbsMax())
    layout = Layout((((k, "k"),), ((n, "n"),)))
    return jax.eval_shape(lambda w: quantize(w, spec, layout, order), jax.ShapeDtypeStruct((k, n), F32))


@pytest.mark.parametrize("ones", [0, 8])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(128), PerGroup(64)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_candidates_fit(bits: int, granularity: Any, ones: int):
    for k, n in ((64, 64), (4096, 4096), (8192, 57344)):
        w = shapes(bits, granularity, k, n)
        for m in (1, 64, 100, 3000):
            found = mosaic_tiles.candidates(m, w, ones=ones)
            assert integer_matmul_mosaic.default_blocks(m, w, ones=ones) in found
            for blocks in found:
                mosaic_tiles.check(blocks, w, ones)
                # Sums of integers, and of groups, in registers: 64 columns by a warpgroup of 128 threads.
                sums = (blocks.m + ones + (0 if w.group_size == k else blocks.m)) * 64 // 128
                assert sums <= (64 if blocks.warpgroups > 2 else 128)


def test_every_multiprocessor_has_work():
    for k, n in ((4096, 14336), (8192, 8192), (8192, 28672), (14336, 4096)):
        blocks = integer_matmul_mosaic.default_blocks(16, shapes(8, PerChannel(), k, n))
        assert 100 <= -(-n // blocks.n) * blocks.splits <= 132


# --- Triton ---------------------------------------------------------------------------------------------------------

T = integer_matmul_triton.Blocks
TRITON = (
    Product(8, PerTensor(), "x", 20, 200, 40, T(32, 16, 64, 3, 4, 2), out_dtype=BF16),
    Product(4, PerChannel(), "xw", 3, 203, 33, T(16, 32, 32, 2, 4, 2), layers=2, layer=7),
)


@pytest.mark.parametrize("product", TRITON, ids=str)
def test_triton_has_the_bits_of_numpy(product: Product):
    assert product.wrong(integer_matmul_triton) == 0


@pytest.mark.parametrize("blocks", [T(16, 16, 64, 1, 4, 2), T(16, 16, 32, 2, 4, 2)], ids=str)
def test_triton_tiles_that_cut_groups_are_an_error(blocks: Any):
    with pytest.raises(ValueError, match="multiple of k, and splits 1"):
        Product(8, PerGroup(96), "w", 3, 200, 33, blocks).wrong(integer_matmul_triton)


TRITON_FUSED = (
    (Fused(False, F32, None, _form(8, PerChannel(), rows=5, zero=True)), T(16, 32, 64, 1, 4, 2)),
    (Fused(False, BF16, CODES, _form(4, PerGroup(64), rows=20, order="kn", weight_zero=True)), T(16, 32, 64, 1, 4, 2)),
    (Fused(True, F32, None, _form(4, PerGroup(32), rows=3, stack=(2,)), (1, -2)), T(16, 32, 32, 1, 4, 2)),
    (Fused(True, F32, CODES, _form(8, PerChannel(), rows=17, zero=True, weight_zero=True)), T(16, 32, 64, 2, 4, 2)),
    (Fused(True, F32, SYMMETRIC, _form(8, PerChannel(), rows=33)), None),
)


@pytest.mark.parametrize(("fused", "blocks"), TRITON_FUSED, ids=str)
def test_triton_epilogues(fused: Fused, blocks: Any):
    fused.check(integer_matmul_triton.fused_matmul, blocks=blocks, interpret=True)


# --- Which kernel ---------------------------------------------------------------------------------------------------


def test_what_a_product_runs_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton, "finds_device", lambda: True)
    x, plain = jax.ShapeDtypeStruct((5, 256), jnp.int8), shapes(8, PerChannel(), 256, 128)
    assert "target_chip" in integer_matmul_gpu.kernel(x, plain, F32)[1].reason  # on a CPU
    with gpu_chips.target_chip("h100"):
        assert integer_matmul_gpu.kernel(x, plain, F32) == (integer_matmul_mosaic, Runs(HOPPER_KERNEL))
        assert integer_matmul_gpu.kernel(x, shapes(4, PerGroup(64), 256, 128), F32)[0] is integer_matmul_mosaic
        for w, reason in (
            (shapes(8, PerChannel(), 256, 128, "kn"), "reorder"),
            (shapes(8, PerChannel(), 256, 100), "N must be a multiple of 64"),
            (shapes(4, PerGroup(32), 256, 128), "a multiple of 64"),
            (shapes(4, PerGroup(832), 4096, 128), "at most 512"),
        ):
            kernel, runs = integer_matmul_gpu.kernel(x, w, F32)
            assert kernel is integer_matmul_triton
            assert reason in runs.reason
        for w, dtype, reason in (
            (shapes(3, PerChannel(), 256, 128), F32, "int4 and int8"),
            (shapes(8, PerGroup(20), 256, 128), F32, "multiple of 32"),
            (shapes(8, PerChannel(), 256, 0), F32, "empty"),
            (plain, jnp.float64, "bfloat16"),
        ):
            kernel, runs = integer_matmul_gpu.kernel(x, w, dtype)
            assert kernel is None
            assert reason in runs.reason
    with gpu_chips.target_chip("a100"):
        assert integer_matmul_gpu.kernel(x, plain, F32) == (integer_matmul_triton, Runs(TRITON_KERNEL))
        monkeypatch.setattr(triton, "finds_device", lambda: False)
        assert "use_abstract_mesh" in integer_matmul_gpu.kernel(x, plain, F32)[1].reason


# --- What XLA does around them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
def test_sums_of_groups_of_rows(zero: bool):
    case = Case(8, PerGroup(32), rows=3, stack=(2,), k=80, zero=zero)
    sums = jax.jit(integer_matmul_gpu_operands.row_sums, static_argnums=2)(case.x, case.zero, 32)
    x = np.asarray(case.x, np.int64) - (np.asarray(case.zero, np.int64) if zero else 0)
    want = np.stack([x[..., start : start + 32].sum(axis=-1) for start in (0, 32, 64)], axis=1)
    assert (np.asarray(sums) == want).all()
