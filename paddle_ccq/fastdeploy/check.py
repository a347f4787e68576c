# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint before FastDeploy loads it: contract, version, memory, and how to start it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import engine_check, reporting
from ..arguments import Arguments, number, whole
from ..checkpoint.manifest import NO_MANIFEST, read_manifest
from ..command import run_command
from ..engine_check import (
    DEFAULT_LENGTH,
    card_bytes,
    check_positive,
    check_utilization,
    default_length,
)
from ..errors import CcqError
from ..host import available_memory
from ..targets.fastdeploy.inspection import FastDeployInspection
from ..units import gigabytes
from .cards import Card, find_cards
from .contract import contract_problems, contract_warnings, plugin_reason
from .memory import (
    BLOCK_TOKENS,
    DEFAULT_BATCHED_TOKENS,
    DEFAULT_UTILIZATION,
    card_memory,
)
from .plugin import NAME as PLUGIN
from .releases import DEFAULT_RELEASE, RELEASES, Release, release_of
from .server_flags import four_ports, server_command, shown

DEFAULT_SEQUENCES = 128
DEFAULT_PORT = 8180


@dataclass(frozen=True)
class ServeConfig:
    """How a checkpoint is to be served: the server's limits, and the cards it will run on.

    Attributes:
        card_bytes: memory of one card; None leaves out everything about memory.
        draft_tokens: tokens that speculative decoding adds to a sequence's step.
        plugin: whether FastDeploy will load our plugin; None: not known.
        workers: processes of the API server; None: what the release starts.
        concurrency: requests that the API takes at once; None: what the release takes.
    """

    tensor_parallel_size: int = 1
    card_bytes: int | None = None
    max_model_len: int = DEFAULT_LENGTH
    max_num_seqs: int = DEFAULT_SEQUENCES
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS
    gpu_memory_utilization: float = DEFAULT_UTILIZATION
    release: Release = RELEASES[DEFAULT_RELEASE]
    port: int = DEFAULT_PORT
    block_size: int = BLOCK_TOKENS
    draft_tokens: int = 0
    plugin: bool | None = None
    workers: int | None = None
    concurrency: int | None = None

    @property
    def api_processes(self) -> int:
        """Processes of the API server: `workers`, or what the release starts."""
        return self.release.workers if self.workers is None else self.workers

    @property
    def api_requests(self) -> int:
        """Requests that the API takes at once before it answers 429."""
        return self.release.concurrency if self.concurrency is None else self.concurrency


@dataclass
class CheckResult(engine_check.CheckResult):
    """The result of a check, with what FastDeploy needs beside the cards."""

    host_bytes: int = 0
    # Variables that the command needs.
    environment: dict[str, str] = field(default_factory=dict)


def check(
    folder: str | os.PathLike[str], serve: ServeConfig, *, hashes: bool = False
) -> CheckResult:
    """Check a quantized checkpoint against FastDeploy's rules and a card's memory.

    Reads config.json, indexes and tensor headers; tensors only with `hashes`.

    Raises:
        CcqError: if `folder` is no quantized checkpoint, or `serve` contradicts itself.
    """
    _check_serve_config(serve)
    inspection = FastDeployInspection(Path(folder))
    inspection.check_config()
    inspection.check_structure()
    result = CheckResult(str(folder), inspection.problems)
    result.add_manifest(inspection.folder, hashes)
    if hashes and read_manifest(inspection.folder) is None:
        result.warnings.append(NO_MANIFEST)
    result.problems += contract_problems(
        inspection, serve.release, serve.tensor_parallel_size, serve.plugin
    )
    result.warnings += contract_warnings(
        inspection, serve.release, serve.max_model_len, serve.plugin
    )
    result.warnings += _api_warnings(serve)
    if plugin_reason(inspection, serve.release):
        result.environment["FD_PLUGINS"] = PLUGIN
    plan = inspection.plan
    result.host_bytes = plan.output_bytes
    # A wrong number of ranks is reported above; sizes of that number would mislead.
    if serve.card_bytes is not None and plan.tensor_parallel_size == serve.tensor_parallel_size:
        memory = card_memory(
            plan,
            serve.card_bytes,
            serve.max_num_seqs,
            serve.max_num_batched_tokens,
            serve.gpu_memory_utilization,
        )
        result.judge_memory(memory, serve.max_model_len, serve.max_num_seqs)
    result.command = server_command(server_settings(folder, serve), serve.release)
    return result


