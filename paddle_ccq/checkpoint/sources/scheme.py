# SPDX-License-Identifier: Apache-2.0
"""What a source's config.json says of how its weights are stored: FP8, INT4 groups, or floats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...codec.block_scales import Block
from ...errors import CcqError
from ...families.config import CCQ, CCQ_VERSION, COMPRESSED_TENSORS, FP8, is_packed_entry
from ...families.fields import show

# Where config.json may say it; the second is the older name of compressed-tensors.
KEYS = ("quantization_config", "compression_config")
# The text model's object in config.json of models with vision.
NESTED = "text_config"
# In what this package writes for other loaders than FastDeploy: the entry that holds the
# source's own quantization_config.
SOURCE_KEY = "source_quantization_config"
# Formats of compressed-tensors that are read; "dense" is no quantization.
_READ_FORMATS = ("pack-quantized", "float-quantized", "naive-quantized", "dense")
_REGEX = "re:"
INT4_BITS, FP8_BITS = 4, 8


class Kind(Enum):
    """How a matrix is stored; the value is how messages call it."""

    FLOAT = "float"
    FP8 = "FP8"
    INT4 = "INT4"


@dataclass(frozen=True)
class Part:
    """What holds for the modules that `targets` names.

    Attributes:
        targets: names, regular expressions after "re:", or class names such as Linear.
        block: that shares a scale; 0 stands for the matrix' own length along an axis.
    """

    kind: Kind
    targets: tuple[str, ...]
    block: Block


def stated_entries(raw: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a config.json says of its numbers, with the key of each; in a nested text_config too."""
    nested = raw.get(NESTED)
    found = [(key, raw[key]) for key in KEYS if raw.get(key)]
    if not found and isinstance(nested, Mapping):
        found = [(f"{NESTED}.{key}", nested[key]) for key in KEYS if nested.get(key)]
    return found


