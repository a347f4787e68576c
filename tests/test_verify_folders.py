# SPDX-License-Identifier: Apache-2.0
"""verify in folders that went through a hub, version control or people's hands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.evaluation.text import Tokenizer
from paddle_ccq.fastdeploy.check import ServeConfig, check
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import main, verify

CONFIG = tiny_config(num_hidden_layers=2, moe_num_experts=2, moe_intermediate_size=256)
SHARD = "model-00001-of-00001.safetensors"
LEFT_BEHIND = (
    ".cache/huggingface/.gitignore",
    ".cache/huggingface/download/config.json.metadata",
    ".cache/huggingface/download/model.safetensors.lock",
    ".gitattributes",
    ".gitignore",
    ".git/config",
    ".git/objects/ab/cdef",
    ".huggingface/download/x.metadata",
    ".msc",
    ".mdl",
    ".mv",
    "._____temp/model.safetensors",
    ".hg/store/x",
    ".svn/entries",
    ".ipynb_checkpoints/config-checkpoint.json",
    ".DS_Store",
    "._config.json",
    "._model-00001-of-00001.safetensors",
    "__MACOSX/._config.json",
    "Thumbs.db",
    "desktop.ini",
    "lost+found/x",
    ".nfs000000001234",
    "config.json~",
    "rank0/.DS_Store",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(root / "m", CONFIG)
    (root / "m" / "LICENSE").write_text("terms")
    (root / "m" / "merges.txt").write_text("a b")
    (root / "m" / "tokenizer.model").write_bytes(b"spm")
    for ranks in (1, 2):
        quantize(
            root / "m", root / f"tp{ranks}", tensor_parallel_size=ranks, preset="fast", quiet=True
        )
    return {ranks: root / f"tp{ranks}" for ranks in (1, 2)}


@pytest.fixture(params=[1, 2])
def copy(made, tmp_path, request) -> Path:
    return Path(shutil.copytree(made[request.param], tmp_path / "copy"))


def weights_of(folder: Path) -> Path:
    return next(path for path in (folder / SHARD, folder / "rank1" / SHARD) if path.exists())


def add(folder: Path, name: str, content: str = "x") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_what_hubs_and_systems_leave_is_passed_over(made, tmp_path):
    copy = Path(shutil.copytree(made[2], tmp_path / "copy"))
    before = verify(copy)
    for name in LEFT_BEHIND:
        add(copy, name)
    after = verify(copy)
    assert after.sound, after.problems
    assert after.messages == before.messages
    assert main([str(copy)]) == 0


def test_a_real_clone(made, tmp_path):
    origin = Path(shutil.copytree(made[1], tmp_path / "origin"))
    (origin / ".gitattributes").write_text("*.safetensors binary\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "model"]):
        subprocess.run([*git, *command], cwd=origin, check=True)
    subprocess.run([*git, "clone", "-q", "origin", "clone"], cwd=tmp_path, check=True)
    result = verify(tmp_path / "clone")
    assert result.sound, result.problems
    assert check(tmp_path / "clone", ServeConfig(), hashes=True).problems == []


def test_added_files_are_one_note(copy):
    for number in range(9):
        add(copy, f"extra/notes-{number}.txt")
    add(copy, "eval.json")
    result = verify(copy)
    assert result.sound, result.problems
    (note,) = [m for m in result.messages if "not listed in ccq-manifest.json" in m]
    assert "eval.json" in note and "and 4 more" in note


@pytest.mark.parametrize("what", ["edited", "longer", "removed"])
@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_documents_that_changed_are_notes(copy, name, what):
    path = copy / name
    if what == "edited":
        path.write_bytes(path.read_bytes()[::-1])
    elif what == "longer":
        path.write_text("another")
    else:
        path.unlink()
    result = verify(copy)
    assert result.sound, result.problems
    assert any(message.startswith(f"{name}: ") for message in result.messages)
    checked = check(copy, ServeConfig(tensor_parallel_size=2 if (copy / "rank0").is_dir() else 1))
    assert not any(name in problem for problem in checked.problems)
    if what != "edited":  # without --hash only the size is looked at
        assert any(warning.startswith(f"{name}: ") for warning in checked.warnings)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"]
)
@pytest.mark.parametrize("what", ["edited", "removed"])
def test_files_that_change_what_is_computed_are_problems(copy, name, what):
    path = copy / name
    if what == "edited":
        path.write_bytes(path.read_bytes()[:-1] + b" ")
    else:
        path.unlink()
    (problem,) = verify(copy).problems
    assert problem.startswith(f"{name}: ")
    assert main([str(copy)]) == 1


def test_a_changed_config_and_index(copy):
    for path in (copy / "config.json", weights_of(copy).parent / "model.safetensors.index.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content))
        name = path.relative_to(copy).as_posix()
        assert any(problem.startswith(f"{name}: ") for problem in verify(copy).problems)


def test_a_changed_byte_and_a_missing_shard(copy):
    path = weights_of(copy)
    name = path.relative_to(copy).as_posix()
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    assert any(p.startswith(f"{name}: sha256 differs") for p in verify(copy).problems)
    path.unlink()
    assert f"{name}: missing" in verify(copy).problems


@pytest.mark.parametrize("manifest", [True, False])
def test_weights_that_the_index_does_not_name(copy, manifest):
    if not manifest:
        (copy / "ccq-manifest.json").unlink()
    path = weights_of(copy)
    shutil.copyfile(path, path.with_name("model-00002-of-00002.safetensors"))
    (problem,) = verify(copy).problems
    assert "model-00002-of-00002.safetensors: weights that" in problem
    # Elsewhere nothing looks for weights.
    path.with_name("model-00002-of-00002.safetensors").unlink()
    add(copy, "old/model-00002-of-00002.safetensors")
    assert verify(copy).sound


# --- links --------------------------------------------------------------------------------------


def as_links(folder: Path, store: Path) -> None:
    """Every file becomes a link to a blob without its name, as in a hub's cache."""
    store.mkdir()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for number, path in enumerate(sorted(files)):
        blob = store / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))


