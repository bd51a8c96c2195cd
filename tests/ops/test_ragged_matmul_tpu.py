"""The TPU kernel of `quantized_ragged_matmul`, interpreted, against float64 NumPy; `test_tpu_compile` compiles it.

Where Pallas runs a kernel with XLA operations, what lies beyond the edge of an array is NaN, and so is what the kernel
never wrote: what leaks into a result shows.
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
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.pallas_kernels.chips.tpu import target_chip
from qjax.pallas_kernels.numbers import numerics, packing, stored_scales
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, PerTensor, QuantSpec
from qjax.pallas_kernels.ops.matmul.tpu_tiles import Blocks
from qjax.pallas_kernels.ops.ragged_matmul import tpu as ragged_matmul_tpu
from qjax.pallas_kernels.ops.ragged_matmul.api import quantized_ragged_matmul
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

pytestmark = pytest.mark.usefixtures("compile_quickly")

BF16, F32 = jnp.bfloat16, jnp.float32
# Each program runs once. Excess precision would drop the rounding to bfloat16 that an interpreted kernel asks for.
_QUICK = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
M, E = 37, 4
SIZES = (10, 0, 13, 9)  # with tiles of 16 rows: one that two experts share, one that an expert shares with no expert


def _spec(name: str, granularity: Any, **options: Any) -> QuantSpec:
    return QuantSpec(FORMATS[name], granularity, scale_rule=AbsMax(), **options)


def _array(*shape: int, dtype: Any = F32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


def _layout(k: int, n: int) -> Layout:
    return Layout((((k, "k"),), ((n, "n"),)))


def _pack(spec: QuantSpec, *stack: int, k: int, n: int, order: Any = "kn", dtype: Any = F32) -> QTensor:
    packed = jax.jit(lambda w: quantize(w, spec, _layout(k, n), order), compiler_options=_QUICK)
    return packed(_array(*stack, k, n, dtype=dtype))


_OPTIONS: dict[str, Any] = {
    "layer": None,
    "casts": (),
    "precision": None,
    "preferred_element_type": None,
    "transpose": False,
}


def _product(x: jax.Array, w: QTensor, sizes: jax.Array, **options: Any) -> jax.Array:
    """What the kernel gives, interpreted; options are those of `ragged_matmul_tpu.matmul`."""
    options = {**_OPTIONS, "interpret": True, **options}
    assert ragged_matmul_tpu.unsupported(x, w, options["casts"], options["preferred_element_type"]) is None
    return ragged_matmul_tpu.matmul(x, w, sizes, **options)


def _run(x: jax.Array, w: QTensor, sizes: Any, **options: Any) -> jax.Array:
    product = jax.jit(functools.partial(_product, **options), compiler_options=_QUICK)
    return product(x, w, jnp.asarray(sizes, jnp.int32))


def _expected(x: Any, matrices: Any, sizes: Any) -> np.ndarray:
    """Expert by expert; the rows after those of the experts are 0."""
    x, matrices = np.asarray(x, np.float64), np.asarray(matrices, np.float64)
    out, start = np.zeros((len(x), matrices.shape[-1])), 0
    for matrix, size in zip(matrices, sizes, strict=True):
        out[start : start + size] = x[start : start + size] @ matrix
        start += size
    return out


def assert_product(actual: jax.Array, x: Any, matrices: Any, sizes: Any, weight_eps: float = 0.0) -> None:
    """Within the rounding of float32 sums and of the result, and of weights that are only known up to `weight_eps`."""
    expected, size = _expected(x, matrices, sizes), _expected(np.abs(x), np.abs(matrices), sizes)
    sums = 4 * np.sqrt(x.shape[-1]) * float(jnp.finfo(F32).eps)
    bound = (sums + weight_eps) * size + float(jnp.finfo(actual.dtype).eps) * np.abs(expected)
    assert actual.shape == expected.shape
    np.testing.assert_array_less(np.abs(np.asarray(actual, np.float64) - expected), bound + 1e-30)


def _multiplied(w: QTensor, position: str) -> np.ndarray:
    """The weights that the kernel multiplies bfloat16 rows by: rounded, or codes whose sums are scaled."""
    if position == "before":
        return np.asarray(jax.jit(lambda w: w.matrix().astype(BF16), compiler_options=_QUICK)(w), np.float64)
    group = np.arange(w.layout.k) // w.group_size
    values = numerics.decode_codes(packing.unpack(w.words, w.spec.format, w.layout.k), w.spec.format).astype(BF16)
    zero = np.zeros(()) if w.scales.zero is None else np.asarray(w.scales.zero, np.float64)[..., group, :]
    return (np.asarray(values, np.float64) - zero) * np.asarray(stored_scales.resolve_scales(w.scales))[..., group, :]


# --- Visits ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def _visits(sizes: jax.Array, m: int, rows: int) -> Any:
    return ragged_matmul_tpu.plan_visits(sizes, m, rows)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=6, max_size=6),
    shape=st.sampled_from([(64, 16), (70, 32), (5, 16)]),
)
@example(sizes=[0] * 6, shape=(64, 16))
@example(sizes=[0, 0, 0, 0, 0, 64], shape=(64, 16))
@example(sizes=[16, 16, 16, 16, 0, 0], shape=(64, 16))
@example(sizes=[1, 1, 1, 1, 1, 1], shape=(5, 16))
def test_visits(sizes: list[int], shape: tuple[int, int]):
    """Each tile under each expert that has rows in it, once, in the order of the rows; nothing else is read."""
    m, rows = shape
    expert_of = np.repeat(np.arange(6), sizes)[:m]
    expected = sorted({(row // rows, expert) for row, expert in enumerate(expert_of)})
    visits, count = _visits(jnp.asarray(sizes, jnp.int32), m, rows)
    assert int(count) == max(1, len(expected)) <= visits.expert.size
    found = [(int(tile), int(expert)) for tile, expert in zip(visits.tile, visits.expert, strict=True)]
    assert found[: int(count)] == (expected or [(0, 0)])  # the grid needs a step, if only to write no row
    for expert in range(6):
        rows_of = np.arange(visits.start[expert], visits.end[expert])
        np.testing.assert_array_equal(rows_of, np.flatnonzero(expert_of == expert))


@pytest.mark.parametrize("experts", [1, 8, 64])
@pytest.mark.parametrize("m", [1, 8, 64, 500, 4096])
def test_default_blocks(m: int, experts: int):
    """What is multiplied in vain, and how often an expert is read again, are bounded."""
    w = jax.eval_shape(
        lambda w: quantize(w, _spec("int4", PerGroup(128)), _layout(4096, 1024)),
        jax.ShapeDtypeStruct((experts, 4096, 1024), F32),
    )
    rows = ragged_matmul_tpu.default_blocks(m, experts, w, BF16).m
    assert (rows == 8 or rows % 16 == 0) and rows <= 512
    tiles, used = -(-m // rows), min(m, experts)
    assert (tiles + used - 1) * rows <= 3 * max(m, 16 * used)
    assert tiles <= max(2, used, m // 256)


# --- The product -----------------------------------------------------------------------------------------------


@functools.cache
def _any_sizes(dtype: Any) -> Any:
    w, x = _pack(_spec("int4", PerGroup(64)), E, k=200, n=20), _array(M, 200, dtype=dtype)
    blocks = Blocks(16, 128, 256, "before")
    run = jax.jit(lambda sizes: _product(x, w, sizes, blocks=blocks, casts=(dtype,)), compiler_options=_QUICK)
    return run, x, _multiplied(w, "before")


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.one_of(st.just(0), st.integers(0, 30)), min_size=E, max_size=E),
    dtype=st.sampled_from([BF16, F32]),
)
@example(sizes=[0] * E, dtype=BF16)
@example(sizes=[0, M, 0, 0], dtype=BF16)
@example(sizes=[16, 16, 5, 0], dtype=F32)
@example(sizes=[1, 1, 1, 1], dtype=F32)
def test_any_sizes(sizes: list[int], dtype: Any):
    """More rows than there are, too."""
    run, x, matrices = _any_sizes(dtype)
    out = run(jnp.asarray(sizes, jnp.int32))
    assert out.dtype == dtype
    assert_product(out, x.astype(BF16), matrices, sizes)


def test_what_belongs_to_no_row_is_not_multiplied():
    """NaN in the rows of no expert, and in experts of no row."""
    w, x = _pack(_spec("int4", PerGroup(64)), E, k=200, n=20), _array(M, 200, dtype=BF16)
    poisoned = w.scales.values.at[1].set(jnp.nan)
    w = QTensor(w.words, stored_scales.Scales(poisoned), w.spec, w.layout, w.dtype)
    out = _run(x.at[32:].set(jnp.nan), w, SIZES, casts=(BF16,), blocks=Blocks(16, 128, 256, "before"))
    assert bool(jnp.isfinite(out[:32]).all()) and bool((out[:32] != 0).all()) and not out[32:].any()


@pytest.mark.parametrize("position", ["before", "after"])
def test_gathered_codebooks(position: Any):
    """On v6e values come in another order along K, and rounded to bfloat16."""
    w, x = _pack(_spec("nf4", PerGroup(64)), E, k=300, n=130), _array(M, 300, dtype=BF16)
    with target_chip("v6e"):
        out = _run(x, w, SIZES, preferred_element_type=F32, blocks=Blocks(16, 128, 256, position))
    assert_product(out, x, w.matrix(), SIZES, weight_eps=float(jnp.finfo(BF16).eps))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    k=st.sampled_from([1, 31, 129, 257, 1000]),
    n=st.sampled_from([1, 127, 129]),
    name=st.sampled_from(sorted(FORMATS)),
    granularity=st.sampled_from([PerTensor(), PerChannel(), PerGroup(32), PerGroup(128)]),
    transpose=st.booleans(),
)
def test_awkward_sizes(sizes: list[int], k: int, n: int, name: str, granularity: Any, transpose: bool):
    """With the tiles that a program gets."""
    w = _pack(_spec(name, granularity), len(sizes), k=k, n=n)
    x = _array(max(1, sum(sizes)), n if transpose else k, dtype=BF16)
    out = _run(x, w, sizes, casts=(BF16,), preferred_element_type=F32, transpose=transpose)
    matrices = np.asarray(w.matrix(), np.float64)
    matrices = matrices.swapaxes(1, 2) if transpose else matrices
    assert_product(out, x, matrices, sizes, weight_eps=float(jnp.finfo(BF16).eps))


@pytest.mark.parametrize(
    "spec",
    [_spec("int4", PerGroup(128), scale_dtype="float16"), _spec("nf4", PerGroup(128), double_quant=True)],
    ids=str,
)
def test_layer(spec: QuantSpec):
    """An index out of range is clamped, a negative one counts from the end; scales of one layer are converted."""
    w, x = _pack(spec, 3, E, k=300, n=20), _array(M, 300, dtype=BF16)
    matrices, sizes = _multiplied(w, "after"), jnp.asarray(SIZES)

    def product(x: Any, w: Any, layer: Any) -> Any:
        return _product(x, w, sizes, layer=layer, preferred_element_type=F32, blocks=Blocks(16, 128, 256, "after"))

    run = jax.jit(product, compiler_options=_QUICK)
    for layer, picked in ((0, 0), (7, 2), (-1, 2)):
        assert_product(run(x, w, layer), x, matrices[picked], SIZES)
    written = [out.aval for equation in jax.make_jaxpr(product)(x, w, 0).eqns for out in equation.outvars]
    assert [a for a in written if a.shape[:2] == (3, E) and jnp.issubdtype(a.dtype, jnp.floating)] == []


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("table", {"order": "nk"}),
        ("multiplies", {"x": jnp.int32}),
        ("empty", {"m": 0}),
        ("whole groups", {"spec": _spec("int4", PerGroup(100))}),
    ],
)
def test_what_is_left_to_the_reference_has_a_reason(reason: str, change: dict[str, Any]):
    spec, order = change.get("spec", _spec("int4", PerGroup(64))), change.get("order", "kn")
    w = jax.eval_shape(lambda w: quantize(w, spec, _layout(300, 4), order), jax.ShapeDtypeStruct((E, 300, 4), F32))
    x = jax.ShapeDtypeStruct((change.get("m", 3), 300), change.get("x", F32))
    assert reason in str(ragged_matmul_tpu.unsupported(x, w, (), F32))


@pytest.mark.parametrize("blocks", [Blocks(16, 128, 384, "after"), Blocks(16, 64, 256, "after")])
def test_blocks_that_cut_registers_or_groups_are_an_error(blocks: Blocks):
    w, x = _pack(_spec("int4", PerGroup(64)), E, k=300, n=4), _array(M, 300)
    with pytest.raises(ValueError, match="must be a multiple"):
        _run(x, w, SIZES, blocks=blocks)


# --- In a program ----------------------------------------------------------------------------------------------


def test_programs_for_tpu_call_the_kernel_where_it_can_run():
    """One export for two platforms, and the gradient too; a group that no tile holds runs on the reference."""
    specs = _spec("int4", PerGroup(128)), _spec("int4", PerGroup(100))
    x, sizes = _array(M, 300), jnp.asarray(SIZES)
    for spec, kernels in zip(specs, (2, 0), strict=True):
        w = _pack(spec, E, k=300, n=20)
        leaves, tree = jax.tree.flatten(w)

        def loss(x: jax.Array, sizes: jax.Array, *leaves: jax.Array, tree: Any = tree) -> jax.Array:
            return jnp.sum(quantized_ragged_matmul(x, jax.tree.unflatten(tree, leaves), sizes) ** 2)

        program = jax.jit(jax.value_and_grad(loss))
        exported = jax.export.export(program, platforms=("tpu", "cpu"))(x, sizes, *leaves)
        assert exported.mlir_module().count("tpu_custom_call") == kernels
        value, grad = exported.call(x, sizes, *leaves)
        m = np.asarray(w.matrix(), np.float64)
        y = _expected(x, m, SIZES)
        np.testing.assert_allclose(value, np.sum(y**2), rtol=1e-5)
        expected = _expected(2 * y, m.swapaxes(1, 2), SIZES)
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("devices", [1, 4])
def test_several_devices_on_auto_axes_have_no_kernel(devices: int):
    """XLA splits plain operations; it cannot look into a kernel."""
    mesh = AbstractMesh((devices,), ("model",), axis_types=(AxisType.Auto,))
    spec = _spec("int4", PerGroup(128))
    w = jax.eval_shape(lambda w: quantize(w, spec, _layout(512, 256)), jax.ShapeDtypeStruct((E, 512, 256), F32))
    operands = (jax.ShapeDtypeStruct((M, 512), BF16), w, jax.ShapeDtypeStruct((E,), jnp.int32))
    columns = NamedSharding(mesh, P(None, None, "model"))
    whole = NamedSharding(mesh, P())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=columns if a.ndim == 3 else whole), operands
    )
    program = jax.jit(quantized_ragged_matmul).trace(*placed).lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in program) == (devices == 1)
