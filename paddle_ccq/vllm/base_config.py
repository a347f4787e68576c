# SPDX-License-Identifier: Apache-2.0
"""What both of this package's quantization configs answer vLLM alike."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from .claims import METHOD


class CcqBaseConfig(QuantizationConfig):
    """Name, dtypes and GPUs; no file beside config.json is read."""

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
