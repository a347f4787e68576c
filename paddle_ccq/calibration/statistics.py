# SPDX-License-Identifier: Apache-2.0
"""The Hessian of every expert's matrices, computed when the encoder asks for it.

The encoder goes through the model in order, and a forward pass of the float model goes along with
it: the layer that is being encoded is in memory with the inputs of its experts, and nothing is kept
of an expert once it is done. A run that was interrupted starts this forward pass again at the first
layer, which gives the same numbers and costs little beside the encoding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle

from ..encoder.ldlq_metric import InputHessian
from ..errors import CcqError
from ..families.tensor import DOWN, PROJECTIONS, UP_GATE
from ..models.weights import WeightSource
from .hessian import hessian_sum, shrink
from .sequential_forward import SequentialForward
from .settings import EQUAL, GRADIENT, CalibrationSettings
from .text import CalibrationText
from .token_weights import LayerWeights, kept_token_weights


class Statistics:
    """`hessian(name)` for the expert matrices of a model, to be asked in model order."""

    def __init__(
        self,
        weights: WeightSource,
        text: CalibrationText,
        settings: CalibrationSettings,
        threads: int,
        spill_folder: Path | None = None,
    ) -> None:
        self.text = text
        self.settings = settings
        # Tokens per expert, by layer, of the layers seen so far.
        self.counts: dict[int, np.ndarray] = {}
        self._weights = weights
        self._threads = threads
        self._spill_folder = spill_folder
        self._forward: SequentialForward | None = None
        self._last: tuple[str, InputHessian] | None = None
        # Gradients by layer, if tokens are weighed by them.
        self._gradients: dict[int, LayerWeights] | None = None
        # Projection -> the factors that the present layer's tokens are multiplied by [tokens, k].
        self._factors: dict[str, np.ndarray] = {}
        self._pooled_up: np.ndarray | None = None
        self._down: tuple[list[np.ndarray], np.ndarray] | None = None

    def hessian(self, name: str) -> InputHessian | None:
        """The Hessian of an expert's matrix, or None for a matrix of no routed expert.

        Raises:
            CcqError: if the activations are not finite.
            ValueError: if the matrix is of an earlier layer than the one asked for before.
        """
        tensor = self._weights.config.tensors.get(name)
        if tensor is None or not tensor.is_expert:
            return None
        if self._last is None or self._last[0] != name:
            layer, expert = tensor.layer, tensor.expert
            self._go_to(layer)
            tokens = int(self.counts[layer][expert])
            if not tokens:
                return InputHessian(None, 0)
            take = self._up if tensor.projection == UP_GATE else self._down_of
            own, pooled = take(expert)
            if not np.isfinite(own).all():
                raise CcqError(
                    f"--calibration: the activations of layer {layer} are not finite; the model's"
                    " weights are damaged"
                )
            all_tokens = int(self.counts[layer].sum())
            weight = self.settings.shrinkage_tokens
            mean = shrink(own, tokens, pooled, all_tokens, weight)
            self._last = (name, InputHessian(mean, tokens))
        return self._last[1]

    def close(self) -> None:
        """Free memory and threads."""
        if self._forward is not None:
            self._forward.close()
            self._forward = None

    def _go_to(self, layer: int) -> None:
        if self._forward is None:
            windows = self.text.windows
            if self.settings.token_weights == GRADIENT:
                self._gradients = kept_token_weights(
                    self._weights, self.text, self.settings, self._threads, self._spill_folder
                )
            self._forward = SequentialForward(
                self._weights, windows, self._threads, self._spill_folder
            )
        forward = self._forward
        if layer < forward.layer:
            raise ValueError(f"layer {layer} is asked for after layer {forward.layer}")
        while forward.layer < layer:
            if forward.layer >= 0:
                forward.leave()
            self._pooled_up = self._down = None
            forward.enter()
            if forward.chosen is not None:
                experts = forward.config.moe_num_experts
                self.counts[forward.layer] = np.bincount(
                    forward.chosen.reshape(-1), minlength=experts
                )
                self._factors = self._factors_of(forward)

    def _factors_of(self, forward: SequentialForward) -> dict[str, np.ndarray]:
        if self._gradients is not None:
            return self._gradients[forward.layer].factors(forward.chosen)
        weights = forward.routing_weights
        if self.settings.token_weights == EQUAL:
            weights = np.ones_like(weights)
        return dict.fromkeys(PROJECTIONS, weights)

    def _routed(self, expert: int, projection: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the inputs that go to an expert, and the factor that each row gets."""
        rows, slots = np.nonzero(self._forward.chosen == expert)
        return rows, self._factors[projection][rows, slots]

    def _up(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        forward = self._forward
        if self._pooled_up is None:
            # Every token counts once for each of its experts.
            weights = self._factors[UP_GATE]
            scale = np.sqrt(np.square(weights).sum(axis=1, keepdims=True))
            self._pooled_up = hessian_sum(forward.inputs * scale, forward.pool)
        rows, weights = self._routed(expert, UP_GATE)
        own = hessian_sum(forward.inputs[rows] * weights[:, None], forward.pool)
        return own, self._pooled_up

    def _down_of(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        if self._down is None:
            forward = self._forward

            @paddle.no_grad()
            def one(expert: int) -> np.ndarray:
                rows, weights = self._routed(expert, DOWN)
                if not rows.size:
                    inner = forward.config.moe_intermediate_size
                    return np.zeros((inner, inner))
                inputs = paddle.to_tensor(forward.inputs[rows])
                x = forward.block.mlp.experts[expert].inner(inputs).numpy()
                return hessian_sum(x * weights[:, None])

            all_of_them = forward.map(one, forward.config.moe_num_experts)
            self._down = all_of_them, np.sum(all_of_them, axis=0)
        return self._down[0][expert], self._down[1]
