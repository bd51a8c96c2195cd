"""What a user installs and imports: what is in the wheel, the names of `qjax`, and that each comes when it is used."""

from __future__ import annotations

import ast
import os
import pickle
import pydoc
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import qjax

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process in a folder, without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"JAX_PLATFORMS": "cpu"} | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)


def sources() -> dict[str, bytes]:
    """What the wheel has to hold: the path in there of each file of the three folders."""
    found = {}
    for package in ("qjax", "passes", "pallas_kernels"):
        for file in (ROOT / package).glob("**/*"):
            if file.is_file() and "__pycache__" not in file.parts:
                inside = file.relative_to(ROOT)
                found[str(inside if package == "qjax" else "qjax" / inside)] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, links as links: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("package") / "checkout"
    folder.mkdir()
    for name in ("qjax", "passes", "pallas_kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """The wheel, made offline and in this environment; by way of the archive of sources, as `build` does it."""
    made = run("-c", BUILD, "sdist", checkout.parent, cwd=checkout)
    assert made.returncode == 0, made.stderr
    with tarfile.open(checkout.parent / made.stdout.split()[-1]) as archive:
        archive.extractall(checkout.parent / "sdist", filter="data")
    (unpacked,) = (checkout.parent / "sdist").iterdir()
    made = run("-c", BUILD, "wheel", checkout.parent, cwd=unpacked)
    assert made.returncode == 0, made.stderr
    return checkout.parent / made.stdout.split()[-1]


def test_the_wheel_installs_qjax_and_nothing_else(wheel: Path):
    assert wheel.name == f"qjax_compiler-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    about = f"qjax_compiler-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in held} == {"qjax", about}
    assert {name: text for name, text in held.items() if name.startswith("qjax/")} == sources()
    assert {"qjax/py.typed", "qjax/pallas_kernels/chips/tpu.json", "qjax/passes/jaxpr/replay.py"} <= set(held)
    assert held[f"{about}/top_level.txt"].split() == [b"qjax"]


def test_the_sources_are_archived_without_the_tests(wheel: Path):
    (unpacked,) = (wheel.parent / "sdist").iterdir()
    files = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
    assert {file.name for file in unpacked.iterdir()} - {"build"} == files | {"qjax", "qjax_compiler.egg-info"}


def test_other_peoples_passes_are_not_imported(wheel: Path, tmp_path: Path):
    site, own = tmp_path / "site", tmp_path / "own"
    own.mkdir()
    for name in ("passes", "pallas_kernels"):
        (own / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the folder that Python runs in')")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import qjax; [getattr(qjax, name) for name in qjax.__all__]; print(qjax.__version__, qjax.__file__)"
    done = run("-c", code, cwd=own, path=site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [PROJECT["version"], str(site / "qjax" / "__init__.py")]


def test_a_checkout_without_links_is_not_built(checkout: Path, tmp_path: Path):
    shutil.copytree(checkout, tmp_path / "copy", symlinks=True)
    link = tmp_path / "copy" / "qjax" / "passes"
    link.unlink()
    link.write_text("../passes")  # what Git makes of a link where it cannot make one
    done = run("-c", BUILD, "wheel", tmp_path, cwd=tmp_path / "copy")
    assert done.returncode != 0
    assert "git config core.symlinks true" in done.stderr


def test_a_name_is_imported_when_it_is_used():
    code = "import sys, qjax; print(*sys.modules)"
    loaded = run("-c", code, cwd=ROOT).stdout.split()
    assert "qjax" in loaded
    assert not {"jax", "flax", "numpy", "optax", "orbax", "rich"} & set(loaded)
    assert [name for name in loaded if name.startswith("qjax.")] == []
    code = "import sys, qjax; qjax.quantize, qjax.Rule, qjax.int4, qjax.PlanError; print(*sys.modules)"
    assert "orbax.checkpoint" not in run("-c", code, cwd=ROOT).stdout.split()


def test_editors_see_the_names_that_there_are():
    """The imports under TYPE_CHECKING are those of the table."""
    (block,) = (
        node
        for node in ast.parse((ROOT / "qjax" / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {node.module: tuple(alias.name for alias in node.names) for node in imports} == qjax._NAMES
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    assert set(qjax.__all__) <= set(dir(qjax))
    with pytest.raises(AttributeError, match="module 'qjax' has no attribute 'quantise'"):
        qjax.quantise  # noqa: B018


def test_the_version_is_that_of_the_project(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vars(qjax), "__version__", None)
    del qjax.__version__
    monkeypatch.setattr("importlib.metadata.version", missing)  # sources that nobody installed
    assert qjax.__version__ == PROJECT["version"]


def missing(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    assert name == "qjax-compiler"
    raise PackageNotFoundError(name)


def test_what_users_keep_in_files_names_its_own_module():
    for value in (qjax.Rule("layers/**", qjax.int4(group=64)), qjax.quantize, qjax.PlanError, qjax.PerGroup(32)):
        assert pickle.loads(pickle.dumps(value)) == value


def test_help_shows_a_tour_and_every_function():
    text = pydoc.plain(pydoc.render_doc(qjax))
    functions = [name for name in qjax.__all__ if isinstance(getattr(qjax, name), types.FunctionType)]
    assert {"quantize", "save", "restore", "export", "load_exported", "compare", "lora", "int4"} <= set(functions)
    for name in functions:
        assert re.search(rf"^    {name}\(", text, re.M), name
        told = re.search(rf"\b{name}\b", qjax.__doc__) or re.fullmatch(r"int[3-7]", name)  # "int2 ... int8"
        assert told, f"{name} is not in the tour"


def test_the_example_of_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"\n\n((?:    .*\n|\n)+)\nModels\n", qjax.__doc__).group(1)
    scope: dict = {}
    exec(compile(textwrap.dedent(example), "help(qjax)", "exec"), scope)
    assert scope["y"].shape == (2, 64)
    assert (tmp_path / "model" / "manifest.json").is_file()
