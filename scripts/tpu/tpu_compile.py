"""Compiles programs for a TPU on a machine that has none, and reads the schedule that the compiler made.

`libtpu` holds the whole TPU compiler. It needs the description of a chip, not the chip:

    compiled = compile(f, jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16), ..., chip="v6e")
    compiled.as_text()          # optimized HLO
    compiled.memory_analysis()  # bytes

    schedules = compile_scheduled(f, ..., chip="v6e")  # by name of fusion or kernel: instruction bundles, units, spills

Nothing runs, so nothing here says how long a program takes. Tests and benchmarks import this file.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import glob
import importlib.util
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from qjax.pallas_kernels.chips.tpu import target_chip

# Where libtpu is installed, JAX would look for a TPU with it, and libtpu is loaded only once.
jax.config.update("jax_platforms", "cpu")

# The smallest slice of each that libtpu describes.
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}

# No questions to the metadata server; a process may load libtpu beside another, as none of them opens a device; no log
# files, and no log: errors of the compiler come as exceptions.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Units:
    """How much is asked of each part of the chip.

    Attributes:
        bundles: VLIW instructions, one a cycle where nothing stalls.
        mxu, xlu, valu, eup: operations of the matrix unit, the lane shuffles, the vector arithmetic and the
            transcendental unit.
        load, store: vector loads from and stores to VMEM, those of spills included.
        fills, spills: the loads and stores of vector registers for want of others.
    """

    bundles: int
    mxu: int
    xlu: int
    valu: int
    eup: int
    load: int
    store: int
    fills: int
    spills: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one fusion or kernel was scheduled to.

    Attributes:
        text: its instructions, each counted once.
        step: those of one pass through its outermost loop, which is the grid of a Pallas kernel: loops inside it as
            often as they run (once where the text does not say: copies of small operands), both branches of each
            condition; waiting for memory is not in it.
    """

    text: Units
    step: Units


def compile(function: Callable[..., Any], *args: Any, chip: str, **kwargs: Any) -> jax.stages.Compiled:
    """Compiles `function`, jitted or not, for one core of a TPU.

    Args:
        function: what to compile.
        args, kwargs: its arguments, arrays or anything with a shape and a dtype (`jax.ShapeDtypeStruct`).
        chip: a key of `CHIPS`.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
        Exception: whatever Pallas or the TPU compiler says about the program.
    """
    return _compile(function, args, kwargs, chip)


def compile_scheduled(
    function: Callable[..., Any], *args: Any, chip: str, **kwargs: Any
) -> tuple[jax.stages.Compiled, dict[str, Schedule]]:
    """As `compile`, with the schedule of each fusion and kernel of the program by its name in the HLO.

    libtpu decides when it is loaded whether it writes schedules, so the first compilation of a process must be one of
    these.

    Raises:
        RuntimeError: `compile` came first.
    """
    directory = _dump_directory()
    for file in directory.iterdir():
        file.unlink()
    compiled = _compile(function, args, kwargs, chip)
    schedules = {}
    for table in sorted(directory.glob("*-final_hlo-static-per-bundle-utilization.txt")):
        named = re.fullmatch(r"(\d+-(.+))-\d+-final_hlo-static-per-bundle-utilization\.txt", table.name)
        assert named is not None, table.name
        (bundles,) = directory.glob(f"{glob.escape(named[1])}-*[0-9]-final_bundles.txt")
        schedules[named[2]] = _read(table.read_text(), bundles.read_text())
    return compiled, schedules


def _compile(function: Callable[..., Any], args: Any, kwargs: Any, chip: str) -> jax.stages.Compiled:
    sharding = SingleDeviceSharding(_topology(chip).devices[0])
    args, kwargs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (args, kwargs))
    jitted = function if hasattr(function, "trace") else jax.jit(function)  # another jit would drop donations
    with target_chip(chip):  # the tiles of qjax's kernels
        return jitted.trace(*args, **kwargs).lower(lowering_platforms=("tpu",)).compile()


@functools.cache
def _topology(chip: str) -> topologies.TopologyDescription:
    if chip not in CHIPS:
        raise ValueError(f"chip={chip!r}: one of {', '.join(CHIPS)}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]' (Linux on x86-64; no TPU is needed).",
            name="libtpu",
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])


@functools.cache
def _dump_directory() -> Path:
    """Where libtpu writes schedules, from its loading on."""
    if _topology.cache_info().currsize:
        raise RuntimeError("compile_scheduled: libtpu was loaded by compile. Call this first, in a process of its own.")
    directory = Path(tempfile.mkdtemp(prefix="qjax-tpu-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(
        (
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            f"--xla_jf_dump_to={directory}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=.*final_(hlo-static|bundles).*",
        )
    )
    return directory


_COLUMNS = {
    "mxu": "MXU",
    "xlu": "XLU",
    "valu": "VALU",
    "eup": "EUP",
    "load": "VLOAD",
    "store": "VSTORE",
    "fills": "VLOAD:FILL",
    "spills": "VSTORE:SPILL",
}


def _read(table: str, bundles: str) -> Schedule:
    """From a table with a line for each bundle, how many operations it gives to each unit, and from the bundles."""
    header, _, lines = table.partition("== UTILIZATION:\n")
    columns = header.splitlines()[1].split(", ")
    rows = [dict(zip(columns, map(int, line.split()), strict=True)) for line in lines.splitlines()]
    passes = _passes(bundles)
    assert len(passes) == len(rows)

    def total(times: list[int]) -> Units:
        def of(column: str) -> int:
            return sum(count * row[column] for count, row in zip(times, rows, strict=True))

        return Units(bundles=sum(times), **{field: of(column) for field, column in _COLUMNS.items()})

    return Schedule(total([1] * len(rows)), total(passes))


def _passes(bundles: str) -> list[int]:
    """How often each bundle runs in one pass through the outermost loop: 0 for those outside of it."""
    # A line is `address LB: >> { instructions }`: LB where the body of a loop begins, a `>` for each loop around. A
    # bundle of a loop that was given an instruction from outside it has the marks of that one.
    depths, begins, trips = [], [], []
    for line in bundles.splitlines():
        if match := re.match(r"\s*(?:0x)?[0-9a-f]+ +(\w\w)?:([ >]*)\{", line):
            depths.append(match[2].count(">"))
            begins.append(match[1] == "LB")
            found = re.search(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/", line)
            trips.append(int(found[1]) if found else None)
    times = [min(depth, 1) for depth in depths]
    starts = [i for i, begin in enumerate(begins) if begin and depths[i] > 1]
    for start, following in itertools.pairwise([*starts, len(depths)]):
        end = 1 + max(i for i in range(start, following) if depths[i] > 1)
        counts = [count for count in trips[start:end] if count is not None]
        if len(counts) > 1 or max(depths[start:end]) > 2:
            raise NotImplementedError("a loop inside a loop of a kernel")
        times[start:end] = [counts[0] if counts else 1] * (end - start)
    return times
