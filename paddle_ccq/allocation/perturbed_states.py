# SPDX-License-Identifier: Apache-2.0
"""Hidden states that are perturbed at one place of the model, and how far they move the answer."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ..calibration.sequential_forward import MEMORY_FOR_STATES, SequentialForward, state_array
from ..evaluation.metrics import score_window
from ..families.ernie45 import FINAL_NORM, head_name
from ..models.ernie import MLP, MoE, rms_norm
from .probing import perturbed_bytes

_REFERENCE = "reference"


class PerturbedStates:
    """Copies of the hidden states, each perturbed at one layer and moved through all later layers.

    The layer in memory is applied to every copy, so that a model is read only once, however many
    parts of it are tried.
    """

    def __init__(
        self, forward: SequentialForward, expected: int, folder: Path | None = None
    ) -> None:
        self.forward = forward
        self.states: dict[Hashable, np.ndarray] = {}
        spilled = perturbed_bytes(expected, *forward.states.shape) > MEMORY_FOR_STATES
        self._folder = folder if spilled else None

    def carry(self) -> None:
        """Move every copy through the layer that the forward pass has entered."""
        for states in self.states.values():
            self.forward.carry(states)

    def add(self, key: Hashable, mlp: MLP | MoE) -> np.ndarray:
        """Add a copy: the model's states after its present layer, with `mlp` in the layer's place.

        Returns the copy [tokens, hidden]; `key` is its key in `divergences`.
        """
        into = self.states[key] = state_array(self.forward.states.shape, self._folder)
        self.forward.outputs(mlp, into)
        return into

    def divergences(self) -> dict[Hashable, np.ndarray]:
        """After the last layer: KL(the model || each copy) of the next token, by window."""
        weights, config = self.forward.weights, self.forward.config
        norm = paddle.to_tensor(weights.read(FINAL_NORM))
        head = paddle.to_tensor(weights.read(head_name(config)))

        def window(index: int) -> dict[Hashable, float]:
            first, last = self.forward.spans[index]
            models = {
                key: _Ended(config, norm, head, states[first:last])
                for key, states in {_REFERENCE: self.forward.states, **self.states}.items()
            }
            # The divergence does not depend on the tokens themselves.
            scores = score_window(np.zeros(last - first, np.int64), models, _REFERENCE)
            return {key: float(scores[key].kl.mean()) for key in self.states}

        found = self.forward.map(window, len(self.forward.spans))
        return {key: np.array([one[key] for one in found]) for key in self.states}


class _Ended:
    """States of one window after the last layer, with the methods of a model for score_window."""

    def __init__(self, config: Any, norm: Any, head: Any, states: np.ndarray) -> None:
        self.config, self._head = config, head
        x = paddle.to_tensor(np.ascontiguousarray(states)).unsqueeze(0)
        self._hidden = rms_norm(x, norm, config.rms_norm_eps)

    def hidden_states(self, tokens: Any) -> Any:
        return self._hidden

    def logits(self, hidden: Any) -> Any:
        return paddle.matmul(hidden, self._head, transpose_y=self.config.tie_word_embeddings)
