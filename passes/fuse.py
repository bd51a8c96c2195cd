"""`plan_fusions`: what follows a packed product and can run inside its kernel; `carried_out` does it.

What is fused is a region of one body: a dot, or two dots of the same input with weights packed alike (a gate and what
it gates), and elementwise operations after them, as far as only the last value is used elsewhere. Its other operands
are scalars, vectors along the rows or the columns of the product (a bias), or whole arrays (a residual connection).
Calls of `jit` and `custom_jvp` functions that do nothing else (`jax.nn.silu`, `relu`) count as operations; a reduction,
a reshape, a second use of a value ends a region, and a cast to a wider dtype does not end up in one as the last
operation: what reads the result can widen it.

Products of integers (`passes.integer`) have regions like others. Where nothing reads the last value of one but products
of integers that quantize it alike, with a range that is known before the call, the region ends in codes: they go on to
those products, and no float is stored. If something else reads it too, it stays float, and the plan says what that is.
(A dynamic range, say of each token, is known only once all of the row is.)

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as prims
from jaxtyping import Array

from pallas_kernels import activations
from pallas_kernels.activations import Activation
from pallas_kernels.epilogue import DTYPES, OPERATIONS, Constant, Epilogue, Step
from pallas_kernels.fused_matmul import fused_matmul
from pallas_kernels.integer_matmul import integer_matmul
from pallas_kernels.matmul import quantized_matmul
from pallas_kernels.qtensor import QTensor
from passes import control_flow, integer, lower
from passes.plan import Entry, Plan, QuantizedInput, QuantizedSite
from passes.replay import Fused, Ref, Scope, as_float
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
class Codes:
    """What the result of a region is quantized for.

    Attributes:
        site: one of the equations that read it, the decision for it.
        entering: the operand that it is there.
        readers: numbers of all of these equations.
    """

    site: QuantizedSite
    entering: QuantizedInput
    readers: tuple[int, ...]


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
        site: the decision for the input, where integers are multiplied; that of the first dot.
        codes: what the result is quantized for, or None where it is float.
        reason: why it is float though an equation that reads it has a range for it; empty if there is no such.
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
    site: QuantizedSite | None = None
    codes: Codes | None = None
    reason: str = ""

    @property
    def equations(self) -> tuple[int, ...]:
        """The equations that are carried out together, ascending."""
        return tuple(sorted((*self.dots, *self.steps)))

    @property
    def multiplying(self) -> list[Address]:
        """Addresses of the equations whose products have to be what the plan says they are."""
        return [(*self.body, i) for i in (*self.dots, *(self.codes.readers if self.codes else ()))]

    def __str__(self) -> str:
        operations = ", ".join([*self.operations, *(["quantize"] if self.codes else [])])
        return f"{', '.join(self.names)}: {operations}" + (f" (not quantize: {self.reason})" if self.reason else "")


# --- The decision ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dot:
    """A dot with a packed weight.

    Attributes:
        site, entry: the weight, and the decision for it.
        quantized: the decision for the other operand, where integers are multiplied.
    """

    site: Site
    entry: Entry
    quantized: QuantizedSite | None


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


def packed_dots(program: Program, sites: Sites, plan: Plan) -> Iterator[tuple[Address, Any, dict[int, Dot]]]:
    """The dots of packed weights: address and jaxpr of each body that has some, and they by number."""
    quantized = {site.address: site for site in plan.sites}
    dots: dict[Address, dict[int, Dot]] = {}
    for site in sites.sites:
        entry, inputs = plan[site.source], quantized.get(site.address)
        alone = entry.spec is None or entry.layout != site.layout or (inputs and inputs.product != "integer")
        if site.op == "dot" and not alone and "shard_map" not in site.address:
            number = site.address[-1]
            assert isinstance(number, int)
            dots.setdefault(site.address[:-1], {})[number] = Dot(site, entry, inputs)
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

    def __init__(self, address: Address, jaxpr: Any, dots: dict[int, Dot], quantized: dict[int, QuantizedSite]):
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
        pairs = [pair for pair in itertools.combinations(self.dots, 2) if self.are_alike(*pair)]
        found = []
        for dots in (*pairs, *((dot,) for dot in self.dots)):
            if not self.taken.intersection(dots) and (fusion := self.grow(dots)) is not None:
                self.taken.update(fusion.equations)
                found.append(fusion)
        return sorted(found, key=lambda fusion: fusion.equations)

    def are_alike(self, one: int, other: int) -> bool:
        """Whether two dots multiply one input with weights that are packed alike."""
        a, b = self.dots[one], self.dots[other]
        x, y = a.site.input, b.site.input
        same_input = not isinstance(x, str) and not isinstance(y, str) and x.flow == y.flow
        quantized = [q and integer.key_of(q, q.inputs[0]) for q in (a.quantized, b.quantized)]
        packed = [(dot.entry.spec, dot.entry.layout, dot.entry.order) for dot in (a, b)]
        read = [(dot.site.view.axes, dot.site.view.casts, len(dot.site.view.indexed)) for dot in (a, b)]
        same = all(one == other for one, other in (quantized, packed, read))
        return same_input and same and self.eqns[one].params == self.eqns[other].params

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
                known.update((integer.key_of(site, e), (site, e)) for e in entering)
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


def carried_out(fusion: Fusion, ranges: integer.RangeArrays) -> Fused:
    """What `passes.replay` does in place of the equations of a region.

    Args:
        fusion: the region.
        ranges: as for `integer.quantized`.
    """

    def rule(eqns: Sequence[Any], read: Any, scope: Scope) -> list[Array] | None:
        dots = [eqns[i] for i in fusion.dots]
        packed = packed_forms(dots, [1] * len(dots), read)
        if packed is None:
            return None
        (ref, *_), forms = zip(*packed, strict=True)
        atoms = [eqns[other.equation].invars[other.operand] for other in fusion.others]
        others = [as_float(read(atom)) for atom in atoms]
        result, last = dots[0].outvars[0].aval, eqns[fusion.equations[-1]].outvars[0]
        shapes = [padded(a.aval.shape, o.axes, len(result.shape)) for a, o in zip(atoms, fusion.others, strict=True)]
        x, value, known = as_float(read(dots[0].invars[0])), None, None
        if fusion.site is not None:
            quantized, value = integer.quantized_input(fusion.site, fusion.site.inputs[0], x, ranges, scope)
            x, value = integer.rows_of(quantized, forms[0].rows), forms[0].rows(value)
        else:
            x = forms[0].rows(x)
        scales: list[Array] = []
        if codes := fusion.codes:
            known = integer.range_of(codes.site, codes.entering, ranges, scope)
            assert known is not None
            scale, zero = activations.known_scale(codes.site.spec, known, len(result.shape))
            scales = [scale] if zero is None else [scale, zero]
        how: dict[str, Any] = {
            "casts": ref.view.casts,
            "precision": dots[0].params["precision"],
            "preferred_element_type": dots[0].params["preferred_element_type"],
        }

        def multiplied(x: Any, value: Array | None, w: QTensor, layer: Any) -> Array:
            if value is None:
                return quantized_matmul(x, w, layer=layer, **how)

            def of_codes(_: Any, operands: Any) -> Array:
                x, w, layer = operands
                return integer_matmul(x.codes, x.scale, x.zero, w, layer=layer, out_dtype=result.dtype)

            def smooth(values: list[Any], operands: Any) -> Array:
                _, w, layer = operands
                return quantized_matmul(values[0], w, layer=layer, **how)

            return integer.with_derivative(of_codes, smooth, [value], (x, w, layer))

        def program(x: Any, weights: Any, layers: Any, others: Any, beside: Any) -> list[Array]:
            value, known = beside
            values: dict[Any, Any] = dict(zip(atoms, others[: len(atoms)], strict=True))
            products = [multiplied(x, value, w, layer) for w, layer in zip(weights, layers, strict=True)]
            values.update((e.outvars[0], f.result(p)) for e, f, p in zip(dots, forms, products, strict=True))
            for i in sorted((*fusion.repeats, *fusion.steps)):
                operands = [a.val if isinstance(a, Literal) else values[a] for a in eqns[i].invars]
                values[eqns[i].outvars[0]] = control_flow.bind(eqns[i], operands)[0]
            if codes is None:
                return [values[last]]
            made, value = activations.fake_quant(values[last], codes.site.spec, codes.entering.axes, known)
            return [made.codes, value]

        out = fused_matmul(
            x,
            [form.weight for form in forms],
            [*others, *scales],
            layers=[form.layer for form in forms],
            **(how if fusion.site is None else {}),
            epilogue=fusion.epilogue,
            shapes=[*(_matrix_form(shape, result.shape, fusion) for shape in shapes), *((1, 1, 1) for _ in scales)],
            program=program,
            beside=(value, known),
        )
        if codes:
            scope.memo[integer.key_of(codes.site, codes.entering)] = Activation(out[0], *scales), out[1]
        return [out[-1]]

    return Fused(fusion.body, fusion.equations, rule, place=fusion.equations[-1], reads=fusion.repeats)


def _matrix_form(shape: Shape, result: Shape, fusion: Fusion) -> Shape:
    form = matrix_form(shape, result, fusion.batch, fusion.rows)
    assert form is not None  # the plan saw to it
    return form
