"""What follows packed products becomes part of them: which operations do, and that nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export, lax
from models import ZOO

import qjax
from qjax.pallas_kernels.ops.epilogue_matmul.api import fused_matmul_p
from qjax.passes.jaxpr import control_flow

SPEC = qjax.int4(group=8, scale=qjax.AbsMax())
BF16 = jnp.bfloat16


def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), dtype)


PARAMS = {name: array(24, 40) for name in ("a", "b", "c")} | {"square": array(24, 24), "bias": array(40)}
X = array(2, 5, 24)


def fused(fn: Callable[..., Any], *args: Any, params: Any = None, recipe: Any = SPEC) -> list[str]:
    """What the plan says is fused."""
    q = qjax.quantize(fn, recipe)
    return [str(fusion) for fusion in q.plan(PARAMS if params is None else params, *(args or (X,))).fusions]


def count(jaxpr: Any, primitive: Any) -> int:
    """Equations of a primitive, those in other equations included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(
        (eqn.primitive is primitive) + sum(count(body.jaxpr, primitive) for body in control_flow.bodies(eqn))
        for eqn in jaxpr.eqns
    )


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`unfused(fn)(*args)`: what `fn` gives where nothing is fused."""

    def of(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr("qjax.compile.compiled.plan_fusions", lambda *args: ())
                return fn(*args)

        return run

    return of


# --- What is fused ---------------------------------------------------------------------------------------------

ROW = array(40)
COLUMN = array(2, 5, 1)
# name: a function of parameters and x, and what the plan says of it
REGIONS: dict[str, tuple[Callable[[Any, Any], Any], list[str]]] = {
    "bias": (lambda p, x: x @ p["a"] + p["bias"], ["a: add"]),
    "bias and activation": (
        lambda p, x: nn.relu(x @ p["a"] + p["bias"]).sum(),
        ["a: add, relu"],
    ),
    "an activation of many operations": (
        lambda p, x: nn.gelu(x @ p["a"], approximate=False).sum(),
        ["a: mul, neg, mul, erfc, mul, copy"],
    ),
    "gate": (lambda p, x: nn.silu(x @ p["a"]) * (x @ p["b"] + p["bias"]), ["a, b: silu, add, mul"]),
    "gate of two inputs": (lambda p, x: nn.silu(x @ p["a"]) * ((2 * x) @ p["b"]), ["a: silu, mul"]),
    "three products of one input": (lambda p, x: (x @ p["a"]) * (x @ p["b"]) + x @ p["c"], ["a, b: mul, add"]),
    "residual": (lambda p, x: x + x @ p["square"], ["square: add"]),
    "a constant row and a scale for each token": (lambda p, x: (x @ p["a"] + ROW) * COLUMN, ["a: add, mul"]),
    "choice": (lambda p, x: jnp.where(x @ p["a"] > 0, x @ p["b"], 0), ["a, b: gt, _where"]),
    "a scalar": (lambda p, x: jnp.tanh(x @ p["a"] / 30.0) * p["bias"][0], ["a: div, tanh, mul"]),
    "rounded at the end": (lambda p, x: (x @ p["a"] + p["bias"]).astype(BF16), ["a: add, convert_element_type"]),
    # where it ends
    "two uses": (lambda p, x: ((y := x @ p["a"] + p["bias"]), nn.relu(y)), ["a: add"]),
    "two uses of the product": (lambda p, x: ((y := x @ p["a"]), y + p["bias"]), []),
    "a reduction": (lambda p, x: nn.softmax(2 * (x @ p["a"])), ["a: mul"]),
    "a reshape": (lambda p, x: (x @ p["a"]).reshape(10, 40) + p["bias"], []),
    "an operand of every position": (lambda p, x: x @ p["a"] + array(5, 40), []),
    "the weight on the left": (lambda p, x: jnp.einsum("kn,btk->nbt", p["a"], x) + 1.0, []),
    "an operation that is no value by itself": (lambda p, x: jnp.cumsum(x @ p["a"] + p["bias"], 0), ["a: add"]),
    "an integer": (lambda p, x: (x @ p["a"] + p["bias"]).astype(jnp.int32), ["a: add"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REGIONS)
def test_regions(name: str):
    fn, expected = REGIONS[name]
    assert fused(fn, recipe=[qjax.Rule("*", SPEC)]) == expected


def test_a_cast_that_only_widens_is_left_to_what_reads_the_result():
    x, params = X.astype(BF16), {"a": PARAMS["a"].astype(BF16), "bias": PARAMS["bias"].astype(BF16)}

    def normalised(p: Any, x: Any) -> Any:
        y = (x @ p["a"] + p["bias"]).astype(jnp.float32)
        return y - y.mean()

    assert fused(normalised, x, params=params) == ["a: add"]
    assert fused(lambda p, x: (x @ p["a"] + p["bias"]).astype(jnp.float32), x, params=params) == [
        "a: add, convert_element_type"
    ]


def test_weights_that_are_packed_differently_are_multiplied_apart():
    def gated(p: Any, x: Any) -> Any:
        return nn.silu(x @ p["a"]) * (x @ p["b"])

    rules = [qjax.Rule("a", SPEC), qjax.Rule("b", qjax.int8())]
    assert fused(gated, recipe=rules) == ["a: silu, mul"]
    assert fused(gated, recipe=[qjax.Rule("b", SPEC)]) == ["b: mul"]
    rules = [qjax.Rule("a", qjax.int8(), qjax.dynamic()), qjax.Rule("b", qjax.int8())]
    assert fused(gated, recipe=rules) == ["a: silu, mul"]


class Block(nn.Module):
    """What decoders are made of, with the names of their layers."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense
        h = nn.RMSNorm(dtype=self.dtype, name="norm1")(x)
        q, k, v = (dense(24, dtype=self.dtype, name=name)(h) for name in "qkv")
        probabilities = nn.softmax(q @ k.swapaxes(-1, -2))
        x += dense(24, use_bias=False, dtype=self.dtype, name="out")(probabilities @ v)
        h = nn.RMSNorm(dtype=self.dtype, name="norm2")(x)
        gate, up = (dense(40, use_bias=False, dtype=self.dtype, name=name)(h) for name in ("gate", "up"))
        return x + dense(24, dtype=self.dtype, name="down")(nn.silu(gate) * up)


