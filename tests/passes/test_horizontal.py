"""Products of one input become one: which do, and that nothing else changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from models import ZOO

import qjax
from qjax.pallas_kernels.ops.horizontal_matmul.api import joint_matmul, joint_matmul_p
from qjax.pallas_kernels.ops.matmul import mosaic as matmul_mosaic
from qjax.pallas_kernels.ops.primitive import XLA, Runs
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, quantize
from qjax.passes.jaxpr import control_flow

SPEC = qjax.int4(group=8, scale=qjax.AbsMax())
BF16 = jnp.bfloat16


def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


PARAMS = {
    "q": array(24, 40),
    "k": array(24, 16),
    "v": array(24, 8),
    "left": array(8, 24),
    "wide": array(40, 24),
    "square": array(24, 24),
    "heads": array(24, 4, 6),
    "one": array(3, 24, 16),
    "other": array(3, 24, 3),
    "bias": array(40),
}
X = array(2, 5, 24)


def joined(fn: Callable[..., Any], x: jax.Array = X, params: Any = None, recipe: Any = None) -> list[str]:
    """What the plan says is joined."""
    q = qjax.quantize(fn, recipe or [qjax.Rule("*", SPEC)], strict=False)
    return [str(joint) for joint in q.plan(PARAMS if params is None else params, x).joints]


def count(jaxpr: Any) -> int:
    """Joint products of a program, those in other equations included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(
        (eqn.primitive is joint_matmul_p) + sum(count(body.jaxpr) for body in control_flow.bodies(eqn))
        for eqn in jaxpr.eqns
    )


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`apart(fn)(*args)`: what `fn` gives where nothing is joined."""

    def of(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr("qjax.compile.compiled.plan_joints", lambda *args: ())
                return fn(*args)

        return run

    return of


# --- What is joined ----------------------------------------------------------------------------------------------


def rounded(p: Any, x: Any) -> Any:
    """Each product casts its operands, as the layers of Flax do."""
    return [x.astype(BF16) @ p[name].astype(BF16) for name in "qkv"]


def picked(p: Any, x: Any) -> Any:
    """Which matrix is next, the product before it says."""
    scores = x @ p["other"][0]
    return scores, x @ p["one"][jnp.argmax(scores.sum((0, 1)))]


HIGHEST = lax.Precision.HIGHEST
# name: a function of parameters and x, and what the plan says of it
CASES: dict[str, tuple[Callable[[Any, Any], Any], list[str]]] = {
    "any width": (lambda p, x: [x @ p[name] for name in "qkv"], ["q, k, v"]),
    "casts": (rounded, ["q, k, v"]),
    "several axes": (lambda p, x: (x @ p["q"], jnp.tensordot(x, p["heads"], 1)), ["q, heads"]),
    "used before the next one": (lambda p, x: jnp.cumsum(x @ p["q"])[:2] @ (x @ p["k"])[0, :2], ["q, k"]),
    "two inputs": (lambda p, x: (x @ p["q"], (2 * x) @ p["k"], x @ p["v"], (2 * x) @ p["square"]), ["q, v"]),
    "two groups": (lambda p, x: [(y @ p["q"], y @ p["k"]) for y in (x, x.sum(0))], ["q, k", "q#1, k#1"]),
    "transposed": (lambda p, x: (x @ p["left"].T, x @ p["wide"].T), ["left, wide"]),
    "the weight on the left": (
        lambda p, x: (x @ p["q"], lax.dot_general(p["k"], x, (((0,), (2,)), ((), ())), preferred_element_type=x.dtype)),
        ["q, k"],
    ),
    "a layer of a stack": (lambda p, x: (x @ p["one"][1], x @ p["other"][2]), ["one, other"]),
    "with a fused pair": (lambda p, x: (nn.silu(x @ p["q"]) * (x @ p["q"]), x @ p["k"], x @ p["v"]), ["k, v"]),
    "with a bias": (lambda p, x: (x @ p["q"] + p["bias"], x @ p["k"], x @ p["v"]), ["k, v"]),
    # which are not
    "one that depends on another": (picked, []),
    "other axes of x": (lambda p, x: (x @ p["square"], jnp.tensordot(x.swapaxes(1, 2), p["square"], ((1,), (0,)))), []),
    "another precision": (lambda p, x: (jnp.dot(x, p["q"], precision=HIGHEST), x @ p["k"]), []),
    "another function": (lambda p, x: (x @ p["q"], jax.jit(lambda x, w: jnp.cumsum(x @ w))(x, p["k"])), []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_which_are_joined(name: str):
    fn, expected = CASES[name]
    assert joined(fn) == expected


def test_weights_that_are_packed_differently_stay_apart():
    fn, _ = CASES["any width"]
    assert joined(fn, recipe=[qjax.Rule("k", qjax.int8()), qjax.Rule("*", SPEC)]) == ["q, v"]
    assert joined(fn, recipe=[qjax.Rule("[qk]", SPEC)]) == ["q, k"]
    assert joined(fn, recipe="w8a8") == []  # products of integers


def test_inside_shard_map_they_stay_apart():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    fn, _ = CASES["any width"]
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"))
    assert joined(mapped) == []


def test_the_plan_says_what_is_joined():
    plan = qjax.quantize(CASES["any width"][0], [qjax.Rule("*", SPEC)]).plan({n: PARAMS[n] for n in "qkv"}, X)
    assert "joined q, k, v" in str(plan).splitlines()
    assert plan.to_json()["joined"] == ["q, k, v"]


# --- What it computes --------------------------------------------------------------------------------------------


def outputs(tree: Any) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(tree) if isinstance(a, jax.Array)]


def served(model: Any, variables: Any, *args: Any, **how: Any) -> tuple[Callable[..., Any], Any]:
    q = qjax.quantize(model, [qjax.Rule("**", SPEC)])
    return lambda packed: q.apply(packed, *args, **how), q.convert(variables, *args, **how)


class Attention(nn.Module):
    """Flax's own, self-attention and on other values, with several output axes and no biases."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        how: dict[str, Any] = {"num_heads": 4, "use_bias": False, "deterministic": True, "dtype": BF16}
        x = nn.MultiHeadDotProductAttention(name="own", normalize_qk=True, **how)(x)
        return nn.MultiHeadDotProductAttention(name="cross", **how)(x, 2 * x)


