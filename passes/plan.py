"""`make_plan`: rules and sites to a `Plan`, the one place where it is decided what is quantized and how.

The plan lists every parameter with its format or the reason it stays float, and every matmul that has no
parameter. It prints as a table and saves as JSON; later steps only carry it out.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pallas_kernels.activations import ActSpec
from pallas_kernels.formats import QuantSpec
from pallas_kernels.qtensor import Layout, packed_nbytes
from passes.sites import Address, Fold, Site, Sites, Unweighted

if TYPE_CHECKING:
    from passes.fuse import Fusion
    from passes.joint import Joint
    from passes.kv_cache import CachePlan


class PlanError(ValueError):
    """A recipe that cannot be carried out; the message names rule, parameter and remedy."""


@functools.lru_cache(maxsize=1024)
def _pattern(glob: str) -> re.Pattern[str]:
    parts = []
    for segment in glob.split("/"):
        parts.append(
            "(?:[^/]+/)*" if segment == "**" else fnmatch.translate(segment)[4:-3].replace(".*", "[^/]*") + "/"
        )
    return re.compile("".join(parts))


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the parameters whose path matches `pattern`; of several rules the first match wins.

    Attributes:
        pattern: a path with wildcards: `*` within one name, `**` any number of names, as in
            "layers/*/mlp/**". A pattern that ends in a wildcard sweeps: it takes what can be quantized and the plan
            says why the rest stays float. One that ends in a name ("**/kernel") means each parameter that it matches:
            one that cannot be quantized is an error.
        weights: the format of the weight, or None to keep it float.
        activations: how the inputs of its matmuls and convolutions are quantized, or None to keep them float. Matmuls
            of two activations are named "matmul:0", "matmul:1", ... in the plan: a rule for "matmul:*" (and only one
            that says "matmul:") quantizes both of their inputs.
    """

    pattern: str
    weights: QuantSpec | None = None
    activations: ActSpec | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str) or not self.pattern:
            raise TypeError(f"qjax: a Rule's pattern is a path such as 'layers/**', not {self.pattern!r}.")
        if self.weights is not None and not isinstance(self.weights, QuantSpec):
            raise TypeError(
                f"qjax: Rule({self.pattern!r}): weights is a format such as qjax.int4(group=64), or None for "
                f"float; got {self.weights!r}."
            )
        if self.activations is not None and not isinstance(self.activations, ActSpec):
            raise TypeError(
                f"qjax: Rule({self.pattern!r}): activations is one of qjax.dynamic(), qjax.static(), qjax.lsq() and "
                f"qjax.pact(), or None for float; got {self.activations!r}."
            )
        if self.activations is not None and self.weights is None and not self.for_matmuls:
            raise ValueError(
                f"qjax: {self} quantizes activations but not the weights that they are multiplied with. Give it "
                "weights, such as weights=qjax.int8()."
            )
        if self.for_matmuls and self.weights is not None:
            raise ValueError(f"qjax: {self} is for matmuls of two activations: they have no weights. Drop weights=.")

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        return _pattern(self.pattern).fullmatch(path + "/") is not None

    @property
    def sweeps(self) -> bool:
        """Whether the pattern ends in a wildcard: it takes what can be quantized."""
        return not self.pattern.rpartition("/")[2].strip("*?")

    @property
    def for_matmuls(self) -> bool:
        """Whether the rule is for matmuls of two activations."""
        return "matmul:" in self.pattern

    def __str__(self) -> str:
        activations = f", activations={self.activations}" if self.activations else ""
        return f"Rule({self.pattern!r}, weights={self.weights}{activations})"

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back."""
        out: dict[str, Any] = {"pattern": self.pattern, "weights": self.weights and self.weights.to_json()}
        return out | ({"activations": self.activations.to_json()} if self.activations else {})

    @staticmethod
    def from_json(data: dict[str, Any]) -> Rule:
        """Reads what `to_json` wrote."""
        activations = data.get("activations")
        return Rule(
            data["pattern"],
            data["weights"] and QuantSpec.from_json(data["weights"]),
            activations and ActSpec.from_json(activations),
        )


Product = Literal["integer", "fp8", "float"]


@dataclasses.dataclass(frozen=True)
class QuantizedInput:
    """One input of a matmul or convolution that is quantized.

    Attributes:
        operand: which operand of the equation it is.
        flow: inputs of equal flow and axes in one body are quantized once.
        axes: the axes that the product contracts.
        range: name under which its range is kept, where that is known before the call.
    """

    operand: int
    flow: int
    axes: tuple[int, ...]
    range: str | None


@dataclasses.dataclass(frozen=True)
class QuantizedSite:
    """The decision for the inputs of one equation.

    Attributes:
        name: of the parameter or fold that they are multiplied with, or of the matmul.
        address: of the equation.
        weight: the operand that is the parameter; None where both are activations.
        spec: how the inputs are quantized.
        inputs: one, or both of a matmul of activations.
        product: "integer": codes are multiplied and added up as integers. "fp8": codes are multiplied as 8-bit floats
            and added up in float32. "float": the quantized values are multiplied as floats, where the two formats are
            not of one kind, or weights share no scale along what is contracted by a convolution or by 8-bit floats.
        loops: the scans around it that run over layers: its range has an entry for each of their steps.
    """

    name: str
    address: Address
    weight: int | None
    spec: ActSpec
    inputs: tuple[QuantizedInput, ...]
    product: Product
    loops: tuple[Address, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The decision for one parameter, or for one matrix folded from several.

    Attributes:
        name: path of the parameter, or name of the fold.
        shape, dtype: of the float value.
        spec: the format, or None where it stays float.
        layout: canonical matrix; set with `spec`.
        order: storage order of the packed matrix; set with `spec`.
        ops: the operations it is used in, in program order.
        reason: why it stays float, or what else there is to know; empty for a plain quantized one.
        folded_into: for a parameter: the quantized folds that absorb it.
        kept: whether the parameter itself is needed beside the folds that absorb it.
        sources: for a fold: the parameters it is made from.
        activations: how the inputs of its matmuls are quantized, or None where they stay float.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: QuantSpec | None
    layout: Layout | None = None
    order: Literal["kn", "nk"] = "kn"
    ops: tuple[str, ...] = ()
    reason: str = ""
    folded_into: tuple[str, ...] = ()
    kept: bool = True
    sources: tuple[str, ...] = ()
    activations: ActSpec | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def float_bytes(self) -> int:
        """Bytes of the float value."""
        return self.size * jnp.dtype(self.dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes after conversion; a parameter that lives on only inside folds takes none."""
        if self.spec is None or self.layout is None:
            return self.float_bytes if self.kept and not self.sources else 0
        return packed_nbytes(self.shape, self.spec, self.layout)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every decision about a model: what is quantized, how, and why the rest is not.

    Attributes:
        entries: one per parameter, in path order, then one per fold.
        unweighted: matmuls and convolutions without a parameter, as (what, what is done or why nothing is).
        sites: the matmuls and convolutions whose inputs are quantized, in program order.
        norms: batch normalisations, where they are folded, as (name, what is done or why nothing is).
        caches: the same for state, where the recipe says how key-value caches are stored; else None.
        fusions: what becomes part of the products of packed weights.
        joints: products of packed weights that are carried out as one.
    """

    entries: tuple[Entry, ...]
    unweighted: tuple[tuple[str, str], ...]
    sites: tuple[QuantizedSite, ...] = ()
    norms: tuple[tuple[str, str], ...] = ()
    caches: CachePlan | None = None
    fusions: tuple[Fusion, ...] = ()
    joints: tuple[Joint, ...] = ()

    @functools.cached_property
    def _by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def __getitem__(self, name: str) -> Entry:
        if name not in self._by_name:
            raise KeyError(f"qjax: no parameter {name!r} in the plan; it has {', '.join(self._by_name)}.")
        return self._by_name[name]

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """The entries that have a format."""
        return tuple(e for e in self.entries if e.spec is not None)

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in float."""
        return sum(e.float_bytes for e in self.entries if not e.sources)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parameters after conversion."""
        return sum(e.stored_bytes for e in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter value, over the whole model, what stays float included."""
        size = sum(e.size for e in self.entries if not e.sources)
        return 8 * self.stored_bytes / size if size else 0.0

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data; what the golden files of the tests hold."""
        return {
            "parameters": [
                {
                    "name": e.name,
                    "shape": list(e.shape),
                    "dtype": e.dtype,
                    "format": str(e.spec) if e.spec else None,
                    "layout": e.layout.to_json() if e.layout else None,
                    "ops": list(e.ops),
                    "reason": e.reason,
                    "bytes": [e.float_bytes, e.stored_bytes],
                    **({"activations": str(e.activations)} if e.activations else {}),
                }
                for e in self.entries
            ],
            "matmuls without parameters": [list(u) for u in self.unweighted],
            "bits_per_weight": round(self.bits_per_weight, 4),
            **({"caches": self.caches.to_json()} if self.caches else {}),
            **({"fused": [str(fusion) for fusion in self.fusions]} if self.fusions else {}),
            **({"joined": [str(joint) for joint in self.joints]} if self.joints else {}),
        }

    def save(self, path: str) -> None:
        """Writes `to_json` to a file."""
        with open(path, "w") as file:
            json.dump(self.to_json(), file, indent=1)

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
        float_mb, packed_mb = _bytes(self.float_bytes), _bytes(self.stored_bytes)
        table.add_column("parameter", footer="total", overflow="fold")
        table.add_column("shape", overflow="fold")
        table.add_column("op")
        table.add_column("format")
        with_inputs = any(e.activations for e in self.entries)
        if with_inputs:
            table.add_column("input")
        table.add_column("float", justify="right", footer=float_mb)
        table.add_column("stored", justify="right", footer=packed_mb)
        table.add_column("bits/w", justify="right", footer=f"{self.bits_per_weight:.2f}")
        table.add_column("reason", overflow="fold")
        for e in self.entries:
            shape = f"{jnp.dtype(e.dtype).name}[{','.join(map(str, e.shape))}]"
            bits = f"{8 * e.stored_bytes / e.size:.2f}" if e.size else "-"
            fmt = str(e.spec) if e.spec else "folded" if e.folded_into else "float"
            source_bytes = "" if e.sources else _bytes(e.float_bytes)
            inputs = [str(e.activations or ("float" if e.ops else ""))] if with_inputs else []
            row = (e.name, shape, " ".join(e.ops), fmt, *inputs, source_bytes, _bytes(e.stored_bytes), bits, e.reason)
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=1000, color_system=None)  # never wraps: paths can be searched for
        console.print(self)
        if self.caches:
            console.print(self.caches)
        for what, reason in (*self.unweighted, *((f"batch norm {name}", what) for name, what in self.norms)):
            console.print(f"{what}: {reason}")
        for fusion in self.fusions:
            console.print(f"fused {fusion}")
        for joint in self.joints:
            console.print(f"joined {joint}")
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    __repr__ = __str__


def _bytes(n: int | float) -> str:
    units = ["B", "kB", "MB"]
    while n >= 10_000 and len(units) > 1:
        n, units = n / 1000, units[1:]
    return f"{n:,.0f} {units[0]}" if n >= 100 or units[0] == "B" else f"{n:.1f} {units[0]}"


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


def make_plan(sites: Sites, rules: Sequence[Rule], *, strict: bool = True) -> Plan:
    """Decides for every parameter.

    Args:
        sites: what `find_sites` found.
        rules: first match wins; a parameter that none matches stays float.
        strict: make an error of a rule that matches nothing, a rule that earlier ones leave nothing, and a
            parameter that a rule names (not sweeps) but that cannot be quantized.

    Raises:
        PlanError: as `strict` says; also two rules that disagree about the parts of one folded matrix.
    """
    maker = _Planner(sites, rules)
    folds = [maker.fold(fold) for fold in sites.folds.values()]
    entries = [maker.param(path, [f for f in folds if path in f.sources]) for path in sites.params]
    matmuls = [maker.matmul(u) for u in sites.unweighted]
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

    def __init__(self, sites: Sites, rules: Sequence[Rule]):
        self.sites = sites
        self.rules = rules
        self.problems: list[str] = []
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
        if wanted[0].weights is None or layout is None:
            why = "no rule gives its parts a format" if layout else reason
            return dataclasses.replace(entry, reason=why)
        for i in matched:
            self.applied[i or 0] += 1
        reason = "; ".join(filter(None, [f"'{fold.what}' of {len(parts)}", reason]))
        return self.pack(entry, wanted[0], layout, reason, own)

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


def check_patterns(rules: Sequence[Rule], paths: Sequence[str], matmuls: Sequence[str] | None = None) -> list[str]:
    """A sentence for each rule that matches none of the parameter paths, or none of the matmuls if it is for these.

    Rules for matmuls are left out where `matmuls` is None: not known.
    """
    matmuls, for_matmuls = matmuls or (), [] if matmuls is None else [rule for rule in rules if rule.for_matmuls]
    idle = [rule for rule in for_matmuls if not any(rule.matches(name) for name in matmuls)]
    without = [
        f"{rule} matches no matmul of two activations; the model has {', '.join(matmuls) or 'none'}. Mend its pattern "
        "or remove the rule."
        for rule in idle
    ]
    close = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
    return [
        f"{rule} matches no parameter. Paths look like: {close or '(the model has none)'}. Mend its pattern or "
        "remove the rule."
        for rule in rules
        if not rule.for_matmuls and not any(rule.matches(path) for path in paths)
    ] + without
