# SPDX-License-Identifier: Apache-2.0
"""Companion files: one list and one rule for links, in quantize, dequantize and tune."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.companions import read_companions
from paddle_ccq.checkpoint.manifest import check_manifest
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.checkpoint.source import model_name, resolve_model
from paddle_ccq.dequantize import dequantize
from paddle_ccq.dequantize import main as dequantize_main
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import main as quantize_main
from paddle_ccq.quantize import quantize
from paddle_ccq.tuning.output import write_tuned
from paddle_ccq.verify import verify

CONFIG = tiny_config(num_hidden_layers=2, moe_num_experts=2)
NAMED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def companions_of(output: Path) -> set[str]:
    """What an output holds beside weights, config, card and manifest."""
    ours = ("config.json", "README.md", "ccq-manifest.json", "model.safetensors.index.json")
    names = {path.name for path in output.iterdir()}
    return {name for name in names if name not in ours and not name.endswith(".safetensors")}


def both(model: Path, root: Path) -> list[Path]:
    """The outputs of quantize and dequantize."""
    quantize(model, root / "quantized", preset="fast", quiet=True)
    dequantize(model, root / "plain", log=lambda text: None)
    return [root / "quantized", root / "plain"]


def linked(source: Path, folder: Path) -> Path:
    """A folder with a link to every file of another one."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def cached(source: Path, repository: Path) -> Path:
    """Hugging Face's cache of a repository with one snapshot; returns the snapshot."""
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.fixture
def model(tmp_path) -> Path:
    write_checkpoint(tmp_path / "m", CONFIG, shards=2)
    return tmp_path / "m"


def test_both_commands_copy_the_same_files(model, tmp_path):
    wanted = {
        *NAMED,
        *("tokenizer.model", "chat_template.jinja", "special_tokens_map.json", "vocab.json"),
        *("merges.txt", "added_tokens.json", "LICENSE", "Licence.txt", "NOTICE", "vocab.bpe"),
    }
    for name in wanted - set(NAMED):
        (model / name).write_text("{}")
    never = (
        *("tokenization_ernie.py", "tokenizer.py", "optimizer.pdopt", "tokenizer.pkl", "README.md"),
        *("ccq-manifest.json", "other.safetensors.index.json", "tokenizer.bin", ".hidden.json"),
        *(".gitattributes", "figure.png"),
    )
    for name in never:
        (model / name).write_text("{}")
    (model / "tokenizer").mkdir()
    for output in both(model, tmp_path):
        assert companions_of(output) == wanted, output
    assert check_manifest(tmp_path / "quantized").problems == []


