# SPDX-License-Identifier: Apache-2.0
"""Quantize a checkpoint to 2 to 2.75 bits, for FastDeploy, for vLLM and for our own server."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from .arguments import Arguments, whole
from .calibration.settings import TOKEN_WEIGHTS
from .codec.formats import EXPERT_FORMATS
from .command import run_command
from .encoder.base import ENCODERS, PRESETS
from .families.registry import ASKED
from .quantization.options import QuantizeOptions
from .quantization.report import print_summary
from .quantization.run import QuantizeResult
from .quantization.stages import quantize
from .targets.fastdeploy.layout import ROW_ORDERS
from .targets.outputs import TARGETS

__all__ = ["QuantizeOptions", "QuantizeResult", "build_parser", "main", "quantize"]


def build_parser() -> Arguments:
    """Each argument is a parameter or an option of quantize(), with that one's default."""
    parser = Arguments("quantize", __doc__)
    parser.subject("model", "checkpoint: folder, hub id or short name (ERNIE-4.5-21B)")
    add = parser.add_argument
    add("--output", help="new folder for the result")
    add("--format", choices=EXPERT_FORMATS, help="of routed experts")
    add(
        "--target",
        choices=TARGETS,
        help="layout: FastDeploy's (default for ERNIE-4.5), or Hugging Face's names, for vLLM",
    )
    add(
        "--family",
        choices=ASKED,
        help="for a model of no known family: find its routed experts by the usual names",
    )
    add("--preset", choices=PRESETS, help="time against error")
    add("--encoder", choices=ENCODERS, help="search, or the paper's algorithm")
    add(
        "--calibration",
        metavar="FILE",
        help="text to choose 2-bit codes by: .jsonl, .json, .txt, -, or a data set's hub id",
    )
    add("--calibration-tokens", metavar="N", help="of the text, spread evenly (default: 256k)")
    add(
        "--calibration-weights",
        choices=TOKEN_WEIGHTS,
        help="what a token's inputs are weighed by (default: router)",
    )
    _add_layers(parser)
    _add_run(parser)
    parser.set_defaults(**{option.name: option.default for option in fields(QuantizeOptions)})
    return parser


def _add_layers(parser: Arguments) -> None:
    """What single layers become, and how they are stored."""
    add = parser.add_argument
    add(
        "--wint4-end-layer",
        type=whole,
        metavar="N",
        help="MoE layers up to N are wint4, -1 for none (default: 6 from 40 layers on, else -1)",
    )
    add(
        "--fastdeploy-layout",
        choices=tuple(ROW_ORDERS),
        help="row order of WINT2: for FastDeploy 2.1 and later, or for 2.0",
    )
    add("--tensor-parallel-size", type=whole, metavar="N", help="write N rank folders")
    add("--rules", metavar="FILE", help="YAML list of {match: GLOB, format: NAME}")
    add("--allocate", metavar="TARGET", help="formats of MoE layers for 2.3bpw, 100GB, ...")
    add("--sensitivity", metavar="FILE", help="costs for --allocate, from paddle_ccq.sensitivity")
    add(
        "--allow-plugin-layout",
        action="store_true",
        help="wint4 in any layers; FastDeploy then needs our plugin",
    )
    add(
        "--drop-mtp",
        action="store_true",
        help="leave out the layers for multi-token prediction, which speculative decoding needs",
    )


def _add_run(parser: Arguments) -> None:
    """How the work is done, which changes no choice of formats."""
    add = parser.add_argument
    add("--max-shard-size", metavar="SIZE", help="of one file (default: 5GB)")
    parser.threads("of the encoder; all processors by default, the same bytes")
    parser.device("where codes are searched; the same bytes")
    parser.source()
    add("--revision", help="branch, tag or commit on the hub")
    add("--dry-run", action="store_true", help="print the plan; config.json is enough")
    add("--restart", action="store_true", help="throw away an interrupted run's work")
    add(
        "--allow-nonfinite",
        action="store_true",
        help="set NaN, infinity and what bfloat16 cannot hold to 0",
    )
    add("--log", metavar="FILE", help="JSON lines, one a matrix (default: OUTPUT.log.jsonl)")
    parser.quiet("no progress, no messages, no summary")


def main(argv: list[str] | None = None) -> int:
    """A summary on standard output unless --quiet; exit code 0, or 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        result = quantize(**vars(args))
        if result.output is not None and not args.quiet:
            print_summary(result)
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
