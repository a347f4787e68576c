# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's log-probabilities by vLLM on a processor, in this process.

    python tests/helpers/vllm_scores.py FOLDER TOKENS.npy SCORES.npy '{"tensor_parallel_size": 2}'

does so in a process of its own, which engines of several ranks need. With "answer": N among the
options, the first half of the tokens is answered by N, likeliest first; SCORES.npy is then their
numbers and their log-probabilities, [2, N].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def generated(folder: Path, tokens: np.ndarray, asked: dict[str, Any], **options: Any) -> Any:
    """What the engine returns for a prompt, with SamplingParams of `asked`."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from paddle_ccq.vllm.plugin import register

    register()
    if options.get("attention_config", {}).get("mla_prefill_backend") == "CUSTOM":
        import vllm_mla  # of benchmarks/gpu

        vllm_mla.register()
    engine = LLM(str(folder), max_model_len=256, enforce_eager=True, max_num_seqs=4, **options)
    settings = SamplingParams(detokenize=False, **asked)
    prompt = {"prompt_token_ids": tokens.tolist()}
    answer = engine.generate([prompt], settings, use_tqdm=False)[0]
    del engine
    cleanup_dist_env_and_memory()
    return answer


def found(folder: Path, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """float64 [n - 1]: of each token given those before."""
    answer = generated(folder, tokens, {"max_tokens": 1, "prompt_logprobs": 0}, **options)
    pairs = zip(tokens[1:].tolist(), answer.prompt_logprobs[1:], strict=True)
    return np.array([entry[token].logprob for token, entry in pairs])


def answered(folder: Path, tokens: np.ndarray, count: int, **options: Any) -> np.ndarray:
    """float64 [2, count]: the tokens that follow, likeliest first, and their log-probabilities."""
    asked = {"max_tokens": count, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    answer = generated(folder, tokens, asked, **options).outputs[0]
    pairs = zip(answer.token_ids, answer.logprobs, strict=True)
    return np.array([(token, entry[token].logprob) for token, entry in pairs]).T


if __name__ == "__main__":
    source, tokens_file, scores_file, engine_options = sys.argv[1:]
    chosen = json.loads(engine_options)
    prompt = np.load(tokens_file)
    if count := chosen.pop("answer", 0):
        np.save(scores_file, answered(Path(source), prompt[: len(prompt) // 2], count, **chosen))
    else:
        np.save(scores_file, found(Path(source), prompt, **chosen))
