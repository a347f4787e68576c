# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: strict reading of one file or of a folder of shards, and streaming writing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CcqError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The safetensors library refuses larger headers; a size read from a damaged file must not become
# an allocation.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BOOL": np.dtype("?"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
FLOAT_DTYPES = ("BF16", "F16", "F32")

TensorSpec = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape

_COPY_BYTES = 8 << 20


def dtype_name(dtype: np.dtype | type) -> str:
    """The safetensors name of a numpy dtype (ml_dtypes.bfloat16 is BF16)."""
    wanted = np.dtype(dtype)
    for name, known in DTYPES.items():
        if known == wanted:
            return name
    raise ValueError(f"no safetensors dtype for {wanted}")


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size on disk of a tensor."""
    return DTYPES[dtype].itemsize * math.prod(shape)


# --- reading one file -------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """One header entry; `begin` is an absolute position in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def load_json(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> Any:
    """Parse a JSON file from an untrusted source; every failure is a CcqError naming the file."""
    with open(path, "rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise CcqError(f"{path}: larger than {max_bytes} bytes; not a checkpoint's JSON file")
    return _parse_json(text, path)


def _parse_json(text: bytes, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{twice!r} occurs twice")
        return result

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CcqError(f"{path}: not valid JSON: {error}") from None


class SafetensorsFile:
    """One safetensors file: the header is checked on opening, tensors are read one at a time.

    Tensors are read with plain reads rather than a memory map, so a long run over a large
    checkpoint holds one tensor in memory and not the pages of every shard it has visited.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            header = _read_header(file, self.path)
        self.metadata, self.tensors = header
        try:
            # The library's own checks too: what is accepted here must load everywhere else.
            with safe_open(self.path, framework="np"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise CcqError(f"{self.path}: not a valid safetensors file: {error}") from None

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype."""
        info = self.tensors[name]
        data = np.empty(info.nbytes, np.uint8)
        with open(self.path, "rb") as file:
            file.seek(info.begin)
            got = file.readinto(data)
        if got != info.nbytes:
            raise CcqError(f"{self.path}: ends inside tensor {name!r}; the file was changed")
        return data.view(DTYPES[info.dtype]).reshape(info.shape)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    file_bytes = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if start.startswith(b"version "):
        raise CcqError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size == 0:
        raise CcqError(f"{path}: empty safetensors header; the download was interrupted")
    if size > MAX_HEADER_BYTES:
        raise CcqError(
            f"{path}: header of {size} bytes, more than the {MAX_HEADER_BYTES} that are allowed;"
            " not a safetensors file"
        )
    if 8 + size > file_bytes:
        raise CcqError(f"{path}: truncated: header needs {8 + size} bytes, file has {file_bytes}")
    header = _parse_json(file.read(size), path)
    if not isinstance(header, dict):
        raise CcqError(f"{path}: the safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CcqError(f"{path}: __metadata__ in the header is not a map of strings")
    tensors = {name: _tensor_info(name, entry, 8 + size, path) for name, entry in header.items()}
    end, before = 8 + size, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if info.begin != end:
            kind = "overlaps" if info.begin < end else "leaves a hole after"
            raise CcqError(f"{path}: tensor {name!r} {kind} {before}")
        end, before = info.begin + info.nbytes, repr(name)
    if end != file_bytes:
        what = "truncated" if end > file_bytes else "trailing data"
        raise CcqError(f"{path}: {what}: header describes {end} bytes, file has {file_bytes}")
    return metadata, tensors


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor_info(name: str, entry: object, data_start: int, path: Path) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CcqError(f"{path}: header entry of {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CcqError(f"{path}: tensor {name!r} has dtype {dtype!r}, which is not supported")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(map(_is_count, shape))
        or math.prod(max(size, 1) for size in shape) >= 1 << 60
    ):
        raise CcqError(f"{path}: tensor {name!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CcqError(f"{path}: tensor {name!r} has data_offsets that are not two positions")
    begin, end = offsets
    if end - begin != tensor_bytes(dtype, shape):
        raise CcqError(
            f"{path}: tensor {name!r} takes {end - begin} bytes, {dtype} {shape} would take"
            f" {tensor_bytes(dtype, shape)}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + begin, end - begin)


# --- reading a folder -------------------------------------------------------------------------


class TensorFolder:
    """All tensors of a checkpoint folder, whether in one file or in shards with an index."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.messages: list[str] = []
        self.files: dict[str, SafetensorsFile] = {}
        self._home: dict[str, str] = {}
        index = self.folder / INDEX_FILE
        if index.is_file():
            self._open_shards(index)
        elif (self.folder / SINGLE_FILE).is_file():
            self.files[SINGLE_FILE] = SafetensorsFile(self.folder / SINGLE_FILE)
            self._home = dict.fromkeys(self.files[SINGLE_FILE].tensors, SINGLE_FILE)
        else:
            raise CcqError(_nothing_to_open(self.folder))

    def _open_shards(self, index: Path) -> None:
        content = load_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CcqError(f"{index}: no weight_map; not a safetensors index")
        for name, shard in weight_map.items():
            plain = isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard
            if not plain or not shard.endswith(".safetensors"):
                raise CcqError(
                    f"{index}: {name!r} is placed in {shard!r}, not the plain name of a"
                    " safetensors file"
                )
        shards = sorted(set(weight_map.values()))
        if SINGLE_FILE not in shards and (self.folder / SINGLE_FILE).exists():
            raise CcqError(
                f"{self.folder}: holds both {SINGLE_FILE} and {INDEX_FILE}, which names other"
                " files; remove the one that does not belong"
            )
        for shard in shards:
            if not (self.folder / shard).is_file():
                missing = [s for s in shards if not (self.folder / s).is_file()]
                raise CcqError(
                    f"{self.folder / shard}: named in {INDEX_FILE} but missing ({len(missing)} of"
                    f" {len(shards)} shards are); download it again"
                )
        owners: dict[str, str] = {}
        for shard in shards:
            self.files[shard] = SafetensorsFile(self.folder / shard)
            for name in self.files[shard].tensors:
                if name in owners:
                    raise CcqError(
                        f"{self.folder / shard}: tensor {name!r} is also in {owners[name]}"
                    )
                owners[name] = shard
        for name, shard in weight_map.items():
            if owners.get(name) != shard:
                where = f"it is in {owners[name]}" if name in owners else "no shard has it"
                raise CcqError(
                    f"{self.folder / shard}: {INDEX_FILE} places tensor {name!r} here, but {where}"
                )
        unlisted = [name for name in owners if name not in weight_map]
        if unlisted:
            self.messages.append(
                f"{len(unlisted)} tensors are in the shards but not in {INDEX_FILE} and are passed"
                f" over, the first {unlisted[0]!r}"
            )
        self._home = dict(weight_map)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def names(self) -> list[str]:
        return list(self._home)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._home[name]

    def info(self, name: str) -> TensorInfo:
        return self.files[self._home[name]].tensors[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype."""
        return self.files[self._home[name]].read(name)


def _nothing_to_open(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    files = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for suffix in (".pdparams", ".bin", ".pt", ".pth", ".ckpt"):
        pickles = [name for name in files if name.endswith(suffix)]
        if pickles:
            return (
                f"{folder / pickles[0]}: a pickle file, which can run code when loaded and is not"
                " read; get the safetensors version of this checkpoint"
            )
    shards = [name for name in files if name.endswith(".safetensors")]
    if shards:
        return f"{folder}: {shards[0]} is there but {INDEX_FILE} is missing; download it as well"
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; not a checkpoint folder"


# --- writing ----------------------------------------------------------------------------------


def build_header(specs: Sequence[TensorSpec], metadata: dict[str, str] | None = None) -> bytes:
    """The length field and JSON header of a file with these tensors, in this order.

    Deterministic: the same tensors and metadata give the same bytes.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    for name, dtype, shape in specs:
        if name in header or name == "__metadata__":
            raise ValueError(f"tensor {name!r} is listed twice")
        end = begin + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CcqError(
            f"a shard of {len(specs)} tensors needs a header of {len(text)} bytes, more than"
            f" safetensors allows ({MAX_HEADER_BYTES}); use smaller shards"
        )
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the order of `specs`.

    All names, dtypes and shapes are known beforehand, so the header goes first and no more than
    one tensor is ever held. A run that was interrupted goes on with `resume`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        metadata: dict[str, str] | None = None,
    ) -> None:
        self._prepare(path, specs, metadata)
        self._file: BinaryIO = open(self.path, "wb", buffering=0)  # noqa: SIM115
        self._append(self.header_bytes)

    def _prepare(
        self,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
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
        specs: Sequence[TensorSpec],
        metadata: dict[str, str] | None,
        n_done: int,
        on_tensor: Callable[[str, str], None] | None = None,
    ) -> SafetensorsWriter:
        """Reopen an interrupted file after its first `n_done` tensors; what follows is cut off.

        The finished part is read once for the file's hash; `on_tensor(name, sha256)` is called
        for each finished tensor, so that the caller can compare it with what it recorded.
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
        """Append the next tensor; name, dtype and shape must be those announced."""
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


def split_shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Cut the list of tensors into shards of at most `max_bytes` of data, keeping the order.

    A tensor larger than the limit gets a shard of its own.
    """
    shards: list[list[TensorSpec]] = []
    room = -1
    for spec in specs:
        size = tensor_bytes(spec[1], spec[2])
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= size
    return shards


def parse_size(text: str, flag: str = "--max-shard-size") -> int:
    """Bytes in "5GB", "500MB", "4GiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    power = " kmgt".index(match[2].lower() or " ") if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size < 1:
        raise CcqError(f"{flag}: {text!r} is not a size such as 5GB or 500MiB")
    return size


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (from 0) of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def index_bytes(shards: dict[str, Sequence[TensorSpec]]) -> bytes:
    """Content of the index file for shards by file name."""
    total = sum(tensor_bytes(d, s) for specs in shards.values() for _, d, s in specs)
    weight_map = {name: shard for shard, specs in shards.items() for name, _, _ in specs}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode("ascii")


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames and new files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