BLOCK = [
    "q/kernel: add",
    "k/kernel: add",
    "v/kernel: add",
    "out/kernel: add",
    "gate/kernel, up/kernel: silu, mul",
    "down/kernel: add, add",
]


@pytest.mark.parametrize("dtype", [None, BF16], ids=["float32", "bfloat16"])
def test_a_decoder_block_is_its_products(dtype: Any):
    x = X.astype(dtype or jnp.float32)
    model = Block(dtype)
    variables, q = model.init(jax.random.key(0), x), qjax.quantize(model, SPEC)
    plan = q.plan(variables, x)
    assert [str(fusion) for fusion in plan.fusions] == BLOCK
    assert all(f"fused {line}" in str(plan) for line in BLOCK)
    assert plan.to_json()["fused"] == BLOCK

    packed = q.convert(variables, x)
    jaxpr = jax.make_jaxpr(q.apply)(packed, x)
    assert count(jaxpr, fused_matmul_p) == len(BLOCK)
    assert not any(eqn.primitive.name in ("logistic", "jit") for eqn in jaxpr.jaxpr.eqns)
    assert count(jax.make_jaxpr(q.apply)(variables, x), fused_matmul_p) == 0  # training


# --- Products of integers --------------------------------------------------------------------------------------

W8 = qjax.int8(scale=qjax.AbsMax())
STATIC = qjax.static(observer=qjax.MinMax())
INTEGERS = PARAMS | {"d": array(40, 24), "e": array(40, 24)}
# name: a function of parameters and x, the rules before that of static ranges, and what the plan says of it
QUANTIZED: dict[str, tuple[Callable[[Any, Any], Any], list[Any], list[str]]] = {
    "dynamic ranges": (
        lambda p, x: nn.silu(x @ p["a"] + p["bias"]) @ p["d"] + x,
        [qjax.Rule("[ad]*", W8, qjax.dynamic())],
        ["a: add, silu", "d: add"],
    ),
    "static ranges": (
        lambda p, x: nn.relu(x @ p["a"] + p["bias"]) @ p["d"] + x,
        [],
        ["a: add, relu, quantize", "d: add"],
    ),
    "gate": (lambda p, x: (nn.silu(x @ p["a"]) * (x @ p["b"])) @ p["d"], [], ["a, b: silu, mul, quantize"]),
    "nothing else": (lambda p, x: (x @ p["a"]) @ p["d"], [], ["a: quantize"]),
    "two that read it": (lambda p, x: ((h := nn.relu(x @ p["a"])) @ p["d"], h @ p["e"]), [], ["a: relu, quantize"]),
    "a product of activations": (
        lambda p, x: jnp.matmul(x @ p["a"], (x @ p["b"]).mT),
        [qjax.Rule("matmul:*", activations=STATIC)],
        ["a: quantize"],
    ),
    # where it stays float, and why
    "a residual connection": (
        lambda p, x: jnp.tanh((h := x @ p["square"] + x) @ p["b"]).sum() + h,
        [],
        ["square: add (not quantize: 'add' reads the values too)", "b: tanh"],
    ),
    "a result": (
        lambda p, x: ((h := nn.relu(x @ p["a"])) @ p["d"], h),
        [],
        ["a: relu (not quantize: the result reads the values too)"],
    ),
    "two ranges": (
        lambda p, x: ((h := nn.relu(x @ p["a"])) @ p["d"], h @ p["e"]),
        [qjax.Rule("d", W8, qjax.static("int4"))],
        ["a: relu (not quantize: it is quantized in several ways)"],
    ),
    "one dynamic range": (lambda p, x: nn.relu(x @ p["a"]) @ p["d"], [qjax.Rule("d", W8, qjax.dynamic())], ["a: relu"]),
    "a product of floats": (lambda p, x: nn.relu(x @ p["a"]) @ p["d"], [qjax.Rule("a", W8)], ["a: relu"]),
    "a reduction in between": (lambda p, x: nn.softmax(x @ p["a"]) @ p["d"], [], []),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_products_of_integers(name: str):
    fn, rules, expected = QUANTIZED[name]
    assert fused(fn, params=INTEGERS, recipe=[*rules, qjax.Rule("**", W8, STATIC)]) == expected


def test_pairs_share_their_codes():
    """Two inputs of one value that are quantized in different ways are multiplied apart."""
    rules = [qjax.Rule("a", W8, qjax.dynamic()), qjax.Rule("b", W8, qjax.dynamic("int4"))]
    assert fused(lambda p, x: nn.silu(x @ p["a"]) * (x @ p["b"]), recipe=rules) == ["a: silu, mul"]


# --- What it computes ------------------------------------------------------------------------------------------


def outputs(tree: Any) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(tree) if isinstance(a, jax.Array)]