def test_linen_attention_gives_the_same_bits(apart: Any):
    model = Attention()
    variables = model.init(jax.random.key(0), X)
    run, packed = served(model, variables, X)
    jaxpr = jax.make_jaxpr(run)(packed)
    assert count(jaxpr) == 2
    np.testing.assert_array_equal(jax.jit(run)(packed), jax.jit(apart(run))(packed))


def test_nnx_attention_gives_the_same_bits(apart: Any):
    model = nnx.MultiHeadAttention(4, 24, decode=False, use_bias=False, normalize_qk=True, rngs=nnx.Rngs(0))
    q = qjax.quantize(model, [qjax.Rule("**", SPEC)])
    plan = q.plan(X)
    assert [str(joint) for joint in plan.joints] == ["query/kernel, key/kernel, value/kernel"]
    packed = q.convert(X)
    actual, expected = (nnx.jit(run)(packed, X) for run in (lambda m, x: m(x), apart(lambda m, x: m(x))))
    np.testing.assert_array_equal(actual, expected)


def test_scanned_layers_give_the_same_bits(apart: Any):
    """Grouped queries, in `scan` and `remat`; the packed stacks go in whole."""
    instance = ZOO["transformer_bf16_linen"].make()
    how = {**instance.apply_kwargs, **instance.kwargs}
    run, packed = served(instance.model, instance.variables, *instance.args, **how)
    jaxpr = jax.make_jaxpr(run)(packed)
    assert count(jaxpr) == 1
    for actual, expected in zip(outputs(jax.jit(run)(packed)), outputs(jax.jit(apart(run))(packed)), strict=True):
        np.testing.assert_array_equal(actual, expected)


def projections(p: Any, x: Any, dtype: Any = BF16) -> Any:
    """Products of one input, of which each is used before the next one; the input is cast for each."""
    a = (x.astype(dtype) @ p["q"].astype(dtype)).sum()
    b = jnp.cumsum(x.astype(dtype) @ p["k"].astype(dtype), axis=1) + a
    return a, b, jnp.cumsum(x.astype(dtype) @ p["v"].astype(dtype), axis=1) * b.mean()


