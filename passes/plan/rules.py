"""Rules: what a recipe says of parameters and caches, and the error of one that does not fit."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.pallas_kernels.numbers.activation_ranges import ActSpec
from qjax.pallas_kernels.numbers.formats import FORMATS, QuantSpec
from qjax.pallas_kernels.packed.qcache import CacheSpec

# --- Rules and decisions ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CacheRule:
    """How the state whose path matches `pattern` is stored; of several rules the first match wins.

    Attributes:
        pattern: as in `Rule`: one that ends in a wildcard sweeps, one that ends in a name means each that it matches.
        spec: the format, or None to keep it float.
    """

    pattern: str
    spec: CacheSpec | None

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        return Rule(self.pattern).matches(path)

    @property
    def sweeps(self) -> bool:
        """Whether the pattern takes what can be quantized and leaves the rest."""
        return Rule(self.pattern).sweeps

    def __str__(self) -> str:
        return f"kv_cache={{{self.pattern!r}: {self.spec or 'None'}}}"

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back."""
        return {"pattern": self.pattern, "spec": self.spec and self.spec.to_json()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> CacheRule:
        """Reads what `to_json` wrote."""
        return CacheRule(data["pattern"], data["spec"] and CacheSpec.from_json(data["spec"]))


def as_cache_spec(spec: Any) -> CacheSpec | None:
    """A spec given as the name of a format, a `CacheSpec` or None."""
    if spec is None or isinstance(spec, CacheSpec):
        return spec
    if isinstance(spec, str) and spec in FORMATS:
        return CacheSpec(FORMATS[spec])
    raise TypeError(
        f"qjax: a cache is stored as the name of a format such as 'int8', a CacheSpec or None; got {spec!r}."
    )


def as_cache_rules(given: Any) -> tuple[CacheRule, ...]:
    """Rules given as what `quantize(kv_cache=...)` takes: None, a spec for all caches, or {pattern: spec}."""
    if given is None:
        return ()
    if isinstance(given, Mapping):
        return tuple(CacheRule(pattern, as_cache_spec(spec)) for pattern, spec in given.items())
    if isinstance(given, tuple) and all(isinstance(rule, CacheRule) for rule in given):
        return given
    return (CacheRule("**", as_cache_spec(given)),)


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
