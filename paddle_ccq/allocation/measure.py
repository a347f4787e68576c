# SPDX-License-Identifier: Apache-2.0
"""Sensitivities of a model's MoE layers, measured in one layer-by-layer forward pass.

Two methods, docs/notes/allocation.md. "kl" lets one copy of the hidden states go on for every part
and format. "quadratic" lets one go on for every layer and format, which says how much a squared
error there costs at the end, and takes the squared errors of the parts on the spot; a few experts
of a layer do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ..calibration.sequential_forward import SequentialForward
from ..calibration.settings import CalibrationSettings
from ..calibration.statistics import Statistics
from ..calibration.text import CalibrationText
from ..checkpoint.reader import Checkpoint
from ..encoder.ldlq_metric import InputHessian
from ..families.tensor import PROJECTIONS, Role
from ..models.ernie import MLP, MoE
from .copies import Copies
from .costs import Sensitivities, model_shape, weights_sha256
from .decoded import ATTRIBUTES, Decoded
from .probing import Probing, copies_of, held_out, spread

Progress = Callable[[int, int], None]  # layers done, of how many
# Mean squared errors this much smaller than the outputs say nothing but float32's rounding.
_NO_ERROR = 1e-12


def measure(
    checkpoint: Checkpoint,
    model_name: str,
    text: CalibrationText,
    settings: CalibrationSettings,
    probing: Probing,
    threads: int,
    folder: Path | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Sensitivities:
    """Costs of every MoE layer, projection and format; the model is read once or twice.

    wint2 is encoded with the statistics of the text, as `quantize --calibration` would do it; the
    windows that are measured on are left out of these statistics. States go to a file in `folder`
    where they don't fit in memory. `device` is where codes are searched; the model runs on the CPU.
    """
    probes, others = held_out(text.windows, probing.tokens)
    seen = replace(text, windows=tuple(others))
    with (
        closing(Statistics(checkpoint, seen, settings, threads, folder)) as statistics,
        closing(SequentialForward(checkpoint, probes, threads, folder)) as forward,
    ):
        measurement = _Measurement(
            checkpoint, statistics, forward, probing, threads, folder, device
        )
        costs = measurement.run(progress)
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
        threads: int,
        folder: Path | None,
        device: str,
    ) -> None:
        self.config = checkpoint.config
        self.forward, self.probing = forward, probing
        self._statistics = statistics
        self._known: dict[str, InputHessian | None] = {}
        self.decoded = Decoded(
            checkpoint, probing.formats, probing.preset, threads, statistics.hessian, device
        )
        layers = len(self.config.moe_layers())
        self.copies = Copies(forward, copies_of(probing, layers), folder)
        # Quadratic: (layer, projection, format) -> squared error; (layer, format) -> its copy's.
        self.errors: dict[tuple[int, str, str], float] = {}
        self.copied: dict[tuple[int, str], float] = {}

    def run(self, progress: Progress | None) -> dict[int, dict[str, dict[str, float]]]:
        forward = self.forward
        count = self.config.num_hidden_layers
        for layer in range(count):
            forward.enter()
            self.copies.carry()
            if isinstance(forward.block.mlp, MoE):
                (self._every_part if self.probing.method == "kl" else self._sample)(layer)
            forward.leave()
            if progress:
                progress(layer + 1, count)
        ended = self.copies.divergences()

        def cost(layer: int, projection: str, format: str) -> float:
            if self.probing.method == "kl":
                return float(ended[layer, projection, format].mean())
            if not self.copied[layer, format]:
                return 0.0
            curvature = float(ended[layer, format].mean()) / self.copied[layer, format]
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
                self.copies.add((layer, projection, format), with_experts(own, experts))

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
        # Of all (token, expert) pairs, these stand for the others.
        share = pairs / forward.chosen.size
        tokens = len(forward.inputs)
        for (projection, format), total in sums.items():
            self.errors[layer, projection, format] = total / tokens / share if pairs else 0.0
        before = np.empty_like(forward.states)
        forward.outputs(own, before)
        size = float(np.square(before, dtype=np.float64).sum() / tokens)
        for format, changed in experts.items():
            after = self.copies.add((layer, format), with_experts(own, changed))
            error = float(np.square(after - before, dtype=np.float64).sum() / tokens)
            self.copied[layer, format] = error if error > _NO_ERROR * size else 0.0


def replaced(expert: MLP, weights: dict[str, Any]) -> MLP:
    """An expert with some of its projections replaced."""
    changed = copy.copy(expert)
    for projection, weight in weights.items():
        setattr(changed, ATTRIBUTES[projection], weight)
    return changed


def with_experts(moe: MoE, experts: list[MLP]) -> MoE:
    """A MoE layer with other experts."""
    changed = copy.copy(moe)
    changed.experts = experts
    return changed
