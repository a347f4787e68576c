# SPDX-License-Identifier: Apache-2.0
"""Streaming, resumable writing of one safetensors file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import CcqError
from .safetensors_format import DTYPES, StoredSpec, build_header, tensor_bytes

_COPY_BYTES = 8 << 20


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the order of `specs`.

    All names, dtypes and shapes are known beforehand, so the header goes first and no more than
    one tensor is ever held. A run that was interrupted goes on with `resume`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[StoredSpec],
        metadata: dict[str, str] | None = None,
    ) -> None:
        self._prepare(path, specs, metadata)
        self._file: BinaryIO = open(self.path, "wb", buffering=0)  # noqa: SIM115
        self._append(self.header_bytes)

    def _prepare(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[StoredSpec],
        metadata: dict[str, str] | None,
    ) -> None:
        self.path = Path(path)
        self.specs = [(name, dtype, tuple(shape)) for name, dtype, shape in specs]
        self.header_bytes = build_header(self.specs, metadata)
        self.n_done = 0
        self._digest = hashlib.sha256()

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        specs: Sequence[StoredSpec],
        metadata: dict[str, str] | None,
        n_done: int,
        on_tensor: Callable[[str, str], None] | None = None,
    ) -> SafetensorsWriter:
        """Reopen an interrupted file after its first `n_done` tensors; what follows is cut off.

        The finished part is read once for the file's hash; `on_tensor(name, sha256)` is called
        for each finished tensor, so that the caller can compare it with what it recorded.

        Raises:
            ValueError: for more finished tensors than the file has.
        """
        if n_done == 0:
            return cls(path, specs, metadata)
        writer = cls.__new__(cls)
        writer._prepare(path, specs, metadata)
        if not 0 < n_done <= len(writer.specs):
            raise ValueError(f"{n_done} finished tensors of {len(writer.specs)}")
        writer._file = open(writer.path, "r+b", buffering=0)  # noqa: SIM115
        try:
            writer._take_over(n_done, on_tensor)
        except BaseException:
            writer._file.close()
            raise
        return writer

    def _take_over(self, n_done: int, on_tensor: Callable[[str, str], None] | None) -> None:
        if self._file.read(len(self.header_bytes)) != self.header_bytes:
            raise CcqError(
                f"{self.path}: header differs from what this run would write; the interrupted run"
                " had another input or other settings"
            )
        self._digest.update(self.header_bytes)
        for name, dtype, shape in self.specs[:n_done]:
            tensor_digest = hashlib.sha256() if on_tensor else None
            left = tensor_bytes(dtype, shape)
            while left:
                chunk = self._file.read(min(left, _COPY_BYTES))
                if not chunk:
                    raise CcqError(
                        f"{self.path}: ends inside {name!r}, which was recorded as finished"
                    )
                left -= len(chunk)
                self._digest.update(chunk)
                if tensor_digest:
                    tensor_digest.update(chunk)
            if on_tensor and tensor_digest:
                on_tensor(name, tensor_digest.hexdigest())
        self._file.truncate(self._file.tell())
        self.n_done = n_done

    def _append(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            # An unbuffered write may take only a part, and takes at most 2 GiB on Linux.
            written = 0
            while written < len(view):
                written += self._file.write(view[written:])
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        self._digest.update(view)

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return len(self.header_bytes) + sum(tensor_bytes(d, s) for _, d, s in self.specs)

    def write(self, name: str, array: np.ndarray) -> None:
        """Append the next tensor; name, dtype and shape must be those announced.

        Raises:
            ValueError: for any other tensor.
        """
        if self.n_done == len(self.specs):
            raise ValueError(f"{self.path}: {name!r} comes after the last announced tensor")
        expected, dtype, shape = self.specs[self.n_done]
        if name != expected:
            raise ValueError(f"{self.path}: got {name!r} where {expected!r} was announced")
        if array.dtype != DTYPES[dtype] or array.shape != shape:
            raise ValueError(
                f"{self.path}: {name!r} was announced as {dtype} {list(shape)}, got {array.dtype}"
                f" {list(array.shape)}"
            )
        self._append(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        self.n_done += 1

    def sync(self) -> None:
        """Force what was written to the disk; only then may a journal call it finished."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the file; it is an error if announced tensors were not written."""
        if self._file.closed:
            return
        try:
            if self.n_done < len(self.specs):
                raise ValueError(
                    f"{self.path}: closed with {len(self.specs) - self.n_done} tensors missing,"
                    f" the first {self.specs[self.n_done][0]!r}"
                )
            self.sync()
        finally:
            self._file.close()

    def abort(self) -> None:
        """Release the file without finishing it."""
        self._file.close()

    def sha256(self) -> str:
        """Hash of all bytes of the file so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames and new files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
