# SPDX-License-Identifier: Apache-2.0
"""Strict reading of safetensors files and of folders of shards; writing is re-exported here."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CcqError
from ..json_files import load_json, parse_json
from .safetensors_format import (
    DTYPES,
    FLOAT_DTYPES,
    INDEX_FILE,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    SINGLE_FILE,
    StoredSpec,
    build_header,
    dtype_name,
    index_bytes,
    parse_size,
    shard_name,
    split_shards,
    tensor_bytes,
)
from .safetensors_writer import SafetensorsWriter, sync_folder

__all__ = [
    "DTYPES",
    "FLOAT_DTYPES",
    "INDEX_FILE",
    "MAX_DIMENSIONS",
    "MAX_HEADER_BYTES",
    "SINGLE_FILE",
    "SafetensorsFile",
    "SafetensorsWriter",
    "StoredSpec",
    "TensorFolder",
    "TensorInfo",
    "build_header",
    "dtype_name",
    "index_bytes",
    "load_json",
    "parse_size",
    "shard_name",
    "split_shards",
    "sync_folder",
    "tensor_bytes",
]

# --- reading one file -------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """One header entry; `begin` is an absolute position in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


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
        return (
            self._read(name, info.begin, info.nbytes).view(DTYPES[info.dtype]).reshape(info.shape)
        )

    def read_rows(self, name: str, index: int, rows: slice) -> np.ndarray:
        """Rows of one entry of a tensor of three dimensions: stored[index][rows], and no more.

        `rows` has a beginning and an end.
        """
        info = self.tensors[name]
        _, height, width = info.shape
        row_bytes = width * DTYPES[info.dtype].itemsize
        begin = info.begin + (index * height + rows.start) * row_bytes
        data = self._read(name, begin, (rows.stop - rows.start) * row_bytes)
        return data.view(DTYPES[info.dtype]).reshape(-1, width)

    def _read(self, name: str, begin: int, nbytes: int) -> np.ndarray:
        data = np.empty(nbytes, np.uint8)
        with open(self.path, "rb") as file:
            file.seek(begin)
            got = file.readinto(data)
        if got != nbytes:
            raise CcqError(f"{self.path}: ends inside tensor {name!r}; the file was changed")
        return data


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
    header = parse_json(file.read(size), path)
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
    """All tensors of a checkpoint folder, whether in one file or in shards with an index.

    Args:
        is_dropped: whether a tensor of that name is to be taken as not there. Shards that by the
            index hold nothing else are not opened and may be missing.

    Attributes:
        dropped: names of the tensors that are taken so.

    Raises:
        CcqError: for a folder whose files or index are not right, naming the file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        is_dropped: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.folder = Path(folder)
        self.messages: list[str] = []
        self.dropped: list[str] = []
        self._is_dropped = is_dropped
        # Tensors that the shards hold and the index does not name.
        self.unlisted: list[str] = []
        self.files: dict[str, SafetensorsFile] = {}
        self._home: dict[str, str] = {}
        self._replaced: Mapping[str, np.ndarray] = {}
        index = self.folder / INDEX_FILE
        if index.is_file():
            self._open_shards(index)
        elif (self.folder / SINGLE_FILE).is_file():
            self.files[SINGLE_FILE] = SafetensorsFile(self.folder / SINGLE_FILE)
            self._home = self._kept(dict.fromkeys(self.files[SINGLE_FILE].tensors, SINGLE_FILE))
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
        named = set(weight_map.values())
        weight_map = self._kept(weight_map)
        shards = sorted(set(weight_map.values()))
        if SINGLE_FILE not in named and (self.folder / SINGLE_FILE).exists():
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
                if self._is_dropped(name):
                    continue
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
        self.unlisted = [name for name in owners if name not in weight_map]
        if self.unlisted:
            self.messages.append(
                f"{len(self.unlisted)} tensors are in the shards but not in {INDEX_FILE} and are"
                f" passed over, the first {self.unlisted[0]!r}"
            )
        self._home = dict(weight_map)

    def _kept(self, home: dict[str, str]) -> dict[str, str]:
        self.dropped += filter(self._is_dropped, home)
        return {name: file for name, file in home.items() if not self._is_dropped(name)}

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def names(self) -> list[str]:
        """Stored names in the index's order, or in the header's where one file holds all."""
        return list(self._home)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._home[name]

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor in its file; no values are read."""
        return self.files[self._home[name]].tensors[name]

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored dtype."""
        if name in self._replaced:
            return self._replaced[name]
        return self.files[self._home[name]].read(name)

    def read_rows(self, name: str, index: int, rows: slice) -> np.ndarray:
        """stored[index][rows] of a tensor of three dimensions; the rest of it is not read."""
        if name in self._replaced:
            return self._replaced[name][index][rows]
        return self.files[self._home[name]].read_rows(name, index, rows)

    def with_replaced(self, tensors: Mapping[str, np.ndarray]) -> TensorFolder:
        """The same folder, with some tensors taken from memory instead of the files."""
        changed = copy.copy(self)
        changed._replaced = {**self._replaced, **tensors}
        return changed


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
