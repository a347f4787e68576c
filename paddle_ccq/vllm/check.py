# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint before vLLM loads it: is it whole, does it fit, and which flags start it?

python -m paddle_ccq.vllm.check DIR --gpu-memory 140.4 [--tensor-parallel-size 2]
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import reporting
from ..arguments import Arguments
from ..checkpoint.manifest import check_manifest
from ..command import run_command
from ..errors import CcqError
from ..ops import gpu_library
from ..targets.fastdeploy.inspection import Inspection
from . import releases
from .claims import Claim, Parallel, check_parallel
from .memory import GIB, CardMemory, card_memory


@dataclass(frozen=True)
class Wish:
    """What is to be served, and on what.

    Attributes:
        card_bytes: memory of one card.
        cache_bytes: of a value in the KV cache: 2, or 1 for fp8.
    """

    card_bytes: int
    parallel: Parallel = field(default_factory=Parallel)
    max_model_len: int = 32768
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.92
    cache_bytes: int = 2


@dataclass
class CheckResult:
    """What was found; `problems` keep vLLM from serving it, `warnings` don't."""

    folder: str
    memory: CardMemory
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"good": self.good, **asdict(self), "cache_tokens": self.memory.tokens}


def check(folder: str | os.PathLike[str], wish: Wish) -> CheckResult:
    """Hold a quantized checkpoint against the plugin's rules and a card's memory.

    Raises:
        CcqError: if `folder` is no quantized checkpoint, or the number of cards does not fit it.
    """
    _check_wish(wish)
    inspection = Inspection(Path(folder))
    inspection.check_structure()
    config = inspection.config
    claim = Claim.read(config.raw["quantization_config"])
    claim.check_model(config)
    check_parallel(config, claim, wish.parallel, inspection.plan.tensor_parallel_size)
    memory = card_memory(inspection.plan, wish)
    result = CheckResult(str(folder), memory, list(inspection.problems))
    named = {problem.split(":", 1)[0] for problem in result.problems}
    found = check_manifest(inspection.folder, False).problems
    result.problems += [problem for problem in found if problem.split(":", 1)[0] not in named]
    if memory.cache <= 0:
        result.problems.append(
            f"memory: {-memory.cache / GIB:.1f} GiB more than a card's usable part are needed; more"
            " cards, a larger card or fewer batched tokens"
        )
    elif memory.tokens < wish.max_model_len:
        result.problems.append(
            f"memory: the KV cache holds {memory.tokens} tokens, one sequence of --max-model-len"
            f" {wish.max_model_len} does not fit; at most --max-model-len {memory.tokens}"
        )
    if wish.max_model_len > config.max_position_embeddings:
        result.warnings.append(
            f"--max-model-len {wish.max_model_len}: the model was made for"
            f" {config.max_position_embeddings} positions"
        )
    _judge_machine(result)
    result.command = command(folder, wish)
    return result


def _check_wish(wish: Wish) -> None:
    for flag, value in {
        "--tensor-parallel-size": wish.parallel.tensor,
        "--pipeline-parallel-size": wish.parallel.pipeline,
        "--gpu-memory": wish.card_bytes,
        "--max-model-len": wish.max_model_len,
        "--max-num-seqs": wish.max_num_seqs,
        "--max-num-batched-tokens": wish.max_num_batched_tokens,
    }.items():
        if value < 1:
            raise CcqError(f"{flag} must be positive")
    if not 0 < wish.gpu_memory_utilization <= 1:
        raise CcqError(f"--gpu-memory-utilization {wish.gpu_memory_utilization}: not in 0..1")


def _judge_machine(result: CheckResult) -> None:
    """What this machine lacks; warnings, since another one may be meant."""
    version = releases.installed()
    if version is None:
        result.warnings.append("vLLM is not installed here")
    else:
        good, said = releases.judge(version)
        if said:
            (result.warnings if good else result.problems).append(said)
    try:
        gpu_library.load()
    except CcqError as error:
        result.warnings.append(str(error))


def command(folder: str | os.PathLike[str], wish: Wish) -> list[str]:
    """The command that starts the server."""
    parts = ["vllm", "serve", str(folder)]
    if wish.parallel.tensor > 1:
        parts += ["--tensor-parallel-size", str(wish.parallel.tensor)]
    if wish.parallel.pipeline > 1:
        parts += ["--pipeline-parallel-size", str(wish.parallel.pipeline)]
    if wish.parallel.experts:
        parts.append("--enable-expert-parallel")
    parts += ["--max-model-len", str(wish.max_model_len)]
    parts += ["--max-num-seqs", str(wish.max_num_seqs)]
    parts += ["--max-num-batched-tokens", str(wish.max_num_batched_tokens)]
    parts += ["--gpu-memory-utilization", f"{wish.gpu_memory_utilization:g}"]
    if wish.cache_bytes == 1:
        parts += ["--kv-cache-dtype", "fp8"]
    return parts


def print_result(result: CheckResult, wish: Wish) -> None:
    out, m = reporting.console(), result.memory
    rows = [
        ["card", f"{m.total / GIB:.1f} GiB"],
        [f"usable ({m.utilization:g} of it)", f"{m.usable / GIB:.1f} GiB"],
        ["weights", f"{m.weights / GIB:.1f} GiB"],
        ["a step's tensors (estimate)", f"{m.step / GIB:.1f} GiB"],
        ["CUDA, graphs, libraries (allowance)", f"{m.libraries / GIB:.1f} GiB"],
        ["left for the KV cache", f"{m.cache / GIB:.1f} GiB"],
        ["KV cache of a token", f"{m.token_cache / 1024:g} KiB"],
        ["tokens in the cache", f"{m.tokens:,}"],
    ]
    out.print(reporting.table(["memory of each card", ""], rows))

    def line(text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)

    for warning in result.warnings:
        line(f"warning: {warning}")
    for problem in result.problems:
        line(f"problem: {problem}")
    if result.good:
        line(f"\n{shlex.join(result.command)}\n")
        line(f"good: {result.folder} for vLLM")
    else:
        line(f"NOT good: {len(result.problems)} problems in {result.folder}")


def build_parser() -> Arguments:
    parser = Arguments("vllm-check", __doc__)
    parser.subject("folder", "quantized checkpoint", "DIR")
    add = parser.add_argument
    add("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of one card")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="(1)")
    add("--pipeline-parallel-size", type=int, default=1, metavar="N", help="(1)")
    add("--enable-expert-parallel", action="store_true", help="whole experts on each card")
    add("--max-model-len", type=int, default=32768, help="tokens of a sequence (32768)")
    add("--max-num-seqs", type=int, default=128, help="sequences at once (128)")
    add("--max-num-batched-tokens", type=int, default=8192, help="tokens of one step (8192)")
    add("--gpu-memory-utilization", type=float, default=0.92, help="(0.92)")
    add("--kv-cache-dtype", choices=["auto", "fp8"], default="auto", help="(auto: bfloat16)")
    parser.json()
    return parser


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> int:
        if args.json:
            reporting.check_can_write(args.json, args.force)
        wish = Wish(
            card_bytes=int(args.gpu_memory * GIB),
            parallel=Parallel(
                args.tensor_parallel_size, args.pipeline_parallel_size, args.enable_expert_parallel
            ),
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            gpu_memory_utilization=args.gpu_memory_utilization,
            cache_bytes=1 if args.kv_cache_dtype == "fp8" else 2,
        )
        result = check(args.folder, wish)
        print_result(result, wish)
        if args.json:
            reporting.write_json(args.json, result.to_json())
        return 0 if result.good else 1

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
