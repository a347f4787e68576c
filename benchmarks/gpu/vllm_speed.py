# SPDX-License-Identifier: Apache-2.0
"""How fast vLLM serves the 300B's shape with random weights, and what a step consists of."""

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

PROMPT = 32  # tokens before what is decoded


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
    }
    if arguments.kv_bytes:
        options |= {"kv_cache_memory_bytes": arguments.kv_bytes, "gpu_memory_utilization": 0.3}
    if arguments.few_graphs:  # of the measured sizes alone: a quicker start
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted(arguments.batches)}
    if arguments.peer and arguments.moe_backend == "triton":
        options["quantization"] = "moe_wna16"  # the Triton experts are a method of their own
    elif arguments.peer:
        options["moe_backend"] = arguments.moe_backend
    return LLM(**options)


class Runner:
    """Whole calls of generate, with random prompts."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.random = np.random.default_rng(0)

    def __call__(self, batch: int, tokens: int, answer: int) -> float:
        """Seconds of one call."""
        from vllm import SamplingParams

        asked = [
            {"prompt_token_ids": self.random.integers(10, 100000, tokens).tolist()}
            for _ in range(batch)
        ]
        settings = SamplingParams(
            max_tokens=answer, temperature=0, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        self.engine.generate(asked, settings, use_tqdm=False)
        return time.perf_counter() - begin


def speed(arguments: argparse.Namespace, save: Callable[[Any], None]) -> dict[str, Any]:
    """All measurements, saved after each."""
    if arguments.profile or arguments.profile_prompts or arguments.again:
        # The profiler sees the kernels, and a setting reaches the products, of its own process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm_random

    vllm_random.use_in_all_processes()
    folder = arguments.folder or vllm_random.shape_folder(
        Path(tempfile.mkdtemp()), arguments.layers, arguments.wint4_end_layer, arguments.peer
    )
    start = time.perf_counter()
    run = Runner(make_engine(Path(folder), arguments))
    others = ("command", "output", "batches", "prompts", "folder", "profile", "profile_prompts")
    others += ("again",)
    result: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k not in others}
    result |= {"up_seconds": time.perf_counter() - start, "decode": {}, "step": {}}
    result["first_token"] = {}
    print("up", round(result["up_seconds"], 1), flush=True)
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
        from paddle_ccq.vllm import torch_ops

        name, _, value = setting.partition("=")
        before = getattr(torch_ops, name)
        setattr(torch_ops, name, int(value))
        found = {n: min(run(1, n, 1) for _ in range(3)) for n in arguments.prompts}
        result.setdefault("first_token_with", {})[setting] = found
        setattr(torch_ops, name, before)
        print("first token with", setting, found, flush=True)
        save(result)
    looked = {"profile": (arguments.profile, lambda n: run(n, PROMPT, 12))}
    looked["profile_prompts"] = (arguments.profile_prompts, lambda n: run(1, n, 1))
    for name, (sizes, work) in looked.items():
        for size in sizes:
            from vllm_profile import profile_step

            found = profile_step(lambda work=work, size=size: work(size))
            result.setdefault(name, {})[size] = found
            print(name, size, json.dumps(found["summary"]), flush=True)
            save(result)
    return result
