"""The kernels for NVIDIA GPUs, interpreted, against float64; which of them a product runs on; the order of words.

The Mosaic GPU kernel is interpreted by jax 0.11 and newer, by as many threads as the blocks that it simulates have
warpgroups. They wait for each other inside the CPU's thread pool, and after an error the state of the interpreter is
unknown: so all its cases run in one process of their own, with a larger pool.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.pallas_kernels.backends import gpu_operands, mosaic_tile, triton
from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, PerTensor, QuantSpec
from qjax.pallas_kernels.ops.matmul import gpu as matmul_gpu
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.matmul import mosaic_tiles
from qjax.pallas_kernels.ops.matmul import reference as matmul_reference
from qjax.pallas_kernels.ops.matmul import triton as matmul_triton
from qjax.pallas_kernels.ops.primitive import HOPPER_KERNEL, TRITON_KERNEL, Runs
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize, reorder

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = Path(__file__).resolve().parents[2]
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
OPTIONS: dict[str, Any] = {"casts": (), "precision": None, "preferred_element_type": None, "transpose": False}


@dataclasses.dataclass(frozen=True)
class Case:
    """A product and how it is cut; `stack` counts experts, `layer` picks one of three."""

    m: int
    k: int
    n: int
    format: str
    granularity: Any
    blocks: Any
    dtype: Any = BF16
    zero_point: bool = False
    scale: str = "bfloat16"
    stack: int | None = None
    layer: int | None = None
    order: Any = "nk"
    transpose: bool = False

    def __str__(self) -> str:
        fields = (self.format + ("z" if self.zero_point else ""), self.granularity, jnp.dtype(self.dtype).name)
        stack = f"{self.stack or ''}{'' if self.layer is None else f'l{self.layer}'}{'T' if self.transpose else ''}"
        return "-".join(map(str, (*fields, f"{self.m}x{self.k}x{self.n}", self.order, stack)))

    def operands(self) -> tuple[jax.Array, QTensor]:
        generator = np.random.default_rng((self.m, self.k, self.n))
        spec = QuantSpec(
            FORMATS[self.format],
            self.granularity,
            scale_dtype=self.scale,
            scale_rule=AbsMax(),
            zero_point=self.zero_point,
        )
        experts = () if self.stack is None else (self.stack,)
        layout = Layout((*(((size, "stack"),) for size in experts), ((self.k, "k"),), ((self.n, "n"),)))
        lead = () if self.layer is None else (3,)
        values = 0.3 + generator.standard_normal((*lead, *experts, self.k, self.n))  # zero points are not near 0
        w = jax.jit(lambda w: quantize(w, spec, layout, self.order))(jnp.asarray(values, self.dtype))
        inner = self.n if self.transpose else self.k
        return jnp.asarray(generator.standard_normal((*experts, self.m, inner)), self.dtype), w

    def errors(self, kernel: Any) -> tuple[float, float]:
        """The largest error as part of the documented bound, and the error of all as part of the result, in eps."""
        x, w = self.operands()
        how = {**OPTIONS, "transpose": self.transpose}
        assert kernel.unsupported(x, w, (), x.dtype, transpose=self.transpose) is None
        run = functools.partial(kernel.matmul, layer=self.layer, blocks=self.blocks, interpret=True, **how)
        got = jax.jit(run, compiler_options={"xla_allow_excess_precision": False})(x, w)
        assert got.dtype == x.dtype
        exact = np.asarray(x, np.float64)
        weights = np.asarray(w.dequantize(), np.float64)
        weights = weights if self.layer is None else weights[self.layer]
        weights = np.swapaxes(weights, -1, -2) if self.transpose else weights
        want, eps = exact @ weights, float(jnp.finfo(gpu_operands.operand_dtype(x.dtype, (w.dtype,))).eps)
        error = np.abs(np.asarray(got, np.float64) - want)
        assert error.shape == want.shape
        bound = 2 * eps * (np.abs(exact) @ np.abs(weights)) + float(jnp.finfo(x.dtype).eps) * np.abs(want)
        return float((error / bound).max()), float(np.linalg.norm(error) / np.linalg.norm(want)) / eps


# --- Mosaic GPU -----------------------------------------------------------------------------------------------------

G = matmul_mosaic.Blocks
# Tiles: m, n, k, ways, stages, splits.
MOSAIC = (
    Case(1, 256, 128, "int4", PerGroup(128), G(8, 128, 128, 1, 2, 1)),
    Case(9, 512, 192, "int4", PerGroup(64), G(16, 128, 256, 2, 3, 1), zero_point=True),  # the last tile moves back
    Case(5, 320, 64, "int4", PerGroup(32), G(8, 64, 128, 1, 2, 2)),  # a last tile along K that is not full
    Case(16, 512, 64, "int4", PerChannel(), G(16, 64, 512, 4, 2, 1), scale="float32"),
    Case(3, 384, 64, "int4", PerGroup(96), G(8, 64, 256, 2, 2, 1), layer=-1),
    Case(70, 256, 128, "int8", PerChannel(), G(32, 128, 128, 1, 3, 1), scale="float32"),
    Case(4, 256, 128, "int8", PerGroup(64), G(8, 128, 128, 1, 2, 1), zero_point=True, layer=1, stack=2),
    Case(5, 192, 64, "int8", PerTensor(), G(8, 64, 128, 1, 2, 1), scale="float32"),
    Case(6, 256, 64, "int4", PerGroup(128), G(8, 64, 128, 1, 2, 1), dtype=F16, scale="float16", zero_point=True),
    Case(11, 512, 64, "int4", PerChannel(), G(24, 64, 256, 2, 2, 2), dtype=F32, scale="float32", zero_point=True),
)


def run_mosaic() -> None:
    """Writes the errors of each case, in a process that the fixture below starts."""
    gpu_chips.CHIPS["h100"] = dataclasses.replace(gpu_chips.CHIPS["h100"], processors=2)  # threads are few
    for case in MOSAIC:
        print(json.dumps(case.errors(matmul_mosaic)), flush=True)


def run_apart(code: str) -> list[Any]:
    """What the code prints, a value of JSON in each line, in a process whose interpreter has enough threads."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "ops")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "NPROC": "32"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def mosaic_errors() -> list[tuple[float, float]]:
    return run_apart("import test_matmul_gpu; test_matmul_gpu.run_mosaic()")


