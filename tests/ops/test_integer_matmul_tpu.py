"""The TPU kernel of `integer_matmul`, interpreted, against NumPy: the same bits as the reference has.

That it compiles for each chip is the matter of `test_tpu_compile`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_integer_matmul import Case, Fused, assert_same_bits

from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MinMax
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.integer_matmul import tpu as integer_matmul_tpu
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul
from qjax.pallas_kernels.ops.integer_matmul.tpu import Blocks
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize


def _form(bits: int, granularity: Any, **options: Any) -> dict[str, Any]:
    return {"bits": bits, "granularity": granularity, "k": 300, "n": 130, **options}


def kernel(x: Any, scale: Any, zero: Any, w: QTensor, layer: Any = None, **options: Any) -> jax.Array:
    options = {"out_dtype": jnp.float32, "layer": layer, **options}
    return integer_matmul_tpu.matmul(x, scale, zero, w, interpret=True, **options)


def check(case: Case, tiles: Blocks | None) -> None:
    assert integer_matmul_tpu.unsupported(case.x.shape, case.w) is None
    out = jax.jit(functools.partial(kernel, blocks=tiles))(*case.operands)
    assert_same_bits(out, case.expected())


# Bits, granularity, order, zero points of x and w, rows, K: every format; several tiles along each axis, and no axis is
# a multiple of its tile.


@pytest.mark.parametrize(
    ("bits", "group", "tiles", "rows", "k"),
    [
        (4, 512, Blocks(32, 128, 256), 5, 1200),  # a group takes several tiles
        (4, 1280, Blocks(32, 128, 1280), 5, 2600),  # a tile is a group
        (4, 32, Blocks(128, 128, 512), 70, 512),  # a tile is unpacked in parts
        (3, 32, Blocks(64, 128, 512), 64, 800),  # and its planes are cut out of one window
        (3, 128, Blocks(128, 256, 1024), 100, 2048),
    ],
    ids=str,
)
def test_groups_and_tiles_of_several_sizes(bits: int, group: int, tiles: Blocks, rows: int, k: int):
    check(Case(bits, PerGroup(group), rows=rows, k=k, n=33, zero=True, weight_zero=True), tiles)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([1, 2, 31, 32, 129]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([None, 32, 128]),
    st.booleans(),
)
@example(4, 1, 1, 1, None, True)
@example(8, 129, 257, 127, 32, True)
def test_awkward_shapes(bits: int, rows: int, k: int, n: int, group: int | None, zero: bool):
    granularity = PerGroup(group) if group else PerChannel()
    check(Case(bits, granularity, rows=rows, k=k, n=n, zero=zero, weight_zero=zero), None)


def test_double_quantized_scales():
    spec = QuantSpec(FORMATS["int4"], PerGroup(32), scale_rule=AbsMax(), double_quant=True)
    case = Case(4, PerGroup(32))
    k, n = case.w.layout.k, case.w.layout.n
    w = jnp.asarray(np.random.default_rng(0).standard_normal((k, n)), jnp.float32)
    packed = quantize(w, spec, Layout((((k, "k"),), ((n, "n"),))))
    out, exact = jax.jit(lambda x, w: (kernel(x, case.scale, None, w), w.matrix()))(case.x, packed)
    expected = np.asarray(case.x, np.float64) @ np.asarray(exact, np.float64) * np.asarray(case.scale)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- Epilogues -------------------------------------------------------------------------------------------------

CODES = ActSpec(FORMATS["int8"], MinMax(), "tensor", zero_point=True)
SYMMETRIC = ActSpec(FORMATS["int4"], MinMax(), "tensor")
F32, BF16 = jnp.float32, jnp.bfloat16
# Tiles of several sizes along each axis; sums that are in registers, in scratch, and added up over groups.
EPILOGUES = [
    (Fused(False, F32, None, _form(8, PerChannel(), rows=5, order="nk", zero=True)), None),
    (Fused(False, BF16, None, _form(4, PerGroup(32), rows=70, weight_zero=True)), Blocks(32, 128, 256)),
    (Fused(False, F32, CODES, _form(8, PerChannel(), rows=70, zero=True)), Blocks(64, 128, 256)),
    (Fused(False, BF16, CODES, _form(4, PerChannel(), rows=3, k=600)), Blocks(32, 128, 256)),
    (Fused(True, F32, None, _form(4, PerGroup(128), rows=31, zero=True)), None),
    (Fused(True, F32, SYMMETRIC, _form(8, PerChannel(), rows=33, stack=(2,), order="nk"), (1, -2)), None),
    (Fused(True, F32, CODES, _form(3, PerGroup(512), rows=1, k=1200)), Blocks(32, 128, 256)),
]


@pytest.mark.parametrize(("fused", "tiles"), EPILOGUES, ids=str)
def test_epilogues(fused: Fused, tiles: Blocks | None):
    fused.check(integer_matmul_tpu.fused_matmul, blocks=tiles, interpret=True)


# --- Tiles -----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 10_000),
    st.integers(1, 40_000),
    st.integers(1, 150_000),
    st.sampled_from([None, 16, 32, 64, 128, 256, 384, 640, 4096, 5120]),
    st.booleans(),
)
def test_tiles_fit_into_memory_and_hold_whole_groups(bits: int, m: int, k: int, n: int, group: int | None, zero: bool):
    granularity = PerGroup(group) if group else PerChannel()
    spec = QuantSpec(FORMATS[f"int{bits}"], granularity, zero_point=zero, scale_rule=AbsMax())
    w = QTensor(None, None, spec, Layout((((k, "k"),), ((n, "n"),))), jnp.dtype("float32"))
    size = w.group_size
    if integer_matmul_tpu.unsupported((m, k), w):
        return
    tiles = integer_matmul_tpu.default_blocks(m, w)
    assert tiles.m % (128 if tiles.m < m else 32) == 0 and tiles.n % 128 == 0 and tiles.k % 256 == 0
    assert tiles.m < m + 128 and tiles.n < n + 128 and tiles.k < k + max(256, 2 * size)
    assert size == k or size % tiles.k == 0 or tiles.k % size == 0
    # windows are there twice; a result of 32 bits, and the sums of integers that it is made of
    assert 2 * (tiles.m * tiles.k + tiles.k * tiles.n * bits // 8) + 16 * tiles.m * tiles.n < 14 * 2**20


# --- Which lowering --------------------------------------------------------------------------------------------


def _exported(case: Case) -> str:
    leaves, tree = jax.tree.flatten(case.operands)
    product = jax.jit(lambda *leaves: integer_matmul(*jax.tree.unflatten(tree, leaves)))
    return jax.export.export(product, platforms=("tpu", "cpu"))(*leaves).mlir_module()


def test_the_kernel_is_what_tpu_runs():
    assert "tpu_custom_call" in _exported(Case(4, PerGroup(32), zero=True))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(4, PerGroup(24)), "groups of 24 values"),
        (Case(4, PerChannel(), order="nk"), "packed along the lanes"),
        (Case(8, PerGroup(32), order="nk"), "packed along the lanes"),
        (Case(8, PerChannel(), rows=0), "nothing to multiply"),
    ],
    ids=["short groups", "packed rows", "groups in rows", "empty"],
)
def test_what_the_kernel_cannot_hold_goes_to_the_reference(case: Case, reason: str):
    why = integer_matmul_tpu.unsupported(case.x.shape, case.w)
    assert why is not None and reason in why
    assert "tpu_custom_call" not in _exported(case)
