# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint before vLLM loads it: is it whole, does it fit, and which flags start it?

python -m paddle_ccq.vllm.check DIR --gpu-memory 140.4 [--tensor-parallel-size 2]
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import reporting
from ..arguments import Arguments, count, number
from ..checkpoint.companions import TOKENIZER_CONFIG
from ..checkpoint.source import snapshot_folder
from ..command import run_command
from ..engine_check import (
    DEFAULT_LENGTH,
    CardMemory,
    CheckResult,
    card_bytes,
    check_positive,
    check_utilization,
    default_length,
    print_result,
)
from ..errors import CcqError
from ..families.generic import GENERIC
from ..json_files import load_json
from ..ops import gpu_library
from ..targets.huggingface.inspection import HuggingFaceInspection
from ..targets.inspect import inspect
from . import packed_memory, releases
from .claims import Claim, Parallel, check_parallel
from .memory import card_memory
from .packed_claims import PackedClaim, architecture_problem, check_packed_parallel


@dataclass(frozen=True)
class ServeConfig:
    """What is to be served, and on what.

    Attributes:
        card_bytes: memory of one card.
        cache_bytes: of a value in the KV cache: 2, or 1 for fp8.
    """

    card_bytes: int
    parallel: Parallel = field(default_factory=Parallel)
    max_model_len: int = DEFAULT_LENGTH
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.92
    cache_bytes: int = 2


def check(folder: str | os.PathLike[str], serve: ServeConfig) -> CheckResult:
    """Hold a quantized checkpoint against the plugin's rules and a card's memory.

    Raises:
        CcqError: if `folder` is no quantized checkpoint, or the number of cards does not fit it.
    """
    _check_serve_config(serve)
    inspection = inspect(Path(folder))
    inspection.check_structure()
    result = CheckResult(str(folder))
    if isinstance(inspection, HuggingFaceInspection):
        memory = _judge_packed(inspection, serve, result)
    else:
        config: Any = inspection.config
        claim = Claim.read(config.raw["quantization_config"])
        claim.check_model(config)
        check_parallel(config, claim, serve.parallel, inspection.plan.tensor_parallel_size)
        memory = card_memory(inspection.plan, serve)
    result.problems += inspection.problems
    result.add_manifest(inspection.folder, False)
    if memory is not None:
        result.judge_memory(memory, serve.max_model_len, serve.max_num_seqs)
    _judge_length(serve, inspection.config, inspection.folder, result)
    _judge_machine(result)
    result.command = command(folder, serve)
    return result


def _judge_packed(
    inspection: HuggingFaceInspection, serve: ServeConfig, result: CheckResult
) -> CardMemory | None:
    """The memory of a card, if it can be told."""
    config = inspection.config
    PackedClaim.read(config.raw["quantization_config"])
    inspection.check_config()
    unserved = architecture_problem(config)
    if unserved:
        result.problems.append(unserved)
        return None
    if config.family is GENERIC:
        result.warnings.append(
            "memory: not judged; of --family generic only the routed experts are known"
        )
        return None
    check_packed_parallel(config, serve.parallel)
    return packed_memory.card_memory(inspection.plan, serve)


def _tokenizer_length(folder: Path) -> int | None:
    """The tokens of a sequence that the folder's tokenizer allows; None: it states no limit."""
    path = folder / TOKENIZER_CONFIG
    found = load_json(path) if path.is_file() else None
    length = found.get("model_max_length") if isinstance(found, dict) else None
    if type(length) not in (int, float) or not 1 <= length < math.inf:
        return None
    return int(length)


def _default_length(folder: Path) -> int:
    """--max-model-len where it is not given: within what config.json and the tokenizer state."""
    tokenizer = _tokenizer_length(snapshot_folder(folder))
    return min(default_length(folder), tokenizer or DEFAULT_LENGTH)


