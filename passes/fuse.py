"""`plan_fusions`: what follows a packed product and can run inside its kernel; `carried_out` does it.

What is fused is a region of one body: a dot, or two dots of the same input with weights packed alike (a gate and what
it gates), and elementwise operations after them, as far as only the last value is used elsewhere. Its other operands
are scalars, vectors along the rows or the columns of the product (a bias), or whole arrays (a residual connection).
Calls of `jit` and `custom_jvp` functions that do nothing else (`jax.nn.silu`, `relu`) count as operations; a reduction,
a reshape, a second use of a value ends a region, and a cast to a wider dtype does not end up in one as the last
operation: what reads the result can widen it.

A region is carried out by `fused_matmul`, where its last equation stands. On TPU that is one kernel; elsewhere it is
the program's own operations, bit for bit. Only served models have regions: training runs none of this.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as prims
from jaxtyping import Array

from pallas_kernels.epilogue import DTYPES, OPERATIONS, Constant, Epilogue, Step
from pallas_kernels.fused_matmul import fused_matmul
from pallas_kernels.qtensor import QTensor
from passes import control_flow, lower
from passes.plan import Entry, Plan
from passes.replay import Fused, Ref, as_float
from passes.sites import Address, Site, Sites
from passes.trace import Program


@dataclasses.dataclass(frozen=True)
class Other:
    """An operand of a region that is not one of its products: where it is read, and how it lies in the result.

    Attributes:
        equation, operand: number of the equation in the body, and of its operand.
        axes: the axes of the result that are the axes of the operand; it is repeated along the others.
    """

    equation: int
    operand: int
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The decision to carry out equations of one body as one product.

    Attributes:
        names: of the parameters or folds that are multiplied, one or two.
        body: address of the body.
        dots: numbers of the equations that multiply.
        steps: numbers of the equations after them that become part of it, ascending.
        repeats: numbers of equations that only repeat an operand along axes of the result.
        others: what else the steps read.
        epilogue: the steps as a kernel runs them.
        batch, rows: how many axes of the result come from axes that both operands have, and how many from x alone.
        operations: the steps as the plan prints them.
    """

    names: tuple[str, ...]
    body: Address
    dots: tuple[int, ...]
    steps: tuple[int, ...]
    repeats: tuple[int, ...]
    others: tuple[Other, ...]
    epilogue: Epilogue
    batch: int
    rows: int
    operations: tuple[str, ...]

    @property
    def equations(self) -> tuple[int, ...]:
        """The equations that are carried out together, ascending."""
        return tuple(sorted((*self.dots, *self.steps)))

    def __str__(self) -> str:
        return f"{', '.join(self.names)}: {', '.join(self.operations)}"


# --- The decision ------------------------------------------------------------------------------------------------


def plan_fusions(program: Program, sites: Sites, plan: Plan) -> tuple[Fusion, ...]:
    """The regions of a program in which the weights of `plan` are packed, in program order of their bodies.

    Args:
        program, sites: of the call.
        plan: which weights are packed and which inputs quantized; a product of quantized inputs stays by itself.
    """
    found = packed_dots(program, sites, plan)
    return tuple(fusion for address, jaxpr, dots in found for fusion in _Body(address, jaxpr, dots).fusions())


def packed_dots(
    program: Program, sites: Sites, plan: Plan
) -> Iterator[tuple[Address, Any, dict[int, tuple[Site, Entry]]]]:
    """The dots of float inputs and packed weights: address and jaxpr of each body that has some, and they by number."""
    quantized = {site.address for site in plan.sites}
    dots: dict[Address, dict[int, tuple[Site, Entry]]] = {}
    for site in sites.sites:
        entry = plan[site.source]
        alone = entry.spec is None or entry.layout != site.layout or site.address in quantized
        if site.op == "dot" and not alone and "shard_map" not in site.address:
            number = site.address[-1]
            assert isinstance(number, int)
            dots.setdefault(site.address[:-1], {})[number] = site, entry
    for address, jaxpr in _bodies(program.jaxpr, (), {body[:i] for body in dots for i in range(len(body) + 1)}):
        if address in dots:
            yield address, jaxpr, dots[address]


