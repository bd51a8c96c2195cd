"""`compare` against the same measures in float64 NumPy, for the three kinds of model, and its errors."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from rich.console import Console

import qjax
from qjax.report.compare import Comparison, compare

pytestmark = pytest.mark.usefixtures("compile_quickly")


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Dense(32)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(16)(x)

    def hidden(self, x: jax.Array) -> jax.Array:
        return self(x)[..., :4]


class NNXClassifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(8, 32, rngs=rngs)
        self.second = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))

    def half(self, x: jax.Array) -> jax.Array:
        return 0.5 * self(x)


def mlp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


MLP_PARAMS = {
    "up": jax.random.normal(jax.random.key(1), (8, 32)),
    "down": jax.random.normal(jax.random.key(2), (32, 16)),
}
# One pass instead of a search: compile time.
SPEC = qjax.int4(group=8, scale=qjax.AbsMax())


def inputs(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def expected(f: Any, g: Any) -> dict[str, float]:
    """The measures of logits f (float) and g (quantized) in float64."""
    f, g = np.asarray(f, np.float64), np.asarray(g, np.float64)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    log_p, log_q = log_softmax(f), log_softmax(g)
    relative = np.linalg.norm(g - f) / np.linalg.norm(f)
    return {
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()),
        "top1": float((f.argmax(-1) == g.argmax(-1)).mean()),
        "relative_error": float(relative),
        "sqnr_db": float(-20 * np.log10(relative)),
    }


def lookup(tables: jax.Array, x: jax.Array) -> jax.Array:
    """A model whose outputs are its parameters: `compare` then sees exactly the logits of the test."""
    return tables + 0 * x


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
def test_measures_equal_float64_numpy_on_random_logits(noise: float):
    f = 5 * inputs(3, 40, 50)
    g = f + noise * inputs(3, 40, 50, seed=1)
    result = compare(lookup, f, lookup, g, [np.zeros((), np.float32)])
    assert result.positions == 120
    for name, value in expected(f, g).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-3, abs=1e-8), name


def test_a_tiny_divergence_of_large_logits_is_resolved():
    f = 10 * inputs(200, 64) + 100
    g = f + 4e-4 * inputs(200, 64, seed=1)
    result = compare(lookup, f, lookup, g, [np.zeros((), np.float32)])
    assert 1e-9 < expected(f, g)["kl"] < 1e-6
    assert result.kl == pytest.approx(expected(f, g)["kl"], rel=0.05)


def test_equal_models_have_no_divergence_and_infinite_sqnr():
    result = compare(mlp, MLP_PARAMS, mlp, MLP_PARAMS, [inputs(5, 8)])
    assert (result.kl, result.top1, result.relative_error, result.sqnr_db) == (0.0, 1.0, 0.0, math.inf)
    assert result.bits_per_weight == 32
    assert result.to_json()["sqnr_db"] is None
    json.dumps(result.to_json(), allow_nan=False)


def test_masked_logits_do_not_spoil_the_measures():
    f, g = inputs(6, 9), inputs(6, 9, seed=1)
    masked = [jnp.where(jnp.arange(9) < 7, x, -jnp.inf) for x in (f, g)]
    result = compare(lookup, masked[0], lookup, masked[1], [np.zeros((), np.float32)])
    for name, value in expected(f[:, :7], g[:, :7]).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-4), name


def test_a_function_over_batches_of_two_shapes():
    q = qjax.quantize(mlp, SPEC)
    packed = q.convert(MLP_PARAMS, inputs(2, 8))
    batches = [inputs(5, 8), inputs(3, 8, seed=1), inputs(5, 8, seed=2)]
    result = compare(mlp, MLP_PARAMS, q, packed, iter(batches))
    f, g = (np.concatenate([np.asarray(m(p, b)) for b in batches]) for m, p in ((mlp, MLP_PARAMS), (q, packed)))
    for name, value in expected(f, g).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-3), name
    plan = q.plan(MLP_PARAMS, inputs(2, 8))
    assert (result.float_bytes, result.quantized_bytes) == (plan.float_bytes, plan.stored_bytes)
    assert result.bits_per_weight == pytest.approx(plan.bits_per_weight)
    assert (result.batches, result.positions) == (3, 13)


def test_a_linen_module_with_flags_method_and_rngs():
    model, x = Classifier(), inputs(6, 8)
    variables = model.init(jax.random.key(0), x)
    q = qjax.quantize(model, SPEC)
    packed = q.convert(variables, x)
    plain = compare(model, variables, q, packed, [x])
    assert plain == compare(model, variables, q, packed, [(x,)])  # one argument, or a tuple of them
    assert plain.positions == 6
    assert plain.kl is not None
    assert 0 < plain.kl < 0.1
    train = compare(model, variables, q, packed, [x], train=True, rngs={"dropout": jax.random.key(0)})
    assert train.kl != plain.kl
    assert compare(model, variables, q, packed, [x], method="hidden").relative_error != plain.relative_error
    # Fake-quant on float variables is what the packed kernels serve.
    assert compare(model, variables, q, variables, [x]).kl == pytest.approx(plain.kl, rel=1e-4)


def test_an_nnx_module():
    model = NNXClassifier(nnx.Rngs(0))
    q = qjax.quantize(model, SPEC)
    converted, batches = q.convert(inputs(2, 8)), [inputs(4, 8), inputs(4, 8, seed=1)]
    result = compare(model, None, converted, None, batches)
    f, g = (np.concatenate([np.asarray(m(b)) for b in batches]) for m in (model, converted))
    for name, value in expected(f, g).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-3), name
    assert result.bits_per_weight == pytest.approx(q.plan(inputs(2, 8)).bits_per_weight)
    half = compare(model, None, converted, None, batches, method="half")
    assert half.relative_error == pytest.approx(result.relative_error, rel=1e-4)
    assert half.kl != result.kl


def test_a_score_of_ones_own_is_averaged_over_the_batches():
    batches = [(inputs(5, 8, seed=i), inputs(5, 16, seed=9 + i)) for i in range(3)]

    def model(params, x, target):
        return mlp(params, x)

    def loss(out, x, target):
        return jnp.mean((out - target) ** 2)

    halved = jax.tree.map(lambda w: w / 2, MLP_PARAMS)
    result = compare(model, MLP_PARAMS, model, halved, batches, score=loss)
    for actual, params in ((result.float_score, MLP_PARAMS), (result.quantized_score, halved)):
        assert actual == pytest.approx(np.mean([loss(mlp(params, x), x, y) for x, y in batches]), rel=1e-5)
    assert "score" in str(result)


def test_outputs_that_are_no_logits_have_only_errors():
    def pair(params, x):
        return {"hidden": x @ params["up"], "logits": mlp(params, x), "count": jnp.arange(3)}

    q = qjax.quantize(pair, SPEC)
    packed = q.convert(MLP_PARAMS, inputs(5, 8))
    result = compare(pair, MLP_PARAMS, q, packed, [inputs(5, 8)])
    assert result.kl is result.top1 is result.positions is None
    assert "SQNR" in str(result)
    assert "nats" not in str(result)
    picked = compare(pair, MLP_PARAMS, q, packed, [inputs(5, 8)], logits=lambda out: out["logits"])
    f, g = (np.asarray(m(p, inputs(5, 8))["logits"]) for m, p in ((pair, MLP_PARAMS), (q, packed)))
    assert picked.kl == pytest.approx(expected(f, g)["kl"], rel=1e-3)


def test_it_prints_as_a_table_and_is_plain_data():
    q = qjax.quantize(mlp, SPEC)
    result = compare(mlp, MLP_PARAMS, q, q.convert(MLP_PARAMS, inputs(5, 8)), [inputs(5, 8)])
    printed = io.StringIO()
    Console(file=printed, width=100).print(result)
    for text in (str(result), printed.getvalue()):
        for part in ("KL(float || quantized)", "top-1 agreement", "SQNR", "bits per weight", "1 batch, 5 positions"):
            assert part in text
    assert Comparison(**json.loads(json.dumps(result.to_json()))) == result


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="no batches"):
        compare(mlp, MLP_PARAMS, mlp, MLP_PARAMS, iter([]))


def test_nan_names_the_model_and_the_batch():
    broken = {**MLP_PARAMS, "down": MLP_PARAMS["down"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="the quantized model gives NaN in batch 0"):
        compare(mlp, MLP_PARAMS, mlp, broken, [inputs(5, 8)])
    batches = [inputs(5, 8), np.full((5, 8), np.nan, np.float32)]
    with pytest.raises(ValueError, match="the float model gives NaN in batch 1"):
        compare(mlp, MLP_PARAMS, mlp, MLP_PARAMS, batches)


@pytest.mark.parametrize(
    "other", [lambda params, x: (mlp(params, x),), lambda params, x: mlp(params, x)[..., :4]], ids=["tree", "shape"]
)
def test_outputs_of_different_structure_are_an_error(other):
    with pytest.raises(ValueError, match="different outputs"):
        compare(mlp, MLP_PARAMS, other, MLP_PARAMS, [inputs(5, 8)])


def test_outputs_without_floats_are_an_error():
    def count(params, x):
        return jnp.arange(4)

    with pytest.raises(ValueError, match="no floating output"):
        compare(count, MLP_PARAMS, count, MLP_PARAMS, [inputs(5, 8)])


def test_what_does_not_go_together_is_an_error():
    model = NNXClassifier(nnx.Rngs(0))
    with pytest.raises(TypeError, match="holds its own variables"):
        compare(model, {}, model, None, [inputs(5, 8)])
    with pytest.raises(TypeError, match="holds its own"):
        compare(model, None, model, None, [inputs(5, 8)], rngs={"dropout": jax.random.key(0)})
    with pytest.raises(TypeError, match="needs variables"):
        compare(Classifier(), None, Classifier(), None, [inputs(5, 8)])
    with pytest.raises(TypeError, match="neither method nor rngs"):
        compare(mlp, MLP_PARAMS, mlp, MLP_PARAMS, [inputs(5, 8)], method="f")
    with pytest.raises(TypeError, match="takes Linen modules"):
        compare(Classifier, {}, Classifier, {}, [inputs(5, 8)])
