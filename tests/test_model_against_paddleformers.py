# SPDX-License-Identifier: Apache-2.0
"""Logits against PaddleFormers' own ERNIE-4.5 where that is installed (it is not a dependency).

To run: in a separate environment, `pip install --no-deps paddleformers==1.2.0`, then
`pip install paddlepaddle==3.3.1 transformers==5.3.0 colorlog ml_dtypes omegaconf requests jinja2
aistudio-sdk setuptools safetensors rich tqdm pytest`.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from helpers.synthetic import tiny_config, write_checkpoint

paddle = pytest.importorskip("paddle")
pytest.importorskip("paddleformers")

from paddle_ccq.checkpoint.reader import open_checkpoint  # noqa: E402
from paddle_ccq.models.ernie import Ernie  # noqa: E402


def experts_on_cpu(block, x, *_, **__):
    """PaddleFormers' MoE layer without its dispatch operators, which exist for GPUs only.

    Every expert runs on every token here; the routing and the experts are PaddleFormers' own.
    """
    flat = x.reshape([-1, x.shape[-1]])
    scores = paddle.matmul(flat.astype("float32"), block.gate.weight.astype("float32"))
    scores = paddle.nn.functional.softmax(scores, axis=-1)
    _, chosen = paddle.topk(scores + block.moe_statics.e_score_correction_bias[0], block.top_k)
    mask = paddle.nn.functional.one_hot(chosen, scores.shape[-1]).sum(axis=1)
    routing_weights = scores * mask
    routing_weights = routing_weights / routing_weights.sum(axis=-1, keepdim=True)
    outputs = [
        expert(flat) * routing_weights[:, i : i + 1] for i, expert in enumerate(block.experts)
    ]
    total = sum(outputs)
    if block.shared_experts is not None:
        total = total + block.shared_experts(flat)
    return total.reshape(x.shape), None, None, scores


@pytest.mark.parametrize(
    "overrides",
    [{}, {"moe_num_shared_experts": 0}, {"moe_num_shared_experts": 2}, {"num_key_value_heads": 1}],
    ids=["shared expert", "no shared expert", "two shared experts", "one key head"],
)
def test_logits_equal(tmp_path, monkeypatch, overrides):
    try:
        theirs = importlib.import_module("paddleformers.transformers.ernie4_5_moe.modeling")
    except ImportError as error:
        pytest.skip(f"this PaddleFormers does not import: {error}")
    if not hasattr(theirs, "Ernie4_5_MoeSparseMoeBlock"):
        pytest.skip("this PaddleFormers is laid out differently from 1.2.0")
    monkeypatch.setattr(theirs.Ernie4_5_MoeSparseMoeBlock, "forward", experts_on_cpu)
    write_checkpoint(tmp_path, tiny_config(**overrides), dtype="f32")
    config = theirs.Ernie4_5_MoeConfig.from_pretrained(str(tmp_path))
    # No multi-token-prediction block in the files, and no fused norm kernel for the CPU.
    config.num_nextn_predict_layers, config.fuse_rms_norm = 0, False
    model = theirs.Ernie4_5_MoeForCausalLM.from_pretrained(
        str(tmp_path), config=config, dtype="float32"
    )
    model.eval()
    tokens = paddle.to_tensor(np.random.default_rng(0).integers(3, 259, (2, 60)))
    with paddle.no_grad():
        expected = model(tokens)
    expected = expected[0] if isinstance(expected, (tuple, list)) else expected
    expected = getattr(expected, "logits", expected).numpy()
    ours = Ernie(open_checkpoint(tmp_path))
    result = ours.logits(ours.hidden_states(tokens)).numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(result, expected, atol=1e-4, rtol=1e-4)
