"""`plan_attention`: scores, a softmax and a product with the values, on packed key-value caches, as one operation.

Equations of one body of the program are matched by their form alone:

    dot_general; transposes, casts, products with numbers, at most one `jnp.where(mask, scores, number)`;
    `jax.nn.softmax` over the last axis; casts; dot_general

where nothing else reads what is between, the first dot reads the codes of packed keys and the last those of packed
values (`CachePlan.dots`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import primitives as prims

from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.plan.decisions import Attention, CachePlan


def plan_attention(
    program: Program, caches: CachePlan, without: Collection[Address] = (), names: Mapping[Address, str] | None = None
) -> tuple[Attention, ...]:
    """Attention whose keys and values are packed caches, in every body of a program.

    Args:
        program: of the call.
        caches: what is decided about its state.
        without: equations that something else is done to.
        names: of the matmuls of activations, by address.
    """
    return tuple(_found(program.jaxpr, (), caches, frozenset(without), names or {}))


def _found(
    jaxpr: Any, body: Address, caches: CachePlan, without: frozenset[Address], names: Mapping[Address, str]
) -> Iterator[Attention]:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    readers: dict[Any, list[int]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if not isinstance(atom, JaxprLiteral):
                readers.setdefault(atom, []).append(i)
        for inner in control_flow.bodies(eqn):
            yield from _found(inner.jaxpr, (*body, i, inner.name), caches, without, names)
    for atom in jaxpr.outvars:
        if not isinstance(atom, JaxprLiteral):
            readers.setdefault(atom, []).append(len(jaxpr.eqns))
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive is prims.dot_general_p:
            found = _Match(jaxpr.eqns, readers, body, caches).attention(i)
            if found is not None and not any((*body, number) in without for number in found.equations):
                products = ((*body, found.scores), (*body, found.result))
                yield dataclasses.replace(found, names=tuple(names[a] for a in products if a in names))


class _NoMatch(Exception):
    """The equations are something else."""


class _Match:
    """Follows one value from a dot on."""

    def __init__(self, eqns: Any, readers: dict[Any, list[int]], body: Address, caches: CachePlan):
        self.eqns, self.readers, self.body, self.caches = eqns, readers, body, caches
        self.taken: list[int] = []

    def attention(self, scores: int) -> Attention | None:
        """What begins with this dot."""
        try:
            return self.match(scores)
        except _NoMatch:
            return None

    def reading(self, number: int, operand: int) -> str | None:
        """How a dot reads the codes of a cache, if it does."""
        return self.caches.dots.get(((*self.body, number), operand))

    def place(self, value: Any) -> tuple[int, int]:
        """An equation and its operand that is this value."""
        return next((i, j) for i in self.taken for j, atom in enumerate(self.eqns[i].invars) if atom is value)

    def match(self, scores: int) -> Attention:
        keys = [operand for operand in (0, 1) if self.reading(scores, operand) == "scores"]
        if len(keys) != 1 or self.reading(scores, 1 - keys[0]) is not None:
            raise _NoMatch
        self.taken.append(scores)
        value = self.eqns[scores].outvars[0]
        order, steps, mask = tuple(range(len(value.aval.shape))), [], None
        while len(self.all_readers(value)) == 1:
            eqn = self.reader(value)
            if mask is None and eqn.primitive is prims.transpose_p:
                order = tuple(order[i] for i in eqn.params["permutation"])
            elif eqn.primitive is prims.convert_element_type_p:
                steps.append(("cast", self.float_cast(eqn)))
            elif eqn.primitive in (prims.mul_p, prims.div_p):
                steps.append(self.number(eqn, value))
            elif mask is None and eqn.primitive is prims.jit_p:
                mask, other, moved = self.where(eqn, value)
                order = tuple(order[i] for i in moved)
                steps.append(("mask", other))
            else:
                raise _NoMatch
            value = eqn.outvars[0]
        value = self.softmax(value)
        while (eqn := self.reader(value)).primitive is prims.convert_element_type_p:
            self.float_cast(eqn)
            value = eqn.outvars[0]
        if eqn.primitive is not prims.dot_general_p or [*eqn.invars].count(value) != 1:
            raise _NoMatch
        result, weights = self.taken[-1], [*eqn.invars].index(value)
        if self.reading(result, 1 - weights) != "values":
            raise _NoMatch
        return Attention(
            self.body,
            tuple(sorted(self.taken)),
            scores,
            result,
            weights,
            order,
            tuple(steps),
            keys[0],
            None if mask is None else self.place(mask),
            jnp.dtype(value.aval.dtype),
        )

    def all_readers(self, value: Any) -> list[int]:
        return self.readers.get(value, [])

    def reader(self, value: Any) -> Any:
        """The one equation that reads a value; it is taken."""
        numbers = self.all_readers(value)
        if len(numbers) != 1 or numbers[0] == len(self.eqns):
            raise _NoMatch
        self.taken.append(numbers[0])
        return self.eqns[numbers[0]]

    def expect(self, eqn: Any, primitive: Any) -> Any:
        """The result of an equation that has to be of this form."""
        if eqn.primitive is not primitive:
            raise _NoMatch
        return eqn.outvars[0]

    def float_cast(self, eqn: Any) -> jnp.dtype:
        dtype = jnp.dtype(eqn.params["new_dtype"])
        if not jnp.issubdtype(dtype, jnp.floating):
            raise _NoMatch
        return dtype

    def number(self, eqn: Any, value: Any) -> tuple[str, float]:
        """A product with a number, or a quotient."""
        left, right = eqn.invars
        division = eqn.primitive is prims.div_p
        other = right if left is value else left
        if not isinstance(other, JaxprLiteral) or np.ndim(other.val) or (division and left is not value):
            raise _NoMatch
        return ("divide" if division else "multiply"), float(other.val)

    def where(self, eqn: Any, value: Any) -> tuple[Any, float, tuple[int, ...]]:
        """The mask and the number of `jnp.where(mask, value, number)`, and how it orders the axes of the value."""
        inner = control_flow.bodies(eqn)[0].jaxpr
        inner = getattr(inner, "jaxpr", inner)
        outer: dict[Any, Any] = dict(zip(inner.invars, eqn.invars, strict=True))
        order = tuple(range(len(value.aval.shape)))

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, JaxprLiteral) else outer[atom]

        for step in inner.eqns[:-1]:
            given = read(step.invars[0])
            if given is value:
                self.expect(step, prims.transpose_p)
                order = tuple(order[i] for i in step.params["permutation"])
            elif step.primitive is prims.ne_p:  # a mask of numbers
                if not isinstance(step.invars[1], JaxprLiteral) or step.invars[1].val != 0:
                    raise _NoMatch
            elif not isinstance(given, JaxprLiteral):  # the mask
                shape, out = given.aval.shape, self.expect(step, prims.broadcast_in_dim_p).aval.shape
                if tuple(step.params["broadcast_dimensions"]) != tuple(range(len(out) - len(shape), len(out))):
                    raise _NoMatch
            elif step.primitive not in (prims.broadcast_in_dim_p, prims.convert_element_type_p):
                raise _NoMatch
            outer[step.outvars[0]] = given
        last = inner.eqns[-1]
        if last.primitive is not prims.select_n_p or len(last.invars) != 3 or [*inner.outvars] != [*last.outvars]:
            raise _NoMatch
        mask, other, kept = map(read, last.invars)
        if kept is not value or not isinstance(other, JaxprLiteral) or isinstance(mask, JaxprLiteral):
            raise _NoMatch
        if last.invars[0].aval.dtype != bool:
            raise _NoMatch
        return mask, float(other.val), order

    def softmax(self, value: Any) -> Any:
        """The result of `jax.nn.softmax(value)`."""
        axes = (len(value.aval.shape) - 1,)
        reduction, exponent = self.one_of(value, prims.reduce_max_p), self.one_of(value, prims.sub_p)
        self.both(value)
        for eqn in self.until(self.reduced(reduction, axes), exponent):
            least = eqn.primitive is prims.max_p and self.is_least(eqn)
            if not least and eqn.primitive is not prims.stop_gradient_p and not self.spreads(eqn):
                raise _NoMatch
        weights = self.expect(self.reader(exponent.outvars[0]), prims.exp_p)
        quotient = self.one_of(weights, prims.div_p)
        self.both(weights)
        (reduction,) = (self.eqns[i] for i in self.all_readers(weights) if self.eqns[i] is not quotient)
        if reduction.primitive is prims.convert_element_type_p:  # sums are in float32
            self.float_cast(reduction)
            reduction = self.reader(reduction.outvars[0])
        self.expect(reduction, prims.reduce_sum_p)
        for eqn in self.until(self.reduced(reduction, axes), quotient):
            if eqn.primitive is not prims.convert_element_type_p and not self.spreads(eqn):
                raise _NoMatch
        if exponent.invars[0] is not value or quotient.invars[0] is not weights:
            raise _NoMatch
        return quotient.outvars[0]

    def reduced(self, eqn: Any, axes: tuple[int, ...]) -> Any:
        """The result of a reduction over these axes."""
        if tuple(eqn.params["axes"]) != axes:
            raise _NoMatch
        return eqn.outvars[0]

    def one_of(self, value: Any, primitive: Any) -> Any:
        """The reader of this form."""
        eqns = [self.eqns[i] for i in self.all_readers(value) if i < len(self.eqns)]
        matching = [eqn for eqn in eqns if eqn.primitive is primitive]
        if len(matching) != 1:
            raise _NoMatch
        return matching[0]

    def both(self, value: Any) -> None:
        """Takes two readers of a value, which must be all."""
        numbers = self.all_readers(value)
        if len(numbers) != 2:
            raise _NoMatch
        self.taken += numbers

    def until(self, value: Any, end: Any) -> Iterator[Any]:
        """The equations between a value and one that reads what comes of it."""
        while True:
            numbers = self.all_readers(value)
            if len(numbers) != 1 or numbers[0] == len(self.eqns):
                raise _NoMatch
            eqn = self.eqns[numbers[0]]
            if eqn is end:
                return
            self.taken.append(numbers[0])
            yield eqn
            value = eqn.outvars[0]

    def spreads(self, eqn: Any) -> bool:
        """Whether it puts the one number of each row along the row: the axes before the last stay where they are."""
        shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        if eqn.primitive is prims.reshape_p:
            return out == (*shape, 1)
        leading = tuple(range(len(shape)))
        return eqn.primitive is prims.broadcast_in_dim_p and tuple(eqn.params["broadcast_dimensions"]) == leading

    def is_least(self, eqn: Any) -> bool:
        """Whether one operand is -inf."""
        return any(isinstance(atom, JaxprLiteral) and atom.val == -np.inf for atom in eqn.invars)
