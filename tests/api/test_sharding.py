"""Packed models on eight virtual CPU devices, in a process apart: convert, restore, serve, and `shard_map`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax

LAYERS, EXPERTS, WIDTH, HIDDEN, VOCAB = 2, 4, 64, 128, 96
INT4 = qjax.int4(group=16, scale=qjax.AbsMax())


def on_mesh(*axes: Any) -> Any:
    return nn.with_partitioning(nn.initializers.normal(0.05), axes)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.Dense(HIDDEN, use_bias=False, name="up", kernel_init=on_mesh(None, "model"))(x)
        x = x + nn.Dense(WIDTH, use_bias=False, name="down", kernel_init=on_mesh("model", None))(nn.relu(hidden))
        experts = self.param("experts", on_mesh("model", None, None), (EXPERTS, WIDTH, WIDTH))
        each = jnp.broadcast_to(x, (EXPERTS, *x.shape))
        return x + jnp.einsum("ebd,edf->ebf", each, experts).mean(axis=0), None


class Model(nn.Module):
    """Columns, rows, experts and a vocabulary are split over "model", in scanned layers where there are layers."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, name="embed", embedding_init=on_mesh("model", None))(tokens)
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(VOCAB, use_bias=False, name="head", kernel_init=on_mesh(None, "model"))(x)


# where each packed array is; words and scales alike
PLACES = {
    "embed/embedding": P("model", None),
    "layers/up/kernel": P(None, None, "model"),
    "layers/down/kernel": P(None, "model", None),
    "layers/experts": P(None, "model", None, None),
    "head/kernel": P(None, "model"),
}


def communicates(compiled: Any) -> Counter:
    return Counter(re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", compiled.as_text()))


def check_serving(folder: str) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model, tokens = Model(), jnp.arange(8)
    variables = model.init(jax.random.key(0), tokens)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), nn.get_partition_spec(variables))
    variables = nn.meta.unbox(variables)

    q = qjax.quantize(model, INT4)
    packed = q.convert(variables, tokens)
    expected = jax.jit(q.apply)(packed, tokens)
    qjax.save(folder, q, packed)

    # float weights that are sharded give packed ones that are, with the same bits
    sharded = jax.device_put(variables, places)
    split = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    for converted in (q.convert(sharded, tokens), jax.jit(q.convert)(sharded, split)):
        for name, spec in PLACES.items():
            leaf = converted["params"]
            for key in name.split("/"):
                leaf = leaf[key]
            for a in jax.tree.leaves(leaf):
                assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim), (name, a.sharding)
        for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(converted), strict=True):
            np.testing.assert_array_equal(one, other)

    # restored straight to shards, and served from there: rows of the table that are looked up, words and scales; a sum
    # over K in the layer; a mean over the experts. No weight is gathered.
    def place(name: str, aval: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, PLACES[name.rpartition(".scales")[0] or name.rpartition(".")[0]])

    _, restored = qjax.restore(folder, model, shardings=lambda name, aval: place(name.removeprefix("params/"), aval))
    for leaf in jax.tree.leaves(restored):
        assert leaf.addressable_shards[0].data.size == leaf.size // 4
    served = jax.jit(q.apply).lower(restored, split).compile()
    assert set(communicates(served)) == {"all-reduce"}, communicates(served)
    np.testing.assert_allclose(served(restored, split), expected, rtol=1e-5, atol=1e-5)

    # eight devices for the eight groups of `down` would be right; sixteen values are two words, and a group
    everywhere = NamedSharding(mesh, P(None, ("data", "model"), None))
    qjax.restore(folder, model, subtree="params/layers/down", shardings=everywhere)
    with pytest.raises(ValueError, match=r"'params/layers/up/kernel'.*K=64 .* over 8 devices, 8 values each"):
        qjax.restore(
            folder,
            model,
            subtree="params/layers/up",
            shardings=lambda name, aval: everywhere if name.endswith("words") else None,
        )


