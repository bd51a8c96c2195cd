"""What is found, decided and rewritten, on programs that a peer misses silently and on the traps of a jaxpr walker."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax.pallas_kernels.ops.epilogue_matmul.api import fused_matmul_p
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul_p
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor, is_packed
from qjax.passes.plan.rules import Rule, check_patterns

SPEC = qjax.int4(group=8, scale=qjax.AbsMax())
pytestmark = pytest.mark.usefixtures("compile_quickly")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 24)), jnp.float32)


def weights(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def equations(jaxpr) -> list[str]:
    """Names of all primitives, sub-jaxprs included."""
    out = []
    for eqn in jaxpr.eqns:
        out.append(eqn.primitive.name)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    out += equations(inner)
    return out


SILENTLY_FLOAT_ELSEWHERE = {
    "three identical x @ w layers": (
        lambda p, x: (x @ p["a"]) @ p["b"] @ p["c"],
        {"a": (24, 24), "b": (24, 24), "c": (24, 24)},
    ),
    "weight as left operand": (lambda p, x: jnp.einsum("io,bi->bo", p["w"], x), {"w": (24, 40)}),
    "transposed product": (lambda p, x: p["w"].T @ x.T, {"w": (24, 40)}),
    "raw lax.scan": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0],
        {"w": (4, 24, 24)},
    ),
    "lax.ragged_dot": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.asarray([2, 1], jnp.int32)),
        {"w": (2, 24, 40)},
    ),
    "lookup only": (lambda p, x: p["w"][jnp.int32(x[:, 0] > 0)], {"w": (24, 40)}),
}


@pytest.mark.parametrize("name", SILENTLY_FLOAT_ELSEWHERE)
def test_quantized_each_time_in_one_process(name):
    fn, shapes = SILENTLY_FLOAT_ELSEWHERE[name]
    params = {k: weights(*shape) for k, shape in shapes.items()}
    plain = fn(params, X)  # a float run first, which turns a peer's QAT off
    for _ in range(2):
        q = qjax.quantize(fn, SPEC)
        packed = q.convert(params, X)
        assert all(isinstance(w, QTensor) for w in jax.tree.leaves(packed, is_leaf=is_packed))
        trained, served = jax.jit(lambda p, s, q=q: (q.apply(p, X), q.apply(s, X)))(params, packed)
        assert float(jnp.abs(trained - plain).max()) > 1e-3, "fake-quant did nothing"
        np.testing.assert_allclose(trained, served, rtol=1e-5, atol=1e-5)


def test_packed_program_has_no_float_matmul_of_a_weight():
    fn, shapes = SILENTLY_FLOAT_ELSEWHERE["raw lax.scan"]
    q = qjax.quantize(fn, SPEC)
    packed = q.convert({"w": weights(*shapes["w"])}, X)
    names = equations(jax.make_jaxpr(lambda p: q.apply(p, X))(packed).jaxpr)
    assert names.count("quantized_matmul") == 1
    assert "dot_general" not in names


def test_scanned_weights_are_not_sliced():
    """The body gets the whole stack and the layer's number: the scan has no packed array among its slices."""
    fn, shapes = SILENTLY_FLOAT_ELSEWHERE["raw lax.scan"]
    q = qjax.quantize(fn, SPEC)
    packed = q.convert({"w": weights(*shapes["w"])}, X)
    jaxpr = jax.make_jaxpr(lambda p: q.apply(p, X))(packed).jaxpr
    scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    body = scan.params["jaxpr"]
    fused = next(e for e in getattr(body, "jaxpr", body).eqns if e.primitive is fused_matmul_p)
    matmul = next(e for e in fused.params["program"].jaxpr.eqns if e.primitive is quantized_matmul_p)
    assert matmul.params["indexed"]
    assert fused.invars[1].aval.shape[0] == matmul.invars[1].aval.shape[0] == 4


def test_users_gradient_rule_is_kept():
    @jax.custom_vjp
    def fn(w, x):
        return x @ w

    fn.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (5 * r[1].T @ g, 7 * g @ r[0].T))
    params = {"w": weights(24, 16)}
    q = qjax.quantize(lambda p, x: fn(p["w"], x), SPEC)
    packed = q.convert(params, X)
    dense = packed["w"].dequantize()
    ones = jnp.ones((3, 16))
    for p in (params, packed):
        got = jax.grad(lambda x, p=p: q.apply(p, x).sum())(X)
        np.testing.assert_allclose(got, 7 * ones @ dense.T, rtol=1e-5)
    wrt_w = jax.grad(lambda p: q.apply(p, X).sum())(params)["w"]
    np.testing.assert_allclose(wrt_w, 5 * X.T @ ones, rtol=1e-5)


