# SPDX-License-Identifier: Apache-2.0
"""Stored tensor names, taken apart; and vLLM's names of the modules they belong to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checkpoint.entries import SUFFIXES

_LAYER = r"^(?:ernie|model)\.layers\.(\d+)\."
_SUFFIX = rf"\.({'|'.join(SUFFIXES)})$"
_EXPERT = re.compile(rf"{_LAYER}mlp\.experts\.(\d+)\.(up_gate|down)_proj{_SUFFIX}")
_DENSE = re.compile(
    rf"{_LAYER}((?:self_attn|mlp|mlp\.shared_experts)\.(?:qkv|o|up_gate|down)_proj){_SUFFIX}"
)


@dataclass(frozen=True)
class ExpertTensor:
    """One stored tensor of a routed expert's matrix, by the numbers and words of its name."""

    layer: int
    expert: int
    projection: str  # "up_gate" or "down"
    suffix: str


@dataclass(frozen=True)
class DenseTensor:
    """One stored tensor of a packed dense matrix, by the parts of its name."""

    layer: int
    module: str  # canonical, such as "self_attn.qkv_proj"
    suffix: str

    @property
    def canonical(self) -> str:
        """The matrix's canonical name without .weight."""
        return f"ernie.layers.{self.layer}.{self.module}"

    @property
    def vllm_module(self) -> str:
        """vLLM's name of the module inside the layer."""
        return self.module.replace("up_gate_proj", "gate_up_proj")


def parse(name: str) -> ExpertTensor | DenseTensor | None:
    """What a stored packed tensor belongs to; None for any other tensor."""
    found = _EXPERT.match(name)
    if found:
        layer, expert, projection, suffix = found.groups()
        return ExpertTensor(int(layer), int(expert), projection, suffix)
    found = _DENSE.match(name)
    if found:
        layer, module, suffix = found.groups()
        return DenseTensor(int(layer), module, suffix)
    return None


def canonical_of(prefix: str) -> str:
    """vLLM's name of a linear layer, "model.layers.0.mlp.gate_up_proj" -> the canonical one."""
    name = prefix.replace("gate_up_proj", "up_gate_proj")
    return "ernie." + name.removeprefix("model.") if name.startswith("model.") else name


def layer_of(prefix: str) -> int:
    """The layer number in one of vLLM's names."""
    found = re.search(r"layers\.(\d+)\.", prefix + ".")
    if found is None:
        raise ValueError(f"{prefix}: not inside a layer")
    return int(found.group(1))


def is_skipped(name: str) -> bool:
    """Tensors that no served model has: the multi-token-prediction head."""
    return any(part.startswith("mtp_") or part == "mtp" for part in name.split("."))


def float_parts(name: str, heads: tuple[int, int, int]) -> tuple[list[tuple[str, int, int]], bool]:
    """vLLM's (name, first column, columns) of each part of a stored float, and whether to turn it.

    Stored matrices are [in, out], vLLM's are [out, in] and apart where stored ones are fused;
    columns 0 means the whole, -1 one half of it.

    Args:
        heads: output columns of all query, key and value heads.
    """
    name = "model." + name.removeprefix("ernie.") if name.startswith("ernie.") else name
    name = re.sub(r"_proj\.quant_weight$", "_proj.weight", name)
    if name.endswith("qkv_proj.weight"):
        stem = name.removesuffix("qkv_proj.weight")
        parts, first = [], 0
        for letter, width in zip("qkv", heads, strict=True):
            parts.append((f"{stem}{letter}_proj.weight", first, width))
            first += width
        return parts, True
    if name.endswith("up_gate_proj.weight"):
        stem = name.removesuffix("up_gate_proj.weight")
        return [(f"{stem}gate_proj.weight", 0, -1), (f"{stem}up_proj.weight", -1, -1)], True
    turned = name.endswith(("_proj.weight", "mlp.gate.weight", "lm_head.weight"))
    return [(name, 0, 0)], turned
