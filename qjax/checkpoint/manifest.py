"""The manifests of checkpoints and of exported models: one schema, as data, and one reader.

A manifest is JSON with a checksum. That tells damage, not an edit whose maker wrote the checksum anew, so each field is
also checked against the schema: what a reader goes on with has the fields, types and ranges that are written here.
What the fields mean to numbers (a format, a layout) is asked of their own types, and refused in the same words.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import reprlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qjax.checkpoint.folder import FORMAT_VERSION, CheckpointError, manifest_crc
from qjax.pallas_kernels.numbers.formats import QuantSpec
from qjax.pallas_kernels.numbers.packing import packed_rows
from qjax.pallas_kernels.packed.layout import ROLES, Layout
from qjax.recipes import Recipe

EXPORT_VERSION = 1
"""Version of the layout of an exported folder; a reader takes its own and older ones."""

# --- What a field may be -----------------------------------------------------------------------------------------


class _Wrong(Exception):
    """A value that does not fit: where it stands in the manifest, and what should stand there."""

    def __init__(self, where: str, value: Any, wanted: str):
        super().__init__(where)
        self.where, self.value, self.wanted = where, value, wanted


Check = Callable[[Any, str], None]
"""`check(value, where)` raises `_Wrong` for a value that does not fit."""


def _is(wanted: str, fits: Callable[[Any], bool]) -> Check:
    def check(value: Any, where: str) -> None:
        if not fits(value):
            raise _Wrong(where, value, wanted)

    return check


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dtype(value: Any) -> bool:
    try:
        return isinstance(value, str) and jnp.dtype(value).name == value
    except TypeError:
        return False


def _inside(value: Any) -> bool:
    """Whether a name is that of a file in the folder."""
    return isinstance(value, str) and bool(value) and not Path(value).is_absolute() and ".." not in Path(value).parts


TEXT = _is("text", lambda v: isinstance(v, str))
FLAG = _is("true or false", lambda v: isinstance(v, bool))
STRICT = _is("true, false or 'kernels'", lambda v: isinstance(v, bool) or v == "kernels")
COUNT = _is(f"a whole number from 0 to {2**63 - 1}", lambda v: _whole(v) and 0 <= v < 2**63)
CHECKSUM = _is("a CRC-32", lambda v: _whole(v) and 0 <= v < 2**32)
SHA256 = _is("a SHA-256", lambda v: isinstance(v, str) and len(v) == 64 and set(v) <= set("0123456789abcdef"))
SIZE = _is("a size below 2**31", lambda v: _whole(v) and 0 <= v < 2**31)
DTYPE = _is("the name of a dtype", _dtype)
FILE = _is("the name of a file in the folder", _inside)
ORDER = _is("'kn' or 'nk'", lambda v: v in ("kn", "nk"))
NUMBER = _is("a finite number", lambda v: isinstance(v, bool | int | float) and math.isfinite(v) and abs(v) < 2**128)
KEY_WORDS = {"threefry2x32": 2, "fry": 2, "rbg": 4, "unsafe_rbg": 4, "urbg": 4}
KEY_KIND = _is("a kind of random keys", lambda v: isinstance(v, str) and v in KEY_WORDS)
PLATFORM = _is("a platform", lambda v: v in ("tpu", "cuda", "rocm", "cpu"))


@dataclasses.dataclass(frozen=True)
class Fields:
    """An object with fields by name; those of `optional` may be absent, others than these are left alone."""

    needed: Mapping[str, Check]
    optional: Mapping[str, Check] = dataclasses.field(default_factory=dict)

    def __call__(self, value: Any, where: str) -> None:
        """Raises `_Wrong` for a value that does not fit."""
        if not isinstance(value, dict):
            raise _Wrong(where, value, "an object")
        for name, check in self.needed.items():
            if name not in value:
                raise _Wrong(_join(where, name), None, "a value, but it is missing")
            check(value[name], _join(where, name))
        for name, check in self.optional.items():
            if name in value:
                check(value[name], _join(where, name))


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A list of values of one kind."""

    item: Check
    least: int = 0

    def __call__(self, value: Any, where: str) -> None:
        """Raises `_Wrong` for a value that does not fit."""
        if not isinstance(value, list) or len(value) < self.least:
            raise _Wrong(where, value, "a list" + (f" of {self.least} or more" if self.least else ""))
        for i, item in enumerate(value):
            self.item(item, f"{where}[{i}]")


