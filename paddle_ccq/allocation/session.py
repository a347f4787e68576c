# SPDX-License-Identifier: Apache-2.0
"""The allocation of one quantization run: what was asked for, measured once, and resolved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from .. import reporting
from ..calibration.session import CalibrationRequest
from ..calibration.settings import ROUTER
from ..checkpoint.plan import Plan, rule_forced_layers
from ..checkpoint.reader import JOURNAL_FILE, Checkpoint
from ..checkpoint.rules import Rule
from ..checkpoint.writer import SENSITIVITY_FILE, json_bytes, write_file
from ..codec.formats import FORMATS
from ..errors import CcqError
from ..families.ernie45 import ERNIE45, ErnieConfig
from ..families.tensor import Role
from ..units import gigabytes
from .costs import (
    PROJECTIONS,
    Sensitivities,
    load_sensitivities,
    model_shape,
    weights_sha256,
)
from .probing import Execution, Probing, perturbed_bytes, perturbed_count
from .resolve import HIGH, Allocation, allocate_layers
from .target import Target, parse_target


@dataclass(frozen=True)
class AllocationRequest:
    """What --allocate asks for; layers that do not become wint4 become `format`."""

    target: Target
    format: str
    rules: Sequence[Rule]
    path: Path | None  # --sensitivity
    plugin_layout: bool
    calibrated: bool

    @property
    def notes(self) -> list[str]:
        """Notes on what the predicted losses do not include."""
        if self.calibrated or not FORMATS[self.format].calibrated:
            return []
        return [
            f"costs were measured on calibrated {self.format}; without --calibration it loses more"
        ]

    @property
    def probing(self) -> Probing:
        """How costs are measured if no file holds them."""
        return Probing("quadratic", (self.format, HIGH))

    def check(self, plan: Plan) -> Sensitivities | None:
        """Refuse impossible requests before any work; return the costs if a file holds them."""
        config = plan.config
        found = None
        if self.path is not None:
            found = load_sensitivities(self.path)
            found.check(config, (self.format, HIGH), f"--sensitivity {self.path}")
        # What fits depends on sizes and rules alone, so this can be checked without costs.
        self.resolve(plan, found or _zero_costs(config, (self.format, HIGH)))
        return found

    def resolve(self, plan: Plan, found: Sensitivities) -> Allocation:
        """The best formats by these costs; `plan` is any plan of the model."""
        config = plan.config
        forced = rule_forced_layers(config, self.format, self.rules)
        layers = config.moe_layers()
        return allocate_layers(
            self.target, self.format, layers, forced, found, plan, self.plugin_layout
        )

    def measure(
        self,
        checkpoint: Checkpoint,
        model_name: str,
        calibration: CalibrationRequest,
        execution: Execution,
        *,
        restart: bool,
    ) -> Sensitivities:
        """The costs, measured now or by the interrupted run that is going on in the folder.

        Raises:
            CcqError: if the folder belongs to an interrupted run with other weights or
                another calibration.
        """
        from ..calibration.text import read_calibration_text
        from .measure import measure

        fewer = min(calibration.settings.tokens, self.probing.statistics)
        # Costs are always measured with routing weights, which need no further pass.
        settings = replace(calibration.settings, tokens=fewer, token_weights=ROUTER)
        text = read_calibration_text(calibration.texts, checkpoint, settings)
        folder = execution.folder
        assert folder is not None
        path = folder / SENSITIVITY_FILE
        if path.exists():
            found = load_sensitivities(path, "its")
            same = (
                found.settings == self.probing.as_dict()
                and found.calibration == text.as_dict(settings)
                and found.weights_sha256 == weights_sha256(checkpoint)
            )
            if same:
                return found
        if (folder / JOURNAL_FILE).exists() and not restart:
            raise CcqError(
                f"{folder}: belongs to an interrupted run that was not the same: it was not"
                " allocated from these weights and this calibration. Repeat that command to finish"
                " it, or add --restart to start over"
            )
        found = measure(checkpoint, model_name, text, settings, self.probing, execution)
        write_file(path, json_bytes(found.as_dict()))
        return found


def make_request(
    target: str | int | None,
    format: str,
    rules: Sequence[Rule],
    path: str | os.PathLike[str] | None,
    plugin_layout: bool,
    wint4_end_layer: int | None,
    calibrated: bool,
) -> AllocationRequest | None:
    """The request of a command line, or None without --allocate.

    Raises:
        CcqError: for flags that do not go together, naming them.
    """
    if target is None:
        if path is not None:
            raise CcqError("--sensitivity needs --allocate TARGET")
        return None
    wanted = parse_target(target)
    if wint4_end_layer is not None:
        raise CcqError(
            "--wint4-end-layer does not go with --allocate, which chooses the wint4 layers; force"
            " some with --rules"
        )
    if path is None and not calibrated:
        raise CcqError(
            f"--allocate needs costs, which are measured of {ERNIE45.name} alone: give"
            " --calibration FILE to measure them in this run, or --sensitivity FILE.json of"
            " `python -m paddle_ccq.sensitivity`"
        )
    return AllocationRequest(
        wanted, format, rules, None if path is None else Path(path), plugin_layout, calibrated
    )


def measuring_facts(config: ErnieConfig, probing: Probing) -> list[tuple[str, str]]:
    """The line of the plan that tells what a measurement will need."""
    layers = len(config.moe_layers())
    copies = perturbed_count(probing, layers)
    size = perturbed_bytes(copies, probing.tokens, config.hidden_size)
    experts = min(probing.experts, config.moe_num_experts)
    return [
        (
            "allocation",
            f"chosen when the run starts, from costs measured on {probing.tokens:,} tokens of the"
            f" calibration; for it {experts} of {config.moe_num_experts} experts a layer are"
            f" encoded, and {copies} copies of hidden states take {gigabytes(size)} (in a file of"
            " the partial folder beyond 4 GB). Until then the plan holds what rules force and no"
            " other wint4 layer",
        )
    ]


def comparison_table(allocation: Allocation) -> Table:
    """Table of the predicted loss of the choice and of the other choices."""
    rows = []
    for row in allocation.rows:
        plan: Plan = row.plan
        four = plan.wint4_layers
        weights = sum(planned.weights for planned in plan.tensors if planned.tensor.is_expert)
        nominal = sum(
            FORMATS[planned.format].bits_per_weight * planned.weights
            for planned in plan.tensors
            if planned.tensor.is_expert
        )
        rows.append(
            [
                row.name,
                ", ".join(map(str, four)) or "none",
                f"{nominal / weights:.4f}",
                f"{plan.bits_per_weight(Role.EXPERT):.4f}",
                gigabytes(plan.output_bytes),
                f"{row.loss:.4f}",
            ]
        )
    return reporting.table(
        ["layout", "wint4 layers", "bpw", "bpw as stored", "size", "predicted KL"], rows
    )


def _zero_costs(config: ErnieConfig, formats: Sequence[str]) -> Sensitivities:
    """Costs that are all zero, for a check of sizes alone."""
    nothing = {p: dict.fromkeys(formats, 0.0) for p in PROJECTIONS}
    costs = dict.fromkeys(config.moe_layers(), nothing)
    return Sensitivities("quadratic", {}, {}, "", model_shape(config), "", costs)
