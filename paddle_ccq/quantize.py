# SPDX-License-Identifier: Apache-2.0
"""Quantize an ERNIE-4.5 checkpoint to FastDeploy's WINT2, or to the 2.5- and 2.75-bit formats."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from . import reporting
from .allocation.costs import Sensitivities
from .allocation.resolve import Allocation
from .allocation.session import Request as Wanted
from .allocation.session import comparison_table
from .allocation.session import make_request as make_allocation
from .calibration.session import Request as Calibration
from .calibration.session import coverage, make_request
from .calibration.settings import TOKEN_WEIGHTS
from .checkpoint.companions import check_regular, read_companions
from .checkpoint.config import ErnieConfig
from .checkpoint.plan import ROW_ORDERS, Layout, Plan, build_plan, gigabytes
from .checkpoint.reader import Checkpoint, open_checkpoint
from .checkpoint.rules import load_rules
from .checkpoint.safetensors_format import parse_size
from .checkpoint.source import HUBS, hub_id, model_name, resolve_model
from .checkpoint.source_card import read_source_card
from .checkpoint.unexpected import config_of_folder
from .checkpoint.writer import Workplace, partial_folder
from .codec.formats import DEFAULT_EXPERTS, EXPERT_FORMATS
from .command import output_path, run_command
from .encoder.base import DEVICES, ENCODERS, PRESETS
from .errors import CcqError, visible
from .quantize_plan import PlanMaker, first_plan
from .quantize_plan import dry_run as run_dry
from .quantize_run import Options, QuantizeResult, QuantizeRun, check_core, make_encoders


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = DEFAULT_EXPERTS,
    preset: str = "default",
    encoder: str = "search",
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: str | int | None = None,
    calibration_weights: str | None = None,
    wint4_end_layer: int | None = None,
    fastdeploy_layout: str = "2.1",
    tensor_parallel_size: int = 1,
    rules: str | os.PathLike[str] | None = None,
    allocate: str | int | None = None,
    sensitivity: str | os.PathLike[str] | None = None,
    allow_plugin_layout: bool = False,
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

    With `calibration`, a text (docs/texts.md) or a data set's hub id, wint2 experts are encoded
    for the least error of their outputs on that text (docs/calibration.md); without it no data
    is used.
    With `allocate`, a size such as "2.3bpw" or "100GB", the formats of MoE layers are chosen by
    measured costs (docs/allocation.md): a wint4 prefix, or any layers with `allow_plugin_layout`.
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
    request = make_request(calibration, calibration_tokens, calibration_weights, fetch=not dry_run)
    say: Callable[[str], object] = (lambda _: None) if quiet else _to_stderr
    loaded = load_rules(rules) if rules is not None else ()

    wanted = make_allocation(
        allocate,
        format,
        loaded,
        sensitivity,
        allow_plugin_layout,
        wint4_end_layer,
        request is not None,
    )

    def plan_for(
        config: ErnieConfig, layout: Layout | None = None, any_layers: bool = allow_plugin_layout
    ) -> Plan:
        return build_plan(
            config,
            format,
            wint4_end_layer,
            fastdeploy_layout,
            tensor_parallel_size,
            loaded,
            max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size),
            layout=layout,
            plugin_layout=any_layers,
        )

    if dry_run:
        return run_dry(model, plan_for, options, request, wanted)
    if output is None:
        raise CcqError("--output is missing: name the new folder to write")
    target = output_path(output)
    if log is not None:
        reporting.check_can_write(log, True, "--log")
    if request is not None:
        _ = request.texts  # what is wrong with it is said before a model is fetched
    folder = resolve_model(model, source, revision, log=say)
    check_regular(folder)
    plan, costs = first_plan(config_of_folder(folder)[0], plan_for, wanted)
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
        # Looked at before the work, so that what is wrong with them is not found after it.
        beside = (*read_companions(folder).messages, *read_source_card(folder)[1])
        for message in (*checkpoint.messages, *beside):
            say(message)
        allocation = None
        if wanted is not None:
            allocation = _allocated(
                wanted, costs, checkpoint, model_name(model), request, options, workplace, plan_for
            )
            plan = plan_for(plan.config, allocation.layout)
            say(_shown(comparison_table(allocation)))
            for note in wanted.notes:
                say(note)
        for message in plan.messages:
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
            model_name(model),
            workplace,
            log_path,
            say,
            provenance,
            allocation.as_dict() if allocation else None,
            hub_id(model),
        )
        try:
            result = run.run()
        finally:
            if statistics is not None:
                statistics.close()
    _say_coverage(result, say)
    return result


def _allocated(
    wanted: Wanted,
    costs: Sensitivities | None,
    checkpoint: Checkpoint,
    name: str,
    request: Calibration | None,
    options: Options,
    workplace: Workplace,
    plan_for: PlanMaker,
) -> Allocation:
    """The allocation by the given costs, or by those measured now."""
    config = checkpoint.config
    if costs is not None:
        costs.check_weights(checkpoint, f"--sensitivity {wanted.path}")
    else:
        assert request is not None
        shown = not options.quiet and sys.stderr.isatty()
        with reporting.Progress("layers", config.num_hidden_layers, shown) as progress:
            costs = wanted.measure(
                checkpoint,
                name,
                request,
                options.threads,
                workplace.folder,
                options.restart,
                progress,
                options.device,
            )
    return wanted.resolve(config, lambda layout: plan_for(config, layout, True), costs)


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


def _shown(what: Table) -> str:
    """A table as text, for a message."""
    out = reporting.console()
    with out.capture() as captured:
        out.print(what)
    return captured.get().rstrip()


def _to_stderr(text: str) -> None:
    print(visible(text), file=sys.stderr)


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
    add("--format", choices=EXPERT_FORMATS, default=DEFAULT_EXPERTS, help="of routed experts")
    add("--preset", choices=PRESETS, default="default", help="time against error")
    add("--encoder", choices=ENCODERS, default="search", help="search, or the paper's algorithm")
    add(
        "--calibration",
        metavar="FILE",
        help="text to choose wint2 codes by: .jsonl, .json, .txt, -, or a data set's hub id",
    )
    add("--calibration-tokens", metavar="N", help="of the text, spread evenly (default: 256k)")
    add(
        "--calibration-weights",
        choices=TOKEN_WEIGHTS,
        help="what a token's inputs are weighed by (default: router)",
    )
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
    add("--allocate", metavar="TARGET", help="formats of MoE layers for 2.3bpw, 100GB, ...")
    add("--sensitivity", metavar="FILE", help="costs for --allocate, from paddle_ccq.sensitivity")
    add(
        "--allow-plugin-layout",
        action="store_true",
        help="wint4 in any layers; FastDeploy then needs our plugin",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    add("--threads", type=int, metavar="N", help="encoder threads (default: all cores)")
    add("--device", choices=DEVICES, default="cpu", help="where the search runs; same bytes")
    add("--source", choices=tuple(HUBS), type=str.upper, help="hub to download from")
    add("--revision", help="branch, tag or commit on the hub")
    add("--dry-run", action="store_true", help="print the plan; config.json is enough")
    add("--restart", action="store_true", help="throw away an interrupted run's work")
    add(
        "--allow-nonfinite",
        action="store_true",
        help="set NaN, infinity and what bfloat16 cannot hold to 0",
    )
    add("--log", metavar="FILE", help="JSON lines, one a matrix (default: OUTPUT.log.jsonl)")
    add("--quiet", action="store_true", help="no progress, no messages, no summary")
    return parser


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> int:
        result = quantize(**vars(args))
        if result.output is not None and not args.quiet:
            print_summary(result)
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
