"""Sizes of the tiles of the TPU kernels by chip, from a table.

`chips/tpu.json` has a row for each chip, kernel, kind of weight and number of rows of x that `scripts/tpu/tune_tpu.py`
compiled: the tiles whose schedule has the fewest instruction bundles. What has no row gets what `default_blocks` of the
kernel chooses by shape alone, and so does everything where the chip is not known.

The chip is that of this machine. A program that is compiled or exported elsewhere says which one it is for:

    with target_chip("v5e"):
        exported = jax.export.export(jax.jit(f), platforms=["tpu"])(x, w)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qjax.pallas_kernels.chips.table import weight
from qjax.pallas_kernels.numbers.formats import QuantSpec

CHIPS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "7x": "TPU7x"}
"""By name, what a chip that the table has rows for calls itself (`device_kind`)."""

ROWS = (16, 64, 256, 512)
"""Each row of the table is for tiles of at most so many rows of x, and more than the number before."""

KEY = ("chip", "kernel", "weight", "order", "x", "m")
"""The columns that a row is found by."""

# Caches of traced and compiled functions look at it too.
_TARGET = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the table says of one kernel.

    Attributes:
        n: columns of the weight in a tile, at most; a multiple of 128.
        k: rows of the weight in a tile, at most; a multiple of 256.
        scale: whether scales are multiplied in before or after the product; None where the kernel leaves no choice.
    """

    n: int
    k: int
    scale: Literal["before", "after"] | None


@contextlib.contextmanager
def target_chip(chip: str) -> Iterator[None]:
    """Programs that are traced, lowered or exported in this context get the tiles for this chip.

    Args:
        chip: a key of `CHIPS`.

    Raises:
        ValueError: the table does not know this chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"qjax: target_chip({chip!r}): the table has {', '.join(CHIPS)}.")
    with _TARGET(chip):
        yield


def asked_for() -> str | None:
    """The chip of `target_chip`, or None."""
    return _TARGET.value


def chip() -> str | None:
    """The chip that programs are made for: that of `target_chip`, or else of this machine; None if it is no known TPU.

    Asks the default backend only, which an operation on an array asks too.
    """
    if asked_for() is not None:
        return asked_for()
    kind = jax.devices()[0].device_kind
    return next((name for name, own in CHIPS.items() if own == kind), None)


def lookup(kernel: str, m: int, k: int, spec: QuantSpec, order: str, dtype: Any) -> Entry | None:
    """The row of the table for a product on this chip, if there is one.

    Args:
        kernel: "quantized_matmul" or "integer_matmul".
        m: rows of x in a tile.
        k: size of the weight's matrix along the contracted axis.
        spec: of the weight.
        order: of its words as the kernel reads them.
        dtype: of the operands of the dot.
    """
    return _table().get((chip(), kernel, weight(spec, k), order, jnp.dtype(dtype).name, _rows(m)))


def _rows(m: int) -> int | None:
    return next((rows for rows in ROWS if m <= rows), None)


@functools.cache
def _table() -> dict[tuple[Any, ...], Entry]:
    text = importlib.resources.files("qjax.pallas_kernels.chips").joinpath("tpu.json").read_text()
    return {
        tuple(row[name] for name in KEY): Entry(row["n"], row["k"], row.get("scale"))
        for row in json.loads(text)["rows"]
    }
