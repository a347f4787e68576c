# SPDX-License-Identifier: Apache-2.0
"""Quantize an ERNIE-4.5 checkpoint to FastDeploy's WINT2, or to the 2.5- and 2.75-bit formats."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import reporting
from .calibration.session import Request as Calibration
from .calibration.session import coverage, make_request, memory_facts
from .checkpoint.config import CONFIG_FILE, ErnieConfig
from .checkpoint.plan import EXPERT_FORMATS, ROW_ORDERS, Plan, build_plan, gigabytes
from .checkpoint.reader import open_checkpoint
from .checkpoint.rules import load_rules
from .checkpoint.safetensors_format import parse_size
from .checkpoint.source import HUBS, resolve_model
from .checkpoint.writer import Workplace, partial_folder
from .encoder.base import DEVICES, ENCODERS, PRESETS, MatrixEncoder
from .encoder.ldlq_metric import InputMoments
from .errors import CcqError, run_cli
from .quantize_run import Options, QuantizeResult, QuantizeRun, check_core, make_encoders

# Weights of the random matrix whose encoding is timed for a dry run: [out, in].
MEASURED_SHAPE = (512, 1024)


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "wint2",
    preset: str = "default",
    encoder: str = "search",
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: str | int | None = None,
    wint4_end_layer: int | None = None,
    fastdeploy_layout: str = "2.1",
    tensor_parallel_size: int = 1,
    rules: str | os.PathLike[str] | None = None,
    max_shard_size: str | int = "5GB",
    threads: int | None = None,
    device: str = "cpu",
    source: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    restart: bool = False,
    allow_nonfinite: bool = False,
    log: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> QuantizeResult:
    """Write a quantized checkpoint of `model` into the new folder `output`.

    With `calibration`, a .jsonl or .txt file, wint2 experts are encoded for the least error of
    their outputs on that text (docs/calibration.md); without it no data is used.
    The same call after an interruption goes on where it stopped and ends with the same bytes.
    With `dry_run` only the plan is printed; a folder with nothing but config.json will do.

    Raises:
        CcqError: for anything in the input, the options or the environment that is not right.
    """
    _check_option("--preset", preset, PRESETS)
    _check_option("--encoder", encoder, ENCODERS)
    _check_option("--device", device, DEVICES)
    if threads is not None and threads < 1:
        raise CcqError(f"--threads {threads}: must be at least 1")
    options = Options(preset, encoder, threads, allow_nonfinite, restart, quiet, device)
    request = make_request(calibration, calibration_tokens)
    say: Callable[[str], object] = (lambda _: None) if quiet else _to_stderr
    loaded = load_rules(rules) if rules is not None else ()

    def plan_for(config: ErnieConfig) -> Plan:
        return build_plan(
            config,
            format,
            wint4_end_layer,
            fastdeploy_layout,
            tensor_parallel_size,
            loaded,
            max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size),
        )

    if dry_run:
        return _dry_run(model, plan_for, options, request)
    if output is None:
        raise CcqError("--output is missing: name the new folder to write")
    target = Path(os.path.abspath(output))
    folder = resolve_model(model, source, revision, log=say)
    plan = plan_for(ErnieConfig.from_json(folder))
    _check_separate(folder, target)
    log_path = Path(log) if log is not None else target.with_name(target.name + ".log.jsonl")
    # A run that goes on writes its log anew; any other file of that name is somebody's.
    if log is not None and log_path.exists() and not partial_folder(target).exists():
        raise CcqError(f"--log {log_path}: exists already; name another file or remove it")
    check_core(plan, options)
    if request is not None:
        request.check(plan, encoder)
    with Workplace(target) as workplace:
        checkpoint = open_checkpoint(folder)
        if checkpoint.is_quantized:
            raise CcqError(
                f"{folder}: quantized already; quantize the original float checkpoint instead"
            )
        for message in (*checkpoint.messages, *plan.messages):
            say(message)
        statistics = provenance = None
        if request is not None:
            statistics = request.open(checkpoint, threads, workplace.folder)
            provenance = statistics.text.as_dict(request.settings)
        run = QuantizeRun(
            plan,
            options,
            make_encoders(plan, options, statistics.moments if statistics else None),
            checkpoint,
            _model_name(model),
            workplace,
            log_path,
            say,
            provenance,
        )
        try:
            result = run.run()
        finally:
            if statistics is not None:
                statistics.close()
    _say_coverage(result, say)
    return result


def _say_coverage(result: QuantizeResult, say: Callable[[str], object]) -> None:
    found = coverage(result.records)
    if found is None:
        return
    line, empty = found
    say(f"calibration: {line}")
    if empty:
        names = ", ".join(empty[:8]) + (" ..." if len(empty) > 8 else "")
        say(f"calibration: {len(empty)} experts saw no token and were encoded data-free: {names}")


def _check_option(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CcqError(f"{flag} {value}: not one of {', '.join(allowed)}")


def _check_separate(folder: Path, target: Path) -> None:
    source = folder.resolve()
    if target.resolve() == source or source in target.resolve().parents:
        raise CcqError(f"--output {target}: lies in the model's own folder; choose another")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _model_name(model: str | os.PathLike[str]) -> str:
    """What the output calls its source: a hub id or short name as given, or a folder's name."""
    text = os.fspath(model)
    return Path(text).expanduser().resolve().name if Path(text).expanduser().is_dir() else text


