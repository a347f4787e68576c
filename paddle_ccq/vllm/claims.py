# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints the plugin serves, and in which format each of their matrices is stored.

All from config.json, as the checkpoint's writer and FastDeploy read it; free of vLLM.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.reader import PROVENANCE_KEY
from ..codec import formats
from ..codec.row_order import FASTDEPLOY_2_1, ROW_ORDERS
from ..errors import CcqError
from ..families.config import ModelConfig
from ..families.ernie45 import ErnieConfig
from ..families.registry import read_config
from ..families.tensor import Role, TensorSpec
from ..targets.fastdeploy.config import wint4_end_layer_of, wint4_layers_of
from ..targets.vllm_sizes import KERNEL_MULTIPLE

METHOD = "ccq"
# What may stand in quantization_config.quantization: an experts' format, or a dense model's.
FORMATS = ("wint2", "ccq-2t", "ccq-2.5", "ccq-2.75", "wint8")


def claims(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a quantization_config is one of ours: quant_method ccq, or FastDeploy's structure.

    That structure names no quant_method. A format in it that is not served is claimed too: nothing
    else in vLLM reads it, and Claim.read says what is served.
    """
    if not quantization:
        return False
    method = quantization.get("quant_method") or ""
    return method == METHOD or (not method and isinstance(quantization.get("quantization"), str))


@dataclass(frozen=True)
class Claim:
    """The formats that a quantization_config promises.

    Attributes:
        format: of the experts that are not wint4; "wint8" for a model without experts.
        wint4_end_layer: MoE layers up to this one are wint4.
        wint4_layers: or these, where there is a list.
        kept: patterns of dense layers that stay bfloat16, by canonical names.
    """

    format: str
    wint4_end_layer: int
    wint4_layers: frozenset[int] | None
    kept: tuple[str, ...]

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> Claim:
        """The claim of one quantization_config.

        Raises:
            CcqError: naming the key that cannot be served.
        """
        where = "config.json: quantization_config"
        format = quantization.get("quantization")
        if format not in FORMATS:
            raise CcqError(f"{where}.quantization {format!r}: served are {', '.join(FORMATS)}")
        dense = quantization.get("dense_quant_type", "wint8")
        if dense != "wint8":
            raise CcqError(f"{where}.dense_quant_type {dense!r}: dense layers can be wint8 only")
        kept = quantization.get("modules_to_not_convert") or []
        if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
            raise CcqError(f"{where}.modules_to_not_convert: not a list of names")
        end = -1 if format == "wint8" else wint4_end_layer_of({"quantization_config": quantization})
        if end is None:
            raise CcqError(f"{where}: quant_end_layer of the wint4 layers is not a number")
        return cls(format, end, wint4_layers_of(quantization), tuple(kept))

    def expert_format(self, layer: int) -> str:
        """The format of a MoE layer's routed experts."""
        listed = self.wint4_layers
        four = layer <= self.wint4_end_layer if listed is None else layer in listed
        return "wint4" if four else self.format

    def dense_format(self, name: str) -> str:
        """ "wint8" or "bf16" of a dense linear layer, by its canonical name without .weight."""
        kept = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.kept)
        return "bf16" if kept else "wint8"

    def format_of(self, tensor: TensorSpec) -> str:
        """The format of a linear layer's matrix."""
        if tensor.is_expert and tensor.layer is not None:
            return self.expert_format(tensor.layer)
        return self.dense_format(tensor.stem)

    def check_model(self, config: ErnieConfig) -> None:
        """Refuse a model whose config contradicts the claim."""
        if self.format == "wint8" and config.moe_num_experts:
            raise CcqError(
                "config.json: quantization wint8 for a model with MoE layers, whose experts would"
                " be 8-bit: not served here; quantize it with --format wint2"
            )


def row_order_of(raw: Mapping[str, Any]) -> str:
    """The order of WINT2 rows that config.json records; FastDeploy 2.1's where it does not.

    Raises:
        CcqError: for an order that is not known.
    """
    own = raw.get(PROVENANCE_KEY)
    recorded = own.get("row_order") if isinstance(own, Mapping) else None
    if recorded is not None and recorded not in ROW_ORDERS:
        raise CcqError(
            f"config.json: {PROVENANCE_KEY}.row_order {recorded!r}: not one of"
            f" {', '.join(ROW_ORDERS)}"
        )
    return recorded or FASTDEPLOY_2_1


def read_model_config(model: str, fallback: Mapping[str, Any]) -> ErnieConfig:
    """A local folder's config.json, else the one that vLLM has read from the hub."""
    folder = Path(model)
    return read_config(folder if folder.is_dir() else dict(fallback))


@dataclass(frozen=True)
class Parallel:
    """How a model is spread over cards."""

    tensor: int = 1
    pipeline: int = 1
    experts: bool = False  # whole experts on each card (--enable-expert-parallel)

    @classmethod
    def of_vllm(cls, config: Any) -> Parallel:
        """What vLLM's ParallelConfig says."""
        return cls(
            config.tensor_parallel_size,
            config.pipeline_parallel_size,
            config.enable_expert_parallel,
        )


