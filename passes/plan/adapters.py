"""Low-rank adapters (LoRA, arXiv 2106.09685) beside packed weights: which parameters take one, and their product.

A packed weight is the matrix `W`, shape `(*stack, K, N)`. Its adapter is `a`, `(*stack, K, r)`, and `b`,
`(*stack, r, N)`; a matmul `x @ W` becomes `x @ W + (x @ a) @ b * (alpha / rank)`. `plan_adapters` decides, and says of
each parameter that a target matches why it takes none. `attach` carries out: rules for `passes.jaxpr.replay` that run
the product that the program would run anyway, quantized input or not, and add the adapter's on the float input.

An adapter is read through the view in which the program reads the parameter, so whatever picks a layer or an expert
of the packed matrix picks the same one of `a` and `b`, and gradients reach only that one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from qjax.pallas_kernels.packed.layout import Layout
from qjax.passes.analysis.sites import Site, Sites
from qjax.passes.jaxpr import control_flow
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.plan.decisions import Entry, Plan
from qjax.passes.plan.rules import PlanError, Rule
from qjax.passes.plan.show import plain_text


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
            a, b = adapter_shapes(e.matrix, self.spec.rank) if e.matrix and not e.reason else ("", "")
            matrix = shape_text(e.matrix) if e.matrix else ""
            table.add_row(
                e.name,
                matrix,
                e.format,
                shape_text(a),
                shape_text(b),
                f"{e.size:,}" if e.size else "",
                e.reason,
            )
        return table

    def __str__(self) -> str:
        return plain_text(self)

    __repr__ = __str__


def shape_text(shape: Any) -> str:
    """A shape as text; text as it is."""
    return shape if isinstance(shape, str) else f"[{','.join(map(str, shape))}]"


def adapter_shapes(matrix: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
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


def refusal(program: Program, sites: Sites, name: str, shape: Sequence[int], layout: Layout) -> str:
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
    reason = refusal(program, sites, entry.name, entry.shape, entry.layout)
    size = 0 if reason else sum(math.prod(shape) for shape in adapter_shapes(matrix, spec.rank))
    return AdapterEntry(entry.name, matrix, str(entry.spec), size, reason)