def _bodies(jaxpr: Any, address: Address, wanted: set[Address]) -> Iterator[tuple[Address, Any]]:
    """The bodies at the wanted addresses and on the way to them."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    yield address, jaxpr
    for i, eqn in enumerate(jaxpr.eqns):
        if (*address, i) in wanted:
            for body in control_flow.bodies(eqn):
                if (*address, i, body.name) in wanted:
                    yield from _bodies(body.jaxpr, (*address, i, body.name), wanted)


class _Body:
    """The regions of one body."""

    def __init__(self, address: Address, jaxpr: Any, dots: dict[int, tuple[Site, Entry]]):
        self.address = address
        self.eqns = jaxpr.eqns
        self.producer = {v: i for i, eqn in enumerate(self.eqns) for v in eqn.outvars}
        self.uses: dict[Any, set[int]] = collections.defaultdict(set)
        for i, eqn in enumerate(self.eqns):
            for v in eqn.invars:
                if not isinstance(v, Literal):
                    self.uses[v].add(i)
        for v in jaxpr.outvars:
            if not isinstance(v, Literal):
                self.uses[v].add(len(self.eqns))
        self.dots = {i: dot for i, dot in dots.items() if _is_matrix(self.eqns[i], dot[0])}
        self.taken: set[int] = set()

    def fusions(self) -> list[Fusion]:
        pairs = [pair for pair in itertools.combinations(self.dots, 2) if self.are_alike(*pair)]
        found = []
        for dots in (*pairs, *((dot,) for dot in self.dots)):
            if not self.taken.intersection(dots) and (fusion := self.grow(dots)) is not None:
                self.taken.update(fusion.equations)
                found.append(fusion)
        return sorted(found, key=lambda fusion: fusion.equations)

    def are_alike(self, one: int, other: int) -> bool:
        """Whether two dots multiply one input with weights that are packed alike."""
        (a, entry), (b, other_entry) = self.dots[one], self.dots[other]
        same_input = not isinstance(a.input, str) and not isinstance(b.input, str) and a.input.flow == b.input.flow
        packed = (entry.spec, entry.layout, entry.order) == (other_entry.spec, other_entry.layout, other_entry.order)
        read = (a.view.axes, a.view.casts, len(a.view.indexed)) == (b.view.axes, b.view.casts, len(b.view.indexed))
        return same_input and packed and read and self.eqns[one].params == self.eqns[other].params

    def grow(self, dots: tuple[int, ...]) -> Fusion | None:
        """The longest region after these dots that ends in one value."""
        region = _Region(self, dots)
        pending = [i for dot in dots for i in self.uses[self.eqns[dot].outvars[0]]]
        heapq.heapify(pending)
        best = None
        while pending:
            i = heapq.heappop(pending)
            if i in region.steps:
                continue
            if i == len(self.eqns) or i in self.dots or i in self.taken or not region.add(i):
                break
            out = self.eqns[i].outvars[0]
            if self.is_closed(dots, region.steps) and not (
                _widens(self.eqns[i]) and len(self.eqns) not in self.uses[out]
            ):
                best = region.fusion()
            for use in self.uses[out]:
                heapq.heappush(pending, use)
        return best

    def is_closed(self, dots: tuple[int, ...], steps: Sequence[int]) -> bool:
        """Whether all values but that of the last step are used, and only by steps."""
        inner = (self.uses[self.eqns[i].outvars[0]] for i in (*dots, *steps[:-1]))
        return all(uses and uses.issubset(steps) for uses in inner)


def _is_matrix(eqn: Any, site: Site) -> bool:
    """Whether the result of a dot is that of the packed matrix in another shape, none of its axes moved."""
    if site.operand != 1:
        return False
    _, (_, batch) = eqn.params["dimension_numbers"]
    free = [i for i, role in enumerate(site.roles) if role == "n"]
    groups = [[atom for i in axes for atom in site.view.axes[i]] for axes in (batch, free)]
    in_order = all(atoms == sorted(atoms, key=lambda a: (a.axis, -a.inner)) for atoms in groups)
    return in_order and eqn.params.get("out_sharding") is None and eqn.outvars[0].aval.dtype in DTYPES


def _widens(eqn: Any) -> bool:
    """Whether an equation only casts to a wider dtype."""
    out, first = eqn.outvars[0].aval, eqn.invars[0].aval
    return eqn.primitive is prims.convert_element_type_p and out.dtype.itemsize > first.dtype.itemsize


Value = int | Constant
"""While a region grows: a product (from 0 on), a step (after those), another operand (-1, -2, ...), or a constant."""


class _Region:
    """A region that grows, and its epilogue."""

    def __init__(self, body: _Body, dots: tuple[int, ...]):
        self.body, self.dots = body, dots
        self.result = body.eqns[dots[0]].outvars[0].aval
        (x_contract, _), (x_batch, _) = body.eqns[dots[0]].params["dimension_numbers"]
        self.batch = len(x_batch)
        self.rows = len(body.eqns[dots[0]].invars[0].aval.shape) - len(x_contract) - self.batch
        self.values: dict[Any, Value] = {body.eqns[dot].outvars[0]: i for i, dot in enumerate(dots)}
        self.steps: list[int] = []
        self.repeats: list[int] = []
        self.others: list[Other] = []
        self.operations: list[Step] = []

    def add(self, number: int) -> bool:
        """Takes an equation in; False for one that cannot be."""
        eqn = self.body.eqns[number]
        others, repeats, operations = list(self.others), list(self.repeats), list(self.operations)
        values: dict[Any, Any] = {}
        operands: list[Value] = []
        for i, atom in enumerate(eqn.invars):
            value = _literal(atom) if isinstance(atom, Literal) else self.values.get(atom, values.get(atom))
            if value is None and not isinstance(atom, Literal):
                other, repeated = self.other(number, i)
                if repeated is not None:
                    repeats.append(repeated)
                if isinstance(other, Other):
                    others.append(other)
                    other = -len(others)
                value = values[atom] = other
            if value is None:
                return False
            operands.append(value)
        out = self.flatten(eqn, operands, operations) if len(eqn.outvars) == 1 else None
        if not isinstance(out, int) or out < 0 or eqn.outvars[0].aval.shape != self.result.shape:
            return False
        self.others, self.repeats, self.operations = others, repeats, operations
        self.values.update(values)
        self.values[eqn.outvars[0]] = out
        self.steps.append(number)
        return True

    def other(self, number: int, operand: int) -> tuple[Other | Constant | None, int | None]:
        """An operand from outside, and the equation that only repeats it along axes of the result, if one does."""
        atom = self.body.eqns[number].invars[operand]
        other, repeated = Other(number, operand, tuple(range(atom.aval.ndim))), None
        producer = self.body.producer.get(atom)
        if producer is not None and self.body.eqns[producer].primitive is prims.broadcast_in_dim_p:
            eqn, repeated = self.body.eqns[producer], producer
            atom = eqn.invars[0]
            if isinstance(atom, Literal):
                return _literal(atom), repeated
            other = Other(producer, 0, tuple(eqn.params["broadcast_dimensions"]))
        elif atom.aval.ndim not in (0, self.result.ndim):
            return None, None
        shape = padded(atom.aval.shape, other.axes, self.result.ndim)
        fits = atom.aval.dtype in DTYPES and matrix_form(shape, self.result.shape, self.batch, self.rows) is not None
        return (other if fits else None), repeated

    def flatten(self, eqn: Any, operands: list[Value], operations: list[Step]) -> Value | None:
        """Appends the operations of an equation and gives the value of its result; None for one that has others."""
        (out,) = (v.aval for v in eqn.outvars)
        if out.shape not in (self.result.shape, ()):
            return None
        if eqn.primitive is prims.broadcast_in_dim_p:
            return operands[0] if eqn.invars[0].aval.shape in (out.shape, ()) else None
        if eqn.primitive in OPERATIONS:
            if eqn.primitive is prims.convert_element_type_p and isinstance(operands[0], Constant):
                return _constant(operands[0].value, out.dtype)
            dtypes = [out.dtype, *(v.aval.dtype for v in eqn.invars)]
            if any(dtype not in (*DTYPES, np.dtype(bool)) for dtype in dtypes):
                return None
            if eqn.primitive is prims.convert_element_type_p and out.dtype == np.dtype(bool):
                return None
            if eqn.params.get("out_dtype") is not None:
                return None
            params = tuple(sorted(eqn.params.items()))
            operations.append(Step(eqn.primitive, tuple(operands), params, out.dtype))
            return len(self.dots) + len(operations) - 1
        if not (control_flow.is_plain_jit(eqn) or eqn.primitive is prims.custom_jvp_call_p):
            return None
        (body,) = control_flow.bodies(eqn)
        inner = getattr(body.jaxpr, "jaxpr", body.jaxpr)
        if control_flow.consts_of(body.jaxpr) or len(inner.outvars) != 1:
            return None
        values: dict[Any, Value] = dict(zip(inner.invars, operands, strict=True))

        def read(atom: Any) -> Value | None:
            return _literal(atom) if isinstance(atom, Literal) else values[atom]

        for step in inner.eqns:
            given = [value for atom in step.invars if (value := read(atom)) is not None]
            if len(step.outvars) != 1 or len(given) < len(step.invars):
                return None
            value = self.flatten(step, given, operations)
            if value is None:
                return None
            values[step.outvars[0]] = value
        return read(inner.outvars[0])

    def fusion(self) -> Fusion:
        products, others = len(self.dots), len(self.others)

        def final(value: Value) -> Value:
            if isinstance(value, Constant):
                return value
            return products - 1 - value if value < 0 else value if value < products else value + others

        operations = [dataclasses.replace(step, operands=tuple(map(final, step.operands))) for step in self.operations]
        last = final(self.values[self.body.eqns[self.steps[-1]].outvars[0]])
        assert isinstance(last, int)
        epilogue = Epilogue(self.result.dtype, products, others, tuple(operations), last)
        sites = [self.body.dots[dot][0] for dot in self.dots]
        return Fusion(
            tuple(s.source if s.number == 0 else f"{s.source}#{s.number}" for s in sites),
            self.body.address,
            self.dots,
            tuple(self.steps),
            tuple(dict.fromkeys(self.repeats)),
            tuple(self.others),
            epilogue,
            self.batch,
            self.rows,
            tuple(name for i in self.steps for name in _names(self.body.eqns[i])),
        )


def _names(eqn: Any) -> list[str]:
    """An operation as the plan prints it: a function by its name, or by what is in it."""
    inner = [] if "name" in eqn.params else control_flow.bodies(eqn)
    names = [name for body in inner for step in getattr(body.jaxpr, "jaxpr", body.jaxpr).eqns for name in _names(step)]
    return names or [str(eqn.params.get("name", eqn.primitive.name))]


def _constant(value: Any, dtype: Any) -> Constant:
    return Constant(np.asarray(value).astype(dtype).item(), np.dtype(dtype))


def _literal(atom: Any) -> Constant | None:
    return _constant(atom.val, atom.aval.dtype) if atom.aval.shape == () else None


Shape = tuple[Any, ...]
"""Sizes, which `jax.export` may know by name only."""


def padded(shape: Shape, axes: Sequence[int], ndim: int) -> Shape:
    """The shape of an operand with as many axes as the result, 1 along those that it has not."""
    sizes = dict(zip(axes, shape, strict=True))
    return tuple(sizes.get(axis, 1) for axis in range(ndim))


def matrix_form(shape: Shape, result: Shape, batch: int, rows: int) -> Shape | None:
    """The shape `(stack or 1, M or 1, N or 1)` of an operand beside a product, or None if it is no such thing.

    Args:
        shape: of the operand, with as many axes as the result.
        result: of the product as the program has it: axes of the stack, of the rows, of the columns.
        batch, rows: how many axes the stack and the rows have.
    """
    groups = [slice(*ends) for ends in itertools.pairwise((0, batch, batch + rows, len(result)))]
    if any(shape[group] != result[group] and any(size != 1 for size in shape[group]) for group in groups):
        return None
    return tuple(math.prod(shape[group]) for group in groups)


# --- Carrying out ------------------------------------------------------------------------------------------------


def packed_forms(
    dots: Sequence[Any], operands: Sequence[int], read: Callable[[Any], Any]
) -> list[tuple[Ref, lower.DotForm]] | None:
    """The weights of dots and how they are multiplied; None where one is not packed, or for another reading.

    Args:
        dots: equations.
        operands: for each, which operand is the weight.
        read: the value of an atom.
    """
    refs = [read(eqn.invars[operand]) for eqn, operand in zip(dots, operands, strict=True)]
    if any(not isinstance(r, Ref) or not isinstance(r.base, QTensor) or r.shadow is not None for r in refs):
        return None
    forms = [lower.dot_form(eqn, ref, operand) for eqn, ref, operand in zip(dots, refs, operands, strict=True)]
    pairs = [(ref, form) for ref, form in zip(refs, forms, strict=True) if form is not None]
    return pairs if len(pairs) == len(dots) else None


def carried_out(fusion: Fusion) -> Fused:
    """What `passes.replay` does in place of the equations of a region."""

    def rule(eqns: Sequence[Any], read: Any) -> list[Array] | None:
        dots = [eqns[i] for i in fusion.dots]
        packed = packed_forms(dots, [1] * len(dots), read)
        if packed is None:
            return None
        (ref, *_), forms = zip(*packed, strict=True)
        atoms = [eqns[other.equation].invars[other.operand] for other in fusion.others]
        x, *others = (as_float(read(atom)) for atom in (dots[0].invars[0], *atoms))
        result = dots[0].outvars[0].aval.shape
        shapes = [padded(a.aval.shape, o.axes, len(result)) for a, o in zip(atoms, fusion.others, strict=True)]

        def program(products: Sequence[Array], others: Sequence[Array]) -> Array:
            values: dict[Any, Any] = dict(zip(atoms, others, strict=True))
            values.update((e.outvars[0], f.result(p)) for e, f, p in zip(dots, forms, products, strict=True))
            for i in sorted((*fusion.repeats, *fusion.steps)):
                operands = [a.val if isinstance(a, Literal) else values[a] for a in eqns[i].invars]
                values[eqns[i].outvars[0]] = control_flow.bind(eqns[i], operands)[0]
            return values[eqns[fusion.steps[-1]].outvars[0]]

        out = fused_matmul(
            forms[0].rows(x),
            [form.weight for form in forms],
            others,
            layers=[form.layer for form in forms],
            casts=ref.view.casts,
            precision=dots[0].params["precision"],
            preferred_element_type=dots[0].params["preferred_element_type"],
            epilogue=fusion.epilogue,
            shapes=[_matrix_form(shape, result, fusion) for shape in shapes],
            program=program,
        )
        return [out]

    return Fused(fusion.body, fusion.equations, rule, place=fusion.equations[-1], reads=fusion.repeats)


def _matrix_form(shape: Shape, result: Shape, fusion: Fusion) -> Shape:
    form = matrix_form(shape, result, fusion.batch, fusion.rows)
    assert form is not None  # the plan saw to it
    return form
