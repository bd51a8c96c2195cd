"""`Layout`: what each axis of a parameter does in the matrix that it is multiplied as."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxtyping import Array, Float

Role = Literal["stack", "k", "n"]

ROLES: tuple[Role, ...] = ("stack", "k", "n")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the trailing axes of a parameter map to its canonical matrix `(*stack, K, N)`.

    `axes` lists the trailing axes of the parameter; each is the tuple of its factors `(size, role)`, outer to
    inner (one factor for an axis that no reshape splits). Axes in front of them are stack axes and are not
    listed, so a layout stays true when `scan`, `vmap` or `tree.map(lambda a: a[0])` takes a leading axis away.

    Examples:
        Dense kernel (in, out)              `(((in, "k"),), ((out, "n"),))`
        attention out (heads, dim, out)     `(((heads, "k"),), ((dim, "k"),), ((out, "n"),))`
        experts in the middle (in, E, out)  `(((in, "k"),), ((E, "stack"),), ((out, "n"),))`
    """

    axes: tuple[tuple[tuple[int, Role], ...], ...]

    def sizes(self, role: Role) -> tuple[int, ...]:
        """Sizes of the factors that play `role`, in the parameter's axis order."""
        return tuple(size for axis in self.axes for size, r in axis if r == role)

    @property
    def k(self) -> int:
        """The contracted size K of one matrix."""
        return math.prod(self.sizes("k"))

    @property
    def n(self) -> int:
        """The produced size N of one matrix."""
        return math.prod(self.sizes("n"))

    @property
    def shape(self) -> tuple[int, ...]:
        """The trailing shape of the parameter that the layout covers."""
        return tuple(math.prod(size for size, _ in axis) for axis in self.axes)

    def _order(self) -> tuple[list[int], list[int]]:
        factors = [factor for axis in self.axes for factor in axis]
        order = [i for role in ROLES for i, (_, r) in enumerate(factors) if r == role]
        return [size for size, _ in factors], order

    def to_matrix(self, w: Float[Array, ...]) -> Float[Array, "*stack K N"]:
        """Rearranges a parameter `(*leading, *self.shape)` to its matrix `(*leading, *stack, K, N)`."""
        lead = w.shape[: w.ndim - len(self.axes)]
        if w.shape[len(lead) :] != self.shape:
            raise ValueError(f"qjax: a parameter of shape {w.shape} does not end in the layout's {self.shape}.")
        sizes, order = self._order()
        w = w.reshape(*lead, *sizes)  # (*leading, *factors)
        w = w.transpose(*range(len(lead)), *(len(lead) + i for i in order))
        return w.reshape(*lead, *self.sizes("stack"), self.k, self.n)

    def from_matrix(self, m: Float[Array, "*stack K N"]) -> Float[Array, ...]:
        """The inverse of `to_matrix`."""
        sizes, order = self._order()
        lead = m.shape[: m.ndim - 2 - len(self.sizes("stack"))]
        m = m.reshape(*lead, *(sizes[i] for i in order))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        m = m.transpose(*range(len(lead)), *(len(lead) + i for i in inverse))
        return m.reshape(*lead, *self.shape)

    def to_json(self) -> list:
        """A plain list that `from_json` reads back."""
        return [[list(factor) for factor in axis] for axis in self.axes]

    @staticmethod
    def from_json(data: list) -> Layout:
        """Reads what `to_json` wrote."""
        return Layout(tuple(tuple((int(size), role) for size, role in axis) for axis in data))
