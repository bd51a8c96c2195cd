"""Low-rank adapters (LoRA, arXiv 2106.09685) beside packed weights: which parameters take one, and their product.

A packed weight is the matrix `W`, shape `(*stack, K, N)`. Its adapter is `a`, `(*stack, K, r)`, and `b`,
`(*stack, r, N)`; a matmul `x @ W` becomes `x @ W + (x @ a) @ b * (alpha / rank)`. `plan_adapters` decides, and says of
each parameter that a target matches why it takes none. `attach` carries out: rules for `passes.replay` that run the
product that the program would run anyway, quantized input or not, and add the adapter's on the float input.

An adapter is read through the view in which the program reads the parameter, so whatever picks a layer or an expert
of the packed matrix picks the same one of `a` and `b`, and gradients reach only that one.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from pallas_kernels.qtensor import Layout, QTensor
from passes import control_flow, lower
from passes.plan import Entry, Plan, PlanError, Rule
from passes.replay import AtRule, Ref, Scope
from passes.sites import Address, Site, Sites
from passes.trace import Program
from passes.views import View


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """What adapters a model takes.

    Attributes:
        rank: columns of `a`, rows of `b`.
        alpha: the product of an adapter is scaled by `alpha / rank`.
        targets: patterns of parameter paths, as those of a `Rule`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks the numbers and the patterns."""
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"qjax: rank={self.rank!r}: an adapter's rank is a whole number, at least 1.")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(
                f"qjax: alpha={self.alpha!r}: adapters are scaled by alpha / rank, which must be positive."
            )
        if not self.targets:
            raise ValueError("qjax: no targets: name the parameters that take adapters, such as '**' for all.")
        for pattern in self.targets:
            Rule(pattern)  # checks it

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class AdapterEntry:
    """The decision for one parameter that a target matches.

    Attributes:
        name: path of the parameter.
        matrix: its canonical matrix `(*stack, K, N)`; None where it has none.
        format: its format, or "float".
        size: trainable values, 0 where it takes no adapter.
        reason: why it takes none; empty where it does.
    """

    name: str
    matrix: tuple[int, ...] | None
    format: str
    size: int
    reason: str


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """Which parameters take adapters, and why the others that a target matches do not.

    Attributes:
        spec: rank, scale and targets.
        entries: one per parameter that a target matches, in path order.
        parameters: number of values of the whole model, without adapters.
    """

    spec: AdapterSpec
    entries: tuple[AdapterEntry, ...]
    parameters: int

    @property
    def adapted(self) -> tuple[AdapterEntry, ...]:
        """The entries that take an adapter."""
        return tuple(e for e in self.entries if not e.reason)

    @property
    def trainable(self) -> int:
        """Number of values of all adapters."""
        return sum(e.size for e in self.entries)

    @property
    def share(self) -> float:
        """`trainable` over the number of values of the model."""
        return self.trainable / self.parameters if self.parameters else 0.0

    def __getitem__(self, name: str) -> AdapterEntry:
        found = next((e for e in self.entries if e.name == name), None)
        if found is None:
            names = ", ".join(e.name for e in self.entries)
            raise KeyError(f"qjax: no target matches {name!r}; they match {names}.")
        return found

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
        table.add_column("parameter", footer=f"of {self.parameters:,}", overflow="fold")
        table.add_column("matrix")
        table.add_column("format")
        table.add_column("a")
        table.add_column("b")
        table.add_column("trainable", justify="right", footer=f"{self.trainable:,}")
        table.add_column("reason", footer=f"{self.share:.2%} trainable", overflow="fold")
        for e in self.entries:
            a, b = _shapes(e.matrix, self.spec.rank) if e.matrix and not e.reason else ("", "")
            matrix = _text(e.matrix) if e.matrix else ""
            table.add_row(e.name, matrix, e.format, _text(a), _text(b), f"{e.size:,}" if e.size else "", e.reason)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=1000, color_system=None)
        console.print(self)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    __repr__ = __str__


def _text(shape: Any) -> str:
    return shape if isinstance(shape, str) else f"[{','.join(map(str, shape))}]"


def _shapes(matrix: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `a` and `b` for a matrix `(*stack, K, N)`."""
    *stack, k, n = matrix
    return (*stack, k, rank), (*stack, rank, n)


