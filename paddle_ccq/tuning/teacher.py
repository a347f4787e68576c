# SPDX-License-Identifier: Apache-2.0
"""What the float model makes of the text: its final hidden states, from which logits follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle

from ..calibration.walk import LayerWalk
from ..families.ernie45 import FINAL_NORM
from ..models.ernie import rms_norm
from ..models.weights import WeightSource


@paddle.no_grad()
def final_states(
    source: WeightSource, windows: Sequence[np.ndarray], threads: int, spill_folder: Path
) -> list[np.ndarray]:
    """Normalised final hidden states [length, hidden] of each window, float32.

    The model is walked one layer at a time, so it is never in memory whole. States are kept and
    not logits: they are smaller by the ratio of vocabulary to hidden size, and exact.
    """
    walk = LayerWalk(source, windows, threads, spill_folder)
    try:
        for _ in range(source.config.num_hidden_layers):
            walk.enter()
            walk.leave()
        states, spans = walk.states, walk.spans
        norm = paddle.to_tensor(source.read(FINAL_NORM))

        def finish(index: int) -> None:
            first, last = spans[index]
            x = rms_norm(paddle.to_tensor(states[first:last]), norm, source.config.rms_norm_eps)
            states[first:last] = x.numpy()

        walk.map(finish, len(spans))
    finally:
        walk.close()
    return [states[first:last] for first, last in spans]
