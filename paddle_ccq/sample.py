# SPDX-License-Identifier: Apache-2.0
"""Let a model write text to calibrate on, in the proportions of what it was trained on."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from . import reporting
from .calibration.settings import DEFAULT_WINDOW, parse_tokens
from .checkpoint.reader import open_checkpoint
from .checkpoint.source import HUBS, resolve_model
from .command import output_path, run_command
from .errors import CcqError, visible
from .host import default_threads, require_paddle

DEFAULT_TOKENS = "128k"


def sample(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokens: str | int = DEFAULT_TOKENS,
    seed: int = 0,
    threads: int | None = None,
    source: str | None = None,
) -> int:
    """Write about `tokens` tokens of made-up documents into the new .jsonl file `output`.

    Returns the number of documents. The same seed gives the same file on the same machine.

    Raises:
        CcqError: if the output exists, or for anything in the input that is not right.
    """
    require_paddle("sampling, which runs the model,")
    from .calibration.sampling import sample_documents
    from .evaluation.text import Tokenizer
    from .models.ernie import Ernie

    path = output_path(output)
    if threads is not None and threads < 1:
        raise CcqError(f"--threads {threads}: must be at least 1")
    if seed < 0:
        raise CcqError(f"--seed {seed}: must not be negative")
    if path.suffix != ".jsonl":
        raise CcqError(f"--output {path}: must be named .jsonl, or it can't be calibrated on")
    if os.path.lexists(path):
        raise CcqError(f"--output {path}: exists already; name another file or remove it")
    reporting.check_can_write(path, False, "--output")
    wanted = parse_tokens(tokens, "--tokens")
    checkpoint = open_checkpoint(resolve_model(model, source, log=_to_stderr))
    for message in checkpoint.messages:
        _to_stderr(message)
    tokenizer = Tokenizer(checkpoint.path, checkpoint.config.raw)
    window = min(DEFAULT_WINDOW, checkpoint.config.max_position_embeddings, wanted)
    if window < 2:
        raise CcqError(f"--tokens {tokens}: must be at least 2")
    documents = sample_documents(
        Ernie(checkpoint),
        tokenizer.bos,
        tokenizer.eos,
        wanted,
        window,
        seed,
        threads or default_threads(),
    )
    texts = [text for text in map(tokenizer.decode, documents) if text.strip()]
    if not texts:
        raise CcqError(f"{checkpoint.path}: the model wrote nothing; give it more --tokens")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    reporting.write_whole(path, lambda to: to.write_text("".join(lines), encoding="utf-8"))
    return len(texts)


def _to_stderr(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paddle_ccq.sample", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model", help="float checkpoint folder, hub id or short name")

    def add(flag: str, **kwargs: Any) -> None:
        parser.add_argument(flag, **kwargs)

    add("--output", required=True, metavar="FILE", help="new .jsonl file")
    add("--tokens", default=DEFAULT_TOKENS, metavar="N", help="about so many (default: 128k)")
    add("--seed", type=int, default=0, metavar="N", help="of the random choices (default: 0)")
    add("--threads", type=int, metavar="N", help="default: all cores; the text is the same")
    add("--source", choices=tuple(HUBS), type=str.upper, help="hub to download from")
    return parser


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> int:
        count = sample(**vars(args))
        print(f"{count:,} documents in {args.output}")
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