def matrix_shape(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """The canonical matrix `(*stack, K, N)` of a parameter."""
    lead = tuple(shape[: len(shape) - len(layout.axes)])
    return (*lead, *layout.sizes("stack"), layout.k, layout.n)


# --- The decision ------------------------------------------------------------------------------------------------

# Bodies in which an adapter would have no gradient, or could not be sharded with its weight, and why.
_CLOSED = {
    "shard_map": "it is multiplied inside shard_map, where adapters are not split over devices",
    "custom_jvp": "it is multiplied inside a custom_jvp function, whose own rule has no gradient for an adapter",
    "custom_vjp": "it is multiplied inside a custom_vjp function, whose own rule has no gradient for an adapter",
}


def _equation(jaxpr: Any, address: Address) -> Any:
    eqn = getattr(jaxpr, "jaxpr", jaxpr).eqns[address[0]]
    if len(address) == 1:
        return eqn
    body = next(body for body in control_flow.bodies(eqn) if body.name == address[1])
    return _equation(body.jaxpr, address[2:])


def _stack_read(site: Site) -> tuple[int, ...]:
    """Sizes of the factors that the program indexes or batches, in the parameter's order."""
    atoms = [index.atom for index in site.view.indexed]
    atoms += [a for axis, role in zip(site.view.axes, site.roles, strict=True) if role == "stack" for a in axis]
    return tuple(atom.size for atom in sorted(atoms, key=lambda a: (a.axis, -a.inner)))


def _refusal(program: Program, sites: Sites, name: str, shape: Sequence[int], layout: Layout) -> str:
    """Why a parameter that is packed in this layout can have no adapter; empty if it can.

    `W + a @ b` has to be what every use of it sees: an adapted model is one that can be merged.
    """
    folds = [fold.name for fold in sites.folds.values() if name in fold.expr.params]
    if folds:
        return f"it is part of {', '.join(folds)}, a matrix that the model makes of parameters"
    others = [use for use in sites.uses[name] if use != "returned"]
    if others:
        return f"it also reaches {', '.join(others[:3])}, which would not see the adapter"
    for site in (site for site in sites.sites if site.source == name):
        what = f"'{site.op}#{site.number}'"
        if site.op != "dot":
            return f"{what} is no matmul"
        closed = [why for body, why in _CLOSED.items() if body in site.address]
        if closed:
            return closed[0]
        if site.layout != layout:
            return f"{what} reads it along other axes"
        if _equation(program.jaxpr, site.address).params.get("out_sharding") is not None:
            return f"{what} names the sharding of its result"
        if _stack_read(site) != matrix_shape(shape, layout)[:-2]:
            return f"{what} picks its matrix by a part of an axis"
    return ""


def plan_adapters(program: Program, sites: Sites, plan: Plan, spec: AdapterSpec) -> AdapterPlan:
    """Decides which parameters take an adapter.

    Args:
        program, sites, plan: of the call that is to be adapted.
        spec: which parameters are meant.

    Raises:
        PlanError: a target that matches no parameter, one of whose parameters none takes an adapter, or one that names
            a parameter (does not end in a wildcard) which takes none.
    """
    rules = [Rule(pattern) for pattern in spec.targets]
    params = [entry for entry in plan.entries if not entry.sources]
    decided = {e.name: _decide(program, sites, e, spec) for e in params if any(rule.matches(e.name) for rule in rules)}
    problems = []
    for rule in rules:
        matched = [entry for entry in decided.values() if rule.matches(entry.name)]
        refused = [entry for entry in matched if entry.reason]
        if not matched:
            paths = ", ".join(e.name for e in params[:4]) + (", ..." if len(params) > 4 else "")
            problems.append(f"target {rule.pattern!r} matches no parameter. Paths look like: {paths or '(none)'}.")
        elif len(refused) == len(matched):
            why = "; ".join(f"{e.name!r}: {e.reason}" for e in refused[:3]) + ("; ..." if len(refused) > 3 else "")
            problems.append(
                f"target {rule.pattern!r} matches {len(matched)} parameters, of which none takes an adapter ({why}). "
                "Adapters go to quantized weights of matmuls."
            )
        elif not rule.sweeps:
            problems += [
                f"{e.name!r} is named by target {rule.pattern!r} but takes no adapter: {e.reason}. Name others, or end "
                "the target in a wildcard to take what can be adapted."
                for e in refused
                if not plan[e.name].reason.startswith("vector")
            ]
    if problems:
        raise PlanError("\n  - ".join(["qjax: the adapters do not fit the model:", *problems]))
    return AdapterPlan(spec, tuple(decided.values()), sum(entry.size for entry in params))


def _decide(program: Program, sites: Sites, entry: Entry, spec: AdapterSpec) -> AdapterEntry:
    if entry.folded_into:
        why = f"it is packed as part of {', '.join(entry.folded_into)}"
        return AdapterEntry(entry.name, None, "folded", 0, why)
    if entry.spec is None or entry.layout is None:
        return AdapterEntry(entry.name, None, "float", 0, f"it stays float: {entry.reason}")
    matrix = matrix_shape(entry.shape, entry.layout)
    reason = _refusal(program, sites, entry.name, entry.shape, entry.layout)
    size = 0 if reason else sum(math.prod(shape) for shape in _shapes(matrix, spec.rank))
    return AdapterEntry(entry.name, matrix, str(entry.spec), size, reason)


# --- Carrying out ------------------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The two factors of one parameter's adapter: `delta == layout.from_matrix(a @ b) * scale`.

    It takes the place of a `QTensor` as the base of a `Ref`, so that it is seen through the same views.

    Attributes:
        a: `(*stack, K, r)`.
        b: `(*stack, r, N)`.
        layout: of the parameter.
        scale: `alpha / rank`.
    """

    a: Any
    b: Any
    layout: Layout
    scale: float

    def tree_flatten(self):
        """The factors as leaves, the rest static."""
        return (self.a, self.b), (self.layout, self.scale)

    @classmethod
    def tree_unflatten(cls, aux, children) -> Adapter:
        """Rebuilds from `tree_flatten`."""
        return cls(*children, *aux)

    def matrix(self) -> Array:
        """`a @ b * scale` in float32, shape `(*stack, K, N)`."""
        a, b = (jnp.asarray(x, jnp.float32) for x in (self.a, self.b))
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST) * self.scale

    def product(self, rows: Array, precision: Any) -> Array:
        """`rows @ a @ b * scale` in the dtype of `rows`, for `rows` of shape `(*stack, M, K)`."""
        low = jnp.matmul(rows, jnp.asarray(self.a, rows.dtype), precision=precision)  # (*stack, M, r)
        return jnp.matmul(low * self.scale, jnp.asarray(self.b, rows.dtype), precision=precision)


def adapter(name: str, pair: Any, shape: Sequence[int], layout: Layout, scale: float) -> Adapter:
    """The adapter of parameter `name` from the arrays `a` and `b` that stand at its path.

    Raises:
        ValueError: they are not those of a parameter of this shape.
    """
    matrix = matrix_shape(shape, layout)
    found = {part: getattr(value, "shape", None) for part, value in pair.items()}
    a = found.get("a") or (0,)
    if found.keys() != {"a", "b"} or (found["a"], found["b"]) != _shapes(matrix, a[-1]):
        raise ValueError(
            f"qjax: the adapter of {name!r} has {', '.join(f'{k}{list(v or ())}' for k, v in found.items())}; for its "
            f"matrix {_text(matrix)} it must be a{_text((*matrix[:-1], 'rank'))} and "
            f"b{_text((*matrix[:-2], 'rank', matrix[-1]))}."
        )
    return Adapter(pair["a"], pair["b"], layout, scale)


def _base_product(eqn: Any, values: list[Any], operand: int) -> Array:
    """The product that runs where there is no adapter."""
    ref = values[operand]
    if ref.shadow is None:
        rest = [v.materialize() if isinstance(v, Ref) and i != operand else v for i, v in enumerate(values)]
        results = lower.RULES[eqn.primitive](eqn, rest, operand)
        if results is not None:
            return results[0]
    return control_flow.bind(eqn, [v.materialize() if isinstance(v, Ref) else v for v in values])[0]


def _adapted(whole: Adapter, operand: int, base: AtRule | None) -> AtRule:
    """The rule for one `dot_general`: `base`, or the product that runs without it, plus the adapter's."""

    def rule(eqn: Any, values: list[Any], scope: Scope) -> list[Any]:
        ref, x = values[operand], values[1 - operand]
        assert eqn.primitive is prims.dot_general_p
        assert isinstance(ref, Ref)
        out = base(eqn, values, scope)[0] if base else _base_product(eqn, values, operand)
        form = lower.dot_form(eqn, Ref(whole, ref.view, ref.indices), operand)
        assert form is not None, "the plan takes no parameter that is read in another way than it is packed"
        own = form.weight
        if form.layer is not None:
            own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, form.layer, 0, keepdims=False), own)
        x = x.materialize() if isinstance(x, Ref) else x
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else out.dtype
        with jax.named_scope("lora"):
            added = form.result(own.product(form.rows(x).astype(dtype), eqn.params["precision"]))
            return [out + added.astype(out.dtype)]

    return rule


