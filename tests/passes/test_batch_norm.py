"""`fold_batch_norm`: the program means the same, and the weight that reaches the matmul is the folded one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from qjax.passes.analysis.normalisations import Folded, Unfolded
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Program, path_name, trace
from qjax.passes.rewrites.batch_norm import fold_batch_norm

# In float64 what the pass changes is rounding only: some tens of operations deep, condition numbers below 1e3.
TOLERANCE = 1e-11
pytestmark = pytest.mark.usefixtures("compile_quickly")


@dataclasses.dataclass
class Traced:
    """A model traced with one call, and its leaves: random parameters, state and inputs, far from their defaults."""

    program: Program
    leaves: list[jax.Array]

    def of(self, *ends: str) -> list[jax.Array]:
        """The leaves whose paths end so."""
        names = [p or s or "" for p, s in zip(self.program.paths, self.program.state, strict=True)]
        return [next(v for n, v in zip(names, self.leaves, strict=True) if n.endswith(end)) for end in ends]


def randomized(names: Sequence[str | None], leaves: Sequence[Any], dtype: Any) -> list[jax.Array]:
    """Values for variables: statistics that are not 0 and 1, scales of both signs."""
    rng = np.random.default_rng(7)
    out = []
    for name, leaf in zip(names, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            out.append(leaf)
            continue
        shape = leaf.shape
        end = (name or "").rpartition("/")[2]
        if end == "var":
            value = rng.uniform(0.2, 3.0, shape)
        elif end == "scale":
            value = rng.uniform(0.3, 2.0, shape) * rng.choice([-1.0, 1.0], shape)
        else:
            value = rng.normal(size=shape)
        out.append(jnp.asarray(value, dtype))
    return out


def linen(model: nn.Module, *shape: int, train: bool, dtype: Any = np.float64, **apply: Any) -> Traced:
    """A Linen model, called with `train`; its results are the output and the new statistics."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=train), x)
    flat, tree = jax.tree_util.tree_flatten_with_path((variables, x))
    keys = [path for path, _ in flat]
    is_param = [path[0].idx == 0 and path[1].key == "params" for path in keys]
    paths = [path_name(path[2:]) if param else None for path, param in zip(keys, is_param, strict=True)]
    state = [
        path_name(path[1:]) if path[0].idx == 0 and not p else None for path, p in zip(keys, is_param, strict=True)
    ]

    def fn(*leaves: Any) -> list[Any]:
        values, x = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(model.apply(values, x, train=train, mutable=["batch_stats"], **apply))

    names = [p or s for p, s in zip(paths, state, strict=True)]
    leaves = randomized(names, [leaf for _, leaf in flat], dtype)
    return Traced(trace(fn, leaves, paths, state), leaves)


