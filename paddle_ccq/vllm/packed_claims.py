# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint in Hugging Face's naming says of its packed experts; free of vLLM.

docs/reference/huggingface-layout.md is the specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..codec.row_order import ROW_ORDERS
from ..errors import CcqError
from ..families.config import ModelConfig
from ..families.ernie45 import ERNIE45
from ..targets.huggingface.config import VLLM_ARCHITECTURES, is_served
from ..targets.vllm_sizes import KERNEL_MULTIPLE
from .claims import Parallel, check_pipeline, unfit_size

VERSION = 1
WHERE = "config.json: quantization_config"
# Formats of experts that there are products for.
FORMATS = ("wint2", "ccq-2t", "ccq-2.5", "ccq-2.75", "wint4")
PROJECTIONS = {"gate_up_proj": "up_gate", "down_proj": "down"}


@dataclass(frozen=True)
class PackedTensor:
    """One stored tensor of one expert; `module` is the experts' name on disk."""

    module: str
    expert: int
    projection: str  # "up_gate" or "down"
    suffix: str


@dataclass(frozen=True)
class PackedClaim:
    """The modules of packed experts, and how the source stored all the rest.

    Attributes:
        experts: format by module's name on disk.
        row_order: of WINT2 rows.
        source: the source's own quantization_config; None if it was not quantized.
    """

    experts: Mapping[str, str]
    row_order: str
    source: Mapping[str, Any] | None

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> PackedClaim:
        """The claim of one quantization_config.

        Raises:
            CcqError: naming the key that cannot be served.
        """
        version = quantization.get("version")
        if version != VERSION:
            raise CcqError(
                f"{WHERE}.version {version!r}: this release reads version {VERSION}; a newer"
                " paddle-ccq may read it"
            )
        experts = quantization.get("experts")
        if not isinstance(experts, Mapping) or not experts:
            raise CcqError(f"{WHERE}.experts: not a table of module names and formats")
        for module, format in experts.items():
            if format not in FORMATS:
                raise CcqError(
                    f"{WHERE}.experts: {module} is {format!r}; served are {', '.join(FORMATS)}"
                )
        order = quantization.get("row_order")
        if order not in ROW_ORDERS:
            raise CcqError(f"{WHERE}.row_order {order!r}: not one of {', '.join(ROW_ORDERS)}")
        source = quantization.get("source_quantization_config")
        if source is not None and not isinstance(source, Mapping):
            raise CcqError(f"{WHERE}.source_quantization_config: neither an object nor null")
        return cls(dict(experts), order, source)

    def parse(self, name: str) -> PackedTensor | None:
        """What a tensor on disk belongs to; None if it is no packed one."""
        parts = name.rsplit(".", 3)
        if len(parts) != 4 or parts[0] not in self.experts:
            return None
        module, expert, projection, suffix = parts
        if not expert.isdecimal() or projection not in PROJECTIONS:
            return None
        return PackedTensor(module, int(expert), PROJECTIONS[projection], suffix)


def architecture_problem(config: ModelConfig) -> str | None:
    """Why vLLM can't serve a model of this architecture with packed experts; None if it can."""
    if is_served(config):
        return None
    name = next(iter(config.architectures), "of no name")
    return (
        f"config.json: architectures {name}: packed experts are served in vLLM for"
        f" {', '.join(VLLM_ARCHITECTURES)}; `python -m paddle_ccq.dequantize` makes a checkpoint of"
        " floats"
    )


def check_packed_parallel(config: ModelConfig, parallel: Parallel) -> None:
    """Refuse a number of cards that the model can't be cut for, naming those that work.

    Raises:
        CcqError: as said.
    """
    # Other classes of vLLM hold the embedding on every card.
    tied = config.family is ERNIE45 and config.tie_word_embeddings
    check_pipeline(config, parallel, tied)
    problem = _cut_problem(config, parallel.tensor, parallel.experts)
    if problem is None:
        return
    sizes = [
        str(size)
        for size in range(1, config.num_attention_heads + 1)
        if not _cut_problem(config, size, parallel.experts)
    ]
    if not sizes:
        raise CcqError(problem)
    instead = not parallel.experts and not _cut_problem(config, parallel.tensor, True)
    raise unfit_size(parallel.tensor, problem, sizes, instead)


def _cut_problem(config: ModelConfig, size: int, whole_experts: bool) -> str | None:
    """Why `size` cards can't share the model."""
    if config.hidden_size % KERNEL_MULTIPLE:
        return f"hidden size {config.hidden_size} is no multiple of {KERNEL_MULTIPLE}"
    if config.num_attention_heads % size:
        return f"{config.num_attention_heads} query heads can't be shared out evenly"
    keys = config.num_key_value_heads
    if keys % size and size % keys:
        return f"{keys} key heads can't be shared out evenly"
    if whole_experts and config.moe_num_experts % size:
        return f"{config.moe_num_experts} experts can't be shared out evenly"
    width = config.moe_intermediate_size
    if width % ((1 if whole_experts else size) * KERNEL_MULTIPLE):
        return f"the width {width} of an expert is cut in steps of {KERNEL_MULTIPLE} rows"
    return None
