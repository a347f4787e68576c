# SPDX-License-Identifier: Apache-2.0
"""Writing the planned checkpoint: beside the output, resumable, renamed into place at the end.

All work happens below `<output>.ccq-partial/`: a lock, the journal, and the folder `checkpoint`,
whose rename to `<output>` is the last act. So an output that exists is a finished one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import CcqError
from .journal import Journal, fingerprint_differences
from .manifest import MANIFEST_FILE, manifest_bytes
from .plan import Plan
from .planned import PlannedTensor
from .reader import JOURNAL_FILE, PARTIAL_SUFFIX
from .safetensors_format import INDEX_FILE, StoredSpec, index_bytes
from .safetensors_writer import SafetensorsWriter, sync_folder

CHECKPOINT_FOLDER = "checkpoint"
LOCK_FILE = "lock"
# Costs of layers that an allocation was made from, so that a run that goes on makes the same.
SENSITIVITY_FILE = "sensitivity.json"
# Gradients that calibration weighs tokens by, so that a run that goes on has them.
TOKEN_WEIGHTS_FILE = "token-weights.npz"
# Room for the index, configuration, tokenizer and journal, on top of the tensors.
SMALL_FILES_BYTES = 64_000_000


def partial_folder(output: Path) -> Path:
    """Where a run for this output works."""
    return output.with_name(output.name + PARTIAL_SUFFIX)


def rank_folders(folder: Path, size: int) -> list[Path]:
    """The folder of each rank; a single rank has the checkpoint folder itself."""
    return [folder] if size == 1 else [folder / f"rank{rank}" for rank in range(size)]


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, in a folder that is made where it is missing; force it to the disk."""
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class Workplace:
    """The partial folder of one output, held by one process at a time."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = partial_folder(output)
        self.checkpoint = self.folder / CHECKPOINT_FOLDER
        self._lock: int | None = None

    def __enter__(self) -> Workplace:
        if os.path.lexists(self.output) and not self.folder.exists():
            raise self._exists()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        while self._lock is None:
            self.folder.mkdir(exist_ok=True)
            self._lock = self._take_lock()
        return self

    def _exists(self) -> CcqError:
        return CcqError(f"{self.output}: exists already; choose another --output or remove it")

    def _take_lock(self) -> int | None:
        path = self.folder / LOCK_FILE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CcqError(
                f"{self.output}: another run is writing it at the moment; wait for that run"
            ) from None
        # A run that has just finished may have removed the file that was locked here.
        try:
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is None:
            return
        # Nothing was begun: leave nothing behind.
        if not (self.folder / JOURNAL_FILE).exists() and not self.checkpoint.exists():
            self._remove()
        os.close(self._lock)
        self._lock = None

    def _remove(self) -> None:
        for name in (JOURNAL_FILE, LOCK_FILE, SENSITIVITY_FILE, TOKEN_WEIGHTS_FILE):
            (self.folder / name).unlink(missing_ok=True)
        # Not empty if somebody put a file there, or if another run is waiting already.
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def discard(self) -> None:
        """Throw away what an earlier run left (--restart)."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        for name in (JOURNAL_FILE, TOKEN_WEIGHTS_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def open_journal(self, fingerprint: dict[str, Any]) -> Journal:
        """The journal to go on with, or a new one; refuses one of another job."""
        if os.path.lexists(self.output) and self.checkpoint.exists():
            raise self._exists()
        journal = Journal(self.folder / JOURNAL_FILE)
        if journal.fingerprint is None:
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            if os.path.lexists(self.output):
                journal.close()
                (self.folder / JOURNAL_FILE).unlink()
                raise self._exists()
            journal.start(fingerprint)
            return journal
        differences = fingerprint_differences(journal.fingerprint, fingerprint)
        if differences:
            journal.close()
            raise CcqError(
                f"{self.folder}: belongs to an interrupted run that was not the same:"
                f" {'; '.join(differences)}. Repeat that command to finish it, or add --restart to"
                " start over"
            )
        return journal

    @property
    def finished(self) -> bool:
        """Whether an earlier run got as far as the rename, and no further."""
        return not self.checkpoint.exists() and self.output.is_dir()

    def publish(self) -> None:
        """Rename the checkpoint into place: from here on the output exists, and is whole."""
        if os.path.lexists(self.output):
            raise self._exists()
        os.rename(self.checkpoint, self.output)
        sync_folder(self.output.parent)

    def clean(self) -> None:
        """Remove journal and lock after publishing."""
        self._remove()


