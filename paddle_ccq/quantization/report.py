# SPDX-License-Identifier: Apache-2.0
"""Reports of a quantization before and after it, as tables and lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from rich.table import Table

from .. import reporting
from ..allocation.session import comparison_table, measuring_facts
from ..calibration.session import memory_facts
from ..checkpoint.plan import Plan, make_plan
from ..encoder.base import MatrixEncoder
from ..encoder.ldlq_metric import InputHessian
from ..errors import CoreMissingError
from ..units import gigabytes
from .job import Job
from .options import QuantizeOptions
from .run import QuantizeResult, check_devices, encoders_for

# Weights of the random matrix whose encoding is timed for a dry run: [out, in].
MEASURED_SHAPE = (512, 1024)


def dry_run(job: Job, plan: Plan) -> QuantizeResult:
    """Print what a run would do; the result holds the plan and the estimated seconds."""
    wanted, request = job.wanted, job.calibration
    out = reporting.console()
    allocation = None
    if wanted is not None and job.costs is not None:
        allocation = wanted.resolve(plan, job.costs)
        plan = make_plan(
            plan.config,
            replace(job.options.plan(plan.config), layer_formats=allocation.layer_formats),
        )
    out.print(reporting.plan_table(plan))
    out.print()
    if plan.layer_formats:
        out.print(reporting.layers_table(plan))
        out.print()
    if allocation is not None:
        out.print(comparison_table(allocation))
        out.print()
    if request is not None:
        request.check(plan, job.options.encoder)
    seconds, time_said = _estimated_time(plan, job.options, request is not None)
    facts = [
        *reporting.plan_facts(plan),
        ("peak memory (estimate)", gigabytes(plan.peak_memory())),
        ("disk needed", gigabytes(plan.output_bytes * 1.001)),
        ("time (estimate)", time_said),
    ]
    if request is not None:
        facts += memory_facts(plan.config, request.settings)
    if wanted is not None and job.costs is None:
        facts += measuring_facts(plan.config, wanted.probing)
    for name, value in facts:
        out.print(f"{name}: {value}", soft_wrap=True, markup=False)
    for message in (*job.notes, *plan.messages, *(wanted.notes if wanted else ())):
        out.print(f"note: {message}", soft_wrap=True, markup=False)
    estimate = {} if seconds is None else {"estimate": seconds}
    return QuantizeResult(None, plan, [], estimate, reporting.peak_rss())


def _estimated_time(
    plan: Plan, options: QuantizeOptions, calibrated: bool
) -> tuple[float | None, str]:
    """Seconds of encoding, and the line about it; None where the compiled core is missing."""
    # The time does not depend on the statistics.
    made_up = InputHessian(np.eye(MEASURED_SHAPE[1]), 1)
    hessians = (lambda name: made_up) if calibrated else None
    try:
        check_devices(plan, options)
    except CoreMissingError as error:
        return None, f"not known: {error}"
    rates = measured_rates(encoders_for(plan, options, hessians))
    seconds = sum(
        planned.weights / rates[planned.format] for planned in plan.tensors if planned.quantized
    )
    quantized = {planned.format: 0 for planned in plan.tensors if planned.quantized}
    for planned in plan.tensors:
        if planned.quantized:
            quantized[planned.format] += planned.weights
    main_format = max(quantized, key=lambda format: quantized[format])
    return seconds, (
        f"{reporting.duration(seconds)} of encoding on this machine, reading and writing not"
        f" counted; from {rates[main_format] / 1e6:.1f} million weights/s of {main_format},"
        f" measured just now on a random matrix of {MEASURED_SHAPE[0]} x {MEASURED_SHAPE[1]}"
    )


def measured_rates(encoders: Mapping[str, MatrixEncoder]) -> dict[str, float]:
    """Weights per second of each encoder on a small random matrix."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(MEASURED_SHAPE, dtype=np.float32)
    rates = {}
    for format, encoder in encoders.items():
        encoder.encode(weight[:64])  # start threads, load tables
        start = time.perf_counter()
        encoder.encode(weight)
        rates[format] = weight.size / (time.perf_counter() - start)
    return rates


def print_summary(result: QuantizeResult) -> None:
    """The tables at the end of a run."""
    out = reporting.console()
    rows = reporting.summary_rows(result.plan, result.records)
    out.print(reporting.table(reporting.SUMMARY_COLUMNS, rows))
    seconds = result.seconds
    parts = ", ".join(f"{k} {reporting.duration(seconds[k])}" for k in ("read", "encode", "write"))
    out.print(
        f"{reporting.duration(seconds['total'])} ({parts}); peak memory"
        f" {gigabytes(result.peak_rss)}",
        soft_wrap=True,
    )
    out.print(f"{result.output}", soft_wrap=True)


def as_text(what: Table) -> str:
    """A table as text, for a message."""
    out = reporting.console()
    with out.capture() as captured:
        out.print(what)
    return captured.get().rstrip()
