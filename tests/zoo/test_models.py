"""Every model of the zoo x {identity, fake-quant, packed} x {jit, grad}, packed under vmap and scan; golden plans.

The float model run on dequantized parameters is the reference for both quantized forms: it goes through no pass of
ours. It cannot serve where a derived matrix is quantized (folds); there fake-quant and packed are compared.

**Equal bits.** What is trained and what is served are compared to the last bit, inside one program that XLA optimizes
as it does everywhere else: the weights of every model, and the results wherever the plan has products of integers.
Float products are added up in an order of XLA's own for each program; there the bound is in the number of terms.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from models import ZOO, ZooInstance

import qjax
from qjax.pallas_kernels.packed.qtensor import FoldedParam, QTensor, fake_quant, is_packed
from qjax.passes.jaxpr.replay import replay
from qjax.passes.jaxpr.trace import trace
from qjax.passes.jaxpr.values import Ref
from qjax.passes.jaxpr.views import View

GOLDEN = Path(__file__).parent / "golden"
# One pass instead of a search: compile time; groups of 8 so that every matrix has several.
SPEC = qjax.int4(group=8, scale=qjax.AbsMax())
pytestmark = pytest.mark.usefixtures("compile_quickly")


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@dataclasses.dataclass
class Case:
    """A zoo model as functions of (parameters, array inputs)."""

    instance: ZooInstance

    def __post_init__(self):
        leaves, self.tree = jax.tree.flatten(self.instance.args)
        self.rest = [None if _is_array(x) else x for x in leaves]
        self.inputs = [x for x in leaves if _is_array(x)]
        self.q = qjax.quantize(self.instance.model, SPEC)
        if isinstance(self.instance.model, nnx.Module):
            self.graph, self.params, self.state = nnx.split(self.instance.model, nnx.Param, ...)
        elif isinstance(self.instance.model, nn.Module):
            self.params = self.instance.variables["params"]
        else:
            self.params = self.instance.variables

    def _args(self, inputs: Any) -> tuple:
        rest = iter(inputs)
        return jax.tree.unflatten(self.tree, [next(rest) if x is None else x for x in self.rest])

    def _how(self) -> dict[str, Any]:
        """Keyword arguments of the call; it changes an Rngs, so each call gets a copy."""
        how = {**self.instance.apply_kwargs, **self.instance.kwargs}
        return {k: jax.tree.map(lambda y: y, v) if isinstance(v, nnx.Rngs) else v for k, v in how.items()}

    def _run(self, model: Any, apply: Callable[..., Any], params: Any, inputs: Any) -> Any:
        how = self._how()
        if isinstance(self.instance.model, nn.Module):
            return apply({**self.instance.variables, "params": params}, *self._args(inputs), **how)
        return apply(params, *self._args(inputs), **how)

    def float(self, params: Any, inputs: Any) -> Any:
        """The model itself."""
        if isinstance(self.instance.model, nnx.Module):
            model = nnx.merge(self.graph, params, self.state, copy=True)
            how = self._how()
            return getattr(model, how.pop("method", "__call__"))(*self._args(inputs), **how)
        model = self.instance.model
        return self._run(model, model.apply if isinstance(model, nn.Module) else model, params, inputs)

    def quantized(self, params: Any, inputs: Any, recipe: Any = SPEC) -> Any:
        """The wrapped model: fake-quant or packed, as the parameters are."""
        if isinstance(self.instance.model, nnx.Module):
            q = qjax.quantize(nnx.merge(self.graph, params, self.state, copy=True), recipe)
            return q(*self._args(inputs), **self._how())
        return self._run(self.q, self.q.apply, params, inputs)

    def outputs(self, params: Any, inputs: Any) -> list[Any]:
        """The arrays that the model returns."""
        return [x for x in jax.tree.leaves(self.float(params, inputs)) if hasattr(x, "dtype")]

    def identity(self, params: Any, inputs: Any) -> Any:
        """The traced program replayed with every parameter tracked and nothing changed."""
        leaves, tree = jax.tree.flatten(params)

        def fn(*leaves: Any) -> list[Any]:
            return self.outputs(jax.tree.unflatten(tree, leaves), inputs)

        program = trace(fn, leaves, [str(i) for i in range(len(leaves))])
        refs = [Ref(x, View.identity(x.shape)) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in leaves]
        return replay(program, refs, rules={})[0]

    def arrays(self, tree: Any) -> list[Any]:
        if isinstance(tree, dict):  # a parameter handed back comes as it went in: float or packed (test_sites.py)
            tree = {k: v for k, v in tree.items() if k != "w"}
        return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)]

    def plan(self, recipe: Any = SPEC, **options: Any) -> qjax.Plan:
        q = qjax.quantize(self.instance.model, recipe, **options)
        how = self._how()
        if isinstance(self.instance.model, nnx.Module):
            return q.plan(*self.instance.args, **how)
        return q.plan(self.instance.variables, *self.instance.args, **how)

    def packed(self) -> Any:
        how = self._how()
        if isinstance(self.instance.model, nnx.Module):
            return nnx.state(self.q.convert(*self.instance.args, **how).model, nnx.Param)
        out = self.q.convert(self.instance.variables, *self.instance.args, **how)
        return out["params"] if isinstance(self.instance.model, nn.Module) else out

    def loss(self, tree: Any) -> Any:
        return self.instance.loss(tree)


@pytest.fixture(scope="module", params=list(ZOO))
def case(request) -> Case:
    return Case(ZOO[request.param].make())


@pytest.fixture
def of_its_own(request) -> None:
    """Leaves out NNX models that a Linen one computes the same as: bits of what is trained and served are enough."""
    name = request.node.callspec.params["case"]
    if name.endswith("_nnx") and name.replace("_nnx", "_linen") in ZOO and not os.environ.get("QJAX_ALL"):
        pytest.skip("the Linen model is tested; QJAX_ALL=1 tests this one too")


@pytest.fixture
def no_function(request, of_its_own) -> None:
    """Leaves out functions: they are about how a weight reaches its product, not about what becomes of the product."""
    if request.node.callspec.params["case"].startswith("fn_") and not os.environ.get("QJAX_ALL"):
        pytest.skip("modules are tested; QJAX_ALL=1 tests functions too")


@pytest.fixture
def in_turn(request) -> None:
    """A third of the modules have each of the two tests that take longest; functions have one (`no_function`)."""
    costly = [test_gradients_of_fake_quant_and_packed, test_packed_models_under_vmap_and_scan]
    name = request.node.callspec.params["case"]
    turn = list(ZOO).index(name) % 3 == costly.index(request.node.function)
    if not name.startswith("fn_") and not turn and not os.environ.get("QJAX_ALL"):
        pytest.skip("it is another test's turn; QJAX_ALL=1 runs all of them")


@pytest.fixture(scope="module")
def packed(case: Case) -> Any:
    return case.packed()


def _dequantized(params: Any) -> Any:
    return jax.tree.map(lambda x: x.dequantize() if isinstance(x, QTensor) else x, params, is_leaf=is_packed)


def _has_folds(params: Any) -> bool:
    return any(isinstance(x, FoldedParam) for x in jax.tree.leaves(params, is_leaf=is_packed))


def _terms(packed: Any) -> int:
    """Terms of the longest sum of a model: so many ulps, at most, lie between two orders of adding them up."""
    own = [x.own if isinstance(x, FoldedParam) else x for x in jax.tree.leaves(packed, is_leaf=is_packed)]
    return max([64, *(x.layout.k for x in own if isinstance(x, QTensor))])


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(map(np.asarray, actual), map(np.asarray, expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def assert_close(actual: Any, expected: Any, *, what: str, ulps: float = 64) -> None:
    """Equal to `ulps` units in the last place of the largest value: products may be added in another order."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, what
        assert a.dtype == e.dtype, what
        a64, e64 = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = max(1e-6, float(np.max(np.abs(e64), initial=0.0, where=np.isfinite(e64))))
        np.testing.assert_allclose(a64, e64, rtol=0, atol=ulps * scale * float(jnp.finfo(a.dtype).eps), err_msg=what)


