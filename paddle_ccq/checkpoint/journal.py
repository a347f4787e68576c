# SPDX-License-Identifier: Apache-2.0
"""The journal of a run: what it is of, and which matrices are safely on the disk.

One JSON object a line. The first line holds the fingerprint: everything that decides the bytes of
the output. A line follows for every finished matrix, and one for every finished file, each forced
to the disk after the data it speaks of. A last line that was torn by a crash is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CcqError

JOURNAL_VERSION = 1
SAMPLES = 64
SAMPLE_BYTES = 4096
# A safetensors header is at most this long; read no more of a damaged file.
_MAX_HEADER = 100_000_000


def file_fingerprint(path: Path) -> dict[str, Any]:
    """Size, time, header and samples of a source file: cheap, and different for another file."""
    status = path.stat()
    samples = hashlib.sha256()
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _MAX_HEADER))
        for i in range(SAMPLES):
            file.seek(max(status.st_size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
            samples.update(file.read(SAMPLE_BYTES))
    return {
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "header_sha256": hashlib.sha256(header).hexdigest(),
        "samples_sha256": samples.hexdigest(),
    }


def make_fingerprint(
    version: str, options: dict[str, Any], config_json: bytes, files: Iterable[Path]
) -> dict[str, Any]:
    """What the output depends on: our version, the options, config.json, the source files."""
    return {
        "journal": JOURNAL_VERSION,
        "version": version,
        "options": options,
        "config_sha256": hashlib.sha256(config_json).hexdigest(),
        "files": {path.name: file_fingerprint(path) for path in sorted(files)},
    }


# Of the options: which target's output it is.
TARGET_KEY = "target"
# Options that no flag is called like.
_FLAGS = {"wint4_layers": "wint4 layers"}
_FILE_WORDS = {
    "bytes": "size",
    "mtime_ns": "modification time",
    "header_sha256": "header",
    "samples_sha256": "content",
}


def fingerprint_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, each in a few words."""
    differences = []
    if old.get("journal") != new["journal"]:
        return ["the journal's own format"]
    if old["version"] != new["version"]:
        differences.append(f"paddle-ccq version {old['version']} then, {new['version']} now")
    differences += _option_differences(old["options"], new["options"])
    if old["config_sha256"] != new["config_sha256"]:
        differences.append("the model's config.json")
    for name in sorted(old["files"].keys() | new["files"].keys()):
        before, now = old["files"].get(name), new["files"].get(name)
        if before is None or now is None:
            differences.append(f"{name} is {'new' if before is None else 'gone'}")
        elif before != now:
            words = [word for key, word in _FILE_WORDS.items() if before.get(key) != now.get(key)]
            differences.append(f"{' and '.join(words)} of {name}")
    return differences


def _option_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options that differ, as flags.

    A target's own options are no other's, so that of two targets only their names are told.
    """
    keys = old.keys() | new.keys()
    if old.get(TARGET_KEY) != new.get(TARGET_KEY):
        keys = (old.keys() & new.keys()) | {TARGET_KEY}
    differences = []
    for key in sorted(keys):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        flag, states = _FLAGS.get(key, "--" + key.replace("_", "-")), (before, now)
        if None in states:  # a flag that one of them was run without
            differences.append(f"{flag}, {'only then' if now is None else 'only now'}")
        else:
            differences.append(f"{flag} {_show(before)} then, {_show(now)} now")
    return differences


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Journal:
    """An append-only file of JSON lines; a record counts once `append` has returned."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        self._sound_bytes = 0
        if path.exists():
            self._load()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(self._sound_bytes)

    def _load(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        # After the last newline comes nothing, or a line that a crash has torn.
        for number, line in enumerate(lines[:-1]):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError:
                if number == len(lines) - 2:
                    return
                raise CcqError(
                    f"{self.path}: line {number + 1} is damaged; start over with --restart"
                ) from None
            if number == 0:
                self.fingerprint = record
            else:
                self.records.append(record)
            self._sound_bytes += len(line) + 1

    def start(self, fingerprint: dict[str, Any]) -> None:
        """Write the first line of a new journal.

        Raises:
            ValueError: if the journal has been started already.
        """
        if self.fingerprint is not None:
            raise ValueError("the journal has been started already")
        self.fingerprint = fingerprint
        self._write(fingerprint)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record and force it to the disk."""
        self._write(record)
        self.records.append(record)

    def _write(self, record: dict[str, Any]) -> None:
        data = (json.dumps(record, separators=(",", ":")) + "\n").encode("utf-8")
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise

    def close(self) -> None:
        """Every record is on the disk already; a journal without this call is as good."""
        self._file.close()
