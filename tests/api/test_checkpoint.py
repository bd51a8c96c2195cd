"""Save and restore: what is written comes back, in another process, to other devices, in part; damage is an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.pallas_kernels.packed.qtensor import QTensor, is_packed

pytestmark = pytest.mark.usefixtures("compile_quickly")

X = np.linspace(-1, 1, 3 * 16, dtype=np.float32).reshape(3, 16)
RECIPES = {
    "int4": qjax.int4(group=8, scale=qjax.AbsMax()),
    "int3z": qjax.int3(group=8, zero_point=True, scale=qjax.AbsMax()),
    "nf4/dq": qjax.nf4(group=8, double_quant=True, scale=qjax.AbsMax()),
    "fp8": qjax.fp8_e4m3(scale=qjax.AbsMax()),
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(24, name="first")(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        cell = nn.OptimizedLSTMCell(10)  # its kernels are folded into one matrix
        carry = cell.initialize_carry(jax.random.key(0), x.shape)
        return nn.Dense(5, name="head")(cell(carry, x)[1])


@pytest.fixture(scope="module")
def model():
    net = Net()
    return net, net.init(jax.random.key(1), X)


@pytest.fixture
def saved(model, tmp_path):
    net, variables = model
    q = qjax.quantize(net, RECIPES["int4"])
    packed = q.convert(variables, X)
    qjax.save(tmp_path / "model", q, packed)
    return tmp_path / "model", net, q, packed


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip_is_exact(model, tmp_path, recipe):
    net, variables = model
    q = qjax.quantize(net, RECIPES[recipe])
    packed = q.convert(variables, X)
    qjax.save(tmp_path / "model", q, packed)
    q2, restored = qjax.restore(tmp_path / "model", net)
    assert_same(packed, restored)
    assert q2.recipe == q.recipe
    np.testing.assert_array_equal(jax.jit(q.apply)(packed, X), jax.jit(q2.apply)(restored, X))


def test_function_trees_of_lists_and_tuples(tmp_path):
    params = [{"w": jnp.ones((16, 8))}, (jnp.full((8, 6), 0.5, jnp.bfloat16), jnp.zeros(6))]

    def fn(params, x):
        return (x @ params[0]["w"]).astype(jnp.bfloat16) @ params[1][0] + params[1][1]

    q = qjax.quantize(fn, RECIPES["int4"])
    packed = q.convert(params, X)
    qjax.save(tmp_path / "model", q, packed)
    _, restored = qjax.restore(tmp_path / "model", fn)
    assert isinstance(restored, list)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(packed)]
    np.testing.assert_array_equal(fn and q.apply(restored, X), q.apply(packed, X))


def test_nnx_into_an_abstract_module(tmp_path):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up, self.drop = nnx.Linear(16, 24, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.down = nnx.Linear(24, 4, rngs=rngs)

        def __call__(self, x):
            return self.down(self.drop(self.up(x)))

    q = qjax.quantize(Block(nnx.Rngs(0)), RECIPES["int4"]).convert(X)
    qjax.save(tmp_path / "model", q)
    restored = qjax.restore(tmp_path / "model", nnx.eval_shape(lambda: Block(nnx.Rngs(0))))
    assert isinstance(restored.model.up.kernel.get_value(), QTensor)
    np.testing.assert_array_equal(q(X), restored(X))  # the dropout key came along
    with pytest.raises(qjax.CheckpointError, match="another model"):
        qjax.restore(tmp_path / "model", nnx.Linear(16, 24, rngs=nnx.Rngs(0)))


def test_another_process_restores_the_same_bits(saved):
    path, _, q, packed = saved
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import jax, numpy as np, qjax\n"
        "from test_checkpoint import Net, X\n"
        "q, packed = qjax.restore(sys.argv[1], Net())\n"
        "sys.stdout.write(np.asarray(jax.jit(q.apply)(packed, X)).tobytes().hex())\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(path), str(here), str(here.parent)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert out.stdout == np.asarray(jax.jit(q.apply)(packed, X)).tobytes().hex()


def test_restore_to_given_shardings(saved):
    path, net, _, packed = saved
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("model",))
    asked = []

    def shardings(name, aval):
        asked.append(name)
        return NamedSharding(mesh, P(*(None,) * (len(aval.shape) - 1), "model") if name.endswith(".words") else P())

    _, restored = qjax.restore(path, net, shardings=shardings)
    assert_same(packed, restored)
    assert restored["params"]["first"]["kernel"].words.sharding.spec == P(None, "model")
    assert "params/first/kernel.words" in asked


def test_one_subtree(saved):
    path, net, _, packed = saved
    _, restored = qjax.restore(path, net, subtree="params/first")
    assert set(restored) == {"params"}
    assert_same(restored["params"], {"first": packed["params"]["first"]})
    with pytest.raises(qjax.CheckpointError, match="nothing under 'params/nope'"):
        qjax.restore(path, net, subtree="params/nope")


def test_existing_path_is_kept_unless_asked(saved):
    path, net, q, packed = saved
    with pytest.raises(FileExistsError, match="overwrite=True"):
        qjax.save(path, q, packed)
    other = jax.tree.map(lambda x: x, packed)
    other["params"]["head"]["bias"] = jnp.ones(5)
    qjax.save(path, q, other, overwrite=True)
    assert qjax.restore(path, net)[1]["params"]["head"]["bias"][0] == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["model"]


def test_dying_while_saving_leaves_the_old_checkpoint(saved, monkeypatch):
    path, net, q, packed = saved
    monkeypatch.setattr("qjax.checkpoint.folder.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        qjax.save(path, q, packed, overwrite=True)
    monkeypatch.undo()
    assert_same(qjax.restore(path, net)[1], packed)
    with pytest.raises(TypeError, match="cannot rebuild"):
        qjax.save(path.parent / "new", q, {"params": nn.FrozenDict({("a", 1): packed["params"]})})
    assert not (path.parent / "new").exists()


def largest_file(path: Path) -> Path:
    return max((f for f in (path / "arrays").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def damage_truncate(path: Path) -> None:
    file = largest_file(path)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_flip(path: Path) -> None:
    for file in (f for f in (path / "arrays").rglob("*") if f.is_file() and f.parent.name == "d"):
        data = bytearray(file.read_bytes())
        for i in range(len(data) // 4, len(data), max(1, len(data) // 7)):
            data[i] ^= 0xFF
        file.write_bytes(bytes(data))


def damage_missing(path: Path) -> None:
    shutil.rmtree(path / "arrays")


def damage_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:100])


def edit_manifest(path: Path, change, *, seal: bool) -> None:
    file = path / "manifest.json"
    envelope = json.loads(file.read_text())
    manifest = json.loads(envelope["manifest"])
    change(manifest)
    text = json.dumps(manifest)
    crc = zlib.crc32(text.encode()) if seal else envelope["crc32"]
    file.write_text(json.dumps({"crc32": crc, "manifest": text}))


DAMAGE = {
    "truncated arrays": (damage_truncate, "damaged|cannot be read"),
    "flipped bytes": (damage_flip, "damaged|cannot be read"),
    "no arrays": (damage_missing, "cannot be read"),
    "truncated manifest": (damage_manifest, "manifest.json is damaged"),
    "edited manifest": (
        lambda p: edit_manifest(p, lambda m: m.update(recipe={}), seal=False),
        "changed after it was written",
    ),
    "newer version": (
        lambda p: edit_manifest(p, lambda m: m.update(format_version=99), seal=True),
        "checkpoint format 99.*Upgrade qjax",
    ),
    "wrong checksum": (
        lambda p: edit_manifest(p, lambda m: m["leaves"][0]["arrays"]["value"].update(crc32=1), seal=True),
        "does not have the contents that were saved",
    ),
    "foreign folder": (lambda p: (p / "manifest.json").unlink(), "is no qjax checkpoint"),
    "foreign manifest": (lambda p: (p / "manifest.json").write_text("[1, 2]"), "damaged or foreign"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_an_error_that_says_what(saved, what):
    path, net, _, _ = saved
    damage, message = DAMAGE[what]
    damage(path)
    with pytest.raises(qjax.CheckpointError, match=message):
        qjax.restore(path, net)


def test_nothing_there(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        qjax.restore(tmp_path / "nothing", model[0])


def test_arrays_are_types_that_every_store_takes(saved):
    *_, packed = saved
    for leaf in jax.tree.leaves(packed, is_leaf=is_packed):
        for a in jax.tree.leaves(leaf) if is_packed(leaf) else ():
            assert a.dtype in (jnp.int32, jnp.int8, jnp.uint8, jnp.float32, jnp.bfloat16, jnp.float16)
