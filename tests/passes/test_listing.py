"""`q.show`: programs as text that can be read, and compared before and after a pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import qjax
from qjax.passes.jaxpr.listing import listing, scope

X = jnp.ones((2, 8))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(16, name="up")(x)))


@pytest.fixture(scope="module")
def variables():
    return Net().init(jax.random.key(0), X)


TRACE = """\
down/bias: f32[4]
down/kernel: f32[16,4]
up/bias: f32[16]
up/kernel: f32[8,16]
input0: f32[2,8]
dot_general.1: f32[2,16] = dot_general[contract=1x0] input0, up/kernel
reshape.1: f32[1,16] = reshape up/bias
add.1: f32[2,16] = add dot_general.1, reshape.1
relu.1: f32[2,16] = relu add.1
dot_general.2: f32[2,4] = dot_general[contract=1x0] relu.1, down/kernel
reshape.2: f32[1,4] = reshape down/bias
add.2: f32[2,4] = add dot_general.2, reshape.2
-> add.2"""


def test_a_program_is_read_as_it_was_written(variables):
    assert str(qjax.quantize(Net(), "int4").show(variables, X, after="trace")) == TRACE


def test_what_a_pass_does_is_its_diff(variables):
    """Fake-quant adds a line for each weight and changes the two that read them; nothing else moves."""
    q = qjax.quantize(Net(), qjax.int4(group=8))
    diff = q.show(variables, X, after="fake_quant").diff(q.show(variables, X, after="trace")).splitlines()
    changed = [line for line in diff if line.startswith(("+", "-"))]
    assert sorted(changed) == sorted(
        [
            "+fake_quant.1: f32[16,4] = fake_quant[int4,g8] down/kernel",
            "+fake_quant.2: f32[8,16] = fake_quant[int4,g8] up/kernel",
            "-dot_general.1: f32[2,16] = dot_general[contract=1x0] input0, up/kernel",
            "+dot_general.1: f32[2,16] = dot_general[contract=1x0] input0, fake_quant.2",
            "-dot_general.2: f32[2,4] = dot_general[contract=1x0] relu.1, down/kernel",
            "+dot_general.2: f32[2,4] = dot_general[contract=1x0] relu.1, fake_quant.1",
        ]
    )


def test_served_programs_say_which_formats_they_read(variables):
    q = qjax.quantize(Net(), qjax.int4(group=8))
    served = q.show(variables, X, after="lower")
    assert sum("[int4/g8" in line for line in served.lines) == 2
    assert not any("dot_general" in line for line in served.lines)
    assert served == q.show(q.convert(variables, X), X, after="lower")
    integers = qjax.quantize(Net(), "w8a8").show(variables, X, after="lower")
    assert sum(line.startswith("quantize.") for line in integers.lines) == 2


def test_passes_are_named_in_the_error(variables):
    with pytest.raises(ValueError, match=r"show\(after='packing'\): the passes are trace, .*lower"):
        qjax.quantize(Net(), "int4").show(variables, X, after="packing")


def test_nnx_modules_and_functions_show_theirs():
    q = qjax.quantize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), qjax.int8(scale=qjax.AbsMax()))
    assert any("fake_quant[int8,channel] kernel" in line for line in q.show(X, after="fake_quant").lines)
    q = qjax.quantize(lambda p, x: x @ p["w"], qjax.int8(scale=qjax.AbsMax()))
    assert any("[int8/channel" in line for line in q.show({"w": jnp.ones((8, 4))}, X, after="lower").lines)


def test_control_flow_is_shown_with_what_is_in_it():
    def fn(stack, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, stack)

    text = str(listing(jax.make_jaxpr(fn)(jnp.ones((3, 8, 8)), X), ["layers", "x"]))
    assert "scan.1: f32[2,8], f32[3] = scan[length=3] x, layers" in text
    assert "    dot_general.1: f32[2,8] = dot_general[contract=1x0] carry0, layers[i]" in text
    assert "    -> tanh.1, reduce_sum.1" in text


def test_listings_do_not_depend_on_where_things_lie_in_memory():
    def fn(x, key):
        with scope("noise[a/b]", "x(0)"):
            x = x + jax.random.normal(key, x.shape) * jnp.arange(8.0)
        return jax.jit(lambda y: jax.nn.softmax(y @ y.T))(x)

    texts = {str(listing(jax.make_jaxpr(fn)(X, jax.random.key(0)), ["x", "key"])) for _ in range(2)}
    (text,) = texts
    assert "noise.1: f32[2,8] = noise[a,b]" in text
    assert "0x" not in text
