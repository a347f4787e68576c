# SPDX-License-Identifier: Apache-2.0
"""Standard output and error as a command needs them: no reader, encoding or closure ends a run."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# Characters that the stream's encoding lacks are written out as \\xe9 and the like.
ERRORS = "paddle_ccq_written_out"


def _written_out(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a path that are no text are printed as they are, other characters as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace").decode("ascii"), error.start + 1


codecs.register_error(ERRORS, _written_out)


class OutputLost(OSError):
    """Results could not be printed, for instance into a file on a full disk."""


class _Raw(io.FileIO):
    """A descriptor that a reader may leave: what is written after that goes nowhere.

    `results` says that what is written is wanted, so that an error of the system is one; messages
    on their way to stderr are not worth a run.
    """

    def __init__(self, descriptor: int, results: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._results = results
        self._gone = False

    def write(self, data: Any) -> int | None:
        if self._gone:
            return len(memoryview(data).cast("B"))
        try:
            return super().write(data)
        except OSError as error:
            # Once is enough: what is still in the buffer must not fail again at the end.
            self._gone = True
            if self._results and not isinstance(error, BrokenPipeError):
                raise OutputLost(error.errno, error.strerror) from None
            return len(memoryview(data).cast("B"))


def _wrapped(stream: TextIO, name: str) -> TextIO:
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(stream.fileno(), results=name == "stdout")),
        encoding=stream.encoding,
        errors=ERRORS,
        line_buffering=name == "stderr" or stream.isatty(),
    )


def _open_standard_descriptors() -> None:
    """Put the null device where a standard descriptor is closed.

    The next file that is opened would take its number, and whatever a library prints would be
    written into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            os.set_inheritable(opened, True)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within it, sys.stdout and sys.stderr can be written to whatever they are.

    Closed ones go nowhere, a pipe without a reader becomes one, and nothing is too foreign to
    print. Streams that somebody put in place of the real ones stay as they are.
    """
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_guard(name) for name in ("stdout", "stderr"))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _guard(name: str) -> TextIO:
    stream: TextIO | None = getattr(sys, name)
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors=ERRORS)  # as long as the process
    if stream is not getattr(sys, f"__{name}__"):
        return stream
    try:
        return _wrapped(stream, name)
    except (OSError, ValueError):
        return stream