def test_a_folder_of_links(copy, tmp_path):
    as_links(copy, tmp_path / "blobs")
    result = verify(copy)
    assert result.sound, result.problems
    path = weights_of(copy)
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.resolve().write_bytes(data)
    assert any("sha256 differs" in problem for problem in verify(copy).problems)


def test_a_folder_of_links_is_read_by_everything(made, tmp_path):
    copy = Path(shutil.copytree(made[1], tmp_path / "copy"))
    as_links(copy, tmp_path / "blobs")
    checkpoint = open_checkpoint(copy)
    assert Tokenizer(copy, checkpoint.config.raw).encode("a")
    assert check(copy, ServeConfig(), hashes=True).problems == []


def test_rank_folders_that_are_links(made, tmp_path):
    copy = Path(shutil.copytree(made[2], tmp_path / "copy"))
    for rank in ("rank0", "rank1"):
        (copy / rank).rename(tmp_path / rank)
        (copy / rank).symlink_to(tmp_path / rank)
    result = verify(copy)
    assert result.sound, result.problems
    assert not any("not listed" in message for message in result.messages)
    (copy / "circle").symlink_to(copy)
    assert verify(copy).sound


def test_links_that_lead_nowhere(copy):
    path = weights_of(copy)
    name = path.relative_to(copy).as_posix()
    for broken in (path, copy / "tokenizer.json"):
        broken.unlink()
        broken.symlink_to("gone")
    problems = verify(copy).problems
    assert f"{name}: a link to gone, which is missing" in problems
    assert any(p.startswith("tokenizer.json: a link to gone") for p in problems)


def test_a_pipe_in_place_of_a_file(copy):
    for path in (copy / "tokenizer.json", weights_of(copy)):
        path.unlink()
        os.mkfifo(path)
    problems = verify(copy).problems
    assert any(p.startswith("tokenizer.json: not a regular file") for p in problems)
    assert any(SHARD in p for p in problems)
