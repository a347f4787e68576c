# SPDX-License-Identifier: Apache-2.0
"""Adam with a warm-up and a cosine decay, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .parameters import Parameter

# The usual values, but with a shorter average of squares: a run has only a few hundred steps.
MEAN_MEMORY, SQUARE_MEMORY = 0.9, 0.99
WARM_UP = 0.05


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at a step counted from 0."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


class Adam:
    """Moves parameters by their learning rates, which are relative (`Parameter.unit`)."""

    def __init__(self, parameters: Mapping[str, Parameter], rates: Mapping[str, float]) -> None:
        self.parameters = parameters
        self.rates = rates
        self.steps = 0
        self._mean = {n: np.zeros(p.value.shape, np.float32) for n, p in parameters.items()}
        self._square = {n: np.zeros(p.value.shape, np.float32) for n, p in parameters.items()}

    def step(self, gradients: Mapping[str, np.ndarray], factor: float) -> None:
        """One step; a parameter without a gradient (an expert that saw no token) has zero."""
        self.steps += 1
        unbias_mean = 1 - MEAN_MEMORY**self.steps
        unbias_square = 1 - SQUARE_MEMORY**self.steps
        for name, parameter in self.parameters.items():
            mean, square = self._mean[name], self._square[name]
            gradient = gradients.get(name, np.float32(0)) * np.float32(parameter.unit)
            mean += (1 - MEAN_MEMORY) * (gradient - mean)
            square += (1 - SQUARE_MEMORY) * (np.square(gradient) - square)
            root = np.sqrt(square / unbias_square)
            direction = np.divide(mean / unbias_mean, root, out=np.zeros_like(mean), where=root > 0)
            parameter.move(self.rates[name] * factor * direction.astype(np.float64))
