# SPDX-License-Identifier: Apache-2.0
"""The calibration of one quantization run: what was asked for, opened, and reported."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.plan import Plan
from ..checkpoint.reader import Checkpoint
from ..codec.formats import FORMATS
from ..errors import CcqError
from ..families.ernie45 import ErnieConfig
from ..families.tensor import UP_GATE
from ..host import default_threads, require_paddle
from ..texts.documents import Texts, read_texts
from ..texts.files import check_readable
from ..units import gigabytes
from .settings import GRADIENT, TOKEN_WEIGHTS, CalibrationSettings

if TYPE_CHECKING:
    from .statistics import Statistics

FLAG = "--calibration"


@dataclass(frozen=True)
class CalibrationRequest:
    """What --calibration and the flags that belong to it ask for."""

    path: Path
    settings: CalibrationSettings
    pending: bool = False  # a data set that a dry run does not fetch

    @cached_property
    def texts(self) -> Texts:
        """The text, read at the first use: a pipe cannot be read twice."""
        return read_texts(self.path, FLAG)

    def check(self, plan: Plan, encoder: str) -> None:
        """Refuse what calibration cannot do before any work starts."""
        if encoder != "search":
            raise CcqError(f"--calibration does not go with --encoder {encoder}; use search")
        calibrated = [name for name, format in FORMATS.items() if format.calibrated]
        if not any(planned.format in calibrated for planned in plan.tensors):
            raise CcqError(
                f"--calibration: only {' and '.join(calibrated)} experts are calibrated, and this"
                f" plan ({plan.format}) has none; leave the flag out"
            )
        if not self.pending:
            check_readable(self.path, FLAG)
        require_paddle("calibration, which runs the model,")

    def open(self, checkpoint: Checkpoint, threads: int | None, spill_folder: Path) -> Statistics:
        """The statistics of the text; each Hessian is computed when it is asked for."""
        from .statistics import Statistics
        from .text import read_calibration_text

        text = read_calibration_text(self.texts, checkpoint, self.settings)
        threads = threads or default_threads()
        return Statistics(checkpoint, text, self.settings, threads, spill_folder)


def memory_facts(config: ErnieConfig, settings: CalibrationSettings) -> list[tuple[str, str]]:
    """The lines of the plan that say what a calibration will need."""
    from .sequential_forward import MEMORY_FOR_STATES, state_bytes
    from .token_weights import layer_input_bytes

    states = state_bytes(settings.tokens, config.hidden_size)
    where = "in memory" if states <= MEMORY_FOR_STATES else "in a file of the partial folder"
    layers: dict[int, int] = {}
    for tensor in config.tensors.values():
        if tensor.layer is not None:
            size = 4 * math.prod(tensor.shape)
            layers[tensor.layer] = layers.get(tensor.layer, 0) + size
    inner, hidden = config.moe_intermediate_size or 0, config.hidden_size
    # Float64 statistics of every down projection of a layer; and of one up projection, with its
    # pool, its factors and their float32 copies.
    hessian_bytes = 8 * (config.moe_num_experts + 1) * inner**2 + 8 * 6 * hidden**2
    # The backward pass takes a third array of states.
    arrays = states * 3 // 2 if settings.token_weights == GRADIENT else states
    memory = max(layers.values()) + hessian_bytes + (arrays if states <= MEMORY_FOR_STATES else 0)
    facts = [
        (
            "calibration",
            f"at most {settings.tokens:,} tokens in windows of {settings.window}; hidden states"
            f" {gigabytes(states)} {where}; one layer's weights and statistics at a time,"
            f" {gigabytes(memory)} of memory in all (estimate)",
        )
    ]
    if settings.token_weights == GRADIENT:
        inputs = layer_input_bytes(config, settings.tokens)
        facts.append(
            (
                "token weights",
                "gradients: two more passes through the model, and the inputs of its layers take"
                f" {gigabytes(inputs)} of the disk meanwhile",
            )
        )
    return facts


def coverage(plan: Plan, records: Sequence[dict[str, Any]]) -> tuple[str, list[str]] | None:
    """From the journal: a line on the tokens per expert, and the experts that no token reached."""
    counts = {
        f"layers.{planned.layer}.mlp.experts.{planned.tensor.expert}": int(
            record["stats"]["calibration_tokens"]
        )
        for planned, record in zip(plan.tensors, records, strict=True)
        if planned.tensor.projection == UP_GATE and "calibration_tokens" in record["stats"]
    }
    if not counts:
        return None
    every = sorted(counts.values())
    line = (
        f"tokens per expert: min {every[0]:,}, median {int(np.median(every)):,}, max {every[-1]:,}"
    )
    return line, [name for name, count in counts.items() if not count]


def output_errors(plan: Plan, records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """From the journal: MoE layer -> projection -> squared error of its outputs per token.

    The sum over experts of tr(dW H dW^T), routing weights squared as in the statistics; it is
    known from encoding, so that it costs nothing. Ranks' parts were averaged and add up.
    """
    tokens: dict[int, dict[str, int]] = {}
    sums: dict[int, dict[str, float]] = {}
    for planned, record in zip(plan.tensors, records, strict=True):
        stats = record["stats"]
        if planned.layer is None or "output_error" not in stats:
            continue
        projection = planned.tensor.projection
        seen = int(stats["calibration_tokens"])
        counts = tokens.setdefault(planned.layer, {})
        counts[projection] = counts.get(projection, 0) + seen
        row = sums.setdefault(planned.layer, {})
        error = stats["output_error"] * plan.tensor_parallel_size
        row[projection] = row.get(projection, 0.0) + seen * error
    # Every token counts once for each of its experts.
    k = plan.config.moe_k
    return {
        str(layer): {
            projection: k * error / max(1, tokens[layer][projection])
            for projection, error in row.items()
        }
        for layer, row in sums.items()
    }


def make_request(
    path: str | os.PathLike[str] | None,
    tokens: str | int | None,
    weights: str | None = None,
    fetch: bool = True,
) -> CalibrationRequest | None:
    """The request of a command line, or None without --calibration.

    `fetch`: a data set is fetched from its hub (dataset.py); a dry run reads nothing.

    Raises:
        CcqError: for a flag of calibration without --calibration, or a value that is not
            known.
    """
    from .dataset import local_text, names_data_set
    from .settings import parse_tokens

    if path is None:
        if tokens is not None:
            raise CcqError("--calibration-tokens needs --calibration FILE")
        if weights is not None:
            raise CcqError("--calibration-weights needs --calibration FILE")
        return None
    if weights is not None and weights not in TOKEN_WEIGHTS:
        raise CcqError(f"--calibration-weights {weights}: not one of {', '.join(TOKEN_WEIGHTS)}")
    settings = CalibrationSettings(
        tokens=CalibrationSettings.tokens if tokens is None else parse_tokens(tokens),
        token_weights=weights or CalibrationSettings.token_weights,
    )
    if not fetch:
        return CalibrationRequest(Path(path), settings, pending=names_data_set(path))
    return CalibrationRequest(local_text(path), settings)
