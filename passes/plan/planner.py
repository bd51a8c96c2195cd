"""`make_plan`: rules and sites to a `Plan`, the one place where it is decided what is quantized and how.

The plan lists every parameter with its format or the reason it stays float, and every matmul that has no
parameter. It prints as a table and saves as JSON; later steps only carry it out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
from qjax.pallas_kernels.numbers.formats import QuantSpec
from qjax.pallas_kernels.packed.layout import Layout
from qjax.pallas_kernels.packed.qtensor import QTensor, is_stored_as
from qjax.passes.analysis.sites import Fold, Site, Sites, Unweighted
from qjax.passes.jaxpr.trace import Address
from qjax.passes.plan.decisions import Entry, Plan, Product, QuantizedInput, QuantizedSite
from qjax.passes.plan.rules import PlanError, Rule, check_patterns


def _uses(uses: Sequence[str]) -> str:
    return "reaches " + ", ".join(uses[:3]) + (", ..." if len(uses) > 3 else "")


def _primary(sites: list[Site]) -> Site:
    """The site whose reading of the parameter decides how it is stored: the first matmul, else the first lookup."""
    usable = [s for s in sites if s.layout is not None]
    return next((s for s in usable if s.op != "take"), (usable or sites)[0])


def _decide(shape: tuple[int, ...], sites: list[Site], uses: list[str], rank: int) -> tuple[Layout | None, str]:
    """The layout in which a value can be packed and what to say of it, or None and why it cannot."""
    if math.prod(shape) == 0:
        return None, "has no values"
    if not sites:
        vector = (rank if uses else sum(d != 1 for d in shape)) < 2
        reason = _uses(uses) if uses else "not used by this call"
        return None, f"vector, {reason}" if vector else reason + (", no matmul or lookup" if uses else "")
    primary = _primary(sites)
    layout = primary.layout
    if layout is None:
        return None, f"'{primary.op}' reads it along a part of an axis"
    if layout.n == 1 or layout.k == 1:
        return None, f"vector: its matrix is {layout.k} x {layout.n}"
    notes = []
    others = [f"{s.op}#{s.number}" for s in sites if s.layout != layout]
    if others:
        notes.append(f"{', '.join(others)} reads it along other axes: dequantized there")
    if uses:
        notes.append(f"also {_uses(uses)}: dequantized there")
    return layout, "; ".join(notes)


def _product(weights: QuantSpec, inputs: ActSpec, layout: Layout, op: str) -> tuple[Product, str]:
    """How the codes of a weight and of its input are multiplied, and why as floats if so."""
    kinds = {weights.format.kind, inputs.format.kind}
    grouped = weights.group_size(layout.k) < layout.k
    if len(kinds) > 1 or "codebook" in kinds:
        return "float", f"{weights.format} times {inputs.format}"
    if kinds == {"float"} and op != "dot":
        return "float", f"a '{op}' of 8-bit floats"
    if grouped and (op != "dot" or kinds == {"float"}):
        return "float", f"scales change along what the '{op}' contracts"
    return ("integer" if kinds == {"int"} else "fp8"), ""


def make_plan(
    sites: Sites, rules: Sequence[Rule], *, strict: bool = True, packed: Mapping[str, QTensor] | None = None
) -> Plan:
    """Decides for every parameter.

    Args:
        sites: what `find_sites` found.
        rules: first match wins; a parameter that none matches stays float.
        strict: make an error of a rule that matches nothing, a rule that earlier ones leave nothing, and a
            parameter that a rule names (not sweeps) but that cannot be quantized.
        packed: the parameters and folds that are packed already, by name: what the plan says of them is read off them.

    Raises:
        PlanError: as `strict` says; also two rules that disagree about the parts of one folded matrix, and, strict or
            not, a packed parameter that is stored in another format than its rule says.
    """
    maker = _Planner(sites, rules, packed or {})
    folds = [maker.fold(fold) for fold in sites.folds.values()]
    entries = [maker.param(path, [f for f in folds if path in f.sources]) for path in sites.params]
    matmuls = [maker.matmul(u) for u in sites.unweighted]
    if maker.mismatches:
        raise PlanError("\n  - ".join(["qjax: the packed variables are not those of this recipe:", *maker.mismatches]))
    problems = maker.problems + maker.idle_rules()
    if problems and strict:
        head = "qjax: the recipe does not fit the model (strict=True):"
        raise PlanError("\n  - ".join([head, *problems]))
    order = {site.address: i for i, site in enumerate([*sites.sites, *sites.unweighted])}
    quantized = sorted(maker.quantized, key=lambda site: order[site.address])
    return Plan((*entries, *folds), tuple(matmuls), tuple(maker.name_ranges(quantized)))


def with_dynamic(plan: Plan, ranges: Mapping[str, float | None]) -> Plan:
    """The plan in which inputs that a calibrated range does not serve have dynamic scales for each token.

    Args:
        plan: of `make_plan`.
        ranges: names of such ranges, and how many times the error of those scales theirs was, if that is known.
    """
    sites: list[QuantizedSite] = []
    notes: dict[str, list[str]] = {}
    for site in plan.sites:
        given_up = [ranges[i.range] for i in site.inputs if i.range is not None and i.range in ranges]
        if given_up:
            worst = max((ratio for ratio in given_up if ratio is not None), default=None)
            why = "dynamic: calibration found no range for its input"
            if worst is not None:
                why = f"dynamic: one range for its input had {worst:.1f}x the error"
            inputs = tuple(dataclasses.replace(i, range=None) for i in site.inputs)
            site = dataclasses.replace(site, spec=site.spec.by_token, inputs=inputs)
            notes.setdefault(site.name.partition("#")[0], []).append(why)
        sites.append(site)

    def entry(e: Entry) -> Entry:
        if e.name not in notes:
            return e
        specs = {site.spec for site in sites if site.name.partition("#")[0] == e.name}
        reason = "; ".join(filter(None, [e.reason, *dict.fromkeys(notes[e.name])]))
        return dataclasses.replace(e, activations=max(specs, key=lambda spec: spec.is_dynamic), reason=reason)

    def matmul(what: str, done: str) -> tuple[str, str]:
        name = what.partition(" ")[0]
        spec = next((site.spec for site in sites if site.name == name), None)
        return what, done if name not in notes else "; ".join([f"both inputs {spec}", *notes[name]])

    entries, unweighted = tuple(map(entry, plan.entries)), tuple(matmul(*u) for u in plan.unweighted)
    return dataclasses.replace(plan, entries=entries, unweighted=unweighted, sites=tuple(sites))


class _Planner:
    """Decides entry by entry, and keeps count of what each rule did."""

    def __init__(self, sites: Sites, rules: Sequence[Rule], packed: Mapping[str, QTensor]):
        self.sites = sites
        self.rules = rules
        self.packed = packed
        self.problems: list[str] = []
        self.mismatches: list[str] = []
        self.decided = [0] * len(rules)  # parameters for which a rule is the first match
        self.applied = [0] * len(rules)  # values that it gave a format
        self.quantized: list[QuantizedSite] = []
        self.layer_loops = sites.layer_loops()
        self.by_source: dict[str, list[Site]] = {}
        for site in sites.sites:
            self.by_source.setdefault(site.source, []).append(site)

    def rule(self, path: str) -> int | None:
        return next((i for i, rule in enumerate(self.rules) if rule.matches(path) and not rule.for_matmuls), None)

    def param(self, path: str, folds: list[Entry]) -> Entry:
        param, uses, index = self.sites.params[path], self.sites.uses[path], self.rule(path)
        rule = None if index is None else self.rules[index]
        if index is not None:
            self.decided[index] += 1
        own = self.by_source.get(path, [])
        entry = Entry(path, param.shape, jnp.dtype(param.dtype).name, None, ops=tuple(site.op for site in own))
        if folds and not own:
            into = tuple(f.name for f in folds if f.spec is not None)
            reason = "part of " + ", ".join(f.name for f in folds) + (f"; also {_uses(uses)}" if uses else "")
            kept = bool(uses) or len(into) < len(folds)
            return dataclasses.replace(entry, folded_into=into, kept=kept, reason=reason)
        if not jnp.issubdtype(param.dtype, jnp.floating):
            return dataclasses.replace(entry, reason="not a float")
        layout, reason = _decide(param.shape, own, uses, self.sites.rank[path])
        if (stored := self.packed.get(path)) is not None:
            return self.stored(entry, stored, rule, index, reason, own)
        if layout is None:
            if rule and rule.weights and not rule.sweeps and not reason.startswith("vector"):
                shape = f"{entry.dtype}[{','.join(map(str, entry.shape))}]"
                self.problems.append(
                    f"{path!r} {shape} is matched by {rule} but cannot be quantized: {reason}. Put "
                    f"Rule({path!r}, weights=None) before it, or use the parameter in a matmul, convolution or "
                    "lookup."
                )
            return dataclasses.replace(entry, reason=reason)
        if rule is None or rule.weights is None:
            why = "no rule matches it" if rule is None else f"kept float by {rule.pattern!r}"
            return dataclasses.replace(entry, reason=why)
        self.applied[index or 0] += 1
        return self.pack(entry, rule, layout, reason, own)

    def fold(self, fold: Fold) -> Entry:
        parts = tuple(path for path in fold.expr.params if path in self.sites.params)  # the others are state
        weights = [path for path in parts if len(self.sites.params[path].shape) >= 2] or parts
        matched = sorted({self.rule(path) for path in weights}, key=str)  # of the kernels, not of their scales
        wanted = [self.rules[i] if i is not None else Rule("**") for i in matched]
        specs = {(rule.weights, rule.activations) for rule in wanted}
        own = self.by_source[fold.name]
        ops = tuple(site.op for site in own)
        entry = Entry(fold.name, fold.shape, jnp.dtype(fold.dtype).name, None, ops=ops, sources=parts)
        if len(specs) > 1:
            rules = " and ".join(str(self.rules[i]) if i is not None else "no rule" for i in matched)
            self.problems.append(
                f"{fold.name!r} is one matrix, made by '{fold.what}' from {', '.join(parts)}, but {rules} give its "
                "parts different formats. Give them one."
            )
            return dataclasses.replace(entry, reason="rules disagree about its parts")
        layout, reason = _decide(fold.shape, own, [], 0)
        if (stored := self.packed.get(fold.name)) is not None:
            reason = "; ".join(filter(None, [f"'{fold.what}' of {len(parts)}", reason]))
            return self.stored(entry, stored, wanted[0], matched[0], reason, own)
        if wanted[0].weights is None or layout is None:
            why = "no rule gives its parts a format" if layout else reason
            return dataclasses.replace(entry, reason=why)
        for i in matched:
            self.applied[i or 0] += 1
        reason = "; ".join(filter(None, [f"'{fold.what}' of {len(parts)}", reason]))
        return self.pack(entry, wanted[0], layout, reason, own)

    def stored(
        self, entry: Entry, q: QTensor, rule: Rule | None, index: int | None, reason: str, own: list[Site]
    ) -> Entry:
        """The entry of a value that is packed already; one of another format than the rule's is a mismatch."""
        if rule is None or rule.weights is None or not is_stored_as(q, rule.weights):
            said = "no rule gives it a format" if rule is None or rule.weights is None else f"its rule is {rule}"
            self.mismatches.append(
                f"{entry.name!r} is stored as {q.spec}, but {said}. Apply packed variables with the recipe that they "
                "were converted with, or convert the float variables with this one."
            )
            return dataclasses.replace(entry, spec=q.spec, layout=q.layout, order=q.order)
        self.applied[index or 0] += 1
        others = [f"{s.op}#{s.number}" for s in own if s.layout != q.layout]
        if own and len(others) == len(own):  # another call of the model than the one it was packed for
            reason = f"{', '.join(others)} reads it along other axes: dequantized there"
        done = self.pack(entry, dataclasses.replace(rule, weights=q.spec), q.layout, reason, own)
        return dataclasses.replace(done, order=q.order)

    def pack(self, entry: Entry, rule: Rule, layout: Layout, reason: str, own: list[Site]) -> Entry:
        spec = rule.weights
        assert spec is not None
        done, notes = self.inputs(entry.name, rule, layout, own) if rule.activations else ([], [])
        self.quantized += done
        only_taken = all(s.op == "take" for s in own)
        # 8-bit dots on CPU and Hopper read a column of the weight at a time
        whole = done and spec.format.bits == 8 and spec.group_size(layout.k) == layout.k
        order: Literal["kn", "nk"] = "nk" if only_taken or whole else "kn"
        reason = "; ".join(filter(None, [reason, *notes]))
        activations = rule.activations if done else None
        return dataclasses.replace(entry, spec=spec, layout=layout, order=order, reason=reason, activations=activations)

    def inputs(self, name: str, rule: Rule, layout: Layout, own: list[Site]) -> tuple[list[QuantizedSite], list[str]]:
        """The sites of a parameter whose inputs are quantized, and what to say of the others."""
        spec, weights = rule.activations, rule.weights
        assert spec is not None
        assert weights is not None
        done, notes = [], []
        for site in own:
            if site.op == "take":
                continue
            why = site.input if isinstance(site.input, str) else ""
            if site.layout != layout:
                why = "it reads the parameter along other axes"
            if not spec.is_dynamic and any(part in ("while", "while_cond") for part in site.address):
                why = "no range can be collected inside a while loop (a dynamic one would do)"
            if why or isinstance(site.input, str):
                notes.append(f"float input of {site.op}#{site.number}: {why}")
                if not rule.sweeps:
                    self.problems.append(
                        f"{name!r} is named by {rule} but the input of its {site.op}#{site.number} cannot be "
                        f"quantized: {why}. Put Rule({name!r}, weights=...) without activations before it."
                    )
                continue
            product, reason = _product(weights, spec, layout, site.op)
            if reason:
                notes.append(f"float product: {reason}")
            entering = QuantizedInput(site.input.operand, site.input.flow, site.input.axes, None)
            done.append(
                QuantizedSite(
                    name if site.number == 0 else f"{name}#{site.number}",
                    site.address,
                    site.operand,
                    spec,
                    (entering,),
                    product,
                    self.loops(site.address),
                )
            )
        return done, list(dict.fromkeys(notes))

    def loops(self, address: Address) -> tuple[Address, ...]:
        bodies = [address[:i] for i in range(len(address))]
        return tuple(body for body in bodies if body in self.layer_loops)

    def matmul(self, matmul: Unweighted) -> tuple[str, str]:
        """What the plan says of a matmul of two activations."""
        what = f"{matmul.name} {matmul.op} {' x '.join(str(list(s)) for s in matmul.shapes)}"
        index = next((i for i, rule in enumerate(self.rules) if rule.for_matmuls and rule.matches(matmul.name)), None)
        if index is None:
            return what, matmul.reason
        self.decided[index] += 1
        rule = self.rules[index]
        spec = rule.activations
        if spec is None:
            return what, f"kept float by {rule.pattern!r}"
        inputs = matmul.inputs
        if not isinstance(inputs, str) and not spec.is_dynamic and any("while" in str(p) for p in matmul.address):
            inputs = "no range can be collected inside a while loop (a dynamic one would do)"
        if isinstance(inputs, str):
            if not rule.sweeps:
                self.problems.append(f"{matmul.name!r} is named by {rule} but cannot be quantized: {inputs}.")
            return what, f"{matmul.reason}; {inputs}"
        self.applied[index] += 1
        entering = tuple(QuantizedInput(i.operand, i.flow, i.axes, None) for i in inputs)
        product: Product = "integer" if spec.format.kind == "int" else "fp8"
        self.quantized.append(
            QuantizedSite(matmul.name, matmul.address, None, spec, entering, product, self.loops(matmul.address))
        )
        return what, f"both inputs {spec}"

    def name_ranges(self, sites: list[QuantizedSite]) -> list[QuantizedSite]:
        """Names the ranges that are kept: sites that share an input and a spec share its range, the first names it."""
        names: dict[Any, str] = {}
        out = []
        for site in sites:
            inputs = []
            for i, entering in enumerate(site.inputs):
                key = (entering.flow, entering.axes, site.spec)
                name = site.name if site.weight is not None else f"{site.name}/{i}"
                kept = None if site.spec.is_dynamic else names.setdefault(key, name)
                inputs.append(dataclasses.replace(entering, range=kept))
            out.append(dataclasses.replace(site, inputs=tuple(inputs)))
        return out

    def idle_rules(self) -> list[str]:
        problems = check_patterns(self.rules, list(self.sites.params), [u.name for u in self.sites.unweighted])
        for i, rule in enumerate(self.rules):
            names = [u.name for u in self.sites.unweighted] if rule.for_matmuls else list(self.sites.params)
            matching = [path for path in names if rule.matches(path)]
            if not matching:
                continue
            if not self.decided[i]:
                problems.append(
                    f"{rule} decides nothing: earlier rules take all {len(matching)} parameters that it matches "
                    f"(such as {matching[0]!r}). Put it before them."
                )
            elif rule.weights is not None and not self.applied[i] and rule.pattern != "**":
                problems.append(
                    f"{rule} quantizes nothing: none of the {self.decided[i]} parameters that it matches (such as "
                    f"{matching[0]!r}) is the weight of a matmul, convolution or lookup."
                )
        return problems
