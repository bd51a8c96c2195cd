"""`replay`: the one interpreter. Runs a program again, with some equations said differently.

Preserved: every equation that no handler takes is bound unchanged, with all of its parameters; control flow is
rebuilt with the public combinators only where something inside changes, else bound whole, custom gradient rules
included. Results have the shapes and dtypes of the program's own.

A value in flight is an array; a `Ref`, a packed parameter seen through a view (views are tracked, not executed);
or `Absorbed`, a parameter that lives on only inside a folded matrix. Where a `Ref` meets an equation that is
neither a view nor taken by the handler, it is dequantized, so the result is right whatever the program does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import primitives as prims
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from pallas_kernels.qtensor import Layout, QTensor
from passes import control_flow, views
from passes.sites import Address
from passes.trace import Program
from passes.views import View


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Ref:
    """A parameter seen through a view: `indices` holds one value per indexed axis of `view`.

    Handlers meet packed ones; a float one is what the identity replay of the tests tracks.
    """

    base: Any  # QTensor or array
    view: Any
    indices: Any = ()

    def tree_flatten(self):
        """Packed arrays and indices as leaves, the view static."""
        return (self.base, self.indices), self.view

    @classmethod
    def tree_unflatten(cls, view, children):
        """Rebuilds from `tree_flatten`."""
        return cls(children[0], view, children[1])

    def materialize(self) -> Array:
        """The float value, as the program would have computed it from the dequantized parameter."""
        base = jax.jit(QTensor.dequantize)(self.base) if isinstance(self.base, QTensor) else self.base
        return self.view.apply(base, self.indices)

    def can_index(self, axis: int) -> bool:
        """Whether one element of `axis` can be picked without making it float."""
        return self.view.index(axis, None) is not None

    def index(self, axis: int, value: Any) -> Ref:
        """The Ref of one element of `axis`."""
        view = self.view.index(axis, ("run", len(self.view.indexed)))
        assert view is not None
        picked = (value,) if len(view.indexed) > len(self.view.indexed) else ()
        return Ref(self.base, view, self.indices + picked)

    def shard(self, spec: PartitionSpec, mesh: Mesh) -> tuple[Ref, Callable[[Ref], Ref]] | None:
        """How `shard_map` should split the packed arrays, and what a shard's Ref is; None if it cannot.

        Leading stack axes and N may be sharded; K may not (a shard could cut a group or a word).
        """
        if not isinstance(self.base, QTensor):
            return None
        q, layout = self.base, self.base.layout
        lead = q.ndim - len(layout.axes)
        names = [*spec, *(None,) * (q.ndim - len(spec))]
        if not self.view.is_identity or q.spec.double_quant or layout.sizes("stack"):
            return None
        inner = [i for i in range(lead, q.ndim) if names[i] is not None]
        produced = [i for i in range(lead, q.ndim) if any(role == "n" for _, role in layout.axes[i - lead])]
        if inner and (inner != produced[:1] or len(layout.axes[inner[0] - lead]) != 1):
            return None
        shards = 1
        for name in jax.tree.leaves(names[inner[0]]) if inner else ():
            shards *= mesh.shape[name]
        axis = inner[0] - lead if inner else -1
        local = Layout(tuple(((a[0][0] // shards, "n"),) if i == axis else a for i, a in enumerate(layout.axes)))
        column = names[inner[0]] if inner else None

        def array_spec(a: Any) -> PartitionSpec:
            last = (None, column) if q.order == "kn" else (column, None)
            wide = a.shape[-1 if q.order == "kn" else -2] == layout.n
            return PartitionSpec(*names[:lead], *(last if wide else (None, None)))

        specs = jax.tree.map(array_spec, self)

        def localize(ref: Ref) -> Ref:
            base = dataclasses.replace(ref.base, layout=local)
            return Ref(base, View.identity(base.shape))

        return specs, localize


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Absorbed:
    """Stands where a parameter was that only a folded matrix uses."""

    path: str

    def materialize(self) -> Absorbed:
        """Itself: it has no value."""
        return self

    def can_index(self, axis: int) -> bool:
        """Always."""
        return True

    def index(self, axis: int, value: Any) -> Absorbed:
        """Itself."""
        return self

    def shard(self, spec: PartitionSpec, mesh: Mesh) -> tuple[Absorbed, Callable[[Any], Any]]:
        """Itself, in every shard."""
        return self, lambda value: value


def is_ref(value: Any) -> bool:
    """Whether a value in flight is anything but an array."""
    return isinstance(value, Ref | Absorbed)


# rule(eqn, values, operand) -> results, or None to have the Ref dequantized and the equation bound as it is;
# `operand` is the number of the operand that is a Ref
Rule = Callable[[Any, list[Any], int], list[Any] | None]


@dataclasses.dataclass(frozen=True)
class FoldValue:
    """What replaces result `out` of the equation at `address`: packed or float, stacked over `loops`."""

    address: Address
    out: int
    loops: tuple[Address, ...]
    value: Array | QTensor


# rules of the user's that are kept whole where nothing packed goes in
_OWN_GRADIENT = {prims.custom_jvp_call_p, prims.custom_vjp_call_p}


def _is_packed(value: Any) -> bool:
    return isinstance(value, Absorbed) or (isinstance(value, Ref) and isinstance(value.base, QTensor))


class _Replayer:
    def __init__(self, rules: Mapping[Any, Rule], folds: Sequence[FoldValue]):
        self.rules = rules
        self.folds: dict[Address, list[FoldValue]] = {}
        for fold in folds:
            self.folds.setdefault(fold.address, []).append(fold)
        self.prefixes = {fold.address[:i] for fold in folds for i in range(len(fold.address))}
        self.indices: dict[Address, Any] = {}  # of the scans whose body is being replayed

    def run(self, jaxpr: Any, values: Sequence[Any], address: Address) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.invars, values, strict=True))
        env.update(zip(jaxpr.constvars, control_flow.consts_of(jaxpr), strict=False))
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, JaxprLiteral) else env[atom]

        last_use: dict[Any, int] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            last_use.update((v, i) for v in eqn.invars if not isinstance(v, JaxprLiteral))
        kept = {v for v in jaxpr.outvars if not isinstance(v, JaxprLiteral)}
        for i, eqn in enumerate(jaxpr.eqns):
            results = self.equation(eqn, [read(v) for v in eqn.invars], (*address, i))
            env.update(zip(eqn.outvars, results, strict=True))
            for v in {v for v in eqn.invars if not isinstance(v, JaxprLiteral)}:
                if last_use[v] == i and v not in kept:
                    env.pop(v, None)  # eager replay holds no more memory than the program itself
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Any], address: Address) -> list[Any]:
        absorbed = next((v for v in values if isinstance(v, Absorbed)), None)
        inner = control_flow.bodies(eqn)
        touched = any(is_ref(v) for v in values) or any((*address, b.name) in self.prefixes for b in inner)
        if inner and touched and not (absorbed and address in self.folds):
            if eqn.primitive in _OWN_GRADIENT and not any(_is_packed(v) for v in values):
                results = control_flow.bind(eqn, [v.materialize() if isinstance(v, Ref) else v for v in values])
            else:
                results = self.descend(eqn, inner, values, address)
        elif absorbed is not None:
            results = [absorbed] * len(eqn.outvars)
        elif touched:
            results = self.refs(eqn, values)
        else:
            results = control_flow.bind(eqn, values)
        for fold in self.folds.get(address, ()):
            results[fold.out] = self.fold_value(fold)
        return results

    def descend(self, eqn: Any, inner: list[control_flow.Body], values: list[Any], address: Address) -> list[Any]:
        jaxprs = {body.name: body.jaxpr for body in inner}
        # The packed primitives do not say over which mesh axes they vary, which shard_map checks: inside one, each
        # shard dequantizes its part of the packed weight and the program's own equations run.
        rules = {} if eqn.primitive is control_flow.shard_map_p else self.rules

        def run(name: str, args: Sequence[Any], index: Any = None) -> list[Any]:
            here = (*address, name)
            if index is not None:
                self.indices[here] = index
            outer, self.rules = self.rules, rules
            try:
                return self.run(jaxprs[name], args, here)
            finally:
                self.rules = outer

        return control_flow.REBUILD[eqn.primitive](eqn, values, run, is_ref)

    def refs(self, eqn: Any, values: list[Any]) -> list[Any]:
        first = values[0]
        if isinstance(first, Ref) and (step := views.step(eqn, first.view, values[1:])):
            view, picked = step
            return [Ref(first.base, view, first.indices + picked)]
        rule = self.rules.get(eqn.primitive)
        operand = next(i for i, v in enumerate(values) if isinstance(v, Ref))
        if rule is not None:
            rest = [v.materialize() if isinstance(v, Ref) and i != operand else v for i, v in enumerate(values)]
            if (results := rule(eqn, rest, operand)) is not None:
                return results
        return control_flow.bind(eqn, [v.materialize() if isinstance(v, Ref) else v for v in values])

    def fold_value(self, fold: FoldValue) -> Any:
        indices = [self.indices[loop] for loop in fold.loops]
        value = fold.value
        if isinstance(value, QTensor):
            ref = Ref(value, View.identity(value.shape))
            for index in indices:
                ref = ref.index(0, index)
            return ref
        for index in indices:
            value = jax.lax.dynamic_index_in_dim(value, index, 0, keepdims=False)
        return value


def replay(
    program: Program, values: Sequence[Any], *, rules: Mapping[Any, Rule], folds: Sequence[FoldValue] = ()
) -> list[Any]:
    """Runs the program on `values`, with `rules` for equations that a packed parameter reaches.

    Args:
        program: what `trace` gave.
        values: one per input of the program: an array, a `QTensor` for a packed parameter, or `Absorbed`.
        rules: primitive -> rule; see `passes.lower.RULES`.
        folds: results of parameter-only expressions to use instead of computing them.

    Returns:
        The program's results, all float arrays (`Absorbed` where the program returns such a parameter).
    """
    refs = [Ref(v, View.identity(v.shape)) if isinstance(v, QTensor) else v for v in values]
    out = _Replayer(rules, folds).run(program.jaxpr, refs, ())
    return [v.materialize() if isinstance(v, Ref) else v for v in out]