def nnx_traced(model: nnx.Module, *shape: int, train: bool) -> Traced:
    """An NNX model, with its statistics in `train` mode or not."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = ["/".join(map(str, path)) for path, _ in flat]
    params = [isinstance(variable, nnx.Param) for _, variable in flat]

    def fn(*leaves: Any) -> list[Any]:
        values = [(path, v.replace(leaf)) for (path, v), leaf in zip(flat, leaves[:-1], strict=True)]
        merged = nnx.merge(graph, nnx.from_flat_state(values))
        merged.train() if train else merged.eval()
        return [merged(leaves[-1]), *jax.tree.leaves(nnx.state(merged, nnx.BatchStat))]

    leaves = randomized([*names, None], [*(v.get_value() for _, v in flat), jnp.ones(shape)], np.float64)
    paths = [name if param else None for name, param in zip(names, params, strict=True)]
    state = [None if param else name for name, param in zip(names, params, strict=True)]
    return Traced(trace(fn, leaves, [*paths, None], [*state, None]), leaves)


def loss(program: Program, differentiable: Sequence[int], leaves: Sequence[Any]) -> Callable[..., Any]:
    """A function of some leaves: a scalar in which each element of each result has a weight of its own; the results."""

    def fn(*some: Any) -> Any:
        values = list(leaves)
        for i, value in zip(differentiable, some, strict=True):
            values[i] = value
        total = jnp.zeros((), some[0].dtype)
        results = control_flow.evaluate(program.jaxpr, values)
        for out in results:
            flat = out.astype(total.dtype).reshape(-1)
            total += jnp.mean(flat * jnp.cos(jnp.arange(flat.size)) + 0.5 * flat**2)
        return total, results

    return fn


def assert_close(a: Sequence[Any], b: Sequence[Any], tolerance: float) -> None:
    """Equal up to `tolerance` of the largest element of each array."""
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
        assert np.isfinite(one).all() and np.isfinite(two).all()
        np.testing.assert_allclose(one, two, rtol=0, atol=tolerance * max(1.0, np.abs(two).max()))


def assert_same_meaning(traced: Traced, folded: Program, tolerance: float = TOLERANCE) -> None:
    """Results and gradients, by parameters and inputs, of both programs, compiled."""
    program, leaves = traced.program, traced.leaves
    assert folded.paths == program.paths and folded.state == program.state
    wrt = [i for i, (leaf, s) in enumerate(zip(leaves, program.state, strict=True)) if s is None]
    wrt = [i for i in wrt if jnp.issubdtype(leaves[i].dtype, jnp.floating)]
    arguments, argnums = [leaves[i] for i in wrt], tuple(range(len(wrt)))
    (_, before), grads_before = jax.jit(jax.value_and_grad(loss(program, wrt, leaves), argnums, has_aux=True))(
        *arguments
    )
    (_, after), grads_after = jax.jit(jax.value_and_grad(loss(folded, wrt, leaves), argnums, has_aux=True))(*arguments)
    assert_close(after, before, tolerance)
    assert_close(grads_after, grads_before, 10 * tolerance)


def weights(program: Program, leaves: Sequence[Any]) -> list[np.ndarray]:
    """The weight of each matmul and convolution of a program without control flow around them, in order."""
    found = []
    jaxpr = program.jaxpr
    env = dict(zip(jaxpr.jaxpr.invars, leaves, strict=True))
    env.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    for eqn in jaxpr.jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if eqn.primitive in (prims.dot_general_p, prims.conv_general_dilated_p):
            found.append(np.asarray(values[1]))
        env.update(zip(eqn.outvars, control_flow.bind(eqn, values), strict=True))
    return found


# --- Models: each makes its output from x with one or more norms -----------------------------------------------


def norm(train: bool, name: str = "bn", **how: Any) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, name=name, **how)


class ConvNorm(nn.Module):
    conv: Any = dataclasses.field(default_factory=lambda: {"features": 6, "kernel_size": (3, 2)})
    how: Any = dataclasses.field(default_factory=dict)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(**self.conv, name="conv", dtype=self.dtype)(x)
        return nn.tanh(norm(train, dtype=self.dtype, **self.how)(x))


class DenseNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.tanh(norm(train, "a")(nn.Dense(7, name="up")(x)))
        return norm(train, "b")(nn.Dense(5, use_bias=False, name="down")(x))


class HeadsNorm(nn.Module):
    """A dot whose result has two axes of features, each head with a norm over both."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.DenseGeneral((4, 3), name="heads")(x)
        return nn.tanh(norm(train, axis=(-2, -1))(x))


class SwappedHeadsNorm(nn.Module):
    """As `HeadsNorm`, with the axes of features in the other order when they are normalised."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.DenseGeneral((4, 3), name="heads")(x)
        return nn.tanh(norm(train, axis=(-2, -1))(x.swapaxes(-2, -1)))


class MaskedNorm(nn.Module):
    """Some positions are left out of the statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return norm(train)(nn.Dense(5, name="dense")(x), mask=x[..., :1] > 0)


class EinsumNorm(nn.Module):
    """The result is transposed before it is normalised, and the weight is on the left of the dot."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        w = self.param("w", nn.initializers.normal(1.0), (x.shape[-1], 5))
        y = lax.dot_general(w, x, (((0,), (2,)), ((), ())))  # [5, batch, length]
        return nn.tanh(norm(train)(y.transpose(2, 1, 0)))  # [length, batch, 5]


class TransposedConvNorm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.tanh(norm(train)(nn.ConvTranspose(6, (3, 2), strides=(2, 1), name="conv")(x)))


class ChannelsFirst(nn.Module):
    """NCHW, with a kernel in OIHW."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        w = self.param("w", nn.initializers.normal(1.0), (6, x.shape[1], 3, 2))
        y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return nn.tanh(norm(train, axis=1)(y))


