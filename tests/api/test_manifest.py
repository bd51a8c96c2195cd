"""A manifest that was edited, its checksum made anew, is an error that names file and field, and never another one."""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.checkpoint.folder import manifest_crc
from qjax.checkpoint.manifest import CHECKPOINT, CHECKPOINTS, EXPORTED, EXPORTS, read_manifest

pytestmark = pytest.mark.usefixtures("compile_quickly")

X = np.linspace(-1, 1, 2 * 16, dtype=np.float32).reshape(2, 16)
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
OTHERS = [None, "no such thing", 10**30, -1, DEEP, {"name": "int9"}]


def fn(params: Any, x: Any) -> Any:
    return (x @ params["up"]) @ params["layers"][0]["down"] + params["bias"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint and an exported model, made once."""
    root = tmp_path_factory.mktemp("folders")
    params = {
        "up": jnp.ones((16, 8)),
        "layers": [{"down": jnp.ones((8, 4))}],
        "bias": jnp.arange(4.0),
        "none": jnp.zeros(0),
    }
    rules = [
        qjax.Rule("up", weights=qjax.int4(group=8, zero_point=True), activations=qjax.dynamic()),
        qjax.Rule("**", weights=qjax.nf4(group=8, double_quant=True)),
    ]
    q = qjax.quantize(fn, rules)
    packed = {**q.convert(params, X), "key": jax.random.key(0)}
    qjax.save(root / "saved", q, packed)
    qjax.export(root / "exported", q, packed, X, platforms=("cpu",))
    return root


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value of a manifest."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def edits(manifest: Any) -> Iterator[str]:
    """Edits a manifest in place, each value left out or another in its place; it is whole again in between."""
    for path in list(places(manifest)):
        node = manifest
        for key in path[:-1]:
            node = node[key]
        before = copy.copy(node)
        for other in ("left out", *OTHERS):
            if other == "left out":
                del node[path[-1]]
            else:
                node[path[-1]] = other
            yield f"{path}: {str(other)[:30]}"
            node.clear()
            node.extend(before) if isinstance(node, list) else node.update(before)


def seal(file: Path, manifest: Any) -> None:
    """Writes the manifest of a checkpoint or of an exported model with its checksum."""
    if {"programs", "platforms"} & set(manifest):
        file.write_text(json.dumps({**manifest, "crc32": manifest_crc(manifest)}))
    else:
        text = json.dumps(manifest)
        file.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "manifest": text}))


@pytest.mark.parametrize(("name", "kind"), [("saved", (CHECKPOINTS, CHECKPOINT)), ("exported", (EXPORTS, EXPORTED))])
def test_an_edited_manifest_is_refused_or_has_all_fields(folders, tmp_path, name, kind):
    """Where it is read, the edit was of what the schema leaves open: text, checksums and sizes of arrays."""
    manifest = read_manifest(folders / name, *kind)
    refused = 0
    for what in edits(manifest):
        seal(tmp_path / "manifest.json", manifest)
        message = None
        try:
            found = read_manifest(tmp_path, *kind)
        except qjax.CheckpointError as error:
            message = str(error)
        if message is None:
            assert set(found) >= set(kind[1].needed), what
        else:
            refused += 1
            assert str(tmp_path) in message, what
    assert refused > 100


FIELDS = {
    "leaves.0.steps": [],
    "leaves.0.path": "other",
    "leaves.0.arrays": {},
    "leaves.0.arrays.value.shape": [5],
    "leaves.0.arrays.value.dtype": "int32",
    "leaves.0.arrays.value.crc32": 1,
    "leaves.0.leaf.kind": "folded",
    "leaves.1.leaf.impl": "rbg",
    "leaves.2.leaf.layout": [[[8, "k"]], [[5, "n"]]],
    "leaves.2.leaf.spec.format": "int9",
    "leaves.2.leaf.order": "nk",
    "recipe.strict": "yes",
    "recipe.rules": [{"pattern": "**", "weights": {"format": "int9"}}],
    "format_version": "1",
}


def put(node: Any, field: str, value: Any) -> None:
    *path, last = field.split(".")
    for key in path:
        node = node[int(key) if isinstance(node, list) else key]
    assert last in node
    node[last] = value


@pytest.mark.parametrize("field", FIELDS)
def test_restore_refuses(folders, tmp_path, field):
    folder = tmp_path / "saved"
    shutil.copytree(folders / "saved", folder)
    manifest = read_manifest(folder)
    put(manifest, field, FIELDS[field])
    seal(folder / "manifest.json", manifest)
    with pytest.raises(qjax.CheckpointError):
        qjax.restore(folder, fn)


PROGRAM = {
    "programs.0.stateful": True,
    "programs.0.arguments": ["x", "y"],
    "programs.0.donated": [3],
    "programs.0.file": "../elsewhere",
    "state": [{"path": "cache", "fill": 0}],
    "platforms": [],
    "files": {"../elsewhere": {"bytes": 1, "sha256": "0" * 64}},
}


@pytest.mark.parametrize("field", PROGRAM)
def test_load_exported_refuses(folders, tmp_path, field):
    folder = tmp_path / "exported"
    shutil.copytree(folders / "exported", folder)
    manifest = read_manifest(folder, EXPORTS, EXPORTED)
    put(manifest, field, PROGRAM[field])
    seal(folder / "manifest.json", manifest)
    with pytest.raises(qjax.CheckpointError, match=r"manifest\.json"):
        qjax.load_exported(folder)


def test_the_message_names_file_field_and_value(folders, tmp_path):
    manifest = read_manifest(folders / "saved")
    put(manifest, "leaves.2.leaf.spec.format", "int9")
    seal(tmp_path / "manifest.json", manifest)
    with pytest.raises(
        qjax.CheckpointError, match=r"manifest\.json: 'leaves\[2\].leaf.spec' is .*int9.*save the model"
    ):
        read_manifest(tmp_path)
