"""Adapters on packed weights: values and gradients against references on dequantized weights, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import qjax
from qjax.pallas_kernels.packed.qtensor import QTensor, is_packed

SPEC = qjax.int4(group=8, scale=qjax.AbsMax())
pytestmark = pytest.mark.usefixtures("compile_quickly")
RNG = np.random.default_rng(0)
RANK, ALPHA = 3, 5.0
SCALE = ALPHA / RANK


def values(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape) / 3, jnp.float32)


def adapted(q: Any, **kwargs: Any) -> Any:
    return qjax.lora(q, rank=RANK, alpha=ALPHA, **kwargs)


def trained(tree: Any) -> Any:
    """Adapters as after some training: `b` is no longer zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 3, a.dtype), tree)


def dequantized(q: QTensor) -> np.ndarray:
    return np.asarray(jax.jit(QTensor.dequantize)(q), np.float64)


def equations(jaxpr: Any) -> list[Any]:
    """All equations, those of sub-jaxprs included."""
    out = []
    for eqn in jaxpr.eqns:
        out.append(eqn)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            out += equations(inner) if hasattr(inner, "eqns") else []
    return out


# --- Values and gradients ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A product `fn(w, x)` that runs on jax.numpy and on NumPy, and the matrix of an adapter in the axes of `w`."""

    shape: tuple[int, ...]
    x: tuple[int, ...]
    fn: Callable[..., Any]
    delta: Callable[[Any, Any], Any]  # (a, b) -> what is added to w, without the scale
    a: tuple[int, ...]
    b: tuple[int, ...]
    numpy: Callable[..., Any] | None = None  # where `fn` is not a NumPy program


def einsum(spec: str) -> Callable[..., Any]:
    return lambda w, x: (np if isinstance(w, np.ndarray) else jnp).einsum(spec, w, x)


def layers(w: Any, x: Any) -> Any:
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


def layers_by_number(w: Any, x: Any) -> Any:
    return lax.fori_loop(0, w.shape[0], lambda i, h: jnp.tanh(h @ w[i]), x)


def layers_in_numpy(w: Any, x: Any) -> Any:
    for matrix in w:
        x = np.tanh(x @ matrix)
    return x


CASES = {
    "dense": Case((24, 40), (3, 24), lambda w, x: x @ w, lambda a, b: a @ b, (24, 3), (3, 40)),
    "two contracted axes": Case(
        (4, 6, 10),
        (2, 3, 4, 6),
        einsum("nhd,bsnh->bsd"),
        lambda a, b: (a.reshape(24, 3) @ b).reshape(4, 6, 10),
        (24, 3),
        (3, 10),
    ),
    "two produced axes": Case(
        (24, 4, 5), (3, 24), einsum("dnh,bd->bnh"), lambda a, b: (a @ b).reshape(24, 4, 5), (24, 3), (3, 20)
    ),
    "weight in front, transposed": Case(
        (40, 24), (3, 24), einsum("oi,bi->ob"), lambda a, b: (a @ b).T, (24, 3), (3, 40)
    ),
    "experts": Case((2, 24, 8), (2, 3, 24), einsum("ekn,ebk->ebn"), lambda a, b: a @ b, (2, 24, 3), (2, 3, 8)),
    "experts in the middle": Case(
        (24, 2, 8),
        (3, 2, 24),
        einsum("ken,bek->ben"),
        lambda a, b: (a @ b).transpose(1, 0, 2),
        (2, 24, 3),
        (2, 3, 8),
    ),
    "scanned layers": Case(
        (4, 16, 16), (3, 16), layers, lambda a, b: a @ b, (4, 16, 3), (4, 3, 16), numpy=layers_in_numpy
    ),
    "scanned layers of experts": Case(
        (3, 2, 16, 16), (2, 5, 16), layers, lambda a, b: a @ b, (3, 2, 16, 3), (3, 2, 3, 16), numpy=layers_in_numpy
    ),
    "layers by number": Case(
        (4, 16, 16), (3, 16), layers_by_number, lambda a, b: a @ b, (4, 16, 3), (4, 3, 16), numpy=layers_in_numpy
    ),
    "used twice, one index": Case(
        (3, 16, 16), (5, 16), lambda w, x: (x @ w[2]) @ w[2], lambda a, b: a @ b, (3, 16, 3), (3, 3, 16)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_formula(name):
    case = CASES[name]
    x = values(*case.x)
    q = qjax.quantize(lambda p, x: case.fn(p["w"], x), SPEC)
    m = adapted(q)
    packed = q.convert({"w": values(*case.shape)}, x)
    start = m.init(jax.random.key(0), packed, x)
    pair = start["lora"]["w"]
    assert (pair["a"].shape, pair["b"].shape) == (case.a, case.b)
    assert m.plan(packed, x).trainable == pair["a"].size + pair["b"].size
    lora = trained(start["lora"])

    def loss(lora: Any, x: Any) -> Any:
        y = m.apply({**start, "lora": lora}, x)
        return jnp.sum(jnp.sin(y)), y

    program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).trace(lora, x)
    gradient, y = program.lower().compile()(lora, x)

    dense = dequantized(packed["w"])
    a, b = (np.asarray(lora["w"][part], np.float64) for part in "ab")
    expected = (case.numpy or case.fn)(dense + case.delta(a, b) * SCALE, np.asarray(x, np.float64))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-5)

    def reference(lora: Any, x: Any) -> jax.Array:
        w = jnp.asarray(dense, jnp.float32) + case.delta(lora["w"]["a"], lora["w"]["b"]) * SCALE
        return jnp.sum(jnp.sin(case.fn(w, x)))

    expected = jax.jit(jax.grad(reference, argnums=(0, 1)))(lora, x)
    for got, want in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)

    matrix = math.prod(case.shape) // math.prod(case.a[:-2])
    for eqn in equations(program.jaxpr.jaxpr):
        for var in eqn.outvars:  # neither the weights nor one matrix of them is float outside of the packed product
            assert not jnp.issubdtype(var.aval.dtype, jnp.floating) or var.aval.size not in (matrix, dense.size), eqn


