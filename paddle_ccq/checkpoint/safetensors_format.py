# SPDX-License-Identifier: Apache-2.0
"""The safetensors file format: dtypes, sizes, the header, and how tensors are cut into shards."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

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
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
FLOAT_DTYPES = ("BF16", "F16", "F32")

StoredSpec = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape


def dtype_name(dtype: np.dtype | type) -> str:
    """The safetensors name of a numpy dtype (ml_dtypes.bfloat16 is BF16).

    Raises:
        ValueError: for a dtype that safetensors does not have.
    """
    wanted = np.dtype(dtype)
    for name, known in DTYPES.items():
        if known == wanted:
            return name
    raise ValueError(f"no safetensors dtype for {wanted}")


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size on disk of a tensor."""
    return DTYPES[dtype].itemsize * math.prod(shape)


def build_header(specs: Sequence[StoredSpec], metadata: dict[str, str] | None = None) -> bytes:
    """The length field and JSON header of a file with these tensors, in this order.

    Deterministic: the same tensors and metadata give the same bytes.

    Raises:
        ValueError: for a name that is listed twice.
        CcqError: for more tensors than a header may name.
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


def split_shards(specs: Sequence[StoredSpec], max_bytes: int) -> list[list[StoredSpec]]:
    """Cut the list of tensors into shards of at most `max_bytes` of data, keeping the order.

    A tensor larger than the limit gets a shard of its own.
    """
    shards: list[list[StoredSpec]] = []
    budget = -1
    for spec in specs:
        size = tensor_bytes(spec[1], spec[2])
        if not shards or size > budget:
            shards.append([])
            budget = max_bytes
        shards[-1].append(spec)
        budget -= size
    return shards


def parse_size(text: str, flag: str = "--max-shard-size") -> int:
    """Bytes in "5GB", "500MB", "4GiB" or a plain number.

    Raises:
        CcqError: for a text that is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    power = " kmgt".index(match[2].lower() or " ") if match else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size < 1:
        raise CcqError(f"{flag}: {text!r} is not a size such as 5GB or 500MiB")
    return size


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (from 0) of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def index_bytes(shards: dict[str, Sequence[StoredSpec]]) -> bytes:
    """Content of the index file for shards by file name."""
    total = sum(tensor_bytes(d, s) for specs in shards.values() for _, d, s in specs)
    weight_map = {name: shard for shard, specs in shards.items() for name, _, _ in specs}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode("ascii")
