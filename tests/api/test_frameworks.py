"""Frameworks are rows: no verb asks of which framework a model is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FRAMEWORKS = ("linen", "nnx", "function")
WRAPPED = {f"{kind}{name}" for kind in ("Quantized", "Lora") for name in ("Linen", "NNX", "Function")}
OTHERS = [
    file
    for file in sorted((ROOT / "qjax").glob("*/*.py"))
    if file.parent.name in ("models", "compile", "checkpoint", "artifact", "report", "cli")
    and not (file.parent.name == "models" and file.stem in FRAMEWORKS)
]


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_verbs_ask_for_no_framework(file: Path):
    """Such as `isinstance(q, QuantizedNNX)`: what differs between frameworks is said by their bindings."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass"):
            named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            named |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            assert not named & WRAPPED, f"{file}:{node.lineno} asks for {sorted(named & WRAPPED)}"


def test_only_the_table_knows_the_frameworks():
    """Beside the files that hand on public names."""
    for file in OTHERS:
        if file.parent.name == "models" and file.stem in ("frameworks", "lora"):
            continue
        imported = [n.module for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not {f"qjax.models.{name}" for name in FRAMEWORKS} & set(imported), file
