# SPDX-License-Identifier: Apache-2.0
"""vLLM's model classes, which also load the checkpoints that this package writes.

Classes of Hugging Face's naming are made when they are asked for, for a model of another family may
need what is not installed.
"""

from __future__ import annotations

import importlib
from typing import Any

from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM
from vllm.model_executor.models.ernie45_moe import Ernie4_5_MoeForCausalLM
from vllm.platforms import current_platform

from . import cpu_router, gpu_router, loading, packed_loading
from .config import CcqConfig
from .packed_config import PackedConfig
from .packed_models import PACKED_MODELS, PREFIX


class _LoadsPacked:
    """load_weights that takes packed experts away; for all other checkpoints nothing changes."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        found = vllm_config.quant_config
        self.packed = found if isinstance(found, PackedConfig) else None
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


def __getattr__(name: str) -> type:
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in PACKED_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(PACKED_MODELS[architecture])
    made = type(name, (_LoadsPacked, getattr(module, architecture)), {"__module__": __name__})
    globals()[name] = made
    return made
