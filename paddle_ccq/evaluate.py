# SPDX-License-Identifier: Apache-2.0
"""Measure a checkpoint on the CPU: perplexity, distance from a reference model, task accuracy."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import reporting
from .arguments import Arguments, whole
from .checkpoint.reader import Checkpoint, open_checkpoint
from .checkpoint.source import model_name, resolve_model
from .command import no_message, run_command, to_stderr
from .errors import CcqError, readable
from .host import available_memory, require_paddle, thread_count
from .models.weights import EXACT, READINGS, weight_source
from .texts.documents import read_documents
from .units import gibibytes
from .version import __version__

MODEL, REFERENCE = "model", "reference"
DEFAULT_WINDOW = 1024


def evaluate(
    model: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    tasks: Sequence[str | os.PathLike[str]] = (),
    *,
    window: int = DEFAULT_WINDOW,
    max_tokens: int | None = None,
    max_items: int | None = None,
    threads: int | None = None,
    source: str | None = None,
    row_order: str | None = None,
    weights: str = EXACT,
    log: Callable[[str], object] = to_stderr,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Evaluate `model` on a text and on task files; quantized matrices are dequantized first.

    `weights` says whether that is exact (what the embedded server multiplies with) or rounded to
    bfloat16 (what an engine that multiplies in bfloat16 has, FastDeploy's among them).

    With a reference model, both are run on the same tokens and items, and the KL divergence, the
    top-1 agreement and the paired difference in nll are added.
    """
    if text is None and not tasks:
        raise CcqError("nothing to measure: give --text, --tasks or both")
    for flag, value in (
        ("--max-tokens", max_tokens),
        ("--max-items", max_items),
    ):
        if value is not None and value < 1:
            raise CcqError(f"{flag} {value}: must be at least 1")
    threads = thread_count(threads)
    require_paddle("evaluation")
    from .evaluation.run import score_tasks, score_text, summarize
    from .evaluation.tasks import read_items
    from .evaluation.text import (
        FRAMING,
        Tokenizer,
        check_same_tokenizer,
        cut_windows,
        token_stream,
    )
    from .models.ernie import Ernie

    checkpoints = {MODEL: open_checkpoint(resolve_model(model, source, log=log), row_order)}
    if reference is not None:
        checkpoints[REFERENCE] = open_checkpoint(resolve_model(reference, source, log=log))
    sources = {name: weight_source(found, weights) for name, found in checkpoints.items()}
    config = checkpoints[MODEL].config
    tokenizer = Tokenizer(checkpoints[MODEL].path, config.raw)
    if reference is not None:
        other = checkpoints[REFERENCE]
        check_same_tokenizer(tokenizer, Tokenizer(other.path, other.config.raw))
        if other.config.vocab_size != config.vocab_size:
            raise CcqError(
                f"{other.path}: vocab_size {other.config.vocab_size} is not the model's"
                f" {config.vocab_size}; the two cannot be compared"
            )
    result: dict[str, Any] = {
        "version": __version__,
        "arithmetic": "float32 on the CPU",
        "weights": weights,
        "models": {name: _describe(checkpoint) for name, checkpoint in checkpoints.items()},
    }
    windows, items = None, []
    if text is not None:
        documents = read_documents(text, "--text")
        stream = token_stream(documents, tokenizer)
        windows = cut_windows(stream, window, max_tokens)
        longest = max(part.size for part in windows)
        if longest > config.max_position_embeddings:
            raise CcqError(
                f"--window {window}: more than the model's max_position_embeddings"
                f" ({config.max_position_embeddings})"
            )
        if int(stream.max()) >= config.vocab_size:
            raise CcqError(
                f"{tokenizer.path}: gives token {int(stream.max())}, but config.json has"
                f" vocab_size {config.vocab_size}"
            )
        result["text"] = {
            "path": readable(text),
            "documents": len(documents),
            "stream_tokens": int(stream.size),
            "windowing": FRAMING,
            "window": window,
            "windows": len(windows),
            "used_tokens": sum(part.size for part in windows),
        }
    if tasks:
        items = [item for path in tasks for item in read_items(path, max_items)]
        result["tasks"] = {"paths": [readable(path) for path in tasks], "items": len(items)}

    for checkpoint in checkpoints.values():
        for message in checkpoint.messages:
            log(f"{model_name(checkpoint.path)}: {message}")
    _check_memory(checkpoints)
    models = {name: Ernie(source) for name, source in sources.items()}
    compared = REFERENCE if reference is not None else None
    text_scores = task_scores = None
    if windows is not None:
        with reporting.Progress("windows", len(windows), show_progress) as progress:
            text_scores = score_text(models, windows, compared, threads, progress)
    if items:
        task_scores = score_tasks(models, tokenizer, items, threads)
    result["results"] = summarize(text_scores, task_scores, compared)
    return result


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    formats: dict[str, int] = {}
    for name in checkpoint.names():
        format_name = checkpoint.format_of(name)
        formats[format_name] = formats.get(format_name, 0) + 1
    return {
        "path": readable(checkpoint.path),
        "layout": checkpoint.naming.name,
        "tensors_by_format": formats,
        "stored_bytes": sum(checkpoint.stored_bytes(name) for name in checkpoint.names()),
    }


