"""Settings of the whole suite: shapes in signatures are checked at run time, CPU only, small models."""

from __future__ import annotations

import collections
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

# before any of the packages is imported
_hook = install_import_hook(["qjax"], "beartype.beartype")


@pytest.fixture(scope="module")
def compile_quickly():
    """For files with hundreds of small programs: XLA leaves out its costly optimizations. The others test with them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compile_fully():
    """For a test about what XLA makes of a program, in such a file."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """QJAX_SKIPS=fail: a test that was chosen and is skipped has failed; no command passes for want of a tool."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("QJAX_SKIPS") == "fail":
        report.outcome, report.longrepr = "failed", f"not run: {report.longrepr[2]}"
    return report


def pytest_terminal_summary(terminalreporter: Any):
    """Which files take the time: with --durations, the seconds of the slowest ones."""
    if not terminalreporter.config.option.durations:
        return
    seconds: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest files")
    for name, taken in seconds.most_common(12):
        terminalreporter.write_line(f"{taken:7.1f}s {name}")
