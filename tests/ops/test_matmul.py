"""`quantized_matmul` and `quantized_take` against NumPy: dequantize, cast as the program does, multiply in float64.

The CPU lowering chooses among three formulations by size; `small_blocks` lets matrices of a few thousand values take
all of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerChannel, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.matmul import cpu as matmul_cpu
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul
from qjax.pallas_kernels.ops.take.api import quantized_take
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

K, N = 200, 33  # no group of 32 or 24 divides K, N is odd
pytestmark = pytest.mark.usefixtures("compile_quickly")


def _spec(name: str, granularity: Any, **options: Any) -> QuantSpec:
    return QuantSpec(FORMATS[name], granularity, scale_rule=AbsMax(), **options)


FEW = [
    _spec("int4", PerGroup(32), scale_dtype="bfloat16"),
    _spec("int8", PerChannel()),
    _spec("int3", PerGroup(160), zero_point=True),
    _spec("nf4", PerGroup(64), double_quant=True),
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of about 32 of K, or of 5 of N: several and a short last one."""
    monkeypatch.setattr(matmul_cpu, "BLOCK_VALUES", 32 * N)


def _array(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def _pack(spec: QuantSpec, *stack: int, k: int = K, n: int = N, order: Any = "kn", dtype: Any = jnp.float32) -> QTensor:
    return quantize(_array(*stack, k, n, dtype=dtype), spec, Layout((((k, "k"),), ((n, "n"),))), order)


def _dense(w: QTensor, *casts: Any) -> np.ndarray:
    m = w.matrix()
    for dtype in casts:
        m = m.astype(dtype)
    return np.asarray(m, np.float64)


def assert_product(actual: Any, x: Any, m: np.ndarray, weight_eps: float = 0.0) -> None:
    """Within the rounding of float32 sums and of the result; `weight_eps` is that of weights that were not rounded.

    A sum of K terms in any order errs by at most K eps times the sum of the magnitudes, and about the root of K in
    practice; 4 root K never fails and would see one wrong term.
    """
    x64 = np.asarray(x, np.float64)
    expected, size = x64 @ m, np.abs(x64) @ np.abs(m)
    eps = float(jnp.finfo(jnp.float32).eps)
    out = np.asarray(actual, np.float64)
    bound = (4 * np.sqrt(x64.shape[-1]) * eps + weight_eps) * size + float(jnp.finfo(actual.dtype).eps) * np.abs(
        expected
    )
    assert out.shape == expected.shape
    assert (np.abs(out - expected) <= bound + 1e-30).all(), np.max(np.abs(out - expected) / (bound + 1e-30))


# --- The product -----------------------------------------------------------------------------------------------


def test_a_matrix_of_several_blocks():
    """No patch: sizes at which the lowering itself leaves the reference."""
    k, n = 1000, 1100
    weights = [_pack(spec, k=k, n=n) for spec in (FEW[0], FEW[1])]
    xs = [_array(rows, k, seed=5) for rows in (1, 8)]
    out = jax.jit(lambda xs, weights: [quantized_matmul(x, w) for x in xs for w in weights])(xs, weights)
    for (x, w), y in zip(itertools.product(xs, weights), out, strict=True):
        assert_product(y, x, _dense(w))


@pytest.mark.parametrize(
    ("shape", "stack", "options"),
    [
        ((4, K + 1), (), {}),
        ((4, K), (), {"transpose": True}),
        ((4, K), (2,), {}),
        ((2, 4, K), (), {}),
        ((3, 4, K), (3, 2), {"layer": 0}),
        ((K,), (), {}),
    ],
)
def test_shapes_that_do_not_fit_are_a_type_error(shape: Any, stack: Any, options: Any):
    with pytest.raises(TypeError):
        quantized_matmul(jnp.zeros(shape), _pack(FEW[1], *stack), **options)


def test_empty_operands():
    w = _pack(FEW[0])
    assert quantized_matmul(jnp.zeros((0, K)), w).shape == (0, N)


# --- Transforms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FEW[:2], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_derivatives_in_x_are_those_of_the_dense_product(spec: QuantSpec):
    w, x, tangent = _pack(spec), _array(3, K, seed=6), _array(3, K, seed=7)
    m = w.matrix()

    def both(f: Any) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(f(x)))

        return jax.grad(loss)(x), jax.jvp(f, (x,), (tangent,))[1], jax.jvp(jax.grad(loss), (x,), (tangent,))[1]

    packed = jax.jit(lambda w: both(lambda x: quantized_matmul(x, w)))(w)
    dense = jax.jit(lambda m: both(lambda x: x @ m))(m)
    for a, e in zip(packed, dense, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-4 * float(jnp.abs(e).max()))


