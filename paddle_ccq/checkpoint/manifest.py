# SPDX-License-Identifier: Apache-2.0
"""The manifest: size and sha256 of every file of a checkpoint, written as the last of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import CcqError
from .safetensors_io import load_json

MANIFEST_FILE = "ccq-manifest.json"
MANIFEST_VERSION = 1
_READ_BYTES = 8 << 20


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def walk_files(folder: Path) -> Iterator[str]:
    """Relative names (with /) of all files below a folder but the manifest, sorted."""
    names = (
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
    return iter(sorted(name for name in names if name != MANIFEST_FILE))


def manifest_bytes(folder: Path, known: dict[str, str]) -> bytes:
    """The manifest of a folder; `known` holds hashes that need no second reading."""
    files = {}
    for name in walk_files(folder):
        path = folder / name
        sha256 = known.get(name) or file_sha256(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256}
    content = {"version": MANIFEST_VERSION, "algorithm": "sha256", "files": files}
    return (json.dumps(content, indent=1) + "\n").encode("utf-8")


def read_manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """File name -> (bytes, sha256), or None where the folder has no manifest."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    content = load_json(path)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("version") != MANIFEST_VERSION:
        raise CcqError(f"{path}: not a manifest of version {MANIFEST_VERSION}")
    result = {}
    for name, entry in files.items():
        parts = Path(name).parts
        sound = (
            isinstance(entry, dict)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str)
            and not Path(name).is_absolute()
            and ".." not in parts
        )
        if not sound:
            raise CcqError(f"{path}: damaged entry for {name!r}")
        result[name] = (entry["bytes"], entry["sha256"])
    return result


def check_manifest(folder: Path, hashes: bool = True) -> list[str]:
    """Problems found by holding the folder against its manifest, one line each."""
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    problems = []
    present = set(walk_files(folder))
    for name, (size, sha256) in manifest.items():
        path = folder / name
        if name not in present:
            problems.append(f"{name}: listed in {MANIFEST_FILE} but missing")
        elif path.is_symlink():
            problems.append(f"{name}: a link where {MANIFEST_FILE} lists a file")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes, {MANIFEST_FILE} says {size}")
        elif hashes and file_sha256(path) != sha256:
            problems.append(f"{name}: sha256 differs from {MANIFEST_FILE}; the content has changed")
    problems += [
        f"{name}: not listed in {MANIFEST_FILE}" for name in sorted(present - manifest.keys())
    ]
    return problems
