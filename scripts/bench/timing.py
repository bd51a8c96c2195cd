"""Times of compiled programs on a machine that does other work too."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def medians(programs: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median seconds of each program, in turns, so that all of them see the same other load."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for run in range(runs + 1):  # the first run compiles and is not counted
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