def _judge_length(serve: ServeConfig, config: Any, folder: Path, result: CheckResult) -> None:
    """What vLLM makes of --max-model-len (config/model.py, _get_and_verify_max_len)."""
    values = getattr(config, "values", config.raw)
    stated = {"max_position_embeddings": values.get("max_position_embeddings")}
    stated["model_max_length"] = _tokenizer_length(folder)
    numbers = {k: n for k, n in stated.items() if type(n) in (int, float) and 0 < n < math.inf}
    if not numbers:
        return
    key = min(numbers, key=lambda name: numbers[name])
    length, limit = serve.max_model_len, int(numbers[key])
    if length <= limit:
        return
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    text = f"--max-model-len {length}: {key} of the model is {limit}"
    if kind in (None, "default"):
        result.problems.append(f"{text}, and vLLM refuses more; at most --max-model-len {limit}")
    else:
        result.warnings.append(f"{text}; whether its {kind} scaling allows more is vLLM's to say")


def _check_serve_config(serve: ServeConfig) -> None:
    check_positive(
        {
            "--tensor-parallel-size": serve.parallel.tensor,
            "--pipeline-parallel-size": serve.parallel.pipeline,
            "--gpu-memory": serve.card_bytes,
            "--max-model-len": serve.max_model_len,
            "--max-num-seqs": serve.max_num_seqs,
            "--max-num-batched-tokens": serve.max_num_batched_tokens,
        }
    )
    check_utilization(serve.gpu_memory_utilization)
    if serve.max_num_batched_tokens < serve.max_num_seqs:
        raise CcqError(
            f"--max-num-batched-tokens {serve.max_num_batched_tokens}: vLLM wants at least"
            f" --max-num-seqs, {serve.max_num_seqs}"
        )


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


def command(folder: str | os.PathLike[str], serve: ServeConfig) -> list[str]:
    """The command that starts the server."""
    parts = ["vllm", "serve", str(folder)]
    if serve.parallel.tensor > 1:
        parts += ["--tensor-parallel-size", str(serve.parallel.tensor)]
    if serve.parallel.pipeline > 1:
        parts += ["--pipeline-parallel-size", str(serve.parallel.pipeline)]
    if serve.parallel.experts:
        parts.append("--enable-expert-parallel")
    parts += ["--max-model-len", str(serve.max_model_len)]
    parts += ["--max-num-seqs", str(serve.max_num_seqs)]
    parts += ["--max-num-batched-tokens", str(serve.max_num_batched_tokens)]
    parts += ["--gpu-memory-utilization", str(serve.gpu_memory_utilization)]
    if serve.cache_bytes == 1:
        parts += ["--kv-cache-dtype", "fp8"]
    return parts


def build_parser() -> Arguments:
    """Limits of the server have the names of vLLM's own flags."""
    parser = Arguments("vllm-check", __doc__)
    parser.subject("folder", "quantized checkpoint", "DIR")
    add = parser.add_argument
    add("--gpu-memory", type=number, required=True, metavar="GIB", help="memory of one card")
    add("--tensor-parallel-size", type=count, default=1, metavar="N", help="(1)")
    add("--pipeline-parallel-size", type=count, default=1, metavar="N", help="(1)")
    add("--enable-expert-parallel", action="store_true", help="whole experts on each card")
    add("--max-model-len", type=count, help="tokens of a sequence (32768, or what the model has)")
    add("--max-num-seqs", type=count, default=128, help="sequences at once (128)")
    add("--max-num-batched-tokens", type=count, default=8192, help="tokens of one step (8192)")
    add("--gpu-memory-utilization", type=number, default=0.92, help="(0.92)")
    add("--kv-cache-dtype", choices=["auto", "fp8"], default="auto", help="(auto: bfloat16)")
    parser.json()
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if vLLM can serve the folder so, 1 if not, 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        write_json = reporting.json_writer(args)
        serve = ServeConfig(
            card_bytes=card_bytes(args.gpu_memory),
            parallel=Parallel(
                args.tensor_parallel_size, args.pipeline_parallel_size, args.enable_expert_parallel
            ),
            max_model_len=args.max_model_len or _default_length(Path(args.folder)),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            gpu_memory_utilization=args.gpu_memory_utilization,
            cache_bytes=1 if args.kv_cache_dtype == "fp8" else 2,
        )
        result = check(args.folder, serve)
        print_result(result, "vLLM", shlex.join(result.command))
        write_json(result.to_json())
        return 0 if result.good else 1

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