@dataclasses.dataclass(frozen=True)
class ByName:
    """An object whose names are free and whose values are of one kind."""

    item: Check
    name: Check = TEXT

    def __call__(self, value: Any, where: str) -> None:
        """Raises `_Wrong` for a value that does not fit."""
        if not isinstance(value, dict):
            raise _Wrong(where, value, "an object")
        for name, item in value.items():
            self.name(name, where)
            self.item(item, _join(where, name))


@dataclasses.dataclass(frozen=True)
class ReadBy:
    """What a type of qjax reads itself, and what it says of a value that it cannot read."""

    wanted: str
    read: Callable[[Any], Any]

    def __call__(self, value: Any, where: str) -> None:
        """Raises `_Wrong` for a value that does not fit."""
        try:
            hash(self.read(value))  # static data of a pytree, which JAX compares by hash
        except Exception as error:  # the types check what they are made of, each with its own errors
            raise _Wrong(where, value, f"{self.wanted} ({type(error).__name__}: {str(error)[:300]})") from error


@dataclasses.dataclass(frozen=True)
class Or:
    """A value, or null."""

    item: Check

    def __call__(self, value: Any, where: str) -> None:
        """Raises `_Wrong` for a value that does not fit."""
        if value is not None:
            self.item(value, where)


class AllOf(tuple[Check, ...]):
    """What fits several checks, made in turn."""

    def __new__(cls, *checks: Check) -> AllOf:
        """Of the checks, in their order."""
        return super().__new__(cls, checks)

    def __call__(self, value: Any, where: str) -> None:
        """Raises `_Wrong` for a value that does not fit."""
        for check in self:
            check(value, where)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _step(value: Any, where: str) -> None:
    kinds = {"d": str, "i": int, "l": int}
    pair = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in kinds
    if not pair or type(value[1]) is not kinds[value[0]] or (value[0] == "l" and value[1] < 0):
        raise _Wrong(where, value, '["d", name], ["i", number] or ["l", place]')


def _layout(value: Any, where: str) -> None:
    ListOf(ListOf(_factor, 1))(value, where)


def _factor(value: Any, where: str) -> None:
    if not (isinstance(value, list) and len(value) == 2 and value[1] in ROLES):
        raise _Wrong(where, value, f"[size, one of {', '.join(ROLES)}]")
    SIZE(value[0], f"{where}[0]")


# --- The schema --------------------------------------------------------------------------------------------------

SHAPE = ListOf(SIZE)
ARRAY = Fields({"shape": SHAPE, "dtype": DTYPE}, {"crc32": CHECKSUM})
SPEC = AllOf(
    Fields({"zero_point": FLAG, "double_quant": FLAG}),
    ReadBy("a number format as QuantSpec has it", QuantSpec.from_json),
)
RULE = Fields(
    {"pattern": TEXT, "weights": Or(SPEC)},
    {"activations": Or(Fields({"zero_point": FLAG}, {"dynamic_above": Or(NUMBER)}))},
)
RECIPE = AllOf(
    Fields(
        {"rules": ListOf(RULE), "strict": STRICT},
        {
            "fold_batch_norm": FLAG,
            "kv_cache": ListOf(Fields({"pattern": TEXT, "spec": Or(Fields({"zero_point": FLAG}))})),
        },
    ),
    ReadBy("a recipe as Recipe has it", Recipe.from_json),
)


def _leaf(value: Any, where: str) -> None:
    """What a leaf is: its kind says which fields it has."""
    Fields({"kind": _is(f"one of {', '.join(LEAVES)}", lambda v: isinstance(v, str) and v in LEAVES)})(value, where)
    LEAVES[value["kind"]](value, where)


def _part(value: Any, where: str) -> None:
    """A part of a folded parameter, which is not folded itself."""
    if isinstance(value, dict) and value.get("kind") == "folded":
        raise _Wrong(_join(where, "kind"), "folded", "another kind")
    _leaf(value, where)


PART = _is("'own' or 'derived:...'", lambda name: name == "own" or name.startswith("derived:"))
LEAVES: dict[str, Fields] = {
    "packed": Fields({"spec": SPEC, "layout": _layout, "dtype": DTYPE, "order": ORDER}),
    "folded": Fields({"parts": ByName(_part, PART), "shape": SHAPE, "dtype": DTYPE}),
    "key": Fields({"impl": KEY_KIND}),
    "empty": Fields({"shape": AllOf(SHAPE, _is("a shape without values", lambda v: 0 in v)), "dtype": DTYPE}),
    "array": Fields({}),
}
"""Kind of a leaf -> its fields, as `qjax.checkpoint.leaves.describe` writes them."""


