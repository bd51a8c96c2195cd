"""Ranges of activations that are known before the call: calibrated, averaged in training, or learned.

They live beside the parameters, as batch statistics do: `quant_stats` holds what calibration found and training
averages, `quant` what an optimizer trains. Each is a nested dict like `params`; at the path of the parameter that the
input is multiplied with stand its arrays (`low` and `high`, `step`, or `clip`), with a leading axis for each layer
scan. Where calibration found that one range does not serve an input, there stands only `dynamic`: how many times the
error of a scale for each token its own was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels import activations
from pallas_kernels.activations import ActSpec, MovingAverage
from passes.observe import Statistic, error_over_dynamic, extremes
from passes.plan import Plan

LEARNED, KEPT = "quant", "quant_stats"
"""Names of the two collections."""
DYNAMIC = "dynamic"
"""In the place of a range's arrays: the input has dynamic scales instead."""
STEP = "step"
"""In `quant_stats`: training steps taken so far, where the recipe has a schedule."""

Flat = dict[str, dict[str, Any]]
"""Name of a range -> its arrays."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When quantization-aware training quantizes, in calls that update `quant_stats`.

    Attributes:
        start: the first step whose weights and activations are quantized; the model is the float one before.
        freeze: the first step that no longer updates moving averages; None for never.
    """

    start: int = 0
    freeze: int | None = None

    def __post_init__(self) -> None:
        """Checks the steps."""
        if self.start < 0 or (self.freeze is not None and self.freeze < 0):
            raise ValueError(f"qjax: {self!r}: steps are counted from 0.")


# The name of a folded matrix, '{conv/kernel,bn/scale}:mul', is cut outside its braces only.
_PARTS = re.compile(r"/(?![^{]*\})")


def not_served(ranges: Flat) -> dict[str, float | None]:
    """The ranges that calibration gave up, for `passes.plan.with_dynamic`."""

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


# --- Calibration -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibration has seen so far; can be saved, loaded, merged and continued.

    Attributes:
        statistics: by name of the range.
        specs: what each range is for.
        batches: how many batches were seen.
    """

    statistics: dict[str, Statistic]
    specs: dict[str, ActSpec]
    batches: int

    def merge(self, other: Calibration) -> Calibration:
        """What this and another calibration of the same model saw together, such as on another host.

        Raises:
            ValueError: they are of different models or recipes.
        """
        if self.specs != other.specs:
            different = sorted(set(self.specs.items()) ^ set(other.specs.items()), key=str)
            raise ValueError(f"qjax: calibrations of different models or recipes, which differ in {different[0][0]!r}.")
        joined = {name: statistic.combine(other.statistics[name]) for name, statistic in self.statistics.items()}
        return Calibration(jax.device_get(joined), self.specs, self.batches + other.batches)

    def ranges(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The collections `quant_stats` and `quant` that follow.

        Raises:
            ValueError: no batch was seen, or a range met NaN, infinity or no value; the message names it.
        """
        if not self.batches:
            raise ValueError(
                "qjax: calibration saw no batch: the iterable is empty (an iterator can be used only once)."
            )
        kept: Flat = {}
        learned: Flat = {}
        for name, spec in self.specs.items():
            statistic = jax.device_get(self.statistics[name])
            if not np.all(statistic.finite):
                raise ValueError(
                    f"qjax: the input of {name!r} has NaN or infinite values in the calibration batches. Check the "
                    "batches and the weights, or keep the input float with a Rule without activations."
                )
            if np.any(statistic.low > statistic.high):
                raise ValueError(
                    f"qjax: the input of {name!r} was never reached by a calibration batch, at least in one layer or "
                    "branch. Calibrate with batches that reach it, or give it a dynamic range."
                )
            low, high = extremes(statistic, spec)
            if spec.dynamic_above is not None:
                ratio = error_over_dynamic(statistic, low, high, spec)
                if ratio > spec.dynamic_above:
                    kept[name] = {DYNAMIC: jnp.asarray(ratio, jnp.float32)}
                    continue
            arrays = activations.ranges_from_extremes(low, high, spec)
            if isinstance(spec.range, MovingAverage):
                arrays["weight"] = jnp.asarray(statistic.weight, jnp.float32)
            (learned if spec.is_learned else kept)[name] = arrays
        return nest(kept), nest(learned)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a file (.npz), atomically."""
        target = Path(path).absolute()
        arrays: dict[str, Any] = {}
        for i, name in enumerate(self.specs):
            fields = dataclasses.asdict(jax.device_get(self.statistics[name]))
            arrays.update({f"{i}.{part}": a for part, a in fields.items() if a is not None})
        head = {
            "format": "qjax calibration",
            "version": 1,
            "batches": self.batches,
            "ranges": [[name, spec.to_json()] for name, spec in self.specs.items()],
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            try:
                np.savez_compressed(file, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is damaged or another one.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(bytes(file["head"]))
                if head.get("format") != "qjax calibration" or head.get("version") != 1:
                    raise ValueError(f"its head says {str(head)[:80]}")
                specs = {name: ActSpec.from_json(spec) for name, spec in head["ranges"]}
                fields = [field.name for field in dataclasses.fields(Statistic)]
                statistics = {
                    name: Statistic(**{part: file.get(f"{i}.{part}") for part in fields})
                    for i, name in enumerate(specs)
                }
                return Calibration(statistics, specs, int(head["batches"]))
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"qjax: {os.fspath(path)} is no calibration that this version reads, or it is damaged ({error}). "
                "Calibrate again."
            ) from error


def arguments(batch: Any) -> tuple:
    """The positional arguments of a batch: a tuple holds them, anything else is the only one."""
    return batch if isinstance(batch, tuple) else (batch,)


def counted(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    """The batches, with a progress bar on a terminal."""
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, "calibrating", transient=True)
