"""Whole models with the kernels of another platform, interpreted, in place of what the CPU runs.

`interpreted` gives the CPU the lowering rules of that platform as they are registered, and has Pallas interpret what
they call: which kernel a product gets, how its operands are laid out and what falls back are what they are there. The
same packed model on the CPU's own lowerings, in the same process, is what it is compared with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.interpreters import mlir
from jax.experimental import pallas as pl

import qjax
from qjax.pallas_kernels.ops.cache_attention.api import cache_attention_p
from qjax.pallas_kernels.ops.cache_dot.api import cache_dot_general_p
from qjax.pallas_kernels.ops.epilogue_matmul.api import fused_matmul_p
from qjax.pallas_kernels.ops.integer_matmul.api import integer_matmul_p
from qjax.pallas_kernels.ops.matmul.api import quantized_matmul_p
from qjax.pallas_kernels.ops.ragged_matmul.api import quantized_ragged_matmul_p

PRIMITIVES = (
    cache_attention_p,
    cache_dot_general_p,
    fused_matmul_p,
    integer_matmul_p,
    quantized_matmul_p,
    quantized_ragged_matmul_p,
)
# As in `test_products`: the rounding that an interpreted kernel asks for is done.
QUICK = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}


@contextlib.contextmanager
def interpreted(platform: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Programs that are lowered inside have the kernels of a platform; yields a list that each kernel is added to."""
    kernels: list[Any] = []
    compiled = pl.pallas_call

    def interpret(kernel: Any, *args: Any, **options: Any) -> Any:
        kernels.append(kernel)
        return compiled(kernel, *args, **{**options, "interpret": True})

    with monkeypatch.context() as patch:
        patch.setattr(pl, "pallas_call", interpret)
        for primitive in PRIMITIVES:
            rule = mlir._platform_specific_lowerings[platform].get(primitive)
            if rule is not None:
                patch.setitem(mlir._platform_specific_lowerings["cpu"], primitive, rule)
        yield kernels


def _normal(*shape: int) -> jax.Array:
    values = np.random.default_rng(shape).standard_normal(shape)
    return jnp.asarray(values / np.sqrt(shape[-2] if len(shape) > 1 else 1), jnp.float32)


def _mlp(p: Any, x: Any) -> Any:
    """Products with a bias and an activation, which a kernel does in its epilogue, and one without."""
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]


def _decoder(p: Any, x: Any) -> Any:
    """Scanned layers: attention over all tokens, and a gated pair of products."""

    def layer(x: Any, p: Any) -> Any:
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        x = x + jax.nn.softmax(q @ k.swapaxes(-1, -2) / 8) @ v @ p["out"]
        return x + (jax.nn.relu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], None

    return lax.scan(layer, x, p)[0]


def _experts(p: Any, x: Any) -> Any:
    """Rows sorted by expert, one expert without any."""
    sizes = jnp.asarray([3, 0, 5, 2], jnp.int32)
    return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)


# Function, shapes of its parameters, shape of x.
MODELS: dict[str, tuple[Any, dict[str, tuple[int, ...]], tuple[int, ...]]] = {
    "mlp": (_mlp, {"up": (64, 96), "bias": (96,), "down": (96, 40)}, (5, 64)),
    "decoder": (
        _decoder,
        {"qkv": (2, 64, 192), "out": (2, 64, 64), "gate": (2, 64, 96), "up": (2, 64, 96), "down": (2, 96, 64)},
        (6, 64),
    ),
    "experts": (_experts, {"up": (4, 64, 96), "down": (4, 96, 64)}, (10, 64)),
}
WEIGHTS = [qjax.Rule("**", qjax.int4(group=32, scale=qjax.AbsMax()))]
INTEGERS = [qjax.Rule("**", qjax.int8(scale=qjax.AbsMax()), qjax.dynamic())]


def _both(name: str, recipe: Any, platform: str, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, ...]:
    """The model's result on the CPU's lowerings and on those of the platform; asserts that kernels ran there."""
    fn, shapes, x_shape = MODELS[name]
    params, x = {key: _normal(*shape) for key, shape in shapes.items()}, 4 * _normal(*x_shape)
    q = qjax.quantize(fn, recipe)
    packed = q.convert(params, x)
    on_cpu = jax.jit(lambda packed, x: q.apply(packed, x), compiler_options=QUICK)(packed, x)
    chip = qjax.target_chip("a100") if platform == "cuda" else contextlib.nullcontext()
    with chip, interpreted(platform, monkeypatch) as kernels:
        there = jax.jit(lambda packed, x: q.apply(packed, x), compiler_options=QUICK)(packed, x)
    assert kernels
    return np.asarray(on_cpu), np.asarray(there)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["mlp", "decoder"])
def test_products_of_integers_have_the_same_bits(name: str, platform: str, monkeypatch: pytest.MonkeyPatch):
    on_cpu, there = _both(name, INTEGERS, platform, monkeypatch)
    np.testing.assert_array_equal(there, on_cpu)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", MODELS)
def test_float_products_differ_by_the_rounding_of_their_operands(name: str, platform: str, monkeypatch: Any):
    """Each product rounds x and the weight to bfloat16 at most: two half ulps of its size, in each of a few layers."""
    on_cpu, there = _both(name, WEIGHTS, platform, monkeypatch)
    assert np.isfinite(there).all()
    rounding = 8 * float(jnp.finfo(jnp.bfloat16).eps)
    assert np.abs(there - on_cpu).max() <= rounding * np.abs(on_cpu).max()
    assert (there != on_cpu).any() or platform == "cuda"
