"""Exported models: the outputs of the model itself, in processes without its code; damage and misuse are errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_compile
from flax import linen as nn
from flax import nnx
from jax import export as jax_export
from jax import lax
from models import ZOO

import qjax
from qjax.artifact.signature import plain
from qjax.checkpoint.folder import manifest_crc
from qjax.pallas_kernels.packed.qcache import QCache
from qjax.pallas_kernels.packed.qtensor import QTensor

INT4 = qjax.int4(group=8, scale=qjax.AbsMax())
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


def close(actual: Any, expected: Any) -> None:
    """Equal up to the order of float32 sums: two programs may be fused otherwise."""
    assert jax.tree.structure(actual) == jax.tree.structure(plain(expected))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(plain(expected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.LayerNorm(name="norm")(nn.Embed(40, 24, name="embed")(tokens))
        return nn.Dense(40, name="head")(nn.relu(nn.Dense(40, name="up")(x)))


@pytest.fixture(scope="module")
def net():
    """A language model: quantized, its packed variables, its logits."""
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    q = qjax.quantize(model, INT4)
    packed = q.convert(variables, TOKENS)
    return q, packed, np.asarray(jax.jit(q.apply)(packed, TOKENS))


@pytest.fixture(scope="module")
def written(net, tmp_path_factory):
    """The same, exported for all platforms and two shapes of tokens."""
    q, packed, _ = net
    path = tmp_path_factory.mktemp("exported") / "lm"
    qjax.export(path, q, packed, TOKENS, buckets=[jax.ShapeDtypeStruct((1, 3), jnp.int32)])
    return path


@pytest.fixture
def folder(written, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "lm"))


# --- Serving -------------------------------------------------------------------------------------------------------


def test_loaded_model_is_the_model(net, written):
    q, packed, logits = net
    m = qjax.load_exported(written)
    close(m(TOKENS), logits)
    close(m(TOKENS.astype(np.int64)), logits)
    close(m(TOKENS[:1, :3]), q.apply(packed, TOKENS[:1, :3]))  # the second program
    assert m.platforms == ("tpu", "cuda", "cpu")
    assert [str(s) for s in m.signatures] == [
        "(tokens: int32[2,5]) -> float32[2,5,40]",
        "(tokens: int32[1,3]) -> float32[1,3,40]",
    ]
    assert str(m.signatures[0]) in repr(m)
    assert isinstance(m.variables["params"]["head"]["kernel"], QTensor)
    assert bits(m.variables) == bits(packed)


def test_other_variables(net, written):
    """`call` takes fine-tuned variables of the same formats, traced or not."""
    q, packed, logits = net
    m = qjax.load_exported(written)
    shifted = jax.tree.map(lambda x: x, packed)
    shifted["params"]["head"]["bias"] += 1
    close(m.call(shifted, TOKENS), logits + 1)
    close(jax.jit(m.call)(m.variables, TOKENS), logits)
    close(m.call(m.weights, TOKENS), logits)
    shifted["params"]["up"]["kernel"] = packed["params"]["head"]["kernel"]
    with pytest.raises(TypeError, match=r"'params/up/kernel' was exported in another format or shape than.*int4"):
        m.call(shifted, TOKENS)
    with pytest.raises(TypeError, match="the variables have not 'params/embed/embedding'"):
        m.call({"params": {"head": packed["params"]["head"]}}, TOKENS)


def run_python(code: str, *, without: tuple[str, ...], cwd: Path | None = None) -> str:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    command = [sys.executable, "-W", "ignore", "-c", f"import sys\n{blocked}{code}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_flax(net, written):
    code = (
        "import numpy as np, qjax\n"
        f"m = qjax.load_exported({str(written)!r})\n"
        "out = m(np.arange(10, dtype=np.int32).reshape(2, 5))\n"
        "try:\n    qjax.quantize\nexcept AttributeError as error:\n    assert 'pip install flax' in str(error)\n"
        "print(np.asarray(out).tobytes().hex())"
    )
    out = np.frombuffer(bytes.fromhex(run_python(code, without=("flax",))), np.float32)
    np.testing.assert_allclose(out, net[2].reshape(-1), rtol=1e-5, atol=1e-5)


def card_example(path: Path) -> str:
    """The second example of the model card, the one without qjax."""
    code = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.S)[1]
    return code.replace("/absolute/path/of", str(path.parent))


def test_card_example_runs_without_qjax(net, written):
    code = (
        "import numpy as np\ntokens = np.arange(10, dtype=np.int32).reshape(2, 5)\n"
        + card_example(written)
        + "print(np.asarray(out).tobytes().hex())"
    )
    without = ("flax", "qjax", "passes", "pallas_kernels")
    out = np.frombuffer(bytes.fromhex(run_python(code, without=without, cwd=written.parent)), np.float32)
    np.testing.assert_allclose(out, net[2].reshape(-1), rtol=1e-5, atol=1e-5)


def test_weights_are_what_restore_reads(net, written):
    q, packed, _ = net
    q2, restored = qjax.restore(written / "weights", q.module)
    assert q2.recipe == q.recipe
    assert bits(restored) == bits(packed)


# --- State ---------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """One step of decoding with one layer of attention."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(40, 16, name="embed")(tokens)
        q, k, v = (nn.Dense(16, name=name)(x) for name in ("q", "k", "v"))
        keys = self.variable("cache", "keys", jnp.zeros, (2, 7, 16))
        values = self.variable("cache", "values", jnp.zeros, (2, 7, 16))
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        k = keys.value = lax.dynamic_update_slice_in_dim(keys.value, k, index.value, axis=1)
        v = values.value = lax.dynamic_update_slice_in_dim(values.value, v, index.value, axis=1)
        scores = jnp.where(jnp.arange(7) <= index.value, jnp.einsum("bqd,bsd->bqs", q, k), -jnp.inf)
        index.value += 1
        return nn.Dense(40, name="head")(x + jnp.einsum("bqs,bsd->bqd", nn.softmax(scores), v))


