# SPDX-License-Identifier: Apache-2.0
"""Tuning: a wrong gradient, one that depends on threads, or a loss that is not the KL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest

from helpers import reference_ernie
from helpers.configs import TIED_AND_UNTIED
from helpers.synthetic import write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.models.ernie import Ernie
from paddle_ccq.models.gradients import FACTORS, WHOLE, Pass, loss_of

LENGTH = 9


@pytest.fixture(scope="module", params=TIED_AND_UNTIED, ids=["tied", "untied"])
def case(request, tmp_path_factory):
    """Config, weights, model, tokens, and final states of a made-up teacher."""
    config = request.param
    folder = tmp_path_factory.mktemp("model")
    weights = write_checkpoint(folder, config)
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, config["vocab_size"], LENGTH)
    teacher = rng.standard_normal((LENGTH, config["hidden_size"])).astype(np.float32)
    return config, weights, Ernie(open_checkpoint(folder)), tokens, teacher * 0.3


def exact_loss(config: dict, weights: dict, tokens: np.ndarray, teacher: np.ndarray) -> float:
    """The KL in float64, from the independent forward pass."""

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    head = weights.get("lm_head.weight", weights["ernie.embed_tokens.weight"].T)
    p = log_softmax(teacher.astype(np.float64) @ head.astype(np.float64))
    q = log_softmax(reference_ernie.logits(config, weights, tokens.tolist()))
    return float((np.exp(p) * (p - q)).sum())


def tunable(weights: dict) -> list[str]:
    return [n for n in weights if n.endswith(("norm.weight", "gate.weight", "_proj.weight"))]


def test_the_loss_is_the_kl_divergence(case):
    config, weights, model, tokens, teacher = case
    expected = exact_loss(config, weights, tokens, teacher)
    assert loss_of(model, tokens, teacher) == pytest.approx(expected, rel=1e-4)
    assert Pass(model, {}).run(tokens, teacher) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [WHOLE, FACTORS])
def test_gradients_are_the_slopes_of_the_float64_loss(case, kind):
    config, weights, model, tokens, teacher = case
    rng = np.random.default_rng(2)
    names = [n for n in tunable(weights) if kind == WHOLE or n.endswith("_proj.weight")]
    window_pass = Pass(model, dict.fromkeys(names, kind))
    window_pass.run(tokens, teacher)
    # Layer 1 has experts, layer 0 is dense, layer 2 has both behind it.
    seen = 0
    for name in names:
        if name not in window_pass.gradients:
            assert ".experts." in name  # one that no token went to
            continue
        weight = weights[name].astype(np.float64)
        shape = weight.shape[-1:] if kind == FACTORS else weight.shape
        direction = rng.standard_normal(shape)
        step = 1e-5

        def loss(sign: int, name=name, weight=weight, direction=direction, step=step) -> float:
            move = sign * step * direction
            moved = weight * np.exp(move) if kind == FACTORS else weight + move
            return exact_loss(config, {**weights, name: moved}, tokens, teacher)

        if name.endswith("qkv_proj.weight"):
            columns = model.blocks[int(name.split(".")[2])].attention.columns
            in_model = direction[..., columns]
        else:
            in_model = direction
        slope = (loss(1) - loss(-1)) / (2 * step)
        found = float((window_pass.gradients[name].astype(np.float64) * in_model).sum())
        size = np.linalg.norm(window_pass.gradients[name]) * np.linalg.norm(in_model)
        assert abs(found - slope) < 1e-4 * size, name
        seen += 1
    assert seen > len(names) // 2


def test_threads_do_not_disturb_each_other(case):
    config, weights, model, _, _ = case
    rng = np.random.default_rng(3)
    wanted = dict.fromkeys(tunable(weights), WHOLE)
    jobs = [
        (
            rng.integers(3, config["vocab_size"], 40),
            rng.standard_normal((40, config["hidden_size"])).astype(np.float32),
        )
        for _ in range(6)
    ]

    def one(job: tuple) -> dict[str, np.ndarray]:
        window_pass = Pass(model, wanted)
        window_pass.run(*job)
        return window_pass.gradients

    alone = [one(job) for job in jobs]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(one, jobs))
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_the_model_itself_is_not_changed_by_a_pass(case):
    _, weights, model, tokens, teacher = case
    before = model.logits(model.hidden_states(paddle.to_tensor(tokens).unsqueeze(0))).numpy()
    Pass(model, dict.fromkeys(tunable(weights), WHOLE)).run(tokens, teacher)
    after = model.logits(model.hidden_states(paddle.to_tensor(tokens).unsqueeze(0))).numpy()
    assert np.array_equal(before, after)
