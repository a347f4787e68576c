# SPDX-License-Identifier: Apache-2.0
"""How every tensor of a model lies in a folder: as floats, or packed in one of the formats."""

from __future__ import annotations

from dataclasses import dataclass

from ..codec import formats
from ..errors import CcqError
from ..families.config import ModelConfig
from ..families.tensor import Source, Storage
from .safetensors_io import FLOAT_DTYPES, TensorFolder, TensorInfo
from .sources.locate import locate
from .sources.scheme import SourceScheme
from .unexpected import pass_over

CODE_SUFFIXES = ("code_scale", "code_zp")
SUFFIXES = ("quant_weight", "weight_scale", "super_scales", *CODE_SUFFIXES)


@dataclass(frozen=True)
class Entry:
    """How one canonical tensor is stored: float parts, or the packed tensors of a format."""

    format: str
    shape: tuple[int, ...]
    storage: Storage | None
    packed: dict[str, str]  # suffix -> on-disk name


def find_entries(
    config: ModelConfig, tensors: TensorFolder, naming: str, scheme: SourceScheme
) -> tuple[dict[str, Entry], list[str]]:
    """Every tensor of the model by canonical name, and messages about those that are passed over.

    Raises:
        CcqError: for a tensor that is missing, has another shape or dtype, or is packed in no known
            format, and for one that the model does not have.
    """
    packed = packed_tensors(tensors)
    entries: dict[str, Entry] = {}
    missing: list[str] = []
    used: set[str] = set()
    copies: dict[str, str] = {}
    for name, tensor in config.tensors.items():
        shape, storage = tensor.shape, tensor.sources[naming]
        found = packed.get(storage.packed) or packed.get(storage.packed_here) or {}
        # Of what a family does not name, no part need be readable.
        used.update(stored for stored, _, _ in tensor.kept)
        if tensor.is_linear and "quant_weight" in found:
            entries[name] = _packed_entry(tensors, name, shape, found)
            used.update(found.values())
            continue
        for part in storage.parts:
            stored = locate(tensors, scheme, part)
            if stored is None:
                if tensor.is_linear and found:
                    _packed_entry(tensors, name, shape, found)
                missing.append(part.name)
                continue
            used.update(stored.names)
            copies.update(dict.fromkeys(part.aliases, stored.names[0]))
        entries[name] = Entry("bf16", shape, storage, {})
    if missing:
        count = f"{len(missing)} tensors are" if len(missing) > 1 else "1 tensor is"
        raise CcqError(
            f"{tensors.folder}: {count} missing, the first {missing[0]!r}; the download is not"
            " complete or config.json belongs to another model"
        )
    return entries, pass_over(config, tensors, copies, used)


def packed_tensors(tensors: TensorFolder) -> dict[str, dict[str, str]]:
    """Prefix -> suffix -> on-disk name, for every tensor named like part of a packed matrix.

    FP8 sources have scales of such a name too; only packed matrices have a quant_weight.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in tensors.names():
        prefix, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES:
            groups.setdefault(prefix, {})[suffix] = name
    return groups


def _packed_entry(
    tensors: TensorFolder, name: str, shape: tuple[int, ...], found: dict[str, str]
) -> Entry:
    if "quant_weight" not in found:
        lonely = next(iter(found.values()))
        raise CcqError(
            f"{tensors.path_of(lonely)}: {lonely} is there, but no quant_weight beside it"
        )
    infos = {suffix: tensors.info(stored) for suffix, stored in found.items()}
    weight = infos["quant_weight"]
    if len(infos) == 1 and weight.dtype in FLOAT_DTYPES and weight.shape == shape:
        # A linear left unconverted in a quantized checkpoint keeps the packed name.
        part = Source(found["quant_weight"], shape)
        return Entry("bf16", shape, Storage((part,), False, ""), {})
    for format_name in formats.FORMATS:
        if format_name != "bf16" and _fits(format_name, shape, infos):
            return Entry(format_name, shape, None, found)
    shown = ", ".join(f"{s} {i.dtype} {list(i.shape)}" for s, i in sorted(infos.items()))
    raise CcqError(
        f"{tensors.path_of(found['quant_weight'])}: {name} of shape {list(shape)} is packed in"
        f" none of the known formats (found {shown})"
    )


def _fits(format_name: str, shape: tuple[int, ...], infos: dict[str, TensorInfo]) -> bool:
    if formats.shape_problem(format_name, *shape):
        return False
    specs = formats.tensor_specs(format_name, *shape)
    return specs.keys() == infos.keys() and all(
        infos[suffix].shape == wanted
        # FastDeploy casts the scales of dense linears on load, whatever float they are stored as.
        and (infos[suffix].dtype == dtype or _is_float_scale(suffix, infos[suffix].dtype, dtype))
        for suffix, (wanted, dtype) in specs.items()
    )


def _is_float_scale(suffix: str, stored: str, wanted: str) -> bool:
    return suffix == "weight_scale" and wanted == "BF16" and stored in FLOAT_DTYPES
