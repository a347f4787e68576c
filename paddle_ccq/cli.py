# SPDX-License-Identifier: Apache-2.0
"""The console script: `paddle-ccq COMMAND ...`, the same as `python -m paddle_ccq.MODULE ...`."""

from __future__ import annotations

import importlib
import sys

from .errors import CcqError, run_cli
from .version import __version__

# Command -> the module that `python -m` runs as well, and what it does.
COMMANDS = {
    "quantize": ("quantize", "make a 2-bit checkpoint from a float one"),
    "verify": ("verify", "check a quantized checkpoint, and its error against the float one"),
    "sensitivity": ("sensitivity", "what each layer costs in each format, for quantize --allocate"),
    "sample": ("sample", "let a model write text to calibrate on"),
    "tune": ("tune", "bring a quantized checkpoint closer to the float one's logits"),
    "evaluate": ("evaluate", "perplexity, divergence and tasks, before and after"),
    "dequantize": ("dequantize", "turn a quantized checkpoint back into bfloat16"),
    "serve": ("serve", "answer the OpenAI API on the CPU, experts kept at 2 bits"),
    "fastdeploy-check": ("fastdeploy.check", "will FastDeploy load it, and does it fit the cards"),
    "fastdeploy-launch": ("fastdeploy.launch", "start FastDeploy's server from a settings file"),
    "vllm-check": ("vllm.check", "will vLLM load it, and does it fit the cards"),
    "gpu-library": ("ops.gpu_library", "compile the GPU library (needs nvcc)"),
}
NEED_PADDLE = ("sensitivity", "sample", "tune", "evaluate")


def usage() -> str:
    """Help without a command: one line for each, and which of them need Paddle."""
    lines = ["usage: paddle-ccq COMMAND ...", ""]
    for name, (_, text) in COMMANDS.items():
        lines.append(f"  {name:<18} {text}" + (" (needs Paddle)" if name in NEED_PADDLE else ""))
    lines += ["", "`paddle-ccq COMMAND --help` explains a command's options."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names; its exit code, or 2 for bad input."""
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
    module, _ = COMMANDS[command]
    return importlib.import_module(f".{module}", __package__).main(args[1:])


if __name__ == "__main__":
    sys.exit(main())