interprets = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 does not interpret the kernel")


@interprets
@pytest.mark.parametrize("case", range(len(MOSAIC)), ids=lambda i: str(MOSAIC[i]))
def test_mosaic_gpu_against_float64(case: int, mosaic_errors: list[tuple[float, float]]):
    largest, all_of_them = mosaic_errors[case]
    assert largest < 1
    # Rounded once at the end, a result is off by about a quarter eps; with weights that were rounded, by twice that.
    assert all_of_them < 0.5


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.11 interprets the kernel")
def test_interpreting_on_an_old_jax_is_an_error():
    x, w = MOSAIC[0].operands()
    with pytest.raises(NotImplementedError, match=r"jax 0\.11"):
        matmul_mosaic.matmul(x, w, layer=None, interpret=True, **OPTIONS)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (G(12, 64, 128, 1, 2, 1), "m must be a multiple of 8"),
        (G(8, 64, 128, 2, 2, 1), r"multiple of 128 \* ways"),
        (G(8, 128, 128, 1, 2, 1), "at most 256 and N"),
        (G(72, 64, 512, 4, 2, 1), "at most 64, n"),
        (G(256, 64, 128, 1, 4, 1), "bytes of shared memory"),
    ],
)
def test_tiles_that_do_not_fit_are_an_error(blocks: Any, message: str):
    x, w = Case(8, 256, 64, "int4", PerChannel(), None).operands()
    with pytest.raises(ValueError, match=message):
        matmul_mosaic.matmul(x, w, layer=None, blocks=blocks, **OPTIONS)


