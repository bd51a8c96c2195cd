"""The layers import one way, private JAX names live in one file, and the public surface is what it says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qjax

ROOT = Path(__file__).parent.parent
# a package may import those to its right: qjax -> passes -> pallas_kernels -> jax
LAYERS = ["qjax", "passes", "pallas_kernels"]
FILES = [file for layer in LAYERS for file in sorted((ROOT / layer).glob("**/*.py"))]


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_imports_go_one_way(file: Path):
    above = LAYERS[: LAYERS.index(file.relative_to(ROOT).parts[0])]
    for name in imports(file):
        assert name.split(".")[0] not in above, f"{file.name} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_private_jax_names_stay_in_control_flow(file: Path):
    private = [name for name in imports(file) if name.startswith(("jax._src", "jaxlib", "flax.core.lift"))]
    assert not private or file.name == "control_flow.py", private


def test_kernels_need_no_flax():
    """A packed model runs without the model's framework."""
    for file in (ROOT / "pallas_kernels").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & {"flax", "optax", "orbax", "rich"}, file.name


def test_public_names_exist_and_are_documented():
    public = [name for name in vars(qjax) if not name.startswith("_")]
    assert {"quantize", "Rule", "save", "restore", "int4", "nf4", "QTensor", "Plan"} <= set(public)
    for name in public:
        value = getattr(qjax, name)
        if callable(value):
            assert value.__doc__, name