def _dry_run(
    model: str | os.PathLike[str],
    plan_for: Callable[[ErnieConfig], Plan],
    options: Options,
    request: Calibration | None,
) -> QuantizeResult:
    folder = Path(model).expanduser()
    if not folder.exists():
        raise CcqError(
            f"{model}: a dry run downloads nothing; put the model's {CONFIG_FILE} into a folder and"
            " pass that"
        )
    plan = plan_for(ErnieConfig.from_json(folder))
    out = reporting.console()
    out.print(reporting.plan_table(plan))
    out.print()
    if request is not None:
        request.check(plan, options.encoder)
    # The time does not depend on the statistics.
    made_up = InputMoments(np.eye(MEASURED_SHAPE[1]), 1)
    moments = None if request is None else lambda name: made_up
    rates = measured_rates(make_encoders(plan, options, moments))
    seconds = sum(item.weights / rates[item.format] for item in plan.items if item.quantized)
    quantized = {item.format: 0 for item in plan.items if item.quantized}
    for item in plan.items:
        if item.quantized:
            quantized[item.format] += item.weights
    main_format = max(quantized, key=lambda format: quantized[format])
    facts = [
        *reporting.plan_facts(plan),
        ("peak memory (estimate)", gigabytes(plan.peak_memory())),
        ("disk needed", gigabytes(plan.output_bytes * 1.001)),
        (
            "time (estimate)",
            f"{reporting.duration(seconds)} of encoding on this machine, reading and writing not"
            f" counted; from {rates[main_format] / 1e6:.1f} million weights/s of {main_format},"
            f" measured just now on a random matrix of {MEASURED_SHAPE[0]} x {MEASURED_SHAPE[1]}",
        ),
    ]
    if request is not None:
        facts += memory_facts(plan.config, request.settings)
    for name, value in facts:
        out.print(f"{name}: {value}", soft_wrap=True)
    for message in plan.messages:
        out.print(f"note: {message}", soft_wrap=True)
    return QuantizeResult(None, plan, [], {"estimate": seconds}, reporting.peak_rss())


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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paddle_ccq.quantize", description=__doc__, allow_abbrev=False
    )

    def add(flag: str, **kwargs: Any) -> None:
        names = [flag]
        if "-" in flag[2:]:
            names.append("--" + flag[2:].replace("-", "_"))
        parser.add_argument(*names, **kwargs)

    add("--model", required=True, help="checkpoint folder, hub id or short name (ERNIE-4.5-21B)")
    add("--output", help="new folder for the result")
    add("--format", choices=EXPERT_FORMATS, default="wint2", help="of routed experts")
    add("--preset", choices=PRESETS, default="default", help="time against error")
    add("--encoder", choices=ENCODERS, default="search", help="search, or the paper's algorithm")
    add("--calibration", metavar="FILE", help="text (.jsonl, .txt) to choose wint2 codes by")
    add("--calibration-tokens", metavar="N", help="of the text, spread evenly (default: 256k)")
    add(
        "--wint4-end-layer",
        type=int,
        metavar="N",
        help="MoE layers up to N are wint4, -1 for none (default: 6 from 40 layers on, else -1)",
    )
    add(
        "--fastdeploy-layout",
        choices=tuple(ROW_ORDERS),
        default="2.1",
        help="row order of WINT2: for FastDeploy 2.1 and later, or for 2.0",
    )
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="write N rank folders")
    add("--rules", metavar="FILE", help="YAML list of {match: GLOB, format: NAME}")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    add("--threads", type=int, metavar="N", help="encoder threads (default: all cores)")
    add("--device", choices=DEVICES, default="cpu", help="where the search runs; same bytes")
    add("--source", choices=tuple(HUBS), type=str.upper, help="hub to download from")
    add("--revision", help="branch, tag or commit on the hub")
    add("--dry-run", action="store_true", help="print the plan; config.json is enough")
    add("--restart", action="store_true", help="throw away an interrupted run's work")
    add("--allow-nonfinite", action="store_true", help="set NaN and infinite weights to 0")
    add("--log", metavar="FILE", help="JSON lines, one a matrix (default: OUTPUT.log.jsonl)")
    add("--quiet", action="store_true", help="no progress, no messages, no summary")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))

    def body() -> int:
        result = quantize(**args)
        if result.output is not None and not args["quiet"]:
            print_summary(result)
        return 0

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
