# SPDX-License-Identifier: Apache-2.0
"""The targets that there are: which one a model gets, and what each writes beside the tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.plan import Plan, Target
from ..errors import CcqError
from ..families.config import ModelConfig
from ..families.ernie45 import ERNIE45
from ..families.generic import GENERIC
from .fastdeploy.card import model_card as fastdeploy_card
from .fastdeploy.config import output_config as fastdeploy_config
from .fastdeploy.layout import DEFAULT_LAYOUT, FastDeploy, wint4_end_layer
from .fastdeploy.layout import NAME as FASTDEPLOY
from .huggingface.card import model_card as huggingface_card
from .huggingface.config import is_served
from .huggingface.config import output_config as huggingface_config
from .huggingface.layout import NAME as HUGGINGFACE
from .huggingface.layout import HuggingFace
from .recipe import Recipe

TARGETS = (FASTDEPLOY, HUGGINGFACE)


@dataclass(frozen=True)
class Outputs:
    """What a target's folder holds beside tensors and companions.

    Attributes:
        config: (plan, provenance) -> config.json.
        card: (plan, recipe, records) -> README.md.
        recorded: plan -> what the provenance holds of the target.
    """

    config: Callable[[Plan, dict[str, Any]], dict[str, Any]]
    card: Callable[[Plan, Recipe, Sequence[dict[str, Any]]], str]
    recorded: Callable[[Plan], dict[str, Any]]


OUTPUTS = {
    FASTDEPLOY: Outputs(
        fastdeploy_config,
        fastdeploy_card,
        lambda plan: {
            "wint4_end_layer": wint4_end_layer(plan),
            "tensor_parallel_size": plan.tensor_parallel_size,
        },
    ),
    HUGGINGFACE: Outputs(huggingface_config, huggingface_card, lambda _: {"target": HUGGINGFACE}),
}


@dataclass(frozen=True)
class TargetChoice:
    """What the user asks of a target.

    Attributes:
        name: one of TARGETS; None: FastDeploy for what it can serve, else Hugging Face's naming.
        fastdeploy_layout, plugin_layout: see FastDeploy.
        tensor_parallel_size: number of rank folders.
    """

    name: str | None = None
    fastdeploy_layout: str = DEFAULT_LAYOUT
    plugin_layout: bool = False
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.name not in (None, *TARGETS):
            raise CcqError(f"--target {self.name}: not one of {', '.join(TARGETS)}")

    def of(self, config: ModelConfig) -> Target:
        """The target for a model.

        Raises:
            CcqError: for a model that the target can't serve, or another target's flag.
        """
        served = config.family is ERNIE45
        name = self.name or (FASTDEPLOY if served else HUGGINGFACE)
        engine = FastDeploy(self.fastdeploy_layout, self.plugin_layout)
        if name == FASTDEPLOY:
            if config.family is GENERIC:
                raise CcqError(
                    f"--target {FASTDEPLOY}: --family generic is written in Hugging Face's naming"
                    " alone; leave one of the two out"
                )
            if not served:
                other = next(iter(config.architectures), "other models")
                reads = ", which vLLM reads" if is_served(config) else ""
                raise CcqError(
                    f"--target {FASTDEPLOY}: FastDeploy serves {ERNIE45.name} text models in this"
                    f" format and no {other}; leave --target out for Hugging Face's naming{reads}"
                )
            return engine
        for flag, differs in (
            ("--fastdeploy-layout", self.fastdeploy_layout != DEFAULT_LAYOUT),
            ("--tensor-parallel-size", self.tensor_parallel_size != 1),
        ):
            if differs:
                raise CcqError(
                    f"{flag}: is for --target {FASTDEPLOY}; with {HUGGINGFACE} one folder is"
                    " written, which vLLM cuts at load"
                )
        return HuggingFace()