def _check_serve_config(serve: ServeConfig) -> None:
    check_positive(
        {
            "--tensor-parallel-size": serve.tensor_parallel_size,
            "--max-num-seqs": serve.max_num_seqs,
            "--workers": serve.api_processes,
            "--max-concurrency": serve.api_requests,
            "--block-size": serve.block_size,
            "--gpu-memory": 1 if serve.card_bytes is None else serve.card_bytes,
        }
    )
    if serve.draft_tokens < 0:
        raise CcqError(f"--draft-tokens {serve.draft_tokens}: must not be negative")
    if serve.max_model_len < 16:
        raise CcqError(f"--max-model-len {serve.max_model_len}: FastDeploy wants at least 16")
    if serve.release.block_divides and serve.max_model_len % serve.block_size:
        below = serve.max_model_len // serve.block_size * serve.block_size
        near = f"{below} or {below + serve.block_size}" if below else f"{serve.block_size}"
        raise CcqError(
            f"--max-model-len {serve.max_model_len}: the workers of FastDeploy {serve.release.name}"
            f" stop unless the block size, {serve.block_size}, divides it; take {near}"
        )
    check_utilization(serve.gpu_memory_utilization)
    if serve.max_num_seqs > serve.release.most_sequences:
        raise CcqError(
            f"--max-num-seqs {serve.max_num_seqs}: FastDeploy {serve.release.name} takes at most"
            f" {serve.release.most_sequences}"
        )
    most = serve.max_model_len * serve.max_num_seqs
    each = serve.draft_tokens + 1 if serve.release.counts_drafts else 1
    low = max(serve.block_size, serve.max_num_seqs * each)
    if not low <= serve.max_num_batched_tokens <= most:
        drafts = f", {each} tokens a step for each of --max-num-seqs" if each > 1 else ""
        raise CcqError(
            f"--max-num-batched-tokens {serve.max_num_batched_tokens}: FastDeploy wants {low} to"
            f" {most} (--max-model-len times --max-num-seqs) here{drafts}"
        )


def _api_warnings(serve: ServeConfig) -> list[str]:
    """Warnings about the API server in front of the engine."""
    warnings = []
    if serve.api_requests < serve.max_num_seqs:
        warnings.append(
            f"--max-concurrency {serve.api_requests}: the API answers 429 to further requests, so"
            f" --max-num-seqs {serve.max_num_seqs} is never reached"
        )
    if serve.workers is None and serve.release.workers > 1:
        warnings.append(
            f"--workers: FastDeploy {serve.release.name} starts {serve.release.workers} API"
            f" processes unless told otherwise, each with a tokenizer in memory"
        )
    return warnings


def server_settings(folder: str | os.PathLike[str], serve: ServeConfig) -> dict[str, object]:
    """The settings of FastDeploy's server for a serve config, as keys of a YAML file."""
    settings: dict[str, object] = {
        "model": str(folder),
        **four_ports(serve.port),
        "tensor_parallel_size": serve.tensor_parallel_size,
        "max_model_len": serve.max_model_len,
        "max_num_seqs": serve.max_num_seqs,
        "max_num_batched_tokens": serve.max_num_batched_tokens,
        "gpu_memory_utilization": serve.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
    }
    if serve.block_size != BLOCK_TOKENS:
        settings["block_size"] = serve.block_size
    if serve.release.commit:
        # Written out, because the default numbers differ between releases.
        settings["workers"] = serve.api_processes
        settings["max_concurrency"] = serve.api_requests
        # FastDeploy's other loader does not know WINT2 and passes such a checkpoint on to this one
        # by itself, but it would load a dense checkpoint wrongly.
        settings["load_choices"] = "default"
    return settings


def print_result(result: CheckResult, serve: ServeConfig, environment: Mapping[str, str]) -> None:
    """Print memory, warnings and problems, and the shell command that starts the server.

    Args:
        environment: variables of the command beside those that the result asks for.
    """
    start = ""
    if result.command:
        start = shown(result.command, {**environment, **result.environment})
    host = f"host memory while loading: about {gigabytes(result.host_bytes)}"
    engine_check.print_result(result, f"FastDeploy {serve.release.name}", start, [host])


