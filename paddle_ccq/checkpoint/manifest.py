# SPDX-License-Identifier: Apache-2.0
"""The manifest: size and sha256 of every file of a checkpoint, written as the last of its files."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CcqError
from .safetensors_io import load_json

MANIFEST_FILE = "ccq-manifest.json"
NO_MANIFEST = (
    f"no {MANIFEST_FILE}: hashes can't be checked; a changed byte shows only where it makes a value"
    " impossible"
)
MANIFEST_VERSION = 1
_READ_BYTES = 8 << 20
SHOWN_ADDED = 6

# Left in a folder by those who keep or carry it, none of it part of the model.
FOREIGN = (
    # Hubs' clients: download records, locks, parts of files, attributes.
    *(".cache", ".huggingface", ".gitattributes", ".locks", "._____temp", "*.incomplete"),
    *(".msc", ".mdl", ".mv", ".ms_cache", ".model_info", ".aistudio*"),
    # Version control.
    *(".git", ".gitignore", ".gitmodules", ".gitkeep", ".hg", ".hgignore", ".svn", ".dvc"),
    *(".dvcignore", ".lfsconfig", ".bzr"),
    # Editors and notebooks.
    *(".ipynb_checkpoints", "__pycache__", ".idea", ".vscode", "*~", ".*.sw?"),
    # Operating systems and file systems.
    *(".DS_Store", "._*", ".Spotlight-V100", ".Trashes", ".Trash-*", ".fseventsd", "__MACOSX"),
    *("Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
    *("lost+found", ".nfs*", ".directory", ".fuse_hidden*", ".snapshot", "@eaDir"),
)
# Compared in lower case.
DOCUMENTS = (
    *("readme*", "license*", "licence*", "notice*", "copying*", "changelog*", "citation*"),
    *("*.md", "*.rst", "*.txt", "*.pdf", "*.html", "*.ipynb", "*.bib", "*.cff"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.ico"),
)
# Text that tokenizers are made of.
_READ_BY_PROGRAMS = ("merges*", "vocab*", "added_tokens*", "special_tokens*", "tokenizer*")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def walk_files(folder: Path) -> Iterator[str]:
    """Relative names (with /) of all files below a folder, sorted.

    The manifest is left out, and what hubs, version control and operating systems leave. A link to
    a folder counts as one file, so that links in a circle do no harm.
    """
    names = []
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in links and not is_foreign(name)]
        names += [(below / name).as_posix() for name in (*files, *links) if not is_foreign(name)]
    return iter(sorted(name for name in names if name != MANIFEST_FILE))


def is_foreign(name: str) -> bool:
    """Whether a file or folder of this name is what a hub, version control or a system leaves."""
    return any(fnmatchcase(name, pattern) for pattern in FOREIGN)


def is_document(name: str) -> bool:
    """Whether a file is for people to read: no program that computes with a model looks at it."""
    name = name.rpartition("/")[2].lower()
    return any(fnmatchcase(name, pattern) for pattern in DOCUMENTS) and not any(
        fnmatchcase(name, pattern) for pattern in _READ_BY_PROGRAMS
    )


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
    """File name -> (bytes, sha256), or None where the folder has no manifest.

    Raises:
        CcqError: if it is no manifest of a known version, or an entry is damaged.
    """
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


@dataclass
class ManifestCheck:
    """What holding a folder against its manifest found, one line each.

    `problems` are about files that decide what is computed; `notes` about all others: documents
    that were edited or removed, and files that were added.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_manifest(folder: Path, hashes: bool = True) -> ManifestCheck:
    """Hold a folder against its manifest; links are followed. Nothing is found without one.

    Raises:
        CcqError: the manifest itself is damaged.
    """
    found = ManifestCheck()
    manifest = read_manifest(folder)
    if manifest is None:
        return found
    for name, (size, sha256) in manifest.items():
        text = _difference(folder / name, size, sha256, hashes)
        if text:
            (found.notes if is_document(name) else found.problems).append(f"{name}: {text}")
    # A folder that is a link was looked into above, by the names of its files.
    parents = {parent.as_posix() for name in manifest for parent in Path(name).parents}
    added = [name for name in walk_files(folder) if name not in manifest and name not in parents]
    if added:
        shown = ", ".join(added[:SHOWN_ADDED])
        more = f" and {len(added) - SHOWN_ADDED} more" if len(added) > SHOWN_ADDED else ""
        found.notes.append(f"not listed in {MANIFEST_FILE}: {shown}{more}")
    return found


def _difference(path: Path, size: int, sha256: str, hashes: bool) -> str | None:
    """How a file differs from its entry in the manifest, or None."""
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            return f"a link to {os.readlink(path)}, which cannot be read ({error.strerror})"
        return f"listed in {MANIFEST_FILE} but missing"
    if not stat.S_ISREG(status.st_mode):
        return f"not a regular file; {MANIFEST_FILE} lists one of {size} bytes"
    if status.st_size != size:
        return f"{status.st_size} bytes, {MANIFEST_FILE} says {size}"
    if hashes and file_sha256(path) != sha256:
        return f"sha256 differs from {MANIFEST_FILE}; the content has changed"
    return None
