# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any moment, and started again, ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import paddle_ccq.quantization.run as module
from helpers.runs import contents, partial, stop_after
from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint import journal as journals
from paddle_ccq.checkpoint import safetensors_writer, writer
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import main, quantize

ROOT = Path(__file__).parent.parent
CONFIG = tiny_config(num_hidden_layers=2, moe_num_experts=2, tie_word_embeddings=False)
OPTIONS = {"preset": "fast", "max_shard_size": "150kB", "quiet": True}
FLAGS = ["--preset", "fast", "--max-shard-size", "150kB", "--threads", "1", "--quiet"]

# Runs the command and kills itself without warning at the given count of a given event.
KILLER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
event, count = sys.argv[2], int(sys.argv[3])
from paddle_ccq.checkpoint import safetensors_writer, writer
from paddle_ccq.quantize import main

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(original, before):
    def wrapper(*args):
        global count
        count -= 1
        if count == 0:
            before(*args)
            die()
        return original(*args)
    return wrapper

def torn(self, data):
    self._file.write(memoryview(data)[: len(data) // 2])

if event == "fsync":
    os.fsync = counted(os.fsync, lambda *_: None)
elif event == "synced":
    real = os.fsync
    os.fsync = counted(os.fsync, real)
elif event == "write":
    append = safetensors_writer.SafetensorsWriter._append
    safetensors_writer.SafetensorsWriter._append = counted(append, torn)
elif event == "rename":
    real_rename = os.rename
    os.rename = counted(os.rename, real_rename if count == 2 else lambda *_: None)
    count = 1
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model(CONFIG, shards=2)


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out, threads=1, **OPTIONS)
    return contents(out)


def killed_run(model: Path, out: Path, event: str, count: int, extra: list[str] = []) -> int:  # noqa: B006
    command = [sys.executable, "-c", KILLER, str(ROOT), event, str(count)]
    command += ["--model", str(model), "--output", str(out), *FLAGS, *extra]
    return subprocess.run(command, capture_output=True, timeout=120).returncode


@pytest.mark.parametrize("event", ["fsync", "synced", "write"])
def test_killed_at_many_points(model, expected, tmp_path, event):
    out = tmp_path / "out"
    rng = random.Random(event)
    kills = 0
    while not out.exists():
        code = killed_run(model, out, event, rng.randint(1, 30))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills >= 2
    assert contents(out) == expected


@pytest.mark.parametrize("count", [1, 2])
def test_killed_around_the_rename(model, expected, tmp_path, count):
    out = tmp_path / "out"
    assert killed_run(model, out, "rename", count) == -signal.SIGKILL
    assert out.exists() == (count == 2)
    assert killed_run(model, out, "none", 0) == 0
    assert contents(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.log.jsonl"]


def test_killed_at_random_moments(model, expected, tmp_path):
    out = tmp_path / "out"
    rng = random.Random(1)
    command = [sys.executable, "-m", "paddle_ccq.quantize", "--model", str(model)]
    command += ["--output", str(out), *FLAGS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(6):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(0.2 + 0.4 * rng.random())
        process.kill()
        process.wait()
        if out.exists():
            break
    if not out.exists():
        assert subprocess.run(command, env=environment, timeout=120).returncode == 0
    assert contents(out) == expected


@pytest.fixture
def interrupted(model, tmp_path, monkeypatch) -> Path:
    """The output path of a run that was stopped after 12 matrices."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, threads=1, **OPTIONS)
    assert not out.exists()
    return out


def test_resume_and_log(model, expected, interrupted):
    result = quantize(model, interrupted, threads=2, **OPTIONS)
    assert contents(interrupted) == expected
    lines = [json.loads(x) for x in Path(f"{interrupted}.log.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [planned.name for planned in result.plan.tensors]
    assert not partial(interrupted).exists()


def test_torn_last_line_is_ignored(model, expected, interrupted):
    journal = partial(interrupted) / "journal.jsonl"
    data = journal.read_bytes()
    journal.write_bytes(data[:-20])
    quantize(model, interrupted, **OPTIONS)
    assert contents(interrupted) == expected


def test_torn_first_line_starts_over(model, expected, interrupted):
    journal = partial(interrupted) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:40])
    quantize(model, interrupted, **OPTIONS)
    assert contents(interrupted) == expected


def test_damaged_middle_line_is_refused(model, interrupted):
    journal = partial(interrupted) / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lines[3] = lines[3][:10]
    journal.write_bytes(b"\n".join(lines))
    with pytest.raises(CcqError, match=r"line 4 is damaged.*--restart"):
        quantize(model, interrupted, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"preset": "best"}, "--preset fast then, best now"),
        ({"encoder": "paper"}, "--encoder search then, paper now"),
        ({"format": "ccq-2.75"}, "--format wint2 then, ccq-2.75 now"),
        ({"wint4_end_layer": 1}, "--wint4-end-layer -1 then, 1 now"),
        ({"fastdeploy_layout": "2.0"}, "--fastdeploy-layout fastdeploy-2.1 then, plain now"),
        ({"max_shard_size": "200kB"}, "--max-shard-size 150000 then, 200000 now"),
        ({"allow_nonfinite": True}, "--allow-nonfinite false then, true now"),
    ],
)
def test_changed_option_is_refused(model, expected, interrupted, change, text):
    with pytest.raises(CcqError) as caught:
        quantize(model, interrupted, **{**OPTIONS, **change})
    assert text in str(caught.value)
    assert "--restart" in str(caught.value)
    # The refusal has cost nothing: the same command still goes on.
    quantize(model, interrupted, **OPTIONS)
    assert contents(interrupted) == expected


def test_changed_version_is_refused(model, interrupted, monkeypatch):
    monkeypatch.setattr(module, "__version__", "9.9.9")
    with pytest.raises(CcqError, match=r"version .* then, 9\.9\.9 now"):
        quantize(model, interrupted, **OPTIONS)


def test_changed_model_is_refused(tmp_path, monkeypatch):
    model = tmp_path / "model"
    write_checkpoint(model, CONFIG)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, **OPTIONS)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CcqError, match=r"content of model\.safetensors"):
        quantize(model, out, **OPTIONS)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "initializer_range": 0.5}))
    with pytest.raises(CcqError, match=r"the model's config\.json"):
        quantize(model, out, **OPTIONS)


def test_restart_throws_the_old_work_away(model, expected, interrupted):
    quantize(model, interrupted, restart=True, **OPTIONS)
    assert contents(interrupted) == expected


def test_changed_partial_data_is_noticed(model, interrupted):
    files = sorted((partial(interrupted) / "checkpoint").glob("*.safetensors"))
    last = files[-1]
    size = last.stat().st_size
    with open(last, "r+b") as file:
        file.seek(size - 1000)
        byte = file.read(1)
        file.seek(size - 1000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CcqError, match=r"not what the journal recorded.*--restart"):
        quantize(model, interrupted, **OPTIONS)
    files[0].unlink()
    with pytest.raises(CcqError, match=r"was finished but is gone"):
        quantize(model, interrupted, **OPTIONS)


def test_existing_output_is_left_alone(model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    assert main(["--model", str(model), "--output", str(out), *FLAGS]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_two_runs_at_once(model, tmp_path):
    out = tmp_path / "out"
    with (
        writer.Workplace(out),
        pytest.raises(CcqError, match="another run is writing it"),
    ):
        quantize(model, out, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_resumable(model, expected, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = ["--model", str(model), "--output", str(out), *FLAGS]
    append = safetensors_writer.SafetensorsWriter._append
    calls = []

    def full(self, data):
        calls.append(1)
        if len(calls) == 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return append(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_writer.SafetensorsWriter, "_append", full)
        assert main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert "no space left" in error and "\n" not in error
    assert not out.exists()
    assert main(flags) == 0
    assert contents(out) == expected


def test_too_little_room_is_seen_before_the_start(model, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CcqError, match=r"needs .* more, the disk has 0\.00 MB free"):
        quantize(model, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_fingerprint_sees_a_changed_byte_anywhere_sampled(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((64).to_bytes(8, "little") + bytes(500_000))
    before = journals.file_fingerprint(path)
    data = bytearray(path.read_bytes())
    data[-1] = 1
    path.write_bytes(data)
    os.utime(path, ns=(before["mtime_ns"], before["mtime_ns"]))
    after = journals.file_fingerprint(path)
    assert after["bytes"] == before["bytes"]
    assert after["samples_sha256"] != before["samples_sha256"]
