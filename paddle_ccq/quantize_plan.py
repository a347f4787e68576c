# SPDX-License-Identifier: Apache-2.0
"""What a quantization will do, before anything is read: the plan, and `quantize --dry-run`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from . import reporting
from .allocation.costs import Sensitivities
from .allocation.session import Request as Wanted
from .allocation.session import comparison_table, measuring_facts
from .calibration.session import Request as Calibration
from .calibration.session import memory_facts
from .checkpoint.companions import check_regular
from .checkpoint.config import CONFIG_FILE, ErnieConfig
from .checkpoint.plan import Layout, Plan, gigabytes
from .checkpoint.source import snapshot_folder
from .checkpoint.unexpected import config_of_folder
from .encoder.base import MatrixEncoder
from .encoder.ldlq_metric import InputMoments
from .errors import CcqError, CoreMissingError
from .quantize_run import Options, QuantizeResult, check_core, make_encoders

# A plan for a config, a layout and whether any layers may be wint4; the rest is the command's.
PlanMaker = Callable[..., Plan]

# Weights of the random matrix whose encoding is timed for a dry run: [out, in].
MEASURED_SHAPE = (512, 1024)


def first_plan(
    config: ErnieConfig, plan_for: PlanMaker, wanted: Wanted | None
) -> tuple[Plan, Sensitivities | None]:
    """The plan as far as it is known before costs are measured; all that can be refused is."""
    if wanted is None:
        return plan_for(config), None
    costs = wanted.check(config, lambda layout: plan_for(config, layout, True))
    uniform = Layout(dict.fromkeys(config.moe_layers(), wanted.format), "uniform")
    return plan_for(config, uniform, True), costs


def dry_run(
    model: str | os.PathLike[str],
    plan_for: PlanMaker,
    options: Options,
    request: Calibration | None,
    wanted: Wanted | None,
) -> QuantizeResult:
    folder = Path(model).expanduser()
    if not folder.exists():
        raise CcqError(
            f"{model}: a dry run downloads nothing; put the model's {CONFIG_FILE} into a folder and"
            " pass that"
        )
    if folder.is_dir():
        folder = snapshot_folder(folder)
        check_regular(folder)
    config, assumed = config_of_folder(folder)
    quantization = config.raw.get("quantization_config")
    # FastDeploy's is_quantized false asks for a quantization of float weights at loading.
    if isinstance(quantization, dict) and quantization.get("is_quantized", True):
        raise CcqError(
            f"{folder / CONFIG_FILE if folder.is_dir() else folder}: has a quantization_config, so"
            " the model is quantized already; quantize the original float checkpoint instead"
        )
    plan, costs = first_plan(config, plan_for, wanted)
    out = reporting.console()
    allocation = None
    if wanted is not None and costs is not None:
        allocation = wanted.resolve(config, lambda layout: plan_for(config, layout, True), costs)
        plan = plan_for(config, allocation.layout)
    out.print(reporting.plan_table(plan))
    out.print()
    if plan.layer_formats:
        out.print(reporting.layers_table(plan))
        out.print()
    if allocation is not None:
        out.print(comparison_table(allocation))
        out.print()
    if request is not None:
        request.check(plan, options.encoder)
    seconds, time_said = _estimated_time(plan, options, request is not None)
    facts = [
        *reporting.plan_facts(plan),
        ("peak memory (estimate)", gigabytes(plan.peak_memory())),
        ("disk needed", gigabytes(plan.output_bytes * 1.001)),
        ("time (estimate)", time_said),
    ]
    if request is not None:
        facts += memory_facts(plan.config, request.settings)
    if wanted is not None and costs is None:
        facts += measuring_facts(plan.config, wanted.probing)
    for name, value in facts:
        out.print(f"{name}: {value}", soft_wrap=True, markup=False)
    notes = (*config.notes, *assumed)
    for message in (*notes, *plan.messages, *(wanted.notes if wanted else ())):
        out.print(f"note: {message}", soft_wrap=True, markup=False)
    estimate = {} if seconds is None else {"estimate": seconds}
    return QuantizeResult(None, plan, [], estimate, reporting.peak_rss())


def _estimated_time(plan: Plan, options: Options, calibrated: bool) -> tuple[float | None, str]:
    """Seconds of encoding, and the line about it; None where the compiled core is missing."""
    # The time does not depend on the statistics.
    made_up = InputMoments(np.eye(MEASURED_SHAPE[1]), 1)
    moments = (lambda name: made_up) if calibrated else None
    try:
        check_core(plan, options)
    except CoreMissingError as error:
        return None, f"not known: {error}"
    rates = measured_rates(make_encoders(plan, options, moments))
    seconds = sum(item.weights / rates[item.format] for item in plan.items if item.quantized)
    quantized = {item.format: 0 for item in plan.items if item.quantized}
    for item in plan.items:
        if item.quantized:
            quantized[item.format] += item.weights
    main_format = max(quantized, key=lambda format: quantized[format])
    return seconds, (
        f"{reporting.duration(seconds)} of encoding on this machine, reading and writing not"
        f" counted; from {rates[main_format] / 1e6:.1f} million weights/s of {main_format},"
        f" measured just now on a random matrix of {MEASURED_SHAPE[0]} x {MEASURED_SHAPE[1]}"
    )


def measured_rates(encoders: Mapping[str, MatrixEncoder]) -> dict[str, float]:
    """Weights a second of each encoder on a small random matrix."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(MEASURED_SHAPE, dtype=np.float32)
    rates = {}
    for format, encoder in encoders.items():
        encoder.encode(weight[:64])  # start threads, load tables
        start = time.perf_counter()
        encoder.encode(weight)
        rates[format] = weight.size / (time.perf_counter() - start)
    return rates