def _matrix(info: Any, arrays: Mapping[str, Any], where: str) -> None:
    """The arrays of a packed parameter are those of its format, and have the shapes that it and the layout give."""
    spec, layout = QuantSpec.from_json(info["spec"]), Layout.from_json(info["layout"])
    names = {"words", "values", *(["zero"] * spec.zero_point), *(["absmax", "offset"] * spec.double_quant)}
    if set(arrays) != names:
        raise _Wrong(where, sorted(arrays), f"{sorted(names)}, the arrays of {spec},")
    groups = -(-layout.k // spec.group_size(layout.k))
    expected = {"words": packed_rows(layout.k, spec.format), **({} if spec.double_quant else {"values": groups})}
    columns = {"words": {layout.n}, "values": {layout.n, 1}}
    for name, rows in expected.items():
        shape = arrays[name]["shape"]
        last = shape[-2:] if info["order"] == "kn" else shape[-2:][::-1]
        if len(last) != 2 or last[0] != rows or last[1] not in columns[name]:
            raise _Wrong(f"{where}.{name}.shape", shape, f"{rows} rows of {layout.n} columns, as {spec} has them,")


def _entry(value: Any, where: str) -> None:
    """One leaf: what it is, and an array for each name that its kind has."""
    Fields({"path": TEXT, "steps": ListOf(_step), "leaf": _leaf, "arrays": ByName(ARRAY)})(value, where)
    info, arrays, at = value["leaf"], value["arrays"], f"{where}.arrays"
    names = {"array": {"value"}, "key": {"data"}, "empty": set()}
    if value["path"] != "/".join(str(key) for _, key in value["steps"]):
        raise _Wrong(f"{where}.path", value["path"], "the path that its steps make")
    match info["kind"]:
        case "packed":
            _matrix(info, arrays, at)
        case "folded":
            prefixes = tuple(f"part{i}_" for i in range(len(info["parts"])))
            if stray := [name for name in arrays if not name.startswith(prefixes)]:
                raise _Wrong(at, stray[0], "an array of one of its parts")
            for prefix, part in zip(prefixes, info["parts"].values(), strict=True):
                mine = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
                if part["kind"] == "packed":
                    _matrix(part, mine, at)
                elif set(mine) != names[part["kind"]]:
                    raise _Wrong(at, sorted(mine), f"{sorted(names[part['kind']])}")
        case kind:
            if set(arrays) != names[kind]:
                raise _Wrong(at, sorted(arrays), f"{sorted(names[kind])}")
    if info["kind"] == "key" and arrays["data"]["shape"][-1:] != [KEY_WORDS[info["impl"]]]:
        raise _Wrong(f"{at}.data.shape", arrays["data"]["shape"], f"words of keys of {info['impl']}")


def _leaves(value: Any, where: str) -> None:
    """All leaves, each at a place of its own in the tree."""
    ListOf(_entry)(value, where)
    places = [tuple(map(tuple, entry["steps"])) for entry in value]
    inner = {place[:i] for place in places for i in range(len(place))}
    for i, place in enumerate(places):
        if place in inner or place in places[:i]:
            raise _Wrong(f"{where}[{i}].steps", value[i]["steps"], "a place that no other leaf has or goes through")


LEAVES_ALONE = Fields({"leaves": _leaves})
"""What is written of the first values of a state."""

CHECKPOINT = Fields({"leaves": _leaves, "recipe": RECIPE, "libraries": ByName(TEXT)})
"""What `qjax.save` writes."""

NAMED_ARRAY = Fields({"name": TEXT, "shape": ListOf(_is("a size", lambda v: _whole(v) or isinstance(v, str)))})
PROGRAM = Fields(
    {
        "file": FILE,
        "arguments": ListOf(TEXT),
        "stateful": FLAG,
        "fixed": ByName(TEXT),
        "donated": ListOf(COUNT),
    },
    {"inputs": ListOf(NAMED_ARRAY), "outputs": ListOf(NAMED_ARRAY)},
)
EXPORTED = Fields(
    {
        "libraries": Fields({"qjax": TEXT, "jax": TEXT}),
        "calling_convention": COUNT,
        "platforms": ListOf(PLATFORM, 1),
        "has_weights": FLAG,
        "state": ListOf(Fields({"path": TEXT}, {"fill": NUMBER})),
        "programs": ListOf(PROGRAM, 1),
        "files": ByName(Fields({"bytes": COUNT, "sha256": SHA256}), FILE),
    },
    {"custom_calls": ByName(TEXT), "program_bytes": COUNT},
)
"""What `qjax.export` writes."""

# --- Reading -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of folder with a manifest.

    Attributes:
        title: what the folder is called in messages.
        format: the entry "format" of its manifest.
        version: the newest that this qjax reads, and `versioned` what a version is called.
        unseal: the file's JSON -> the manifest, and whether its checksum is right.
        again: how a folder is made again.
        without, foreign: what is said of a folder without a manifest, and of a manifest of another format.
    """

    title: str
    format: str
    version: int
    versioned: str
    unseal: Callable[[Any], tuple[Any, bool]]
    again: str
    without: str
    foreign: str


def _unseal_text(envelope: Any) -> tuple[Any, bool]:
    text = envelope["manifest"]
    intact = zlib.crc32(text.encode()) == envelope["crc32"]
    return (json.loads(text) if intact else {}), intact


def _unseal_entry(manifest: Any) -> tuple[Any, bool]:
    if manifest.get("format") != EXPORTS.format:
        return manifest, True  # another kind of manifest, which is said of it then
    crc = manifest.pop("crc32")
    return manifest, manifest_crc(manifest) == crc


CHECKPOINTS = Kind(
    "checkpoint",
    "qjax",
    FORMAT_VERSION,
    "checkpoint format",
    _unseal_text,
    "save the model again",
    "{folder} is no qjax checkpoint: it has no manifest.json. Write one with qjax.save; a float Orbax checkpoint is "
    "restored with Orbax and converted with q.convert.",
    "{file} is not a qjax manifest.",
)
EXPORTS = Kind(
    "exported model",
    "qjax exported model",
    EXPORT_VERSION,
    "layout",
    _unseal_entry,
    "export the model again",
    "{folder} is no exported model: it has no manifest.json.",
    "{folder} is no exported model. What qjax.save wrote is read with qjax.restore(path, model).",
)


def read_manifest(
    path: str | os.PathLike[str], kind: Kind = CHECKPOINTS, fields: Fields = CHECKPOINT
) -> dict[str, Any]:
    """The manifest of a folder, with the fields of a schema; reads no arrays.

    Args:
        path: the folder.
        kind: what it should be.
        fields: what its manifest should have.

    Raises:
        FileNotFoundError: nothing is at `path`.
        CheckpointError: another folder, a damaged or edited manifest, or one of a newer qjax; the message names the
            file and the field, what was found and what to do.
    """
    folder = Path(path).absolute()
    if not folder.exists():
        raise FileNotFoundError(f"qjax: there is no {kind.title} at {folder}.")
    file = folder / "manifest.json"
    if not file.is_file():
        raise CheckpointError(f"qjax: {kind.without.format(folder=folder)}")
    try:
        manifest, intact = kind.unseal(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"qjax: {file} is damaged or foreign ({error!r}); {kind.again}.") from None
    if not intact:
        raise CheckpointError(f"qjax: {file} was changed after it was written (checksum); {kind.again}.")
    if not isinstance(manifest, dict) or manifest.get("format") != kind.format:
        raise CheckpointError(f"qjax: {kind.foreign.format(folder=folder, file=file)}")
    try:
        Fields({"format_version": COUNT})(manifest, "")
        number, libraries = manifest["format_version"], manifest.get("libraries")
        if number > kind.version:
            writer = libraries.get("qjax") if isinstance(libraries, dict) else None
            raise CheckpointError(
                f"qjax: {folder} has {kind.versioned} {number}, written by qjax {writer}; this qjax reads up to "
                f"{kind.version}. Upgrade qjax."
            )
        fields(manifest, "")
    except _Wrong as wrong:
        found = "nothing" if wrong.value is None else reprlib.repr(wrong.value)
        raise CheckpointError(
            f"qjax: {file}: {wrong.where!r} is {found}, where {wrong.wanted} should stand. The manifest was edited, or "
            f"is of another qjax: copy the folder again, or {kind.again}."
        ) from None
    return manifest
