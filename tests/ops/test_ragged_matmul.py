"""`quantized_ragged_matmul`: the primitive, its reference and its place in models, against NumPy expert by expert."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import ZOO

import qjax
from qjax.pallas_kernels.numbers.formats import FORMATS, AbsMax, PerGroup, QuantSpec
from qjax.pallas_kernels.ops.ragged_matmul.api import quantized_ragged_matmul, quantized_ragged_matmul_p
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize

M, E, K, N = 11, 4, 40, 9
INT4 = QuantSpec(FORMATS["int4"], PerGroup(16), scale_rule=AbsMax())
SIZES = [(3, 0, 6, 2), (0, 0, 0, 0), (11, 0, 0, 0), (0, 0, 0, 11), (1, 2, 0, 4), (5, 9, 1, 1), (0, 20, 0, 3)]


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


def _pack(spec: QuantSpec, *stack: int, order: Any = "kn", dtype: Any = jnp.float32) -> QTensor:
    return quantize(_array(*stack, K, N, dtype=dtype), spec, Layout((((K, "k"),), ((N, "n"),))), order)


def _experts(sizes: Any, m: int = M) -> np.ndarray:
    """The expert of each row; -1 in rows of none."""
    experts = np.repeat(np.arange(len(sizes)), sizes)[:m]
    return np.pad(experts, (0, m - len(experts)), constant_values=-1)


def _expected(x: Any, matrices: Any, sizes: Any) -> np.ndarray:
    x, matrices = np.asarray(x, np.float64), np.asarray(matrices, np.float64)
    out = np.zeros((len(x), matrices.shape[-1]))
    for row, expert in enumerate(_experts(sizes, len(x))):
        if expert >= 0:
            out[row] = x[row] @ matrices[expert]
    return out


def assert_product(actual: jax.Array, x: Any, matrices: Any, sizes: Any, weight_eps: float = 0.0) -> None:
    """Within the rounding of float32 sums and of the result; rows of no expert are zeros."""
    expected, size = _expected(x, matrices, sizes), _expected(np.abs(x), np.abs(matrices), sizes)
    sums = 4 * np.sqrt(x.shape[-1]) * float(jnp.finfo(jnp.float32).eps)
    bound = (sums + weight_eps) * size + float(jnp.finfo(actual.dtype).eps) * np.abs(expected)
    assert actual.shape == expected.shape
    np.testing.assert_array_less(np.abs(np.asarray(actual, np.float64) - expected), bound + 1e-30)


# --- The product -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "casts", "preferred", "sizes_dtype"),
    [
        (jnp.bfloat16, jnp.float32, (jnp.bfloat16,), None, jnp.int32),
        (jnp.bfloat16, jnp.bfloat16, (), jnp.float32, jnp.uint8),
        (jnp.float32, jnp.bfloat16, (jnp.float32,), None, jnp.int16),
    ],
)
def test_it_is_ragged_dot_on_the_dequantized_weight(
    x_dtype: Any, w_dtype: Any, casts: Any, preferred: Any, sizes_dtype: Any
):
    w, x, sizes = _pack(INT4, E, dtype=w_dtype), _array(M, K, dtype=x_dtype), jnp.asarray(SIZES[0], sizes_dtype)

    @jax.jit
    def run(x: Any, w: Any, sizes: Any) -> Any:
        m = functools.reduce(lambda m, dtype: m.astype(dtype), casts, w.dequantize())
        packed = quantized_ragged_matmul(x, w, sizes, casts=casts, preferred_element_type=preferred)
        return packed, lax.ragged_dot(x, m, sizes, preferred_element_type=preferred)

    packed, dense = run(x, w, sizes)
    assert packed.dtype == dense.dtype
    np.testing.assert_array_equal(packed, dense)


@pytest.mark.parametrize(
    ("shape", "stack", "sizes", "options"),
    [
        ((M, K + 1), (E,), E, {}),
        ((M, K), (E,), E, {"transpose": True}),
        ((M, K), (E,), E + 1, {}),
        ((M, K), (), E, {}),
        ((M, K), (3, E), E, {}),
        ((M, K), (E,), E, {"layer": 0}),
    ],
)
def test_shapes_that_do_not_fit_are_a_type_error(shape: Any, stack: Any, sizes: int, options: Any):
    with pytest.raises(TypeError):
        quantized_ragged_matmul(jnp.zeros(shape), _pack(INT4, *stack), jnp.zeros(sizes, jnp.int32), **options)


# --- Transforms ------------------------------------------------------------------------------------------------


def test_derivatives_in_x_are_those_of_the_dense_product():
    """Rows of no expert have no derivative."""
    w, x, tangent, sizes = _pack(INT4, E), _array(M, K), _array(M, K) + 1, SIZES[4]
    chosen = np.eye(E, dtype=np.float32)[_experts(sizes)] * (_experts(sizes) >= 0)[:, None]

    def both(f: Any) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(f(x)))

        return jax.grad(loss)(x), jax.jvp(f, (x,), (tangent,))[1], jax.jvp(jax.grad(loss), (x,), (tangent,))[1]

    packed = jax.jit(lambda w: both(lambda x: quantized_ragged_matmul(x, w, jnp.asarray(sizes))))(w)
    dense = jax.jit(lambda m: both(lambda x: jnp.einsum("mk,ekn,me->mn", x, m, chosen)))(w.matrix())
    for a, e in zip(packed, dense, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-4 * float(jnp.abs(e).max()))
    assert not packed[0][7:].any() and packed[0][:7].all()


def test_gradient_in_the_packed_weight_is_an_error():
    w, x = _pack(INT4, E), _array(M, K)
    with pytest.raises(TypeError, match="no gradient in its packed weight"):
        jax.grad(lambda w: quantized_ragged_matmul(x, w, jnp.asarray(SIZES[0])).sum(), allow_int=True)(w)


def test_vmap():
    """Over each operand and all of them, over a weight with another layout, over layers; twice."""
    b = 3
    x, sizes = _array(b, M, K), np.asarray([SIZES[0], SIZES[4], SIZES[5]])
    own, layers = _pack(INT4, b, E), jnp.asarray([2, 0, 1])
    middle = Layout((((K, "k"),), ((E, "stack"),), ((N, "n"),)))  # experts are not the leading axis
    aside = quantize(jnp.swapaxes(_array(b, E, K, N), 1, 2), INT4, middle)
    product = quantized_ragged_matmul

    @jax.jit
    def run(x: Any, own: Any, aside: Any, sizes: Any, layers: Any) -> Any:
        one = jax.tree.map(lambda a: a[0], own)

        def layer(x: Any, i: Any) -> Any:
            return product(x, own, sizes[0], layer=i)

        return {
            "x": jax.vmap(lambda x: product(x, one, sizes[0]))(x),
            "x axis": jax.vmap(lambda x: product(x, one, sizes[0]), in_axes=1, out_axes=1)(jnp.swapaxes(x, 0, 1)),
            "sizes": jax.vmap(lambda s: product(x[0], one, s))(sizes),
            "x and sizes": jax.vmap(lambda x, s: product(x, one, s))(x, sizes),
            "w": jax.vmap(lambda w: product(x[0], w, sizes[0]))(own),
            "all": jax.vmap(product)(x, own, sizes),
            "all, experts aside": jax.vmap(product)(x, aside, sizes),
            "layer": jax.vmap(layer)(x, layers),
            "x of a layer": jax.vmap(lambda x: layer(x, layers[0]))(x),
            "twice": jax.vmap(lambda x: jax.vmap(product)(x, own, sizes))(jnp.stack([x, -x]))[0],
        }

    out, m = run(x, own, aside, jnp.asarray(sizes), layers), np.asarray(own.matrix())
    for i in range(b):
        for name, left, right, groups in (
            ("x", x[i], m[0], sizes[0]),
            ("sizes", x[0], m[0], sizes[i]),
            ("x and sizes", x[i], m[0], sizes[i]),
            ("w", x[0], m[i], sizes[0]),
            ("all", x[i], m[i], sizes[i]),
            ("all, experts aside", x[i], m[i], sizes[i]),
            ("layer", x[i], m[layers[i]], sizes[0]),
            ("x of a layer", x[i], m[2], sizes[0]),
            ("twice", x[i], m[i], sizes[i]),
        ):
            assert_product(out[name][i], left, right, groups)
        np.testing.assert_array_equal(out["x axis"][:, i], out["x"][i])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes=st.lists(st.lists(st.integers(0, 5), min_size=E, max_size=E), min_size=2, max_size=2))
def test_vmap_over_any_sizes(sizes: list[list[int]]):
    """Rows come back to where they were, whatever each element has."""
    x, w = _array(2, M, K), _pack(INT4, E)
    out = _vmapped(x, w, jnp.asarray(sizes))
    for each, y, groups in zip(x, out, sizes, strict=True):
        assert_product(y, each, w.matrix(), groups)


@jax.jit
def _vmapped(x: Any, w: QTensor, sizes: Any) -> Any:
    return jax.vmap(lambda x, sizes: quantized_ragged_matmul(x, w, sizes))(x, sizes)


# --- Over devices ----------------------------------------------------------------------------------------------


def test_explicit_axes_are_an_error_that_says_what_to_do():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(_array(M, K), NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="Explicit axes"):
        quantized_ragged_matmul(x, _pack(INT4, E), jnp.asarray(SIZES[0]))


# --- In a model ------------------------------------------------------------------------------------------------


def _equations(jaxpr: Any) -> list[Any]:
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += _equations(inner) if hasattr(inner, "eqns") else []
    return found


def _floats_of(shape: tuple[int, ...], equations: list[Any]) -> list[Any]:
    """Results that are float arrays of this shape, its axes in any order."""
    avals = [v.aval for eqn in equations for v in eqn.outvars]
    return [a for a in avals if sorted(a.shape) == sorted(shape) and jnp.issubdtype(a.dtype, jnp.floating)]


@pytest.mark.parametrize("name", ["moe_ragged_linen", "moe_ragged_nnx"])
def test_packed_experts_stay_packed(name: str):
    instance = ZOO[name].make()
    q = qjax.quantize(instance.model, INT4)
    if isinstance(instance.model, nnx.Module):
        served = q.convert(*instance.args)
        jaxpr = jax.make_jaxpr(lambda x: served(x))(*instance.args)
    else:
        packed = q.convert(instance.variables, *instance.args)
        jaxpr = jax.make_jaxpr(q.apply)(packed, *instance.args)
    equations = _equations(jaxpr.jaxpr)
    assert sum(eqn.primitive is quantized_ragged_matmul_p for eqn in equations) == 2
    assert _floats_of((3, 20, 28), equations) == []
    assert "ragged_dot_general" not in {eqn.primitive.name for eqn in equations}


BF16 = jnp.bfloat16
BASIC = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
# Forms of a product of (M, K) rows and E experts: shape of the parameter, what the model does with it.
FORMS: dict[str, tuple[tuple[int, ...], Any]] = {
    "ragged_dot": ((E, K, N), lambda w, x, s: lax.ragged_dot(x, w, s)),
    "float32 sums": ((E, K, N), lambda w, x, s: lax.ragged_dot(x, w, s, preferred_element_type=jnp.float32)),
    "bfloat16": ((E, K, N), lambda w, x, s: lax.ragged_dot(x.astype(BF16), w.astype(BF16), s)),
    "transposed": ((E, N, K), lambda w, x, s: lax.ragged_dot(x, w.transpose(0, 2, 1), s)),
    "experts in the middle": ((K, E, N), lambda w, x, s: lax.ragged_dot(x, w.swapaxes(0, 1), s)),
    "K of two axes": ((E, 5, 8, N), lambda w, x, s: lax.ragged_dot(x, w.reshape(E, K, N), s)),
    "K of two axes, turned": (
        (8, E, N, 5),
        lambda w, x, s: lax.ragged_dot(x, w.transpose(1, 3, 0, 2).reshape(E, K, N), s),
    ),
    "N of two axes, turned": (
        (E, 3, K, 4),
        lambda w, x, s: lax.ragged_dot(x, w.transpose(0, 2, 3, 1).reshape(E, K, 12), s),
    ),
    "general": (
        (N, E, K),
        lambda w, x, s: lax.ragged_dot_general(
            x.T, w, s, lax.RaggedDotDimensionNumbers((((0,), (2,)), ((), ())), (1,), (1,))
        ),
    ),
    "several axes produced": (
        (E, 3, K, 4),
        lambda w, x, s: lax.ragged_dot_general(
            x, w, s, lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
        ),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_product_with_dequantized_experts(name: str):
    shape, fn = FORMS[name]
    params, x, sizes = {"w": _array(*shape)}, _array(M, K), jnp.asarray(SIZES[4])
    q = qjax.quantize(lambda p, x, s: fn(p["w"], x, s), INT4)
    packed = q.convert(params, x, sizes)
    equations = _equations(jax.make_jaxpr(q.apply)(packed, x, sizes).jaxpr)
    assert sum(eqn.primitive is quantized_ragged_matmul_p for eqn in equations) == 1
    run = jax.jit(lambda packed, x, s: (q.apply(packed, x, s), fn(packed["w"].dequantize(), x, s)))
    served, expected = run(packed, x, sizes)
    assert served.dtype == expected.dtype
    eps = float(jnp.finfo(served.dtype).eps)
    served, expected = np.asarray(served, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(served, expected, rtol=eps, atol=16 * eps * np.abs(expected).max())
    assert np.abs(expected[:7]).min() > 0 and not served[7:].any()


def test_scanned_experts_are_not_sliced():
    """The body gets the whole stack of layers, and the number of its own."""

    def fn(params: Any, x: Any, sizes: Any) -> Any:
        return lax.scan(lambda x, w: (x + jnp.tanh(lax.ragged_dot(x, w, sizes)), None), x, params["w"])[0]

    params, x, sizes = {"w": _array(3, E, K, K) / 8}, _array(M, K), jnp.asarray(SIZES[4])
    q = qjax.quantize(fn, INT4)
    packed = q.convert(params, x, sizes)
    jaxpr = jax.make_jaxpr(q.apply)(packed, x, sizes).jaxpr
    (product,) = (e for e in _equations(jaxpr) if e.primitive is quantized_ragged_matmul_p)
    assert product.params["indexed"] and product.invars[2].aval.shape[:2] == (3, E)
    served, expected = jax.jit(lambda p: (q.apply(p, x, sizes), fn({"w": p["w"].dequantize()}, x, sizes)))(packed)
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)


def test_another_reading_runs_on_the_dequantized_weight():
    """Rows times one matrix for each of several batches: no form that the primitive has."""

    def fn(params: Any, x: Any, sizes: Any) -> Any:
        numbers = lax.RaggedDotDimensionNumbers((((2,), (2,)), ((0,), (1,))), (1,), (0,))
        return lax.ragged_dot_general(x, params["w"], sizes, numbers)

    params, x, sizes = {"w": _array(E, 2, K, N)}, _array(2, M, K), jnp.asarray(SIZES[0])
    q = qjax.quantize(fn, INT4)
    packed = q.convert(params, x, sizes)
    names = {e.primitive.name for e in _equations(jax.make_jaxpr(q.apply)(packed, x, sizes).jaxpr)}
    assert "ragged_dot_general" in names and quantized_ragged_matmul_p.name not in names
    served, expected = jax.jit(lambda p: (q.apply(p, x, sizes), fn({"w": p["w"].dequantize()}, x, sizes)))(packed)
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)


def test_explicit_axes_run_the_programs_own_equation():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))

    def fn(params: Any, x: Any, sizes: Any) -> Any:
        return lax.ragged_dot(x, params["w"], sizes, out_sharding=NamedSharding(mesh, P()))

    params, x, sizes = {"w": _array(E, K, N)}, _array(M, K), jnp.asarray(SIZES[0])
    q = qjax.quantize(fn, INT4)
    with jax.set_mesh(mesh):
        packed = q.convert(params, x, sizes)
        served = jax.jit(q.apply)(packed, x, sizes)
        assert_product(served, x, packed["w"].matrix(), SIZES[0])
