# SPDX-License-Identifier: Apache-2.0
"""With --drop-mtp, layers for multi-token prediction may be missing or broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.family_runs import stored
from helpers.mtp import in_own_shard, with_layer
from helpers.runs import contents, stop_after
from helpers.synthetic import (
    random_weights,
    stored_weights,
    tiny_config,
    write_checkpoint,
    write_tensors,
)
from paddle_ccq.allocation.costs import weights_sha256
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import main, quantize
from paddle_ccq.verify import verify

OPTIONS = {"preset": "fast", "quiet": True}
CASES = ("ernie", "deepseek-v3", "glm-4.5", "qwen3.5-moe")


def write(folder: Path, case: str) -> set[str]:
    """A tiny model of the family with a layer for prediction; that layer's names on disk."""
    if case == "ernie":
        write_checkpoint(folder, tiny_config(num_nextn_predict_layers=1))
        return {name for name in stored(folder) if ".mtp_" in name}
    more = {"mtp_num_hidden_layers": 1} if case == "qwen3.5-moe" else {}
    return with_layer(folder, case, **more)


@pytest.fixture(scope="module", params=CASES)
def whole(request, tmp_path_factory) -> tuple[Path, set[str], Path]:
    """A whole source, the names of its layer for prediction, and its output without that layer."""
    folder = tmp_path_factory.mktemp(request.param)
    names = write(folder / "source", request.param)
    quantize(folder / "source", folder / "output", drop_mtp=True, **OPTIONS)
    return folder / "source", names, folder / "output"


def without(source: Path, folder: Path, *gone: str) -> Path:
    """The source without some of its tensors."""
    tensors = {name: value for name, value in stored(source).items() if name not in gone}
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    write_tensors(folder, tensors, 2)
    return folder


def check(source: Path, output: Path, folder: Path) -> None:
    """It is quantized as the whole source is, planned, and a reference for verify."""
    quantize(source, folder, drop_mtp=True, **OPTIONS)
    wanted, found = stored(output), stored(folder)
    assert {n: v.tobytes() for n, v in found.items()} == {n: v.tobytes() for n, v in wanted.items()}
    assert (folder / "config.json").read_text() == (output / "config.json").read_text()
    for checked in (folder, output):
        result = verify(checked, source)
        assert result.sound, result.problems
    plan = quantize(source, dry_run=True, drop_mtp=True, **OPTIONS).plan
    assert plan.output_bytes == sum(value.nbytes for value in found.values())


@pytest.mark.parametrize("which", ["first", "last"])
def test_half_a_layer(whole, which, tmp_path, capsys):
    source, names, output = whole
    gone = sorted(names)[0 if which == "first" else -1]
    half = without(source, tmp_path / "source", gone)
    with pytest.raises(CcqError, match="1 tensor is missing"):
        quantize(half, tmp_path / "kept", **OPTIONS)
    check(half, output, tmp_path / "output")
    shown = len(names) - 1
    for flags in (["--output", str(tmp_path / "new")], ["--dry-run"]):
        assert main([str(half), "--preset", "fast", "--drop-mtp", *flags]) == 0
        said = capsys.readouterr()
        assert f"--drop-mtp: {shown} stored tensors for multi" in " ".join(
            (said.out + said.err).split()
        )


@pytest.mark.parametrize("damage", ["missing", "link", "cut"])
def test_the_layers_own_shard(whole, damage, tmp_path):
    source, names, output = whole
    shard = in_own_shard(source, tmp_path / "source", names)
    check(tmp_path / "source", output, tmp_path / "before")
    if damage != "cut":
        shard.unlink()
        if damage == "link":
            shard.symlink_to("blobs/gone")  # as hubs' caches have it
    else:
        shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CcqError, match=shard.name):
        quantize(tmp_path / "source", tmp_path / "kept", **OPTIONS)
    check(tmp_path / "source", output, tmp_path / "output")


def test_a_shard_with_other_tensors_is_needed(whole, tmp_path):
    source, names, _ = whole
    other = next(name for name in sorted(stored(source)) if name not in names)
    shard = in_own_shard(source, tmp_path / "source", {*names, other})
    shard.unlink()
    with pytest.raises(CcqError, match=rf"{shard.name}: named in .* but missing \(1 of 2"):
        quantize(tmp_path / "source", tmp_path / "output", drop_mtp=True, **OPTIONS)


def test_a_tensor_that_is_missing_elsewhere_is_one(whole, tmp_path):
    source, names, _ = whole
    other = next(name for name in sorted(stored(source)) if name.endswith("o_proj.weight"))
    half = without(source, tmp_path / "source", other, sorted(names)[0])
    with pytest.raises(CcqError, match=f"1 tensor is missing, the first '{other}'"):
        quantize(half, tmp_path / "output", drop_mtp=True, **OPTIONS)


