# SPDX-License-Identifier: Apache-2.0
"""Costs that are not those of the model, a run that allocates twice, flags that mislead."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import contents, stop_after
from helpers.synthetic import DTYPES, tiny_config, write_checkpoint
from paddle_ccq.allocation.costs import load_sensitivities
from paddle_ccq.allocation.decoded import Decoded
from paddle_ccq.allocation.perturbed_states import PerturbedStates
from paddle_ccq.allocation.probing import Execution, Probing, held_out, spread
from paddle_ccq.calibration.sequential_forward import SequentialForward
from paddle_ccq.calibration.settings import CalibrationSettings
from paddle_ccq.calibration.text import read_calibration_text
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.evaluation.run import score_text
from paddle_ccq.models.ernie import Ernie
from paddle_ccq.models.weights import OverriddenWeights
from paddle_ccq.quantize import quantize
from paddle_ccq.sensitivity import main, sensitivity
from paddle_ccq.verify import verify

TOKENS = {"calibration_tokens": "2k", "probe_tokens": 1024, "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Experts have a say in what this model answers, so that their errors stand out of rounding."""
    config = tiny_config(num_hidden_layers=3, moe_num_experts=4, moe_k=2)
    folder = tmp_path_factory.mktemp("source") / "tiny"
    weights = write_checkpoint(folder, config, "paddle")
    louder = {
        name: (4 * weight).astype(DTYPES["bf16"])
        for name, weight in weights.items()
        if ".mlp.experts." in name and "down_proj" in name
    }
    write_checkpoint(folder, config, "paddle", extra=louder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    lines = [{"text": "".join(rng.choices(letters, k=500))} for _ in range(8)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def options(text) -> dict:
    return {"preset": "fast", "quiet": True, "calibration": text, "calibration_tokens": "2k"}


@pytest.fixture(scope="module")
def measured(model, text) -> dict:
    return {
        method: sensitivity(model, text, method=method, formats=("wint2", "wint4"), **TOKENS)
        for method in ("kl", "quadratic")
    }


def test_the_divergence_is_that_of_the_model_with_that_part_quantized(model, text, measured):
    checkpoint = open_checkpoint(model)
    decoded = Decoded(checkpoint, Probing("kl", ("wint4",)), None, Execution(1))
    windows, _ = held_out(
        read_calibration_text(text, checkpoint, CalibrationSettings(tokens=2048)).windows, 1024
    )
    assert sum(window.size for window in windows) == 1024
    for layer, projection in ((1, "down_proj"), (2, "up_gate_proj")):
        names = [f"ernie.layers.{layer}.mlp.experts.{e}.{projection}.weight" for e in range(4)]
        changed = OverriddenWeights(checkpoint, {n: decoded(n, "wint4") for n in names})
        models = {"reference": Ernie(checkpoint), "changed": Ernie(changed)}
        expected = score_text(models, windows, "reference", 1)["changed"].summary()["kl_mean"]
        found = measured["kl"].costs[layer][projection]["wint4"]
        assert found == pytest.approx(expected, rel=1e-3) and found > 1e-6


def test_the_estimate_is_near_the_measurement(measured):
    exact, estimate = measured["kl"], measured["quadratic"]
    for layer in (1, 2):
        for format in ("wint2", "wint4"):
            ratio = estimate.layer(layer, format) / exact.layer(layer, format)
            assert 0.7 < ratio < 1.4, (layer, format, ratio)


def test_a_part_that_is_not_changed_costs_nothing(model, text):
    checkpoint = open_checkpoint(model)
    windows = read_calibration_text(
        text, checkpoint, CalibrationSettings(tokens=512, window=128)
    ).windows
    forward = SequentialForward(checkpoint, windows, 2)
    perturbed = PerturbedStates(forward, 2)
    for layer in range(checkpoint.config.num_hidden_layers):
        forward.enter()
        perturbed.carry()
        if layer in (0, 1):
            perturbed.add(layer, forward.block.mlp)
        forward.leave()
    for found in perturbed.divergences().values():
        assert found.shape == (len(windows),) and np.abs(found).max() < 1e-5
    forward.close()


def test_threads_and_files_change_nothing(model, text, measured, monkeypatch):
    monkeypatch.setattr("paddle_ccq.allocation.perturbed_states.MEMORY_FOR_STATES", 0)
    found = sensitivity(model, text, formats=("wint2", "wint4"), **{**TOKENS, "threads": 2})
    assert found.costs == measured["quadratic"].costs


def test_what_is_measured_on_is_not_calibrated_on():
    windows = [np.full(8, i) for i in range(6)]
    probes, rest = held_out(windows, 16)
    assert [w[0] for w in probes] == [1, 4] and [w[0] for w in rest] == [0, 2, 3, 5]
    assert len(held_out(windows, 10**6)[0]) == 3 and len(held_out(windows, 1)[0]) == 1
    assert held_out(windows[:1], 16) == (windows[:1], windows[:1])


def test_the_sample_is_spread():
    assert spread(8, 4) == [1, 3, 5, 7] and spread(3, 9) == [0, 1, 2] and spread(64, 1) == [32]


def test_the_command(model, text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "costs.json"
    flags = ["--model", str(model), "--calibration", str(text), "--calibration-tokens", "2k"]
    flags += ["--probe-tokens", "1k", "--formats", "wint2,wint4", "--json", str(out)]
    flags += ["--threads", "1"]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "layer 2, down_proj" in shown and "ccq-2.5" not in shown
    found = load_sensitivities(out)
    assert set(found.costs) == {1, 2} and found.formats == ("wint2", "wint4")
    assert str(tmp_path) not in out.read_text() and str(text.parent) not in out.read_text()
    found.check_weights(open_checkpoint(model), "x")
    assert main(flags) == 2
    assert "already exists" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*flags, "--force", "--plot", str(tmp_path / "a.svg")]) == 2
    assert "pip install 'paddle-ccq[plot]'" in capsys.readouterr().err


def test_the_figure(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from paddle_ccq.allocation.plot import plot

    for name in ("a.svg", "b.svg", "c.png"):
        plot(measured["kl"], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "wint8"], "'wint8' is not one of"),
        (["--formats", "wint2,wint2"], "each format once"),
        (["--probe-tokens", "many"], "--probe-tokens many"),
        (["--experts", "0"], "--experts 0"),
        (["--plot", "a.gif"], "must end in"),
        (["--calibration", "none.txt"], "no such file"),
    ],
)
def test_mistakes_end_in_one_line(model, text, capsys, flags, message):
    start = ["--model", str(model), "--calibration", str(text)]
    assert main([*start, *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_interrupted_allocation_is_the_same_one(model, options, tmp_path, monkeypatch):
    def allocated(name: str, target: str = "3.1bpw", **more) -> Path:
        every = {**options, "threads": 1, "allow_plugin_layout": True, "allocate": target, **more}
        quantize(model, tmp_path / name, **every)
        return tmp_path / name

    whole = allocated("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            allocated("out")
    with pytest.raises(CcqError, match="allocate"):
        allocated("out", "4bpw")
    with pytest.raises(CcqError, match="not allocated from these weights and this calibration"):
        allocated("out", calibration_tokens="512")
    # The costs are not measured a second time.
    with monkeypatch.context() as patch:
        patch.setattr("paddle_ccq.allocation.measure.measure", None)
        assert contents(allocated("out")) == contents(whole)
    assert not (tmp_path / "out.ccq-partial").exists()

    config = json.loads((whole / "config.json").read_text())
    said = config["paddle_ccq"]["allocation"]
    listed = config["quantization_config"]["moe_quant_config"].get("wint4_layers", [1])
    assert said["target"] == "3.1bpw" and said["wint4_layers"] == listed and len(listed) == 1
    assert len(said["predicted_loss"]) == 3 and set(said["costs"]) == {"1", "2"}
    assert set(config["paddle_ccq"]["calibration"]["output_errors"]) == {"1", "2"} - {
        str(listed[0])
    }
    # A layer's bytes do not depend on what the others become.
    quantize(model, tmp_path / "uniform", threads=1, **options)
    quantize(model, tmp_path / "wint4", threads=1, wint4_end_layer=2, preset="fast", quiet=True)
    ours, uniform, wint4 = (open_checkpoint(tmp_path / n) for n in ("whole", "uniform", "wint4"))
    for name in ours.names():
        if ".mlp.experts." in name:
            other = wint4 if ours.format_of(name) == "wint4" else uniform
            for suffix, values in ours.packed(name).items():
                np.testing.assert_array_equal(values, other.packed(name)[suffix])
    assert "allocated for 3.1bpw" in (whole / "README.md").read_text()


def test_any_layer_can_be_written_read_and_verified(model, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {match: "*.layers.2.mlp.experts.*", format: wint4}\n')
    with pytest.raises(CcqError, match="--allow-plugin-layout"):
        quantize(model, tmp_path / "out", rules=rules, preset="fast", quiet=True)
    quantize(
        model, tmp_path / "out", rules=rules, preset="fast", quiet=True, allow_plugin_layout=True
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    moe = config["quantization_config"]["moe_quant_config"]
    assert moe["wint4_layers"] == [2] and moe["moe_w4_quant_config"]["quant_end_layer"] == -1
    assert verify(tmp_path / "out", model).sound
    formats = {
        layer: open_checkpoint(tmp_path / "out").format_of(
            f"ernie.layers.{layer}.mlp.experts.1.down_proj.weight"
        )
        for layer in (1, 2)
    }
    assert formats == {1: "wint2", 2: "wint4"}
    assert "FD_PLUGINS=paddle_ccq" in (tmp_path / "out" / "README.md").read_text()
    # A list that says something else than the tensors.
    moe["wint4_layers"] = [1]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "ccq-manifest.json").unlink()
    assert any("layers.1" in problem for problem in verify(tmp_path / "out").problems)
