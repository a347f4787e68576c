# SPDX-License-Identifier: Apache-2.0
"""The statistics are not those of the model's activations, or depend on the machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest

from helpers import reference_ernie
from helpers.synthetic import tiny_config
from paddle_ccq.calibration import sequential_forward
from paddle_ccq.calibration.hessian import hessian_sum, shrink
from paddle_ccq.calibration.settings import CalibrationSettings, parse_tokens
from paddle_ccq.calibration.statistics import Statistics
from paddle_ccq.calibration.text import CalibrationText, read_calibration_text
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.models.ernie import Ernie, rms_norm
from paddle_ccq.models.weights import OverriddenWeights

CONFIG = tiny_config()
EXPERT = "ernie.layers.{}.mlp.experts.{}.{}.weight"


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    return tiny_model(CONFIG)


@pytest.fixture(scope="module")
def text() -> CalibrationText:
    rng = np.random.default_rng(0)
    windows = tuple(rng.integers(3, 320, 24) for _ in range(3))
    return CalibrationText("text.jsonl", "0" * 64, windows)


def statistics(weights, text, threads=1, **settings) -> Statistics:
    return Statistics(weights, text, CalibrationSettings(**settings), threads)


@pytest.fixture(scope="module")
def recorded(folder, text) -> dict[str, list[tuple[np.ndarray, np.ndarray, float]]]:
    """Expert -> MLP input, down projection's input, routing weight of each of its tokens."""
    checkpoint = open_checkpoint(folder)
    weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    found: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}

    def mixture(config, w, name, token):
        p = reference_ernie.softmax(token @ w[f"{name}.gate.weight"])
        preference = p + w[f"{name}.moe_statics.e_score_correction_bias"][0]
        chosen = np.argsort(-preference)[: config["moe_k"]]
        for e in chosen:
            gate, up = np.split(token @ w[f"{name}.experts.{e}.up_gate_proj.weight"], 2)
            inner = gate / (1 + np.exp(-gate)) * up
            entry = (token, inner, p[e] / p[chosen].sum())
            found.setdefault(f"{name}.experts.{e}", []).append(entry)
        return original(config, w, name, token)

    original = reference_ernie.mixture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_ernie, "mixture", mixture)
        for window in text.windows:
            reference_ernie.logits(CONFIG, weights, window.tolist())
    return found


@pytest.mark.parametrize("weighted", ["router", "equal"])
@pytest.mark.parametrize("shrinkage", [0, 256])
def test_hessians_are_those_of_an_independent_forward(folder, text, recorded, weighted, shrinkage):
    found = statistics(
        open_checkpoint(folder), text, token_weights=weighted, shrinkage_tokens=shrinkage
    )
    for layer in (1, 2):
        for expert in range(4):
            for part, projection in enumerate(("up_gate_proj", "down_proj")):
                sums, counts = [], []
                for e in range(4):
                    seen = recorded[f"ernie.layers.{layer}.mlp.experts.{e}"]
                    x = np.stack([s[part] * (s[2] if weighted == "router" else 1) for s in seen])
                    sums.append(x.T @ x)
                    counts.append(len(seen))
                pooled = sum(sums) / sum(counts) * shrinkage
                expected = (sums[expert] + pooled) / (counts[expert] + shrinkage)
                got = found.hessian(EXPERT.format(layer, expert, projection))
                assert got.tokens == counts[expert]
                np.testing.assert_allclose(got.matrix, expected, atol=2e-5 * np.abs(expected).max())
    found.close()


def test_walking_layer_by_layer_is_running_the_model(folder, text):
    checkpoint = open_checkpoint(folder)
    forward = sequential_forward.SequentialForward(checkpoint, text.windows, threads=2)
    for _ in range(3):
        forward.enter()
        forward.leave()
    model = Ernie(checkpoint)
    for (first, last), window in zip(forward.spans, text.windows, strict=True):
        expected = model.hidden_states(paddle.to_tensor(window).unsqueeze(0))[0].numpy()
        states = paddle.to_tensor(forward.states[first:last])
        got = rms_norm(states, model.norm, CONFIG["rms_norm_eps"]).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-5)
    forward.close()