class Shared(nn.Module):
    """One kernel in two convolutions, each with a norm of its own."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = nn.Conv(3, (3, 3), name="conv")
        return norm(train, "b")(conv(nn.tanh(norm(train, "a")(conv(x)))))


class Block(nn.Module):
    """A residual block of convolutions, with a norm after each."""

    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(norm(train, "a")(nn.Conv(8, (3, 3), self.strides, use_bias=False, name="conv_a")(x)))
        y = norm(train, "b")(nn.Conv(8, (3, 3), use_bias=False, name="conv_b")(y))
        if x.shape != y.shape:
            x = norm(train, "short")(nn.Conv(8, (1, 1), self.strides, use_bias=False, name="conv_short")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(norm(train, "stem")(nn.Conv(8, (3, 3), name="conv")(x)))
        for i in range(3):
            x = Block(2 if i == 1 else 1, name=f"block{i}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.remat(ConvNorm, static_argnums=(2,))(name="block")(x, train)


class Jit(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.jit(ConvNorm, static_argnums=(2,))(name="block")(x, train)
        # the same compiled function twice: the same jaxpr, with the same variables
        for i in range(2):
            x = nn.tanh(norm(train, f"bn{i}")(nn.jit(nn.Conv)(6, (2, 2), name=f"conv{i}")(x)))
        return x


class Scan(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        axes = {"params": 0, "batch_stats": 0}
        body = nn.scan(ScannedBlock, variable_axes=axes, split_rngs={"params": True}, length=3)
        return body(train, name="layers")(x, None)[0]


class ScannedBlock(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return Block(name="block")(x, self.train), None


class NNXConvNorm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 6, (3, 2), rngs=rngs)
        self.bn = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 5, use_bias=False, rngs=rngs)
        self.out = nnx.BatchNorm(5, use_scale=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.head(nnx.tanh(self.bn(self.conv(x))).mean((1, 2))))


IMAGE = (4, 5, 6, 3)
CONV = {"features": 6, "kernel_size": (3, 2)}

# name -> (model, shape of its input, the weights that have a norm folded into them)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "conv": (ConvNorm, IMAGE, {"conv/kernel"}),
    "conv_without_bias": (lambda: ConvNorm({**CONV, "use_bias": False}), IMAGE, {"conv/kernel"}),
    "no_scale": (lambda: ConvNorm(how={"use_scale": False}), IMAGE, {"conv/kernel"}),
    "no_beta": (lambda: ConvNorm(how={"use_bias": False}), IMAGE, {"conv/kernel"}),
    "slow_variance": (lambda: ConvNorm(how={"use_fast_variance": False}), IMAGE, {"conv/kernel"}),
    "momentum": (lambda: ConvNorm(how={"momentum": 0.5, "epsilon": 0.1}), IMAGE, {"conv/kernel"}),
    "depthwise": (lambda: ConvNorm({**CONV, "feature_group_count": 3}), IMAGE, {"conv/kernel"}),
    "strided_dilated": (
        lambda: ConvNorm({**CONV, "strides": (2, 1), "kernel_dilation": (1, 2), "padding": "CIRCULAR"}),
        IMAGE,
        {"conv/kernel"},
    ),
    # flax flattens several batch axes before a convolution and restores them after it
    "batch_axes": (lambda: ConvNorm({"features": 6, "kernel_size": (3,)}), (2, 3, 7, 4), {"conv/kernel"}),
    "transposed_conv": (TransposedConvNorm, IMAGE, {"conv/kernel"}),
    "channels_first": (ChannelsFirst, (4, 3, 5, 6), {"w"}),
    "dense": (DenseNorm, (9, 4), {"up/kernel", "down/kernel"}),
    "heads": (HeadsNorm, (9, 2, 5), {"heads/kernel"}),
    "swapped_heads": (SwappedHeadsNorm, (9, 2, 5), {"heads/kernel"}),
    "masked": (MaskedNorm, (9, 4), {"dense/kernel"}),
    "einsum": (EinsumNorm, (3, 6, 4), {"w"}),
    "shared": (Shared, IMAGE, {"conv/kernel"}),
    "resnet": (
        ResNet,
        (4, 8, 8, 3),
        {
            *("conv/kernel", "block1/conv_short/kernel"),
            *(f"block{i}/conv_{c}/kernel" for i in range(3) for c in "ab"),
        },
    ),
    "remat": (Remat, IMAGE, {"block/conv/kernel"}),
    "jit": (Jit, IMAGE, {"block/conv/kernel", "conv0/kernel", "conv1/kernel"}),
    "scan": (Scan, (3, 5, 5, 8), {"layers/block/conv_a/kernel", "layers/block/conv_b/kernel"}),
}

MODES = pytest.mark.parametrize("train", [False, True], ids=["running", "batch"])


@MODES
@pytest.mark.parametrize("name", MODELS)
def test_same_results_and_gradients(name: str, train: bool):
    make, shape, expected = MODELS[name]
    with jax.enable_x64(True):
        traced = linen(make(), *shape, train=train)
        program, folded, unfolded = fold_batch_norm(traced.program)
        assert unfolded == ()
        assert {path for f in folded for path in f.weight} == expected
        assert {f.statistics for f in folded} == {"batch" if train else "running"}
        assert all(path.endswith("/var") for f in folded for path in f.state)
        assert_same_meaning(traced, program)


@MODES
def test_nnx(train: bool):
    with jax.enable_x64(True):
        traced = nnx_traced(NNXConvNorm(nnx.Rngs(0)), *IMAGE, train=train)
        program, folded, unfolded = fold_batch_norm(traced.program)
        statistics = "batch" if train else "running"
        assert folded == (
            Folded("bn", statistics, ("conv/kernel",), ("bn/scale",), ("bn/var",)),
            Folded("out", statistics, ("head/kernel",), (), ("out/var",)),
        )
        assert unfolded == ()
        assert_same_meaning(traced, program)


@MODES
def test_the_weight_is_the_folded_one(train: bool):
    """W * scale / sqrt(running variance + epsilon), in NumPy, in training as in inference."""
    with jax.enable_x64(True):
        traced = linen(DenseNorm(), 9, 4, train=train)
        program, _, _ = fold_batch_norm(traced.program)
        found = weights(program, traced.leaves)
        for w, dense, bn in zip(found, ("up", "down"), ("a", "b"), strict=True):
            kernel, scale, var = map(np.asarray, traced.of(f"{dense}/kernel", f"{bn}/scale", f"{bn}/var"))
            np.testing.assert_allclose(w, kernel * (scale / np.sqrt(var + 1e-5)), rtol=1e-12)
        assert not np.allclose(found[0], weights(traced.program, traced.leaves)[0], rtol=1e-2)


@pytest.mark.usefixtures("compile_fully")
def test_training_and_inference_see_the_same_bits():
    """Fake-quant in training rounds the very matrix that is packed."""
    found = []
    for train in (False, True):
        traced = linen(ResNet(), 4, 8, 8, 3, train=train, dtype=np.float32)
        program, folded, _ = fold_batch_norm(traced.program)
        assert len(folded) == 8
        found.append(weights(program, traced.leaves))
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_names():
    traced = linen(ResNet(), 2, 8, 8, 3, train=False, dtype=np.float32)
    _, folded, _ = fold_batch_norm(traced.program)
    assert [f.name for f in folded][:3] == ["stem", "block0/a", "block0/b"]
    traced = linen(ConvNorm(how={"use_bias": False, "use_scale": False}), *IMAGE, train=True, dtype=np.float32)
    _, folded, _ = fold_batch_norm(traced.program)
    expected = Folded("batch_stats/bn", "batch", ("conv/kernel",), (), ("batch_stats/bn/var",))
    assert folded == (expected,)  # no parameter of the norm tells its name


@MODES
def test_under_vmap(train: bool):
    """The folded program under vmap over the input, inside and outside of grad, is the program under vmap."""
    with jax.enable_x64(True):
        traced = linen(ConvNorm(), *IMAGE, train=train)
        program, _, _ = fold_batch_norm(traced.program)
        some = [i for i, path in enumerate(traced.program.paths) if path is not None]
        inputs = jnp.stack([traced.leaves[-1], traced.leaves[-1] * 2 + 1])

        def per_input(p: Program) -> Any:
            def fn(x: jax.Array) -> Any:
                leaves = [*traced.leaves[:-1], x]
                of_loss = jax.value_and_grad(loss(p, some, leaves), tuple(range(len(some))), has_aux=True)
                (_, results), grads = of_loss(*(leaves[i] for i in some))
                return [*results, *grads]

            return jax.jit(jax.vmap(fn))(inputs)

        assert_close(per_input(program), per_input(traced.program), 10 * TOLERANCE)


@MODES
def test_traced_under_vmap_and_grad(train: bool):
    """Tracing and folding inside of jit, grad and vmap, with statistics averaged over the vmapped axis."""
    with jax.enable_x64(True):
        model = ConvNorm(how={"axis_name": "devices"})
        traced = linen(ConvNorm(), *IMAGE, train=train)

        def fn(*leaves: Any) -> list[Any]:
            mean, var, beta, scale, bias, kernel, x = leaves
            params = {"bn": {"bias": beta, "scale": scale}, "conv": {"bias": bias, "kernel": kernel}}
            variables = {"params": params, "batch_stats": {"bn": {"mean": mean, "var": var}}}
            return jax.tree.leaves(model.apply(variables, x, train=train, mutable=["batch_stats"]))

        def total(leaves: Any, fold: bool) -> Any:
            program = trace(fn, leaves, traced.program.paths, traced.program.state)
            if fold:
                program, folded, unfolded = fold_batch_norm(program)
                assert len(folded) == 1 and not unfolded
            return loss(program, [6], leaves)(leaves[6])[0]

        leaves = [*traced.leaves[:-1], jnp.stack([traced.leaves[-1], 3 * traced.leaves[-1] - 1])]

        def run(fold: bool) -> Any:
            axes = ([None] * 6 + [0], None)
            return jax.jit(jax.grad(lambda v: jax.vmap(total, axes, axis_name="devices")(v, fold).sum()))(leaves)

        assert_close(run(True), run(False), 10 * TOLERANCE)


@MODES
@pytest.mark.parametrize("how", [{}, {"force_float32_reductions": False}], ids=["float32_stats", "bfloat16_stats"])
def test_bfloat16(train: bool, how: dict[str, Any]):
    """float32 parameters and statistics around a bfloat16 convolution: the weight is rounded once, after scaling."""
    traced = linen(ConvNorm(how=how, dtype=jnp.bfloat16), *IMAGE, train=train, dtype=np.float32)
    program, folded, unfolded = fold_batch_norm(traced.program)
    assert len(folded) == 1 and not unfolded
    # two roundings of the convolution's result, each by 2^-8, of a value some times the result
    before, after = (control_flow.evaluate(p.jaxpr, traced.leaves) for p in (traced.program, program))
    assert_close(after, before, 2**-5)
    kernel, scale, var = (np.asarray(v, np.float64) for v in traced.of("kernel", "scale", "var"))
    folded_weight = kernel * (scale / np.sqrt(var + 1e-5))
    (w,) = weights(program, traced.leaves)
    assert w.dtype == jnp.bfloat16
    # one rounding to bfloat16, after float32 arithmetic
    np.testing.assert_allclose(w.astype(np.float64), folded_weight, rtol=2**-8 * 1.001)


def test_zero_scale_has_finite_gradients():
    """Residual networks start with scale 0 in the last norm of each block."""
    with jax.enable_x64(True):
        traced = linen(ConvNorm(), *IMAGE, train=True)
        i = traced.program.paths.index("bn/scale")
        traced.leaves[i] = traced.leaves[i].at[:2].set(0.0)
        program, folded, _ = fold_batch_norm(traced.program)
        assert len(folded) == 1
        assert_same_meaning(traced, program)


def by_hand(division: bool) -> Callable[..., list[Any]]:
    """Batch norm as it is written without a library: several factors in a row, before and after."""

    def fn(w: Any, gamma: Any, beta: Any, mean: Any, var: Any, x: Any) -> list[Any]:
        y = 0.5 * (x @ w + beta)
        y = (y - mean) / jnp.sqrt(var + 1e-3) if division else (mean - y) * (var + 1e-3) ** -0.5
        return [jnp.tanh(y * gamma + beta)]

    return fn


@pytest.mark.parametrize("division", [True, False])
def test_written_by_hand(division: bool):
    with jax.enable_x64(True):
        names = ["w", "bn/gamma", "bn/beta", "bn/mean", "bn/var", None]
        shapes = [(4, 5), (5,), (5,), (5,), (5,), (7, 4)]
        leaves = randomized(names, [jnp.ones(shape) for shape in shapes], np.float64)
        paths, state = [*names[:3], None, None, None], [None, None, None, *names[3:5], None]
        traced = Traced(trace(by_hand(division), leaves, paths, state), leaves)
        program, folded, unfolded = fold_batch_norm(traced.program)
        assert folded == (Folded("bn", "running", ("w",), ("bn/gamma",), ("bn/var",)),) and not unfolded
        assert_same_meaning(traced, program)
        w, gamma, var = map(np.asarray, (leaves[0], leaves[1], leaves[4]))
        sign = 1 if division else -1
        expected = sign * 0.5 * w * gamma / np.sqrt(var + 1e-3)
        np.testing.assert_allclose(weights(program, leaves)[0], expected, rtol=1e-12)


def test_running_average_written_by_hand():
    """running += (1 - momentum) * (batch - running), with a variance from `jnp.var`."""
    with jax.enable_x64(True):

        def fn(w: Any, gamma: Any, var: Any, x: Any) -> list[Any]:
            y = x @ w
            batch = jnp.var(y, 0)
            return [(y - y.mean(0)) / jnp.sqrt(batch + 1e-3) * gamma, var + 0.1 * (batch - var)]

        names = ["w", "bn/gamma", "bn/var", None]
        leaves = randomized(names, [jnp.ones(s) for s in [(4, 5), (5,), (5,), (7, 4)]], np.float64)
        traced = Traced(trace(fn, leaves, ["w", "bn/gamma", None, None], [None, None, "bn/var", None]), leaves)
        program, folded, unfolded = fold_batch_norm(traced.program)
        assert folded == (Folded("bn", "batch", ("w",), ("bn/gamma",), ("bn/var",)),) and not unfolded
        assert_same_meaning(traced, program)
        w, gamma, var = map(np.asarray, leaves[:3])
        np.testing.assert_allclose(weights(program, leaves)[0], w * gamma / np.sqrt(var + 1e-3), rtol=1e-12)


# --- What is not folded ----------------------------------------------------------------------------------------


class Before(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Conv(4, (3, 3), name="conv")(nn.relu(norm(train)(x)))


class AfterRelu(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return norm(train)(nn.relu(nn.Conv(4, (3, 3), name="conv")(x)))


class AfterSum(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return norm(train)(nn.Dense(4, name="a")(x) + nn.Dense(4, name="b")(x))


class UsedTwice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.Conv(4, (3, 3), name="conv")(x)
        return norm(train)(y) + jnp.exp(y)


class Returned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        self.sow("batch_stats", "raw", y)
        return norm(train)(y)


class NoWeight(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return norm(train)(x @ x.T)


class OverPositions(nn.Module):
    """Statistics for each position, not for each output feature."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return norm(train, axis=1)(nn.Dense(4, name="dense")(x))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return norm(train, "b", use_bias=False)(norm(train, "a", use_bias=False)(nn.Dense(4, name="dense")(x)))


