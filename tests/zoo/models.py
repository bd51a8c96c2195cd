"""The model zoo of the tests: small Linen, NNX and function models, each of them a trap for a graph rewriter.

`ZOO` maps a name to a `ZooModel`, whose `make()` builds a fresh `ZooInstance`. Sizes are small and differ from one
another, so that a mix-up of axes shows. `python tests/zoo/models.py [PART_OF_A_NAME ...]` runs every row and prints a
table.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Kind = Literal["linen", "nnx", "function"]


@dataclasses.dataclass(frozen=True)
class ZooInstance:
    """One model with values and an example call.

    Attributes:
        model: a Linen module, an NNX module or a function `fn(params, *args, **kwargs)`.
        variables: the variables of a Linen module, the params of a function, None for an NNX module.
        args: example positional inputs of the model.
        kwargs: example keyword inputs of the model.
        apply_kwargs: what else `Module.apply` gets (`rngs`, `mutable`, `method`); for NNX only `method`, a name.
        differentiable: whether the loss has a gradient with respect to the parameters.
        expected_unquantized: parameters of two axes or more that have to stay float, as far as we know:
            path -> a substring of the reason.
    """

    model: Any
    variables: Any = None
    args: tuple = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    apply_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    differentiable: bool = True
    expected_unquantized: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @staticmethod
    def loss(outputs: Any) -> jax.Array:
        """A scalar in which every floating element of the outputs has a weight of its own."""
        total = jnp.zeros((), jnp.float32)
        for leaf in jax.tree.leaves(outputs):
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
                flat = leaf.astype(jnp.float32).reshape(-1)
                total += jnp.mean(flat * jnp.cos(jnp.arange(flat.size)) + 0.5 * flat**2)
        return total

    def functional(self) -> tuple[Callable[[Any], Any], Any]:
        """The example call as a pure function of the parameters, and the parameters.

        State that the call of an NNX module changes is dropped.
        """
        if isinstance(self.model, nn.Module):
            rest = {name: tree for name, tree in self.variables.items() if name != "params"}

            def fn(params: Any) -> Any:
                variables = {"params": params, **rest}
                return self.model.apply(variables, *self.args, **self.apply_kwargs, **self.kwargs)

            return fn, self.variables["params"]

        if isinstance(self.model, nnx.Module):
            graph, params, state = nnx.split(self.model, nnx.Param, ...)
            inputs, method = (self.args, self.kwargs), self.apply_kwargs.get("method", "__call__")

            def fn(params: Any) -> Any:
                args, kwargs = jax.tree.map(lambda leaf: leaf, inputs)  # an Rngs among them is copied
                model = nnx.merge(graph, params, state, copy=True)
                return getattr(model, method)(*args, **kwargs)

            return fn, params

        return lambda params: self.model(params, *self.args, **self.kwargs), self.variables


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """A row of the zoo: its name, its kind, what builds a fresh instance and the trap that it stands for."""

    name: str
    kind: Kind
    make: Callable[[], ZooInstance]
    trap: str


ZOO: dict[str, ZooModel] = {}


def _row(name: str, kind: Kind, *args: Any) -> Callable[[Callable[..., ZooInstance]], Any]:
    """Enters `make(*args)` into the zoo; the docstring of `make` is the trap."""

    def enter(make: Callable[..., ZooInstance]) -> Callable[..., ZooInstance]:
        assert name not in ZOO, name
        ZOO[name] = ZooModel(name, kind, partial(make, *args), make.__doc__ or "")
        return make

    return enter


# --- Values --------------------------------------------------------------------------------------------------


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _normal(name: str, *shape: int) -> np.ndarray:
    """Activations: standard normal values, the same ones for the same name."""
    return _rng(name).standard_normal(shape).astype(np.float32)


def _weight(name: str, *shape: int) -> np.ndarray:
    return 0.25 * _normal(name, *shape)


def _ids(name: str, limit: int, *shape: int) -> np.ndarray:
    return np.asarray(_rng(name).integers(0, limit, shape), np.int32)


def _on_device(tree: Any) -> Any:
    """The tree with jax.Arrays for its NumPy arrays; importing this module is to start no backend."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


def _fill(path: tuple, aval: Any) -> jax.Array:
    """A realistic value for a variable: nothing is exactly 0 or 1, scales and variances are near 1."""
    name = jax.tree_util.keystr(path)
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(zlib.crc32(name.encode())), aval.shape)
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return jnp.zeros(aval.shape, aval.dtype)
    if re.search(r"\b(scale|var)\b", name):
        value = 1 + _rng(name).uniform(-0.3, 0.3, aval.shape)
    elif aval.ndim < 2:
        value = _rng(name).uniform(-0.3, 0.3, aval.shape)
    else:
        value = 0.25 * _rng(name).standard_normal(aval.shape)
    return jnp.asarray(value, aval.dtype)


def _linen(model: nn.Module, *args: Any, **fields: Any) -> ZooInstance:
    """The instance of a Linen module: its variables are those that `init` makes, with values of ours."""
    args, kwargs, apply_kwargs = _on_device(args), fields.get("kwargs", {}), fields.get("apply_kwargs", {})
    streams = ("params", *apply_kwargs.get("rngs", {}))
    rngs = {stream: jax.random.key(i) for i, stream in enumerate(streams)}
    avals = jax.eval_shape(lambda: model.init(rngs, *args, **kwargs))
    return ZooInstance(model, jax.tree_util.tree_map_with_path(_fill, avals), args, **fields)


def _nnx(build: Callable[..., nnx.Module], *args: Any, **fields: Any) -> ZooInstance:
    """The instance of the NNX module that `build(rngs=...)` builds, with values of ours."""
    abstract = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    model = nnx.merge(graph, jax.tree_util.tree_map_with_path(_fill, state))
    return ZooInstance(model, None, _on_device(args), **fields)


# --- MLP -----------------------------------------------------------------------------------------------------


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        x = nn.gelu(nn.Dense(40, name="up")(x))
        x = nn.Dropout(0.3)(x, deterministic=deterministic)
        x = nn.relu(nn.Dense(28, use_bias=False, name="mid")(x))
        return nn.Dense(12, name="down")(x)


class NNXMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(20, 40, rngs=rngs)
        self.mid = nnx.Linear(40, 28, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(28, 12, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        x = self.dropout(nnx.gelu(self.up(x)), deterministic=deterministic)
        return self.down(nnx.relu(self.mid(x)))


@_row("mlp_linen", "linen")
def mlp_linen() -> ZooInstance:
    """A static flag is passed by keyword."""
    return _linen(LinenMLP(), _normal("mlp", 3, 20), kwargs={"deterministic": True})


@_row("mlp_dropout_linen", "linen")
def mlp_dropout_linen() -> ZooInstance:
    """Dropout draws from `rngs`, which `Module.apply` consumes; the flag is positional."""
    return _linen(LinenMLP(), _normal("mlp", 3, 20), False, apply_kwargs={"rngs": {"dropout": jax.random.key(7)}})


@_row("mlp_nnx", "nnx")
def mlp_nnx() -> ZooInstance:
    """A module that holds random state which the call leaves alone."""
    return _nnx(NNXMLP, _normal("mlp", 3, 20))


@_row("mlp_dropout_nnx", "nnx")
def mlp_dropout_nnx() -> ZooInstance:
    """Dropout draws from a stream in the module, whose counter the call has to advance."""
    return _nnx(NNXMLP, _normal("mlp", 3, 20), kwargs={"deterministic": False})


# --- Decoder-only transformer --------------------------------------------------------------------------------

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, CACHE = 3, 20, 8, 4, 6, 28, 40, 7


def _rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of [batch, seq, heads, dim], the halves of the last axis paired."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 100.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention; `mask` is [queries, keys]."""
    groups = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("bqkgd,bskd->bkgqs", groups, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -1e9)).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(q.shape)


class LinenDecoderLayer(nn.Module):
    dtype: Any = None
    decode: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        dense = partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)
        h = nn.RMSNorm(dtype=self.dtype, name="norm1")(x)
        q, k, v = (
            dense((heads, HEAD_DIM), name=name)(h) for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        if self.decode:
            shape = (x.shape[0], CACHE, KV_HEADS, HEAD_DIM)
            keys = self.variable("cache", "keys", jnp.zeros, shape, k.dtype)
            values = self.variable("cache", "values", jnp.zeros, shape, v.dtype)
            index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
            position = index.value[None]
            q, k = _rope(q, position), _rope(k, position)
            k = keys.value = lax.dynamic_update_slice_in_dim(keys.value, k, index.value, axis=1)
            v = values.value = lax.dynamic_update_slice_in_dim(values.value, v, index.value, axis=1)
            mask = jnp.arange(CACHE)[None] <= index.value
            index.value += 1
        else:
            positions = jnp.arange(x.shape[1])
            q, k = _rope(q, positions), _rope(k, positions)
            mask = positions[:, None] >= positions
        x += dense(DIM, axis=(-2, -1), name="out")(_attend(q, k, v, mask))
        h = nn.RMSNorm(dtype=self.dtype, name="norm2")(x)
        h = nn.silu(dense(HIDDEN, name="gate")(h)) * dense(HIDDEN, name="up")(h)
        return x + dense(DIM, name="down")(h), None


class LinenDecoder(nn.Module):
    dtype: Any = None
    decode: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, DIM, dtype=self.dtype, name="embed")(tokens)
        layers = nn.scan(
            nn.remat(LinenDecoderLayer, prevent_cse=False),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(self.dtype, self.decode, name="layers")(x)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(VOCAB, use_bias=False, dtype=self.dtype, name="head")(x)


class NNXDecoderLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, decode: bool = False):
        dense = partial(nnx.LinearGeneral, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm1 = nnx.RMSNorm(DIM, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.RMSNorm(DIM, dtype=dtype, rngs=rngs)
        self.q = dense(DIM, (HEADS, HEAD_DIM))
        self.k = dense(DIM, (KV_HEADS, HEAD_DIM))
        self.v = dense(DIM, (KV_HEADS, HEAD_DIM))
        self.out = dense((HEADS, HEAD_DIM), DIM, axis=(-2, -1))
        self.gate = dense(DIM, HIDDEN)
        self.up = dense(DIM, HIDDEN)
        self.down = dense(HIDDEN, DIM)
        self.decode = decode
        if decode:
            shape = (2, CACHE, KV_HEADS, HEAD_DIM)
            self.keys = nnx.Cache(jnp.zeros(shape, dtype))
            self.values = nnx.Cache(jnp.zeros(shape, dtype))
            self.index = nnx.Cache(jnp.zeros((), jnp.int32))

    @nnx.remat
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if self.decode:
            index = self.index[...]
            q, k = _rope(q, index[None]), _rope(k, index[None])
            k = self.keys[...] = lax.dynamic_update_slice_in_dim(self.keys[...], k, index, axis=1)
            v = self.values[...] = lax.dynamic_update_slice_in_dim(self.values[...], v, index, axis=1)
            mask = jnp.arange(CACHE)[None] <= index
            self.index[...] = index + 1
        else:
            positions = jnp.arange(x.shape[1])
            q, k = _rope(q, positions), _rope(k, positions)
            mask = positions[:, None] >= positions
        x += self.out(_attend(q, k, v, mask))
        h = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class NNXDecoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, decode: bool = False):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> NNXDecoderLayer:
            return NNXDecoderLayer(rngs, dtype, decode)

        self.embed = nnx.Embed(VOCAB, DIM, dtype=dtype, rngs=rngs)
        self.layers = stack(rngs)
        self.norm = nnx.RMSNorm(DIM, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(DIM, VOCAB, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: NNXDecoderLayer, x: jax.Array) -> jax.Array:
            return layer(x)

        return self.head(self.norm(run(self.layers, self.embed(tokens))))


@_row("transformer_linen", "linen")
@_row("transformer_bf16_linen", "linen", jnp.bfloat16)
def transformer_linen(dtype: Any = None) -> ZooInstance:
    """Stacked weights in a scan over a remat; kernels of rank 3, one of which contracts two axes."""
    return _linen(LinenDecoder(dtype), _ids("transformer", VOCAB, 2, 5))


@_row("transformer_decode_linen", "linen")
def transformer_decode_linen() -> ZooInstance:
    """A step with a stacked KV cache in a mutable collection, written at a traced index."""
    instance = _linen(LinenDecoder(decode=True), _ids("decode", VOCAB, 2, 1), apply_kwargs={"mutable": ["cache"]})
    cache = jax.tree.map(lambda x: x if x.ndim > 1 else x + 3, instance.variables["cache"])
    return dataclasses.replace(instance, variables={**instance.variables, "cache": cache})


@_row("transformer_nnx", "nnx")
@_row("transformer_bf16_nnx", "nnx", jnp.bfloat16)
def transformer_nnx(dtype: Any = None) -> ZooInstance:
    """Layers built by nnx.vmap and run by nnx.scan over nnx.remat, which split and merge the module in the trace."""
    return _nnx(partial(NNXDecoder, dtype=dtype), _ids("transformer", VOCAB, 2, 5))


@_row("transformer_decode_nnx", "nnx")
def transformer_decode_nnx() -> ZooInstance:
    """A step that updates a stacked KV cache, which is state of the module, inside nnx.scan and nnx.remat."""
    instance = _nnx(partial(NNXDecoder, decode=True), _ids("decode", VOCAB, 2, 1))
    instance.model.layers.index[...] += 3
    return instance


# --- Embeddings ----------------------------------------------------------------------------------------------


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(36, 20, name="embed")
        return embed.attend(nn.tanh(nn.Dense(20, name="mix")(embed(tokens))))


class LinenUntied(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(36, 20, name="embed")(tokens)
        positions = self.param("positions", nn.initializers.normal(), (9, 20))
        return nn.Dense(44, name="head")(nn.tanh(x + positions[: tokens.shape[1]]))


class NNXTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(36, 20, rngs=rngs)
        self.mix = nnx.Linear(20, 20, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(nnx.tanh(self.mix(self.embed(tokens))))


class NNXUntied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(36, 20, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((9, 20)))
        self.head = nnx.Linear(20, 44, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(nnx.tanh(self.embed(tokens) + self.positions[: tokens.shape[1]]))


@_row("tied_linen", "linen")
def tied_linen() -> ZooInstance:
    """One table is both looked up and, transposed, the weight of a matmul."""
    return _linen(LinenTied(), _ids("tied", 36, 2, 7))


@_row("untied_linen", "linen")
def untied_linen() -> ZooInstance:
    """A table that is only looked up, and a position table that is only sliced and added."""
    expected = {"positions": "no matmul or lookup"}
    return _linen(LinenUntied(), _ids("untied", 36, 2, 7), expected_unquantized=expected)


@_row("tied_nnx", "nnx")
def tied_nnx() -> ZooInstance:
    """One table is both looked up and, transposed, the weight of a matmul."""
    return _nnx(NNXTied, _ids("tied", 36, 2, 7))


@_row("untied_nnx", "nnx")
def untied_nnx() -> ZooInstance:
    """A table that is only looked up, and a position table that is only sliced and added."""
    expected = {"positions": "no matmul or lookup"}
    return _nnx(NNXUntied, _ids("untied", 36, 2, 7), expected_unquantized=expected)


# --- Convolutions --------------------------------------------------------------------------------------------


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, (features, how) in enumerate(CNN):
            x = nn.Conv(features, use_bias=i > 0, name=f"conv{i}", **how)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(11, name="head")(x.reshape(x.shape[0], -1))


CNN: tuple[tuple[int, dict[str, Any]], ...] = (
    (8, {"kernel_size": (3, 2), "strides": (2, 1)}),
    (12, {"kernel_size": (3, 3), "feature_group_count": 4}),
    (10, {"kernel_size": (2, 3), "kernel_dilation": (2, 1), "padding": "VALID"}),
    (20, {"kernel_size": (1, 3), "feature_group_count": 10, "padding": "CIRCULAR"}),
)


class NNXCNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        inputs = [3, *(features for features, _ in CNN)]
        self.convs = nnx.List(
            nnx.Conv(inputs[i], features, use_bias=i > 0, rngs=rngs, **how) for i, (features, how) in enumerate(CNN)
        )
        self.norms = nnx.List(nnx.BatchNorm(features, rngs=rngs) for features, _ in CNN)
        self.head = nnx.Linear(40, 11, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), use_running_average=not train))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        return self.head(x.reshape(x.shape[0], -1))


@_row("cnn_train_linen", "linen")
def cnn_train_linen() -> ZooInstance:
    """Strided, grouped, dilated and depthwise convolutions; batch statistics in a mutable collection."""
    return _linen(
        LinenCNN(), _normal("cnn", 3, 9, 7, 3), apply_kwargs={"mutable": ["batch_stats"]}, kwargs={"train": True}
    )


@_row("cnn_eval_linen", "linen")
def cnn_eval_linen() -> ZooInstance:
    """The statistics of batch norm, which are not parameters, are constants of the call."""
    return _linen(LinenCNN(), _normal("cnn", 3, 9, 7, 3), kwargs={"train": False})


@_row("cnn_train_nnx", "nnx")
def cnn_train_nnx() -> ZooInstance:
    """Batch statistics are state of the module that the call updates in place; submodules in lists."""
    return _nnx(NNXCNN, _normal("cnn", 3, 9, 7, 3), True)


@_row("cnn_eval_nnx", "nnx")
def cnn_eval_nnx() -> ZooInstance:
    """The statistics of batch norm, which are not parameters, are constants of the call."""
    return _nnx(NNXCNN, _normal("cnn", 3, 9, 7, 3), False)


class LinenConvs(nn.Module):
    """Two convolutions over as many spatial axes as `kernel` has."""

    kernel: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Conv(12, self.kernel, padding="CAUSAL" if len(self.kernel) == 1 else "SAME", name="a")(x))
        return nn.Conv(8, self.kernel[::-1], strides=2, feature_group_count=2, name="b")(x)


class NNXConvs(nnx.Module):
    def __init__(self, kernel: tuple[int, ...], rngs: nnx.Rngs):
        padding = "CAUSAL" if len(kernel) == 1 else "SAME"
        self.a = nnx.Conv(6, 12, kernel, padding=padding, rngs=rngs)
        self.b = nnx.Conv(12, 8, kernel[::-1], strides=2, feature_group_count=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(nnx.gelu(self.a(x)))


@_row("conv1d_linen", "linen", (3,), (2, 9, 6))
@_row("conv3d_linen", "linen", (3, 1, 2), (2, 5, 4, 3, 6))
def convs_linen(kernel: tuple[int, ...], shape: tuple[int, ...]) -> ZooInstance:
    """Convolutions over one axis, causal, or three."""
    return _linen(LinenConvs(kernel), _normal("convs", *shape))


@_row("conv1d_nnx", "nnx", (3,), (2, 9, 6))
@_row("conv3d_nnx", "nnx", (3, 1, 2), (2, 5, 4, 3, 6))
def convs_nnx(kernel: tuple[int, ...], shape: tuple[int, ...]) -> ZooInstance:
    """Convolutions over one axis, causal, or three."""
    return _nnx(partial(NNXConvs, kernel), _normal("convs", *shape))


class LinenConvTranspose(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.ConvTranspose(12, (3, 2), strides=(2, 1), name="a")(x))
        return nn.ConvTranspose(10, (2, 3), strides=(1, 2), transpose_kernel=True, name="b")(x)


class NNXConvTranspose(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.ConvTranspose(6, 12, (3, 2), strides=(2, 1), rngs=rngs)
        self.b = nnx.ConvTranspose(12, 10, (2, 3), strides=(1, 2), transpose_kernel=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(nnx.relu(self.a(x)))


@_row("conv_transpose_linen", "linen")
def conv_transpose_linen() -> ZooInstance:
    """Transposed convolutions: with transpose_kernel the kernel is flipped and its features are swapped."""
    return _linen(LinenConvTranspose(), _normal("conv_transpose", 2, 5, 4, 6))


@_row("conv_transpose_nnx", "nnx")
def conv_transpose_nnx() -> ZooInstance:
    """Transposed convolutions: with transpose_kernel the kernel is flipped and its features are swapped."""
    return _nnx(NNXConvTranspose, _normal("conv_transpose", 2, 5, 4, 6))


# --- Recurrent nets ------------------------------------------------------------------------------------------


class LinenRNN(nn.Module):
    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(9, name="head")(nn.RNN(self.cell(16, name="cell"), name="rnn")(x))


class NNXRNN(nnx.Module):
    def __init__(self, cell: Callable[..., nnx.Module], rngs: nnx.Rngs):
        self.rnn = nnx.RNN(cell(12, 16, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(16, 9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x))


@_row("lstm_linen", "linen", nn.LSTMCell)
@_row("lstm_optimized_linen", "linen", nn.OptimizedLSTMCell)
@_row("gru_linen", "linen", nn.GRUCell)
def rnn_linen(cell: type[nn.RNNCellBase]) -> ZooInstance:
    """Gates as many small matmuls in a scan; the optimized cell concatenates their kernels first."""
    return _linen(LinenRNN(cell), _normal("rnn", 2, 5, 12))


@_row("lstm_nnx", "nnx", nnx.LSTMCell)
@_row("lstm_optimized_nnx", "nnx", nnx.OptimizedLSTMCell)
@_row("gru_nnx", "nnx", nnx.GRUCell)
def rnn_nnx(cell: Callable[..., nnx.Module]) -> ZooInstance:
    """Gates as matmuls in nnx.scan, in which the whole cell is carried."""
    return _nnx(partial(NNXRNN, cell), _normal("rnn", 2, 5, 12))


# --- Mixtures of experts -------------------------------------------------------------------------------------

EXPERTS = 3


def _dense_experts(x: jax.Array, gates: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Every expert on every token; `gates` [batch, seq, experts] weighs the results."""
    h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, up))
    return jnp.einsum("btef,efd,bte->btd", h, down, gates)


def _ragged_experts(x: jax.Array, gates: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """The best expert on every token, the tokens sorted by expert."""
    tokens, gates = x.reshape(-1, x.shape[-1]), gates.reshape(-1, EXPERTS)
    expert = gates.argmax(-1)
    order = expert.argsort()
    sizes = jnp.bincount(expert, length=EXPERTS).astype(jnp.int32)
    h = jax.nn.gelu(lax.ragged_dot(tokens[order], up, sizes))
    h = lax.ragged_dot(h, down, sizes)[order.argsort()]
    return (h * gates.max(-1, keepdims=True)).reshape(x.shape)


def _top2(logits: jax.Array) -> jax.Array:
    """The probabilities of the two best experts, 0 for the others."""
    probabilities = jax.nn.softmax(logits)
    return jnp.where(probabilities < lax.top_k(probabilities, 2)[0][..., 1:], 0, probabilities)


class LinenMoE(nn.Module):
    experts: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gates = _top2(nn.Dense(EXPERTS, use_bias=False, name="router")(x))
        up = self.param("up", nn.initializers.normal(), (EXPERTS, 20, 28))
        down = self.param("down", nn.initializers.normal(), (EXPERTS, 28, 20))
        return x + self.experts(x, gates, up, down)


class NNXMoE(nnx.Module):
    def __init__(self, experts: Callable[..., jax.Array], rngs: nnx.Rngs):
        self.router = nnx.Linear(20, EXPERTS, use_bias=False, rngs=rngs)
        self.up = nnx.Param(jnp.zeros((EXPERTS, 20, 28)))
        self.down = nnx.Param(jnp.zeros((EXPERTS, 28, 20)))
        self.experts = experts

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.experts(x, _top2(self.router(x)), self.up[...], self.down[...])


class LinenVmapMoE(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gates = _top2(nn.Dense(EXPERTS, use_bias=False, name="router")(x))
        experts = nn.vmap(
            LinenExpert, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=EXPERTS
        )
        return x + jnp.einsum("ebtd,bte->btd", experts(name="experts")(x), gates)


class LinenExpert(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(20, name="down")(nn.gelu(nn.Dense(28, name="up")(x)))


class NNXVmapMoE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=EXPERTS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> NNXExpert:
            return NNXExpert(rngs)

        self.router = nnx.Linear(20, EXPERTS, use_bias=False, rngs=rngs)
        self.experts = stack(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        run = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None), out_axes=0)
        return x + jnp.einsum("ebtd,bte->btd", run(self.experts, x), _top2(self.router(x)))


class NNXExpert(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(20, 28, rngs=rngs)
        self.down = nnx.Linear(28, 20, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


@_row("moe_einsum_linen", "linen", _dense_experts)
@_row("moe_ragged_linen", "linen", _ragged_experts)
def moe_linen(experts: Callable[..., jax.Array]) -> ZooInstance:
    """Experts in one weight of rank 3: an einsum with a free expert axis and one of three operands; ragged_dot."""
    return _linen(LinenMoE(experts), _normal("moe", 2, 5, 20))


@_row("moe_einsum_nnx", "nnx", _dense_experts)
@_row("moe_ragged_nnx", "nnx", _ragged_experts)
def moe_nnx(experts: Callable[..., jax.Array]) -> ZooInstance:
    """Experts in one weight of rank 3: an einsum with a free expert axis and one of three operands; ragged_dot."""
    return _nnx(partial(NNXMoE, experts), _normal("moe", 2, 5, 20))


@_row("moe_vmap_linen", "linen")
def moe_vmap_linen() -> ZooInstance:
    """Experts stacked by nn.vmap: matmuls that got a batch axis, their biases a row each."""
    expected = {f"experts/{name}/bias": "'add'" for name in ("up", "down")}
    return _linen(LinenVmapMoE(), _normal("moe", 2, 5, 20), expected_unquantized=expected)


@_row("moe_vmap_nnx", "nnx")
def moe_vmap_nnx() -> ZooInstance:
    """Experts stacked by nnx.vmap: matmuls that got a batch axis, their biases a row each."""
    expected = {f"experts/{name}/bias": "'add'" for name in ("up", "down")}
    return _nnx(NNXVmapMoE, _normal("moe", 2, 5, 20), expected_unquantized=expected)


# --- Encoder-decoder transformer -----------------------------------------------------------------------------


class LinenSeqBlock(nn.Module):
    """Pre-norm self attention, cross attention where there is a memory, and an MLP."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, memory: jax.Array | None = None) -> jax.Array:
        attention = partial(nn.MultiHeadDotProductAttention, num_heads=4, qkv_features=32)
        h = nn.LayerNorm(name="norm1")(x)
        x += attention(name="self_attention")(h, mask=mask)
        if memory is not None:
            x += attention(name="cross_attention")(nn.LayerNorm(name="norm2")(x), memory)
        h = nn.gelu(nn.Dense(28, name="up")(nn.LayerNorm(name="norm3")(x)))
        return x + nn.Dense(20, name="down")(h)


class LinenSeq2Seq(nn.Module):
    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        embed = nn.Embed(36, 20, name="embed")
        mask = nn.make_attention_mask(source > 1, source > 1)
        memory = LinenSeqBlock(name="encoder")(embed(source), mask)
        x = LinenSeqBlock(name="decoder")(embed(target), nn.make_causal_mask(target), memory)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class NNXSeqBlock(nnx.Module):
    def __init__(self, cross: bool, rngs: nnx.Rngs):
        attention = partial(nnx.MultiHeadAttention, 4, 20, 32, decode=False, rngs=rngs)
        self.norm1 = nnx.LayerNorm(20, rngs=rngs)
        self.self_attention = attention()
        if cross:
            self.norm2 = nnx.LayerNorm(20, rngs=rngs)
            self.cross_attention = attention()
        self.norm3 = nnx.LayerNorm(20, rngs=rngs)
        self.up = nnx.Linear(20, 28, rngs=rngs)
        self.down = nnx.Linear(28, 20, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, memory: jax.Array | None = None) -> jax.Array:
        x += self.self_attention(self.norm1(x), mask=mask)
        if memory is not None:
            x += self.cross_attention(self.norm2(x), memory)
        return x + self.down(nnx.gelu(self.up(self.norm3(x))))


class NNXSeq2Seq(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(36, 20, rngs=rngs)
        self.encoder = NNXSeqBlock(False, rngs)
        self.decoder = NNXSeqBlock(True, rngs)
        self.norm = nnx.LayerNorm(20, rngs=rngs)

    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        memory = self.encoder(self.embed(source), nnx.make_attention_mask(source > 1, source > 1))
        x = self.decoder(self.embed(target), nnx.make_causal_mask(target), memory)
        return self.embed.attend(self.norm(x))


@_row("encdec_linen", "linen")
def encdec_linen() -> ZooInstance:
    """Cross attention with Flax's own module, blocks of two shapes, a table used at three sites, two inputs."""
    return _linen(LinenSeq2Seq(), _ids("source", 36, 2, 7), _ids("target", 36, 2, 5))


@_row("encdec_nnx", "nnx")
def encdec_nnx() -> ZooInstance:
    """Cross attention with Flax's own module, blocks of two shapes, a table used at three sites, two inputs."""
    return _nnx(NNXSeq2Seq, _ids("source", 36, 2, 7), _ids("target", 36, 2, 5))


# --- Details of Linen and NNX --------------------------------------------------------------------------------


class LinenCollections(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean = self.variable("stats", "mean", jnp.zeros, (28,))
        mixer = self.variable("constants", "mixer", jnp.zeros, (28, 12))
        h = nn.Dense(28, name="up")(x)
        self.sow("intermediates", "hidden", h)
        if not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * h.mean(0)
        return (h - mean.value) @ mixer.value @ self.param("down", nn.initializers.normal(), (12, 10))


@_row("collections_linen", "linen")
def collections_linen() -> ZooInstance:
    """Four collections: a matrix that is no parameter, statistics that change, intermediates that are sown."""
    return _linen(LinenCollections(), _normal("x", 3, 20), apply_kwargs={"mutable": ["stats", "intermediates"]})


class LinenAutoencoder(nn.Module):
    def setup(self) -> None:
        self.down = [nn.Dense(28), nn.Dense(12)]
        self.up = {"a": nn.Dense(28), "b": nn.Dense(20)}

    def encode(self, x: jax.Array) -> jax.Array:
        return self.down[1](nn.relu(self.down[0](x)))

    def decode(self, z: jax.Array, *, bias: float) -> jax.Array:
        return self.up["b"](nn.relu(self.up["a"](z) + bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x), bias=0.0)


@_row("setup_linen", "linen")
def setup_linen() -> ZooInstance:
    """Submodules in the lists and dicts of setup, whose names Flax makes up."""
    return _linen(LinenAutoencoder(), _normal("x", 3, 20))


@_row("method_encode_linen", "linen")
def method_encode_linen() -> ZooInstance:
    """A method given by name, which leaves half of the parameters unused."""
    instance = _linen(LinenAutoencoder(), _normal("x", 3, 20))
    expected = {f"up_{key}/kernel": "not used" for key in "ab"}
    return dataclasses.replace(instance, apply_kwargs={"method": "encode"}, expected_unquantized=expected)


@_row("method_decode_linen", "linen")
def method_decode_linen() -> ZooInstance:
    """A method given as a function, with a Python number by keyword and another input shape than __call__."""
    return dataclasses.replace(
        _linen(LinenAutoencoder(), _normal("x", 3, 20)),
        args=_on_device((_normal("z", 3, 12),)),
        kwargs={"bias": 0.5},
        apply_kwargs={"method": LinenAutoencoder.decode},
        expected_unquantized={f"down_{i}/kernel": "not used" for i in range(2)},
    )


class NNXAutoencoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.List([nnx.Linear(20, 28, rngs=rngs), nnx.Linear(28, 12, rngs=rngs)])
        self.up = nnx.Dict(a=nnx.Linear(12, 28, rngs=rngs), b=nnx.Linear(28, 20, rngs=rngs))

    def encode(self, x: jax.Array) -> jax.Array:
        return self.down[1](nnx.relu(self.down[0](x)))

    def decode(self, z: jax.Array, *, bias: float) -> jax.Array:
        return self.up["b"](nnx.relu(self.up["a"](z) + bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x), bias=0.0)


@_row("setup_nnx", "nnx")
def setup_nnx() -> ZooInstance:
    """Submodules in an nnx.List and an nnx.Dict, so that paths hold numbers."""
    return _nnx(NNXAutoencoder, _normal("x", 3, 20))


@_row("method_decode_nnx", "nnx")
def method_decode_nnx() -> ZooInstance:
    """Another method than __call__, with a Python number by keyword."""
    return _nnx(
        NNXAutoencoder,
        _normal("z", 3, 12),
        kwargs={"bias": 0.5},
        apply_kwargs={"method": "decode"},
        expected_unquantized={f"down/{i}/kernel": "not used" for i in range(2)},
    )


class LinenStatic(nn.Module):
    @nn.compact
    def __call__(
        self, x: jax.Array, activation: str, depth: int, mask: jax.Array | None = None, *, scale: float = 1.0
    ) -> jax.Array:
        for i in range(depth):
            x = getattr(nn, activation)(nn.Dense(20, name=f"layer{i}")(x)) * scale
        return nn.Dense(12, name="head")(x if mask is None else jnp.where(mask, x, 0))


@_row("static_args_linen", "linen", None)
@_row("static_args_mask_linen", "linen", np.arange(20) % 3 > 0)
def static_args_linen(mask: np.ndarray | None) -> ZooInstance:
    """A string, an int that is the depth, a float, and an argument that is None or an array of bools."""
    return _linen(LinenStatic(), _normal("x", 3, 20), "gelu", 2, mask, kwargs={"scale": 0.5})


class LinenBoxed(nn.Module):
    boxes: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, bias = nn.initializers.normal(), nn.initializers.zeros
        split = nn.DenseGeneral((4, 6), kernel_init=self.boxes(init, (None, "model", None)), name="split")
        merge = nn.DenseGeneral(
            28, axis=(-2, -1), kernel_init=init, bias_init=self.boxes(bias, ("model",)), name="merge"
        )
        head = self.param("head", self.boxes(init, ("model",)), (28, 12))
        return jnp.tanh(merge(jnp.tanh(split(x)))) @ head


@_row("partitioned_linen", "linen", nn.with_partitioning)
@_row("logical_linen", "linen", nn.with_logical_partitioning)
def boxed_linen(boxes: Callable[..., Any]) -> ZooInstance:
    """Some parameters are boxed; the names of one box are fewer than the axes of its array."""
    return _linen(LinenBoxed(boxes), _normal("x", 3, 20))


class NNXBoxed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(20, 28, kernel_init=nnx.with_metadata(init, tag=("embed", "mlp")), rngs=rngs)
        self.down = nnx.Param(init(rngs.params(), (28, 12)), tag="down")

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.gelu(self.up(x)) @ self.down


@_row("metadata_nnx", "nnx")
def metadata_nnx() -> ZooInstance:
    """Parameters with metadata, one of them used without reading its value first."""
    return _nnx(NNXBoxed, _normal("x", 3, 20))


class LinenRngsArgument(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, rngs: Mapping[str, jax.Array]) -> jax.Array:
        x = nn.Dense(28, name="up")(x + 0.1 * jax.random.normal(rngs["noise"], x.shape))
        return nn.Dense(12, name="down")(nn.Dropout(0.2, deterministic=False)(x))


@_row("rngs_argument_linen", "linen")
def rngs_argument_linen() -> ZooInstance:
    """The module has an argument `rngs` of its own, positional, next to the one of `Module.apply`."""
    return _linen(
        LinenRngsArgument(),
        _normal("x", 3, 20),
        {"noise": jax.random.key(3)},
        apply_kwargs={"rngs": {"dropout": jax.random.key(7)}},
    )


class NNXRngsArgument(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(20, 28, rngs=rngs)
        self.down = nnx.Linear(28, 12, rngs=rngs)
        self.dropout = nnx.Dropout(0.3)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | jax.Array) -> jax.Array:
        return self.down(self.dropout(self.up(x), rngs=rngs, deterministic=False))


@_row("rngs_argument_nnx", "nnx")
def rngs_argument_nnx() -> ZooInstance:
    """The caller's nnx.Rngs is an argument, whose counter the call advances."""
    return _nnx(NNXRngsArgument, _normal("x", 3, 20), kwargs={"rngs": nnx.Rngs(dropout=5)})


@_row("numpy_linen", "linen")
def numpy_linen() -> ZooInstance:
    """NumPy arrays as variables and as inputs."""
    x = _normal("mlp", 3, 20)
    instance = _linen(LinenMLP(), x)
    return dataclasses.replace(instance, variables=jax.tree.map(np.asarray, instance.variables), args=(x,))


class LinenShared(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = nn.Dense(20, name="shared")
        return nn.Dense(12, name="head")(nn.tanh(dense(nn.tanh(dense(x)))))


@_row("shared_linen", "linen")
def shared_linen() -> ZooInstance:
    """A submodule that is called twice."""
    return _linen(LinenShared(), _normal("x", 3, 20))


class NNXShared(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(20, 20, rngs=rngs)
        self.second = self.first
        self.head = nnx.Linear(20, 28, rngs=rngs)
        self.back = nnx.Linear(28, 20, rngs=rngs)
        self.back.bias = self.first.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.back(self.head(nnx.tanh(self.second(nnx.tanh(self.first(x))))))


@_row("shared_nnx", "nnx")
def shared_nnx() -> ZooInstance:
    """One submodule under two attributes, and one variable in two submodules."""
    return _nnx(NNXShared, _normal("x", 3, 20))


class LinenShareScope(nn.Module):
    def setup(self) -> None:
        self.base = nn.Dense(28)
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.param("a", nn.initializers.normal(), (20, 8))
        b = self.param("b", nn.initializers.normal(), (8, 28))
        return self.base(x) + x @ a @ b


@_row("share_scope_linen", "linen")
def share_scope_linen() -> ZooInstance:
    """A LoRA wrapper that shares the scope of the layer it wraps, so that their parameters are siblings."""
    return _linen(LinenShareScope(), _normal("x", 3, 20))


class LinenMultiOutput(nn.Module):
    @nn.compact
    def __call__(self, inputs: Mapping[str, jax.Array]) -> dict[str, Any]:
        h = nn.relu(nn.Dense(28, name="trunk")(inputs["x"]))
        logits = nn.Dense(12, name="logits")(h + inputs["y"].mean())
        aux = {"label": logits.argmax(-1), "name": "aux", "none": None, "count": 3}
        return {"logits": logits, "value": nn.Dense(1, name="value")(h)[:, 0], "inputs": inputs["x"], "aux": aux}


@_row("multi_output_linen", "linen")
def multi_output_linen() -> ZooInstance:
    """A dict in, and a nested dict out with an input, integers, None, a string and a Python int among its leaves."""
    return _linen(LinenMultiOutput(), {"x": _normal("x", 3, 20), "y": _normal("y", 3, 9)})


class NNXNewState(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(20, 28, rngs=rngs)
        self.down = nnx.Linear(28, 12, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, Any]:
        h = nnx.relu(self.up(x))
        self.hidden = nnx.Intermediate(h)
        return {"y": self.down(h), "aux": {"name": "aux", "none": None}}


@_row("new_state_nnx", "nnx")
def new_state_nnx() -> ZooInstance:
    """A call that adds state to the module, which it did not have before."""
    return _nnx(NNXNewState, _normal("x", 3, 20))


# --- Functions -----------------------------------------------------------------------------------------------


def _function(
    name: str, shapes: Mapping[str, tuple[int, ...]], *args: Any, **fields: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enters the decorated `fn(params, *args)` into the zoo; `shapes` are those of its parameters."""

    def enter(fn: Callable[..., Any]) -> Callable[..., Any]:
        def make() -> ZooInstance:
            params = {key: _weight(f"{name}/{key}", *shape) for key, shape in shapes.items()}
            return ZooInstance(fn, _on_device(params), _on_device(args), **fields)

        make.__doc__ = fn.__doc__
        _row(name, "function")(make)
        return fn

    return enter


Params = Mapping[str, Any]


@_function("fn_scan_stacked", {"up": (3, 20, 28), "down": (3, 28, 20)}, _normal("x", 2, 20))
def _scan_stacked(params: Params, x: jax.Array) -> jax.Array:
    """Weights are the scanned operands of a raw lax.scan."""

    def body(x: jax.Array, w: Params) -> tuple[jax.Array, jax.Array]:
        y = x + jax.nn.gelu(x @ w["up"]) @ w["down"]
        return y, y.mean()

    return lax.scan(body, x, params)


@_function("fn_scan_closure", {"w": (20, 20), "v": (12, 20)}, _normal("x", 2, 20), _normal("xs", 5, 2, 12))
def _scan_closure(params: Params, x: jax.Array, xs: jax.Array) -> jax.Array:
    """Weights are constants of a scan, used once an iteration."""

    def body(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(h @ params["w"] + x @ params["v"])
        return h, h

    return lax.scan(body, x, xs)[1]


@_function("fn_left_operand", {"w": (20, 28), "v": (28, 12)}, _normal("x", 3, 20))
def _left_operand(params: Params, x: jax.Array) -> jax.Array:
    """The weight is the left operand, as it is and transposed."""
    h = jnp.tanh(jnp.einsum("io,bi->bo", params["w"], x))
    return (params["v"].T @ h.T).T


@_function("fn_identical_layers", {"w0": (20, 20), "w1": (20, 20), "w2": (20, 20)}, _normal("x", 3, 20))
def _identical_layers(params: Params, x: jax.Array) -> jax.Array:
    """Three matmuls that are the same equation but for their weights."""
    for i in range(3):
        x = jnp.sin(x @ params[f"w{i}"])
    return x


@_function("fn_while_closure", {"w": (20, 20)}, _normal("x", 3, 20), differentiable=False)
def _while_closure(params: Params, x: jax.Array) -> jax.Array:
    """A while loop closes over the weight in its body and over another use of it in its condition."""

    def more(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (carry[0] < 4) & (jnp.abs(carry[1] @ params["w"]).max() < 1e3)

    return lax.while_loop(more, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"])), (0, x))[1]


@_function("fn_while_carry", {"w": (20, 20)}, _normal("x", 3, 20), differentiable=False)
def _while_carry(params: Params, x: jax.Array) -> jax.Array:
    """The weight goes round a while loop as a part of the carry that no iteration changes."""

    def body(carry: tuple) -> tuple:
        i, x, w = carry
        return i + 1, jnp.tanh(x @ w), w

    return lax.while_loop(lambda c: c[0] < 3, body, (0, x, params["w"]))[1]


@_function("fn_scan_carry", {"w": (20, 20)}, _normal("x", 3, 20))
def _scan_carry(params: Params, x: jax.Array) -> jax.Array:
    """The weight goes round a scan as a part of the carry that no iteration changes."""
    return lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, params["w"]), length=3)[0][0]


@_function("fn_fori_loop", {"w": (3, 20, 20), "v": (20, 20)}, _normal("x", 2, 20))
def _fori_loop(params: Params, x: jax.Array) -> jax.Array:
    """A fori_loop over a stacked weight that it indexes with the traced counter, next to a closed-over one."""
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["w"][i] + x @ params["v"]), x)


@_function("fn_cond", {"w": (20, 28), "v": (20, 28), "u": (28, 12)}, _normal("x", 3, 20))
def _cond(params: Params, x: jax.Array) -> jax.Array:
    """The branches of a cond use different weights, and one of them a third that is used outside too."""
    h = lax.cond(
        x.sum() > 0,
        lambda: jnp.tanh(x @ params["w"]),
        lambda: jax.nn.relu(x @ params["v"]) + (x @ params["v"] @ params["u"]).sum(),
    )
    return h @ params["u"]


@_function("fn_switch", {"w": (20, 28), "v": (28, 12)}, _normal("x", 3, 20), np.array([1, 0], np.int32))
def _switch(params: Params, x: jax.Array, which: jax.Array) -> jax.Array:
    """A switch on an input whose branches use one weight in different ways, and one of them no weight."""
    branches = [
        lambda x, w: jnp.tanh(x @ w),
        lambda x, w: jax.nn.relu(x * 0.5) @ w,
        lambda x, w: jnp.zeros((x.shape[0], w.shape[1])),
    ]
    return lax.switch(which[0], branches, x, params["w"]) @ params["v"]


@_function("fn_stack_indexed", {"w": (3, 20, 20)}, _normal("x", 2, 20))
def _stack_indexed(params: Params, x: jax.Array) -> jax.Array:
    """A Python loop over a stacked weight: static slices of one parameter."""
    for i in range(3):
        x = jnp.tanh(x @ params["w"][i])
    return x


@jax.custom_vjp
def _tripled(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def _tripled_fwd(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y = jnp.tanh(x @ w)
    return y, (x, w, y)


def _tripled_bwd(residuals: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, y = residuals
    g = 3 * g * (1 - y**2)
    return g @ w.T, x.T @ g


_tripled.defvjp(_tripled_fwd, _tripled_bwd)


@_function("fn_custom_vjp", {"w": (20, 28), "v": (28, 12)}, _normal("x", 3, 20))
def _custom_vjp(params: Params, x: jax.Array) -> jax.Array:
    """A custom_vjp with a matmul inside, whose gradient is three times the true one on purpose."""
    return _tripled(x, params["w"]) @ params["v"]


@jax.custom_jvp
def _doubled(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sin(x @ w)


@_doubled.defjvp
def _doubled_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, w), (dx, dw) = primals, tangents
    return _doubled(x, w), 2 * jnp.cos(x @ w) * (dx @ w + x @ dw)


@_function("fn_custom_jvp", {"w": (20, 28), "v": (28, 12)}, _normal("x", 3, 20))
def _custom_jvp(params: Params, x: jax.Array) -> jax.Array:
    """A custom_jvp with a matmul inside, whose gradient is twice the true one on purpose."""
    return _doubled(x, params["w"]) @ params["v"]


@_function("fn_checkpoint", {"w": (20, 28), "v": (28, 20)}, _normal("x", 3, 20))
def _checkpoint(params: Params, x: jax.Array) -> jax.Array:
    """jax.checkpoint around matmuls, with a policy, called twice with the same weights."""

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(params: Params, x: jax.Array) -> jax.Array:
        return jnp.sin(x @ params["w"]) @ params["v"]

    return block(params, block(params, x))


@_function("fn_jit", {"w0": (20, 20), "w1": (20, 20), "v": (28, 20)}, _normal("x", 3, 20))
def _jit(params: Params, x: jax.Array) -> jax.Array:
    """A jitted function is called with two weights and an activation: one sub-jaxpr, three roles."""
    layer = jax.jit(lambda x, w: jnp.sin(x @ w))
    h = layer(layer(x, params["w0"]), params["w1"])
    return layer(h, h.T) @ params["v"][:3]


@_function("fn_vmap_inputs", {"w": (20, 28), "v": (28, 12)}, _normal("x", 3, 5, 20))
def _vmap_inputs(params: Params, x: jax.Array) -> jax.Array:
    """jax.vmap over the inputs only; the second matmul is batched along an inner axis."""
    h = jax.vmap(lambda w, x: jnp.tanh(x @ w), in_axes=(None, 0))(params["w"], x)
    return jax.vmap(lambda h: params["v"].T @ h, in_axes=1, out_axes=2)(jnp.moveaxis(h, 2, 0))


@_function(
    "fn_vmap_ensemble",
    {"w": (3, 20, 28), "b": (3, 28), "v": (28, 3, 12)},
    _normal("x", 2, 20),
    expected_unquantized={"b": "'add'"},
)
def _vmap_ensemble(params: Params, x: jax.Array) -> jax.Array:
    """jax.vmap over the weights too: an ensemble whose members lie along different axes of their weights."""

    def member(w: jax.Array, b: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w + b) @ v

    return jax.vmap(member, in_axes=(0, 0, 1, None))(params["w"], params["b"], params["v"], x)


@_function("fn_shard_map", {"w": (20, 28), "v": (28, 12)}, _normal("x", 2, 20))
def _shard_map(params: Params, x: jax.Array) -> jax.Array:
    """A shard_map with a psum after a matmul that contracts the sharded axis."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))

    def block(w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        return lax.psum(jnp.tanh(x @ w) @ v, "model")

    specs = (P(None, "model"), P("model", None), P())
    return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=P())(params["w"], params["v"], x)


@_function("fn_factorised", {"a": (20, 8), "b": (8, 28)}, _normal("x", 3, 5, 20))
def _factorised(params: Params, x: jax.Array) -> jax.Array:
    """An einsum of three operands, two of them weights, in whatever order opt_einsum contracts them."""
    return jnp.einsum("bsi,ir,ro->bso", x, params["a"], params["b"])


@_function("fn_lora", {"w": (20, 28), "a": (20, 8), "b": (8, 28)}, _normal("x", 3, 20))
def _lora(params: Params, x: jax.Array) -> jax.Array:
    """A weight to which the product of two others is added before the matmul."""
    return x @ (params["w"] + 0.5 * params["a"] @ params["b"])


@_function("fn_prescaled", {"w": (20, 28), "s": (12,), "v": (28, 12)}, _normal("x", 3, 20))
def _prescaled(params: Params, x: jax.Array) -> jax.Array:
    """Weights are scaled before the matmul, by a number and by a parameter per column."""
    return jnp.tanh(x @ (params["w"] * 0.5)) @ (params["v"] * (1 + params["s"]))


@_function("fn_weight_norm", {"v": (20, 28), "g": (28,)}, _normal("x", 3, 20))
def _weight_norm(params: Params, x: jax.Array) -> jax.Array:
    """The weight is a function of parameters: its columns are normalised, then scaled."""
    v = params["v"]
    return x @ (v * (1 + params["g"]) / jnp.linalg.norm(v, axis=0))


@_function("fn_standardised", {"w": (20, 28)}, _normal("x", 3, 20))
def _standardised(params: Params, x: jax.Array) -> jax.Array:
    """The weight is standardised by its own mean and variance, and used as it is too."""
    w = params["w"]
    return x @ ((w - w.mean(0)) * lax.rsqrt(w.var(0) + 1e-5)) + 0.1 * x @ w


@_function("fn_qkv_split_after", {"qkv": (20, 36), "out": (12, 20)}, _normal("x", 2, 5, 20))
def _qkv_split_after(params: Params, x: jax.Array) -> jax.Array:
    """A fused weight whose product is split."""
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
    return jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ params["out"]


@_function("fn_qkv_split_before", {"qkv": (20, 40), "out": (12, 20)}, _normal("x", 2, 5, 20))
def _qkv_split_before(params: Params, x: jax.Array) -> jax.Array:
    """A fused weight that is itself split, into parts of unequal width, before the matmuls."""
    q, k, v = (x @ w for w in jnp.split(params["qkv"], [14, 28], axis=1))
    return jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ params["out"]


@_function("fn_concatenated", {"w": (20, 28), "v": (20, 12), "u": (8, 40)}, _normal("x", 3, 28))
def _concatenated(params: Params, x: jax.Array) -> jax.Array:
    """Weights are concatenated along both axes into one before the matmul."""
    w = jnp.concatenate([jnp.concatenate([params["w"], params["v"]], axis=1), params["u"]], axis=0)
    return x @ w


@_function("fn_dot_general", {"w": (3, 4, 6, 20), "v": (20, 3, 28)}, _normal("x", 2, 3, 6, 4))
def _dot_general(params: Params, x: jax.Array) -> jax.Array:
    """lax.dot_general with a batch axis and two contracted axes, listed in different orders."""
    h = lax.dot_general(x, params["w"], (((3, 2), (1, 2)), ((1,), (0,))))
    return lax.dot_general(params["v"], jnp.tanh(h), (((0,), (2,)), ((1,), (0,))))


@_function("fn_reshaped", {"w": (20, 48), "v": (48, 20), "u": (4, 5, 12)}, _normal("x", 2, 5, 20))
def _reshaped(params: Params, x: jax.Array) -> jax.Array:
    """Weights are reshaped before use: a column axis split, a row axis split, two row axes merged."""
    h = jnp.tanh(jnp.einsum("bsd,dhk->bshk", x, params["w"].reshape(20, 8, 6)))
    h = jnp.tanh(jnp.einsum("bshk,hkd->bsd", h, params["v"].reshape(8, 6, 20)))
    return h @ params["u"].reshape(20, 12)


@_function("fn_transposed", {"w": (8, 20, 6), "v": (20, 48)}, _normal("x", 2, 5, 20))
def _transposed(params: Params, x: jax.Array) -> jax.Array:
    """A weight is transposed and reshaped before use; so is another, after a merge that mixes its axes."""
    h = jnp.tanh(x @ params["w"].transpose(1, 0, 2).reshape(20, 48))
    return h @ params["v"].reshape(20, 8, 6).transpose(2, 1, 0).reshape(48, 20)


@_function("fn_conv_oihw", {"w": (12, 8, 3, 2), "v": (10, 6, 1, 3)}, _normal("x", 2, 8, 7, 6))
def _conv_oihw(params: Params, x: jax.Array) -> jax.Array:
    """Convolutions in the NCHW and OIHW layout, strided and then grouped."""
    conv = partial(lax.conv_general_dilated, dimension_numbers=("NCHW", "OIHW", "NCHW"))
    h = jnp.tanh(conv(x, params["w"], (2, 1), "SAME"))
    return conv(h, params["v"], (1, 1), [(0, 0), (1, 2)], rhs_dilation=(1, 2), feature_group_count=2)


@_function("fn_lookup", {"a": (36, 20), "b": (24, 20), "c": (20, 30), "d": (16, 20)}, _ids("ids", 16, 2, 5))
def _lookup(params: Params, ids: jax.Array) -> jax.Array:
    """Lookups by indexing, by jnp.take with clipping, along the second axis, and by a one-hot matmul."""
    h = params["a"][ids] + jnp.take(params["b"], ids, axis=0, mode="clip")
    return h + jnp.moveaxis(params["c"][:, ids], 0, -1) + jax.nn.one_hot(ids, 16) @ params["d"]


@_function("fn_cast", {"w": (20, 28), "v": (28, 12)}, _normal("x", 3, 20))
def _cast(params: Params, x: jax.Array) -> jax.Array:
    """Weights are cast to bfloat16 before the matmul, which accumulates in float32."""
    x, w = x.astype(jnp.bfloat16), params["w"].astype(jnp.bfloat16)
    h = jnp.tanh(jnp.matmul(x, w, preferred_element_type=jnp.float32))
    return h.astype(jnp.bfloat16) @ params["v"].astype(jnp.bfloat16)


@_function("fn_used_elsewhere", {"w": (20, 28)}, _normal("x", 3, 20))
def _used_elsewhere(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """The weight of a matmul is also read by a penalty and handed back."""
    return {"y": x @ params["w"], "penalty": jnp.sum(params["w"] ** 2), "w": params["w"]}


@_function("fn_two_layouts", {"w": (20, 28)}, _normal("x", 3, 20))
def _two_layouts(params: Params, x: jax.Array) -> jax.Array:
    """One weight is contracted along its rows at one site and along its columns at another."""
    return jnp.tanh(x @ params["w"]) @ params["w"].T


@_function("fn_weight_times_weight", {"a": (20, 28), "b": (28, 12)}, _normal("x", 3, 20))
def _weight_times_weight(params: Params, x: jax.Array) -> jax.Array:
    """Both operands of a matmul are weights, and their product is the weight of the next."""
    return x @ (params["a"] @ params["b"])


@_row("fn_odd_leaves", "function")
def fn_odd_leaves() -> ZooInstance:
    """The params hold a list, a tuple, None, an integer table, a 0-d scale and an empty array."""

    def fn(params: Params, x: jax.Array) -> jax.Array:
        for w, b in params["layers"]:
            x = jnp.tanh(x @ w * params["scale"] + (0 if b is None else b))
        return x[:, params["order"]] + params["empty"].sum()

    layers = [(_weight("odd/w0", 20, 28), _weight("odd/b0", 28)), (_weight("odd/w1", 28, 12), None)]
    extra = {"scale": np.array(0.7, np.float32), "order": _ids("odd", 12, 12), "empty": np.zeros((0, 20))}
    params = _on_device({"layers": layers, **extra})
    return ZooInstance(fn, params, _on_device((_normal("x", 3, 20),)), expected_unquantized={"empty": "no values"})


# --- Self-check ----------------------------------------------------------------------------------------------


def _finite(tree: Any) -> bool:
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, np.inexact)]
    return all(bool(jnp.isfinite(x).all()) for x in leaves)


def check(model: ZooModel) -> tuple[int, dict[str, float]]:
    """Runs a row eagerly, jitted and differentiated; returns its parameter count and seconds for each."""
    seconds: dict[str, float] = {}

    def timed(what: str, fn: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        out = jax.block_until_ready(fn(*args))
        seconds[what] = time.perf_counter() - start
        return out

    start = time.perf_counter()
    instance = model.make()
    seconds["make"] = time.perf_counter() - start
    fn, params = instance.functional()

    def arrays(params: Any) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(fn(params)) if isinstance(leaf, jax.Array)]

    eager, jitted = timed("eager", arrays, params), timed("jit", jax.jit(arrays), params)
    assert eager, "no outputs"
    assert _finite(eager), "the outputs are not finite"
    for a, b in zip(eager, jitted, strict=True):
        tolerance = 0.05 if a.dtype == jnp.bfloat16 else 1e-4
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), tolerance, tolerance)
    if instance.differentiable:
        grad = jax.jit(jax.grad(lambda params: instance.loss(fn(params)), allow_int=True))
        grads = [g for g in jax.tree.leaves(timed("grad", grad, params)) if g.dtype != jax.dtypes.float0]
        assert _finite(grads), "the gradients are not finite"
        assert any(bool(jnp.any(g != 0)) for g in grads), "every gradient is zero"
    return sum(leaf.size for leaf in jax.tree.leaves(params)), seconds


def main(parts: list[str]) -> int:
    columns = ("make", "eager", "jit", "grad")
    print(f"jax {jax.__version__}\n{'row':26}{'parameters':>12}" + "".join(f"{c:>8}" for c in columns))
    failed = 0
    for name, model in ZOO.items():
        if parts and not any(part in name for part in parts):
            continue
        try:
            size, seconds = check(model)
        except Exception as error:
            failed += 1
            print(f"{name:26}FAILED {type(error).__name__}: {error} ({model.trap})")
        else:
            times = (f"{seconds[c]:8.2f}" if c in seconds else f"{'-':>8}" for c in columns)
            print(f"{name:26}{size:12}" + "".join(times))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