@pytest.mark.parametrize(
    "name", ["mlp_linen", "transformer_linen", "transformer_bf16_linen", "encdec_linen", "moe_vmap_linen"]
)
def test_models_give_the_same_bits(name: str, unfused: Any):
    """Off TPU the same operations run, in the same compiled order."""
    instance = ZOO[name].make()
    q, how = qjax.quantize(instance.model, SPEC), {**instance.apply_kwargs, **instance.kwargs}
    packed = q.convert(instance.variables, *instance.args, **how)

    def run(packed: Any) -> Any:
        return q.apply(packed, *instance.args, **how)

    assert count(jax.make_jaxpr(run)(packed), fused_matmul_p) > 0
    for actual, expected in zip(outputs(jax.jit(run)(packed)), outputs(jax.jit(unfused(run))(packed)), strict=True):
        np.testing.assert_array_equal(actual, expected)


@jax.custom_jvp
def steep(x: jax.Array) -> jax.Array:
    """As `x`, with a gradient of its own."""
    return jnp.maximum(x, x) + 0.0


steep.defjvp(lambda primals, tangents: (steep(*primals), 3 * tangents[0]))


def layers(p: Any, x: jax.Array) -> jax.Array:
    """Scanned layers of a residual block, each a function of its own, with a gradient rule of the user's."""

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        h = jax.checkpoint(lambda x: nn.silu(x @ p["gate"]) * steep(x @ p["up"] + p["bias"]))(x)
        return jax.jit(lambda x, h: x + h @ p["down"])(x, h), None

    return lax.scan(layer, x, p)[0]


