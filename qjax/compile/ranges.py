"""Ranges of activations that are known before the call: calibrated, averaged in training, or learned.

They live beside the parameters, as batch statistics do: `quant_stats` holds what calibration found and training
averages, `quant` what an optimizer trains. Each is a nested dict like `params`; at the path of the parameter that the
input is multiplied with stand its arrays (`low` and `high`, `step`, or `clip`), with a leading axis for each layer
scan. Where calibration found that one range does not serve an input, there stands only `dynamic`: how many times the
error of a scale for each token its own was.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MovingAverage
from qjax.pallas_kernels.packed.qtensor import is_packed
from qjax.passes.calibration.statistic import Statistic
from qjax.passes.jaxpr.trace import path_name
from qjax.passes.plan.decisions import Plan


@dataclasses.dataclass(frozen=True)
class CallRanges:
    """Ranges that a call is given, and whether it updates them."""

    known: Flat
    step: Any = None
    update: bool = False


LEARNED, KEPT = "quant", "quant_stats"
"""Names of the two collections."""

DYNAMIC = "dynamic"
"""In the place of a range's arrays: the input has dynamic scales instead."""

STEP = "step"
"""In `quant_stats`: training steps taken so far, where the recipe has a schedule."""

Flat = dict[str, dict[str, Any]]
"""Name of a range -> its arrays."""

# The name of a folded matrix, '{conv/kernel,bn/scale}:mul', is cut outside its braces only.
_PARTS = re.compile(r"/(?![^{]*\})")


def not_served(ranges: Flat) -> dict[str, float | None]:
    """The ranges that calibration gave up, for `passes.plan.planner.with_dynamic`."""

    def known(ratio: Any) -> float | None:
        return None if isinstance(ratio, Tracer | jax.ShapeDtypeStruct) else float(ratio)

    return {name: known(arrays[DYNAMIC]) for name, arrays in ranges.items() if DYNAMIC in arrays}


def specs_of(plan: Plan) -> dict[str, ActSpec]:
    """The spec of every range that a plan keeps, by name."""
    return {i.range: site.spec for site in plan.sites for i in site.inputs if i.range is not None}


def flatten(*collections: Any) -> Flat:
    """The arrays of nested collections, by the name of what they belong to."""
    out: Flat = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        if not isinstance(tree, Mapping):
            raise TypeError(f"qjax: {'/'.join(path) or 'a collection'!r} should be a dict of arrays, but is {tree!r}.")
        parts = {k: v for k, v in tree.items() if not isinstance(v, Mapping)}
        if parts and path:
            out.setdefault("/".join(path), {}).update(parts)
        for key, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, (*path, key))

    for collection in collections:
        walk(collection or {}, ())
    return out


def nest(flat: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of `flatten`, for one collection."""
    out: dict[str, Any] = {}
    for name, arrays in flat.items():
        node = out
        for part in _PARTS.split(name):
            node = node.setdefault(part, {})
        node.update(arrays)
    return out


def check(plan: Plan, ranges: Flat) -> None:
    """Raises a ValueError that names the ranges which a plan needs and the variables do not have."""
    needed = specs_of(plan)
    missing = [name for name in needed if name not in ranges]
    if missing:
        raise ValueError(
            f"qjax: {len(missing)} of {len(needed)} activation ranges are not calibrated, such as that of "
            f"{missing[0]!r} ({needed[missing[0]]}). Calibrate first: variables = q.calibrate(variables, batches), and "
            f"pass the collections that it adds ('{KEPT}', '{LEARNED}') to apply and convert."
        )


def moved(plan: Plan, ranges: Flat, statistics: Mapping[str, Statistic], frozen: Any) -> Flat:
    """The moving averages after one more batch; the other ranges as they are."""
    out: Flat = dict(ranges)
    for name, spec in specs_of(plan).items():
        if not isinstance(spec.range, MovingAverage) or name not in statistics:
            continue
        old, seen, decay = ranges[name], statistics[name], spec.range.decay
        weight = decay * old["weight"] + (1 - decay)

        def average(old_value: Any, new: Any, *, old: Any = old, decay: float = decay, weight: Any = weight) -> Any:
            return (decay * old["weight"] * old_value + (1 - decay) * new) / weight

        seen_any = (seen.high >= seen.low) & seen.finite & ~jnp.asarray(frozen)
        new = {"low": average(old["low"], seen.low), "high": average(old["high"], seen.high), "weight": weight}
        out[name] = {part: jnp.where(seen_any, new[part], old[part]) for part in old}
    return out


# --- Collections of ranges ---------------------------------------------------------------------------------------


def take_ranges(variables: Mapping[str, Any], update: bool = False) -> tuple[dict[str, Any], CallRanges]:
    """The variables that the model itself has, and the ranges beside them."""
    kept, learned = variables.get(KEPT) or {}, variables.get(LEARNED) or {}
    own = {name: tree for name, tree in variables.items() if name not in (KEPT, LEARNED)}
    return own, CallRanges(flatten(kept, learned), kept.get(STEP), update and bool(kept))


def param_paths(params: Any) -> list[str]:
    """The paths of all parameters of a tree."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]]


def kept_after(variables: Mapping[str, Any], after: CallRanges) -> dict[str, Any]:
    """The collection `quant_stats` after a call."""
    names = flatten(variables.get(KEPT))
    step = {} if after.step is None else {STEP: after.step}
    return {**nest({name: after.known[name] for name in names}), **step}


def ranges_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The collections of ranges, to go with converted variables; the count of training steps stays behind."""
    kept = {name: tree for name, tree in (variables.get(KEPT) or {}).items() if name != STEP}
    found = {KEPT: kept, LEARNED: variables.get(LEARNED)}
    return {name: tree for name, tree in found.items() if tree}
