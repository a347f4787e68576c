# SPDX-License-Identifier: Apache-2.0
"""Sensitivities of a model's MoE layers, measured in one layer-by-layer forward pass.

There are two methods (docs/notes/allocation.md). "kl" perturbs one copy of the hidden states for
every part and format and compares the answers at the end. "quadratic" perturbs one copy for every
layer and format, which gives the divergence that one unit of squared error costs there; the squared
errors of the layer's parts are measured at the layer itself, on a few of its experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import paddle

from ..calibration.sequential_forward import SequentialForward
from ..calibration.settings import CalibrationSettings
from ..calibration.statistics import Statistics
from ..calibration.text import CalibrationText
from ..checkpoint.reader import Checkpoint
from ..families.tensor import PROJECTIONS, Role
from ..models.ernie import MLP, MoE
from .costs import Sensitivities, model_shape, weights_sha256
from .decoded import ATTRIBUTES, Decoded
from .perturbed_states import PerturbedStates
from .probing import Execution, Probing, Progress, held_out, perturbed_count, spread

# Relative to the outputs, mean squared errors below this are float32's rounding.
_NO_ERROR = 1e-12


def measure(
    checkpoint: Checkpoint,
    model_name: str,
    text: CalibrationText,
    settings: CalibrationSettings,
    probing: Probing,
    execution: Execution,
) -> Sensitivities:
    """Costs of every MoE layer, projection and format; the model is read once or twice.

    wint2 is encoded with the statistics of the text, as `quantize --calibration` would do it; the
    windows that are measured on are left out of these statistics.
    """
    probes, others = held_out(text.windows, probing.tokens)
    seen = replace(text, windows=tuple(others))
    threads, folder = execution.threads, execution.folder
    with (
        closing(Statistics(checkpoint, seen, settings, threads, folder)) as statistics,
        closing(SequentialForward(checkpoint, probes, threads, folder)) as forward,
    ):
        measurement = _Measurement(checkpoint, statistics, forward, probing, execution)
        costs = measurement.run(execution.progress)
    return Sensitivities(
        method=probing.method,
        settings=probing.as_dict(),
        calibration=text.as_dict(settings),
        model=model_name,
        shape=model_shape(checkpoint.config),
        weights_sha256=weights_sha256(checkpoint),
        costs=costs,
    )


class _Measurement:
    def __init__(
        self,
        checkpoint: Checkpoint,
        statistics: Statistics,
        forward: SequentialForward,
        probing: Probing,
        execution: Execution,
    ) -> None:
        self.config = checkpoint.config
        self.forward, self.probing = forward, probing
        self._statistics = statistics
        self.decoded = Decoded(checkpoint, probing, statistics.hessian, execution)
        count = perturbed_count(probing, len(self.config.moe_layers()))
        self.perturbed = PerturbedStates(forward, count, execution.folder)
        # For "quadratic": (layer, projection, format) -> squared error of the part, and
        # (layer, format) -> squared error of the perturbed copy.
        self.errors: dict[tuple[int, str, str], float] = {}
        self.perturbed_errors: dict[tuple[int, str], float] = {}

    def run(self, progress: Progress | None) -> dict[int, dict[str, dict[str, float]]]:
        forward = self.forward
        count = self.config.num_hidden_layers
        for layer in range(count):
            forward.enter()
            self.perturbed.carry()
            if isinstance(forward.block.mlp, MoE):
                (self._every_part if self.probing.method == "kl" else self._sample)(layer)
            forward.leave()
            if progress:
                progress(layer + 1, count)
        ended = self.perturbed.divergences()

        def cost(layer: int, projection: str, format: str) -> float:
            if self.probing.method == "kl":
                return float(ended[layer, projection, format].mean())
            if not self.perturbed_errors[layer, format]:
                return 0.0
            curvature = float(ended[layer, format].mean()) / self.perturbed_errors[layer, format]
            return curvature * self.errors[layer, projection, format]

        return {
            layer: {
                projection: {f: cost(layer, projection, f) for f in self.probing.formats}
                for projection in PROJECTIONS
            }
            for layer in self.config.moe_layers()
        }

    def _experts(self, layer: int, chosen: Sequence[int]) -> Iterable[dict[tuple[str, str], Any]]:
        """For each chosen expert: (projection, format) -> the decoded weight [in, out]."""
        for expert in chosen:
            names = {
                projection: self.config.tensors.find(Role.EXPERT, projection, layer, expert).name
                for projection in PROJECTIONS
            }
            yield {
                (projection, format): paddle.to_tensor(
                    np.ascontiguousarray(self.decoded(name, format))
                )
                for projection, name in names.items()
                for format in self.probing.formats
            }

    def _every_part(self, layer: int) -> None:
        own = self.forward.block.mlp
        found = list(self._experts(layer, range(len(own.experts))))
        for projection in PROJECTIONS:
            for format in self.probing.formats:
                experts = [
                    replaced(expert, {projection: weights[projection, format]})
                    for expert, weights in zip(own.experts, found, strict=True)
                ]
                self.perturbed.add((layer, projection, format), with_experts(own, experts))

    @paddle.no_grad()
    def _sample(self, layer: int) -> None:
        forward = self.forward
        own: MoE = forward.block.mlp
        chosen = spread(len(own.experts), self.probing.experts)
        experts = {format: list(own.experts) for format in self.probing.formats}
        sums = dict.fromkeys([(p, f) for p in PROJECTIONS for f in self.probing.formats], 0.0)
        pairs = 0
        for index, weights in zip(chosen, self._experts(layer, chosen), strict=True):
            expert = own.experts[index]
            rows, slots = np.nonzero(forward.chosen == index)
            pairs += rows.size
            for format, changed in experts.items():
                changed[index] = replaced(expert, {p: weights[p, format] for p in PROJECTIONS})
            if not rows.size:
                continue
            x = paddle.to_tensor(forward.inputs[rows])
            factor = paddle.to_tensor(forward.routing_weights[rows, slots]).unsqueeze(1)
            output = expert(x)
            for projection, format in sums:
                changed = replaced(expert, {projection: weights[projection, format]})
                sums[projection, format] += float(
                    paddle.square((changed(x) - output) * factor).sum(dtype="float64")
                )
        # The pairs (token, expert) that were measured are a sample of all pairs.
        share = pairs / forward.chosen.size
        tokens = len(forward.inputs)
        for (projection, format), total in sums.items():
            self.errors[layer, projection, format] = total / tokens / share if pairs else 0.0
        before = np.empty_like(forward.states)
        forward.outputs(own, before)
        size = float(np.square(before, dtype=np.float64).sum() / tokens)
        for format, changed in experts.items():
            after = self.perturbed.add((layer, format), with_experts(own, changed))
            error = float(np.square(after - before, dtype=np.float64).sum() / tokens)
            self.perturbed_errors[layer, format] = error if error > _NO_ERROR * size else 0.0


def replaced(expert: MLP, weights: dict[str, Any]) -> MLP:
    """A copy of an expert with some of its projections replaced."""
    changed = copy.copy(expert)
    for projection, weight in weights.items():
        setattr(changed, ATTRIBUTES[projection], weight)
    return changed


def with_experts(moe: MoE, experts: list[MLP]) -> MoE:
    """A copy of an MoE layer with other experts."""
    changed = copy.copy(moe)
    changed.experts = experts
    return changed
