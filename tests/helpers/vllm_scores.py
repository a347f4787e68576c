# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's log-probabilities by vLLM on a processor, in this process.

    python tests/helpers/vllm_scores.py FOLDER TOKENS.npy SCORES.npy '{"tensor_parallel_size": 2}'

does so in a process of its own, which engines of several ranks need.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def found(folder: Path, tokens: np.ndarray, **options: object) -> np.ndarray:
    """float64 [n - 1]: of each token given those before."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from paddle_ccq.vllm.plugin import register

    register()
    engine = LLM(str(folder), max_model_len=256, enforce_eager=True, max_num_seqs=4, **options)
    asked = {"prompt_token_ids": tokens.tolist()}
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answer = engine.generate([asked], settings, use_tqdm=False)[0]
    del engine
    cleanup_dist_env_and_memory()
    pairs = zip(tokens[1:].tolist(), answer.prompt_logprobs[1:], strict=True)
    return np.array([entry[token].logprob for token, entry in pairs])


if __name__ == "__main__":
    source, tokens_file, scores_file, engine_options = sys.argv[1:]
    scores = found(Path(source), np.load(tokens_file), **json.loads(engine_options))
    np.save(scores_file, scores)