class CheckpointWriter:
    """Writes every rank's tensors in plan order; goes on where the journal ends."""

    def __init__(self, plan: Plan, workplace: Workplace, journal: Journal) -> None:
        self.plan = plan
        self.journal = journal
        self.folder = workplace.checkpoint
        self.ranks = rank_folders(self.folder, plan.tensor_parallel_size)
        self.hashes: dict[str, str] = {}
        self.done = sum("item" in record for record in journal.records)
        self._open: list[SafetensorsWriter] = []
        self._first_of = {shard.tensors[0].index: i for i, shard in enumerate(plan.shards)}
        for rank in self.ranks:
            rank.mkdir(parents=True, exist_ok=True)
        self._take_over()

    def tensor_records(self) -> list[dict[str, Any]]:
        """The journal's records of finished matrices, in order."""
        return [record for record in self.journal.records if "item" in record]

    def remaining_bytes(self) -> int:
        """Room that is still needed on the disk."""
        left = sum(planned.rank_bytes for planned in self.plan.tensors[self.done :])
        return left * len(self.ranks) + SMALL_FILES_BYTES

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _take_over(self) -> None:
        """Check finished files by size, read the unfinished ones again, cut off what is torn."""
        finished = {record["file"]: record for record in self.journal.records if "file" in record}
        records = self.tensor_records()
        for record, planned in zip(records, self.plan.tensors, strict=False):
            if record["item"] != planned.index or record["name"] != planned.name:
                raise CcqError(f"{self.journal.path}: out of order; start over with --restart")
        for shard in self.plan.shards:
            done = [planned for planned in shard.tensors if planned.index < self.done]
            if not done:
                continue
            complete = len(done) == len(shard.tensors)
            writers = []
            for rank, folder in enumerate(self.ranks):
                path = folder / shard.name
                record = finished.get(self._relative(path))
                if record is not None:
                    self._check_size(path, record["bytes"])
                    self.hashes[self._relative(path)] = record["sha256"]
                    continue
                expected = [h for planned in done for h in records[planned.index]["sha256"][rank]]
                writers.append(self._reopen(path, shard.specs, expected))
            if writers and complete:
                self._close(writers)
            elif writers:
                self._open = writers
                if len(writers) != len(self.ranks):
                    raise CcqError(f"{self.journal.path}: damaged; start over with --restart")

    def _check_size(self, path: Path, expected: int) -> None:
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "is gone" if size is None else f"has {size} bytes instead of {expected}"
            raise CcqError(f"{path}: was finished but {found}; start over with --restart")

    def _reopen(
        self,
        path: Path,
        specs: Sequence[StoredSpec],
        expected: list[str],
    ) -> SafetensorsWriter:
        found = iter(expected)

        def check(name: str, sha256: str) -> None:
            if sha256 != next(found):
                raise CcqError(
                    f"{path}: {name} is not what the journal recorded; the file was changed or the"
                    " disk lost data; start over with --restart"
                )

        if not path.is_file():
            raise CcqError(f"{path}: is gone; start over with --restart")
        return SafetensorsWriter.resume(
            path, specs, self.plan.target.shard_metadata, len(expected), check
        )

    def write(
        self, planned: PlannedTensor, parts: list[dict[str, np.ndarray]], stats: dict[str, Any]
    ) -> dict[str, Any]:
        """Append one matrix: its tensors by full name, for every rank.

        On return they are on the disk, and so is the journal's record, which is returned.

        Raises:
            ValueError: if it is not the plan's next matrix.
        """
        if planned.index != self.done:
            raise ValueError(f"{planned.name} is written out of order")
        if planned.index in self._first_of:
            shard = self.plan.shards[self._first_of[planned.index]]
            self._open = [
                SafetensorsWriter(folder / shard.name, shard.specs, self.plan.target.shard_metadata)
                for folder in self.ranks
            ]
            for folder in self.ranks:
                sync_folder(folder)
        hashes: list[list[str]] = []
        for writer, tensors in zip(self._open, parts, strict=True):
            hashes.append([])
            for name, _, shape in planned.specs:
                # NumPy makes a single number an array of one, which it is not on disk.
                array = np.ascontiguousarray(tensors[name]).reshape(shape)
                writer.write(name, array)
                data = memoryview(array.reshape(-1).view(np.uint8))
                hashes[-1].append(hashlib.sha256(data).hexdigest())
            writer.sync()
        record = {"item": planned.index, "name": planned.name, "sha256": hashes, "stats": stats}
        self.journal.append(record)
        self.done += 1
        if all(writer.n_done == len(writer.specs) for writer in self._open):
            self._close(self._open)
            self._open = []
        return record

    def _close(self, writers: list[SafetensorsWriter]) -> None:
        for writer in writers:
            writer.close()
            name = self._relative(writer.path)
            self.hashes[name] = writer.sha256()
            self.journal.append({"file": name, "bytes": writer.nbytes, "sha256": writer.sha256()})

    def finish(self, files: dict[str, bytes]) -> None:
        """Write the small files (by name relative to the output), the indexes, the manifest.

        Raises:
            ValueError: if matrices are missing.
        """
        if self.done != len(self.plan.tensors):
            raise ValueError(f"{self.done} of {len(self.plan.tensors)} matrices are written")
        for folder in self.ranks:
            write_file(
                folder / INDEX_FILE,
                index_bytes({shard.name: shard.specs for shard in self.plan.shards}),
            )
        for name, data in files.items():
            write_file(self.folder / name, data)
        self._remove_strangers(files)
        write_file(self.folder / MANIFEST_FILE, manifest_bytes(self.folder, self.hashes))
        for folder in dict.fromkeys((self.folder, *self.ranks)):
            sync_folder(folder)

    def _remove_strangers(self, files: dict[str, bytes]) -> None:
        """Nothing but this run's files may end up in the output."""
        wanted = {*files, *self.hashes}
        wanted |= {self._relative(folder / INDEX_FILE) for folder in self.ranks}
        for path in self.folder.rglob("*"):
            if not path.is_dir() and self._relative(path) not in wanted:
                path.unlink()

    def abort(self) -> None:
        """Let go of open files; the journal says where to go on."""
        for writer in self._open:
            writer.abort()


def json_bytes(content: dict[str, Any]) -> bytes:
    """Readable JSON for the output folder; the same content gives the same bytes."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
