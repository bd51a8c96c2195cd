"""`View` against NumPy: what a view says of a parameter is what the movement does to an array."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.pallas_kernels.packed.layout import Layout
from qjax.passes.jaxpr.views import View

pytestmark = pytest.mark.usefixtures("compile_quickly")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def movements(draw):
    """A shape and a list of steps, each made valid for the shape it meets."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    return shape, draw(st.lists(st.tuples(st.sampled_from("trix"), st.randoms(use_true_random=False)), max_size=6))


@settings(max_examples=100, deadline=None)
@given(movements())
def test_view_moves_values_as_numpy_does(case):
    shape, steps = case
    w = np.arange(np.prod(shape)).reshape(shape).astype(np.float32)
    view, value, picked = View.identity(shape), w, []
    for kind, random in steps:
        if kind == "t":
            order = list(range(value.ndim))
            random.shuffle(order)
            view, value = view.transpose(order), value.transpose(order)
        elif kind == "r":
            flat = [d for n in value.shape for d in (divisors(n)[random.randrange(len(divisors(n)))], 0)]
            new = []
            for n, d in zip(value.shape, flat[::2], strict=True):
                new += [d, n // d] if random.random() < 0.5 else [n]
            if len(new) > 1 and random.random() < 0.3:
                new[:2] = [new[0] * new[1]]
            moved = view.reshape(new)
            if moved is not None:
                view, value = moved, value.reshape(new)
        elif kind == "x":
            view, value = dataclasses.replace(view, axes=(*view.axes, ())), value[..., None]
        elif value.ndim:
            axis = random.randrange(value.ndim)
            moved = view.index(axis, ("run", len(picked)))
            if moved is not None:
                i = random.randrange(value.shape[axis])
                if len(moved.indexed) > len(view.indexed):
                    picked.append(i)
                view, value = moved, np.take(value, i, axis=axis)
    assert view.shape == value.shape
    with jax.disable_jit():
        np.testing.assert_array_equal(view.apply(jnp.asarray(w), picked), value)


def test_reshape_that_cuts_across_factors_is_no_view():
    view = View.identity((4, 6)).transpose((1, 0))
    assert view.reshape((4, 6)) is None
    assert view.reshape((3, 2, 4)) is not None


def test_casts_are_kept_in_order():
    w = jnp.asarray([1.0 + 2**-12, 3.0])
    view = View.identity((2,)).cast(jnp.bfloat16).cast(jnp.float32)
    np.testing.assert_array_equal(view.apply(w), w.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(
    ("shape", "roles", "axes"),
    [
        ((8, 6), ("k", "n"), (((8, "k"),), ((6, "n"),))),
        ((5, 8, 6), ("stack", "k", "n"), (((8, "k"),), ((6, "n"),))),
        ((8, 5, 6), ("k", "stack", "n"), (((8, "k"),), ((5, "stack"),), ((6, "n"),))),
        ((4, 3, 6), ("k", "k", "n"), (((4, "k"),), ((3, "k"),), ((6, "n"),))),
        ((1, 8, 6), ("stack", "k", "n"), ((), ((8, "k"),), ((6, "n"),))),
    ],
)
def test_layout_lists_the_roles_of_the_parameters_axes(shape, roles, axes):
    assert View.identity(shape).layout(roles) == Layout(axes)


def test_layout_follows_a_transposed_split_axis():
    # (D, H * d) -> (D, H, d) -> (H, d, D); contracted over d, batched over H
    view = View.identity((8, 6)).reshape((8, 2, 3)).transpose((1, 2, 0))
    assert view.layout(("stack", "k", "n")) == Layout((((8, "n"),), ((2, "stack"), (3, "k"))))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_layout_to_matrix_and_back(lead):
    layout = Layout((((4, "k"),), ((2, "stack"), (3, "n")), ((5, "k"),)))
    w = np.random.default_rng(0).normal(size=(*lead, 4, 6, 5)).astype(np.float32)
    m = layout.to_matrix(jnp.asarray(w))
    assert m.shape == (*lead, 2, 20, 3)
    # element (stack s, k = (a, b), n) of the matrix is element (a, (s, n), b) of the parameter
    expected = w.reshape(*lead, 4, 2, 3, 5)
    expected = np.moveaxis(expected, [-3, -4, -1, -2], [-4, -3, -2, -1]).reshape(*lead, 2, 20, 3)
    np.testing.assert_array_equal(m, expected)
    np.testing.assert_array_equal(layout.from_matrix(m), w)


def test_layout_refuses_another_shape():
    with pytest.raises(ValueError, match="does not end in"):
        Layout((((4, "k"),), ((6, "n"),))).to_matrix(jnp.zeros((6, 4)))
