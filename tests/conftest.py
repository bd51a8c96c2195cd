"""Settings of the whole suite: shapes in signatures are checked at run time, CPU only, small models."""

from __future__ import annotations

import os

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
