"""`find_sites`: every place in a program where a parameter meets a matmul, a convolution or a lookup.

A forward analysis over the jaxpr, into every sub-jaxpr. Each value is one of
    * `Viewed`: a parameter, or a matrix derived from parameters, seen through a `View`;
    * `Constant`: known while tracing, from no parameter;
    * `Flow`: depends on the inputs (an activation). Flows that are surely equal, such as two casts of one value to
      one dtype, have the same number, so that the matmuls that share an input are known.
An equation whose operands are all known and that is no view makes an `Expr`: a parameter-only expression, such as
kernels concatenated before one dot or a normalised kernel. When one reaches a matmul it becomes a `Fold`: the
derived matrix is what is quantized, in one piece. Whatever else happens to a parameter is kept as a use, so that
the plan can say why it stays float.

Nothing is decided here, and the program is not changed. Equations are named by their `Address`, the path of
equation numbers and sub-jaxpr names that leads to them, which is the same each time a program is traced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from qjax.pallas_kernels.packed.layout import Layout, Role
from qjax.passes.analysis.site_axes import SITES, Op
from qjax.passes.jaxpr import control_flow, moves
from qjax.passes.jaxpr.control_flow import CALLS, Body, Feed
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.jaxpr.views import Atom, Index, View
from qjax.passes.jaxpr.walk import ForwardWalk


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter of the program."""

    path: str
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Flow:
    """A value that depends on the inputs."""

    number: int


@dataclasses.dataclass(frozen=True)
class Constant:
    """A value known while tracing that comes from no parameter."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Expr:
    """Result `out` of `eqn` on operands that are all known: a parameter-only expression."""

    eqn: Any
    operands: tuple[Viewed | Constant, ...]
    out: int
    address: Address
    params: tuple[str, ...]  # paths it reads, in order of use
    loops: tuple[Address, ...]  # scans whose slices it reads, outermost first
    repeated: bool  # only repeats parameters along new axes (a query tiled to the batch): not a weight

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.eqn.outvars[self.out].aval.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the result."""
        return self.eqn.outvars[self.out].aval.dtype


@dataclasses.dataclass(frozen=True)
class Viewed:
    """A parameter or an expression of parameters, seen through a view."""

    source: Param | Expr
    view: View

    @property
    def params(self) -> tuple[str, ...]:
        """Paths of the parameters that it reads."""
        return (self.source.path,) if isinstance(self.source, Param) else self.source.params


@dataclasses.dataclass(frozen=True)
class Fold:
    """A parameter-only expression that reaches a site: the derived matrix is quantized as one parameter.

    `shape` has one leading axis per scan in `loops`, whose slices the expression reads.
    """

    name: str
    expr: Expr
    loops: tuple[Address, ...]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def address(self) -> Address:
        """The equation that computes it."""
        return self.expr.address

    @property
    def what(self) -> str:
        """The operation that computes it."""
        return self.expr.eqn.primitive.name


