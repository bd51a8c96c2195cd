"""The plan tells the whole truth: it is read off packed leaves, and says what each product runs as."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax.pallas_kernels.packed.qtensor import QTensor, is_packed

K, N = 512, 256
X = jax.ShapeDtypeStruct((4, K), jnp.float32)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "up": jax.random.normal(keys[0], (K, N)),
        "bias": jnp.zeros(N),
        "down": jax.random.normal(keys[1], (N, K)),
    }


def quick(recipe: str) -> list[qjax.Rule]:
    """The rules of a recipe, with a scale rule that takes no time to compile."""
    (rule,) = qjax.RECIPES[recipe]
    assert rule.weights is not None
    return [dataclasses.replace(rule, weights=dataclasses.replace(rule.weights, scale_rule=qjax.AbsMax()))]


# --- Packed variables -------------------------------------------------------------------------------------------------


def test_the_plan_of_packed_variables_is_what_is_stored(params):
    """int3 is stored as int4 once it is arranged for a chip, and then its plan says so."""
    q = qjax.quantize(mlp, quick("int3"))
    packed = q.convert(params, X)
    assert {e.name: str(e.spec.format) for e in q.plan(packed, X).quantized} == {"up": "int3", "down": "int3"}
    arranged = qjax.arrange(packed, "h100")
    plan = q.plan(arranged, X)
    assert {e.name: str(e.spec.format) for e in plan.quantized} == {"up": "int4", "down": "int4"}
    leaves = [leaf for leaf in jax.tree.leaves(arranged, is_leaf=is_packed) if isinstance(leaf, QTensor)]
    assert sum(e.stored_bytes for e in plan.quantized) == sum(leaf.nbytes for leaf in leaves)
    assert {e.order for e in plan.quantized} == {leaf.order for leaf in leaves} == {"nk"}


@pytest.mark.parametrize(
    ("stored", "applied"), [("int4", "int8"), ("int8", "int4"), ("nf4", "int4"), ("nf4", "w8a8"), ("int3", "int4")]
)
def test_packed_variables_of_another_recipe_are_an_error_with_their_path(params, stored: str, applied: str):
    packed = qjax.quantize(mlp, quick(stored)).convert(params, X)
    q = qjax.quantize(mlp, quick(applied))
    for verb in (q.plan, q):
        with pytest.raises(qjax.PlanError, match=rf"'up' is stored as {stored}/.*but its rule is.*convert") as error:
            verb(packed, jnp.ones(X.shape))
        assert "'down'" in str(error.value)


def test_packed_variables_that_no_rule_gives_a_format_are_an_error(params):
    packed = qjax.quantize(mlp, quick("int8")).convert(params, X)
    q = qjax.quantize(mlp, [qjax.Rule("up", qjax.int8(scale=qjax.AbsMax()))])
    with pytest.raises(qjax.PlanError, match="'down' is stored as int8/channel, but no rule gives it a format"):
        q(packed, jnp.ones(X.shape))


def test_how_scales_were_chosen_is_no_part_of_what_is_stored(params):
    """Trained with one scale rule, served with another: the same arrays."""
    packed = qjax.quantize(mlp, qjax.int4(scale=qjax.AbsMax())).convert(params, X)
    plan = qjax.quantize(mlp, "int4").plan(packed, X)
    assert [str(e.spec.scale_rule) for e in plan.quantized] == [str(qjax.AbsMax())] * 2


def test_packed_and_float_parameters_side_by_side(params):
    """A float leaf is trained, whatever its neighbour is."""
    q = qjax.quantize(mlp, quick("int8"))
    packed = q.convert(params, X)
    plan = q.plan({**packed, "down": params["down"]}, X)
    assert all(e.spec.format.bits == 8 for e in plan.quantized)
    x = jnp.ones(X.shape)
    np.testing.assert_allclose(q({**packed, "down": params["down"]}, x), q(packed, x), rtol=1e-4, atol=1e-3)


# --- What products run as ---------------------------------------------------------------------------------------------


def runs(plan: qjax.Plan) -> dict[str, set[tuple[str, bool]]]:
    """By parameter: what its products run as, and whether there is a reason."""
    found: dict[str, set[tuple[str, bool]]] = {}
    for run in plan.runs:
        for name in run.names:
            found.setdefault(name, set()).add((run.runs, bool(run.reason)))
    return found


def test_each_product_says_what_it_runs_as_on_the_chosen_platform(params):
    q = qjax.quantize(mlp, qjax.int4(group=128, scale=qjax.AbsMax()))
    assert runs(q.plan(params, X)) == {"up": {("XLA", False)}, "down": {("XLA", False)}}
    with qjax.target_chip("v5e"):
        assert runs(q.plan(params, X)) == {"up": {("TPU kernel", False)}, "down": {("TPU kernel", False)}}


def test_a_product_that_no_kernel_takes_says_why(params):
    q = qjax.quantize(mlp, qjax.int4(group=100, scale=qjax.AbsMax()))
    with qjax.target_chip("v5e"):
        plan = q.plan(params, X)
    assert {name for run in plan.fallbacks for name in run.names} == {"up", "down"}
    assert all(run.reason and run.runs != "TPU kernel" for run in plan.fallbacks)
    text = str(plan)
    for run in plan.fallbacks:
        assert run.reason in text
    assert plan.to_json()["runs"][0]["reason"]
    assert not q.plan(params, X).fallbacks  # here, where there are no kernels


def test_strict_can_refuse_a_product_that_falls_back(params):
    q = qjax.quantize(mlp, qjax.int4(group=100, scale=qjax.AbsMax()), strict="kernels")
    packed = q.convert(params, X)
    with qjax.target_chip("v5e"):
        for verb in (q.plan, q.convert):
            with pytest.raises(qjax.PlanError, match=r"without the kernels of 'tpu'.*\n.*(up|down) \(.*\): .*group"):
                verb(params, X)
        with pytest.raises(qjax.PlanError, match="without the kernels of 'tpu'"):
            jax.eval_shape(q, packed, X)
        qjax.quantize(mlp, qjax.int4(group=128, scale=qjax.AbsMax()), strict="kernels").plan(params, X)


def test_ranges_that_are_not_calibrated_yet_do_not_stand_in_the_way(params):
    plan = qjax.quantize(mlp, "w8a8_static").plan(params, X)
    assert {run.operation for run in plan.runs} == {"integer_matmul"}
    assert set(runs(plan)) == {"up", "down"}


class Stack(nn.Module):
    """Scanned layers, an embedding and a convolution: names are followed into loops and through slices."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 16, name="embed")(tokens)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        return nn.Conv(8, (3,), name="conv")(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16, name="mix")(nn.relu(nn.Dense(32, name="grow")(x))), None


def test_every_quantized_parameter_of_a_model_says_what_it_runs_as():
    module, tokens = Stack(), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
    for recipe in ("int8", "w8a8"):
        plan = qjax.quantize(module, recipe).plan(variables, tokens)
        assert set(runs(plan)) == {e.name for e in plan.quantized}
        assert len(plan.quantized) == 4
