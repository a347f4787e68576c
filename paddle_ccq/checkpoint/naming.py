# SPDX-License-Identifier: Apache-2.0
"""Canonical tensor names and the two layouts, -PT and -Paddle, in which checkpoints store them.

Canonical names and orientation are those of the -Paddle layout: [in, out] with fused qkv and
fused gate/up. The -PT layout stores [out, in] and the parts separately.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import CcqError
from .config import ErnieConfig

LAYOUTS = ("pt", "paddle")
DESCRIPTIONS = {
    "pt": "-PT layout (Hugging Face names, [out, in])",
    "paddle": "-Paddle layout (fused names, [in, out])",
}
_PREFIXES = {"pt": "model.", "paddle": "ernie."}

CORRECTION_BIAS = "mlp.moe_statics.e_score_correction_bias"
# Where the router's bias sits when a model is saved from classes that keep it inside the gate.
_BIAS_ALIASES = ("mlp.gate.moe_statics.e_score_correction_bias", "mlp.gate.e_score_correction_bias")


@dataclass(frozen=True)
class StoredTensor:
    """One on-disk tensor: its name, its shape, and the canonical columns that it holds.

    `columns` is None for tensors that are stored whole.
    """

    name: str
    shape: tuple[int, ...]
    columns: slice | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Storage:
    """How a canonical tensor lies on disk: its parts, and whether they are stored transposed."""

    parts: tuple[StoredTensor, ...]
    transposed: bool


def is_linear(name: str) -> bool:
    """Whether a canonical name is a matrix of a linear layer, the kind that can be quantized."""
    return name.endswith(
        ("qkv_proj.weight", "o_proj.weight", "up_gate_proj.weight", "down_proj.weight")
    )


def is_expert(name: str) -> bool:
    """Whether a canonical name is a matrix of a routed expert."""
    return is_linear(name) and ".mlp.experts." in name


def is_mtp(name: str) -> bool:
    """Whether an on-disk name belongs to the multi-token-prediction head, which is not used."""
    return any(part.startswith("mtp_") or part == "mtp" for part in name.split("."))


def storage(config: ErnieConfig, name: str, shape: tuple[int, ...], layout: str) -> Storage:
    """Where a canonical tensor of the given shape is stored in a layout."""
    own_name = on_disk_name(name, layout)
    aliases: tuple[str, ...] = ()
    if name.endswith(CORRECTION_BIAS):
        stem = own_name.removesuffix(CORRECTION_BIAS)
        aliases = tuple(stem + alias for alias in _BIAS_ALIASES)
    turned = layout == "pt" and (
        is_linear(name) or name.endswith("mlp.gate.weight") or name == "lm_head.weight"
    )
    if not turned:
        return Storage((StoredTensor(own_name, shape, None, aliases),), False)
    rows, columns = shape
    if name.endswith("qkv_proj.weight"):
        # All query heads, then all key heads, then all value heads.
        pieces = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        fused = "qkv_proj"
    elif name.endswith("up_gate_proj.weight"):
        pieces = {"gate_proj": columns // 2, "up_proj": columns // 2}
        fused = "up_gate_proj"
    else:
        return Storage((StoredTensor(own_name, (columns, rows), slice(0, columns)),), True)
    parts, begin = [], 0
    for piece, width in pieces.items():
        part_name = own_name.replace(fused, piece)
        parts.append(StoredTensor(part_name, (width, rows), slice(begin, begin + width)))
        begin += width
    return Storage(tuple(parts), True)


def on_disk_name(name: str, layout: str) -> str:
    """A canonical name with the layout's prefix (fused names stay fused)."""
    if layout == "paddle" or not name.startswith("ernie."):
        return name
    return _PREFIXES[layout] + name.removeprefix("ernie.")


def detect_layout(names: Iterable[str], where: object) -> str:
    """The layout that a checkpoint's tensor names show; `where` names it in errors."""
    found = dict.fromkeys(LAYOUTS, "")
    for name in names:
        for layout, prefix in _PREFIXES.items():
            if name.startswith(prefix) and not is_mtp(name):
                found[layout] = found[layout] or name
    if found["pt"] and found["paddle"]:
        raise CcqError(
            f"{where}: tensors of two layouts, such as {found['pt']!r} and {found['paddle']!r};"
            " the folder mixes two checkpoints"
        )
    for layout, example in found.items():
        if example:
            return layout
    raise CcqError(
        f"{where}: no tensor is named like an ERNIE-4.5 weight (model.layers.* in -PT,"
        " ernie.layers.* in -Paddle checkpoints)"
    )
