"""`View`: a parameter as a program sees it after casts, transposes, reshapes and indexing.

A view is pure data movement plus casts, so it is kept as arithmetic on axes instead of as equations: an axis of
the parameter is a list of factors (`Atom`), an axis of the view is a list of atoms, and an axis that a scan or an
index took away is remembered as indexed. That is enough to say which part of the parameter is contracted by a
matmul (`View.layout`), to slice a packed tensor instead of a float one, and to redo the movement on any array
(`View.apply`). `passes.jaxpr.moves` has the operations that keep a view a view.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qjax.pallas_kernels.packed.layout import Layout, Role


@dataclasses.dataclass(frozen=True)
class Atom:
    """A factor of one parameter axis: `size` steps, each `inner` elements of that axis apart."""

    axis: int
    inner: int
    size: int

    def split(self, outer: int) -> tuple[Atom, Atom]:
        """The factors `outer` and `size // outer`, outer first."""
        rest = self.size // outer
        return Atom(self.axis, self.inner * rest, outer), Atom(self.axis, self.inner, rest)


Axis = tuple[Atom, ...]  # one axis of a view, outer to inner; () for an axis of size 1


def _size(axis: Axis) -> int:
    return math.prod(atom.size for atom in axis)


def _coalesce(atoms: Sequence[Atom]) -> Axis:
    """Joins neighbouring factors of one parameter axis that a split had separated."""
    out: list[Atom] = []
    for atom in atoms:
        if out and out[-1].axis == atom.axis and out[-1].inner == atom.inner * atom.size:
            out[-1] = Atom(atom.axis, atom.inner, out[-1].size * atom.size)
        else:
            out.append(atom)
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Index:
    """An axis that was taken away by picking one element: `key` says by what (a loop, a constant, a value)."""

    atom: Atom
    key: Any


@dataclasses.dataclass(frozen=True)
class View:
    """How a value is read out of a parameter of shape `base`.

    Attributes:
        base: shape of the parameter.
        axes: the axes of the value, each a list of factors of parameter axes.
        indexed: the axes that were picked away, in the order in which it happened.
        casts: the dtypes the value was cast to, in order (f32 -> bf16 -> f32 is not the identity).
    """

    base: tuple[int, ...]
    axes: tuple[Axis, ...]
    indexed: tuple[Index, ...] = ()
    casts: tuple[Any, ...] = ()

    @staticmethod
    def identity(shape: Sequence[int]) -> View:
        """The parameter itself."""
        axes = tuple((Atom(i, 1, n),) if n != 1 else () for i, n in enumerate(shape))
        return View(tuple(shape), axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(_size(axis) for axis in self.axes)

    @property
    def is_identity(self) -> bool:
        """Whether the value is the parameter, untouched."""
        return self == View.identity(self.base)

    def transpose(self, permutation: Sequence[int]) -> View:
        """The view with its axes permuted."""
        return dataclasses.replace(self, axes=tuple(self.axes[i] for i in permutation))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The view in a new shape, or None where an axis would be cut across its factors."""
        queue = [atom for axis in self.axes for atom in axis]
        axes: list[Axis] = []
        for size in shape:
            axis: list[Atom] = []
            while size > 1:
                if not queue:
                    return None
                atom = queue.pop(0)
                if size % atom.size == 0:
                    axis.append(atom)
                    size //= atom.size
                elif atom.size % size == 0:
                    outer, inner = atom.split(size)
                    axis.append(outer)
                    queue.insert(0, inner)
                    size = 1
                else:
                    return None
            axes.append(_coalesce(axis))
        return dataclasses.replace(self, axes=tuple(axes)) if not queue else None

    def cast(self, dtype: Any) -> View:
        """The view in another dtype."""
        return dataclasses.replace(self, casts=(*self.casts, jnp.dtype(dtype)))

    def index(self, axis: int, key: Any, *, keep: bool = False) -> View | None:
        """One element of `axis`, which goes away (or stays with size 1); None if it mixes parameter axes."""
        atoms = self.axes[axis]
        if len(atoms) > 1:
            return None
        rest = (*self.axes[:axis], *(((),) if keep else ()), *self.axes[axis + 1 :])
        taken = tuple(Index(atom, key) for atom in atoms)  # nothing to pick from an axis of size 1
        return dataclasses.replace(self, axes=rest, indexed=self.indexed + taken)

    def layout(self, roles: Sequence[Role]) -> Layout | None:
        """The layout of the parameter when axis i of this view plays `roles[i]`; indexed axes are stack.

        Leading axes that are stack as a whole are left out of the layout. None where a parameter axis was cut
        into factors in another order than it holds them.
        """
        found: list[tuple[Atom, Any]] = [(index.atom, "stack") for index in self.indexed]
        found += [(atom, role) for axis, role in zip(self.axes, roles, strict=True) for atom in axis]
        axes = []
        for i, size in enumerate(self.base):
            factors = sorted((f for f in found if f[0].axis == i), key=lambda f: -f[0].inner)
            merged: list[tuple[int, Role]] = []
            expect = size
            for atom, role in factors:
                if atom.inner * atom.size != expect:
                    return None
                expect = atom.inner
                if merged and merged[-1][1] == role:
                    merged[-1] = (merged[-1][0] * atom.size, role)
                else:
                    merged.append((atom.size, role))
            if expect != 1:
                return None
            axes.append(tuple(merged))
        while axes and len(axes[0]) == 1 and axes[0][0][1] == "stack":
            axes.pop(0)
        return Layout(tuple(axes))

    def apply(self, w: Array, indices: Sequence[Array | int] = ()) -> Array:
        """Redoes the movement on an array of shape `base`; `indices` has one entry per indexed axis."""
        for dtype in self.casts:
            w = w.astype(dtype)
        atoms = [index.atom for index in self.indexed] + [atom for axis in self.axes for atom in axis]
        order = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].inner))
        w = w.reshape([atoms[i].size for i in order])  # every atom an axis, in the parameter's order
        w = w.transpose(sorted(range(len(order)), key=order.__getitem__))  # indexed atoms first, then the axes
        for index in indices:
            w = lax.dynamic_index_in_dim(w, index, 0, keepdims=False)
        return w.reshape(self.shape)