def card_problems(cards: list[Card], ranks: int) -> list[str]:
    """Problems that keep this machine's own cards from serving on `ranks` of them."""
    problems = []
    if len(cards) < ranks:
        problems.append(f"cards on this machine: {len(cards)}, needed: {ranks}")
    for card in cards[:ranks]:
        if card.too_old:
            problems.append(f"{card.name}: compute capability {card.capability}, 8.0 is needed")
    return problems


def judge_machine(result: CheckResult, cards: list[Card], ranks: int) -> None:
    """Add the problems of this machine; one without cards is not the one that will serve."""
    if not cards:
        return
    result.problems += card_problems(cards, ranks)
    free = available_memory()
    if free is not None and free < result.host_bytes:
        result.warnings.append(
            f"{gigabytes(free)} of host memory are free, loading passes"
            f" {gigabytes(result.host_bytes)} through it"
        )


def build_parser() -> Arguments:
    """Limits of the server have the names of FastDeploy's own flags."""
    parser = Arguments("fastdeploy-check", __doc__)
    parser.subject("folder", "quantized checkpoint", "DIR")
    add = parser.add_argument
    add("--tensor-parallel-size", type=whole, default=1, metavar="N", help="cards (1)")
    add(
        "--gpu-memory",
        type=number,
        metavar="GIB",
        help="memory of one card as nvidia-smi reports it, in GiB (this machine's cards)",
    )
    add("--max-model-len", type=whole, help="tokens of a sequence (32768, or what the model has)")
    add("--max-num-seqs", type=whole, default=DEFAULT_SEQUENCES, help="sequences at once (128)")
    add("--max-num-batched-tokens", type=whole, help="tokens of one step (8192)")
    add("--gpu-memory-utilization", type=number, default=DEFAULT_UTILIZATION, help="(0.9)")
    add("--block-size", type=whole, default=BLOCK_TOKENS, help="tokens of a cache block (64)")
    add("--draft-tokens", type=whole, default=0, metavar="N", help="of speculative decoding (0)")
    add("--workers", type=whole, metavar="N", help="API processes (1; 2.6 and develop alone: 4)")
    add("--max-concurrency", type=whole, metavar="N", help="requests at once (the release's)")
    add("--plugin", action="store_true", default=None, help="our plugin will be loaded")
    add("--fastdeploy-version", metavar="X.Y", help=f"(the installed one, else {DEFAULT_RELEASE})")
    add("--port", type=whole, default=DEFAULT_PORT, help="first of four ports (8180)")
    add("--hash", action="store_true", help="compare sha256 with the manifest: reads everything")
    parser.json()
    return parser


def serve_config_from_arguments(args: argparse.Namespace, cards: list[Card]) -> ServeConfig:
    """The serve config of a command line; without --gpu-memory the smallest of `cards` counts.

    Raises:
        CcqError: without --gpu-memory where there is no card.
    """
    memory = args.gpu_memory
    if memory is None and not cards:
        raise CcqError("--gpu-memory: needed, since nvidia-smi finds no card here")
    smallest = min((card.memory for card in cards), default=0)
    length = args.max_model_len
    if length is None:
        length = default_length(Path(args.folder), max(1, args.block_size))
    batched = args.max_num_batched_tokens
    if batched is None:
        batched = min(DEFAULT_BATCHED_TOKENS, length * args.max_num_seqs)
    return ServeConfig(
        tensor_parallel_size=args.tensor_parallel_size,
        card_bytes=smallest if memory is None else card_bytes(memory),
        max_model_len=length,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=batched,
        gpu_memory_utilization=args.gpu_memory_utilization,
        release=release_of(args.fastdeploy_version),
        port=args.port,
        block_size=args.block_size,
        draft_tokens=args.draft_tokens,
        plugin=args.plugin,
        # The printed command names the number, so that it does not depend on the release.
        workers=1 if args.workers is None else args.workers,
        concurrency=args.max_concurrency,
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if FastDeploy can serve the checkpoint so, 1 if not, 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        write_json = reporting.json_writer(args)
        cards = find_cards() if args.gpu_memory is None else []
        serve = serve_config_from_arguments(args, cards)
        result = check(args.folder, serve, hashes=args.hash)
        judge_machine(result, cards, serve.tensor_parallel_size)
        print_result(result, serve, {})
        write_json(result.to_json())
        return 0 if result.good else 1

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