def _check_memory(checkpoints: dict[str, Checkpoint]) -> None:
    """Weights are held as float32; say so before the system ends the process for it."""
    needed = sum(
        4 * math.prod(checkpoint.shape(name))
        for checkpoint in checkpoints.values()
        for name in checkpoint.model_names()
    )
    available = available_memory()
    if available is not None and needed > available:
        raise CcqError(
            f"{checkpoints[MODEL].path}: the weights take {gibibytes(needed)} as float32, but"
            f" {gibibytes(available)} of memory are free; use a larger machine"
        )


def build_parser() -> Arguments:
    parser = Arguments("evaluate", __doc__)
    parser.subject("model", "checkpoint: folder, hub id or short name")
    add = parser.add_argument
    add("--reference", metavar="MODEL", help="compare with this model, usually the float one")
    add("--text", metavar="FILE", help="text: .txt, .jsonl or .json; packed, a pipe or -")
    add(
        "--tasks",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help='.jsonl items: "task", "prompt", "answer" and, for multiple choice, "choices"',
    )
    add("--window", type=whole, default=DEFAULT_WINDOW, help="tokens per window (%(default)s)")
    add(
        "--max-tokens",
        type=whole,
        metavar="N",
        help="use at most N tokens of the text, in windows spread evenly over it",
    )
    add("--max-items", type=whole, metavar="N", help="use at most N items of each file")
    add(
        "--weights",
        choices=READINGS,
        default=EXACT,
        help="packed weights as they decode, which is what paddle-ccq serve multiplies with, or"
        " rounded as an engine computing in bfloat16 has them (%(default)s)",
    )
    parser.json()
    parser.threads()
    parser.source()
    parser.row_order()
    parser.quiet()
    return parser


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> int:
        from .evaluation.report import detail_table

        if args.json is not None:
            reporting.check_can_write(args.json, args.force)
        result = evaluate(
            args.model,
            args.reference,
            args.text,
            args.tasks,
            window=args.window,
            max_tokens=args.max_tokens,
            max_items=args.max_items,
            threads=args.threads,
            source=args.source,
            row_order=args.row_order,
            weights=args.weights,
            log=no_message if args.quiet else to_stderr,
            show_progress=not args.quiet and sys.stderr.isatty(),
        )
        if args.json is not None:
            reporting.write_json(args.json, result)
        out = reporting.console()
        if "text" in result:
            described = result["text"]
            out.print(
                f"{Path(described['path']).name}: {described['windows']} windows of"
                f" {described['window']} tokens out of {described['stream_tokens']}"
                f" ({described['windowing']})",
                soft_wrap=True,
            )
        out.print(detail_table(result["results"]))
        out.print(
            "In brackets: standard errors, over windows for text and over items for tasks.",
            soft_wrap=True,
        )
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