# name -> (model, shape, name of the norm, part of the reason)
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "before": (Before, IMAGE, "bn", "comes from outside"),
    "after_relu": (AfterRelu, IMAGE, "bn", "result of 'custom_jvp_call', not of a matmul"),
    "after_sum": (AfterSum, (9, 3), "bn", "result of 'add', not of a matmul"),
    "used_twice": (UsedTwice, IMAGE, "bn", "used by 'exp' as well"),
    "returned": (Returned, IMAGE, "bn", "returned as well"),
    "no_weight": (NoWeight, (5, 3), "bn", "no operand of the 'dot_general' before it is a weight"),
    "over_positions": (OverPositions, (5, 6, 3), "bn", "one value per output feature"),
}


@MODES
@pytest.mark.parametrize("name", REFUSED)
def test_reasons(name: str, train: bool):
    make, shape, norm_name, part = REFUSED[name]
    traced = linen(make(), *shape, train=train, dtype=np.float32)
    program, folded, unfolded = fold_batch_norm(traced.program)
    assert program is traced.program and folded == ()
    (refused,) = unfolded
    assert part in refused.reason
    assert refused.name == norm_name


@MODES
def test_a_norm_of_a_norm_is_left(train: bool):
    with jax.enable_x64(True):
        traced = linen(Twice(), 9, 3, train=train)
        program, folded, unfolded = fold_batch_norm(traced.program)
        assert [f.name for f in folded] == ["a"] and [u.name for u in unfolded] == ["b"]
        assert_same_meaning(traced, program)


