"""The kernel of `quantized_ragged_matmul` on NVIDIA GPUs, interpreted, against float64 NumPy; where it is used.

`test_gpu_compile` compiles it. Where Pallas runs a kernel with XLA operations, what the kernel never wrote is NaN: what
leaks into a result shows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_ragged_matmul_tpu import _OPTIONS, _QUICK, E, _array, _expected, _layout, _pack, _spec

from qjax.pallas_kernels.backends import triton
from qjax.pallas_kernels.chips.gpu import target_chip
from qjax.pallas_kernels.numbers import stored_scales
from qjax.pallas_kernels.numbers.formats import PerChannel, PerGroup, PerTensor
from qjax.pallas_kernels.ops.matmul.triton import Blocks
from qjax.pallas_kernels.ops.ragged_matmul import reference as ragged_matmul_reference
from qjax.pallas_kernels.ops.ragged_matmul import triton as ragged_matmul_triton
from qjax.pallas_kernels.ops.ragged_matmul.api import quantized_ragged_matmul
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

pytestmark = pytest.mark.usefixtures("compile_quickly")

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
M, K, N = 75, 192, 70
SIZES = (20, 0, 35, 12)  # in tiles of 16 rows: two of one expert, three of another, and rows of no expert
BLOCKS = Blocks(m=16, n=32, k=64, splits=1, warps=4, stages=2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=6, max_size=6),
    shape=st.sampled_from([(64, 16), (70, 32), (5, 16)]),
)
@example(sizes=[0] * 6, shape=(64, 16))
@example(sizes=[1] * 6, shape=(5, 16))
@example(sizes=[17, 17, 17, 17, 1, 1], shape=(70, 32))
@example(sizes=[0, 0, 0, 0, 0, 99], shape=(64, 16))
def test_every_row_of_an_expert_has_one_visit(sizes: list[int], shape: tuple[int, int]):
    m, rows = shape
    visits = jax.jit(ragged_matmul_triton.plan_visits, static_argnums=(1, 2))(jnp.asarray(sizes, jnp.int32), m, rows)
    found = []
    for expert, first, stop in zip(*map(np.asarray, visits), strict=True):
        assert 0 <= stop - first <= rows
        found += [(row, expert) for row in range(first, stop)]
    assert found == [*enumerate(np.repeat(np.arange(6), sizes)[:m])]


def run(x: jax.Array, w: QTensor, sizes: Any = SIZES, **options: Any) -> np.ndarray:
    product = functools.partial(ragged_matmul_triton.matmul, **{**_OPTIONS, "interpret": True, **options})
    return np.asarray(jax.jit(product, compiler_options=_QUICK)(x, w, jnp.asarray(sizes, jnp.int32)))


# Weight; its order; dtype of x; options, of which blocks are `BLOCKS` if not given.
CASES: list[tuple[Any, str, Any, dict[str, Any]]] = [
    (_spec("int4", PerGroup(64), zero_point=True, scale_dtype="bfloat16"), "kn", BF16, {}),
    (_spec("int8", PerChannel()), "nk", BF16, {"preferred_element_type": F32}),
    (_spec("int4", PerGroup(64)), "kn", F32, {"layer": -1}),
    (_spec("int8", PerTensor()), "kn", F16, {"blocks": None}),
    (_spec("int4", PerGroup(64)), "nk", BF16, {"transpose": True}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:2])))
def test_the_product_is_that_of_float64(case: Any):
    spec, order, dtype, options = case
    lead = () if options.get("layer") is None else (3,)
    w = _pack(spec, *lead, E, k=K, n=N, order=order, dtype=dtype)
    x = _array(M, N if options.get("transpose") else K, dtype=dtype)
    unused = x.at[sum(SIZES) :].set(jnp.nan)
    out = run(unused, w, **{"blocks": BLOCKS, **options})
    assert out.dtype == options.get("preferred_element_type", dtype)
    matrices = np.asarray(w.matrix().astype(F32), np.float64)
    matrices = matrices[options["layer"]] if lead else matrices
    matrices = matrices.swapaxes(1, 2) if options.get("transpose") else matrices
    want, size = _expected(x, matrices, SIZES), _expected(np.abs(x), np.abs(matrices), SIZES)
    # weights may be rounded in the float parameter, and x times their scales where N is contracted
    eps = 2.0**-16 if dtype == F32 else float(jnp.finfo(dtype).eps)
    bound = 2 * eps * size + float(jnp.finfo(out.dtype).eps) * np.abs(want) + 1e-30
    np.testing.assert_array_less(np.abs(out.astype(np.float64) - want), bound)
    assert not out[sum(SIZES) :].any()


def test_experts_without_rows_are_not_multiplied():
    w, x = _pack(_spec("int4", PerGroup(64)), E, k=K, n=N), _array(M, K, dtype=BF16)
    poisoned = dataclasses.replace(w, scales=stored_scales.Scales(w.scales.values.at[1].set(jnp.nan)))
    assert np.isfinite(run(x, poisoned)).all()
    assert not run(x, w, (0,) * E).any()


def test_more_rows_than_there_are():
    w, x = _pack(_spec("int8", PerChannel()), E, k=K, n=N), _array(M, K)
    matrices = np.asarray(w.matrix(), np.float64)
    np.testing.assert_allclose(run(x, w, (50, 60, 0, 9)), _expected(x, matrices, (50, 25, 0, 0)), atol=1e-2)


@pytest.mark.parametrize("blocks", [dataclasses.replace(BLOCKS, splits=2), dataclasses.replace(BLOCKS, k=128)])
def test_blocks_that_do_not_fit_are_an_error(blocks: Blocks):
    w, x = _pack(_spec("int4", PerGroup(64)), E, k=K, n=N), _array(M, K)
    with pytest.raises(ValueError, match=r"splits must be 1.* of a group a multiple of k"):
        run(x, w, blocks=blocks)


def test_what_is_left_to_the_reference_has_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton, "finds_device", lambda: True)
    options = {name: value for name, value in _OPTIONS.items() if name != "layer"}

    def reason(spec: Any, *lead: int) -> str | None:
        w = jax.eval_shape(lambda w: quantize(w, spec, _layout(K, N)), jax.ShapeDtypeStruct((*lead, E, K, N), BF16))
        return ragged_matmul_triton.unsupported(jax.ShapeDtypeStruct((M, K), BF16), w, **options)

    assert "target_chip" in (reason(_spec("int4", PerGroup(64))) or "")
    with target_chip("h100"):
        assert reason(_spec("int4", PerGroup(64))) is None
        assert "4 and 8 bits" in (reason(_spec("int3", PerGroup(64))) or "")
        assert "multiple of 32" in (reason(_spec("int4", PerGroup(48))) or "")
        assert "between 2 and 4 GiB" in (reason(_spec("int8", PerChannel()), 50_000) or "")


def test_on_this_machine_it_is_the_reference():
    w, x, sizes = _pack(_spec("int4", PerGroup(64)), E, k=K, n=N), _array(M, K), jnp.asarray(SIZES, jnp.int32)
    with target_chip("h100"):
        got = quantized_ragged_matmul(x, w, sizes)
    assert (got == jax.jit(functools.partial(ragged_matmul_reference.matmul, **_OPTIONS))(x, w, sizes)).all()
