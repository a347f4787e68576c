# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in each of its processes, possibly more than once.

It registers one quantization method and the ERNIE classes that load packed checkpoints; classes of
other families once a checkpoint of theirs is claimed. A model of another kind is served as without
it. Nothing that vLLM has is changed.
"""

from __future__ import annotations

import logging

from . import releases
from .claims import METHOD

logger = logging.getLogger("paddle_ccq")

MODELS = {
    "Ernie4_5_MoeForCausalLM": "CcqErnieMoeForCausalLM",
    "Ernie4_5ForCausalLM": "CcqErnieForCausalLM",
    # FastDeploy's name of the dense model, which vLLM has not.
    "Ernie4_5_ForCausalLM": "CcqErnieForCausalLM",
}
_MODULE = "paddle_ccq.vllm.model"


def register() -> None:
    """Register everything; says in one line why, where it can't, and never raises."""
    version = releases.installed()
    if version is not None:
        good, said = releases.judge(version)
        if said:
            logger.warning("paddle_ccq: %s", said)
        if not good:
            return
    try:
        from vllm.model_executor.layers import quantization
        from vllm.model_executor.models import ModelRegistry

        from . import packed_models
        from .config import CcqConfig
    except ImportError as error:
        if version is not None:
            logger.warning("paddle_ccq: vLLM %s has not what is needed: %s", version, error)
        return
    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    quantization.register_quantization_config(METHOD)(CcqConfig)
    for architecture, name in MODELS.items():
        ModelRegistry.register_model(architecture, f"{_MODULE}:{name}")
    packed_models.register_unknown()