@MODES
def test_inside_a_custom_rule(train: bool):
    def fn(w: Any, var: Any, x: Any) -> list[Any]:
        @jax.custom_jvp
        def f(w: Any, var: Any, x: Any) -> Any:
            y = x @ w
            batch = jnp.square(y).mean(0)
            return [y * lax.rsqrt(batch), 0.9 * var + 0.1 * batch] if train else [y * lax.rsqrt(var), var]

        f.defjvp(lambda p, t: (f(*p), f(*t)))
        return f(w, var, x)

    leaves = [jnp.ones((3, 4)), jnp.ones(4), jnp.ones((5, 3))]
    traced = trace(fn, leaves, ["w", None, None], [None, "bn/var", None])
    program, folded, unfolded = fold_batch_norm(traced)
    assert program is traced and folded == ()
    assert unfolded == (Unfolded("bn", "it is inside a custom_jvp rule"),)


def test_without_state_nothing_is_looked_for():
    """Layer norm is no batch norm, and statistics that are not known as state are inputs like others."""
    traced = linen(ConvNorm(), *IMAGE, train=False, dtype=np.float32)
    bare = dataclasses.replace(traced.program, state=(None,) * len(traced.leaves))
    assert fold_batch_norm(bare) == (bare, (), ())

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            self.variable("batch_stats", "unused", lambda: jnp.ones(3))
            return nn.LayerNorm()(nn.Dense(4)(x))

    traced = linen(Layers(), 3, 5, train=True, dtype=np.float32)
    assert fold_batch_norm(traced.program) == (traced.program, (), ())


