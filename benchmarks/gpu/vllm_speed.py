# SPDX-License-Identifier: Apache-2.0
"""How fast vLLM serves a shape with random weights, what a step consists of, a card's memory."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vllm_profile import EXTENSION, step_of

PROMPT = 32  # tokens before what is decoded
HIGHEST = 100_000  # token of the random prompts
# Latent attention without vLLM's own kernels (vllm_mla.py), and without being latent at all.
LATENT = {
    "torch": {"backend": "TRITON_MLA", "mla_prefill_backend": "CUSTOM"},
    "none": {"backend": "TRITON_ATTN"},
}


def make_engine(folder: Path, arguments: argparse.Namespace) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {
        "model": str(folder),
        "dtype": "bfloat16",
        "seed": 0,
        "load_format": arguments.load_format,
        "skip_tokenizer_init": True,
        "max_model_len": arguments.batched_tokens + 1024,
        "max_num_batched_tokens": arguments.batched_tokens,
        "max_num_seqs": max(arguments.batches),
        "gpu_memory_utilization": 0.94,
        "enable_prefix_caching": False,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "pipeline_parallel_size": arguments.pipeline_parallel_size,
        "enable_expert_parallel": arguments.enable_expert_parallel,
        "worker_extension_cls": EXTENSION,
    }
    if arguments.kv_bytes:  # the other is what must be free at the start
        options |= {"kv_cache_memory_bytes": arguments.kv_bytes, "gpu_memory_utilization": 0.05}
    if arguments.latent_attention in LATENT:
        options["attention_config"] = LATENT[arguments.latent_attention]
    if arguments.few_graphs:  # of the measured sizes alone: a quicker start
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted(arguments.batches)}
    if arguments.peer and arguments.moe_backend == "triton":
        options["quantization"] = "moe_wna16"  # the Triton experts are a method of their own
    elif arguments.peer:
        options["moe_backend"] = arguments.moe_backend
    return LLM(**options)


class Runner:
    """Whole calls of generate, with random prompts."""

    def __init__(self, engine: Any, highest: int = HIGHEST) -> None:
        self.engine = engine
        self.highest = highest
        self.random = np.random.default_rng(0)

    def __call__(self, batch: int, tokens: int, answer: int) -> float:
        """Seconds of one call."""
        from vllm import SamplingParams

        asked = [
            {"prompt_token_ids": self.random.integers(10, self.highest, tokens).tolist()}
            for _ in range(batch)
        ]
        settings = SamplingParams(
            max_tokens=answer, temperature=0, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        self.engine.generate(asked, settings, use_tqdm=False)
        return time.perf_counter() - begin

    def profile(self, batch: int, tokens: int, answer: int) -> dict[str, Any]:
        """One step of a call on every rank (vllm_profile.step_of)."""
        self.engine.collective_rpc("ccq_profile_start")
        self(batch, tokens, answer)
        return step_of(self.engine.collective_rpc("ccq_profile_stop"))


# Of the arguments those that are no part of a result.
_OWN = ("command", "output", "batches", "prompts", "folder", "profile", "profile_prompts", "again")


def start(arguments: argparse.Namespace) -> tuple[Runner, dict[str, Any]]:
    """An engine of the shape, or of a folder, and the beginning of its result."""
    import vllm_random
    import vllm_shapes

    if arguments.latent_attention == "none":
        os.environ["VLLM_MLA_DISABLE"] = "1"
    if arguments.latent_attention == "torch":
        os.environ[vllm_random.LATENT] = "1"
    vllm_random.use_in_all_processes()
    shape = vllm_shapes.SHAPES[arguments.shape]
    arguments.layers = arguments.layers or shape.layers
    folder = arguments.folder or vllm_shapes.shape_folder(
        Path(tempfile.mkdtemp()),
        arguments.layers,
        arguments.wint4_end_layer,
        arguments.peer,
        arguments.shape,
    )
    begin = time.perf_counter()
    run = Runner(make_engine(Path(folder), arguments), min(HIGHEST, shape.raw["vocab_size"]))
    result = {k: v for k, v in vars(arguments).items() if k not in _OWN}
    return run, result | {"up_seconds": time.perf_counter() - begin}


def speed(arguments: argparse.Namespace, save: Callable[[Any], None]) -> dict[str, Any]:
    """All measurements, saved after each."""
    run, result = start(arguments)
    result |= {"decode": {}, "step": {}, "first_token": {}}
    result["memory"] = run.engine.collective_rpc("ccq_memory")
    print("up", round(result["up_seconds"], 1), result["memory"], flush=True)
    save(result)
    if gate := os.environ.get("CCQ_BENCH_GATE"):  # one of several that started together measures
        turn = open(gate, "w")  # noqa: SIM115 (locked until this process ends)
        fcntl.flock(turn, fcntl.LOCK_EX)
    run(1, PROMPT, 16)
    for batch in arguments.batches:
        long = min(run(batch, PROMPT, arguments.answer) for _ in range(2))
        short = min(run(batch, PROMPT, 1) for _ in range(2))
        result["decode"][batch] = batch * arguments.answer / long
        # Without the prompts' part: what a client sees between two tokens.
        result["step"][batch] = (long - short) / (arguments.answer - 1)
        rate, step = result["decode"][batch], result["step"][batch] * 1e3
        print(f"decode {batch}: {rate:.1f} tokens/s, a step {step:.2f} ms", flush=True)
        save(result)
    for tokens in arguments.prompts:
        result["first_token"][tokens] = min(run(1, tokens, 1) for _ in range(3))
        print("first token", tokens, round(result["first_token"][tokens], 3), flush=True)
        save(result)
    for setting in arguments.again:  # read at each call, and no part of a CUDA graph of these sizes
        name, _, value = setting.partition("=")
        before = run.engine.collective_rpc("ccq_set", args=(name, int(value)))[0]
        found = {n: min(run(1, n, 1) for _ in range(3)) for n in arguments.prompts}
        result.setdefault("first_token_with", {})[setting] = found
        run.engine.collective_rpc("ccq_set", args=(name, before))
        print("first token with", setting, found, flush=True)
        save(result)
    result["memory"] = run.engine.collective_rpc("ccq_memory")
    looked = {"profile": (arguments.profile, lambda n: run.profile(n, PROMPT, 12))}
    looked["profile_prompts"] = (arguments.profile_prompts, lambda n: run.profile(1, n, 1))
    for name, (sizes, work) in looked.items():
        for size in sizes:
            found = work(size)
            result.setdefault(name, {})[size] = found
            shown = found["summary"] | {"collectives": found["collectives"]}
            print(name, size, json.dumps(shown), flush=True)
            save(result)
    return result
