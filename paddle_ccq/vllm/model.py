# SPDX-License-Identifier: Apache-2.0
"""vLLM's model classes, which also load the checkpoints that this package writes.

Classes of Hugging Face's naming are made when they are asked for, for a model of another family may
need what is not installed.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM
from vllm.model_executor.models.ernie45_moe import Ernie4_5_MoeForCausalLM
from vllm.platforms import current_platform

from ..errors import CcqError
from . import cpu_router, gpu_router, loading, packed_loading
from .config import CcqConfig
from .packed_config import PackedConfig
from .packed_models import PACKED_MODELS, PREFIX, STATE_NAMES, WHOLE_MODELS

# Loaders of vLLM that fill parameters and never ask a model to load its tensors.
_BLIND_LOADERS = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer")


def _refuse_options(vllm_config: Any) -> None:
    """Refuse what does not go with packed layers, which have no weight of their own name."""
    form = getattr(getattr(vllm_config, "load_config", None), "load_format", "auto")
    if form in _BLIND_LOADERS:
        raise CcqError(
            f"--load-format {form}: packed weights are not loaded in this way; leave the flag out"
        )
    if getattr(vllm_config, "lora_config", None) is not None:
        raise CcqError(
            "--enable-lora: adapters can't be put beside packed weights; serve the checkpoint of"
            " floats that `python -m paddle_ccq.dequantize` makes"
        )


class _LoadsPacked:
    """load_weights that takes packed experts away; for all other checkpoints nothing changes."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        found = vllm_config.quant_config
        self.packed = found if isinstance(found, PackedConfig) else None
        if self.packed is not None:
            _refuse_options(vllm_config)
            self.packed.check_parallel(vllm_config.parallel_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.packed is not None and current_platform.is_cpu():
            cpu_router.correct(self)

    def load_weights(self, weights: loading.Weights) -> set[str]:
        if self.packed is None:
            return super().load_weights(weights)
        return super().load_weights(packed_loading.place(self, self.packed, weights))


class _Loads(_LoadsPacked):
    """load_weights that knows FastDeploy's layout too."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        found = vllm_config.quant_config
        self.ccq = found if isinstance(found, CcqConfig) else None
        if self.ccq is not None:
            _refuse_options(vllm_config)
            self.ccq.check_parallel(vllm_config.parallel_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.ccq is None:
            return
        if current_platform.is_cpu():
            cpu_router.correct(self)
        else:
            gpu_router.install(self, vllm_config.model_config.dtype)

    def load_weights(self, weights: loading.Weights) -> set[str]:
        if self.ccq is None:
            return super().load_weights(weights)
        return loading.load(self, self.ccq, weights, super().load_weights)


class CcqErnieMoeForCausalLM(_Loads, Ernie4_5_MoeForCausalLM):
    """ERNIE-4.5 with experts."""


class CcqErnieForCausalLM(_Loads, Ernie4_5ForCausalLM):
    """ERNIE-4.5 without experts."""


def _text_positions(
    self: Any, input_tokens: list[int], mm_features: list[Any]
) -> tuple[torch.Tensor, int]:
    """Positions [3, tokens] of text alone, for models that count time, height and width."""
    return torch.arange(len(input_tokens)).expand(3, -1), 0


def _what_it_lacks(module: Any, architecture: str) -> dict[str, Any]:
    """What vLLM asks of a model of text alone, and this release's class of it has not."""
    if architecture not in WHOLE_MODELS:
        return {}
    own, whole = getattr(module, architecture), getattr(module, WHOLE_MODELS[architecture])
    found = {
        name: inspect.getattr_static(whole, name)
        for name in STATE_NAMES
        if not hasattr(own, name) and hasattr(whole, name)
    }
    if not hasattr(own, "supports_mrope"):
        found |= {"supports_mrope": True, "get_mrope_input_positions": _text_positions}
    return found


def __getattr__(name: str) -> type:
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in PACKED_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(PACKED_MODELS[architecture])
    members = {"__module__": __name__} | _what_it_lacks(module, architecture)
    made = type(name, (_LoadsPacked, getattr(module, architecture)), members)
    globals()[name] = made
    return made
