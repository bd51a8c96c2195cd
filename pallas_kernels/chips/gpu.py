"""For which GPU programs are made, and tiles of its kernels from a table.

`chips/gpu.json` has a row for each chip, kind of weight, matrix and number of rows of x that `scripts/gpu_check`
timed: the tiles that took the least time. What has no row gets what `default_blocks` of the kernel chooses by shape
alone.

The GPU is that of this machine. A program that is compiled or exported elsewhere says which one it is for:

    with target_chip("h100"):
        exported = jax.export.export(jax.jit(f), platforms=["cuda"])(x, w)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.chips.table import weight
from qjax.pallas_kernels.numbers.formats import QuantSpec

AMPERE = 80

HOPPER = 90  # the only generation that has `wgmma`

KEY = ("chip", "weight", "x", "k", "n", "m")
"""The columns that a row is found by."""

ROWS = (8, 16, 32, 64, 128, 256, 1024, 4096, 1 << 20)
"""Each row of the table is for at most so many rows of x, and more than the number before."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
        kind: how `device_kind` begins.
        capability: ten times its compute capability: 80 for Ampere, 90 for Hopper.
        processors: streaming multiprocessors.
    """

    kind: str
    capability: int
    processors: int


CHIPS = {
    "a100": Chip("NVIDIA A100", 80, 108),
    "l4": Chip("NVIDIA L4", 89, 58),
    "h100": Chip("NVIDIA H100", 90, 132),
    "h200": Chip("NVIDIA H200", 90, 132),
}
"""By name, those that the table may have rows for."""

# Caches of traced and compiled functions look at it too.
_TARGET = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def target_chip(chip: str) -> Iterator[None]:
    """Programs that are traced, lowered or exported in this context are for this chip.

    Args:
        chip: a key of `CHIPS`.

    Raises:
        ValueError: there is no such chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"qjax: target_chip({chip!r}): known are {', '.join(CHIPS)}.")
    with _TARGET(chip):
        yield


def asked_for() -> Chip | None:
    """The GPU of `target_chip`, or None outside of it."""
    return None if _TARGET.value is None else CHIPS[_TARGET.value]


def target() -> Chip | None:
    """The GPU that programs are made for: that of `target_chip`, or else the first one of this machine, or None."""
    if (chip := asked_for()) is not None:
        return chip
    device: Any = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return None
    return Chip(device.device_kind, round(10 * float(device.compute_capability)), device.core_count)


def processors() -> int:
    """Multiprocessors of the GPU that programs are made for, or of an H100 where there is none."""
    return (target() or CHIPS["h100"]).processors


def lookup(m: int, k: int, n: int, spec: QuantSpec, dtype: Any) -> dict[str, int] | None:
    """The fields of the tiles that the table has for a product on this chip, if it has any.

    Args:
        m: rows of x.
        k, n: sizes of the weight's matrix.
        spec: of the weight.
        dtype: of the operands of the dot.
    """
    chip = target()
    name = chip and next((name for name, one in CHIPS.items() if chip.kind.startswith(one.kind)), None)
    rows = next((rows for rows in ROWS if m <= rows), None)
    return _table().get((name, weight(spec, k), jnp.dtype(dtype).name, k, n, rows))


@functools.cache
def _table() -> dict[tuple[Any, ...], dict[str, int]]:
    text = importlib.resources.files("qjax.pallas_kernels.chips").joinpath("gpu.json").read_text()
    return {tuple(row[name] for name in KEY): row["blocks"] for row in json.loads(text)["rows"]}
