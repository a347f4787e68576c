# SPDX-License-Identifier: Apache-2.0
"""Let a model write text to calibrate on, in the proportions of what it was trained on."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from . import reporting
from .arguments import Arguments, whole
from .calibration.settings import DEFAULT_WINDOW, parse_tokens
from .checkpoint.reader import open_checkpoint
from .checkpoint.source import resolve_model
from .command import messages, output_path, run_command, to_stderr
from .errors import CcqError
from .files import write_whole
from .host import require_paddle, thread_count
from .models.support import require_computed

DEFAULT_TOKENS = "128k"


def sample(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokens: str | int = DEFAULT_TOKENS,
    seed: int = 0,
    threads: int | None = None,
    source: str | None = None,
    log: Callable[[str], object] = to_stderr,
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
    threads = thread_count(threads)
    if seed < 0:
        raise CcqError(f"--seed {seed}: must not be negative")
    if path.suffix != ".jsonl":
        raise CcqError(f"--output {path}: must be named .jsonl, or it can't be calibrated on")
    if os.path.lexists(path):
        raise CcqError(f"--output {path}: exists already; name another file or remove it")
    reporting.check_can_write(path, False, "--output")
    wanted = parse_tokens(tokens, "--tokens")
    checkpoint = open_checkpoint(resolve_model(model, source, log=log), drop_mtp=True)
    require_computed(checkpoint.config, "sample")
    for message in checkpoint.messages:
        log(message)
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
        threads,
    )
    texts = [text for text in map(tokenizer.decode, documents) if text.strip()]
    if not texts:
        raise CcqError(f"{checkpoint.path}: the model wrote nothing; give it more --tokens")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    write_whole(path, lambda to: to.write_text("".join(lines), encoding="utf-8"))
    return len(texts)


def build_parser() -> Arguments:
    """Each argument but --quiet is a parameter of sample() by its destination."""
    parser = Arguments("sample", __doc__)
    parser.subject("model", "float checkpoint: folder, hub id or short name")
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="new .jsonl file")
    add("--tokens", default=DEFAULT_TOKENS, metavar="N", help="about so many (default: 128k)")
    add("--seed", type=whole, default=0, metavar="N", help="of the random choices (default: 0)")
    parser.threads("all processors by default; the text is the same")
    parser.source()
    parser.quiet()
    return parser


def main(argv: list[str] | None = None) -> int:
    """The number of documents is printed; exit code 0, or 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        given = vars(args)
        quiet = given.pop("quiet")
        count = sample(**given, log=messages(quiet))
        print(f"{count:,} documents in {args.output}")
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
