"""`target_chip`: for which chip programs are made that run elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from qjax.pallas_kernels.chips import gpu as gpu_chips
from qjax.pallas_kernels.chips import tpu as tpu_chips


@contextlib.contextmanager
def target_chip(chip: str) -> Iterator[None]:
    """Programs that are traced, lowered or exported in this context get the kernels, and their tiles, for this chip.

    Args:
        chip: "v5e", "v5p", "v6e" or "7x" for a TPU; "a100", "l4", "h100" or "h200" for an NVIDIA GPU.

    Raises:
        ValueError: no such chip is known.
    """
    tables = (tpu_chips, gpu_chips)
    table = next((table for table in tables if chip in table.CHIPS), None)
    if table is None:
        known = ", ".join(name for table in tables for name in table.CHIPS)
        raise ValueError(f"qjax: target_chip({chip!r}): known are {known}.")
    with table.target_chip(chip):
        yield


def platform() -> str:
    """The platform that programs are made for: "tpu" or "cuda" of `target_chip`, or that of JAX: these, or "cpu"."""
    if gpu_chips.asked_for() is not None:
        return "cuda"
    if tpu_chips.asked_for() is not None:
        return "tpu"
    backend = jax.default_backend()
    return {"gpu": "cuda"}.get(backend, backend)