@dataclasses.dataclass(frozen=True)
class Input:
    """An activation that a matmul or convolution contracts.

    Attributes:
        operand: which operand of the equation it is.
        flow: number of its flow; inputs of equal flow have equal values.
        axes: the axes that are contracted (all but the batch in a convolution).
    """

    operand: int
    flow: int
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One use of a parameter (or fold) in a matmul, convolution or lookup.

    Attributes:
        source: path of the parameter, or name of the fold.
        number: 0 for the first site of that source in program order, 1 for the next, ...
        operand: which operand of the equation it is.
        view: how it is read there; roles: what each axis of the view does in the operation.
        layout: the canonical matrix that follows from both; None if a parameter axis is cut across.
        input: what is multiplied with the parameter, or why it cannot be quantized.
    """

    source: str
    number: int
    op: Op
    address: Address
    operand: int
    view: View
    roles: tuple[Role, ...]
    layout: Layout | None
    input: Input | str


@dataclasses.dataclass(frozen=True)
class Unweighted:
    """A matmul or convolution without a parameter, why it has none, and its inputs (or why they stay float)."""

    name: str
    op: Op
    address: Address
    shapes: tuple[tuple[int, ...], ...]
    reason: str
    inputs: tuple[Input, ...] | str


@dataclasses.dataclass
class Sites:
    """What `find_sites` found.

    Attributes:
        params: every parameter of the program, by path.
        sites: in program order.
        folds: by name.
        uses: per path, what else reads the parameter, as a phrase ("'add'").
        rank: per path, the most axes (longer than 1) that any of those uses sees; 1 for a stacked vector.
        unweighted: matmuls and convolutions without a parameter.
        lengths: of every scan, by the address of its body.
    """

    params: dict[str, Param]
    sites: list[Site]
    folds: dict[str, Fold]
    uses: dict[str, list[str]]
    rank: dict[str, int]
    unweighted: list[Unweighted]
    lengths: dict[Address, int]

    def layer_loops(self) -> set[Address]:
        """The scans that run over layers: each step reads its own slice of some parameter."""
        views = [site.view for site in self.sites]
        loops = {index.key[1] for view in views for index in view.indexed if index.key[0] == "loop"}
        return loops.union(*(fold.loops for fold in self.folds.values()))


# Bodies whose sites keep float activations, and why.
_OPAQUE = {
    "shard_map": "inside shard_map",
    "custom_jvp": "inside a custom_jvp rule",
    "custom_vjp": "inside a custom_vjp rule",
}


class _Finder(ForwardWalk[Any]):
    def __init__(self, program: Program, known_state: frozenset[str]):
        self.found = Sites({}, [], {}, {}, {}, [], {})
        self.fold_of: dict[int, Fold] = {}
        self.numbers: dict[str, int] = {}
        self.flows = 0
        self.views_of_flows: dict[Any, Flow] = {}
        values: list[Any] = []
        for path, state, aval in zip(program.paths, program.state, program.jaxpr.in_avals, strict=True):
            if path is None and state in known_state:
                values.append(Viewed(Param(state, tuple(aval.shape), aval.dtype), View.identity(aval.shape)))
                continue
            if path is None:
                values.append(self.flow())
                continue
            param = Param(path, tuple(aval.shape), aval.dtype)
            self.found.params[path] = param
            self.found.uses[path] = []
            self.found.rank[path] = 0
            floating = jnp.issubdtype(aval.dtype, jnp.floating)
            values.append(Viewed(param, View.identity(aval.shape)) if floating else self.flow())
        for value in self.walk(program.jaxpr, values, ()):
            self.use(value, "returned")

    def flow(self) -> Flow:
        self.flows += 1
        return Flow(self.flows)

    def use(self, value: Any, what: str) -> None:
        for path in value.params if isinstance(value, Viewed) else ():
            if path not in self.found.uses:
                continue  # state
            if what not in self.found.uses[path]:
                self.found.uses[path].append(what)
            rank = sum(size != 1 for size in value.view.shape)
            self.found.rank[path] = max(rank, self.found.rank[path])

    def constant(self, value: Any, aval: Any) -> Constant:
        return Constant(value)

    def equation(self, eqn: Any, operands: list[Any], address: Address) -> list[Any] | None:
        known = not any(isinstance(o, Flow) for o in operands) and not eqn.effects
        if control_flow.has_bodies(eqn) and (not known or eqn.primitive in CALLS):
            if eqn.primitive is prims.scan_p:
                self.found.lengths[*address, "scan"] = eqn.params["length"]
            return None
        if isinstance(operands[0] if operands else None, Viewed):
            viewed = operands[0]
            step = moves.step(eqn, viewed.view, operands[1:])
            if step is not None:
                return [dataclasses.replace(viewed, view=step[0])]
        if known and (exprs := self.expressions(eqn, operands, address)):
            return exprs
        if eqn.primitive in SITES:
            self.site(eqn, operands, address)
        else:
            for operand in operands:
                self.use(operand, f"'{eqn.primitive.name}'")
        return [self.flow_of(eqn, operands)] if len(eqn.outvars) == 1 else [self.flow() for _ in eqn.outvars]

    def flow_of(self, eqn: Any, operands: list[Any]) -> Flow:
        """The flow of a result; that of an earlier equation which moves or casts the same value in the same way."""
        if eqn.primitive not in moves.VIEWS or not isinstance(operands[0], Flow) or len(operands) > 1:
            return self.flow()
        key = (eqn.primitive, operands[0], str(sorted(eqn.params.items(), key=str)))
        return self.views_of_flows.setdefault(key, self.flow())

    def expressions(self, eqn: Any, operands: list[Any], address: Address) -> list[Any] | None:
        if eqn.primitive in SITES and any(isinstance(o, Viewed) and o.params for o in operands):
            return None  # learned queries times a kernel: the kernel is a weight, the queries are its input
        params: dict[str, None] = {}
        loops: dict[Address, None] = {}
        for operand in operands:
            if isinstance(operand, Viewed):
                params.update(dict.fromkeys(operand.params))
                if isinstance(operand.source, Expr):
                    loops.update(dict.fromkeys(operand.source.loops))
                for index in operand.view.indexed:
                    if index.key[0] == "dynamic":  # picked by a value of the run: not known after all
                        return None
                    if index.key[0] == "loop":
                        loops[index.key[1]] = None
        ordered = tuple(sorted(loops, key=lambda a: (len(a), [str(part) for part in a])))
        repeated = eqn.primitive is prims.broadcast_in_dim_p or (
            bool(params) and all(_is_repeated(o) for o in operands if isinstance(o, Viewed) and o.params)
        )
        exprs = [
            Expr(eqn, tuple(operands), out, address, tuple(params), ordered, repeated)
            for out in range(len(eqn.outvars))
        ]
        return [Viewed(expr, View.identity(expr.shape)) for expr in exprs]

    def enter(self, eqn: Any, body: Body, feed: Feed, aval: Any, value: Any, address: Address) -> Any:
        if feed.how == "carried":  # what it is before a step may be what it is before none but the first
            self.use(value, f"carry of '{eqn.primitive.name}'")
            return self.flow()
        if feed.how == "scanned":
            if not isinstance(value, Viewed):
                return self.flow()
            view = value.view.index(0, ("loop", (*address, body.name)))
            if view is None:
                self.use(value, f"'{eqn.primitive.name}' over a merged axis")
                return self.flow()
            value = dataclasses.replace(value, view=view)
        if isinstance(value, Viewed) and value.view.shape != tuple(aval.shape):
            value = self.localize(value, tuple(aval.shape), eqn)
        return self.flow() if isinstance(value, Flow) and body.name in _OPAQUE else value

    def carry(self, eqn: Any, before: Any, after: Any, address: Address) -> Any:
        self.use(after, f"collected by '{eqn.primitive.name}'")
        return before

    def leave(self, eqn: Any, body: Body, results: list[Any], address: Address) -> list[Any]:
        for i, value in enumerate(results):
            if i not in body.results:
                self.use(value, f"collected by '{eqn.primitive.name}'")
        out = [None if i is None else results[i] for i in body.results]
        # what a scan or a branch hands out is another value than the one inside it
        inside = eqn.primitive not in CALLS
        return [self.flow() if v is None or (inside and isinstance(v, Flow)) else v for v in out]

    def join(self, eqn: Any, values: Sequence[Any], address: Address) -> Any:
        if all(value == values[0] for value in values[1:]):
            return values[0]
        for value in values:
            self.use(value, f"'{eqn.primitive.name}'")
        return self.flow()

    def localize(self, value: Viewed, shape: tuple[int, ...], eqn: Any) -> Viewed | Flow:
        """The view of one shard of `shard_map`; its layout is read off with the sizes of the shard and scaled back."""
        if not value.view.is_identity or not isinstance(value.source, Param):
            self.use(value, f"'{eqn.primitive.name}'")
            return self.flow()
        return Viewed(value.source, View.identity(shape))

    def site(self, eqn: Any, operands: list[Any], address: Address) -> None:
        op, candidates, find_roles, _ = SITES[eqn.primitive]
        weights = [
            i
            for i in candidates
            if isinstance(operands[i], Viewed)
            and any(path in self.found.params for path in operands[i].params)
            and not _is_repeated(operands[i])
        ]
        weights.sort(key=lambda i: -math.prod(operands[i].view.base))  # of two, the larger is the weight
        weights = weights[:1]
        for i, operand in enumerate(operands):
            if i not in weights:
                self.use(operand, f"'{eqn.primitive.name}' as operand {i}")
        if not weights:
            if op != "take":
                shapes = tuple(tuple(v.aval.shape) for v in eqn.invars[:2])
                constant = any(not isinstance(o, Flow) for o in operands[:2])
                reason = "an operand is a constant" if constant else "both operands are activations"
                inputs = [self.input(eqn, operands, i, address) for i in (0, 1)]
                both: Any = next((i for i in inputs if isinstance(i, str)), tuple(inputs))
                both = both if op == "dot" else f"a '{op}' of two activations"
                name = f"matmul:{len(self.found.unweighted)}"
                self.found.unweighted.append(Unweighted(name, op, address, shapes, reason, both))
            return
        operand = weights[0]
        value = operands[operand]
        roles = find_roles(eqn, operand)
        if roles is None:
            self.use(value, f"'{eqn.primitive.name}' that picks no whole rows")
            return
        source, view = value.source, value.view
        if isinstance(source, Expr):
            fold = self.fold(source)
            name, view, full = fold.name, _under_loops(view, fold), fold.shape
        else:
            name, full = source.path, source.shape
        layout = view.layout(roles)
        if layout is not None and view.base != full:
            layout = _scale_to(layout, full)
        number = self.numbers.get(name, 0)
        self.numbers[name] = number + 1
        entering = self.input(eqn, operands, 1 - operand, address)
        self.found.sites.append(Site(name, number, op, address, operand, view, roles, layout, entering))

    def input(self, eqn: Any, operands: list[Any], operand: int, address: Address) -> Input | str:
        value, dtype = operands[operand], eqn.invars[operand].aval.dtype
        opaque = [why for part, why in _OPAQUE.items() if part in address]
        if opaque:
            return opaque[0]
        if not isinstance(value, Flow):
            return "its input is known before the call"
        if not jnp.issubdtype(dtype, jnp.floating):
            return f"its input is {dtype}"
        axes = SITES[eqn.primitive][3](eqn, operand)
        return axes if isinstance(axes, str) else Input(operand, value.number, axes)

    def fold(self, expr: Expr) -> Fold:
        if id(expr) not in self.fold_of:
            stack = tuple(self.found.lengths[loop] for loop in expr.loops)
            base = _common_name(expr.params)
            name, n = f"{base}:{expr.eqn.primitive.name}", 1
            while name in self.found.folds:
                n += 1
                name = f"{base}:{expr.eqn.primitive.name}#{n}"
            fold = Fold(name, expr, expr.loops, (*stack, *expr.shape), expr.dtype)
            self.found.folds[name] = self.fold_of[id(expr)] = fold
        return self.fold_of[id(expr)]


def _is_repeated(value: Viewed) -> bool:
    return isinstance(value.source, Expr) and value.source.repeated


def _common_name(paths: Sequence[str]) -> str:
    """'cell/{ii,if}/kernel' for 'cell/ii/kernel' and 'cell/if/kernel'."""
    if len(paths) == 1:
        return paths[0]
    split = [path.split("/") for path in paths]
    shortest = min(map(len, split)) - 1  # at least one name of each path stays between the braces
    same = [len({tuple(names[:i]) for names in split}) == 1 for i in range(shortest + 1)]
    head = max(i for i in range(shortest + 1) if same[i])
    tail = max(i for i in range(shortest - head + 1) if len({tuple(names[len(names) - i :]) for names in split}) == 1)
    middle = "{" + ",".join("/".join(names[head : len(names) - tail]) for names in split) + "}"
    return "/".join([*split[0][:head], middle, *split[0][len(split[0]) - tail :]])


def _under_loops(view: View, fold: Fold) -> View:
    """The view of an expression as a view of its fold, whose leading axes are the loops it is read in."""
    shift = len(fold.loops)
    outer = View.identity(fold.shape)
    for loop in fold.loops:
        following = outer.index(0, ("loop", loop))
        assert following is not None
        outer = following

    def move(atom: Atom) -> Atom:
        return dataclasses.replace(atom, axis=atom.axis + shift)

    return View(
        fold.shape,
        tuple(tuple(map(move, axis)) for axis in view.axes),
        (*outer.indexed, *(Index(move(index.atom), index.key) for index in view.indexed)),
        view.casts,
    )


def _scale_to(layout: Layout, shape: tuple[int, ...]) -> Layout | None:
    """A layout found on one shard, for the whole parameter; None where a split axis is sharded."""
    axes = []
    for axis, size in zip(layout.axes, shape[len(shape) - len(layout.axes) :], strict=True):
        if len(axis) == 1:
            axes.append(((size, axis[0][1]),))
        elif Layout((axis,)).shape == (size,):
            axes.append(axis)
        else:
            return None
    return Layout(tuple(axes))


def find_sites(program: Program, known_state: frozenset[str] = frozenset()) -> Sites:
    """Every site of the program, its folds, and the other uses of its parameters.

    Args:
        program: what `trace` gave.
        known_state: paths of variables that count as known beside the parameters (statistics folded into a weight).
    """
    return _Finder(program, known_state).found
