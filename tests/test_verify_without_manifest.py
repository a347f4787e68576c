# SPDX-License-Identifier: Apache-2.0
"""Without the manifest, verify says of an added tensor what can be said, and what it cannot see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.family_models import CASES, by_name
from helpers.family_runs import OPTIONS, stored
from helpers.mtp import with_layer
from helpers.synthetic import tiny_config, write_checkpoint, write_tensors
from paddle_ccq.checkpoint.manifest import MANIFEST_FILE
from paddle_ccq.checkpoint.safetensors_io import TensorFolder
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.fastdeploy.check import ServeConfig
from paddle_ccq.fastdeploy.check import check as fastdeploy_check
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import main, verify

ERNIE = tiny_config(moe_intermediate_size=256)
PREFIXES = {"fastdeploy": "ernie", "ranks": "ernie", "huggingface": "model"}
UNSEEN = "a changed byte shows only where it makes a value impossible"


@pytest.fixture(scope="module")
def ernie(tmp_path_factory) -> dict[str, Path]:
    """ERNIE-4.5 for each target; two ranks as well."""
    root = tmp_path_factory.mktemp("ernie")
    write_checkpoint(root / "source", ERNIE)
    for name, more in (
        ("fastdeploy", {}),
        ("ranks", {"tensor_parallel_size": 2}),
        ("huggingface", {"target": "huggingface"}),
    ):
        quantize(root / "source", root / name, **OPTIONS, **more)
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def copy_with(
    output: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], object]
) -> Path:
    """A copy without a manifest, its (last rank's) tensors changed."""
    shutil.copytree(output, folder)
    (folder / MANIFEST_FILE).unlink()
    place = folder / "rank1" if (folder / "rank1").is_dir() else folder
    tensors = stored(place)
    change(tensors)
    for path in place.glob("model*"):
        path.unlink()
    write_tensors(place, tensors, 2)
    return folder


def add(*names: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({name: np.ones(4, np.float32) for name in names})


@pytest.mark.parametrize("target", ["fastdeploy", "ranks", "huggingface"])
@pytest.mark.parametrize(
    "name", ["layers.extra", "model.layers.1.self_attn.q_proj.extra", "lm_head.bias", "x"]
)
def test_an_added_tensor_of_a_family_that_names_all(ernie, target, name, tmp_path):
    folder = copy_with(ernie[target], tmp_path / "copy", add(name))
    (problem,) = verify(folder).problems
    prefix = "rank1: " if target == "ranks" else ""
    assert problem == f"{prefix}{name}: not a tensor of this model and format"


@pytest.mark.parametrize("target", ["fastdeploy", "ranks", "huggingface"])
def test_layers_for_prediction_that_config_does_not_count(ernie, target, tmp_path):
    first, second = (f"{PREFIXES[target]}.mtp_{name}.0" for name in "xy")
    folder = copy_with(ernie[target], tmp_path / "copy", add(first, second))
    result = verify(folder)
    assert result.sound
    assert any(
        f"{first} and 1 more: for multi-token prediction, of which" in message
        for message in result.messages
    )


@pytest.mark.parametrize("target", ["fastdeploy", "huggingface"])
def test_a_layer_for_prediction_is_known_by_its_names(target, tmp_path):
    config = {**ERNIE, "num_nextn_predict_layers": 1}
    write_checkpoint(tmp_path / "source", config)
    quantize(tmp_path / "source", tmp_path / "output", target=target, **OPTIONS)
    assert verify(copy_with(tmp_path / "output", tmp_path / "same", lambda _: None)).sound
    added = f"{PREFIXES[target]}.mtp_linear_proj.1.weight"
    folder = copy_with(tmp_path / "output", tmp_path / "copy", add(added))
    (problem,) = verify(folder).problems
    assert problem == f"{added}: not a tensor of this model and format"
    gone = next(n for n in stored(tmp_path / "output") if "mtp_emb_norm" in n)
    folder = copy_with(tmp_path / "output", tmp_path / "less", lambda tensors: tensors.pop(gone))
    assert verify(folder).problems == [f"{gone}: missing"]


@pytest.mark.parametrize("case", ["fastdeploy", "huggingface", "deepseek-v3", "qwen3.5-moe"])
def test_layers_for_prediction_that_are_gone_as_a_whole(case, tmp_path):
    if case in PREFIXES:
        write_checkpoint(tmp_path / "source", {**ERNIE, "num_nextn_predict_layers": 1})
        options = {**OPTIONS, "target": case}
    else:
        with_layer(tmp_path / "source", case, mtp_num_hidden_layers=1)
        options = OPTIONS
    quantize(tmp_path / "source", tmp_path / "output", **options)
    config = read_config(tmp_path / "source")
    beyond = f"layers.{config.num_hidden_layers}."
    gone = [n for n in stored(tmp_path / "output") if beyond in n or config.family.is_mtp(n)]
    assert gone
    folder = copy_with(
        tmp_path / "output", tmp_path / "copy", lambda t: [t.pop(name) for name in gone]
    )
    assert len(verify(folder).problems) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_added_tensor_of_a_family_that_keeps_others(case, made, tmp_path):
    """A source may have had it, so it is a note; --reference tells, and so does the manifest."""
    found = made(case)
    plain = copy_with(found.output, tmp_path / "plain", lambda _: None)
    notes = verify(plain).messages
    assert any(UNSEEN in note for note in notes)
    assert not any("not named by the family" in note for note in notes)
    folder = copy_with(found.output, tmp_path / "copy", add("added.one", "added.two"))
    result = verify(folder)
    assert result.sound
    (note,) = (note for note in result.messages if "not named by the family" in note)
    assert note.startswith(f"added.one and 1 more: not named by the family {case.family};")
    assert note.endswith("only --reference tells whether the model has them")
    problems = verify(folder, found.source).problems
    assert problems == [f"added.{n}: the reference has no such tensor" for n in ("one", "two")]


def test_an_added_tensor_among_experts_is_a_problem(made, tmp_path):
    name = "model.layers.1.mlp.experts.0.extra"
    folder = copy_with(made(by_name("qwen3-moe")).output, tmp_path / "copy", add(name))
    assert verify(folder).problems == [f"{name}: not a tensor of this model and format"]


def test_with_the_manifest_an_added_tensor_is_a_problem(made, tmp_path):
    found = made(by_name("qwen3-moe"))
    folder = copy_with(found.output, tmp_path / "copy", add("added"))
    shutil.copy(found.output / MANIFEST_FILE, folder)
    result = verify(folder)
    assert not result.sound
    assert not any("not named" in note for note in result.messages)


def test_the_generic_family_names_experts_alone(made, tmp_path):
    source = made(by_name("qwen3-moe")).source
    quantize(source, tmp_path / "output", family="generic", **OPTIONS)
    folder = copy_with(tmp_path / "output", tmp_path / "copy", lambda _: None)
    others = sum(".experts." not in name for name in stored(source))
    result = verify(folder)
    assert result.sound
    assert any(f" and {others - 1} more: not named by the family" in n for n in result.messages)
    assert verify(folder, source).sound


@pytest.mark.parametrize("change", ["gone", "shape", "values"])
def test_a_kept_tensor_is_the_references(change, made, tmp_path):
    plain = made(by_name("qwen3-moe"))
    (tmp_path / "source").mkdir()
    shutil.copy(plain.source / "config.json", tmp_path / "source")
    write_tensors(tmp_path / "source", {**stored(plain.source), "kept": np.ones(4, np.float32)})
    quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    assert verify(tmp_path / "output", tmp_path / "source").sound
    changes = {
        "gone": lambda tensors: tensors.pop("kept"),
        "shape": lambda tensors: tensors.update(kept=np.ones(5, np.float32)),
        "values": lambda tensors: tensors.update(kept=np.zeros(4, np.float32)),
    }
    folder = copy_with(tmp_path / "output", tmp_path / "copy", changes[change])
    assert verify(folder).sound
    assert verify(folder, tmp_path / "source").problems == [
        {
            "gone": "kept: missing, the reference has it",
            "shape": "kept: shape [5], the reference's is [4]",
            "values": "kept: not the reference's bytes",
        }[change]
    ]


def test_another_model_is_still_refused(made, tmp_path):
    with pytest.raises(CcqError, match="another model; the two differ in"):
        verify(made(by_name("qwen3-moe")).output, made(by_name("deepseek-v3")).source)


def test_what_cannot_be_seen_is_said(ernie, tmp_path, capsys):
    """A flipped byte in codes gives other codes, which are as good as the right ones."""
    folder = tmp_path / "copy"
    shutil.copytree(ernie["fastdeploy"], folder)
    tensors = TensorFolder(folder)
    name = next(n for n in tensors.names() if ".experts." in n and n.endswith(".quant_weight"))
    path, begin = tensors.path_of(name), tensors.info(name).begin
    content = bytearray(path.read_bytes())
    content[begin] ^= 1
    path.write_bytes(content)
    assert main([str(folder)]) == 1
    assert f"problem: {path.name}: sha256" in " ".join(capsys.readouterr().out.split())
    (folder / MANIFEST_FILE).unlink()
    assert main([str(folder), "--json", str(tmp_path / "v.json")]) == 0
    assert UNSEEN in " ".join(capsys.readouterr().out.split())
    assert any(UNSEEN in text for text in json.loads((tmp_path / "v.json").read_text())["messages"])
    serve = ServeConfig(card_bytes=24 << 30)
    assert any(UNSEEN in text for text in fastdeploy_check(folder, serve, hashes=True).warnings)
