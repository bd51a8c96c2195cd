"""The folders import one way, no files import each other, and private JAX names live in one file.

Every import counts: at the top of a file, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import qjax

ROOT = Path(__file__).parent.parent
# A package may import those to its right.
PACKAGES = ["qjax", "passes", "pallas_kernels"]
# The rooms of each package, from the roof down: a file imports rooms of lower floors and files of its own room. Rooms
# of one floor know nothing of each other.
WALLS = {
    "qjax": [
        ["__init__.py"],
        ["cli"],
        ["artifact"],
        ["checkpoint", "report"],
        ["models"],
        ["compile"],
        ["recipes.py", "files"],
    ],
    "passes": [
        ["rewrites"],
        ["plan", "sweep"],
        ["analysis", "solvers"],
        ["jaxpr", "calibration"],
        ["__init__.py"],
    ],
    "pallas_kernels": [
        ["ops/epilogue_matmul"],
        ["ops/integer_matmul", "ops/ragged_matmul", "ops/fp8_matmul", "ops/horizontal_matmul", "ops/cache_attention"],
        ["ops/matmul", "ops/cache_dot", "ops/take"],
        ["ops/primitive.py"],
        ["ops/partition.py"],
        ["backends"],
        ["chips"],
        ["packed"],
        ["numbers"],
        ["__init__.py", "ops/__init__.py"],
    ],
}
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).glob("**/*.py"))]


def module_of(file: Path) -> str:
    """The import name of a file; `passes` and `pallas_kernels` are packages of `qjax`."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "qjax" else ["qjax", *parts])


MODULES = {module_of(file): file for file in FILES}


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """Every module that a file imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports name their whole path"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inside & set(MODULES) or {node.module})
            if not inside <= set(MODULES):
                found.add(node.module)
    return frozenset(found)


def own_imports(file: Path) -> list[Path]:
    """The files of the project that a file imports."""
    return [MODULES[name] for name in sorted(imports(file)) if name in MODULES]


def floor(file: Path) -> tuple[int, str]:
    """Where a file stands in its package: the number of its floor, from the roof down, and its room."""
    package, *inside = file.relative_to(ROOT).parts
    for number, rooms in enumerate(WALLS[package]):
        for room in rooms:
            if "/".join(inside).startswith(room if room.endswith(".py") else f"{room}/"):
                return number, room
    raise AssertionError(f"{file.relative_to(ROOT)} stands in no room: give it one in WALLS")


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_one_way(file: Path):
    package = file.relative_to(ROOT).parts[0]
    for imported in own_imports(file):
        other = imported.relative_to(ROOT).parts[0]
        if other != package:
            assert PACKAGES.index(other) > PACKAGES.index(package), f"{name(file)} imports {name(imported)}"
        else:
            (here, room), (there, other_room) = floor(file), floor(imported)
            assert room == other_room or there > here, f"{name(file)} imports {name(imported)}, which is not below it"


def test_no_circles_of_files():
    """No file is reached from itself: what stands in one can be read without the others."""
    done: set[Path] = set()

    def visit(file: Path, path: list[Path]) -> None:
        assert file not in path, " -> ".join(map(name, [*path[path.index(file) :], file]))
        if file not in done:
            for imported in own_imports(file):
                visit(imported, [*path, file])
            done.add(file)

    for file in FILES:
        visit(file, [])


@pytest.mark.parametrize("file", FILES, ids=name)
def test_private_jax_names_stay_in_control_flow(file: Path):
    private = [name for name in imports(file) if name.startswith(("jax._src", "jaxlib", "flax.core.lift"))]
    assert not private or name(file) == "passes/jaxpr/control_flow.py", private


def test_kernels_need_no_flax():
    """A packed model runs without the model's framework."""
    for file in FILES:
        if file.relative_to(ROOT).parts[0] == "pallas_kernels":
            assert not {name.split(".")[0] for name in imports(file)} & {"flax", "optax", "orbax", "rich"}, name(file)


def test_public_names_exist_and_are_documented():
    assert {"quantize", "Rule", "save", "restore", "int4", "nf4", "QTensor", "Plan"} <= set(qjax.__all__)
    for name in qjax.__all__:
        value = getattr(qjax, name)
        if callable(value):
            assert value.__doc__, name
