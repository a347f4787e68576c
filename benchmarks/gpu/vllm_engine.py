# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine on a GPU: are its answers right, and how fast is it?

    python benchmarks/gpu/vllm_engine.py quality OUT.json FOLDER... [--text FILE] [--graphs]
    python benchmarks/gpu/vllm_engine.py speed OUT.json [--wint4-end-layer 6] [--layers 54]
    python benchmarks/gpu/vllm_engine.py linear OUT.json

`quality` scores text through the engine's prompt log-probabilities beside the float32 model of this
package; `speed` runs the 300B's shape with random weights; `linear` checks and times the product
with 8-bit weights. With vLLM and the GPU library; vllm_report.py makes the tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The engine in this process, so that its loader and its kernels can be reached.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

WINDOW, WINDOWS = 511, 24
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 32, 32, 64
# ERNIE-4.5-300B-A47B.
SHAPE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "vocab_size": 103424,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 54,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_bias": False,
    "tie_word_embeddings": False,
    "moe_num_experts": 64,
    "moe_k": 8,
    "moe_intermediate_size": 3584,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 3,
    "moe_layer_end_index": 53,
    "moe_layer_interval": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def windows_of(folder: Path, text: str) -> np.ndarray:
    """Tokens [WINDOWS, WINDOW] of a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False).ids
    return np.array(ids[: WINDOWS * WINDOW], np.int64).reshape(WINDOWS, WINDOW)


class Reference:
    """The embedded server's float32 model: exact weights, every position's logits."""

    def __init__(self, folder: Path) -> None:
        from paddle_ccq.checkpoint.reader import open_checkpoint
        from paddle_ccq.serving.engine_model import EngineModel

        self.model = EngineModel(open_checkpoint(folder), max_length=2048)

    def log_probabilities(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64 [n - 1] of each token given those before; [n] the likeliest token after each."""
        from paddle_ccq.serving.engine_model import rms_norm

        model = self.model
        cache = model.new_cache(len(tokens))
        places = np.array([(len(tokens), 0, cache.allocate(len(tokens)).start)], np.int64)
        x = model.embed(tokens)
        rope = model.cos[: len(tokens)], model.sin[: len(tokens)]
        for index, layer in enumerate(model.layers):
            x = layer(x, rope, places, cache.keys[index], cache.values[index])
        x = rms_norm(x, model.norm, model.config.rms_norm_eps)
        logits = (model.embed.logits(x) if model.head is None else model.head(x)).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits[np.arange(len(tokens) - 1), tokens[1:]], logits.argmax(axis=1)


