# SPDX-License-Identifier: Apache-2.0
"""Measure what each MoE layer and projection costs in each format, for quantize --allocate."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from . import reporting
from .allocation.costs import METHODS, PROJECTIONS, Sensitivities
from .allocation.plot import plot, require_matplotlib
from .allocation.probing import Probing
from .arguments import Arguments, whole
from .calibration.dataset import local_text
from .checkpoint.reader import open_checkpoint
from .checkpoint.source import model_name, resolve_model
from .codec.formats import EXPERT_FORMATS, WIDER_EXPERT_FORMATS
from .command import no_message, run_command, to_stderr
from .encoder.base import DEVICES, PRESETS
from .errors import CcqError
from .host import default_threads, require_paddle
from .models.support import require_computed
from .ops import gpu_library
from .texts.documents import read_texts

MEASURABLE = (*EXPERT_FORMATS, *WIDER_EXPERT_FORMATS)
DEFAULT_FORMATS = ("wint2", "ccq-2.5", "wint4")


def sensitivity(
    model: str | os.PathLike[str],
    calibration: str | os.PathLike[str],
    *,
    method: str = "quadratic",
    formats: Sequence[str] = DEFAULT_FORMATS,
    calibration_tokens: str | int = Probing.statistics,
    probe_tokens: str | int = Probing.tokens,
    experts: int = Probing.experts,
    preset: str = "fast",
    threads: int | None = None,
    device: str = "cpu",
    source: str | None = None,
    show_progress: bool = False,
    log: Callable[[str], object] = to_stderr,
) -> Sensitivities:
    """KL that every layer and projection costs in every format, when only it is quantized.

    "quadratic" estimates it from squared errors and encodes a few experts of a layer only; "kl"
    measures it and encodes the whole model once for each format (docs/notes/allocation.md).
    `device` is where codes are searched; the costs are the same.
    """
    if method not in METHODS:
        raise CcqError(f"--method {method}: not one of {', '.join(METHODS)}")
    for format in formats:
        if format not in MEASURABLE:
            raise CcqError(f"--formats: {format!r} is not one of {', '.join(MEASURABLE)}")
    if len(set(formats)) < len(formats) or not formats:
        raise CcqError("--formats: name each format once")
    if preset not in PRESETS:
        raise CcqError(f"--preset {preset}: not one of {', '.join(PRESETS)}")
    if device not in DEVICES:
        raise CcqError(f"--device {device}: not one of {', '.join(DEVICES)}")
    if device == "gpu":
        gpu_library.require()
    for flag, value in (("--experts", experts), ("--threads", threads)):
        if value is not None and value < 1:
            raise CcqError(f"{flag} {value}: must be at least 1")
    require_paddle("sensitivity, which runs the model,")
    from .allocation.measure import measure
    from .calibration.settings import CalibrationSettings, parse_tokens
    from .calibration.text import read_calibration_text

    texts = read_texts(local_text(calibration), "--calibration")
    checkpoint = open_checkpoint(resolve_model(model, source, log=log))
    require_computed(checkpoint.config, "sensitivity")
    for message in checkpoint.messages:
        log(message)
    if checkpoint.is_quantized:
        raise CcqError(f"{checkpoint.path}: quantized already; measure the float checkpoint")
    if not checkpoint.config.moe_layers():
        raise CcqError(f"{checkpoint.path}: has no MoE layer, so there is nothing to measure")
    settings = CalibrationSettings(tokens=parse_tokens(calibration_tokens))
    text = read_calibration_text(texts, checkpoint, settings)
    probing = Probing(
        method,
        tuple(formats),
        preset,
        settings.tokens,
        parse_tokens(probe_tokens, "--probe-tokens"),
        experts,
    )
    with (
        tempfile.TemporaryDirectory(prefix="ccq-sensitivity-") as folder,
        reporting.Progress("layers", checkpoint.config.num_hidden_layers, show_progress) as shown,
    ):
        return measure(
            checkpoint,
            model_name(checkpoint.path),
            text,
            settings,
            probing,
            threads or default_threads(),
            Path(folder),
            shown,
            device,
        )


def costs_table(found: Sensitivities) -> Table:
    """A line a layer and projection, then the sums."""
    rows = []
    for layer, parts in found.costs.items():
        for projection in PROJECTIONS:
            costs = [f"{parts[projection][f]:.5f}" for f in found.formats]
            rows.append([f"layer {layer}, {projection}", *costs])
    layers = found.costs
    totals = [f"{sum(found.layer(n, f) for n in layers):.5f}" for f in found.formats]
    rows.append(["sum", *totals])
    return reporting.table(["KL, nats a token", *found.formats], rows)


def build_parser() -> Arguments:
    parser = Arguments("sensitivity", __doc__)
    parser.subject("model", "float checkpoint: folder, hub id or short name")
    add = parser.add_argument
    add(
        "--calibration",
        required=True,
        metavar="FILE",
        help="text to measure on: .jsonl, .json, .txt, - or a hub id",
    )
    add("--calibration-tokens", default="64k", metavar="N", help="of the text to use (64k)")
    add("--probe-tokens", default="8k", metavar="N", help="of them, to measure on (8k)")
    add(
        "--method",
        choices=METHODS,
        default="quadratic",
        help="estimate from squared errors, or measure the divergence (small models)",
    )
    add("--formats", default=",".join(DEFAULT_FORMATS), help="(default: %(default)s)")
    add("--experts", type=whole, default=Probing.experts, help="of a layer, for quadratic (16)")
    add("--preset", choices=PRESETS, default="fast", help="of the encoders (default: fast)")
    add("--plot", metavar="FILE", help="figure (.png, .svg, .pdf); needs the extra plot")
    parser.json(["--plot"])
    parser.threads()
    parser.device("where codes are searched; the costs are the same")
    parser.source()
    parser.quiet()
    return parser


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> int:
        if args.json is not None:
            reporting.check_can_write(args.json, args.force)
        if args.plot is not None:
            reporting.check_can_write(args.plot, args.force, "--plot")
            require_matplotlib(args.plot)
        found = sensitivity(
            args.model,
            args.calibration,
            method=args.method,
            formats=[name for name in args.formats.split(",") if name],
            calibration_tokens=args.calibration_tokens,
            probe_tokens=args.probe_tokens,
            experts=args.experts,
            preset=args.preset,
            threads=args.threads,
            device=args.device,
            source=args.source,
            show_progress=not args.quiet and sys.stderr.isatty(),
            log=no_message if args.quiet else to_stderr,
        )
        if args.json is not None:
            reporting.write_json(args.json, found.as_dict())
        if args.plot is not None:
            plot(found, args.plot)
        reporting.console().print(costs_table(found))
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
