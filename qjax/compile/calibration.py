"""`Calibration`: what observers saw, and the ranges that follow."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compile.ranges import DYNAMIC, KEPT, LEARNED, STEP, Flat, nest
from qjax.pallas_kernels.numbers import activations
from qjax.pallas_kernels.numbers.activation_ranges import ActSpec, MovingAverage
from qjax.passes.calibration.ranges import error_over_dynamic, extremes
from qjax.passes.calibration.statistic import Statistic
from qjax.recipes import Recipe


def calibrated(calibration: Calibration, recipe: Recipe) -> dict[str, Any]:
    """The collections that a calibration gives."""
    kept, learned = calibration.ranges()
    if recipe.schedule is not None:
        kept = {**kept, STEP: jnp.zeros((), jnp.int32)}
    return {name: tree for name, tree in {KEPT: kept, LEARNED: learned}.items() if tree}


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
