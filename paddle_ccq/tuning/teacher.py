# SPDX-License-Identifier: Apache-2.0
"""The float model's final hidden states on a text, from which its logits follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle

from ..calibration.sequential_forward import SequentialForward
from ..families.ernie45 import FINAL_NORM
from ..models.ernie import rms_norm
from ..models.weights import WeightSource


@paddle.no_grad()
def final_states(
    source: WeightSource, windows: Sequence[np.ndarray], threads: int, spill_folder: Path
) -> list[np.ndarray]:
    """Normalised final hidden states [length, hidden] of each window, float32.

    The forward pass goes layer by layer, so that the model is never in memory whole. States are
    kept and not logits: they are smaller by the ratio of vocabulary to hidden size, and exact.
    """
    forward = SequentialForward(source, windows, threads, spill_folder)
    try:
        for _ in range(source.config.num_hidden_layers):
            forward.enter()
            forward.leave()
        states, spans = forward.states, forward.spans
        norm = paddle.to_tensor(source.read(FINAL_NORM))

        def finish(index: int) -> None:
            first, last = spans[index]
            x = rms_norm(paddle.to_tensor(states[first:last]), norm, source.config.rms_norm_eps)
            states[first:last] = x.numpy()

        forward.map(finish, len(spans))
    finally:
        forward.close()
    return [states[first:last] for first, last in spans]