def test_other_state_is_no_variance():
    """State that scales an activation without a root (a running range, a cache) may change after conversion."""

    def fn(w: Any, scale: Any, x: Any) -> list[Any]:
        return [x @ w * scale]

    traced = trace(fn, [jnp.ones((3, 4)), jnp.ones(4), jnp.ones((5, 3))], ["w", None, None], [None, "ema/scale", None])
    assert fold_batch_norm(traced) == (traced, (), ())


def test_one_compiled_function_called_twice():
    """Both calls have the same jaxpr, and so the same variables."""
    with jax.enable_x64(True):

        @jax.jit
        def layer(w: Any, scale: Any, var: Any, x: Any) -> Any:
            return jnp.tanh(x @ w * (scale * lax.rsqrt(var + 1e-3)))

        def fn(w: Any, scale: Any, var: Any, v: Any, other: Any, x: Any) -> list[Any]:
            return [layer(v, other, var + 1, layer(w, scale, var, x))]

        names = ["w", "a/scale", "a/var", "v", "b/scale", None]
        shapes = [(4, 4), (4,), (4,), (4, 4), (4,), (7, 4)]
        leaves = randomized(names, [jnp.ones(shape) for shape in shapes], np.float64)
        paths, state = ["w", "a/scale", None, "v", "b/scale", None], [None, None, "a/var", None, None, None]
        traced = Traced(trace(fn, leaves, paths, state), leaves)
        program, folded, unfolded = fold_batch_norm(traced.program)
        assert [f.weight for f in folded] == [("w",), ("v",)] and not unfolded
        assert_same_meaning(traced, program)


def test_a_carried_variance_is_not_known():
    """Each step of the scan has another one, so there is no weight to convert."""

    def fn(w: Any, var: Any, x: Any) -> list[Any]:
        def body(var: Any, x: Any) -> Any:
            return var * 2, x @ w * lax.rsqrt(var)

        return list(lax.scan(body, var, x))

    leaves = [jnp.ones((3, 4)), jnp.ones(4), jnp.ones((2, 5, 3))]
    traced = trace(fn, leaves, ["w", None, None], [None, "bn/var", None])
    assert fold_batch_norm(traced) == (traced, (), ())