def test_a_run_goes_on_though_the_layer_went_or_came(whole, tmp_path, monkeypatch):
    source, names, output = whole
    shard = in_own_shard(source, tmp_path / "source", names)
    content = shard.read_bytes()
    for there in (True, False):
        with monkeypatch.context() as patch:
            stop_after(patch, 5)
            with pytest.raises(KeyboardInterrupt):
                quantize(tmp_path / "source", tmp_path / f"out{there}", drop_mtp=True, **OPTIONS)
        shard.unlink() if there else shard.write_bytes(content)
        quantize(tmp_path / "source", tmp_path / f"out{there}", drop_mtp=True, **OPTIONS)
    found = contents(tmp_path / "outTrue")
    for name, digest in contents(tmp_path / "outFalse").items():
        assert name in ("README.md", "ccq-manifest.json") or found[name] == digest
    assert stored(tmp_path / "outTrue").keys() == stored(output).keys()


@pytest.mark.parametrize("case", ["deepseek-v3", "glm-4.5", "qwen3.5-moe"])
def test_what_the_family_does_not_name_goes_with_its_layer(case, tmp_path):
    names = write(tmp_path / "plain", case)
    place = next(n for n in names if n.endswith("q_proj.weight") or n.endswith("q_a_proj.weight"))
    extra = place.replace(".weight", ".input_scale")
    kept = next(n for n in stored(tmp_path / "plain") if ".layers.1." in n and n not in names)
    beside = kept.rpartition(".")[0] + ".input_scale"
    tensors = stored(tmp_path / "plain")
    tensors |= {name: np.array([0.5], np.float32) for name in (extra, beside)}
    (tmp_path / "source").mkdir()
    shutil.copy(tmp_path / "plain/config.json", tmp_path / "source")
    write_tensors(tmp_path / "source", tensors)
    for drop in (False, True):
        out = tmp_path / f"drop-{drop}"
        quantize(tmp_path / "source", out, drop_mtp=drop, **OPTIONS)
        found = stored(out)
        assert beside in found
        assert (extra in found) is not drop
        assert verify(out, tmp_path / "source").sound


def test_a_config_alone_can_be_asked(tmp_path, capsys):
    config = tiny_config(num_nextn_predict_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([str(tmp_path), "--dry-run", "--drop-mtp"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--drop-mtp: the layers for multi-token prediction are left out" in said
    assert "mtp_block" not in said


def test_floats_keep_their_dtype_without_the_layers_shard(tmp_path):
    """The files decide the dtype of what is kept, also where a shard of them is not needed."""
    config = tiny_config(num_nextn_predict_layers=1, moe_intermediate_size=128)
    write_checkpoint(tmp_path / "bf16", config)
    tensors = stored_weights(config, random_weights(config), "pt", "f32")
    (tmp_path / "whole").mkdir()
    shutil.copy(tmp_path / "bf16/config.json", tmp_path / "whole")
    write_tensors(tmp_path / "whole", tensors)
    names = {name for name in tensors if ".mtp_" in name}
    in_own_shard(tmp_path / "whole", tmp_path / "source", names).unlink()
    options = {**OPTIONS, "target": "huggingface", "drop_mtp": True}
    quantize(tmp_path / "source", tmp_path / "output", **options)
    assert stored(tmp_path / "output")["model.norm.weight"].dtype == np.float32
    assert verify(tmp_path / "output", tmp_path / "source").sound


def test_what_computes_tokens_needs_no_such_layer(tmp_path):
    names = write(tmp_path / "plain", "ernie")
    shard = in_own_shard(tmp_path / "plain", tmp_path / "source", names)
    whole = open_checkpoint(tmp_path / "source")
    wanted = weights_sha256(whole)
    assert weights_sha256(open_checkpoint(tmp_path / "source", drop_mtp=True)) == wanted
    shard.unlink()
    found = open_checkpoint(tmp_path / "source", drop_mtp=True)
    assert weights_sha256(found) == wanted
    assert found.names() == whole.model_names()
    with pytest.raises(CcqError, match="missing"):
        open_checkpoint(tmp_path / "source")


@pytest.mark.parametrize("command", ["evaluate", "sensitivity", "tune"])
def test_commands_that_compute_the_model(command, tmp_path, capsys):
    """They run on a source whose layer for prediction was not downloaded."""
    pytest.importorskip("paddle")
    from helpers.synthetic import write_tokenizer
    from paddle_ccq import evaluate, sensitivity, tune

    write_checkpoint(tmp_path / "plain", tiny_config(num_nextn_predict_layers=1))
    names = {name for name in stored(tmp_path / "plain") if ".mtp_" in name}
    in_own_shard(tmp_path / "plain", tmp_path / "source", names).unlink()
    write_tokenizer(tmp_path / "source")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three four five six seven"}\n' * 80)
    source, out = str(tmp_path / "source"), str(tmp_path / "output")
    if command == "evaluate":
        flags = [source, "--text", str(text), "--window", "32", "--max-tokens", "64"]
        assert evaluate.main(flags) == 0
    elif command == "sensitivity":
        flags = ["--calibration", str(text), "--json", str(tmp_path / "s.json")]
        flags += ["--calibration-tokens", "256", "--probe-tokens", "128", "--formats", "wint4"]
        assert sensitivity.main([source, *flags]) == 0, capsys.readouterr().err
    else:
        quantize(source, out, drop_mtp=True, **OPTIONS)
        flags = [out, "--reference", source, "--calibration", str(text), "--output", out + "2"]
        tune.main(flags)
        # Random weights give no loss to lower; what counts is that both models ran.
        assert "step 2 of 2: KL" in capsys.readouterr().err