def test_threads_and_spilling_change_nothing(folder, text, tmp_path, monkeypatch):
    name = EXPERT.format(2, 1, "down_proj")
    expected = statistics(open_checkpoint(folder), text, threads=1).hessian(name).matrix
    monkeypatch.setattr(sequential_forward, "MEMORY_FOR_STATES", 0)
    spilled = Statistics(open_checkpoint(folder), text, CalibrationSettings(), 3, tmp_path)
    np.testing.assert_array_equal(spilled.hessian(name).matrix, expected)
    assert isinstance(spilled._forward.inputs, np.memmap)
    assert list(tmp_path.iterdir()) == []
    spilled.close()


def test_an_expert_without_tokens_has_no_statistics(folder, text):
    checkpoint = open_checkpoint(folder)
    name = "ernie.layers.1.mlp.moe_statics.e_score_correction_bias"
    bias = np.array([[0, 0, 0, -5.0]], np.float32)
    found = statistics(OverriddenWeights(checkpoint, {name: bias}), text)
    for projection in ("up_gate_proj", "down_proj"):
        assert found.hessian(EXPERT.format(1, 3, projection)).matrix is None
        assert found.hessian(EXPERT.format(1, 3, projection)).tokens == 0
        assert found.hessian(EXPERT.format(1, 2, projection)).matrix is not None
    assert found.hessian("ernie.layers.1.mlp.shared_experts.down_proj.weight") is None
    assert found.hessian("ernie.layers.0.mlp.down_proj.weight") is None


def test_damaged_weights_are_said_and_layers_only_go_forward(folder, text):
    checkpoint = open_checkpoint(folder)
    name = "ernie.layers.0.post_attention_layernorm.weight"
    damaged = OverriddenWeights(checkpoint, {name: np.full(128, np.nan, np.float32)})
    with pytest.raises(CcqError, match="layer 0 are not finite"):
        statistics(damaged, text).hessian(EXPERT.format(1, 0, "up_gate_proj"))
    found = statistics(checkpoint, text)
    found.hessian(EXPERT.format(2, 0, "up_gate_proj"))
    with pytest.raises(ValueError, match="asked for after"):
        found.hessian(EXPERT.format(1, 0, "up_gate_proj"))


def test_hessian_sum_over_many_parts(monkeypatch):
    from paddle_ccq.calibration import hessian

    x = np.random.default_rng(0).standard_normal((300, 96)).astype(np.float32)
    monkeypatch.setattr(hessian, "TOKENS_A_PART", 64)
    monkeypatch.setattr(hessian, "ROWS_A_TASK", 40)
    got = hessian_sum(x)
    np.testing.assert_allclose(got, x.astype(np.float64).T @ x, atol=1e-3)
    np.testing.assert_array_equal(got, got.T)


def test_shrinkage_matters_only_where_tokens_are_few():
    own, pool = np.eye(2) * 10.0, np.ones((2, 2)) * 1000
    np.testing.assert_allclose(shrink(own, 10, pool, 1000, 0), np.eye(2))
    few = shrink(own, 10, pool, 1000, 256)
    np.testing.assert_allclose(few, (np.eye(2) * 10 + 256) / 266)


# --- text ---------------------------------------------------------------------------------------


def test_text_is_cut_into_windows_and_described_without_its_place(folder, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "abc" * 100}) + "\n" for _ in range(10)))
    settings = CalibrationSettings(tokens=1024, window=4096)
    text = read_calibration_text(path, open_checkpoint(folder), settings)
    # No window is longer than the model's positions.
    assert [w.size for w in text.windows] == [256] * 4
    described = text.as_dict(settings)
    assert described["tokens_used"] == 1024 and described["window"] == 256
    assert len(described["text_sha256"]) == 64 and str(tmp_path) not in json.dumps(described)


def test_numbers_of_tokens():
    assert [parse_tokens(t) for t in ("65536", "64k", "1M", 7)] == [65536, 65536, 1048576, 7]
    for bad in ("", "0", "-4", "1.5k", "many"):
        with pytest.raises(CcqError, match="--calibration-tokens"):
            parse_tokens(bad)
