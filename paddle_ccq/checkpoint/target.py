# SPDX-License-Identifier: Apache-2.0
"""The interface through which a plan knows the engine that it is made for (targets/)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..families.config import ModelConfig
from ..families.tensor import TensorSpec
from .safetensors_format import StoredSpec

if TYPE_CHECKING:
    from .plan import Plan


class Target(Protocol):
    """What an engine asks of a checkpoint, and allows in it."""

    @property
    def name(self) -> str:
        """What `--target` calls it."""
        ...

    @property
    def shard_metadata(self) -> Mapping[str, str]:
        """The metadata of every weight file."""
        ...

    @property
    def dense_formats(self) -> tuple[str, ...]:
        """What dense linear layers may become, the default first; nothing: they are kept."""
        ...

    def with_any_layers(self) -> Target:
        """The same target, but with any format of experts allowed in any layer."""
        ...

    def row_order(self, format: str) -> str:
        """The order in which rows of a format are stored (codec/row_order.py)."""
        ...

    def unquantized_format(self, tensor: TensorSpec) -> str:
        """How a tensor is stored that is never quantized: "f32", "bf16" or plan.KEPT."""
        ...

    def stored(
        self, tensor: TensorSpec, format: str, shape: tuple[int, ...]
    ) -> tuple[StoredSpec, ...]:
        """The stored tensors of a tensor in a format; `shape` is a rank's."""
        ...

    def shape_problem(self, format: str, shape: tuple[int, ...]) -> str | None:
        """Why a tensor cannot take a format, in plain words; None if it can."""
        ...

    def check_layers(self, formats: Mapping[int, str]) -> None:
        """Refuse formats of MoE layers that the engine cannot load; there may be no such layer."""
        ...

    def model_notes(self, config: ModelConfig) -> list[str]:
        """Notes on what the engine cannot do with a model whose checkpoint can be written."""
        ...

    def plan_notes(self, plan: Plan) -> list[str]:
        """Notes about the engine for the user of a plan."""
        ...

    def facts(self, plan: Plan) -> list[tuple[str, str]]:
        """The engine's own lines in the table of a dry run."""
        ...

    def choices(self, plan: Plan) -> dict[str, Any]:
        """The target's choices that decide the bytes of the output, for the journal."""
        ...