def attach(
    program: Program,
    sites: Sites,
    plan: Plan,
    values: Sequence[Any],
    at: Mapping[Address, AtRule],
    pairs: Mapping[str, Any],
    scale: float,
) -> tuple[list[Any], dict[Address, AtRule]]:
    """The inputs and rules with which `replay` runs the adapted program.

    Args:
        program, sites, plan: of this call.
        values, at: the inputs and the rules by address with which it runs without adapters.
        pairs: path of a parameter -> its arrays `a` and `b`. One that this call does not use is left out.
        scale: `alpha / rank`.

    Raises:
        ValueError: an adapter for a parameter that the call does not have, or uses as no adapter can follow.
    """
    values, rules = list(values), dict(at)
    where = {path: i for i, path in enumerate(program.paths) if path is not None}
    for name, pair in pairs.items():
        if name not in where:
            raise ValueError(f"qjax: 'lora' has an adapter for {name!r}, which is no parameter of the model.")
        own = [site for site in sites.sites if site.source == name]
        if not own and not sites.uses[name]:
            continue
        value = values[where[name]]
        packed = value.base if isinstance(value, Ref) else value
        layout = packed.layout if isinstance(packed, QTensor) else plan[name].layout
        reason = "it stays float" if layout is None else _refusal(program, sites, name, plan[name].shape, layout)
        if layout is None or reason:
            raise ValueError(f"qjax: 'lora' has an adapter for {name!r}, but in this call it can have none: {reason}.")
        whole = adapter(name, pair, plan[name].shape, layout, scale)
        if not isinstance(value, Ref | QTensor):  # in training: the float value, and the view that the adapter needs
            values[where[name]] = Ref(value, View.identity(value.shape), shadow=value)
        for site in own:
            rules[site.address] = _adapted(whole, site.operand, rules.get(site.address))
    return values, rules
