# SPDX-License-Identifier: Apache-2.0
"""Measure a checkpoint on the CPU: perplexity, distance from a reference model, task accuracy."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import reporting
from .arguments import Arguments, whole
from .calibration.settings import parse_tokens
from .checkpoint.reader import Checkpoint, open_checkpoint
from .checkpoint.source import model_name, resolve_model
from .command import messages, options_of, run_command, shows_progress, to_stderr
from .errors import CcqError, readable
from .host import available_memory, require_paddle, thread_count
from .models.support import require_computed
from .models.weights import EXACT, READINGS, weight_source
from .texts.documents import read_documents
from .units import gibibytes
from .version import __version__

if TYPE_CHECKING:
    import numpy as np

    from .evaluation.text import Tokenizer

MODEL, REFERENCE = "model", "reference"
DEFAULT_WINDOW = 1024


PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class EvaluateOptions:
    """The keywords of `evaluate`; each but the last two is the command's flag of the same name.

    Attributes:
        window: tokens of a window.
        max_tokens: at most so many tokens of the text, in windows spread evenly over it; "64k" too.
        max_items: at most so many items of each file of tasks.
        threads: None takes all processors.
        source: hub to download from.
        row_order: of WINT2, where the checkpoint does not say it.
        weights: "exact", what the embedded server multiplies with, or "bfloat16", what an engine
            that multiplies in bfloat16 has, FastDeploy's among them.
        log: takes messages to the user.
        show_progress: a bar on standard error.

    Raises:
        CcqError: naming the flag whose value is not one of those allowed.
    """

    window: int = DEFAULT_WINDOW
    max_tokens: int | str | None = None
    max_items: int | None = None
    threads: int | None = None
    source: str | None = None
    row_order: str | None = None
    weights: str = EXACT
    log: Callable[[str], object] = to_stderr
    show_progress: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, str):
            object.__setattr__(self, "max_tokens", parse_tokens(self.max_tokens, "--max-tokens"))
        for flag, value in (("--max-tokens", self.max_tokens), ("--max-items", self.max_items)):
            if value is not None and value < 1:
                raise CcqError(f"{flag} {value}: must be at least 1")
        thread_count(self.threads)


def evaluate(
    model: PathLike,
    reference: PathLike | None = None,
    text: PathLike | None = None,
    tasks: Sequence[PathLike] = (),
    **options: object,
) -> dict[str, Any]:
    """Evaluate `model` on a text and on task files; quantized matrices are dequantized first.

    `options` are the fields of EvaluateOptions. With a reference model, both are run on the same
    tokens and items, and the KL divergence, the top-1 agreement and the paired difference in nll
    are added.

    Raises:
        CcqError: for anything in the input or the options that is not right.
        TypeError: for a keyword that is no option.
    """
    chosen = EvaluateOptions(**options)
    if text is None and not tasks:
        raise CcqError("nothing to measure: give --text, --tasks or both")
    require_paddle("evaluation")
    from .evaluation.tasks import read_items

    checkpoints = _opened(model, reference, chosen)
    sources = {name: weight_source(c, chosen.weights) for name, c in checkpoints.items()}
    tokenizer = _common_tokenizer(checkpoints)
    result: dict[str, Any] = {
        "version": __version__,
        "arithmetic": "float32 on the CPU",
        "weights": chosen.weights,
        "models": {name: _describe(checkpoint) for name, checkpoint in checkpoints.items()},
    }
    windows, items = None, []
    if text is not None:
        windows, result["text"] = _cut(text, tokenizer, checkpoints[MODEL].config, chosen)
    if tasks:
        items = [item for path in tasks for item in read_items(path, chosen.max_items)]
        result["tasks"] = {"paths": [readable(path) for path in tasks], "items": len(items)}
    for checkpoint in checkpoints.values():
        for message in checkpoint.messages:
            chosen.log(f"{model_name(checkpoint.path)}: {message}")
    _check_memory(checkpoints)
    result["results"] = _scores(sources, tokenizer, windows, items, chosen)
    return result


def _opened(
    model: PathLike, reference: PathLike | None, options: EvaluateOptions
) -> dict[str, Checkpoint]:
    folder = resolve_model(model, options.source, log=options.log)
    found = {MODEL: open_checkpoint(folder, options.row_order, drop_mtp=True)}
    if reference is not None:
        folder = resolve_model(reference, options.source, log=options.log)
        found[REFERENCE] = open_checkpoint(folder, drop_mtp=True)
    for checkpoint in found.values():
        require_computed(checkpoint.config, "evaluate")
    return found


def _common_tokenizer(checkpoints: dict[str, Checkpoint]) -> Tokenizer:
    """The tokenizer, which all models must share, as they must share the vocabulary's size."""
    from .evaluation.text import Tokenizer, check_same_tokenizer

    model = checkpoints[MODEL]
    tokenizer = Tokenizer(model.path, model.config.raw)
    other = checkpoints.get(REFERENCE)
    if other is not None:
        check_same_tokenizer(tokenizer, Tokenizer(other.path, other.config.raw))
        if other.config.vocab_size != model.config.vocab_size:
            raise CcqError(
                f"{other.path}: vocab_size {other.config.vocab_size} is not the model's"
                f" {model.config.vocab_size}; the two cannot be compared"
            )
    return tokenizer


def _cut(
    text: PathLike, tokenizer: Tokenizer, config: Any, options: EvaluateOptions
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The text's windows of tokens, and what the result says of them."""
    from .evaluation.text import FRAMING, cut_windows, token_stream

    documents = read_documents(text, "--text")
    stream = token_stream(documents, tokenizer)
    windows = cut_windows(stream, options.window, options.max_tokens)
    if max(part.size for part in windows) > config.max_position_embeddings:
        raise CcqError(
            f"--window {options.window}: more than the model's max_position_embeddings"
            f" ({config.max_position_embeddings})"
        )
    if int(stream.max()) >= config.vocab_size:
        raise CcqError(
            f"{tokenizer.path}: gives token {int(stream.max())}, but config.json has"
            f" vocab_size {config.vocab_size}"
        )
    return windows, {
        "path": readable(text),
        "documents": len(documents),
        "stream_tokens": int(stream.size),
        "windowing": FRAMING,
        "window": options.window,
        "windows": len(windows),
        "used_tokens": sum(part.size for part in windows),
    }


def _scores(
    sources: dict[str, Any],
    tokenizer: Tokenizer,
    windows: list[np.ndarray] | None,
    items: list[Any],
    options: EvaluateOptions,
) -> dict[str, Any]:
    """Run all models over the windows and the items; metrics by model."""
    from .evaluation.run import score_tasks, score_text, summarize
    from .models.ernie import Ernie

    threads = thread_count(options.threads)
    models = {name: Ernie(source) for name, source in sources.items()}
    compared = REFERENCE if REFERENCE in models else None
    text_scores = task_scores = None
    if windows is not None:
        with reporting.Progress("windows", len(windows), options.show_progress) as progress:
            text_scores = score_text(models, windows, compared, threads, progress)
    if items:
        task_scores = score_tasks(models, tokenizer, items, threads)
    return summarize(text_scores, task_scores, compared)


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
    """Flags of evaluate()'s options have the names of EvaluateOptions' fields."""
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
    """Tables on standard output; exit code 0, or 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        from .evaluation.report import detail_table

        write_json = reporting.json_writer(args)
        options = options_of(args, EvaluateOptions)
        options |= {"log": messages(args.quiet), "show_progress": shows_progress(args.quiet)}
        result = evaluate(args.model, args.reference, args.text, args.tasks, **options)
        write_json(result)
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
