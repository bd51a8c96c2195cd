"""`arrange` and `target_chip`: a model in the storage order of a chip, and the kernels that a program for it calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from qjax.pallas_kernels.backends import triton
from qjax.pallas_kernels.packed.qtensor import QTensor, is_packed

SPEC = qjax.int4(group=32, scale=qjax.AbsMax())
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 128)), jnp.bfloat16)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(192, dtype=jnp.bfloat16, name="wide")(x))
        return nn.Dense(10, dtype=jnp.bfloat16, name="narrow")(x)


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.wide = nnx.Linear(128, 192, dtype=jnp.bfloat16, rngs=rngs)
        self.narrow = nnx.Linear(192, 10, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        return self.narrow(nnx.relu(self.wide(x)))


def orders(tree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packed)
    return {jax.tree_util.keystr(path): leaf.order for path, leaf in leaves if isinstance(leaf, QTensor)}


@pytest.fixture(scope="module")
def converted():
    q = qjax.quantize(Mlp(), SPEC)
    return q, q.convert(Mlp().init(jax.random.key(0), X), X)


def test_hopper_reads_columns_and_every_value_keeps_its_bits(converted):
    q, packed = converted
    arranged = qjax.arrange(packed, "h100")
    # N = 10 is no multiple of 64
    assert orders(arranged) == {"['params']['narrow']['kernel']": "kn", "['params']['wide']['kernel']": "nk"}
    for before, after in zip(*(jax.tree.leaves(v, is_leaf=is_packed) for v in (packed, arranged)), strict=True):
        same = [v.dequantize() if isinstance(v, QTensor) else v for v in (before, after)]
        np.testing.assert_array_equal(*same)
    expected, actual = (np.asarray(q.apply(v, X), np.float32) for v in (packed, arranged))
    np.testing.assert_allclose(actual, expected, atol=2e-2 * np.abs(expected).max())


def test_nnx():
    model = NnxMlp(nnx.Rngs(0))
    q = qjax.quantize(model, SPEC).convert(X)
    arranged = qjax.arrange(q, "h200")
    assert arranged.model.wide.kernel.get_value().order == "nk"
    assert q.model.wide.kernel.get_value().order == "kn"
    expected, actual = (np.asarray(m(X), np.float32) for m in (q, arranged))
    np.testing.assert_allclose(actual, expected, atol=2e-2 * np.abs(expected).max())


def test_restored_in_the_order_of_a_chip(converted, tmp_path):
    q, packed = converted
    qjax.save(tmp_path / "packed", q, packed)
    expected = qjax.arrange(packed, "h100")
    _, restored = qjax.restore(tmp_path / "packed", Mlp(), chip="h100")
    assert orders(restored) == orders(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    with pytest.raises(ValueError, match="h100"):  # those that there are
        qjax.restore(tmp_path / "packed", Mlp(), chip="h1000")


@pytest.mark.parametrize("chip", ["v5e", "7x", "a100"])
def test_other_chips_read_what_convert_gives(converted, chip: str):
    before, after = jax.tree.leaves(converted[1]), jax.tree.leaves(qjax.arrange(converted[1], chip))
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("spec", "chip", "stored"),
    [
        (qjax.int2(group=32, scale=qjax.AbsMax(), zero_point=True), "h100", "int4z/g32"),
        (qjax.int3(group=32, scale=qjax.AbsMax()), "a100", "int4/g32"),
        (qjax.int6(group=64, scale=qjax.AbsMax()), "h100", "int8/g64"),
        (qjax.nf4(group=64, scale=qjax.AbsMax(), double_quant=True), "a100", "nf4/g64"),
    ],
    ids=str,
)
def test_narrow_codes_are_widened_and_every_value_keeps_its_bits(spec, chip: str, stored: str):
    q = qjax.quantize(Mlp(), spec)
    packed = q.convert(Mlp().init(jax.random.key(0), X), X)
    arranged = qjax.arrange(packed, chip)
    before, after = (v["params"]["wide"]["kernel"] for v in (packed, arranged))
    assert str(after.spec) == stored
    assert after.nbytes > before.nbytes
    np.testing.assert_array_equal(before.dequantize(), after.dequantize())
    expected, actual = (np.asarray(q.apply(v, X), np.float32) for v in (packed, arranged))
    np.testing.assert_allclose(actual, expected, atol=2e-2 * np.abs(expected).max())


def test_what_no_kernel_takes_stays(converted):
    q = qjax.quantize(Mlp(), qjax.int3(group=20, scale=qjax.AbsMax()))  # no multiple of 32
    packed = q.convert(Mlp().init(jax.random.key(0), X), X)
    before, after = jax.tree.leaves(packed), jax.tree.leaves(qjax.arrange(packed, "h100"))
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("chip", "wide", "narrow"), [("h100", "mosaic_gpu_v2", "triton"), ("a100", "triton", "triton")]
)
def test_a_program_for_a_gpu_calls_its_kernels(converted, chip: str, wide: str, narrow: str):
    q, packed = converted
    packed = qjax.arrange(packed, chip)

    def lowered() -> list[str]:
        program = jax.jit(lambda v, x: q.apply(v, x)).trace(packed, X).lower(lowering_platforms=("cuda",))
        return [line for line in program.as_text().splitlines() if "custom_call" in line]

    expected = [name for name in (wide, narrow) if name != "triton" or triton.finds_device()]
    with qjax.target_chip(chip):
        called = [line for line in lowered() if "mosaic" in line or "triton" in line]
    assert len(called) == len(expected)
    assert all(name in line for name, line in zip(expected, called, strict=True))
    assert not any("mosaic" in line or "triton" in line for line in lowered())  # for a GPU that is not known


def test_an_unknown_chip_is_an_error(converted):
    message = r"target_chip\('h300'\): known are v5e, v5p, v6e, 7x, a100, l4, h100, h200"
    with pytest.raises(ValueError, match=message), qjax.target_chip("h300"):
        pass
    with pytest.raises(ValueError, match=message):
        qjax.arrange(converted[1], "h300")