def test_adapter_multiplies_in_the_dtype_of_the_input():
    x, w = values(3, 24).astype(jnp.bfloat16), values(24, 40).astype(jnp.bfloat16)
    q = qjax.quantize(lambda p, x: x @ p["w"], SPEC)
    m = adapted(q)
    start = m.init(jax.random.key(0), q.convert({"w": w}, x), x)
    lora = trained(start["lora"])
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    apply = lambda lora, x: m.apply({**start, "lora": lora}, x)  # noqa: E731
    y = jax.jit(apply)(lora, x)
    dots = [e for e in equations(jax.make_jaxpr(apply)(lora, x).jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) == 2 and all(v.aval.dtype == jnp.bfloat16 for e in dots for v in e.invars)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(m.merge({**start, "lora": lora})["w"], np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=0.05)


def test_adapter_sees_the_float_input_where_the_weight_sees_integers():
    x, params = values(3, 24), {"w": values(24, 40)}
    q = qjax.quantize(lambda p, x: x @ p["w"], "w8a8")
    m = adapted(q)
    start = m.init(jax.random.key(0), q.convert(params, x), x)
    pair = trained(start["lora"])["w"]
    a, b = (np.asarray(pair[part], np.float64) for part in "ab")
    integers = np.asarray(jax.jit(q.apply)(start["params"], x), np.float64)
    got = jax.jit(m.apply)({**start, "lora": {"w": pair}}, x)
    np.testing.assert_allclose(got, integers + np.asarray(x, np.float64) @ a @ b * SCALE, rtol=1e-5, atol=1e-5)


# --- Models --------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((2, 8), name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.DenseGeneral(16, axis=(-2, -1), name="down")(nn.silu(h)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(40, 16, name="embed")(tokens)
        layer = nn.remat(Layer, prevent_cse=False)
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(40, name="head")(x)


TOKENS = jnp.asarray(RNG.integers(0, 40, (2, 6)), jnp.int32)
LABELS = jnp.roll(TOKENS, 1, axis=1)


def cross_entropy(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


@pytest.fixture(scope="module")
def floats() -> Any:
    return jax.jit(Model().init)(jax.random.key(0), TOKENS)


@pytest.fixture(scope="module")
def packed(floats) -> Any:
    return qjax.quantize(Model(), SPEC).convert(floats, TOKENS)


@pytest.fixture(scope="module")
def variables(packed) -> Any:
    start = adapted(qjax.quantize(Model(), SPEC)).init(jax.random.key(1), packed, TOKENS)
    return {**start, "lora": trained(start["lora"])}


def test_without_adapters_the_program_is_the_quantized_one(floats, packed):
    q = qjax.quantize(Model(), SPEC)
    for given in (floats, packed):
        plain, same = (jax.make_jaxpr(model.apply)(given, TOKENS) for model in (q, adapted(q)))
        assert str(plain) == str(same)


def test_adapters_are_not_ignored(variables):
    with pytest.raises(ValueError, match=r"'head/kernel' in 'lora'.*qjax\.lora"):
        qjax.quantize(Model(), SPEC).apply(variables, TOKENS)


def test_merged_model_is_the_adapted_one(variables):
    """Through nn.scan and nn.remat."""
    q = qjax.quantize(Model(), SPEC)
    m = adapted(q)
    merged = m.merge(variables, TOKENS)
    assert set(merged) == {"params"}
    assert not any(map(is_packed, jax.tree.leaves(merged, is_leaf=is_packed)))

    def adapted_loss(lora: Any) -> jax.Array:
        return cross_entropy(m.apply({**variables, "lora": lora}, TOKENS))

    def merged_loss(lora: Any) -> jax.Array:
        return cross_entropy(Model().apply(m.merge({**variables, "lora": lora}, TOKENS), TOKENS))

    for got, want in zip(
        *(jax.tree.leaves(jax.jit(jax.value_and_grad(f))(variables["lora"])) for f in (adapted_loss, merged_loss)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)

    again = m.merge(variables, TOKENS, requantize=True)
    converted = q.convert(merged, TOKENS)
    assert str(again["params"]["head"]["kernel"]) == str(variables["params"]["head"]["kernel"])
    for name in ("up", "down"):
        for got, want in zip(*(jax.tree.leaves(v["params"]["layers"][name]) for v in (again, converted)), strict=True):
            np.testing.assert_array_equal(got, want)


def test_only_adapters_train(variables):
    m = adapted(qjax.quantize(Model(), SPEC))
    state = TrainState.create(apply_fn=m.apply, params=variables["lora"], tx=optax.adam(1e-2))

    @jax.jit
    def step(state: Any, frozen: Any) -> Any:
        def loss(lora: Any) -> jax.Array:
            return cross_entropy(state.apply_fn({**frozen, "lora": lora}, TOKENS))

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    frozen = {"params": variables["params"]}
    losses = []
    for _ in range(8):
        state, value = step(state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(lambda old, new: float(jnp.abs(new - old).max()), variables["lora"], state.params)
    assert min(jax.tree.leaves(moved)) > 0

    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(lambda params: cross_entropy(m.apply({**variables, "params": params}, TOKENS)))(variables["params"])


def test_float_variables_train_with_adapters_too(floats, variables):
    """Quantization-aware training with adapters: the value is the packed one, and both have gradients."""
    m = adapted(qjax.quantize(Model(), SPEC))
    both = {**floats, "lora": variables["lora"]}
    np.testing.assert_allclose(
        jax.jit(m.apply)(both, TOKENS), jax.jit(m.apply)(variables, TOKENS), rtol=1e-4, atol=1e-5
    )
    gradient = jax.jit(jax.grad(lambda v: cross_entropy(m.apply(v, TOKENS))))(both)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 0
    for got, want in zip(*(jax.tree.leaves(m.merge(v, TOKENS)) for v in (both, variables)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_plan_says_which_and_why(floats, packed):
    m = adapted(qjax.quantize(Model(), SPEC), targets=["layers/**"])
    plan = m.plan(floats, TOKENS)
    assert [e.name for e in plan.adapted] == ["layers/down/kernel", "layers/up/kernel"]
    assert plan["layers/down/kernel"].matrix == (3, 16, 16)
    assert "vector" in plan["layers/norm/scale"].reason
    assert plan.trainable == 2 * (3 * 16 * RANK + 3 * RANK * 16)
    assert plan.parameters == sum(leaf.size for leaf in jax.tree.leaves(floats))
    text = str(plan)
    assert "[3,16,16]" in text and f"{plan.share:.2%} trainable" in text
    assert str(m.plan(packed, TOKENS)) == text


def test_plan_refuses_what_cannot_be_merged():
    @jax.custom_vjp
    def own(w, x):
        return x @ w

    own.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))
    kernel = ("kernel", (5, 8, 8))

    def fn(p, x):
        y = x @ p["plain"] + own(p["own"], x) + x @ jnp.concatenate([p["left"], p["right"]], axis=1)
        y = y + x @ p["shared"] * jnp.sum(p["shared"] ** 2) + jnp.take(p["table"], 0, axis=0)
        y = y + x @ p["turned"] + x @ p["turned"].T
        return y + lax.conv_general_dilated(x[:, None], p[kernel[0]], (1,), "SAME").sum(axis=(1, 2))[:, None]

    names = ("plain", "own", "shared", "turned")
    params = {**{name: values(16, 16) for name in names}, "left": values(16, 8), "right": values(16, 8)}
    params |= {"table": values(8, 16), "kernel": values(5, 1, 4)}
    plan = adapted(qjax.quantize(fn, SPEC)).plan(params, values(3, 16))
    reasons = {e.name: e.reason for e in plan.entries}
    expected = {
        "plain": "",
        "own": "custom_vjp",
        "left": "as part of",
        "right": "as part of",
        "shared": "would not see the adapter",
        "turned": "along other axes",
        "table": "'take#0' is no matmul",
        "kernel": "'conv#0' is no matmul",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name] and bool(reasons[name]) is bool(reason), name


REFUSED = {
    "no parameter": ("heda/**", "'heda/\\*\\*' matches no parameter. Paths look like: embed"),
    "nothing quantized": ("**/norm/**", "none takes an adapter.*stays float: vector"),
    "only a lookup": ("embed/*", "none takes an adapter.*'take#0' is no matmul"),
    "one that is named": (["**/embedding", "head/**"], "none takes an adapter"),
    "some of those named": ("**/[ek]*", "'embed/embedding' is named by target .* but takes no adapter"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_targets_that_do_nothing_are_errors(floats, packed, what):
    targets, message = REFUSED[what]
    m = adapted(qjax.quantize(Model(), SPEC), targets=targets)
    with pytest.raises(qjax.PlanError, match=message):
        m.plan(floats, TOKENS)
    with pytest.raises(qjax.PlanError, match=message):
        m.init(jax.random.key(0), packed, TOKENS)


def test_wrong_arguments(floats, packed, variables):
    q = qjax.quantize(Model(), SPEC)
    with pytest.raises(TypeError, match="Quantize the model first"):
        qjax.lora(Model())
    with pytest.raises(TypeError, match="has adapters already"):
        qjax.lora(qjax.lora(q))
    for wrong in (0, True):
        with pytest.raises(ValueError, match="rank"):
            qjax.lora(q, rank=wrong)
    with pytest.raises(ValueError, match="alpha"):
        qjax.lora(q, alpha=0.0)
    with pytest.raises(ValueError, match="no targets"):
        qjax.lora(q, targets=())
    m = adapted(q)
    with pytest.raises(TypeError, match="packed already"):
        m.init(jax.random.key(0), packed, TOKENS, loftq_iterations=2)
    with pytest.raises(ValueError, match="loftq_iterations"):
        m.init(jax.random.key(0), floats, TOKENS, loftq_iterations=-1)
    pair = variables["lora"]["head"]["kernel"]
    with pytest.raises(ValueError, match="adapter for 'haed/kernel', which is no parameter"):
        m.apply({**packed, "lora": {"haed": {"kernel": pair}}}, TOKENS)
    with pytest.raises(ValueError, match=r"'head/kernel' has a\[3, 40\], b\[16, 3\]; for its matrix \[16,40\]"):
        m.apply({**packed, "lora": {"head": {"kernel": {"a": pair["b"], "b": pair["a"]}}}}, TOKENS)
    with pytest.raises(ValueError, match="'embed/embedding', but in this call it can have none: 'take#0' is no matmul"):
        m.apply({**packed, "lora": {"embed": {"embedding": {"a": values(16, 3), "b": values(3, 40)}}}}, TOKENS)


def test_method_that_uses_half_of_the_model():
    class Two(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(24), nn.Dense(8)

        def __call__(self, x):
            return self.second(self.first(x))

        def encode(self, x):
            return self.first(x)

    x = values(3, 16)
    floats = jax.jit(Two().init)(jax.random.key(0), x)
    m = adapted(qjax.quantize(Two(), SPEC))
    start = m.init(jax.random.key(0), m.convert(floats, x), x)
    start["lora"] = trained(start["lora"])
    merged = m.merge(start, x)
    got = jax.jit(lambda v: m.apply(v, x, method="encode"))(start)
    np.testing.assert_allclose(got, jax.jit(lambda v: Two().apply(v, x, method="encode"))(merged), rtol=1e-4, atol=1e-5)


def test_folded_parameters_stay_packed_in_a_merge():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell = nn.OptimizedLSTMCell(8)  # its kernels are folded into one matrix
            return nn.Dense(5, name="head")(cell(cell.initialize_carry(jax.random.key(0), x.shape), x)[1])

    x = values(3, 16)
    floats = jax.jit(Net().init)(jax.random.key(0), x)
    q = qjax.quantize(Net(), SPEC)
    m = adapted(q, targets="**")
    start = m.init(jax.random.key(0), q.convert(floats, x), x)
    assert set(start["lora"]) == {"head"}
    start["lora"] = trained(start["lora"])
    with pytest.raises(ValueError, match="no float value of its own"):
        m.merge(start, x)
    again = m.merge(start, x, requantize=True)
    assert jax.jit(q.apply)(again, x).shape == (3, 5)
    assert not np.array_equal(again["params"]["head"]["kernel"].words, start["params"]["head"]["kernel"].words)


# --- LoftQ ---------------------------------------------------------------------------------------------------------

FORMATS = {
    "int2": qjax.int2(group=16, scale=qjax.AbsMax()),
    "int4": qjax.int4(group=16, scale=qjax.AbsMax()),
    "nf4": qjax.nf4(group=16, scale=qjax.AbsMax()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_loftq_leaves_less_than_plain_quantization(name):
    x, w = values(3, 48), values(2, 48, 32)
    q = qjax.quantize(lambda p, x: x @ p["w"][0] + x @ p["w"][1], FORMATS[name])
    m = qjax.lora(q, rank=8, alpha=12.0)
    rest = np.asarray(w, np.float64) - dequantized(q.convert({"w": w}, x)["w"])
    plain = np.sum(rest**2)
    singular = np.linalg.svd(rest, compute_uv=False)

    def left(iterations: int, rank: int = 8) -> float:
        m = qjax.lora(q, rank=rank, alpha=12.0)
        start = m.init(jax.random.key(0), {"w": w}, x, loftq_iterations=iterations)
        assert isinstance(start["params"]["w"], QTensor) and start["params"]["w"].spec == FORMATS[name]
        assert start["lora"]["w"]["a"].shape == (2, 48, rank)
        merged = np.asarray(m.merge(start)["w"], np.float64)
        return float(np.sum((np.asarray(w, np.float64) - merged) ** 2))

    assert m.plan({"w": w}, x).trainable == 2 * 8 * (48 + 32)
    once, often = left(1), left(5)
    np.testing.assert_allclose(once, np.sum(singular[:, 8:] ** 2), rtol=1e-4)  # the best fit of rank 8
    assert often < once < 0.7 * plain
    assert left(1, rank=40) < 1e-9 * plain + 1e-8  # more than the matrix has: exact


def test_loftq_in_a_model(floats):
    m = adapted(qjax.quantize(Model(), FORMATS["int2"]), targets="layers/**")
    start = m.init(jax.random.key(0), floats, TOKENS, loftq_iterations=3)
    assert set(start) == {"params", "lora"} and set(start["lora"]) == {"layers"}
    merged, plain = m.merge(start), m.convert(floats, TOKENS)
    for name in ("up", "down"):
        w, got = (np.asarray(v["params"]["layers"][name]["kernel"], np.float64) for v in (floats, merged))
        without = dequantized(plain["params"]["layers"][name]["kernel"])
        assert np.sum((w - got) ** 2) < 0.8 * np.sum((w - without) ** 2)
    np.testing.assert_array_equal(start["params"]["head"]["kernel"].words, plain["params"]["head"]["kernel"].words)


# --- NNX, functions, checkpoints -----------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(16, 24, rngs=rngs)
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.second = nnx.LinearGeneral((4, 6), 5, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))).reshape(-1, 4, 6))


@pytest.mark.parametrize("loftq", [0, 2])
def test_nnx_optimizer_trains_adapters_only(loftq):
    x, y = values(8, 16), values(8, 5)
    net = Net(nnx.Rngs(0))
    q = qjax.quantize(net, SPEC)
    base = q if loftq else q.convert(x)
    m = adapted(base).init(jax.random.key(0), x, loftq_iterations=loftq)
    assert isinstance(m, nnx.Module)
    names = set(nnx.to_flat_state(nnx.state(m.adapters, nnx.LoRAParam)).paths)
    assert names == {(f"{layer}/kernel/{part}",) for layer in ("first", "second") for part in "ab"}
    if not loftq:
        m.eval()
        base.eval()
        np.testing.assert_array_equal(*(nnx.jit(lambda m: m(x))(module) for module in (m, base)))
        m.train()
    optimizer = nnx.Optimizer(m, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(m: Any, optimizer: Any) -> jax.Array:
        def loss(m: Any) -> jax.Array:
            return jnp.mean((m(x) - y) ** 2)

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(m)
        optimizer.update(m, gradient)
        return value

    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(m.base.model, nnx.Param))]
    losses = [float(step(m, optimizer)) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    after = jax.tree.leaves(nnx.state(m.base.model, nnx.Param))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert float(jnp.abs(m.base.model.norm.mean.get_value()).max()) > 0  # state is updated as without adapters

    m.eval()
    merged = m.merge()
    assert isinstance(merged, Net)
    merged.eval()
    np.testing.assert_allclose(*(nnx.jit(lambda m: m(x))(module) for module in (m, merged)), rtol=1e-4, atol=1e-5)
    again = m.merge(requantize=True)
    assert isinstance(again, qjax.QuantizedNNX)
    assert isinstance(again.model.first.kernel.get_value(), QTensor)
    assert str(m.plan(x)) == str(adapted(base).plan(x))


def test_function_keeps_its_tree_and_ranges():
    """Adapters stand beside calibrated ranges; lists in the tree of parameters stay lists."""
    params, x = {"layers": [{"w": values(16, 24)}, {"w": values(24, 8)}]}, values(6, 16)

    def fn(p, x):
        return jnp.tanh(x @ p["layers"][0]["w"]) @ p["layers"][1]["w"]

    q = qjax.quantize(fn, [qjax.Rule("**", qjax.int8(scale=qjax.AbsMax()), qjax.static(observer=qjax.MinMax()))])
    ready = q.convert(q.calibrate(params, [x], progress=False), x)
    m = adapted(q, targets="layers/1/*")
    start = m.init(jax.random.key(0), ready, x)
    assert set(start) == {"params", "quant_stats", "lora"}
    assert isinstance(start["params"]["layers"], list)
    np.testing.assert_array_equal(jax.jit(m.apply)(start, x), jax.jit(q.apply)(ready, x))
    assert str(m.plan(start, x)) == str(m.plan(params, x))
    again = m.merge({**start, "lora": trained(start["lora"])}, requantize=True)
    assert set(again) == {"params", "quant_stats"}
    assert jax.jit(q.apply)(again, x).shape == (6, 8)
    with pytest.raises(TypeError, match="as init gives them"):
        m.apply(ready, x)


def test_adapters_are_saved_alone_and_with_the_model(variables, packed, tmp_path):
    m = adapted(qjax.quantize(Model(), SPEC))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "lora", variables["lora"])
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: m.init(jax.random.key(0), packed, TOKENS))["lora"]
        restored = checkpointer.restore(tmp_path / "lora", abstract)
    apply = jax.jit(m.apply)
    want = apply(variables, TOKENS)
    np.testing.assert_array_equal(apply({**packed, "lora": restored}, TOKENS), want)

    qjax.save(tmp_path / "model", m, variables)
    q, whole = qjax.restore(tmp_path / "model", Model())
    np.testing.assert_array_equal(jax.jit(adapted(q).apply)(whole, TOKENS), want)