@pytest.fixture(scope="module")
def run(case: Case) -> Any:
    """The jitted (reference, fake-quant, packed, float) outputs; compiled once for all tests of a model."""

    @jax.jit
    def run(params, packed, inputs):
        reference = None if _has_folds(packed) else case.float(_dequantized(packed), inputs)
        quantized = [case.arrays(case.quantized(p, inputs)) for p in (params, packed)]
        return case.arrays(reference), *quantized, case.arrays(case.float(params, inputs))

    return run


def _same_program(one: Any, other: Any) -> bool:
    """Whether two jaxprs are the same to the letter, addresses of objects aside, and have the same constants."""

    def constants(jaxpr: Any) -> list[np.ndarray]:
        keys = [jnp.issubdtype(c.dtype, jax.dtypes.prng_key) for c in jaxpr.consts]
        return [np.asarray(jax.random.key_data(c) if k else c) for k, c in zip(keys, jaxpr.consts, strict=True)]

    first, second = (re.sub(r"0x[0-9a-f]+", "", str(jaxpr)) for jaxpr in (one, other))
    return first == second and jax.tree.all(jax.tree.map(np.array_equal, constants(one), constants(other)))


@pytest.mark.usefixtures("of_its_own")
def test_identity_replay_is_the_model_and_keeps_its_gradients(case: Case):
    differentiable = case.instance.differentiable
    programs = [jax.make_jaxpr(fn)(case.params, case.inputs) for fn in (case.outputs, case.identity)]
    if _same_program(*programs):
        return

    @jax.jit
    def run(params, inputs):
        out = []
        for fn in (case.float, case.identity):

            def values(p, fn=fn):
                return case.loss(fn(p, inputs)), case.arrays(jax.tree.leaves(fn(p, inputs)))

            if differentiable:
                (_, outputs), grads = jax.value_and_grad(values, has_aux=True, allow_int=True)(params)
                out.append((outputs, case.arrays(grads)))
            else:
                out.append((values(params)[1], []))
        return out

    (expected, expected_grads), (actual, actual_grads) = run(case.params, case.inputs)
    assert_close(actual, expected, what="identity")
    assert_close(actual_grads, expected_grads, what="gradient of identity", ulps=256)