def test_decoding_with_a_packed_cache(tmp_path):
    model, token = Step(), jnp.asarray([[3], [7]])
    variables = jax.jit(model.init)(jax.random.key(0), token)  # has written a token
    q = qjax.quantize(model, INT4, kv_cache="int8")
    packed = q.convert(variables, token, mutable=["cache"])
    qjax.export(tmp_path / "lm", q, packed, token, mutable=["cache"], platforms=("cpu",))
    m = qjax.load_exported(tmp_path / "lm")
    assert "cache" not in m.variables

    state, expected = m.init_state(), packed["cache"]
    step = jax.jit(lambda cache, token: q.apply({**packed, "cache": cache}, token, mutable=["cache"]))
    for i in range(3):
        before = state
        logits, state = m(state, token + i)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # updated in place
        wanted, updates = step(expected, token + i)
        expected = updates["cache"]
        close(logits, wanted)
        close(state, {"cache": expected})
    assert isinstance(packed["cache"]["keys"], QCache)
    assert set(state["cache"]["keys"]) == {"codes", "scale"}

    code = f"import numpy as np\ntokens = np.asarray([[3], [7]], np.int32)\n{card_example(tmp_path / 'lm')}"
    out = run_python(f"{code}print(out.shape)", without=("flax", "qjax", "pallas_kernels"), cwd=tmp_path)
    assert out == "(2, 1, 40)\n"
    with pytest.raises(TypeError, match="first argument is the state"):
        m()
    with pytest.raises(TypeError, match=r"state\['cache'\].* is missing"):
        m(token)


