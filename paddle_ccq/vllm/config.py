# SPDX-License-Identifier: Apache-2.0
"""vLLM's quantization config for CCQ checkpoints: claims folders, refuses what can't be served."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import current_platform

from ..codec.row_order import FASTDEPLOY_2_1
from ..families.config import is_packed_entry
from ..families.ernie45 import ErnieConfig
from ..families.registry import read_config
from . import names
from .base_config import CcqBaseConfig
from .claims import (
    METHOD,
    Claim,
    Parallel,
    check_parallel,
    claims,
    rank_count,
    read_model_config,
    row_order_of,
)
from .methods import experts_method


class CcqConfig(CcqBaseConfig):
    """The formats of one checkpoint's layers, and the methods that run them."""

    def __init__(self, claim: Claim) -> None:
        super().__init__()
        self.claim = claim
        self.row_order = FASTDEPLOY_2_1
        self.model: ErnieConfig | None = None
        self.folder = ""
        self.ranks = 1

    def __getstate__(self) -> dict[str, Any]:
        """For vLLM's other processes, which read the model's config anew: it holds functions."""
        raw = None if self.model is None else dict(self.model.raw)
        return self.__dict__ | {"model": raw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        raw = state["model"]
        self.__dict__.update(state, model=None if raw is None else read_config(raw))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        if is_packed_entry(config):
            from .packed_config import PackedConfig

            return PackedConfig.from_config(config)
        return cls(Claim.read(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """FastDeploy's structure names no quant_method; without this vLLM would ask for a flag."""
        return METHOD if claims(hf_quant_cfg) and user_quant in (None, METHOD) else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Called at the start, in the first process: the rest of config.json, and refusals."""
        if hf_config is None:
            return
        self.folder = model_name
        self.ranks = rank_count(model_name)
        self.model = read_model_config(model_name, hf_config.to_dict())
        self.claim.check_model(self.model)
        self.row_order = row_order_of(self.model.raw)
        if not current_platform.is_cpu():
            from .torch_ops import library

            library()

    def check_parallel(self, parallel_config: Any) -> None:
        """Refuse numbers of cards that can't be served; once vLLM's whole config is known."""
        if self.model is None:
            return
        check_parallel(self.model, self.claim, Parallel.of_vllm(parallel_config), self.ranks)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            canonical = names.canonical_of(prefix)
            if not canonical.endswith("_proj") or self.claim.dense_format(canonical) == "bf16":
                return UnquantizedLinearMethod()
            from .dense import Wint8LinearMethod

            return Wint8LinearMethod(prefix, self.ranks > 1)
        # Named RoutedExperts since 0.25; an expert layer is known by what only it has.
        if hasattr(layer, "moe_config"):
            return self._experts_method(layer, prefix)
        return None

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase:
        format, cut = self.claim.expert_format(names.layer_of(prefix)), self.ranks > 1
        return experts_method(layer.moe_config, prefix, cut, format, self.row_order)
