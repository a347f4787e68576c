# SPDX-License-Identifier: Apache-2.0
"""Measure what each MoE layer and projection costs in each format, for quantize --allocate."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from . import reporting
from .allocation.costs import METHODS, PROJECTIONS, Sensitivities
from .allocation.plot import plot, require_matplotlib
from .allocation.probing import Execution, Probing
from .arguments import Arguments, whole
from .calibration.dataset import local_text
from .calibration.settings import CalibrationSettings, parse_tokens
from .checkpoint.reader import Checkpoint, open_checkpoint
from .checkpoint.source import model_name, resolve_model
from .codec.formats import EXPERT_FORMATS, WIDER_EXPERT_FORMATS
from .command import messages, options_of, run_command, shows_progress, to_stderr
from .encoder.base import DEVICES, PRESETS
from .errors import CcqError
from .host import require_paddle, thread_count
from .models.support import require_computed
from .ops import gpu_library
from .texts.documents import read_texts

MEASURABLE = (*EXPERT_FORMATS, *WIDER_EXPERT_FORMATS)
DEFAULT_FORMATS = ("wint2", "ccq-2.5", "wint4")


@dataclass(frozen=True)
class SensitivityOptions:
    """The keywords of `sensitivity`; each but the last two is the command's flag of the same name.

    Attributes:
        method: "quadratic" estimates costs from squared errors and encodes a few experts of a layer
            only; "kl" measures them and encodes the whole model once for each format
            (docs/notes/allocation.md).
        formats: of MEASURABLE.
        calibration_tokens: of the text, for statistics and measuring.
        probe_tokens: of them, to measure on.
        experts: of a layer, for "quadratic".
        preset: of the encoders.
        threads: None takes all processors.
        device: "cpu" or "gpu"; where codes are searched. The costs are the same.
        source: hub to download from.
        show_progress: a bar on standard error.
        log: takes messages to the user.

    Raises:
        CcqError: naming the flag whose value is not one of those allowed.
    """

    method: str = "quadratic"
    formats: Sequence[str] = DEFAULT_FORMATS
    calibration_tokens: str | int = Probing.statistics
    probe_tokens: str | int = Probing.tokens
    experts: int = Probing.experts
    preset: str = "fast"
    threads: int | None = None
    device: str = "cpu"
    source: str | None = None
    show_progress: bool = False
    log: Callable[[str], object] = to_stderr

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CcqError(f"--method {self.method}: not one of {', '.join(METHODS)}")
        for format in self.formats:
            if format not in MEASURABLE:
                raise CcqError(f"--formats: {format!r} is not one of {', '.join(MEASURABLE)}")
        if len(set(self.formats)) < len(self.formats) or not self.formats:
            raise CcqError("--formats: name each format once")
        for flag, value, allowed in (
            ("--preset", self.preset, PRESETS),
            ("--device", self.device, DEVICES),
        ):
            if value not in allowed:
                raise CcqError(f"{flag} {value}: not one of {', '.join(allowed)}")
        if self.experts < 1:
            raise CcqError(f"--experts {self.experts}: must be at least 1")
        thread_count(self.threads)

    @property
    def probing(self) -> Probing:
        """How costs are measured."""
        return Probing(
            self.method,
            tuple(self.formats),
            self.preset,
            parse_tokens(self.calibration_tokens),
            parse_tokens(self.probe_tokens, "--probe-tokens"),
            self.experts,
        )


def sensitivity(
    model: str | os.PathLike[str], calibration: str | os.PathLike[str], **options: object
) -> Sensitivities:
    """KL that every layer and projection costs in every format, when only it is quantized.

    `options` are the fields of SensitivityOptions.

    Raises:
        CcqError: for anything in the input or the options that is not right.
        TypeError: for a keyword that is no option.
    """
    chosen = SensitivityOptions(**options)
    if chosen.device == "gpu":
        gpu_library.require()
    require_paddle("sensitivity, which runs the model,")
    from .allocation.measure import measure
    from .calibration.text import read_calibration_text

    texts = read_texts(local_text(calibration), "--calibration")
    folder = resolve_model(model, chosen.source, log=chosen.log)
    checkpoint = _measurable(open_checkpoint(folder, drop_mtp=True))
    for message in checkpoint.messages:
        chosen.log(message)
    probing = chosen.probing
    settings = CalibrationSettings(tokens=probing.statistics)
    text = read_calibration_text(texts, checkpoint, settings)
    layers, name = checkpoint.config.num_hidden_layers, model_name(checkpoint.path)
    with (
        tempfile.TemporaryDirectory(prefix="ccq-sensitivity-") as folder,
        reporting.Progress("layers", layers, chosen.show_progress) as progress,
    ):
        threads = thread_count(chosen.threads)
        execution = Execution(threads, chosen.device, Path(folder), progress)
        return measure(checkpoint, name, text, settings, probing, execution)


def _measurable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, if it is a float one with experts."""
    require_computed(checkpoint.config, "sensitivity")
    if checkpoint.is_quantized:
        raise CcqError(f"{checkpoint.path}: quantized already; measure the float checkpoint")
    if not checkpoint.config.moe_layers():
        raise CcqError(f"{checkpoint.path}: has no MoE layer, so there is nothing to measure")
    return checkpoint


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
    """Flags of sensitivity()'s options have the names of SensitivityOptions' fields."""
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
    """The table of costs on standard output; exit code 0, or 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        write_json = reporting.json_writer(args)
        if args.plot is not None:
            reporting.check_can_write(args.plot, args.force, "--plot")
            require_matplotlib(args.plot)
        args.formats = [name for name in args.formats.split(",") if name]
        options = options_of(args, SensitivityOptions)
        options |= {"log": messages(args.quiet), "show_progress": shows_progress(args.quiet)}
        found = sensitivity(args.model, args.calibration, **options)
        write_json(found.as_dict())
        if args.plot is not None:
            plot(found, args.plot)
        reporting.console().print(costs_table(found))
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