def test_state_of_an_nnx_module(tmp_path):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Cache(jnp.arange(8.0))
            self.calls = nnx.Variable(jnp.asarray(0))

        def __call__(self, x):
            out = self.norm(self.linear(x)) + self.last[...]
            self.last[...] = out.mean(0)
            self.calls[...] += 1
            return out

    x = jnp.arange(16.0).reshape(2, 8)
    q = qjax.quantize(Block(nnx.Rngs(0)), INT4).convert(x)
    qjax.export(tmp_path / "m", q, None, x, platforms=("cpu",))
    np.testing.assert_array_equal(q.model.last[...], np.arange(8.0))  # exporting has not run the module
    m = qjax.load_exported(tmp_path / "m")
    state = m.init_state()
    assert set(state) == {"last"}  # nothing reads the running statistics and the count
    for _ in range(2):
        out, state = m(state, x)
        close(out, q(x))
    close(state["last"], q.model.last[...])


# --- Inputs and outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fn_odd_leaves", "fn_concatenated", "collections_linen"])
def test_models_of_the_zoo(tmp_path, name):
    """Params in lists and tuples, empty ones; folded kernels; collections that a call makes."""
    zoo = ZOO[name].make()
    q = qjax.quantize(zoo.model, INT4, strict=False)
    packed = q.convert(zoo.variables, *zoo.args, **zoo.apply_kwargs)
    qjax.export(tmp_path / "m", q, packed, *zoo.args, **zoo.apply_kwargs, platforms=("cpu",))
    m = qjax.load_exported(tmp_path / "m")
    assert bits(m.variables) == bits({k: v for k, v in packed.items() if k not in zoo.apply_kwargs.get("mutable", ())})
    if "mutable" not in zoo.apply_kwargs:
        close(m(*zoo.args), q.apply(packed, *zoo.args))
    else:
        (out, sown), state = m(m.init_state(), *zoo.args)
        close((out, {**sown, **state}), q.apply(packed, *zoo.args, **zoo.apply_kwargs))


def test_flags_numbers_and_donated_arguments(tmp_path):
    def fn(params, cache, x, scale, name, *, double=False):
        y = (x @ params["w"]) * scale * (2 if double else 1)
        return {"y": y, "name": name}, {"sum": cache["sum"] + y.sum(0)}

    x, cache = jnp.ones((3, 16)), {"sum": jnp.zeros(8)}
    q = qjax.quantize(fn, INT4)
    packed = q.convert({"w": jnp.linspace(-1, 1, 128).reshape(16, 8)}, cache, x, 1.0, "a")
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    path = tmp_path / "m"
    qjax.export(path, q, packed, cache, x, scale, "a", double=True, donate_argnums=(0,), platforms=("cpu",))
    m = qjax.load_exported(path)
    expected = q.apply(packed, cache, x, jnp.float32(0.5), "a", double=True)
    out, after = m(cache, x, 0.5, "a", double=True)
    assert out["name"] is None
    close((out["y"], after), (expected[0]["y"], expected[1]))
    assert cache["sum"].is_deleted()
    close(m(after, x, 0.5)[0], out)  # what was fixed may be left out
    with pytest.raises(TypeError, match=r"False is no array.*it was exported with True there"):
        m({"sum": jnp.zeros(8)}, x, 0.5, double=False)