@pytest.mark.parametrize("m", [1, 16, 40, 64, 100, 256, 3000])
@pytest.mark.parametrize(("k", "n"), [(64, 64), (4096, 4096), (14336, 4096), (8192, 57344)])
@pytest.mark.parametrize("bits", [4, 8])
def test_candidates_fit(bits: int, k: int, n: int, m: int):
    found = mosaic_tiles.candidates(m, k, n, bits)
    assert matmul_mosaic.default_blocks(m, k, n, bits) in found
    for blocks in found:
        mosaic_tiles.check(blocks, n, bits, F32)
        assert 64 * blocks.m * 4 / 128 + 64 <= 4 * (255 if blocks.warpgroups <= 2 else 104)  # sums in registers


def test_every_multiprocessor_has_work():
    for k, n in ((4096, 14336), (8192, 8192), (8192, 28672), (14336, 4096)):
        blocks = matmul_mosaic.default_blocks(16, k, n, 4)
        assert 100 <= -(-n // blocks.n) * blocks.splits <= 132


def _permuted(a: int, b: int, selector: int) -> int:
    """`prmt.b32` in its default mode, as the manual of PTX defines it."""
    data = [(word >> 8 * i) & 0xFF for word in (a, b) for i in range(4)]
    names = [(selector >> 4 * i) & 0xF for i in range(4)]
    assert max(names) < 8  # a higher one would repeat a sign
    return sum(data[name] << 8 * i for i, name in enumerate(names))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("format", ["nf4", "fp4_e2m1"])
def test_bytes_picked_by_codes_are_the_values_of_the_codebook(format: str, dtype: Any):
    """What the kernel does with registers, which the interpreter does not do, in integers."""
    values = FORMATS[format].values

    def permute(a: int, b: int, selector: int) -> int:
        return _permuted(a, b, selector & 0xFFFF)

    do = mosaic_tile.Instructions(permute, operator.and_, operator.or_, operator.rshift, lambda value: value)
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(16), 8)).reshape(-1, 8)  # each code in each place
    codes = np.concatenate([codes, (np.arange(8) + np.arange(16)[:, None]) % 16])
    for eight in codes:
        word = sum(int(code) << 4 * i for i, code in enumerate(eight))
        found = mosaic_tile.pairs(word, mosaic_tile.byte_tables(values, dtype), do)
        bits = np.array([half for pair in found for half in (pair & 0xFFFF, pair >> 16)], np.uint16)
        np.testing.assert_array_equal(bits.view(dtype), np.asarray(values, dtype)[eight])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_registers_are_looked_up_in_a_program_for_a_gpu(dtype: Any):
    """Which the interpreter does not do either; `test_gpu_compile` compiles it, on the oldest JAX."""
    x, w = shapes(Case(8, 128, 64, "nf4", PerGroup(64), None, dtype=dtype))
    with gpu_chips.target_chip("h100"):
        product = jax.jit(functools.partial(matmul_mosaic.matmul, layer=None, **OPTIONS))
        text = product.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu_v2" in text


# --- Triton ---------------------------------------------------------------------------------------------------------

T = matmul_triton.Blocks
TRITON = (
    Case(20, 128, 40, "int8", PerChannel(), T(32, 32, 64, 2, 4, 2), zero_point=True, layer=1, order="kn"),
    Case(17, 160, 33, "int8", PerTensor(), T(16, 16, 32, 1, 4, 2), dtype=F16, scale="float16", layer=-2),
    Case(20, 96, 130, "nf4", PerGroup(32), T(16, 32, 32, 2, 4, 2), layer=1, stack=2, transpose=True),
)


@pytest.mark.parametrize("case", TRITON, ids=str)
def test_triton_against_float64(case: Case):
    largest, all_of_them = case.errors(matmul_triton)
    assert largest < 1
    assert all_of_them < 0.5


def test_triton_tiles_that_cut_groups_are_an_error():
    x, w = Case(3, 96, 40, "int4", PerGroup(32), None, dtype=F32).operands()
    with pytest.raises(ValueError, match="multiple of k"):
        matmul_triton.matmul(x, w, layer=None, blocks=T(16, 16, 64, 1, 4, 2), **OPTIONS)


# --- Which kernel ---------------------------------------------------------------------------------------------------


def shapes(case: Case) -> tuple[Any, QTensor]:
    return jax.eval_shape(case.operands)


