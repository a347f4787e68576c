# SPDX-License-Identifier: Apache-2.0
"""Gradient weights: not the gradients, dependent on threads or luck, lost, or left lying about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers import reference_ernie
from helpers.configs import CALIBRATED, TIED_AND_UNTIED
from helpers.runs import contents, partial, stop_after
from helpers.synthetic import write_checkpoint
from paddle_ccq.calibration import sequential_forward
from paddle_ccq.calibration import token_weights as module
from paddle_ccq.calibration.settings import GRADIENT, CalibrationSettings
from paddle_ccq.calibration.statistics import Statistics
from paddle_ccq.calibration.text import CalibrationText
from paddle_ccq.calibration.token_weights import LayerWeights, draw, token_weights
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import main, quantize

LENGTH = 7


@pytest.fixture(scope="module", params=TIED_AND_UNTIED, ids=["tied", "untied"])
def case(request, tmp_path_factory):
    """Config, float weights, checkpoint, windows of two lengths."""
    folder = tmp_path_factory.mktemp("model")
    weights = write_checkpoint(folder, request.param)
    rng = np.random.default_rng(1)
    windows = [rng.integers(3, request.param["vocab_size"], n) for n in (LENGTH, LENGTH, 5)]
    return request.param, weights, open_checkpoint(folder), windows


def slope_sizes(config, weights, tokens, labels, layer: int, expert: int, token: int):
    """Root mean squares of -log p(labels)'s slopes by both outputs of one expert on one token.

    By differences in float64, of a forward pass that shares nothing with the package.
    """
    name = f"ernie.layers.{layer}.mlp.experts.{expert}"
    moves: dict[str, np.ndarray] = {}
    at = {"token": -1}

    def mixture(config, w, mixture_name, x):
        if mixture_name == f"ernie.layers.{layer}.mlp":
            at["token"] += 1
        return original(config, w, mixture_name, x)

    def mlp(w, mlp_name, x):
        moved = mlp_name == name and at["token"] == token
        h = x @ w[f"{mlp_name}.up_gate_proj.weight"]
        h = h + (moves.get("up_gate_proj", 0) if moved else 0)
        gate, up = np.split(h, 2)
        y = (gate / (1 + np.exp(-gate)) * up) @ w[f"{mlp_name}.down_proj.weight"]
        return y + (moves.get("down_proj", 0) if moved else 0)

    def loss() -> float:
        at["token"] = -1
        z = reference_ernie.logits(config, weights, tokens.tolist())
        z = z - z.max(axis=1, keepdims=True)
        return float(
            -(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))[range(z.shape[0]), labels].sum()
        )

    original = reference_ernie.mixture
    sizes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_ernie, "mixture", mixture)
        patch.setattr(reference_ernie, "mlp", mlp)
        for projection in ("up_gate_proj", "down_proj"):
            channels = weights[f"{name}.{projection}.weight"].shape[1]
            slopes = []
            for channel in range(channels):
                ends = []
                for sign in (1, -1):
                    moves[projection] = sign * 1e-4 * np.eye(channels)[channel]
                    ends.append(loss())
                slopes.append((ends[0] - ends[1]) / 2e-4)
            del moves[projection]
            sizes[projection] = float(np.sqrt(np.square(slopes).mean()))
    return sizes


def test_weights_are_the_slopes_of_the_float64_loss(case, monkeypatch):
    config, weights, checkpoint, windows = case
    labels = np.random.default_rng(2).integers(0, config["vocab_size"], LENGTH)
    monkeypatch.setattr(module, "draw", lambda p, rng: labels[: len(p)])
    found = token_weights(checkpoint, windows, threads=1)
    assert sorted(found) == [1, 2]
    # Of the second window, so that places in the arrays count too. A layer is computed from inputs
    # that were rounded to bfloat16, whence the tolerance.
    for layer, token in ((1, 2), (2, 4)):
        w = found[layer]
        expert, slot = int(w.chosen[LENGTH + token, 1]), 1
        expected = slope_sizes(config, weights, windows[1], labels, layer, expert, token)
        for projection, size in expected.items():
            got = float(getattr(w, projection)[LENGTH + token, slot])
            assert got == pytest.approx(size, rel=0.03), (layer, projection)


def test_threads_and_spilling_change_nothing(case, tmp_path, monkeypatch):
    _, _, checkpoint, windows = case
    expected = token_weights(checkpoint, windows, threads=1)
    monkeypatch.setattr(sequential_forward, "MEMORY_FOR_STATES", 0)
    monkeypatch.setattr(module, "MEMORY_FOR_STATES", 0)
    spilled = []
    original = module.state_array
    monkeypatch.setattr(
        module,
        "state_array",
        lambda shape, where: spilled.append(original(shape, where)) or spilled[-1],
    )
    got = token_weights(checkpoint, windows, threads=3, folder=tmp_path)
    for layer, w in expected.items():
        for part, array in vars(w).items():
            np.testing.assert_array_equal(getattr(got[layer], part), array)
            assert part == "chosen" or (array > 0).all()
    assert isinstance(spilled[0], np.memmap)
    assert list(tmp_path.iterdir()) == []


def test_labels_come_as_often_as_the_model_says():
    rng = np.random.default_rng(0)
    p = np.tile(np.array([0.5, 0.0, 0.3, 0.2], np.float32), (20_000, 1))
    shares = np.bincount(draw(p, rng), minlength=4) / len(p)
    np.testing.assert_allclose(shares, p[0], atol=0.015)
    assert shares[1] == 0
    # Rounding may leave the sum below one; the last index is then the most there is.
    assert draw(np.full((1, 3), 1e-30, np.float32), rng)[0] in (0, 1, 2)


def test_weights_follow_the_experts_and_not_their_places():
    w = LayerWeights(
        np.array([[3, 1], [0, 2]], np.int16),
        np.array([[5.0, 6], [7, 8]]),
        np.array([[1.0, 2], [3, 4]]),
    )
    now = np.array([[1, 3], [0, 1]])  # the same experts the other way round; another expert
    factors = w.factors(now)
    np.testing.assert_array_equal(factors["up_gate_proj"], [[6, 5], [7, 0]])
    np.testing.assert_array_equal(factors["down_proj"], [[2, 1], [3, 0]])


def test_hessians_are_weighed_by_them(case):
    _, _, checkpoint, windows = case
    described = CalibrationText("t.jsonl", "0" * 64, tuple(windows))
    settings = CalibrationSettings(token_weights=GRADIENT, shrinkage_tokens=0)
    statistics = Statistics(checkpoint, described, settings, 1)
    w = token_weights(checkpoint, windows, 1)[1]
    expert = int(w.chosen[0, 0])
    got = statistics.hessian(f"ernie.layers.1.mlp.experts.{expert}.up_gate_proj.weight")
    rows, slots = np.nonzero(statistics._forward.chosen == expert)
    x = statistics._forward.inputs[rows].astype(np.float64)
    s = w.factors(statistics._forward.chosen)["up_gate_proj"][rows, slots]
    expected = (x * s[:, None] ** 2).T @ x / len(rows)
    np.testing.assert_allclose(got.matrix, expected, atol=1e-4 * np.abs(expected).max())
    statistics.close()


# --- quantize -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model(CALIBRATED)


@pytest.fixture(scope="module")
def options(calibrated_options) -> dict:
    return {**calibrated_options, "calibration_weights": "gradient"}


def stopped(model: Path, out: Path, monkeypatch, **options) -> Path:
    """Stop a run after some experts; the file of weights that it leaves."""
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, **options)
    return partial(out) / "token-weights.npz"


def test_a_run_that_goes_on_does_not_walk_back_again(model, options, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    quantize(model, whole, threads=1, **options)
    kept = stopped(model, out, monkeypatch, threads=2, **options)
    assert kept.exists()
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "token_weights", lambda *args: calls.append(args))
        quantize(model, out, threads=1, **options)
    assert not calls
    assert contents(out) == contents(whole) and not partial(out).exists()
    said = json.loads((out / "config.json").read_text())["paddle_ccq"]["calibration"]
    assert said["token_weights"] == "gradient"


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_kept_weights_of_another_text_or_cut_off_are_made_anew(
    model, options, tmp_path, monkeypatch, damage
):
    out, whole = tmp_path / "out", tmp_path / "whole"
    quantize(model, whole, threads=1, **options)
    kept = stopped(model, out, monkeypatch, threads=1, **options)
    if damage == "cut":
        kept.write_bytes(kept.read_bytes()[:1000])
    else:
        np.savez(kept, of=np.array("{}"))
    quantize(model, out, threads=1, **options)
    assert contents(out) == contents(whole)


def test_codes_differ_from_those_by_routing_weights(model, options, tmp_path):
    quantize(model, tmp_path / "gradient", **options)
    quantize(model, tmp_path / "router", **{**options, "calibration_weights": "router"})
    ours, other = (open_checkpoint(tmp_path / name) for name in ("gradient", "router"))
    names = [name for name in ours.names() if ".mlp.experts." in name]
    assert any(not np.array_equal(ours.read(name), other.read(name)) for name in names)


def test_another_kind_of_weights_is_another_job(model, options, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(model, out, monkeypatch, **options)
    with pytest.raises(CcqError, match="calibration"):
        quantize(model, out, **{**options, "calibration_weights": "router"})
    # --restart throws the gradients away as well.
    quantize(model, out, restart=True, **{**options, "calibration_weights": "router"})
    assert not partial(out).exists()


def test_a_full_disk_is_said_before_the_walk(model, options, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    checkpoint = open_checkpoint(model)
    with pytest.raises(CcqError, match=r"--calibration-weights gradient: .* free"):
        token_weights(checkpoint, [np.arange(3, 9)], 1, tmp_path)


def test_flags(model, tmp_path, calibration_text, capsys):
    flags = ["--model", str(model), "--output", str(tmp_path / "out")]
    assert main([*flags, "--calibration-weights", "gradient"]) == 2
    assert "--calibration-weights needs --calibration" in capsys.readouterr().err
    with pytest.raises(CcqError, match="--calibration-weights loss: not one of router, gradient"):
        quantize(model, tmp_path / "out", calibration=calibration_text, calibration_weights="loss")
    flags += ["--calibration", str(calibration_text), "--calibration-weights", "gradient"]
    assert main([*flags, "--dry-run"]) == 0
    assert "two more passes through the model" in " ".join(capsys.readouterr().out.split())