STACKED = {
    "gate": array(3, 24, 40),
    "up": array(3, 24, 40) / 2,
    "down": array(3, 40, 24),
    "bias": array(3, 40),
}


@pytest.fixture(scope="module")
def stacked() -> tuple[Any, Any]:
    q = qjax.quantize(layers, SPEC)
    assert [str(fusion) for fusion in q.plan(STACKED, X).fusions] == ["gate, up: silu, add, max, add, mul", "down: add"]
    return q.apply, q.convert(STACKED, X)


def test_scanned_layers_and_their_derivatives(stacked: Any, unfused: Any):
    """Inside `scan`, `remat` and `jit`; backward, forward and batched, the program's own rules are used."""
    apply, packed = stacked

    def all_of(apply: Any) -> Any:
        def run(x: jax.Array) -> Any:
            gradient = jax.grad(lambda x: jnp.sum(apply(packed, x) ** 2))(x)
            tangent = jax.jvp(lambda x: apply(packed, x), (x,), (X,))[1]
            return apply(packed, x), gradient, tangent, jax.vmap(lambda x: apply(packed, x))(x)

        return jax.jit(run)(X)

    for actual, expected in zip(all_of(apply), all_of(unfused(apply)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    primal, gradient, _, mapped = all_of(apply)
    np.testing.assert_allclose(mapped, primal, rtol=1e-5, atol=1e-5)
    assert np.abs(gradient).max() > 0


def calibrated(q: Any, variables: Any, x: jax.Array) -> Any:
    """Packed, with ranges that this input gives."""
    return q.convert(q.calibrate(variables, [x], progress=False), x)


@pytest.mark.parametrize("dtype", [None, BF16], ids=["float32", "bfloat16"])
def test_products_of_integers_give_the_same_bits(dtype: Any, unfused: Any):
    x = X.astype(dtype or jnp.float32)
    model = Block(dtype)
    q = qjax.quantize(model, [qjax.Rule("**", W8, STATIC)])
    packed = calibrated(q, model.init(jax.random.key(0), x), x)
    expected = [line + ", quantize" if line.startswith("gate") else line for line in BLOCK]
    assert [str(fusion) for fusion in q.plan(packed, x).fusions] == expected
    jaxpr = jax.make_jaxpr(q.apply)(packed, x)
    assert count(jaxpr, fused_matmul_p) == len(BLOCK)
    codes = [v.aval.dtype for e in jaxpr.jaxpr.eqns if e.primitive is fused_matmul_p for v in e.outvars]
    assert codes.count(jnp.int8) == 1
    np.testing.assert_array_equal(jax.jit(q.apply)(packed, x), jax.jit(unfused(q.apply))(packed, x))


def test_scanned_products_of_integers_and_their_derivatives(unfused: Any):
    """Each layer has ranges of its own, and a gradient that is the float product's."""

    def rows(p: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            return x + (nn.silu(x @ p["gate"]) * (x @ p["up"] + p["bias"])) @ p["down"], None

        return lax.scan(layer, x, p)[0]

    q = qjax.quantize(rows, [qjax.Rule("**", W8, STATIC)])
    packed = calibrated(q, STACKED, X)
    lines = ["gate, up: silu, add, mul, quantize", "down: add"]
    assert [str(fusion) for fusion in q.plan(packed, X).fusions] == lines

    def all_of(apply: Any) -> Any:
        def run(x: jax.Array) -> Any:
            tangent = jax.jvp(lambda x: apply(packed, x), (x,), (X,))[1]
            return apply(packed, x), jax.vmap(lambda x: apply(packed, x))(x), tangent

        gradient = jax.grad(jax.jit(lambda x: jnp.sum(apply(packed, x) ** 2)))
        return *jax.jit(run)(X), gradient(X)

    together, apart = all_of(q.apply), all_of(unfused(q.apply))
    for actual, expected in zip(together[:2], apart[:2], strict=True):
        np.testing.assert_array_equal(actual, expected)
    for actual, expected in zip(together[2:], apart[2:], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(together[2]).max() > 0


def test_learned_ranges_have_their_gradient(unfused: Any):
    q = qjax.quantize(lambda p, x: nn.relu(x @ p["a"]) @ p["d"], [qjax.Rule("*", W8, qjax.lsq())])
    packed = calibrated(q, {"a": PARAMS["a"], "d": array(40, 24)}, X)
    assert [str(fusion) for fusion in q.plan(packed, X).fusions] == ["a: relu, quantize"]

    def gradient(apply: Any) -> Any:
        return jax.jit(jax.grad(lambda quant: jnp.sum(apply({**packed, "quant": quant}, X) ** 2)))(packed["quant"])

    together, apart = gradient(q.apply), gradient(unfused(q.apply))
    assert np.abs(together["d"]["step"]) > 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), together, apart)


def test_one_that_is_not_packed_is_run_as_it_is():
    """Packed beside float weights: the plan is that of the recipe, the values decide."""
    q = qjax.quantize(lambda p, x: nn.silu(x @ p["a"]) * (x @ p["b"]), [qjax.Rule("*", SPEC)])
    params = {name: PARAMS[name] for name in "ab"}
    packed = q.convert(params, X)
    mixed = {"a": packed["a"], "b": params["b"]}
    assert count(jax.make_jaxpr(q.apply)(packed, X), fused_matmul_p) == 1
    assert count(jax.make_jaxpr(q.apply)(mixed, X), fused_matmul_p) == 0
    np.testing.assert_allclose(q.apply(mixed, X), q.apply(packed, X), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_packed_weight_is_an_error(stacked: Any):
    apply, packed = stacked
    with pytest.raises(TypeError, match="no gradient in its packed weight"):
        jax.grad(lambda p: jnp.sum(apply(p, X)), allow_int=True)(packed)


def test_adapters_keep_their_products():
    q = qjax.quantize(lambda p, x: nn.relu(x @ p["a"]) @ p["d"] + x, SPEC)
    params = {"a": array(24, 40), "d": array(40, 24)}
    m = qjax.lora(q, rank=2, targets="d")
    tree = m.init(jax.random.key(0), q.convert(params, X), X)
    jaxpr = jax.make_jaxpr(m.apply)(tree, X)
    assert count(jaxpr, fused_matmul_p) == 1


def test_adapters_read_the_floats():
    q = qjax.quantize(lambda p, x: nn.relu(x @ p["a"]) @ p["d"], [qjax.Rule("**", W8, STATIC)])
    packed = calibrated(q, {"a": array(24, 40), "d": array(40, 24)}, X)
    m = qjax.lora(q, rank=2, targets="d")
    tree = m.init(jax.random.key(0), packed, X)
    added = {"d": {"a": array(40, 2), "b": array(2, 24)}}
    together = jax.jit(m.apply)({**tree, "lora": added}, X) - jax.jit(m.apply)(tree, X)
    hidden = nn.relu(
        jax.jit(qjax.quantize(lambda p, x: x @ p["a"], q.recipe).apply)(
            {**packed, "params": {"a": packed["params"]["a"]}}, X
        )
    )
    np.testing.assert_allclose(
        together, m.spec.scale * hidden @ added["d"]["a"] @ added["d"]["b"], rtol=1e-3, atol=1e-3
    )


def test_one_exported_program_has_it_for_every_platform(stacked: Any):
    apply, packed = stacked
    served = jax.jit(lambda x: apply(packed, x))
    exported = export.export(served, platforms=("cpu", "tpu", "cuda"))(X)
    np.testing.assert_array_equal(export.deserialize(bytearray(exported.serialize())).call(X), served(X))
    assert "tpu_custom_call" in exported.mlir_module()
