# SPDX-License-Identifier: Apache-2.0
"""One file or pipe of text: read once, unpacked, decoded, and told apart from what is no text."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CcqError, readable

JSON_LINES, JSON, PLAIN = "json lines", "json", "plain"
KINDS = {".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".json": JSON, ".txt": PLAIN, ".text": PLAIN}
# Endings of packed files, and what packs them.
PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
EXPECTED = (
    "text must be a .jsonl, a .json or a .txt file, as it is or packed (.gz, .bz2, .xz, .zst)"
)
STDIN = "-"
# Names that the system gives to open files: they say nothing about what is in them.
_DESCRIPTOR = re.compile(r"/dev/fd/\d+|/proc/(self|\d+)/fd/\d+|/dev/stdin")
# Beginnings of files that are no text, with what to do about them.
_FOREIGN = {
    b"PAR1": "Parquet, which is not read; convert it to .jsonl, for instance with pandas",
    b"ARROW1": "Arrow, which is not read; convert it to .jsonl, for instance with pandas",
    b"PK\x03\x04": "a zip archive, which is not read; unpack it",
    b"7z\xbc\xaf": "a 7z archive, which is not read; unpack it",
    b"\x89HDF": "HDF5, which is not read; convert it to .jsonl",
    b"SQLite format 3": "a database, which is not read; convert it to .jsonl",
    b"%PDF": "PDF, which is not read; convert it to .txt",
}
# The longer mark goes first: UTF-32's begins with UTF-16's.
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


@dataclass(frozen=True)
class TextFile:
    """What was read.

    Attributes:
        path: as it was given, for messages.
        label: for provenance: the file's name, which does not depend on where it lies.
        sha256: of the bytes as they were read, packed or not.
        kind: JSON_LINES, JSON or PLAIN.
        text: decoded, without a byte order mark, lines ended by "\\n".
    """

    path: str
    label: str
    sha256: str
    kind: str
    text: str


def check_readable(path: str | os.PathLike[str], flag: str) -> None:
    """Refuse what cannot be read, without reading: a pipe can be read only once.

    Raises:
        CcqError: for an empty name, a folder, a device, or where nothing is.
    """
    name = os.fspath(path)
    if not name.strip():
        raise CcqError(f"{flag}: the name is empty; name a file")
    if name == STDIN:
        if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
            raise CcqError(f"{flag} -: nothing comes in on standard input; pipe a text into it")
        return
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CcqError(f"{flag} {name}: no such file") from None
    if stat.S_ISDIR(mode):
        raise CcqError(f"{flag} {name}: is a folder; name a file in it")
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        raise CcqError(f"{flag} {name}: neither a file nor a pipe")


def read_file(path: str | os.PathLike[str], flag: str = "--text") -> TextFile:
    """Read a text to its end. `-` is standard input.

    Files are told apart by their names (.txt, .jsonl, .json), pipes by how they begin; packed
    data is known by its first bytes. UTF-8, and UTF-16 or UTF-32 with a byte order mark.

    Raises:
        CcqError: naming the file, and the line where there is one.
        OSError: if the system does not let it be read.
    """
    check_readable(path, flag)
    name = os.fspath(path)
    unnamed = name == STDIN or _DESCRIPTOR.fullmatch(name) is not None
    suffixes = [] if unnamed else [suffix.lower() for suffix in Path(name).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else None
    kind = None
    if not unnamed:
        kind = KINDS.get(suffixes[-1] if suffixes else "")
        if kind is None:
            raise CcqError(f"{flag} {name}: {_refusal(suffixes)}")
    if name == STDIN:
        data = sys.stdin.buffer.read()
    else:
        with open(_opened(name), "rb") as file:
            data = file.read()
    sha256 = hashlib.sha256(data).hexdigest()
    data = _unpacked(name, data, packed)
    for magic, what in _FOREIGN.items():
        if data.startswith(magic):
            raise CcqError(f"{flag} {name}: is {what}")
    if data[257:262] == b"ustar":
        raise CcqError(f"{flag} {name}: is a tar archive, which is not read; unpack it")
    text = _decoded(name, data)
    label = "standard input" if name in (STDIN, "/dev/stdin") else "pipe"
    return TextFile(
        name, label if unnamed else readable(Path(name).name), sha256, kind or _sniffed(text), text
    )


def _opened(name: str) -> str | int:
    """What to read: the path, or a descriptor of the pipe that a path such as /dev/fd/3 names.

    Opening a named pipe anew by such a path would wait for another writer for ever, once the
    first has written all and gone.
    """
    own = name.replace(f"/proc/{os.getpid()}/", "/proc/self/")
    ours = own.startswith(("/dev/", "/proc/self/")) and _DESCRIPTOR.fullmatch(own)
    if not ours or not stat.S_ISFIFO(os.stat(name).st_mode):
        return name
    return os.dup(0 if name == "/dev/stdin" else int(name.rpartition("/")[2]))


def _refusal(suffixes: list[str]) -> str:
    if suffixes and suffixes[-1] in (".parquet", ".arrow"):
        return f"is {_FOREIGN[b'PAR1' if suffixes[-1] == '.parquet' else b'ARROW1']}"
    return EXPECTED


def _sniffed(text: str) -> str:
    """The kind of a text whose name says nothing: JSON begins as no prose does."""
    start = text.lstrip()
    if start.startswith("{"):
        return JSON
    return JSON if re.match(r'\[\s*[{"]', start) else PLAIN


def _zstd(data: bytes) -> bytes:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(module).decompress(data)
        except ImportError:
            continue
    try:
        import zstandard
    except ImportError:
        raise CcqError(
            "zstd data needs a package to unpack: pip install zstandard; or unpack the file"
        ) from None
    import io

    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True)
    return reader.read()


_PACKERS: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\x00", "xz", lzma.decompress),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)


def _unpacked(name: str, data: bytes, suffix: str | None) -> bytes:
    for magic, packer, unpack in _PACKERS:
        # "BZh" alone could begin a word; a bzip2 file goes on with a digit and a block's mark.
        if not data.startswith(magic) or (packer == "bzip2" and data[4:5] not in (b"1", b"\x17")):
            continue
        try:
            return unpack(data)
        except CcqError as error:
            raise CcqError(f"{name}: {error}") from None
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise CcqError(f"{name}: broken {packer} data: {error}") from None
        except Exception as error:  # the zstd packages' own
            raise CcqError(f"{name}: broken {packer} data: {error}") from None
    if suffix is not None and data:
        raise CcqError(f"{name}: named {suffix}, but it holds no {PACKED[suffix]} data")
    return data


def _decoded(name: str, data: bytes) -> str:
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "ignore")
        raise CcqError(
            f"{name}:{_line(before)}: not {encoding.upper()}: byte 0x{data[error.start]:02x};"
            " convert the file to UTF-8, for instance with iconv"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = _line(text[: text.index("\0")])
        raise CcqError(
            f"{name}:{line}: holds a NUL character: UTF-16 without a byte order mark, or no text"
        )
    return text


def _line(before: str) -> int:
    return before.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