def _part_problem(tensor: TensorSpec, format: str, size: int) -> str | None:
    """Why one of `size` ranks cannot hold its part of a tensor; None if it can."""
    cut, shape = tensor.cut, tensor.shape
    if cut is not None and size > 1:
        if not cut.fits(size):
            return f"{cut.parts[0]} can't be cut into {size} equal parts"
        shape = cut.rank_shape(shape, size)
    return None if format == "bf16" else formats.shape_problem(format, *shape)


def _expert_problem(config: ErnieConfig, parts: int) -> str | None:
    """Why our kernels can't take experts that are cut into `parts`; None if they can."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    if hidden % KERNEL_MULTIPLE:
        return f"hidden size {hidden} is no multiple of {KERNEL_MULTIPLE}"
    if width % (parts * KERNEL_MULTIPLE):
        return f"the width {width} of an expert is cut in steps of {KERNEL_MULTIPLE} rows"
    return None


def _tensor_problem(config: ErnieConfig, claim: Claim, parallel: Parallel) -> str | None:
    # Layers and experts repeat a few shapes; one of each kind is enough to look at.
    kinds: dict[tuple[str, tuple[int, ...], str], TensorSpec] = {}
    for tensor in config.tensors.values():
        if tensor.is_linear:
            kinds.setdefault((tensor.template, tensor.shape, claim.format_of(tensor)), tensor)
    size = parallel.tensor
    for (_, _, format), tensor in kinds.items():
        if tensor.role is Role.ATTENTION:
            # Key heads may be repeated where there are fewer of them than ranks.
            heads, keys = config.num_attention_heads, config.num_key_value_heads
            if heads % size or (keys % size and size % keys):
                return f"{heads} query and {keys} key heads can't be shared out evenly"
            continue
        if tensor.is_expert:
            problem = _expert_problem(config, 1 if parallel.experts else size)
            if problem:
                return f"{tensor.name}: {problem}"
        if tensor.is_expert and parallel.experts:
            if config.moe_num_experts % size:
                return f"{config.moe_num_experts} experts can't be shared out evenly"
            continue
        problem = _part_problem(tensor, format, size)
        if problem:
            return f"{tensor.name}: {problem}"
    return None


def check_pipeline(config: ModelConfig, parallel: Parallel, tied: bool) -> None:
    """Refuse a number of pipeline stages that the layers can't be shared out over.

    Args:
        tied: whether the head is the embedding, which the first stage alone holds.

    Raises:
        CcqError: as said.
    """
    flag, layers = f"--pipeline-parallel-size {parallel.pipeline}", config.num_hidden_layers
    if parallel.pipeline > layers:
        raise CcqError(f"{flag}: the model has {layers} layers; some stages would have none")
    if parallel.pipeline > 1 and tied:
        raise CcqError(
            f"{flag}: vLLM's class of this model can't hold a head that is tied to the embedding on"
            " another card; use --tensor-parallel-size"
        )


def check_parallel(config: ErnieConfig, claim: Claim, parallel: Parallel, ranks: int) -> None:
    """Refuse a number of cards that the model can't be cut for, naming those that work.

    Args:
        ranks: rank folders of the checkpoint; 1 where it is whole.

    Raises:
        CcqError: as said.
    """
    check_pipeline(config, parallel, config.tie_word_embeddings)
    if ranks > 1:
        if parallel.experts:
            raise CcqError(
                "--enable-expert-parallel: rank folders hold a part of every expert; serve the"
                " checkpoint that was not cut"
            )
        if parallel.tensor != ranks:
            raise CcqError(
                f"--tensor-parallel-size {parallel.tensor}: the checkpoint is cut into {ranks} rank"
                f" folders; serve it with --tensor-parallel-size {ranks}, or one that was not cut"
            )
        problem = _expert_problem(config, ranks) if config.moe_num_experts else None
        if problem:
            raise CcqError(f"{ranks} rank folders: {problem}")
        return
    problem = _tensor_problem(config, claim, parallel)
    if problem is None:
        return

    def works(size: int) -> bool:
        return not _tensor_problem(config, claim, Parallel(size, experts=parallel.experts))

    sizes = [str(n) for n in range(1, config.num_attention_heads + 1) if works(n)]
    if not sizes:
        raise CcqError(problem)
    whole = Parallel(parallel.tensor, experts=True)
    instead = not parallel.experts and not _tensor_problem(config, claim, whole)
    raise unfit_size(parallel.tensor, problem, sizes, instead)


def unfit_size(size: int, problem: str, sizes: list[str], whole_experts: bool) -> CcqError:
    """The refusal of a number of cards.

    Args:
        sizes: that work.
        whole_experts: whether this number does, with whole experts on each card.
    """
    instead = f"; {size} with --enable-expert-parallel" if whole_experts else ""
    return CcqError(
        f"--tensor-parallel-size {size} does not fit this model: {problem}; sizes that work:"
        f" {', '.join(sizes)}{instead}"
    )


def rank_count(model: str) -> int:
    """Rank folders rank0, rank1, ... of a local checkpoint; 1 where there are none."""
    folder = Path(model)
    count = 0
    while (folder / f"rank{count}").is_dir():
        count += 1
    return max(count, 1)
