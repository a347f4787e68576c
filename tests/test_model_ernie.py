# SPDX-License-Identifier: Apache-2.0
"""The Paddle model against a plain NumPy one; its results do not depend on batches or caches."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import reference_ernie
from helpers.synthetic import random_weights, tiny_config

paddle = pytest.importorskip("paddle")

from paddle_ccq.families.registry import read_config  # noqa: E402
from paddle_ccq.models.ernie import QUERY_BLOCK, Cache, Ernie  # noqa: E402
from paddle_ccq.models.generation import generate, left_padded  # noqa: E402
from paddle_ccq.models.weights import OverriddenWeights  # noqa: E402

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "moe_num_experts": 6,
    "moe_intermediate_size": 48,
}
VARIANTS = {
    "moe, one shared expert": {},
    "moe, no shared expert": {"moe_num_shared_experts": 0},
    "moe, two shared experts, untied": {"moe_num_shared_experts": 2, "tie_word_embeddings": False},
    "moe in every second layer": {"moe_layer_interval": 2, "moe_layer_start_index": 0},
    "moe, last layer dense": {"moe_layer_end_index": 1},
    "all experts chosen": {"moe_k": 6},
    "dense": {"moe_num_experts": 0},
    "dense, untied, no grouping": {
        "moe_num_experts": 0,
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
    },
    "one key head": {"num_key_value_heads": 1},
}


class Weights:
    """A weight source from a dictionary."""

    def __init__(self, config: dict, weights: dict[str, np.ndarray]) -> None:
        self.config = read_config(config)
        self.weights = weights

    def read(self, name: str) -> np.ndarray:
        return self.weights[name]


def build(seed: int = 0, **overrides) -> tuple[dict, dict[str, np.ndarray], Ernie]:
    config = tiny_config(**{**SMALL, **overrides})
    weights = random_weights(config, seed)
    return config, weights, Ernie(Weights(config, weights))


def all_logits(model: Ernie, rows: np.ndarray) -> np.ndarray:
    return model.logits(model.hidden_states(paddle.to_tensor(rows))).numpy()


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (rows, length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_numpy_reference(variant):
    config, weights, model = build(**VARIANTS[variant])
    tokens = random_tokens(2, 21)
    for row, ours in zip(tokens, all_logits(model, tokens), strict=True):
        expected = reference_ernie.logits(config, weights, row.tolist())
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


def test_reference_and_model_agree_over_several_query_blocks():
    config, weights, model = build(num_hidden_layers=2)
    tokens = random_tokens(1, QUERY_BLOCK + 7)
    expected = reference_ernie.logits(config, weights, tokens[0].tolist())
    np.testing.assert_allclose(all_logits(model, tokens)[0], expected, atol=1e-4, rtol=1e-4)


def test_correction_bias_decides_the_choice_but_not_the_weights():
    """With a bias far above any probability the same experts are always chosen."""
    config, weights, _ = build()
    bias = np.zeros((1, 6), np.float32)
    bias[0, [1, 4]] = 100.0
    for name in weights:
        if name.endswith("e_score_correction_bias"):
            weights[name] = bias
    model = Ernie(Weights(config, weights))
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32))
    chosen, routing_weights = model.blocks[1].mlp.route(x)
    assert set(chosen.numpy().reshape(-1).tolist()) == {1, 4}
    np.testing.assert_allclose(routing_weights.numpy().sum(axis=1), 1, rtol=1e-6)
    assert routing_weights.numpy().std() > 0.01


def test_a_row_does_not_depend_on_the_rest_of_its_batch():
    _, _, model = build()
    tokens = random_tokens(5, 40)
    together = all_logits(model, tokens)
    for index in range(5):
        alone = all_logits(model, tokens[index : index + 1])[0]
        np.testing.assert_allclose(together[index], alone, atol=2e-5, rtol=1e-5)


def test_left_padding_changes_nothing():
    _, _, model = build()
    rows = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 17, 30)]
    tokens, padding = left_padded(rows)
    hidden = model.hidden_states(tokens, padding)
    for index, row in enumerate(rows):
        alone = all_logits(model, np.array([row]))[0]
        padded = model.logits(hidden[index, -len(row) :]).numpy()
        np.testing.assert_allclose(padded, alone, atol=2e-5, rtol=1e-5)


def test_cache_gives_the_same_as_one_pass():
    _, _, model = build()
    tokens = random_tokens(2, 33)
    whole = model.hidden_states(paddle.to_tensor(tokens)).numpy()
    cache, parts = Cache(len(model.blocks)), []
    for first, last in ((0, 20), (20, 21), (21, 30), (30, 33)):
        step = paddle.to_tensor(tokens[:, first:last])
        parts.append(model.hidden_states(step, cache=cache).numpy())
    assert cache.length == 33
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5, rtol=1e-5)


def test_generation_equals_recomputing_everything_for_each_token():
    _, _, model = build()
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (9, 2, 14, 5)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(all_logits(model, np.array([tokens]))[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert generate(model, prompts, 8) == expected
    assert generate(model, prompts, 8, batch_size=2) == expected
    # Ending rows early leaves the others as they were.
    stop = {expected[0][3], expected[2][5]}
    cut = [
        row[: next((i for i, token in enumerate(row) if token in stop), len(row))]
        for row in expected
    ]
    assert generate(model, prompts, 8, stop) == cut
    assert generate(model, [], 8) == []


def test_overridden_weights_replace_by_name():
    config, weights, model = build()
    name = "ernie.layers.1.mlp.experts.2.down_proj.weight"
    other = weights[name] * 0.5
    base = Weights(config, weights)
    replaced = Ernie(OverriddenWeights(base, {name: other}))
    direct = Ernie(Weights(config, {**weights, name: other}))
    lazy = Ernie(OverriddenWeights(base, {name: lambda: other}))
    tokens = random_tokens(1, 24)
    result = all_logits(replaced, tokens)
    np.testing.assert_array_equal(result, all_logits(direct, tokens))
    np.testing.assert_array_equal(result, all_logits(lazy, tokens))
    assert np.abs(result - all_logits(model, tokens)).max() > 1e-3
