# SPDX-License-Identifier: Apache-2.0
"""vLLM's quantization config for checkpoints in Hugging Face's naming.

Their routed experts are this package's, everything else is left to vLLM: as floats, or by the
method that the source's own quantization_config names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import current_platform

from ..errors import CcqError
from ..families.generic import GENERIC
from ..families.registry import read_config
from . import packed_models
from .base_config import CcqBaseConfig
from .claims import Parallel
from .methods import experts_method
from .packed_claims import WHERE, PackedClaim, check_packed_parallel


class PackedConfig(CcqBaseConfig):
    """Formats of one checkpoint's experts, by the names of vLLM's modules."""

    def __init__(self, claim: PackedClaim) -> None:
        super().__init__()
        self.claim = claim
        # Name on disk -> vLLM's; models apply their renaming while they are made.
        self.modules = {module: module for module in claim.experts}
        self.source = _source_config(claim)
        self.folder = ""
        packed_models.register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another of vLLM's processes."""
        self.__dict__.update(state)
        packed_models.register()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        return cls(PackedClaim.read(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Called at the start, in the first process."""
        self.folder = model_name
        if self.source is not None:
            self.source.maybe_update_config(model_name, hf_config=hf_config)
        if not current_platform.is_cpu():
            from .torch_ops import library

            library()

    def check_parallel(self, parallel_config: Any) -> None:
        """Refuse numbers of cards that can't be served, naming those that can."""
        folder = Path(self.folder)
        # Of a hub's model there are only transformers' fields, which are not a config.json's.
        if not self.folder or not folder.is_dir():
            return
        try:
            config = read_config(folder)
        except CcqError:  # vLLM reads models that this package does not; its layers check their own
            return
        if config.family is GENERIC:
            return
        check_packed_parallel(config, Parallel.of_vllm(parallel_config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        renamed = {}
        for disk, name in self.modules.items():
            found = hf_to_vllm_mapper.apply_list([name])
            renamed[disk] = found[0] if found else name
        self.modules = renamed
        if self.source is not None:
            self.source.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if hasattr(layer, "moe_config"):
            # By its layer: some models give their experts a prefix that is not the module's name.
            for disk, module in self.modules.items():
                if _layer_of(module) == _layer_of(prefix):
                    return self._experts(layer, prefix, self.claim.experts[disk])
        if self.source is not None:
            self.source.packed_modules_mapping = self.packed_modules_mapping
            return self.source.get_quant_method(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _experts(self, layer: Any, prefix: str, format: str) -> QuantizeMethodBase:
        activation = getattr(layer, "activation", "silu")
        if getattr(activation, "value", activation) != "silu":
            raise CcqError(f"{prefix}: experts with {activation}; the products here have SwiGLU")
        return experts_method(layer.moe_config, prefix, False, format, self.claim.row_order)


def _layer_of(name: str) -> str:
    """A name up to its layer's number: "model.layers.3" of "model.layers.3.mlp.experts"."""
    found = re.match(r".*\blayers\.\d+(?=\.)", name)
    return found[0] if found else name


def _source_config(claim: PackedClaim) -> QuantizationConfig | None:
    if not claim.source:
        return None
    method = claim.source.get("quant_method")
    try:
        made = get_quantization_config(str(method))
    except ValueError:
        raise CcqError(
            f"{WHERE}.source_quantization_config.quant_method {method!r}: this vLLM has no such"
            " method for the layers that are not packed"
        ) from None
    return made.from_config(dict(claim.source))
