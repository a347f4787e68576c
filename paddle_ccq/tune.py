# SPDX-License-Identifier: Apache-2.0
"""Tune a quantized checkpoint's scales, norms and dense layers towards the float model's logits."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arguments import Arguments, number, whole
from .calibration.dataset import local_text
from .calibration.settings import parse_tokens
from .checkpoint.reader import open_checkpoint
from .checkpoint.source import resolve_model
from .command import messages, output_path, refuse_inside, run_command
from .errors import CcqError
from .families.config import is_packed_entry
from .host import require_paddle, thread_count
from .models.support import require_computed
from .texts.documents import read_texts
from .tuning.settings import TuningSettings

if TYPE_CHECKING:
    from .tuning.session import TuneResult


PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TuneOptions:
    """The keywords of `tune`; each is the command's flag of the same name.

    Attributes:
        tokens, passes, batch, learning_rate, dense_learning_rate: see tuning/settings.py, which has
            the values that None stands for.
        threads: None takes all processors.
        source: hub to download the float model from.
        quiet: no progress and no messages.

    Raises:
        CcqError: naming the flag whose value is not one of those allowed.
    """

    tokens: str | int | None = None
    passes: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    dense_learning_rate: float | None = None
    threads: int | None = None
    source: str | None = None
    quiet: bool = True

    def __post_init__(self) -> None:
        thread_count(self.threads)

    @property
    def settings(self) -> TuningSettings:
        """The settings of the run."""
        tokens = None if self.tokens is None else parse_tokens(self.tokens, "--tokens")
        given = {
            "tokens": tokens,
            "passes": self.passes,
            "batch": self.batch,
            "learning_rate": self.learning_rate,
            "dense_learning_rate": self.dense_learning_rate,
        }
        return TuningSettings(**{name: x for name, x in given.items() if x is not None})


def tune(
    folder: PathLike, model: PathLike, calibration: PathLike, output: PathLike, **options: object
) -> TuneResult:
    """Write a tuned copy of the quantized checkpoint `folder` into the new folder `output`.

    `model` is the float checkpoint it was made from, `calibration` a text (docs/reference/texts.md)
    or a data set's hub id; `options` are the fields of TuneOptions. The experts' codes, the format
    and the size stay (docs/notes/tuning.md).

    Raises:
        CcqError: for anything in the input or the options that is not right, and if the loss on
            held-out text did not go down; nothing is written then.
        TypeError: for a keyword that is no option.
    """
    chosen = TuneOptions(**options)
    require_paddle("tuning, which runs the model,")
    from .tuning.session import run_tuning

    settings, target = chosen.settings, output_path(output)
    texts = read_texts(local_text(calibration), "--calibration")
    log = messages(chosen.quiet)
    quantized = open_checkpoint(folder)
    original = open_checkpoint(resolve_model(model, chosen.source, log=log), drop_mtp=True)
    require_computed(quantized.config, "tune")
    if is_packed_entry(quantized.config.raw.get("quantization_config")):
        raise CcqError(
            f"{quantized.path}: tune changes checkpoints for FastDeploy; quantize with --target"
            " fastdeploy and tune that"
        )
    for checkpoint in (quantized, original):
        for message in checkpoint.messages:
            log(f"{checkpoint.path}: {message}")
        refuse_inside(target, checkpoint.path)

    def report(step: int, steps: int, loss: float) -> None:
        log(f"step {step} of {steps}: KL {loss:.4f} nats a token on held-out text")

    threads = thread_count(chosen.threads)
    return run_tuning(quantized, original, texts, target, settings, threads, report)


def build_parser() -> Arguments:
    """Each argument is a parameter or an option of tune() by its destination."""
    parser = Arguments("tune", __doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="quantized checkpoint; it is not changed")
    add(
        "--reference",
        "--model",
        dest="model",
        required=True,
        metavar="MODEL",
        help="the float checkpoint it was made from",
    )
    add(
        "--calibration",
        required=True,
        metavar="FILE",
        help="text to tune on: .jsonl, .json, .txt, - or a hub id",
    )
    add("--output", required=True, help="new folder for the result")
    add("--tokens", metavar="N", help="of the text, spread evenly (default: 256k)")
    add("--passes", type=whole, metavar="N", help="times that the text is used (default: 1)")
    add("--batch", type=whole, metavar="N", help="windows of one step (default: 4)")
    add("--learning-rate", type=number, metavar="X", help="relative, a step (default: 0.003)")
    add(
        "--dense-learning-rate",
        type=number,
        metavar="X",
        help="the same of dense matrices, 0 to leave them alone (default: 0.001)",
    )
    parser.threads()
    parser.source()
    parser.quiet("no progress, no messages, no summary")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Divergences before and after on standard output; exit code 0, or 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        result = tune(**vars(args))
        if not args.quiet:
            print(
                f"KL to the float model on held-out text: {result.before:.4f} nats a token before,"
                f" {result.after:.4f} after tuning on {result.tokens:,} tokens"
            )
            print(result.output)
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
