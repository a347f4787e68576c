# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine on a GPU: are its answers right, and how fast is it?

    python benchmarks/gpu/vllm_engine.py score SCORES.npz FOLDER... --text FILE [--graphs] [--fp8]
    python benchmarks/gpu/vllm_engine.py quality OUT.json SCORES.npz... --folders F... --text FILE
    python benchmarks/gpu/vllm_engine.py speed OUT.json [--shape deepseek-v3] [--peer]
    python benchmarks/gpu/vllm_engine.py linear OUT.json
    python benchmarks/gpu/vllm_engine.py products OUT.json

`score` has text scored by the engine's prompt log-probabilities, and lets it answer; `quality`,
which needs no GPU, sets them beside the float32 model of this package; `speed` runs a shape with
random weights (vllm_speed.py; vllm_scale.py does so for many numbers of cards); `linear` checks and
times the product with 8-bit weights (linear_w8.py), `products` times wint4 experts and the router
(vllm_products.py). With vLLM and the GPU library; vllm_report.py makes the tables.
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
from vllm_shapes import DEFAULT, SHAPES

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
WINDOW, WINDOWS = 511, 24
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 32, 32, 64


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


def score(arguments: argparse.Namespace) -> None:
    """Of each case its log-probabilities and answers, saved after each."""
    # Engines one after another, each gone before the next: in this process.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    saved: dict[str, np.ndarray] = {}
    for folder in map(Path, arguments.folders):
        windows = windows_of(folder, arguments.text)
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
                key = name + (", graphs" if arguments.graphs else "")
                saved[f"{key}/scores"] = engine_scores(engine, windows)
                saved[f"{key}/answers"] = np.array(greedy(engine, windows))
                drop_engine(engine)
                del engine
                np.savez(arguments.output, **saved)
                print(key, round(time.perf_counter() - start, 1), "s", flush=True)


def quality(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What `score` has saved, beside the reference."""
    folders = {Path(folder).name: Path(folder) for folder in arguments.folders}
    references: dict[str, tuple[Reference, np.ndarray]] = {}
    results = []
    for path in arguments.scores:
        with np.load(path) as file:
            saved = dict(file)
        for key in (name.removesuffix("/scores") for name in saved if name.endswith("/scores")):
            stem = key.split(",")[0]
            if stem not in references:
                reference = Reference(folders[stem])
                windows = windows_of(folders[stem], arguments.text)
                expected = [reference.log_probabilities(w)[0] for w in windows]
                references[stem] = reference, np.array(expected)
            reference, wanted = references[stem]
            found = saved[f"{key}/scores"]
            results.append(
                {
                    "name": key.removesuffix(", graphs"),
                    "graphs": key.endswith(", graphs"),
                    "nll": -found.mean(),
                    "reference": -wanted.mean(),
                    "error": float((found - wanted).std() / np.sqrt(found.size)),
                    "mean_difference": np.abs(found - wanted).mean(),
                    "greedy_agreement": greedy_agreement(
                        reference, saved[f"{key}/answers"].tolist()
                    ),
                }
            )
            print(json.dumps(results[-1]), flush=True)
    return results


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    zero = commands.add_parser("quality")
    zero.add_argument("output")
    zero.add_argument("scores", nargs="+")
    zero.add_argument("--folders", nargs="+", required=True, help="those that were scored")
    zero.add_argument("--text", required=True)
    one = commands.add_parser("score")
    one.add_argument("output")
    one.add_argument("folders", nargs="+")
    one.add_argument("--text", required=True)
    one.add_argument("--graphs", action="store_true", help="torch.compile and CUDA graphs")
    one.add_argument("--fp8", action="store_true", help="and with an fp8 KV cache")
    two = commands.add_parser("speed")
    two.add_argument("output")
    two.add_argument("--folder", help="a checkpoint instead of random weights")
    two.add_argument("--load-format", default="ccq_random")
    two.add_argument("--shape", choices=list(SHAPES), default=DEFAULT)
    two.add_argument("--layers", type=int, help="the first of them alone")
    two.add_argument(
        "--latent-attention",
        choices=["vllm", "torch", "none"],
        default="vllm",
        help="kernels of DeepSeek-V3's: vLLM's, Triton and PyTorch, or as heads of full size",
    )
    two.add_argument("--wint4-end-layer", type=int, default=-1)
    two.add_argument("--tensor-parallel-size", type=int, default=1)
    two.add_argument("--pipeline-parallel-size", type=int, default=1)
    two.add_argument("--enable-expert-parallel", action="store_true")
    two.add_argument("--peer", action="store_true", help="4 bits in place of ours")
    two.add_argument("--moe-backend", default="humming", help="of the 4 bits, triton too")
    two.add_argument("--answer", type=int, default=128)
    two.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    two.add_argument("--prompts", type=int, nargs="*", default=[1024, 4096, 8192])
    two.add_argument("--kv-bytes", type=int, help="of the KV cache; for engines side by side")
    two.add_argument("--batched-tokens", type=int, default=8192, help="of a step, and of a text")
    two.add_argument("--few-graphs", action="store_true", help="CUDA graphs of --batches alone")
    two.add_argument("--profile", type=int, nargs="*", default=[], help="batches to look into")
    two.add_argument("--profile-prompts", type=int, nargs="*", default=[], help="prompts likewise")
    two.add_argument(
        "--again",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="first tokens once more with this number in paddle_ccq.vllm.torch_ops",
    )
    for name in ("linear", "products"):
        commands.add_parser(name).add_argument("output")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parse(argv)

    def save(result: Any) -> None:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")

    if arguments.command == "linear":
        from linear_w8 import measure

        save(measure())
    elif arguments.command == "products":
        from vllm_products import measure

        save(measure())
    elif arguments.command == "speed":
        from vllm_speed import speed

        save(speed(arguments, save))
    elif arguments.command == "score":
        score(arguments)
    else:
        save(quality(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