def test_derivatives_and_batches_are_those_of_the_products(apart: Any):
    q = qjax.quantize(lambda p, x: projections(p, x, jnp.float32), [qjax.Rule("*", SPEC)])
    packed = q.convert({name: PARAMS[name] for name in "qkv"}, X)

    def all_of(x: jax.Array) -> Any:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.stack([jnp.sum(y**2) for y in q.apply(packed, x)]).sum()

        tangent = jax.jvp(lambda x: q.apply(packed, x), (x,), (x,))[1]
        return q.apply(packed, x), jax.grad(loss)(x), tangent, jax.vmap(lambda x: q.apply(packed, x))(x)

    assert count(jax.make_jaxpr(all_of)(X)) == 1
    for actual, expected in zip(outputs(jax.jit(all_of)(X)), outputs(jax.jit(apart(all_of))(X)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(TypeError, match="no gradient in its packed weight"):
        jax.grad(lambda p: jnp.sum(q.apply(p, X)[1]), allow_int=True)(packed)


def test_one_that_is_not_packed_leaves_each_in_its_place(apart: Any):
    """Packed beside float weights: the plan is that of the recipe, the values decide."""
    q = qjax.quantize(projections, [qjax.Rule("*", SPEC)])
    params = {name: PARAMS[name] for name in "qkv"}
    packed = q.convert(params, X)
    mixed = {**packed, "k": params["k"]}
    assert [count(jax.make_jaxpr(q.apply)(p, X)) for p in (packed, mixed)] == [1, 0]
    for variables in (packed, mixed):  # eager
        for actual, expected in zip(q.apply(variables, X), apart(q.apply)(variables, X), strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_an_adapter_keeps_its_product():
    q = qjax.quantize(lambda p, x: [x @ p[name] for name in "qkv"], [qjax.Rule("*", SPEC)])
    params = {name: PARAMS[name] for name in "qkv"}
    m = qjax.lora(q, rank=2, targets="v")
    tree = m.init(jax.random.key(0), q.convert(params, X), X)
    assert count(jax.make_jaxpr(m.apply)(tree, X)) == 0
    for actual, expected in zip(m.apply(tree, X), q.apply(q.convert(params, X), X), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)  # its second factor begins with zeros


# --- The primitive -----------------------------------------------------------------------------------------------


def weight(*shape: int, spec: Any = SPEC, order: Any = "kn", dtype: Any = jnp.float32) -> QTensor:
    layout = Layout((((shape[-2], "k"),), ((shape[-1], "n"),)))
    return jax.jit(quantize, static_argnums=(1, 2, 3))(array(*shape, dtype=dtype), spec, layout, order)


def test_layers_of_stacks_against_float64():
    ws, layers = [weight(3, 24, n) for n in (40, 8, 16)], [jnp.int32(2), 0, jnp.int32(1)]
    x = array(5, 24)
    out = jax.jit(lambda x, *layers: joint_matmul(x, ws, layers=layers))(x, *layers)
    for y, w, layer in zip(out, ws, layers, strict=True):
        exact = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)[int(layer)]
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(TypeError, match="K=24, N=8"):
        joint_matmul(array(5, 20), [weight(24, 8), weight(24, 16)], layers=[None, None])


def test_one_exported_program_has_it_for_every_platform():
    q = qjax.quantize(CASES["any width"][0], [qjax.Rule("*", SPEC)])
    packed = q.convert({name: PARAMS[name] for name in "qkv"}, X)
    run = jax.jit(lambda x: q.apply(packed, x))
    exported = export.export(run, platforms=("cpu", "tpu", "cuda"))(X)
    for actual, expected in zip(export.deserialize(bytearray(exported.serialize())).call(X), run(X), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("chip", "order", "n", "launches"),
    [("h100", "nk", 64, 1), (None, "nk", 64, 0), ("a100", "nk", 64, 0), ("h100", "kn", 64, 0), ("h100", "nk", 40, 0)],
)
def test_where_it_is_one_kernel(chip: str | None, order: Any, n: int, launches: int, monkeypatch: pytest.MonkeyPatch):
    """On Hopper, where the kernel takes each of the products; with something else in place of the kernels."""
    spec = qjax.int4(group=32, scale=qjax.AbsMax())
    ws = [weight(64, width, spec=spec, order=order, dtype=BF16) for width in (64, n)]
    taken: list[list[int]] = []

    def stand_in(x: Any, weights: Any, *, layers: Any, **how: Any) -> list[jax.Array]:
        taken.append([w.layout.n for w in weights])
        return [x @ jnp.ones((64, w.layout.n), x.dtype) for w in weights]

    monkeypatch.setattr(matmul_mosaic, "joint_matmul", stand_in, raising=False)
    monkeypatch.setattr("qjax.pallas_kernels.ops.matmul.gpu.kernel", lambda *args, **options: (None, Runs(XLA)))
    run = jax.jit(lambda x: joint_matmul(x, ws, layers=[None, None]))
    with qjax.target_chip(chip) if chip else contextlib.nullcontext():
        export.export(run, platforms=["cuda"])(array(8, 64, dtype=BF16))
    assert taken == [[64, n]] * launches