def test_shared_parameter_is_stored_once_and_read_both_ways():
    params = {"e": weights(40, 24)}

    def tied(p, ids):
        return jnp.tanh(jnp.take(p["e"], ids, axis=0)) @ p["e"].T

    ids = jnp.asarray([[1, 39], [0, 77]])  # 77 is out of range: jnp.take gives NaN there
    q = qjax.quantize(tied, SPEC)
    plan = q.plan(params, ids)
    assert plan["e"].ops == ("take", "dot")
    packed = q.convert(params, ids)
    trained, served = jax.jit(lambda p, s: (q.apply(p, ids), q.apply(s, ids)))(params, packed)
    np.testing.assert_allclose(trained, served, rtol=1e-5, atol=1e-5)
    assert bool(jnp.isnan(served[1, 1]).all())


def test_weight_read_along_the_other_axis_too():
    params = {"w": weights(24, 16)}
    q = qjax.quantize(lambda p, x: (x @ p["w"]) @ p["w"].T, SPEC)
    packed = q.convert(params, X)
    trained, served = jax.jit(lambda p, s: (q.apply(p, X), q.apply(s, X)))(params, packed)
    np.testing.assert_allclose(trained, served, rtol=1e-5, atol=1e-5)


def test_folded_matrix_is_quantized_in_one_piece():
    params = {"a": weights(24, 8), "b": weights(24, 12), "s": weights(12)}

    def fn(p, x):
        return x @ jnp.concatenate([p["a"], p["b"] * p["s"]], axis=1)

    q = qjax.quantize(fn, SPEC)
    packed = q.convert(params, X)
    assert all(isinstance(w, FoldedParam) for w in jax.tree.leaves(packed, is_leaf=is_packed))
    (derived,) = packed["a"].derived.values()
    assert derived.shape == (24, 20)
    np.testing.assert_allclose(q.apply(packed, X), X @ derived.dequantize(), rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda p: q.apply(p, X).sum())(params)
    assert all(bool((g != 0).any()) for g in grads.values())


def test_rules_that_disagree_about_a_folded_matrix():
    params = {"a": weights(24, 8), "b": weights(24, 12)}
    q = qjax.quantize(
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1), [Rule("a", SPEC), Rule("**", qjax.int8())]
    )
    with pytest.raises(qjax.PlanError, match="different formats"):
        q.plan(params, X)


def test_packed_variables_of_another_call_are_refused():
    params = {"a": weights(24, 8), "b": weights(24, 12)}

    def fn(p, x, flip=False):
        parts = [p["b"], p["a"]] if flip else [p["a"], p["b"]]
        return x @ jnp.concatenate(parts, axis=1)

    q = qjax.quantize(fn, SPEC)
    packed = q.convert(params, X)
    with pytest.raises(ValueError, match="another call of the model"):
        q.apply(packed, X, flip=True)


def test_parameter_handed_back_comes_as_it_went_in():
    params = {"w": weights(24, 16)}
    q = qjax.quantize(lambda p, x: (x @ p["w"], jnp.sum(p["w"] ** 2), p["w"]), SPEC)
    packed = q.convert(params, X)
    _, penalty, trained = jax.jit(q.apply)(params, X)
    np.testing.assert_array_equal(trained, params["w"])
    _, served_penalty, served = jax.jit(q.apply)(packed, X)
    assert isinstance(served, QTensor)
    dense = np.asarray(packed["w"].dequantize(), np.float64)
    np.testing.assert_allclose([penalty, served_penalty], np.sum(dense**2), rtol=1e-5)


def test_learned_queries_are_an_input_not_a_weight():
    """queries @ kernel has two parameters: the kernel is quantized, and nothing depends on the batch size."""
    params = {"queries": weights(1, 6, 24), "w": weights(24, 40)}

    def fn(p, x):
        q = jnp.tile(p["queries"], (x.shape[0], 1, 1)) @ p["w"]
        return jnp.einsum("bnd,bd->bn", q, x @ p["w"])

    q = qjax.quantize(fn, SPEC)
    packed = q.convert(params, X)
    assert isinstance(packed["w"], QTensor)
    assert not is_packed(packed["queries"])
    assert q.apply(packed, jnp.concatenate([X, X])).shape == (6, 6)


# --- Rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("**", "a/b/c", True),
        ("a/*/c", "a/b/c", True),
        ("a/*", "a/b/c", False),
        ("a/**", "a/b/c", True),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("layers_*/mlp/**", "layers_10/mlp/up/kernel", True),
        ("layers_[01]/**", "layers_2/x", False),
        ("a/**/c", "a/c", True),
        ("b", "a/b", False),
        ("a.c", "abc", False),
    ],
)
def test_patterns(pattern, path, matches):
    assert Rule(pattern).matches(path) is matches
    assert bool(check_patterns([Rule(pattern)], [path])) is not matches


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + self.param("position", nn.initializers.normal(), (3, 24))
        return nn.Dense(16, name="head")(nn.LayerNorm(name="norm")(nn.Dense(24, name="body")(x)))


