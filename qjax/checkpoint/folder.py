"""A folder that is written whole or not at all, its manifest and its checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def manifest_crc(manifest: Mapping[str, Any]) -> int:
    """CRC-32 of a manifest, of its own entry `crc32` aside."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def file_info(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> None:
    """All files are there and whole; the arrays are read and checked one by one, later."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"qjax: {file} is missing: copy the folder again, or export the model again.")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"qjax: {file} has {file.stat().st_size:,} bytes and not {expected['bytes']:,}: it is damaged. Copy "
                "the folder again, or export the model again."
            )
        if verify and name.startswith("programs/") and file_info(file)["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"qjax: {file} was changed after it was written (SHA-256): copy the folder again, or export the model "
                "again."
            )


FORMAT_VERSION = 1
"""Version of the checkpoint format; a reader takes its own and older ones."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message names the file or parameter."""


# --- Writing -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes its place at `path` when the block ends without an error.

    It is beside its destination until then, so a run that dies leaves at `path` what was there, or nothing.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
    """
    target = Path(path).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(f"qjax: {target} exists; pass overwrite=True to replace it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():  # two renames: at no time is a half-written folder at `path`
            old = temporary.with_name(f"{temporary.name}.old")
            os.replace(target, old)
            try:
                os.replace(temporary, target)
            except BaseException:
                os.replace(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def library_versions(*names: str) -> dict[str, str]:
    """Versions of installed distributions; "source" for a qjax that is run from its sources."""
    versions = {}
    for name in ("qjax", "jax", *names):
        try:
            versions[name] = version("qjax-compiler" if name == "qjax" else name)
        except PackageNotFoundError:
            versions[name] = "source"
    return versions
