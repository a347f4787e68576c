# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of either layout, quantized or not, read one tensor at a time by canonical name."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import formats
from ..codec import row_order as rows
from ..errors import CcqError
from ..families.config import CONFIG_FILE, ModelConfig, is_packed_entry
from ..families.registry import read_config
from ..families.tensor import Storage
from . import source_tensors
from .companions import check_regular, check_weights
from .entries import CODE_SUFFIXES, Entry, find_entries, packed_tensors
from .safetensors_io import DTYPES, StoredSpec, TensorFolder
from .source import snapshot_folder
from .source_tensors import KEPT_NAMING
from .sources.locate import locate
from .sources.scheme import KEYS as ENTRY_KEYS
from .sources.scheme import SourceScheme
from .sources.stored import StoredWeight
from .unexpected import resolve_head, resolve_mtp
from .values import count_nonfinite

# Our own key in config.json; FastDeploy does not look at it.
PROVENANCE_KEY = "paddle_ccq"
PARTIAL_SUFFIX = ".ccq-partial"
JOURNAL_FILE = "journal.jsonl"

# Rows that are turned at a time: enough to fill cache lines on both sides of the transposition.
_TURN_ROWS = 64


class Checkpoint:
    """An opened checkpoint; everything the config calls for is known to be there."""

    def __init__(
        self, path: Path, config: ModelConfig, tensors: TensorFolder, row_order: str | None
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.scheme = SourceScheme.read(config.raw, path / CONFIG_FILE)
        self.naming = config.family.detect_naming(tensors.names(), path)
        config, messages = resolve_head(config, tensors, self.naming)
        self.config, more = resolve_mtp(config, tensors)
        if config.family.keeps_others:
            packed = packed_tensors(tensors)
            self.config = source_tensors.of_folder(config, self.scheme, tensors, packed)
        messages = [*config.notes, *messages, *more]
        self.messages = [*tensors.messages, self.naming.description, *messages]
        self._entries, passed_over = find_entries(
            self.config, tensors, self.naming.name, self.scheme
        )
        self.messages += passed_over
        self.is_quantized = any(entry.packed for entry in self._entries.values())
        self.row_order = _row_order(self, row_order)

    @property
    def provenance(self) -> dict[str, Any]:
        """What this package recorded in the config when it wrote the checkpoint, or {}."""
        return self.config.raw.get(PROVENANCE_KEY) or {}

    def names(self) -> list[str]:
        """Canonical names, in model order."""
        return list(self._entries)

    def model_names(self) -> list[str]:
        """Names of what computes a token: all but the layers for multi-token prediction."""
        tensors = self.config.tensors
        return [name for name in self.names() if not self.config.is_prediction(tensors[name])]

    def format_of(self, name: str) -> str:
        """ "bf16" for any float, else the name of the packed format."""
        return self._entries[name].format

    def shape(self, name: str) -> tuple[int, ...]:
        """Canonical shape of the weight, whatever it is packed into."""
        return self._entries[name].shape

    def stored_names(self, name: str) -> list[str]:
        """The on-disk tensors that make up a canonical one."""
        entry = self._entries[name]
        if entry.storage is None:
            return list(entry.packed.values())
        return [stored for part in self.parts(name) for stored in part.names]

    def parts(self, name: str) -> list[StoredWeight]:
        """The stored parts of a tensor that is not packed in a format of this package.

        Raises:
            ValueError: for a packed tensor.
        """
        entry = self._entries[name]
        if entry.storage is None:
            raise ValueError(f"{name} is packed as {entry.format}")
        return self._parts(entry.storage)

    def stored_dtype(self, name: str) -> str:
        """Safetensors dtype of what read_stored() gives, or of a packed matrix' first tensor."""
        if self._entries[name].storage is None:
            return self.tensors.info(self.stored_names(name)[0]).dtype
        first = self.parts(name)[0]
        return first.dtype if first.is_float else "F32"

    def stored_bytes(self, name: str) -> int:
        """Bytes on disk of a canonical tensor; of a stack its part."""
        entry = self._entries[name]
        if entry.storage is None:
            return sum(self.tensors.info(stored).nbytes for stored in entry.packed.values())
        return sum(part.nbytes for part in self.parts(name))

    def read(self, name: str, dtype: str = "bfloat16") -> np.ndarray:
        """The weight in canonical orientation, float32, input rows in plain order.

        A packed weight is rounded to `dtype`, what an engine would compute in ("float32" decodes
        exactly); a float one is taken as it is stored.

        Raises:
            CcqError: if the stored tensors cannot be decoded.
        """
        entry = self._entries[name]
        if entry.storage is None:
            return self._decoded(name, entry, dtype)
        return self._assembled(entry, np.dtype(np.float32))

    def read_stored(self, name: str) -> np.ndarray:
        """An unpacked weight in canonical orientation: a float in its stored dtype, else float32.

        FP8 values and INT4 groups come multiplied by their scales.

        Raises:
            CcqError: for a scale that no weight can have, naming the tensor and its block.
        """
        entry = self._entries[name]
        if entry.storage is None:
            raise ValueError(f"{name} is packed as {entry.format}; read() dequantizes it")
        return self._assembled(entry, DTYPES[self.stored_dtype(name)])

    def read_out_in(self, name: str) -> np.ndarray:
        """A matrix as [out, in], C-contiguous float32: what encoders take.

        Raises:
            ValueError: for a tensor that is no matrix.
        """
        entry = self._entries[name]
        if len(entry.shape) != 2:
            raise ValueError(f"{name} is not a matrix")
        if entry.storage is None:
            return np.ascontiguousarray(self._decoded(name, entry, "bfloat16").T)
        rows_in, columns = entry.shape
        result = np.empty((columns, rows_in), np.float32)
        for part, stored in zip(entry.storage.parts, self._parts(entry.storage), strict=True):
            target = result[part.columns or slice(None)]
            if entry.storage.transposed:
                stored.read_into(target)
            else:
                _turn_into(target, stored.read())
        return result

    def in_naming(self, name: str, naming: str) -> dict[str, np.ndarray]:
        """An unpacked tensor as another naming of the family stores it: on-disk name -> values."""
        storage, values = self.config.tensors[name].sources[naming], self.read_stored(name)
        values = values.T if storage.transposed else values
        return {
            part.name: values if part.columns is None else values[part.columns]
            for part in storage.parts
        }

    def read_kept(self, name: str, specs: Iterable[StoredSpec]) -> dict[str, np.ndarray]:
        """The stored tensors that hold an unpacked one, as they are; on-disk name -> values.

        Those of another naming are put together anew, with the same values.
        """
        found: dict[str, np.ndarray] = {}
        for stored, dtype, shape in specs:
            info = self.tensors.info(stored) if stored in self.tensors else None
            if info is not None and (info.dtype, info.shape) == (dtype, shape):
                found[stored] = self.tensors.read(stored)
            elif stored not in found:
                found |= self.in_naming(name, KEPT_NAMING)
        return found

    def nonfinite_place(self, name: str) -> str | None:
        """Where the first NaN or infinity of an FP8 or INT4 source lies, in words.

        None for floats, and for a stored tensor that goes by another name than the model's.
        """
        if name not in self._entries:
            return None
        places = (part.nonfinite_place() for part in self.parts(name))
        return next((place for place in places if place is not None), None)

    def with_replaced(self, tensors: Mapping[str, np.ndarray]) -> Checkpoint:
        """The checkpoint as it would be with other values of some stored tensors."""
        changed = copy.copy(self)
        changed.tensors = self.tensors.with_replaced(tensors)
        return changed

    def packed(self, name: str) -> dict[str, np.ndarray]:
        """The stored tensors of a quantized matrix by suffix, in the dtypes of its format.

        Raises:
            CcqError: for a code scale or zero-point that is NaN or infinite: of these come some
                codes, so that the weights would not show it.
        """
        entry = self._entries[name]
        specs = formats.tensor_specs(entry.format, *entry.shape)
        found = {
            suffix: self.tensors.read(stored).astype(DTYPES[specs[suffix][1]], copy=False)
            for suffix, stored in entry.packed.items()
        }
        for suffix in CODE_SUFFIXES:
            bad = count_nonfinite(found[suffix]) if suffix in found else 0
            if bad:
                stored = entry.packed[suffix]
                raise CcqError(
                    f"{self.tensors.path_of(stored)}: {stored}: {bad} of {found[suffix].size}"
                    " values are NaN or infinite; the file is damaged"
                )
        return found

    def row_order_of(self, name: str) -> str:
        """The order in which a matrix's input rows are stored (codec/row_order.py)."""
        return formats.stored_order(self.format_of(name), self.row_order)

    def _parts(self, storage: Storage) -> list[StoredWeight]:
        found = [locate(self.tensors, self.scheme, part) for part in storage.parts]
        return [part for part in found if part is not None]

    def _assembled(self, entry: Entry, dtype: np.dtype) -> np.ndarray:
        assert entry.storage is not None
        stored = self._parts(entry.storage)
        if not entry.storage.transposed:
            return stored[0].read().astype(dtype, copy=False)
        result = np.empty(entry.shape, dtype)
        for part, weight in zip(entry.storage.parts, stored, strict=True):
            _turn_into(result[:, part.columns], weight.read())
        return result

    def _decoded(self, name: str, entry: Entry, dtype: str) -> np.ndarray:
        try:
            # Damaged scales give NaN, which callers look for; NumPy's warning names no tensor.
            with np.errstate(invalid="ignore", over="ignore"):
                return formats.decode(entry.format, self.packed(name), dtype, self.row_order)
        except ValueError as error:
            where = self.tensors.path_of(next(iter(entry.packed.values())))
            raise CcqError(f"{where}: {name}: cannot be decoded: {error}") from None


def open_checkpoint(
    folder: str | os.PathLike[str],
    row_order: str | None = None,
    family: str | None = None,
    *,
    drop_mtp: bool = False,
) -> Checkpoint:
    """Open a checkpoint folder and check that every tensor of the model is there.

    Args:
        row_order: "fastdeploy-2.1" or "plain": how WINT2 input rows are ordered where the
            checkpoint itself does not say it.
        family: one of families.registry.ASKED; None: config.json decides.
        drop_mtp: take the model without its layers for multi-token prediction; their tensors may
            then be missing or incomplete, as may be the shards that hold nothing else.

    Raises:
        CcqError: if it is no checkpoint, a tensor is missing or wrong, or one is there that the
            model does not have.
    """
    path = snapshot_folder(Path(folder))
    if not path.exists():
        raise CcqError(f"{path}: no such folder")
    if not path.is_dir():
        raise CcqError(f"{path}: not a folder; give the checkpoint's folder, not a file in it")
    if path.resolve().name.endswith(PARTIAL_SUFFIX) or (path / JOURNAL_FILE).exists():
        raise CcqError(
            f"{path}: an unfinished output; run the command that wrote it again to finish it"
        )
    ranks = [entry for entry in path.iterdir() if re.fullmatch(r"rank\d+", entry.name)]
    if any(entry.is_dir() for entry in ranks):
        raise CcqError(
            f"{path}: cut for tensor parallelism into {len(ranks)} rank folders; such checkpoints"
            " are for serving, use the one they were cut from"
        )
    check_regular(path)
    config = read_config(path, family=family)
    if drop_mtp:
        config = config.without_mtp()
    check_weights(path, config)
    return Checkpoint(path, config, TensorFolder(path, config.is_dropped), row_order)


def _turn_into(target: np.ndarray, values: np.ndarray) -> None:
    """target[...] = values.T with conversion, in blocks (several times faster than in one go)."""
    for begin in range(0, values.shape[0], _TURN_ROWS):
        block = values[begin : begin + _TURN_ROWS].astype(target.dtype, copy=False)
        target[:, begin : begin + _TURN_ROWS] = block.T


def stated_row_order(raw: Mapping[str, Any]) -> Any:
    """What the quantization_config of Hugging Face's layout says; None in any other layout."""
    entry = raw.get(ENTRY_KEYS[0])
    return entry["row_order"] if is_packed_entry(entry) and "row_order" in entry else None


def _row_order(checkpoint: Checkpoint, asked: str | None) -> str | None:
    """The row order of WINT2 matrices; None where there are none."""
    where = checkpoint.path / "config.json"
    if asked is not None and asked not in rows.ROW_ORDERS:
        raise CcqError(f"row order {asked!r} is not one of {', '.join(rows.ROW_ORDERS)}")
    own = checkpoint.config.raw.get(PROVENANCE_KEY)
    if own is not None and not isinstance(own, dict):
        raise CcqError(f"{where}: {PROVENANCE_KEY}: not an object")
    places = {
        f"{PROVENANCE_KEY}.row_order": (own or {}).get("row_order"),
        f"{ENTRY_KEYS[0]}.row_order": stated_row_order(checkpoint.config.raw),
    }
    stated = {place: order for place, order in places.items() if order is not None}
    for place, order in stated.items():
        if order not in rows.ROW_ORDERS:
            raise CcqError(
                f"{where}: {place}: {order!r} is not one of {', '.join(rows.ROW_ORDERS)}"
            )
    if len(set(stated.values())) > 1:
        raise CcqError(
            f"{where}: {' and '.join(stated)} differ ({' and '.join(stated.values())}); only the"
            " one that quantize wrote gives this model"
        )
    recorded = next(iter(stated.values()), None)
    used = {checkpoint.format_of(name) for name in checkpoint.names()} - {"f32"}
    if not any(formats.get(format).row_ordered for format in used):
        return None
    if recorded and asked and recorded != asked:
        raise CcqError(f"{where}: rows are recorded as {recorded}, not as the asked {asked}")
    if recorded or asked:
        return recorded or asked
    checkpoint.messages.append(
        f"the checkpoint does not say how WINT2 rows are ordered; taking {rows.FASTDEPLOY_2_1}"
    )
    return rows.FASTDEPLOY_2_1
