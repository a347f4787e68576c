# SPDX-License-Identifier: Apache-2.0
"""The console script: `paddle-ccq COMMAND ...`, the same as `python -m paddle_ccq.COMMAND ...`."""

from __future__ import annotations

import importlib
import sys

from .errors import CcqError, run_cli
from .version import __version__

COMMANDS = {
    "quantize": "make a 2-bit checkpoint from a float one",
    "verify": "check a quantized checkpoint, and its error against the float one",
    "sensitivity": "what each layer costs in each format, for quantize --allocate (needs Paddle)",
    "sample": "let a model write text to calibrate on (needs Paddle)",
    "tune": "bring a quantized checkpoint closer to the float one's logits (needs Paddle)",
    "evaluate": "perplexity, divergence and tasks, before and after (needs Paddle)",
    "dequantize": "turn a quantized checkpoint back into bfloat16",
    "serve": "answer the OpenAI API on the CPU, experts kept at 2 bits",
}


def usage() -> str:
    lines = ["usage: paddle-ccq COMMAND ...", ""]
    lines += [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    lines += ["", "`paddle-ccq COMMAND --help` explains a command's options."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return run_cli(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(args: list[str]) -> int:
    if args[:1] == ["--version"]:
        print(__version__)
        return 0
    if args[:1] in ([], ["-h"], ["--help"]):
        print(usage())
        return 0 if args else 2
    command = args[0]
    if command not in COMMANDS:
        raise CcqError(f"{command!r} is not a command; the commands are {', '.join(COMMANDS)}")
    return importlib.import_module(f".{command}", __package__).main(args[1:])


if __name__ == "__main__":
    sys.exit(main())