def make_engine(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    defaults: dict[str, Any] = {"model": str(folder), "dtype": "bfloat16", "seed": 0}
    return LLM(**(defaults | options))


def drop_engine(engine: Any) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def engine_scores(engine: Any, windows: np.ndarray) -> np.ndarray:
    """float64 [WINDOWS, WINDOW - 1]: the engine's prompt log-probabilities."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": window.tolist()} for window in windows]
    answers = engine.generate(
        asked, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), use_tqdm=False
    )
    return np.array(
        [
            [
                found[token].logprob
                for token, found in zip(w[1:], a.prompt_logprobs[1:], strict=True)
            ]
            for w, a in zip(windows.tolist(), answers, strict=True)
        ]
    )


def greedy(engine: Any, windows: np.ndarray) -> list[list[int]]:
    from vllm import SamplingParams

    flat = windows.reshape(-1)
    starts = np.linspace(0, flat.size - PROMPT_TOKENS, PROMPTS).astype(int)
    asked = [{"prompt_token_ids": flat[s : s + PROMPT_TOKENS].tolist()} for s in starts]
    settings = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
    answers = engine.generate(asked, settings, use_tqdm=False)
    return [
        [*prompt["prompt_token_ids"], *answer.outputs[0].token_ids]
        for prompt, answer in zip(asked, answers, strict=True)
    ]


def greedy_agreement(reference: Reference, answers: list[list[int]]) -> float:
    """Share of the engine's greedy tokens that the reference would choose at the same place."""
    same = total = 0
    for tokens in answers:
        chosen = reference.log_probabilities(np.array(tokens))[1]
        own = np.array(tokens[PROMPT_TOKENS:])
        same += int((chosen[PROMPT_TOKENS - 1 : -1] == own).sum())
        total += own.size
    return same / total


def with_unsaid_rows(folder: Path, target: Path) -> Path:
    """A copy whose config.json does not say that its rows are in plain order: must fail."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["paddle_ccq"].pop("row_order")
    path.write_text(json.dumps(config))
    return target


def quality(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for folder in map(Path, arguments.folders):
        windows = windows_of(folder, arguments.text)
        reference = Reference(folder)
        expected = np.array([reference.log_probabilities(w)[0] for w in windows])
        options: dict[str, Any] = {
            "max_model_len": 1024,
            "enforce_eager": not arguments.graphs,
            "kv_cache_memory_bytes": 2 << 30,
            "gpu_memory_utilization": 0.2,
        }
        with tempfile.TemporaryDirectory() as scratch:
            cases = [(folder.name, folder, {})]
            if "plain" in folder.name:
                copy = with_unsaid_rows(folder, Path(scratch) / "control")
                cases.append((f"{folder.name}, control", copy, {}))
            if arguments.fp8:
                cases.append((f"{folder.name}, fp8 KV", folder, {"kv_cache_dtype": "fp8"}))
            for name, place, extra in cases:
                start = time.perf_counter()
                engine = make_engine(place, **options, **extra)
                found = engine_scores(engine, windows)
                answers = greedy(engine, windows)
                drop_engine(engine)
                del engine
                difference = np.abs(found - expected)
                results.append(
                    {
                        "name": name,
                        "graphs": arguments.graphs,
                        "nll": -found.mean(),
                        "reference": -expected.mean(),
                        "error": float((found - expected).std() / np.sqrt(found.size)),
                        "mean_difference": difference.mean(),
                        "greedy_agreement": greedy_agreement(reference, answers),
                        "seconds": time.perf_counter() - start,
                    }
                )
                print(json.dumps(results[-1]), flush=True)
    return results


def register_random() -> None:
    """A load format that fills every packed layer with random stored tensors, on the card."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("ccq_random")
    class RandomLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            return

        def load_weights(self, model: Any, model_config: Any) -> None:
            for module in model.modules():
                fill = getattr(getattr(module, "quant_method", None), "ccq_randomize", None)
                if fill is not None:
                    fill(module)
                    continue
                for name, parameter in module.named_parameters(recurse=False):
                    if "norm" in type(module).__name__.lower():
                        parameter.data.fill_(1)
                    elif parameter.is_floating_point():
                        parameter.data.normal_(0, 0.02)
                    elif name:
                        parameter.data.random_(0, 127)
            torch.cuda.synchronize()

    from paddle_ccq.vllm import dense, experts, gpu_experts

    def randomize_linear(method: Any, layer: Any) -> None:
        layer.ccq_weight.data.random_(0, 256)
        layer.ccq_scale.data.uniform_(1e-4, 3e-4)

    def randomize_wint2(method: Any, layer: Any) -> None:
        device = method.device()
        for expert in range(method.experts):
            for part in experts.PROJECTIONS:
                k, n = method.shape_of(part)
                byte = {"dtype": torch.uint8, "device": device}
                floats = {"dtype": torch.float32, "device": device}
                tensors = {
                    "quant_weight": torch.empty((k // 4, n), **byte).random_(0, 256),
                    "weight_scale": torch.empty((k // 128, n), **byte).random_(0, 256),
                    "super_scales": torch.full((n,), 2e-4, dtype=torch.bfloat16, device=device),
                    "code_scale": torch.full((n,), 127.0, **floats),
                    "code_zp": torch.full((n,), 40.0, **floats),
                }
                method.finish(layer, expert, part, tensors)

    def randomize_wint4(method: Any, layer: Any) -> None:
        for part in experts.PROJECTIONS:
            getattr(layer, f"ccq_{part}_weight").data.random_(0, 256)
            getattr(layer, f"ccq_{part}_scale").data.uniform_(1e-3, 3e-3)

    dense.Wint8LinearMethod.ccq_randomize = randomize_linear
    gpu_experts.Wint2ExpertsMethod.ccq_randomize = randomize_wint2
    gpu_experts.Wint4ExpertsMethod.ccq_randomize = randomize_wint4


def shape_folder(target: Path, layers: int, wint4_end: int) -> Path:
    """A folder with the config.json of the 300B's shape and nothing else."""
    from paddle_ccq.families.registry import read_config
    from paddle_ccq.targets.fastdeploy.config import output_config
    from paddle_ccq.targets.fastdeploy.layout import build_plan

    raw = dict(SHAPE, num_hidden_layers=layers, moe_layer_end_index=layers - 1)
    config = read_config(raw)
    plan = build_plan(config, format="wint2", wint4_end_layer=wint4_end)
    written = output_config(plan, {"row_order": plan.row_order})
    (target / "config.json").write_text(json.dumps(written))
    return target


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    from vllm import SamplingParams

    register_random()
    folder = shape_folder(Path(tempfile.mkdtemp()), arguments.layers, arguments.wint4_end_layer)
    start = time.perf_counter()
    engine = make_engine(
        folder,
        load_format="ccq_random",
        skip_tokenizer_init=True,
        max_model_len=9216,
        max_num_batched_tokens=8192,
        max_num_seqs=max(arguments.batches),
        gpu_memory_utilization=0.94,
        enable_prefix_caching=False,
        tensor_parallel_size=arguments.tensor_parallel_size,
    )
    result: dict[str, Any] = {
        "layers": arguments.layers,
        "wint4_end_layer": arguments.wint4_end_layer,
        "up_seconds": time.perf_counter() - start,
        "decode": {},
        "first_token": {},
    }
    random = np.random.default_rng(0)

    def run(batch: int, tokens: int, answer: int) -> float:
        asked = [
            {"prompt_token_ids": random.integers(10, 100000, tokens).tolist()} for _ in range(batch)
        ]
        settings = SamplingParams(
            max_tokens=answer, temperature=0, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        engine.generate(asked, settings, use_tqdm=False)
        return time.perf_counter() - begin

    run(1, 32, 16)
    for batch in arguments.batches:
        seconds = min(run(batch, 32, arguments.answer) for _ in range(2))
        result["decode"][batch] = batch * arguments.answer / seconds
        print("decode", batch, round(result["decode"][batch], 1), flush=True)
    for tokens in arguments.prompts:
        result["first_token"][tokens] = min(run(1, tokens, 1) for _ in range(3))
        print("first token", tokens, round(result["first_token"][tokens], 3), flush=True)
    if arguments.profile:
        for batch in (1, 32):
            print(
                f"kernels of batch {batch}\n{_kernels(lambda b=batch: run(b, 32, 16))}", flush=True
            )
    return result


def _kernels(work: Any) -> str:
    """The longest kernels of a run by the profiler, in microseconds."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    rows = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)[:22]
    return "\n".join(
        f"{e.device_time_total:10.0f} us {e.count:6d} x {e.device_time_total / e.count:8.1f}"
        f"  {e.key[:90]}"
        for e in rows
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("quality")
    one.add_argument("output")
    one.add_argument("folders", nargs="+")
    one.add_argument("--text", required=True)
    one.add_argument("--graphs", action="store_true", help="torch.compile and CUDA graphs")
    one.add_argument("--fp8", action="store_true", help="and with an fp8 KV cache")
    two = commands.add_parser("speed")
    two.add_argument("output")
    two.add_argument("--layers", type=int, default=54)
    two.add_argument("--wint4-end-layer", type=int, default=-1)
    two.add_argument("--tensor-parallel-size", type=int, default=1)
    two.add_argument("--answer", type=int, default=128)
    two.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    two.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096, 8192])
    two.add_argument("--profile", action="store_true")
    three = commands.add_parser("linear")
    three.add_argument("output")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    if arguments.command == "linear":
        from linear_w8 import measure

        result: Any = measure()
    else:
        result = (quality if arguments.command == "quality" else speed)(arguments)
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