@pytest.mark.parametrize("form", ["folder", "link", "cache"])
def test_named_chat_templates_are_copied(model, tmp_path, form):
    templates = model / "additional_chat_templates"
    templates.mkdir()
    for name in ("tool_use.jinja", "default.jinja", ".hidden.jinja", "notes.md", "code.py"):
        (templates / name).write_text(name)
    source = model
    if form == "link":
        source = linked(model, tmp_path / "links")
    elif form == "cache":
        repository = tmp_path / "models--me--tiny"
        templates = templates.rename(tmp_path / "templates")
        source = cached(model, repository)
        folder = source / "additional_chat_templates"
        folder.mkdir()
        for path in templates.iterdir():
            path.rename(repository / "blobs" / path.name)
            (folder / path.name).symlink_to(Path("../../../blobs") / path.name)
    outputs = both(source, tmp_path)
    tuned = tmp_path / "tuned"
    write_tuned(open_checkpoint(outputs[0]), tuned, {}, TUNED)
    for output in (*outputs, tuned):
        copied = output / "additional_chat_templates"
        assert {p.name: p.read_text() for p in copied.iterdir()} == {
            name: name for name in ("tool_use.jinja", "default.jinja")
        }, output
        assert not copied.is_symlink() and check_manifest(output).notes == []
    outside = "links out of" in " ".join(read_companions(source).messages)
    assert outside == (form == "link")
    (outputs[0] / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    [problem] = check_manifest(outputs[0]).problems
    assert problem.startswith("additional_chat_templates/tool_use.jinja: ")


def test_links_are_followed_wherever_they_lead(model, tmp_path):
    (model / "LICENSE").write_text("terms")
    folder = linked(model, tmp_path / "elsewhere" / "links")
    plain, plain_dequantized = both(model, tmp_path / "a")
    for output, expected in zip(
        both(folder, tmp_path / "b"), (plain, plain_dequantized), strict=True
    ):
        assert companions_of(output) == {*NAMED, "LICENSE"}
        for name in (*NAMED, "LICENSE"):
            assert not (output / name).is_symlink()
            assert (output / name).read_bytes() == (expected / name).read_bytes()


def test_links_out_of_the_folder_are_named(model, tmp_path, capsys):
    (tmp_path / "terms").write_text("terms")
    (model / "LICENSE").symlink_to(tmp_path / "terms")
    (model / "real.json").write_text("{}")
    (model / "inside.json").symlink_to("real.json")
    flags = ["--output", str(tmp_path / "a"), "--preset", "fast"]
    assert quantize_main(["--model", str(model), *flags]) == 0
    assert dequantize_main([str(model), "--output", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().err.splitlines()
    about = [line for line in said if "links out of" in line]
    assert len(about) == 2
    assert all(line.endswith("content is copied: LICENSE") for line in about)


def test_a_hub_cache(model, tmp_path):
    repository = tmp_path / "hub" / "models--baidu--ERNIE-4.5-Tiny-PT"
    snapshot = cached(model, repository)
    messages = read_companions(snapshot).messages
    assert not any("links" in message for message in messages)
    for number, given in enumerate((snapshot, repository)):
        outputs = both(given, tmp_path / str(number))
        for output in outputs:
            assert companions_of(output) == set(NAMED)
        config = json.loads((outputs[0] / "config.json").read_text())
        assert config["paddle_ccq"]["source_model"] == "baidu/ERNIE-4.5-Tiny-PT"
        card = (outputs[0] / "README.md").read_text()
        assert "base_model: baidu/ERNIE-4.5-Tiny-PT" in card and COMMIT not in card
        assert verify(outputs[0], given).sound


def test_a_quantized_model_in_a_cache(model, tmp_path):
    quantize(model, tmp_path / "out", preset="fast", quiet=True)
    snapshot = cached(tmp_path / "out", tmp_path / "models--me--tiny-wint2")
    result = verify(snapshot, model)
    assert result.sound, result.problems
    assert verify(tmp_path / "models--me--tiny-wint2").sound
    dequantize(snapshot, tmp_path / "plain", log=lambda text: None)
    assert companions_of(tmp_path / "plain") == set(NAMED)


def test_several_snapshots(model, tmp_path):
    repository = tmp_path / "models--a--b"
    cached(model, repository)
    other = repository / "snapshots" / ("f" * 40)
    other.mkdir()
    assert resolve_model(repository).name == COMMIT
    (repository / "refs" / "main").unlink()
    with pytest.raises(CcqError, match="2 snapshots"):
        resolve_model(repository)
    other.rmdir()
    assert resolve_model(repository).name == COMMIT


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (f"hub/models--baidu--ERNIE-4.5/snapshots/{COMMIT}", "baidu/ERNIE-4.5"),
        (f"hub/models--gpt2/snapshots/{COMMIT}", "gpt2"),
        ("hub/models--baidu--ERNIE-4.5", "baidu/ERNIE-4.5"),
        (".cache/modelscope/hub/models/PaddlePaddle/ERNIE-4___5-21B", "PaddlePaddle/ERNIE-4.5-21B"),
        (".cache/modelscope/hub/PaddlePaddle/ERNIE-4___5-21B", "PaddlePaddle/ERNIE-4.5-21B"),
        ("models/PaddlePaddle/ERNIE-4.5", "ERNIE-4.5"),
        ("my-model", "my-model"),
        (f"snapshots/{COMMIT}", COMMIT),
    ],
)
def test_names_of_folders(tmp_path, monkeypatch, place, name):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    assert model_name(folder) == name
    (tmp_path / "link").symlink_to(folder)
    assert model_name(tmp_path / "link") == name
    monkeypatch.chdir(folder)
    assert model_name(".") == name


def test_names_of_other_things(tmp_path):
    assert model_name("baidu/ERNIE-4.5-21B-A3B-PT") == "baidu/ERNIE-4.5-21B-A3B-PT"
    folder = tmp_path / "models" / "PaddlePaddle" / "ERNIE-4___5"
    folder.mkdir(parents=True)
    (folder / ".msc").write_bytes(b"")
    assert model_name(folder) == "PaddlePaddle/ERNIE-4.5"
    # A snapshot that is itself a link to a disk elsewhere.
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    link = tmp_path / "models--a--b" / "snapshots" / COMMIT
    link.symlink_to(tmp_path / "disk")
    assert model_name(link) == "a/b"


# --- refusals -----------------------------------------------------------------------------------

WEIGHTS = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
@pytest.mark.parametrize("kind", ["dangling", "circle", "pipe"])
@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "config.json", WEIGHTS, INDEX])
def test_what_is_no_file_is_refused_by_name(model, tmp_path, capsys, command, kind, name):
    path = model / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling" else name)
    out = ["--output", str(tmp_path / "out")]
    if command == "quantize":
        assert quantize_main(["--model", str(model), *out]) == 2
    else:
        assert dequantize_main([str(model), *out]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in error and "error: " in error
    assert {"dangling": "nowhere", "circle": "levels of symbolic", "pipe": "pipe"}[kind] in error
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_file_that_is_too_large_is_named(model, tmp_path, capsys):
    with open(model / "huge.json", "wb") as file:
        file.truncate(64_000_001)
    assert dequantize_main([str(model), "--output", str(tmp_path / "out")]) == 0
    assert "huge.json: left out" in capsys.readouterr().err
    assert not (tmp_path / "out" / "huge.json").exists()


# --- references to code -------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_auto_map_is_left_out_with_a_message(model, tmp_path, capsys, fast):
    name = "Ernie4_5_Tokenizer"
    settings = {
        "auto_map": {"AutoTokenizer": [f"tokenization_ernie4_5.{name}", None]},
        "tokenizer_class": name,
        "bos_token": "中",
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "tokenization_ernie4_5.py").write_text("raise SystemExit")
    (model / "processor_config.json").write_text(json.dumps({"auto_map": {"A": "b.C"}, "x": 1}))
    if not fast:
        (model / "tokenizer.json").rename(model / "tokenizer.model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_ernie4_5.Ernie4_5_ForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    flags = ["--output", str(tmp_path / "quantized"), "--preset", "fast"]
    assert quantize_main(["--model", str(model), *flags]) == 0
    said = capsys.readouterr().err
    assert "tokenizer_config.json: auto_map left out" in said
    assert "processor_config.json: auto_map left out" in said
    dequantize(model, tmp_path / "plain", log=lambda text: None)
    known = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    for output in (tmp_path / "quantized", tmp_path / "plain"):
        written = json.loads((output / "tokenizer_config.json").read_text("utf-8"))
        assert written == {"tokenizer_class": known, "bos_token": "中"}
        assert json.loads((output / "processor_config.json").read_text()) == {"x": 1}
        assert "auto_map" not in json.loads((output / "config.json").read_text())
        assert not list(output.glob("*.py"))


def test_other_json_keeps_its_bytes(model, tmp_path):
    odd = {
        "vocab.json": b'{"auto_map":7,  "a":1}',
        "broken.json": b'{"auto_map": {',
        "b.json": b"[1]",
    }
    for name, data in odd.items():
        (model / name).write_bytes(data)
    files = read_companions(model).files
    for name in (*odd, *NAMED):
        assert files[name] == (model / name).read_bytes()


def test_what_is_missing_of_the_tokenizer_is_said(model, tmp_path):
    def said() -> str:
        return " ".join(read_companions(model).messages)

    assert "no tokenizer.model, which FastDeploy" in said()
    (model / "tokenizer.json").unlink()
    assert "no tokenizer (tokenizer.json or tokenizer.model)" in said()
    for name in ("tokenizer.model", "spm.model", "ernie_token_100k.model"):
        (model / name).write_bytes(b"x")
        assert said() == ""
        assert name in read_companions(model).files
        (model / name).unlink()


def test_an_opened_checkpoint_needs_no_companions(model):
    (model / "LICENSE").symlink_to("nowhere")
    assert open_checkpoint(model).names()


# --- tune ---------------------------------------------------------------------------------------

TUNED = {
    **{"text": "t", "text_sha256": "0" * 64, "tokens_learned": 1, "passes": 1},
    **{"loss_before": 1.0, "loss_after": 0.5},
}


def test_tuning_copies_by_the_same_rule(model, tmp_path):
    quantize(model, tmp_path / "out", preset="fast", quiet=True)
    folder = linked(tmp_path / "out", tmp_path / "links")
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    write_tuned(open_checkpoint(folder), tmp_path / "tuned", {}, TUNED)
    assert companions_of(tmp_path / "tuned") == set(NAMED)
    result = verify(tmp_path / "tuned", model)
    assert result.sound, result.problems
    assert not any("not listed" in message for message in result.messages)


def test_tuning_writes_no_infinity(model, tmp_path):
    quantize(model, tmp_path / "out", preset="fast", quiet=True)
    checkpoint = open_checkpoint(tmp_path / "out")
    bad = checkpoint.read_stored("ernie.norm.weight").copy()
    bad[3] = np.inf
    with pytest.raises(CcqError, match=r"ernie\.norm\.weight: tuning led to NaN or infinity"):
        write_tuned(checkpoint, tmp_path / "tuned", {"ernie.norm.weight": bad}, TUNED)
    assert not (tmp_path / "tuned").exists()


def test_the_server_calls_a_cached_model_by_its_name(model, tmp_path):
    pytest.importorskip("fastapi")
    from paddle_ccq.serve import build_parser, build_service

    quantize(model, tmp_path / "out", preset="fast", quiet=True)
    snapshot = cached(tmp_path / "out", tmp_path / "models--me--tiny-wint2")
    for given in (snapshot, tmp_path / "models--me--tiny-wint2"):
        service = build_service(build_parser().parse_args([str(given)]))
        assert service.settings.name == "me/tiny-wint2"
