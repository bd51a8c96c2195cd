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
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pallas_kernels.formats import QuantSpec
from pallas_kernels.qtensor import Layout, packed_nbytes
from passes.sites import Fold, Site, Sites


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
    """

    pattern: str
    weights: QuantSpec | None = None

    def __post_init__(self):
        if not isinstance(self.pattern, str) or not self.pattern:
            raise TypeError(f"qjax: a Rule's pattern is a path such as 'layers/**', not {self.pattern!r}.")
        if self.weights is not None and not isinstance(self.weights, QuantSpec):
            raise TypeError(
                f"qjax: Rule({self.pattern!r}): weights is a format such as qjax.int4(group=64), or None for "
                f"float; got {self.weights!r}."
            )

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        return _pattern(self.pattern).fullmatch(path + "/") is not None

    @property
    def sweeps(self) -> bool:
        """Whether the pattern ends in a wildcard: it takes what can be quantized."""
        return not self.pattern.rpartition("/")[2].strip("*?")

    def __str__(self) -> str:
        return f"Rule({self.pattern!r}, weights={self.weights})"

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back."""
        return {"pattern": self.pattern, "weights": self.weights and self.weights.to_json()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Rule:
        """Reads what `to_json` wrote."""
        return Rule(data["pattern"], data["weights"] and QuantSpec.from_json(data["weights"]))


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
        unweighted: matmuls without a parameter, as (what, reason).
    """

    entries: tuple[Entry, ...]
    unweighted: tuple[tuple[str, str], ...]

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
                }
                for e in self.entries
            ],
            "matmuls without parameters": [list(u) for u in self.unweighted],
            "bits_per_weight": round(self.bits_per_weight, 4),
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
        table.add_column("float", justify="right", footer=float_mb)
        table.add_column("stored", justify="right", footer=packed_mb)
        table.add_column("bits/w", justify="right", footer=f"{self.bits_per_weight:.2f}")
        table.add_column("reason", overflow="fold")
        for e in self.entries:
            shape = f"{jnp.dtype(e.dtype).name}[{','.join(map(str, e.shape))}]"
            bits = f"{8 * e.stored_bytes / e.size:.2f}" if e.size else "-"
            fmt = str(e.spec) if e.spec else "folded" if e.folded_into else "float"
            source_bytes = "" if e.sources else _bytes(e.float_bytes)
            table.add_row(e.name, shape, " ".join(e.ops), fmt, source_bytes, _bytes(e.stored_bytes), bits, e.reason)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=1000, color_system=None)  # never wraps: paths can be searched for
        console.print(self)
        for what, reason in self.unweighted:
            console.print(f"matmul without a parameter: {what}: {reason}")
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
    problems = maker.problems + maker.idle_rules()
    if problems and strict:
        head = "qjax: the recipe does not fit the model (strict=True):"
        raise PlanError("\n  - ".join([head, *problems]))
    unweighted = tuple((f"{u.op} {' x '.join(str(list(s)) for s in u.shapes)}", u.reason) for u in sites.unweighted)
    return Plan((*entries, *folds), unweighted)


class _Planner:
    """Decides entry by entry, and keeps count of what each rule did."""

    def __init__(self, sites: Sites, rules: Sequence[Rule]):
        self.sites = sites
        self.rules = rules
        self.problems: list[str] = []
        self.decided = [0] * len(rules)  # parameters for which a rule is the first match
        self.applied = [0] * len(rules)  # values that it gave a format
        self.by_source: dict[str, list[Site]] = {}
        for site in sites.sites:
            self.by_source.setdefault(site.source, []).append(site)

    def rule(self, path: str) -> int | None:
        return next((i for i, rule in enumerate(self.rules) if rule.matches(path)), None)

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
        return self.pack(entry, rule.weights, layout, reason, own)

    def fold(self, fold: Fold) -> Entry:
        parts = fold.expr.params
        weights = [path for path in parts if len(self.sites.params[path].shape) >= 2] or parts
        matched = sorted({self.rule(path) for path in weights}, key=str)  # of the kernels, not of their scales
        specs = {self.rules[i].weights if i is not None else None for i in matched}
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
        spec = specs.pop()
        if spec is None or layout is None:
            why = "no rule gives its parts a format" if layout else reason
            return dataclasses.replace(entry, reason=why)
        for i in matched:
            self.applied[i or 0] += 1
        reason = "; ".join(filter(None, [f"'{fold.what}' of {len(parts)}", reason]))
        return self.pack(entry, spec, layout, reason, own)

    def pack(self, entry: Entry, spec: QuantSpec, layout: Layout, reason: str, own: list[Site]) -> Entry:
        order: Literal["kn", "nk"] = "nk" if all(s.op == "take" for s in own) else "kn"
        return dataclasses.replace(entry, spec=spec, layout=layout, order=order, reason=reason)

    def idle_rules(self) -> list[str]:
        problems = check_patterns(self.rules, list(self.sites.params))
        for i, rule in enumerate(self.rules):
            matching = [path for path in self.sites.params if rule.matches(path)]
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


def check_patterns(rules: Sequence[Rule], paths: Sequence[str]) -> list[str]:
    """A sentence for each rule that matches none of the parameter paths."""
    close = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
    return [
        f"{rule} matches no parameter. Paths look like: {close or '(the model has none)'}. Mend its pattern or "
        "remove the rule."
        for rule in rules
        if not any(rule.matches(path) for path in paths)
    ]
