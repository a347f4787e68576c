# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every format through a real vLLM, on a processor; where one is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from helpers.vllm_scores import found
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.quantize import main

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ernie-45-moe-3m"
RULES = {
    "bf16": "- {match: '*self_attn.o_proj', format: bf16}\n",
    "list": "- {match: 'ernie.layers.3.mlp.experts.*', format: wint4}\n",
}
CASES = {
    "wint2": [],
    "plain": ["--fastdeploy-layout", "2.0"],
    "prefix": ["--wint4-end-layer", "2"],
    "list": ["--allow-plugin-layout"],
    "bf16": [],
    "ccq-2t": ["--format", "ccq-2t"],
    "ccq-2.5": ["--format", "ccq-2.5"],
    "ccq-2.75": ["--format", "ccq-2.75"],
}
# bfloat16 activations move a token's log-probability by 0.02 on average.
NLL, EACH = 0.02, 0.06


def text(count: int) -> np.ndarray:
    """Tokens of real text: among random ones the router is undecided, and bfloat16 decides."""
    from tokenizers import Tokenizer

    sample = EXAMPLE.parent / "data" / "public-domain-sample.txt"
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    ids = tokenizer.encode(sample.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return np.array(ids[:count], np.int64)


def expected(folder: Path, tokens: np.ndarray) -> np.ndarray:
    from paddle_ccq.serving.engine_model import EngineModel, Piece

    model = EngineModel(open_checkpoint(folder), max_length=1024)
    cache = model.new_cache(len(tokens))
    region = cache.allocate(len(tokens))
    rows = []
    for i, token in enumerate(tokens[:-1]):
        logits = model.forward([Piece([int(token)], i, region)], cache)[0].astype(np.float64)
        logits -= logits.max()
        rows.append(logits[tokens[i + 1]] - np.log(np.exp(logits).sum()))
    return np.array(rows)


@pytest.mark.parametrize("case", list(CASES))
def test_the_engine_scores_as_the_float32_model(case: str, tmp_path: Path) -> None:
    output, options = tmp_path / "out", list(CASES[case])
    if case in RULES:
        rules = tmp_path / "rules.yaml"
        rules.write_text(RULES[case])
        options += ["--rules", str(rules)]
    model = ["--model", str(EXAMPLE), "--output", str(output), "--quiet", "--preset", "fast"]
    assert main([*model, *options]) == 0
    tokens = text(128)
    wanted, own = expected(output, tokens), found(output, tokens)
    assert abs(own.mean() - wanted.mean()) < NLL
    assert np.abs(own - wanted).mean() < EACH


def test_biases_shared_experts_and_an_own_head(tmp_path: Path) -> None:
    """A random model whose routers have large biases, which change what is chosen."""
    model, output = tmp_path / "model", tmp_path / "out"
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 512}
    write_checkpoint(model, tiny_config(head_dim=64, tie_word_embeddings=False, **sizes))
    options = ["--quiet", "--preset", "fast", "--wint4-end-layer", "1"]
    assert main(["--model", str(model), "--output", str(output), *options]) == 0
    tokens = np.random.default_rng(3).integers(3, 319, 96)
    own = found(output, tokens, skip_tokenizer_init=True)
    # A bias left out moves each by 0.13, the shared experts by 0.46.
    assert np.abs(own - expected(output, tokens)).mean() < 0.03


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_experts(tied: bool, tmp_path: Path) -> None:
    """All linear layers are wint8, the class is another one."""
    model, output = tmp_path / "model", tmp_path / "out"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_num_experts": 0}
    write_checkpoint(model, tiny_config(head_dim=64, tie_word_embeddings=tied, **sizes))
    assert main(["--model", str(model), "--output", str(output), "--quiet"]) == 0
    tokens = np.random.default_rng(3).integers(3, 319, 96)
    own, wanted = found(output, tokens, skip_tokenizer_init=True), expected(output, tokens)
    # A head tied to this embedding has logits in the hundreds, in bfloat16 by steps of one.
    assert np.abs(own - wanted).mean() < 0.005 * np.abs(wanted).mean()