def test_gradient_in_the_packed_weight_is_an_error():
    w, x = _pack(FEW[0]), _array(3, K)
    with pytest.raises(TypeError, match="no gradient in its packed weight"):
        jax.grad(lambda w: quantized_matmul(x, w).sum(), allow_int=True)(w)


@pytest.mark.parametrize("spec", FEW[:2], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_vmap(spec: QuantSpec):
    """Over x, the weight, both, and the layer; x mapped along another axis; twice."""
    w, x = _pack(spec, 3), _array(3, 2, K, seed=8)
    index = jnp.asarray([2, 0, 1])

    @jax.jit
    def run(x, w, index):
        one = jax.tree.map(lambda a: a[0], w)

        def layer(x: Any, i: Any) -> jax.Array:
            return quantized_matmul(x, w, layer=i)

        return {
            "x": jax.vmap(lambda x: quantized_matmul(x, one))(x),
            "x axis": jax.vmap(lambda x: quantized_matmul(x, one), in_axes=1)(x),
            "w": jax.vmap(lambda w: quantized_matmul(x[0], w))(w),
            "both": jax.vmap(quantized_matmul)(x, w),
            "layer": jax.vmap(layer)(x, index),
            "layer only": jax.vmap(lambda i: layer(x[0], i))(index),
            "twice": jax.vmap(lambda x: jax.vmap(quantized_matmul)(x, w))(jnp.stack([x, 2 * x])),
            "x of a layer": jax.vmap(lambda x: layer(x, index[0]))(x),
        }

    out, m = run(x, w, index), _dense(w)
    x0 = np.broadcast_to(x[:1], x.shape)
    for name, left, right in (
        ("x", x, m[0]),
        ("x axis", jnp.swapaxes(x, 0, 1), m[0]),
        ("w", x0, m),
        ("both", x, m),
        ("layer", x, m[np.asarray(index)]),
        ("layer only", x0, m[np.asarray(index)]),
        ("twice", np.stack([x, 2 * x]), m),
        ("x of a layer", x, m[2]),
    ):
        assert_product(out[name], left, right)


def test_export_for_cpu_makes_a_round_trip():
    w, x = _pack(FEW[0]), _array(3, K, seed=9)
    leaves, tree = jax.tree.flatten(w)
    fn = jax.jit(lambda x, *leaves: quantized_matmul(x, jax.tree.unflatten(tree, leaves)))
    data = jax.export.export(fn, platforms=("cpu",))(x, *leaves).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(x, *leaves), fn(x, *leaves))


# --- Lookup ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["kn", "nk"])
@pytest.mark.parametrize("spec", FEW, ids=str)
def test_take(spec: QuantSpec, order: Any):
    n = 330  # several blocks of double quantization
    w = _pack(spec, n=n, order=order)
    rows = np.asarray(w.matrix()).T
    indices = jnp.asarray([[0, 5, n - 1], [-1, n, 5]])
    np.testing.assert_array_equal(quantized_take(w, indices), rows[np.clip(indices, 0, n - 1)])
    filled = quantized_take(w, indices, fill_value=7.0)
    np.testing.assert_array_equal(filled[0], rows[indices[0]])
    np.testing.assert_array_equal(filled[1, :2], np.full((2, K), 7.0))
    np.testing.assert_array_equal(filled[1, 2], rows[5])
    assert quantized_take(w, jnp.int32(4)).shape == (K,)