def test_symbolic_sizes(tmp_path):
    """In a process of its own: the suite checks types at run time, and a symbolic size is no `int`."""
    code = """
import jax, jax.numpy as jnp, numpy as np, qjax
from flax import linen as nn

def fn(params, x):
    return x @ params["w"]

q = qjax.quantize(fn, qjax.int4(group=8, scale=qjax.AbsMax()))
packed = q.convert({"w": jnp.linspace(-1, 1, 128).reshape(16, 8)}, jnp.ones((4, 16)))
x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, time, 16"), jnp.float32)
qjax.export("m", q, packed, x, platforms=("cpu",))
m = qjax.load_exported("m")
print(m.signatures[0])
for shape in ((1, 3, 16), (4, 2, 16)):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) / 100
    np.testing.assert_allclose(m(x), q.apply(packed, x), rtol=1e-5, atol=1e-5)

class Running(nn.Module):
    @nn.compact
    def __call__(self, x):
        last = self.variable("memory", "last", jnp.zeros, (x.shape[0], 8))
        last.value += nn.Dense(8)(x)
        return last.value

q, x = qjax.quantize(Running(), qjax.int4(group=8, scale=qjax.AbsMax())), jnp.ones((3, 16))
packed = {"params": q.convert(Running().init(jax.random.key(0), x), x, mutable=["memory"])["params"]}
(n,) = jax.export.symbolic_shape("n")
state = {"last": jax.ShapeDtypeStruct((n, 8), jnp.float32)}
x = jax.ShapeDtypeStruct((n, 16), jnp.float32)
qjax.export("m", q, {**packed, "memory": state}, x, mutable=["memory"], platforms=("cpu",), overwrite=True)
m, x = qjax.load_exported("m"), jnp.ones((5, 16))
out, state = m(m.init_state(n=5), x)
wanted = q.apply({**packed, "memory": {"last": jnp.zeros((5, 8))}}, x, mutable=["memory"])[0]
np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
try:
    m.init_state()
except TypeError as error:
    assert "init_state(n=...)" in str(error)

def known(params, x):
    return x @ params["w"] if x.shape[0] > 4 else x @ -params["w"]

try:
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 16"), jnp.float32)
    qjax.export("no", qjax.quantize(known, "int4"), {"w": packed["params"]["Dense_0"]["kernel"]}, x)
except ValueError as error:
    print(error)
"""
    first, *rest = run_python(code, without=(), cwd=tmp_path).splitlines()
    assert first == "(x: float32[batch,time,16]) -> float32[batch,time,8]"
    assert re.search(r"symbolic size n: something has to know it(.|\n)*buckets=\[second", "\n".join(rest))
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_program_before_weights(net, tmp_path):
    """From shapes alone; `jax.eval_shape` gives the shapes of packed variables."""
    q, packed, logits = net
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    variables = jax.eval_shape(q.module.init, jax.random.key(0), tokens)
    abstract = jax.eval_shape(lambda v: q.convert(v, tokens), variables)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(abstract)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(packed)
    ]
    qjax.export(tmp_path / "m", q, abstract, tokens, platforms=("cpu",))
    m = qjax.load_exported(tmp_path / "m")
    with pytest.raises(ValueError, match="exported without weights"):
        m(TOKENS)
    close(m.call(packed, TOKENS), logits)


