"""`replay`: the one interpreter. Runs a program again, with some equations said differently.

Preserved: every equation that no handler takes is bound unchanged, with all of its parameters; control flow is
rebuilt with the public combinators only where something inside changes, else bound whole, custom gradient rules
included. Results have the shapes and dtypes of the program's own.

A value in flight is an array; a `Ref`, a packed parameter seen through a view (views are tracked, not executed);
`Cached`, a packed key-value cache (`passes.kv_cache`), whose moves are executed on the packed arrays; or `Absorbed`, a
parameter that lives on only inside a folded matrix. Where a `Ref` meets an equation that is
neither a view nor taken by the handler, it is dequantized, so the result is right whatever the program does.

In training a `Ref` has a shadow: the float value, with its gradient, that the program makes of the parameter. Views
are executed on it, and it is what the `Ref` is as a float.

Equations are taken over in three ways: by primitive where a packed parameter goes in (`rules`), by address (`at`),
which is how the plan has inputs quantized and observed, and several of one body together (`fused`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import primitives as prims
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from pallas_kernels.qtensor import Layout, QTensor
from passes import attention, control_flow, kv_cache, views
from passes.kv_cache import NO_CACHES, Cached, CachePlan
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
    shadow: Any = None

    def tree_flatten(self):
        """Packed arrays, indices and shadow as leaves, the view static."""
        return (self.base, self.indices, self.shadow), self.view

    @classmethod
    def tree_unflatten(cls, view, children):
        """Rebuilds from `tree_flatten`."""
        return cls(children[0], view, *children[1:])

    def materialize(self) -> Array:
        """The float value, as the program would have computed it from the dequantized parameter."""
        if self.shadow is not None:
            return self.shadow
        base = jax.jit(QTensor.dequantize)(self.base) if isinstance(self.base, QTensor) else self.base
        return self.view.apply(base, self.indices)

    def can_index(self, axis: int) -> bool:
        """Whether one element of `axis` can be picked without making it float."""
        return self.view.index(axis, None) is not None

    def index(self, axis: int, value: Any, shadow: Any = None) -> Ref:
        """The Ref of one element of `axis`, with the shadow that belongs to it."""
        view = self.view.index(axis, ("run", len(self.view.indexed)))
        assert view is not None
        picked = (value,) if len(view.indexed) > len(self.view.indexed) else ()
        return Ref(self.base, view, self.indices + picked, shadow)

    def shard(self, spec: PartitionSpec, mesh: Mesh) -> tuple[Ref, Callable[[Ref], Ref]] | None:
        """How `shard_map` should split the packed arrays, and what a shard's Ref is; None if it cannot.

        Leading stack axes and N may be sharded; K may not (a shard could cut a group or a word).
        """
        if not isinstance(self.base, QTensor) or self.shadow is not None:
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
    shadow = None

    def materialize(self) -> Absorbed:
        """Itself: it has no value."""
        return self

    def can_index(self, axis: int) -> bool:
        """Always."""
        return True

    def index(self, axis: int, value: Any, shadow: Any = None) -> Absorbed:
        """Itself."""
        return self

    def shard(self, spec: PartitionSpec, mesh: Mesh) -> tuple[Absorbed, Callable[[Any], Any]]:
        """Itself, in every shard."""
        return self, lambda value: value


def is_ref(value: Any) -> bool:
    """Whether a value in flight is anything but an array."""
    return isinstance(value, Ref | Absorbed | Cached)


def as_float(value: Any) -> Any:
    """A packed value in flight as the float array that it stands for; anything else as it is."""
    return value.materialize() if isinstance(value, Ref | Cached) else value


# rule(eqn, values, operand) -> results, or None to have the Ref dequantized and the equation bound as it is;
# `operand` is the number of the operand that is a Ref
Rule = Callable[[Any, list[Any], int], list[Any] | None]


@dataclasses.dataclass
class Scope:
    """What an equation that is taken over by address may know and leave behind; one for each body that is replayed.

    Attributes:
        indices: the loop index of each scan around the equation, by the address of its body.
        memo: results that other equations of this body may use again.
        taps: statistics by name, with the scans over whose steps they are to stay apart.
    """

    indices: Mapping[Address, Any]
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    taps: dict[str, tuple[Any, frozenset[Address]]] = dataclasses.field(default_factory=dict)

    def tap(self, name: str, statistic: Any, loops: Iterable[Address]) -> None:
        """Lets a statistic out; one that has the name already is merged with it."""
        old = self.taps.get(name)
        self.taps[name] = (old[0].merge(statistic) if old else statistic, frozenset(loops))


# rule(eqn, values, scope) -> results, for the equation at one address; a packed operand is a Ref
AtRule = Callable[[Any, list[Any], Scope], list[Any]]


@dataclasses.dataclass(frozen=True)
class Fused:
    """Equations of one body that are carried out together, in the place of one of them.

    Other equations use the results of that one and of those after it.

    Attributes:
        body: address of the body.
        equations: their numbers, ascending; each has one result.
        rule: `rule(equations of the body, value of an atom, scope)` -> those results, or None to have each run by
            itself.
        place: number of the one in whose place it is.
        reads: numbers of other equations, before it, whose operands the rule reads.
        before: numbers of other equations, after it, that are run before the rule.
    """

    body: Address
    equations: tuple[int, ...]
    rule: Callable[[Sequence[Any], Callable[[Any], Any], Scope], Sequence[Any] | None]
    place: int
    reads: tuple[int, ...] = ()
    before: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class FoldValue:
    """What replaces result `out` of the equation at `address`: packed or float, stacked over `loops`."""

    address: Address
    out: int
    loops: tuple[Address, ...]
    value: Array | QTensor
    shadow: Array | None = None


# rules of the user's that are kept whole where nothing packed goes in
_OWN_GRADIENT = {prims.custom_jvp_call_p, prims.custom_vjp_call_p}
# what these call may hand a packed parameter out again
_CALLS = {prims.jit_p, prims.remat_p, prims.closed_call_p}


def _is_packed(value: Any) -> bool:
    return isinstance(value, Absorbed) or (
        isinstance(value, Ref) and isinstance(value.base, QTensor) and value.shadow is None
    )


class _Replayer:
    def __init__(
        self,
        rules: Mapping[Any, Rule],
        folds: Sequence[FoldValue],
        at: Mapping[Address, AtRule],
        fused: Sequence[Fused],
        caches: CachePlan,
    ):
        self.rules = rules
        self.fused: dict[Address, list[Fused]] = {}
        for together in fused:
            self.fused.setdefault(together.body, []).append(together)
        self.caches = caches
        self.at = at
        self.folds: dict[Address, list[FoldValue]] = {}
        for fold in folds:
            self.folds.setdefault(fold.address, []).append(fold)
        addresses = [*self.folds, *at]
        self.prefixes = {address[:i] for address in addresses for i in range(len(address))}
        self.scope = Scope({})

    def run(self, jaxpr: Any, values: Sequence[Any], address: Address) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.invars, values, strict=True))
        env.update(zip(jaxpr.constvars, control_flow.consts_of(jaxpr), strict=False))
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, JaxprLiteral) else env[atom]

        def run(i: int) -> None:
            eqn = jaxpr.eqns[i]
            results = self.equation(eqn, [read(v) for v in eqn.invars], (*address, i))
            env.update(zip(eqn.outvars, results, strict=True))

        together = {fused.place: fused for fused in self.fused.get(address, ())}
        place = {i: at for at in sorted(together) for i in (*together[at].equations, *together[at].reads)}
        done = {i for at, fused in together.items() for i in fused.equations if i < at}  # or left to what comes later
        last_use: dict[Any, int] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            for v in eqn.invars:
                if not isinstance(v, JaxprLiteral):
                    last_use[v] = max(last_use.get(v, 0), place.get(i, i), i)
        kept = {v for v in jaxpr.outvars if not isinstance(v, JaxprLiteral)}
        last: dict[int, list[Any]] = {}
        for v, i in last_use.items():
            last.setdefault(i, []).append(v)
        for i in range(len(jaxpr.eqns)):
            if fused := together.get(i):
                for number in fused.before:
                    if number not in done:
                        run(number)
                        done.add(number)
                results = fused.rule(jaxpr.eqns, read, self.scope)
                if results is not None:
                    given = [jaxpr.eqns[number].outvars[0] for number in fused.equations if number >= i]
                    env.update(zip(given, results, strict=True))
                    done.update(fused.equations)
                else:
                    for number in fused.equations:
                        if number <= i:  # the others in their turn
                            run(number)
            elif i not in done:
                run(i)
            for v in last.get(i, ()):
                if v not in kept:
                    env.pop(v, None)  # eager replay holds no more memory than the program itself
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Any], address: Address) -> list[Any]:
        absorbed = next((v for v in values if isinstance(v, Absorbed)), None)
        inner = control_flow.bodies(eqn)
        touched = any(is_ref(v) for v in values) or any((*address, b.name) in self.prefixes for b in inner)
        if address in self.at:
            results = self.at[address](eqn, values, self.scope)
        elif inner and touched and not (absorbed and address in self.folds):
            if eqn.primitive in _OWN_GRADIENT and not any(_is_packed(v) for v in values):
                results = control_flow.bind(eqn, [as_float(v) for v in values])
            else:
                results = self.descend(eqn, inner, values, address)
        elif absorbed is not None:
            results = [absorbed] * len(eqn.outvars)
        elif touched:
            results = self.refs(eqn, values, address)
        else:
            results = control_flow.bind(eqn, values)
        for fold in self.folds.get(address, ()):
            results[fold.out] = self.fold_value(fold)
        return results

    def descend(self, eqn: Any, inner: list[control_flow.Body], values: list[Any], address: Address) -> list[Any]:
        jaxprs = {body.name: body.jaxpr for body in inner}
        if control_flow.is_plain_jit(eqn) and any((*address, "jit") == a[: len(address) + 1] for a in self.at):
            # In place of the call, so that equations inside and outside share quantized inputs.
            with jax.named_scope(str(eqn.params["name"])):
                return self.run(jaxprs["jit"], values, (*address, "jit"))
        # The packed primitives do not say over which mesh axes they vary, which shard_map checks: inside one, each
        # shard dequantizes its part of the packed weight and the program's own equations run.
        rules = {} if eqn.primitive is control_flow.shard_map_p else self.rules
        loops: dict[str, frozenset[Address]] = {}

        def run(name: str, args: Sequence[Any], index: Any = None) -> tuple[list[Any], control_flow.Taps]:
            here = (*address, name)
            outer = self.rules, self.scope
            indices = self.scope.indices if index is None else {**self.scope.indices, here: index}
            self.rules, self.scope = rules, Scope(indices)
            try:
                out = self.run(jaxprs[name], kv_cache.inside(args), here)
                out = kv_cache.leaving(eqn, name, out, address, self.caches)
                if eqn.primitive not in _CALLS:
                    out = [v.materialize() if isinstance(v, Ref) else v for v in out]
                loops.update((tap, where) for tap, (_, where) in self.scope.taps.items())
                return out, {tap: statistic for tap, (statistic, _) in self.scope.taps.items()}
            finally:
                self.rules, self.scope = outer

        values = kv_cache.entering(eqn, values, address, self.caches)
        results, taps = control_flow.REBUILD[eqn.primitive](eqn, values, run, is_ref)
        results = kv_cache.inside(results)
        for tap, statistic in taps.items():
            stacked = eqn.primitive is prims.scan_p
            apart = not stacked or (*address, "scan") in loops[tap]
            self.scope.tap(tap, statistic if apart else statistic.reduce(), loops[tap])
        return results

    def refs(self, eqn: Any, values: list[Any], address: Address) -> list[Any]:
        if any(isinstance(v, Cached) for v in values):
            return kv_cache.equation(eqn, values, (address, 0) in self.caches.kept)
        first = values[0]
        if isinstance(first, Ref) and (step := views.step(eqn, first.view, values[1:])):
            view, picked = step
            shadow = None if first.shadow is None else control_flow.bind(eqn, [first.shadow, *values[1:]])[0]
            return [Ref(first.base, view, first.indices + picked, shadow)]
        rule = None if any(getattr(v, "shadow", None) is not None for v in values) else self.rules.get(eqn.primitive)
        operand = next(i for i, v in enumerate(values) if isinstance(v, Ref))
        if rule is not None:
            rest = [v.materialize() if isinstance(v, Ref) and i != operand else v for i, v in enumerate(values)]
            if (results := rule(eqn, rest, operand)) is not None:
                return results
        return control_flow.bind(eqn, [v.materialize() if isinstance(v, Ref) else v for v in values])

    def fold_value(self, fold: FoldValue) -> Any:
        indices = [self.scope.indices[loop] for loop in fold.loops]

        def pick(a: Any) -> Any:
            for index in indices if a is not None else ():
                a = jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)
            return a

        if not isinstance(fold.value, QTensor):
            return pick(fold.value)
        ref = Ref(fold.value, View.identity(fold.value.shape))
        for index in indices:
            ref = ref.index(0, index)
        return dataclasses.replace(ref, shadow=pick(fold.shadow))


def _of_attention(found: attention.Attention) -> Fused:
    def rule(eqns: Sequence[Any], read: Callable[[Any], Any], scope: Scope) -> list[Any] | None:
        out = found.run(eqns, read)
        return None if out is None else [out]

    return Fused(found.body, found.equations, rule, place=found.equations[-1])


def replay(
    program: Program,
    values: Sequence[Any],
    *,
    rules: Mapping[Any, Rule],
    folds: Sequence[FoldValue] = (),
    at: Mapping[Address, AtRule] | None = None,
    fused: Sequence[Fused] = (),
    caches: CachePlan = NO_CACHES,
) -> tuple[list[Any], dict[str, Any]]:
    """Runs the program on `values`, with `rules` for equations that a packed parameter reaches.

    Args:
        program: what `trace` gave.
        values: one per input of the program: an array, a `QTensor` for a packed parameter, a `Ref` for one with a
            shadow, `Absorbed`, or a `QCache` for packed state.
        rules: primitive -> rule; see `passes.lower.RULES`.
        folds: results of parameter-only expressions to use instead of computing them.
        at: address of an equation -> what to do there instead.
        fused: equations that are carried out together; where that gives None, `at` may say what each of them does.
        caches: what is decided about packed state.

    Returns:
        The program's results, all float arrays (`Absorbed` where the program returns such a parameter, a `QCache` for
        the new value of packed state), and the statistics that were tapped, by name.
    """
    refs = [Ref(v, View.identity(v.shape)) if isinstance(v, QTensor) else v for v in values]
    attentions = attention.find(program.jaxpr, at or {}) if caches else ()
    fused = [*fused, *map(_of_attention, attentions)]
    replayer = _Replayer(rules, folds, at or {}, fused, caches)
    out = replayer.run(program.jaxpr, kv_cache.inside(refs), ())
    taps = {name: statistic for name, (statistic, _) in replayer.scope.taps.items()}
    out = [v.materialize() if isinstance(v, Ref) else v for v in out]
    return kv_cache.returned(out, caches), taps