@pytest.fixture(scope="module")
def variables():
    return Model().init(jax.random.key(0), X)


def test_first_rule_wins(variables):
    plan = qjax.quantize(Model(), [Rule("head/**", qjax.int8()), Rule("**", SPEC)]).plan(variables, X)
    assert str(plan["head/kernel"].spec) == str(qjax.int8())
    assert plan["body/kernel"].spec == SPEC
    assert plan["norm/scale"].spec is None
    assert "reaches 'add'" in plan["position"].reason


REFUSED = {
    "no parameter": ([Rule("haed/**", SPEC)], "haed.*matches no parameter.*Paths look like"),
    "taken by earlier rules": ([Rule("**", SPEC), Rule("head/**", None)], "decides nothing.*Put it before"),
    "only vectors": ([Rule("norm/*", SPEC)], "quantizes nothing"),
    "only vectors, by name": ([Rule("**/scale", SPEC)], "quantizes nothing"),
    "cannot be quantized": ([Rule("position", SPEC)], "'position'.*reaches 'add'.*Put Rule"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_rules_that_do_nothing_are_errors(variables, what):
    rules, message = REFUSED[what]
    with pytest.raises(qjax.PlanError, match=message):
        qjax.quantize(Model(), rules).plan(variables, X)
    with pytest.raises(qjax.PlanError, match=message):
        qjax.quantize(Model(), rules).convert(variables, X)
    qjax.quantize(Model(), rules, strict=False).plan(variables, X)


def test_sweeping_pattern_takes_what_can_be_quantized():
    """`block/**` over attention: its (heads, dim) biases stay float with a reason; no error."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(num_heads=4, name="block")(x)

    x = X[None]
    variables = Block().init(jax.random.key(0), x)
    plan = qjax.quantize(Block(), [Rule("block/**", SPEC)]).plan(variables, x)
    assert "reaches 'add'" in plan["block/query/bias"].reason
    assert plan["block/query/kernel"].spec == SPEC


def test_mistyped_rule_is_an_error_in_training_too(variables):
    with pytest.raises(qjax.PlanError, match="haed"):
        qjax.quantize(Model(), [Rule("haed/**", SPEC), Rule("**", SPEC)]).apply(variables, X)


def test_unused_parameters_are_no_error_in_apply():
    """A method that touches half of the model still runs under rules for the other half."""

    class Two(nn.Module):
        def setup(self):
            self.a, self.b = nn.Dense(16), nn.Dense(8)

        def __call__(self, x):
            return self.b(self.a(x))

        def encode(self, x):
            return self.a(x)

    variables = Two().init(jax.random.key(0), X)
    q = qjax.quantize(Two(), [Rule("b/kernel", qjax.int8()), Rule("**", SPEC)])
    assert q.apply(variables, X, method="encode").shape == (3, 16)
    packed = q.convert(variables, X)
    assert q.apply(packed, X, method="encode").shape == (3, 16)


def test_bad_weights_name_the_parameter(variables):
    bad = jax.tree.map(lambda x: x, variables)
    bad["params"]["head"]["kernel"] = bad["params"]["head"]["kernel"].at[3, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"'head/kernel' has 1 .*\[3, 2\]"):
        qjax.quantize(Model(), SPEC).convert(bad, X)


def test_converting_twice_is_an_error(variables):
    q = qjax.quantize(Model(), SPEC)
    with pytest.raises(TypeError, match="packed already"):
        q.convert(q.convert(variables, X), X)


def test_abstract_variables_can_be_planned(variables):
    abstract = jax.eval_shape(lambda: variables)
    q = qjax.quantize(Model(), SPEC)
    assert str(q.plan(abstract, jax.ShapeDtypeStruct(X.shape, X.dtype))) == str(q.plan(variables, X))


def test_stored_bytes_are_the_bytes_of_the_packed_arrays(variables):
    q = qjax.quantize(Model(), SPEC)
    plan, packed = q.plan(variables, X), q.convert(variables, X)
    assert plan.stored_bytes == sum(x.nbytes for x in jax.tree.leaves(packed))


@pytest.mark.parametrize(
    ("model", "recipe", "error", "message"),
    [
        (Model(), "int44", ValueError, "no recipe named 'int44'"),
        (Model(), [], TypeError, "a recipe is"),
        (Model(), 4, TypeError, "a recipe is"),
        (Model, "int4", TypeError, "not the class"),
        (3, "int4", TypeError, "not int"),
    ],
)
def test_wrong_arguments(model, recipe, error, message):
    with pytest.raises(error, match=message):
        qjax.quantize(model, recipe)
