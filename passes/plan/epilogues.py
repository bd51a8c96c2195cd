"""`plan_fusions`: what follows a packed product and can run inside its kernel; `carried_out` does it.

What is fused is a region of one body: a dot, or two dots of the same input with weights packed alike (a gate and what
it gates), and elementwise operations after them, as far as only the last value is used elsewhere. Its other operands
are scalars, vectors along the rows or the columns of the product (a bias), or whole arrays (a residual connection).
Calls of `jit` and `custom_jvp` functions that do nothing else (`jax.nn.silu`, `relu`) count as operations; a reduction,
a reshape, a second use of a value ends a region, and a cast to a wider dtype does not end up in one as the last
operation: what reads the result can widen it.

Products of integers (`passes.rewrites.quantized_products`) have regions like others. Where nothing reads the last value
of one but products of integers that quantize it alike, with a range that is known before the call, the region ends in
codes: they go on to those products, and no float is stored. If something else reads it too, it stays float, and the
plan says what that is. (A dynamic range, say of each token, is known only once all of the row is.)

A region is carried out by `fused_matmul`, where its last equation stands. On TPU, and on NVIDIA GPUs in `target_chip`,
that is one kernel; elsewhere it is the program's own operations, bit for bit. Only served models have regions: training
runs none of this.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as prims

from qjax.pallas_kernels.backends.epilogue import DTYPES, OPERATIONS, Constant, Epilogue, Step
from qjax.passes.analysis.sites import Site, Sites
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.plan import decisions
from qjax.passes.plan.decisions import Codes, Fusion, Other, Plan, QuantizedInput, QuantizedSite
from qjax.passes.plan.packed_dots import PackedDot, packed_dots


def plan_fusions(program: Program, sites: Sites, plan: Plan) -> tuple[Fusion, ...]:
    """The regions of a program in which the weights of `plan` are packed, in program order of their bodies.

    Args:
        program, sites: of the call.
        plan: which weights are packed and which inputs quantized; a product of quantized values that is one of floats
            stays by itself.
    """
    found = packed_dots(program, sites, plan)
    quantized: dict[Address, dict[int, QuantizedSite]] = {}
    for site in plan.sites:
        number = site.address[-1]
        assert isinstance(number, int)
        quantized.setdefault(site.address[:-1], {})[number] = site
    bodies = (_Body(address, jaxpr, dots, quantized.get(address, {})) for address, jaxpr, dots in found)
    return tuple(fusion for body in bodies for fusion in body.fusions())


class _Body:
    """The regions of one body."""

    def __init__(self, address: Address, jaxpr: Any, dots: dict[int, PackedDot], quantized: dict[int, QuantizedSite]):
        self.address = address
        self.quantized = quantized
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
        self.dots = {i: dot for i, dot in dots.items() if _is_matrix(self.eqns[i], dot.site)}
        self.taken: set[int] = set()

    def fusions(self) -> list[Fusion]:
        found = []
        by_input: dict[int, list[int]] = collections.defaultdict(list)  # pairs have one: all pairs would be too many
        for i, dot in self.dots.items():
            if not isinstance(dot.site.input, str):
                by_input[dot.site.input.flow].append(i)
        order = {i: place for place, i in enumerate(self.dots)}
        pairs = (pair for dots in by_input.values() for pair in itertools.combinations(dots, 2))
        pairs = sorted(filter(self.are_alike, pairs), key=lambda pair: [order[i] for i in pair])
        for dots in (*pairs, *((dot,) for dot in self.dots)):
            if not self.taken.intersection(dots) and (fusion := self.grow(dots)) is not None:
                self.taken.update(fusion.equations)
                found.append(fusion)
        return sorted(found, key=lambda fusion: fusion.equations)

    def are_alike(self, pair: tuple[int, int]) -> bool:
        """Whether two dots of one input multiply it with weights that are packed alike."""
        one, other = pair
        a, b = self.dots[one], self.dots[other]
        quantized = [q and decisions.key_of(q, q.inputs[0]) for q in (a.quantized, b.quantized)]
        packed = [(dot.entry.spec, dot.entry.layout, dot.entry.order) for dot in (a, b)]
        read = [(dot.site.view.axes, dot.site.view.casts, len(dot.site.view.indexed)) for dot in (a, b)]
        same = all(one == other for one, other in (quantized, packed, read))
        return same and self.eqns[one].params == self.eqns[other].params

    def grow(self, dots: tuple[int, ...]) -> Fusion | None:
        """The longest region after these dots that ends in one value."""
        region = _Region(self, dots)
        pending = [i for dot in dots for i in self.uses[self.eqns[dot].outvars[0]]]
        heapq.heapify(pending)
        best = None
        if len(dots) == 1 and (codes := self.codes(dots[0], self.eqns[dots[0]].outvars[0])[0]):
            best = region.fusion(codes)
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
                best = region.fusion(*self.codes(dots[0], out))
            for use in self.uses[out]:
                heapq.heappush(pending, use)
        return best

    def codes(self, dot: int, out: Any) -> tuple[Codes | None, str]:
        """What a value after this dot is quantized for by all that read it, or None and why it is not."""
        if self.dots[dot].quantized is None:
            return None, ""
        known: dict[Any, tuple[QuantizedSite, QuantizedInput]] = {}
        others = []
        for i in sorted(self.uses[out]):
            site = self.quantized.get(i)
            read = [operand for operand, atom in enumerate(self.eqns[i].invars) if atom is out] if site else []
            entering = [e for e in site.inputs if e.operand in read] if site else []
            if site and site.product == "integer" and len(entering) == len(read):
                known.update((decisions.key_of(site, e), (site, e)) for e in entering)
            else:
                others.append("the result" if i == len(self.eqns) else f"'{_names(self.eqns[i])[0]}'")
        static = [(site, entering) for site, entering in known.values() if entering.range is not None]
        if not static:
            return None, ""
        if others or len(known) > 1:
            reads = f"{', '.join(others)} {'reads' if len(others) == 1 else 'read'} the values too"
            return None, reads if others else "it is quantized in several ways"
        return Codes(*static[0], tuple(sorted(self.uses[out]))), ""

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

    def fusion(self, codes: Codes | None = None, reason: str = "") -> Fusion:
        products, others = len(self.dots), len(self.others)
        if codes:  # scale and zero point
            others += 2 if codes.site.spec.zero_point else 1

        def final(value: Value) -> Value:
            if isinstance(value, Constant):
                return value
            return products - 1 - value if value < 0 else value if value < products else value + others

        operations = [dataclasses.replace(step, operands=tuple(map(final, step.operands))) for step in self.operations]
        last = final(self.values[self.body.eqns[max((*self.dots, *self.steps))].outvars[0]])
        assert isinstance(last, int)
        spec = codes.site.spec if codes else None
        epilogue = Epilogue(self.result.dtype, products, others, tuple(operations), last, spec)
        dots = [self.body.dots[dot] for dot in self.dots]
        return Fusion(
            tuple(s.source if s.number == 0 else f"{s.source}#{s.number}" for s in (dot.site for dot in dots)),
            self.body.address,
            self.dots,
            tuple(self.steps),
            tuple(dict.fromkeys(self.repeats)),
            tuple(self.others),
            epilogue,
            self.batch,
            self.rows,
            tuple(name for i in self.steps for name in _names(self.body.eqns[i])),
            dots[0].quantized,
            codes,
            reason,
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