def check_integers() -> None:
    """Integer activations: the same bits on one device and on eight."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (64, 128)), "b": jax.random.normal(keys[1], (128, 32))}
    x = jax.random.normal(keys[2], (8, 64))
    q = qjax.quantize(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], "w8a8")
    expected = jax.jit(q.apply)(q.convert(params, x), x)
    places = {"a": NamedSharding(mesh, P(None, "model")), "b": NamedSharding(mesh, P("model", None))}
    packed, split = q.convert(jax.device_put(params, places), x), jax.device_put(x, NamedSharding(mesh, P("data")))
    served = jax.jit(q.apply).lower(packed, split).compile()
    assert set(communicates(served)) == {"all-reduce"}, communicates(served)
    np.testing.assert_array_equal(served(packed, split), expected)


def check_explicit() -> None:
    """A mesh as `jax.make_mesh` makes it, and a model that says how a sum over a split axis is to be split."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    on = {spec: NamedSharding(mesh, P(*spec)) for spec in [("data", None), (None, "model"), ("model", None)]}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (64, 128)), "b": jax.random.normal(keys[1], (128, 32))}
    x = jax.random.normal(keys[2], (8, 64))

    def model(p, x):
        return jnp.einsum("bk,kn->bn", jnp.tanh(x @ p["a"]), p["b"], out_sharding=on["data", None])

    def unplaced(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    split = jax.device_put(x, on["data", None])
    q = qjax.quantize(model, INT4)
    sharded = {"a": jax.device_put(params["a"], on[None, "model"]), "b": jax.device_put(params["b"], on["model", None])}
    packed = q.convert(sharded, split)
    assert [packed[name].scales.values.sharding for name in "ab"] == [on[None, "model"], on["model", None]]
    served = jax.jit(q.apply).lower(packed, split).compile()
    assert communicates(served) == {"all-reduce": 1}, communicates(served)
    a, b = (np.asarray(packed[name].dequantize(), np.float64) for name in "ab")
    np.testing.assert_allclose(served(packed, split), np.tanh(x @ a) @ b, rtol=1e-5, atol=1e-4)

    # integer activations: the same bits on one device and on eight
    q = qjax.quantize(model, qjax.Rule("**", qjax.int8(scale=qjax.AbsMax()), qjax.dynamic(zero_point=True)))
    packed = q.convert(sharded, split)
    alone = qjax.quantize(unplaced, q.recipe)
    expected = jax.jit(alone.apply)(alone.convert(params, x), x)
    served = jax.jit(q.apply).lower(packed, split).compile()
    assert set(communicates(served)) == {"all-reduce"}, communicates(served)
    np.testing.assert_array_equal(served(packed, split), expected)


def check_searches() -> None:
    """Scales that are searched over all of K, or over groups that devices share, have the bits of one device."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params, x = {"w": jax.random.normal(jax.random.key(0), (512, 32))}, jnp.ones((8, 512))

    def model(p, x):
        return jnp.einsum("bk,kn->bn", x, p["w"], out_sharding=P(None, None))

    sharded = {"w": jax.device_put(params["w"], NamedSharding(mesh, P("model", None)))}
    for spec, words in [(qjax.int8(), P("model")), (qjax.nf4(), P("model")), (qjax.int4(group=256), P())]:
        alone = qjax.quantize(lambda p, x: x @ p["w"], spec).convert(params, x)
        with jax.set_mesh(mesh):
            split = qjax.quantize(model, spec).convert(sharded, x)
        assert split["w"].words.sharding.is_equivalent_to(NamedSharding(mesh, words), 2), split["w"].words.sharding
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
            np.testing.assert_array_equal(one, other)


def check_shard_map() -> None:
    """Each shard has its part of the packed weight."""
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    params, x = {"a": jax.random.normal(jax.random.key(0), (64, 128))}, jax.random.normal(jax.random.key(1), (2, 64))

    def manual(p, x):
        first = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P(), P(None, "m")), out_specs=P(None, "m"))
        return first(x, p["a"])

    q = qjax.quantize(manual, qjax.Rule("a", INT4))
    served = q.convert(params, x)
    trained, out = jax.jit(lambda p, s: (q.apply(p, x), q.apply(s, x)))(params, served)
    np.testing.assert_allclose(out, trained, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, x @ served["a"].dequantize(), rtol=1e-5, atol=1e-5)


def test_eight_devices(tmp_path):
    root = Path(__file__).parents[2]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, __file__, str(tmp_path / "model")]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-4000:]


if __name__ == "__main__":
    check_serving(sys.argv[1])
    check_integers()
    check_explicit()
    check_searches()
    check_shard_map()