@pytest.mark.usefixtures("of_its_own")
def test_fake_quant_and_packed_are_the_model_on_dequantized_parameters(case: Case, packed: Any, run: Any):
    reference, trained, served, floats = run(case.params, packed, case.inputs)
    assert_close(served, trained, what="packed against fake-quant", ulps=_terms(packed))
    if reference:
        assert_close(trained, reference, what="fake-quant against the model on dequantized parameters")
    assert any(np.abs(np.asarray(a, np.float64) - b).max() > 1e-3 for a, b in zip(trained, floats, strict=True))


@pytest.mark.usefixtures("of_its_own", "in_turn")
def test_gradients_of_fake_quant_and_packed(case: Case, packed: Any):
    """In the inputs, packed and fake-quant agree; in the parameters, fake-quant has finite ones."""
    if not case.instance.differentiable:
        pytest.skip("the model has no gradient")
    floating = [i for i, x in enumerate(case.inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(params, some, inputs):
        inputs = [dict(zip(floating, some, strict=True)).get(i, x) for i, x in enumerate(inputs)]
        return case.loss(case.quantized(params, inputs))

    @jax.jit
    def grads(params, packed, inputs):
        some = [jnp.asarray(inputs[i]) for i in floating]
        wrt_params, trained = jax.grad(loss, (0, 1), allow_int=True)(params, some, inputs)
        return trained, jax.grad(loss, 1)(packed, some, inputs) if some else [], wrt_params

    trained, served, wrt_params = grads(case.params, packed, case.inputs)
    assert_close(served, trained, what="gradient in the inputs", ulps=1024)
    leaves = case.arrays(jax.tree.leaves(wrt_params))
    assert all(bool(jnp.isfinite(g).all()) for g in leaves)
    assert any(bool((g != 0).any()) for g in leaves)


@pytest.mark.usefixtures("of_its_own", "no_function", "in_turn")
def test_packed_models_under_vmap_and_scan(case: Case, packed: Any, run: Any):
    """Fake-quant is done to parameters, which the inputs that are mapped do not reach."""
    two = [jnp.stack([jnp.asarray(x), jnp.flip(jnp.asarray(x), 0)]) for x in case.inputs]
    can_vmap = True
    try:
        jax.eval_shape(jax.vmap(lambda inputs: case.arrays(case.float(case.params, inputs))), two)
    except NotImplementedError:  # of the float model itself: jax cannot batch this ragged_dot
        can_vmap = False

    def served(inputs, packed):
        return case.arrays(case.quantized(packed, inputs))

    @jax.jit
    def many(packed, two):
        mapped = jax.vmap(served, (0, None))(two, packed) if can_vmap else []
        return mapped, lax.scan(lambda c, inputs: (c, served(inputs, packed)), 0, two)[1]

    singles = [run(case.params, packed, [x[i] for x in two])[2] for i in range(2)]
    single = jax.tree.map(lambda *xs: jnp.stack(xs), *singles)
    mapped, scanned = many(packed, two)
    if can_vmap:
        assert_close(mapped, single, what="vmap", ulps=256)
    assert_close(scanned, single, what="scan", ulps=256)


@pytest.mark.parametrize("name", ["mlp_linen", "mlp_nnx", "fn_scan_stacked", "fn_cond", "fn_while_carry", "tied_linen"])
def test_packed_model_runs_eagerly(name: str):
    case = Case(ZOO[name].make())
    packed = case.packed()
    eager, jitted = case.quantized(packed, case.inputs), jax.jit(case.quantized)(packed, case.inputs)
    assert_close(case.arrays(eager), case.arrays(jitted), what="eager against jit", ulps=256)


INTEGER = [qjax.Rule("**", SPEC, qjax.dynamic())]
# Results that a model adds up from weights in float32, beside its products: their order is XLA's.
FLOAT_SUMS = {"fn_used_elsewhere": "penalty"}


def _served_as_trained(case: Case, name: str) -> None:
    """Quantizes inputs too, so that training and serving add up the same integers, and compares them.

    XLA sees both forms in one program and could round differently in each: contract a product and a sum, keep excess
    precision, or fold a scale into another operation. That is what the numerics are written against.
    """
    case.q = qjax.quantize(case.instance.model, INTEGER)
    packed = case.packed()

    def weights(params: Any, packed: Any) -> list[tuple[Any, Any]]:
        """Of each parameter that is packed, the numbers that training has and those that are served."""
        own = [x.own if isinstance(x, FoldedParam) else x for x in jax.tree.leaves(packed, is_leaf=is_packed)]
        both = zip(jax.tree.leaves(params), own, strict=True)
        return [(fake_quant(w, q.spec, q.layout), q.dequantize()) for w, q in both if isinstance(q, QTensor)]

    @jax.jit
    def run(params: Any, packed: Any, inputs: Any) -> Any:
        results = [case.arrays(case.quantized(p, inputs, INTEGER)) for p in (params, packed)]
        return *results, weights(params, packed)

    trained, served, parameters = run(case.params, packed, case.inputs)
    for training, serving in parameters:
        assert_same_bits([training], [serving])
    if name in FLOAT_SUMS or not any(site.product == "integer" for site in case.plan(INTEGER).sites):
        assert_close(served, trained, what="float sums", ulps=_terms(packed))
    else:
        assert_same_bits(served, trained)


@pytest.mark.usefixtures("compile_fully")
@pytest.mark.parametrize("name", ZOO)
def test_what_is_served_has_the_bits_of_what_is_trained(name: str):
    _served_as_trained(Case(ZOO[name].make()), name)


@pytest.mark.parametrize("name", list(ZOO)[::12])
def test_without_optimizations_too(name: str):
    _served_as_trained(Case(ZOO[name].make()), name)


def test_plan_is_the_golden_table(case: Case, request):
    name = request.node.callspec.params["case"]
    text = str(case.plan()) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("QJAX_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"the plan of {name} changed; QJAX_UPDATE_GOLDEN=1 pytest rewrites the file"


def test_every_matrix_has_a_decision_or_a_reason(case: Case):
    plan = case.plan()
    for entry in plan.entries:
        assert entry.spec is not None or entry.reason, entry.name
    for path, reason in case.instance.expected_unquantized.items():
        assert reason in plan[path].reason
    assert plan.quantized


def test_rule_that_matches_nothing_is_an_error_that_names_it(case: Case):
    rules = [qjax.Rule("no/such/**", SPEC), qjax.Rule("**", SPEC)]
    with pytest.raises(qjax.PlanError, match=r"no/such/\*\*"):
        case.plan(rules)
    case.plan(rules, strict=False)