def test_what_a_product_runs_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton, "finds_device", lambda: True)
    plain = Case(8, 256, 128, "int4", PerGroup(128), None)
    x, w = shapes(plain)
    assert "target_chip" in matmul_gpu.kernel(x, w, (), BF16)[1].reason  # on a CPU
    with gpu_chips.target_chip("h100"):
        assert matmul_gpu.kernel(x, w, (), BF16) == (matmul_mosaic, Runs(HOPPER_KERNEL))
        for other, reason in (
            (dataclasses.replace(plain, order="kn"), "reorder"),
            (dataclasses.replace(plain, n=100), "N must be a multiple of 64"),
        ):
            kernel, runs = matmul_gpu.kernel(*shapes(other), (), BF16)
            assert kernel is matmul_triton
            assert reason in runs.reason
        for other, reason in (
            (dataclasses.replace(plain, format="int3"), "widens int3"),
            (dataclasses.replace(plain, granularity=PerGroup(20)), "multiple of 32"),
        ):
            kernel, runs = matmul_gpu.kernel(*shapes(other), (), BF16)
            assert kernel is None
            assert reason in runs.reason
        assert matmul_gpu.kernel(x, w, (), BF16, transpose=True)[0] is matmul_triton
        x32, w32 = shapes(dataclasses.replace(plain, dtype=F32))
        assert matmul_gpu.kernel(x32, w32, (), F32)[0] is matmul_mosaic
        assert matmul_gpu.kernel(x32, w32, (), F32, precision=jax.lax.Precision.HIGHEST)[0] is None
    with gpu_chips.target_chip("a100"):
        assert matmul_gpu.kernel(x, w, (), BF16) == (matmul_triton, Runs(TRITON_KERNEL))
        monkeypatch.setattr(triton, "finds_device", lambda: False)
        assert "use_abstract_mesh" in matmul_gpu.kernel(x, w, (), BF16)[1].reason


def test_without_a_gpu_a_product_is_the_reference():
    x, w = Case(8, 64, 64, "int4", PerGroup(32), None).operands()
    got = matmul_gpu.matmul(x, w, layer=None, **OPTIONS)
    assert (got == matmul_reference.matmul(x, w, layer=None, **OPTIONS)).all()


def test_an_unknown_chip_is_an_error():
    with pytest.raises(ValueError, match="a100, l4, h100, h200"), gpu_chips.target_chip("h300"):
        pass


def test_tiles_of_the_table_are_found(monkeypatch: pytest.MonkeyPatch):
    _, w = shapes(Case(8, 256, 128, "int4", PerGroup(128), None))
    row = {"m": 16, "n": 64, "k": 256, "ways": 2, "stages": 2, "splits": 1}
    monkeypatch.setattr(gpu_chips, "_table", lambda: {("h100", "int4/g128", "bfloat16", 256, 128, 16): row})
    assert gpu_chips.lookup(9, 256, 128, w.spec, BF16) is None
    with gpu_chips.target_chip("h100"):
        assert gpu_chips.lookup(9, 256, 128, w.spec, BF16) == row
        assert gpu_chips.lookup(8, 256, 128, w.spec, BF16) is None
        assert gpu_chips.lookup(9, 256, 256, w.spec, BF16) is None


# --- The order of words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["int3", "int4", "int8", "nf4"])
def test_reordering_keeps_bits(format: str, double_quant: bool):
    """Either way a weight is stored as if it had been packed in that order."""
    spec = QuantSpec(
        FORMATS[format],
        PerGroup(16),
        scale_rule=AbsMax(),
        zero_point=FORMATS[format].kind == "int" and not double_quant,
        double_quant=double_quant,
    )
    layout = Layout((((40, "k"),), ((24, "n"),)))
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 24)), F32)
    kn, nk = (quantize(w, spec, layout, order) for order in ("kn", "nk"))
    for got, want in ((reorder(kn, "nk"), nk), (reorder(nk, "kn"), kn), (reorder(nk, "nk"), nk)):
        assert got.order == want.order
        assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), got, want))
        assert (got.dequantize() == want.dequantize()).all()
