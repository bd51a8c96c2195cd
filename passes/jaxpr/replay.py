"""`replay`: the one interpreter. Runs a program again, with some equations said differently.

Preserved: every equation that no handler takes is bound unchanged, with all of its parameters; control flow is
rebuilt with the public combinators only where something inside changes, else bound whole, custom gradient rules
included. Results have the shapes and dtypes of the program's own.

A value in flight is an array; a `Ref`, a packed parameter seen through a view (views are tracked, not executed);
`Cached`, a packed key-value cache, whose moves `StateRules` execute on the packed arrays; or `Absorbed`, a
parameter that lives on only inside a folded matrix. Where a `Ref` meets an equation that is
neither a view nor taken by the handler, it is dequantized, so the result is right whatever the program does.

In training a `Ref` has a shadow: the float value, with its gradient, that the program makes of the parameter. Views
are executed on it, and it is what the `Ref` is as a float.

Equations are taken over in three ways: by primitive where a packed parameter goes in (`rules`), by address (`at`),
which is how the plan has inputs quantized and observed, and several of one body together (`fused`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.extend.core import Literal as JaxprLiteral
from jax.extend.core import primitives as prims

from qjax.pallas_kernels.packed.qtensor import QTensor
from qjax.passes.jaxpr import control_flow, moves
from qjax.passes.jaxpr.trace import Address, Program
from qjax.passes.jaxpr.values import (
    Absorbed,
    AtRule,
    Cached,
    EquationRule,
    FoldValue,
    Fused,
    Ref,
    Scope,
    as_float,
    is_packed_ref,
    is_ref,
)
from qjax.passes.jaxpr.views import View
from qjax.passes.jaxpr.walk import Environment

# rules of the user's that are kept whole where nothing packed goes in
_OWN_GRADIENT = {prims.custom_jvp_call_p, prims.custom_vjp_call_p}


@runtime_checkable
class StateRules(Protocol):
    """What is done with packed state (`passes.rewrites.caches`): a program without any needs none."""

    def inside(self, values: Sequence[Any]) -> list[Any]:
        """Inputs of a body, or results of an equation with bodies, as values in flight."""
        ...

    def entering(self, eqn: Any, values: Sequence[Any], address: Address) -> list[Any]:
        """Operands of a higher-order equation, in the form in which they enter its bodies."""
        ...

    def leaving(self, eqn: Any, body: str, values: Sequence[Any], address: Address) -> list[Any]:
        """Results of a body, in the form in which they leave it."""
        ...

    def equation(self, eqn: Any, values: Sequence[Any], address: Address) -> list[Any]:
        """The results of an equation without bodies that packed state goes into."""
        ...

    def returned(self, values: Sequence[Any]) -> list[Any]:
        """Results of the program."""
        ...


class _Replayer:
    def __init__(
        self,
        rules: Mapping[Any, EquationRule],
        folds: Sequence[FoldValue],
        at: Mapping[Address, AtRule],
        fused: Sequence[Fused],
        state: StateRules | None,
    ):
        self.rules = rules
        self.fused: dict[Address, list[Fused]] = {}
        for together in fused:
            self.fused.setdefault(together.body, []).append(together)
        self.state = state
        self.at = at
        self.folds: dict[Address, list[FoldValue]] = {}
        for fold in folds:
            self.folds.setdefault(fold.address, []).append(fold)
        addresses = [*self.folds, *at]
        self.prefixes = {address[:i] for address in addresses for i in range(len(address))}
        self.scope = Scope({})

    def run(self, jaxpr: Any, values: Sequence[Any], address: Address) -> list[Any]:
        environment = Environment(jaxpr, values, lambda value, aval: value)
        read, jaxpr = environment.read, environment.jaxpr

        def run(i: int) -> None:
            eqn = jaxpr.eqns[i]
            environment.bind(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars], (*address, i)))

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
                    environment.bind(given, results)
                    done.update(fused.equations)
                else:
                    for number in fused.equations:
                        if number <= i:  # the others in their turn
                            run(number)
            elif i not in done:
                run(i)
            for v in last.get(i, ()):
                if v not in kept:
                    environment.values.pop(v, None)  # eager replay holds no more memory than the program itself
        return environment.results()

    def equation(self, eqn: Any, values: list[Any], address: Address) -> list[Any]:
        absorbed = next((v for v in values if isinstance(v, Absorbed)), None)
        inner = control_flow.bodies(eqn)
        touched = any(is_ref(v) for v in values) or any((*address, b.name) in self.prefixes for b in inner)
        if address in self.at:
            results = self.at[address](eqn, values, self.scope)
        elif inner and touched and not (absorbed and address in self.folds):
            if eqn.primitive in _OWN_GRADIENT and not any(is_packed_ref(v) for v in values):
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
            value = self.fold_value(fold)
            results[fold.out] = value if is_ref(value) else control_flow.varying(value, eqn.outvars[fold.out].aval)
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
                out = self.run(jaxprs[name], args if self.state is None else self.state.inside(args), here)
                if self.state is not None:
                    out = self.state.leaving(eqn, name, out, address)
                if eqn.primitive not in control_flow.CALLS:
                    out = [v.materialize() if isinstance(v, Ref) else v for v in out]
                loops.update((tap, where) for tap, (_, where) in self.scope.taps.items())
                return out, {tap: statistic for tap, (statistic, _) in self.scope.taps.items()}
            finally:
                self.rules, self.scope = outer

        if self.state is not None:
            values = self.state.entering(eqn, values, address)
        results, taps = control_flow.REBUILD[eqn.primitive](eqn, values, run, is_ref)
        if self.state is not None:
            results = self.state.inside(results)
        for tap, statistic in taps.items():
            stacked = eqn.primitive is prims.scan_p
            apart = not stacked or (*address, "scan") in loops[tap]
            self.scope.tap(tap, statistic if apart else statistic.reduce(), loops[tap])
        return results

    def refs(self, eqn: Any, values: list[Any], address: Address) -> list[Any]:
        if self.state is not None and any(isinstance(v, Cached) for v in values):
            return self.state.equation(eqn, values, address)
        first = values[0]
        if isinstance(first, Ref) and (step := moves.step(eqn, first.view, values[1:])):
            view, picked = step
            shadow = None if first.shadow is None else control_flow.bind(eqn, [first.shadow, *values[1:]])[0]
            return [Ref(first.base, view, first.indices + picked, shadow)]
        rule = None if any(getattr(v, "shadow", None) is not None for v in values) else self.rules.get(eqn.primitive)
        operand = next(i for i, v in enumerate(values) if isinstance(v, Ref))
        if rule is not None:
            rest = [v.materialize() if isinstance(v, Ref) and i != operand else v for i, v in enumerate(values)]
            if (results := rule(eqn, rest, operand)) is not None:
                return results
        floats = [
            control_flow.varying(v.materialize(), atom.aval) if isinstance(v, Ref) else v
            for v, atom in zip(values, eqn.invars, strict=True)
        ]
        return control_flow.bind(eqn, floats)

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


def replay(
    program: Program,
    values: Sequence[Any],
    *,
    rules: Mapping[Any, EquationRule],
    folds: Sequence[FoldValue] = (),
    at: Mapping[Address, AtRule] | None = None,
    fused: Sequence[Fused] = (),
    state: StateRules | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """Runs the program on `values`, with `rules` for equations that a packed parameter reaches.

    Args:
        program: what `trace` gave.
        values: one per input of the program: an array, a `QTensor` for a packed parameter, a `Ref` for one with a
            shadow, `Absorbed`, or a `QCache` for packed state.
        rules: primitive -> rule; see `passes.rewrites.lower.RULES`.
        folds: results of parameter-only expressions to use instead of computing them.
        at: address of an equation -> what to do there instead.
        fused: equations that are carried out together; where that gives None, `at` may say what each of them does.
        state: what is done with packed state; None where there is none.

    Returns:
        The program's results, all float arrays (`Absorbed` where the program returns such a parameter, a `QCache` for
        the new value of packed state), and the statistics that were tapped, by name.
    """
    refs = [Ref(v, View.identity(v.shape)) if isinstance(v, QTensor) else v for v in values]
    replayer = _Replayer(rules, folds, at or {}, fused, state)
    out = replayer.run(program.jaxpr, refs if state is None else state.inside(refs), ())
    taps = {name: statistic for name, (statistic, _) in replayer.scope.taps.items()}
    out = [v.materialize() if isinstance(v, Ref) else v for v in out]
    return out if state is None else state.returned(out), taps