BAD_CALLS = {
    "shape": (lambda m: m(TOKENS[:, :4]), r"'tokens' is int32\[2,4\], not int32\[2,5\](.|\n)*Pad the inputs"),
    "dtype": (lambda m: m(TOKENS.astype(np.float32)), r"'tokens' is float32\[2,5\], not int32\[2,5\]"),
    "missing": (lambda m: m(), "'tokens' is missing"),
    "extra": (lambda m: m(TOKENS, TOKENS), "'argument 1' is not an array input"),
    "keyword": (lambda m: m(TOKENS, mask=np.ones(5)), "'mask' is not an array input"),
    "container": (lambda m: m([TOKENS]), r"'tokens' is missing|the containers"),
    "flag": (lambda m: m(TOKENS, train=True), "True is no array"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_inputs_that_do_not_fit(written, what):
    call, message = BAD_CALLS[what]
    with pytest.raises(TypeError, match=message):
        call(qjax.load_exported(written))


def test_misuse(net, written, tmp_path):
    q, packed, _ = net
    path = tmp_path / "m"
    with pytest.raises(FileExistsError, match="overwrite=True"):
        qjax.export(written, q, packed, TOKENS)
    with pytest.raises(ValueError, match=r"packed variables: packed = q\.convert"):
        qjax.export(path, q, q.init(jax.random.key(0), TOKENS), TOKENS)
    with pytest.raises(ValueError, match="'gpu' is no platform"):
        qjax.export(path, q, packed, TOKENS, platforms=("gpu",))
    with pytest.raises(TypeError, match="not Net"):
        qjax.export(path, q.module, packed, TOKENS)
    with pytest.raises(TypeError, match="the inputs of an exported model are arrays, not Rngs"):
        qjax.export(path, q, packed, TOKENS, rngs=nnx.Rngs(0))
    assert not path.exists()


def test_another_platform(net, tmp_path):
    q, packed, _ = net
    qjax.export(tmp_path / "m", q, packed, TOKENS, platforms=("tpu",))
    with pytest.raises(ValueError, match=r'exported for tpu, and this process runs on cpu.*platforms=\(..., "cpu"\)'):
        qjax.load_exported(tmp_path / "m")(TOKENS)


# --- Files ---------------------------------------------------------------------------------------------------------


def test_dying_while_exporting_leaves_the_old_one(net, folder, monkeypatch):
    q, packed, logits = net
    monkeypatch.setattr("qjax.checkpoint.folder.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        qjax.export(folder, q, packed, TOKENS[:1], platforms=("cpu",), overwrite=True)
    monkeypatch.undo()
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]
    close(qjax.load_exported(folder)(TOKENS), logits)
    qjax.export(folder, q, packed, TOKENS[:1], platforms=("cpu",), overwrite=True)
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]
    assert qjax.load_exported(folder).platforms == ("cpu",)


def edit_manifest(folder: Path, *, seal: bool = True, **entries: Any) -> None:
    file = folder / "manifest.json"
    manifest = {**json.loads(file.read_text()), **entries}
    crc = manifest.pop("crc32")
    file.write_text(json.dumps({**manifest, "crc32": manifest_crc(manifest) if seal else crc}))


def flip(*files: Path) -> None:
    for file in files:
        data = bytearray(file.read_bytes())
        for i in range(len(data) // 4, len(data), max(1, len(data) // 7)):
            data[i] ^= 0xFF
        file.write_bytes(bytes(data))


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


DAMAGE = {
    "program gone": (lambda p: (p / "programs/1.jax_export").unlink(), "1.jax_export is missing"),
    "program cut": (lambda p: os.truncate(p / "programs/0.jax_export", 1000), "0.jax_export has 1,000 bytes and not"),
    "program changed": (lambda p: flip(p / "programs/0.jax_export"), "0.jax_export was changed after.*SHA-256"),
    "weights cut": (lambda p: os.truncate(largest(p / "weights/arrays"), 10), "weights/arrays.* has 10 bytes and not"),
    "weights changed": (lambda p: flip(*(f for f in (p / "weights/arrays").rglob("d/*"))), "damaged|cannot be read"),
    "weights gone": (lambda p: shutil.rmtree(p / "weights"), "weights.* is missing"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 100), "manifest.json is damaged"),
    "manifest changed": (lambda p: edit_manifest(p, seal=False, platforms=["tpu"]), "manifest.json was changed"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), "no exported model: it has no manifest.json"),
    "newer layout": (lambda p: edit_manifest(p, format_version=99), "layout 99.*Upgrade qjax"),
    "newer JAX": (lambda p: edit_manifest(p, calling_convention=99), "calling convention 99.*Upgrade JAX"),
    "older JAX": (lambda p: edit_manifest(p, calling_convention=1), "calling convention 1 .*Export the model again"),
    "a checkpoint": (lambda p: shutil.copytree(p / "weights", p, dirs_exist_ok=True), "read with qjax.restore"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_an_error_that_says_what(folder, what):
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(qjax.CheckpointError, match=message):
        qjax.load_exported(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no exported model at"):
        qjax.load_exported(tmp_path / "nothing")


def test_model_card_and_manifest(net, tmp_path):
    q, packed, _ = net
    variables = q.init(jax.random.key(0), TOKENS)
    comparison = qjax.compare(q.module, variables, q, packed, [TOKENS])
    path = tmp_path / "card"
    qjax.export(path, q, packed, TOKENS, platforms=("cpu", "tpu"), comparison=comparison)
    card, manifest = (path / "README.md").read_text(), json.loads((path / "manifest.json").read_text())
    assert str(q.plan(packed, TOKENS)) in card
    assert str(comparison) in card
    stored = sum(a.nbytes for a in jax.tree.leaves(packed))
    assert f"| stored | {stored:,} bytes |" in card
    assert f"| float | {sum(a.nbytes for a in jax.tree.leaves(variables)):,} bytes |" in card
    assert manifest["programs"][0]["inputs"] == [{"name": "tokens", "shape": [2, 5], "dtype": "int32"}]
    assert manifest["programs"][0]["outputs"] == [{"name": "out", "shape": [2, 5, 40], "dtype": "float32"}]
    assert manifest["platforms"] == ["cpu", "tpu"]
    files = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}


def test_custom_calls_and_what_is_promised_of_them(tmp_path):
    """JAX exports a custom call that it does not know only when asked to, and the card then says so."""

    def fn(params, x):
        return jax.ffi.ffi_call("own_call", jax.ShapeDtypeStruct(x.shape, x.dtype))(x) @ params["w"]

    x = jnp.ones((2, 16))
    q = qjax.quantize(fn, INT4)
    packed = q.convert({"w": jnp.ones((16, 8))}, x)
    with pytest.raises(ValueError, match="own_call"):
        qjax.export(tmp_path / "m", q, packed, x)
    checks = [jax_export.DisabledSafetyCheck.custom_call("own_call")]
    qjax.export(tmp_path / "m", q, packed, x, disabled_checks=checks)
    calls = qjax.load_exported(tmp_path / "m").manifest["custom_calls"]
    assert calls == {"own_call": "this JAX version only", "tpu_custom_call": "stable"}
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"Not stable: `own_call`: run those on JAX {jax.__version__} only" in card


# --- Compiled for TPU from the artifact alone ------------------------------------------------------------------------


class Model(nn.Module):
    """A feed-forward language model, large enough that padding to tiles does not count."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(2048, 512, dtype=jnp.bfloat16)(tokens)
        for _ in range(2):
            h = nn.silu(nn.Dense(2048, use_bias=False, dtype=jnp.bfloat16)(nn.RMSNorm(dtype=jnp.bfloat16)(x)))
            x += nn.Dense(512, use_bias=False, dtype=jnp.bfloat16)(h)
        return nn.Dense(2048, use_bias=False, dtype=jnp.bfloat16)(x)


@pytest.mark.parametrize(
    ("chip", "rule", "ratio"),
    [
        ("v5e", qjax.Rule("**", qjax.int4(group=128)), 4.2 / 32),
        ("v6e", qjax.Rule("**", qjax.int8(), qjax.dynamic()), 8.2 / 32),
    ],
    ids=["v5e-int4", "v6e-w8a8"],
)
def test_argument_bytes_on_a_tpu_are_the_packed_bytes(tmp_path, chip, rule, ratio):
    tokens = jax.ShapeDtypeStruct((8, 1), jnp.int32)
    q = qjax.quantize(Model(), [rule])
    variables = jax.eval_shape(q.init, jax.random.key(0), tokens)
    packed = jax.eval_shape(lambda v: q.convert(v, tokens), variables)
    qjax.export(tmp_path / "m", q, packed, tokens, platforms=("tpu", "cuda", "cpu"))
    program = jax_export.deserialize(bytearray((tmp_path / "m/programs/0.jax_export").read_bytes()))
    args, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    compiled = tpu_compile.compile(program.call, *args, chip=chip)
    assert "tpu_custom_call" in compiled.as_text()
    memory = compiled.memory_analysis()
    stored = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(packed))
    assert stored < ratio * sum(a.size * 4 for a in jax.tree.leaves(variables))
    assert stored <= memory.argument_size_in_bytes <= 1.02 * stored