def without_entries(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of its numbers."""
    result = {key: value for key, value in raw.items() if key not in KEYS}
    if isinstance(raw.get(NESTED), Mapping):
        result[NESTED] = {k: v for k, v in raw[NESTED].items() if k not in KEYS}
    return result


@dataclass(frozen=True)
class SourceScheme:
    """How the matrices of a source are stored, by its config.json.

    The stored tensors decide what a matrix is; this says what sizes its blocks may have, and, of a
    model without weights, what to expect.

    Attributes:
        method: quant_method, or None for a source of floats.
        parts: the stated kinds and block sizes.
        ignored: modules that stay float, as in `Part.targets`.
        scale_suffix: what is added to a weight's name for its FP8 scales.
        where: the entry of config.json, for messages.
    """

    method: str | None = None
    parts: tuple[Part, ...] = ()
    ignored: tuple[str, ...] = ()
    scale_suffix: str = "_scale_inv"
    where: str = "config.json"

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: object) -> SourceScheme:
        """The scheme of a parsed config.json; `where` names the file in errors.

        Raises:
            CcqError: for a method or a format that is not read, or an entry that is no such thing.
        """
        stated = stated_entries(raw)
        if not stated:
            return cls(where=str(where))
        key, entry = stated[0]
        fields = _Fields(f"{where}: {key}", entry)
        if len(stated) > 1 and stated[1][1] != entry:
            raise CcqError(f"{where}: {KEYS[0]} and {KEYS[1]} differ; keep the one that is right")
        return _read_entry(fields)

    def kind_of(self, module: str) -> Part | None:
        """What is stated of a linear layer by its on-disk name without `.weight`; None: floats."""
        if any(_matches(pattern, module) for pattern in self.ignored):
            return None
        named = [part for part in self.parts if any(_matches(t, module) for t in part.targets)]
        general = [part for part in self.parts if "Linear" in part.targets]
        return next(iter(named + general), None)

    def blocks(self, kind: Kind, shape: tuple[int, int]) -> set[Block]:
        """The block sizes that matrices of a kind may have by what is stated."""
        return {
            (part.block[0] or shape[0], part.block[1] or shape[1])
            for part in self.parts
            if part.kind is kind
        }


def _read_entry(fields: _Fields) -> SourceScheme:
    if fields.get("quant_method") is None:
        # FastDeploy's entry, which names packed matrices, or how to quantize at loading.
        return SourceScheme(where=fields.where)
    method = fields.text("quant_method", "")
    if method == CCQ:
        version = fields.get("version")
        # FastDeploy's structure has no version.
        packed = is_packed_entry(fields.values, fields.where)
        if packed and (type(version) is not int or version != CCQ_VERSION):
            raise fields.fail(
                f"version: {show(version)} is not known here; this package reads {CCQ_VERSION}"
            )
        source = fields.get(SOURCE_KEY)
        kept = _Fields(f"{fields.where}.{SOURCE_KEY}", source or {})
        return _read_entry(kept)
    if method == FP8:
        return _read_fp8(fields)
    if method == COMPRESSED_TENSORS:
        return _read_compressed_tensors(fields)
    raise fields.fail(
        f"quant_method {show(method)} is not read; float, {FP8} and {COMPRESSED_TENSORS}"
        " checkpoints are"
    )


def _read_fp8(fields: _Fields) -> SourceScheme:
    form = fields.text("fmt", "e4m3").lower()
    if form not in ("e4m3", "float8_e4m3fn"):
        raise fields.fail(f"fmt {show(form)} is not read, only e4m3")
    size = fields.get("weight_block_size")
    block: Block = (0, 0)
    if size is not None:
        if not (isinstance(size, list) and len(size) == 2 and all(map(_is_size, size))):
            raise fields.fail(f"weight_block_size {show(size)} is not two sizes such as [128, 128]")
        block = (size[0], size[1])
    ignored = fields.texts("modules_to_not_convert") + fields.texts("ignored_layers")
    part = Part(Kind.FP8, ("Linear",), block)
    return SourceScheme(FP8, (part,), ignored, where=fields.where)


def _read_compressed_tensors(fields: _Fields) -> SourceScheme:
    _check_format(fields, fields.get("format"))
    groups = fields.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise fields.fail("config_groups is not an object")
    parts = []
    for name, group in groups.items():
        entry = _Fields(f"{fields.where}.config_groups.{show(name)}", group)
        _check_format(entry, entry.get("format"))
        weights = entry.get("weights")
        if weights is not None:
            where = _Fields(f"{entry.where}.weights", weights)
            parts.append(_part(where, entry.texts("targets") or ("Linear",)))
    for key in ("sparsity_config", "transform_config"):
        if fields.get(key):
            raise fields.fail(f"{key} is not read; weights must be stored dense and unturned")
    ignored = fields.texts("ignore")
    return SourceScheme(COMPRESSED_TENSORS, tuple(parts), ignored, "_scale", fields.where)


def _check_format(fields: _Fields, format: object) -> None:
    if format is not None and format not in (*_READ_FORMATS, "mixed-precision"):
        raise fields.fail(
            f"format {show(format)} is not read, only {', '.join(_READ_FORMATS)} and"
            " mixed-precision"
        )


def _part(fields: _Fields, targets: tuple[str, ...]) -> Part:
    bits, kind = fields.get("num_bits"), fields.text("type", "int")
    if (kind, bits) == ("int", INT4_BITS):
        found = Kind.INT4
    elif (kind, bits) == ("float", FP8_BITS):
        found = Kind.FP8
    else:
        raise fields.fail(f"weights of type {show(kind)} with {show(bits)} bits are not read")
    if fields.get("actorder"):
        raise fields.fail(f"actorder {show(fields.get('actorder'))} is not read")
    strategy = fields.text("strategy", "tensor")
    if strategy == "group":
        size = fields.get("group_size")
        if not _is_size(size):
            raise fields.fail(f"group_size {show(size)} is no number of weights")
        return Part(found, targets, (1, size))
    if strategy == "block":
        size = fields.get("block_structure")
        if not (isinstance(size, list) and len(size) == 2 and all(map(_is_size, size))):
            raise fields.fail(f"block_structure {show(size)} is not two sizes such as [128, 128]")
        return Part(found, targets, (size[0], size[1]))
    if strategy == "channel":
        return Part(found, targets, (1, 0))
    if strategy == "tensor":
        return Part(found, targets, (0, 0))
    raise fields.fail(f"strategy {show(strategy)} is not read")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24


def _matches(pattern: str, module: str) -> bool:
    """Whether a name or a regular expression means a module.

    A name means itself and what lies below it; loaders differ in where it may begin, so that
    `lm_head` and `mlp.gate` mean the modules that end so, too.
    """
    if pattern.startswith(_REGEX):
        return re.match(pattern.removeprefix(_REGEX), module) is not None
    return f".{pattern}." in f".{module}."


class _Fields:
    """An object of config.json and what it is called in errors."""

    def __init__(self, where: str, values: object) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise CcqError(f"{where}: not an object")
        self.values = values

    def fail(self, problem: str) -> CcqError:
        return CcqError(f"{self.where}: {problem}")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(f"{key} is not a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(f"{key} is not a list of texts")
        for item in value:
            if item.startswith(_REGEX):
                try:
                    re.compile(item.removeprefix(_REGEX))
                except re.error as error:
                    raise self.fail(f"{key}: {show(item)}: {error}") from None
        return tuple(value)
