# SPDX-License-Identifier: Apache-2.0
"""What commands print: no markup, encoding, closed stream or lost reader changes a run."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq import reporting
from paddle_ccq.command import output_path, run_command
from paddle_ccq.errors import CcqError, describe_os_error, readable, run_cli, visible
from paddle_ccq.evaluation.report import detail_table
from paddle_ccq.quantize import main as quantize_main
from paddle_ccq.quantize import quantize

FOREIGN = "mödel [b]模型[:b]"
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("streams")
    config = tiny_config(num_hidden_layers=2, moe_num_experts=2, moe_k=1)
    write_checkpoint(root / FOREIGN, config)
    quantize(root / FOREIGN, root / "äus[bold]", preset="fast", quiet=True)
    bad = Path(shutil.copytree(root / "äus[bold]", root / "bäd"))
    (bad / "config.json").write_text((bad / "config.json").read_text() + "\n")
    return root


def shell(folder: Path, line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A bash line, in which $P is Python; its exit code is that of the command before a pipe."""
    return subprocess.run(
        ["bash", "-c", f"{line}\nexit ${{PIPESTATUS[0]}}"],
        cwd=folder,
        env={**os.environ, "P": sys.executable, **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )


COMMANDS = {
    "sound": ('"$P" -m paddle_ccq.verify "äus[bold]"', 0),
    "not sound": ('"$P" -m paddle_ccq.verify bäd', 1),
    "error": ('"$P" -m paddle_ccq.verify nöwhere', 2),
    "help": ('"$P" -m paddle_ccq quantize --help', 0),
    "usage": ('"$P" -m paddle_ccq', 2),
    "plan": (f'"$P" -m paddle_ccq.quantize --dry-run --model "{FOREIGN}"', 0),
    "check": ('"$P" -m paddle_ccq.fastdeploy.check "äus[bold]" --gpu-memory 24', None),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_exit_code_is_the_works_own_whoever_reads(folder, name) -> None:
    line, code = COMMANDS[name]
    plain = shell(folder, line)
    code = plain.returncode if code is None else code
    for streams in ("", ">&-", "2>&-", "<&- >&- 2>&-", "| head -n 1", "2>&1 | head -n 1"):
        done = shell(folder, f"{line} {streams}")
        assert done.returncode == code, (streams, done)
        assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, streams
    assert b"Traceback" not in plain.stderr
    # A full disk takes nothing: messages may be lost, results may not.
    assert shell(folder, f"{line} 2>/dev/full").returncode == code
    full = shell(folder, f"{line} >/dev/full")
    if plain.stdout and name != "help":
        assert full.returncode == 2 and full.stderr.count(b"not all results could be printed") == 1


@pytest.mark.parametrize("name", ["sound", "not sound", "error", "plan", "check"])
def test_any_encoding_can_print_any_name(folder, name) -> None:
    line, _ = COMMANDS[name]
    plain = shell(folder, line, PYTHONIOENCODING="utf-8")
    for environment in (
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
        C_LOCALE,
    ):
        done = shell(folder, line, **environment)
        assert done.returncode == plain.returncode, (environment, done)
        assert b"Traceback" not in done.stderr
        # What is printed says the same, character for character or escape for escape.
        if name != "plan":
            for text in ("äus[bold]", "bäd", "nöwhere"):
                forms = {text.encode(), text.encode("ascii", "backslashreplace")}
                forms.add(text.encode("latin-1"))
                shown = plain.stdout + plain.stderr
                if text.encode() in shown:
                    assert any(form in done.stdout + done.stderr for form in forms), done


def test_the_locale_does_not_change_what_is_written(folder, tmp_path) -> None:
    for out, environment in (("ä1", {}), ("ä2", C_LOCALE)):
        line = f'"$P" -m paddle_ccq.quantize --model "{FOREIGN}" --output "{tmp_path}/{out}"'
        done = shell(folder, f"{line} --preset fast", **environment)
        assert done.returncode == 0, done
        assert f"{tmp_path}/{out}".encode() in done.stdout
    for path in sorted((tmp_path / "ä1").iterdir()):
        assert path.read_bytes() == (tmp_path / "ä2" / path.name).read_bytes(), path.name
    said = json.loads((tmp_path / "ä2" / "config.json").read_text("utf-8"))["paddle_ccq"]
    assert said["source_model"] == FOREIGN


def test_a_closed_stream_is_no_place_for_the_next_file(folder, tmp_path) -> None:
    """Without a descriptor 1, the first file opened would be it, and get what is printed."""
    line = f'"$P" -m paddle_ccq.quantize --model "{FOREIGN}" --preset fast --output'
    assert shell(folder, f"{line} {tmp_path}/open").returncode == 0
    assert shell(folder, f"{line} {tmp_path}/closed <&- >&- 2>&-").returncode == 0
    for path in sorted((tmp_path / "open").iterdir()):
        assert path.read_bytes() == (tmp_path / "closed" / path.name).read_bytes(), path.name


def test_the_server_serves_without_streams(folder) -> None:
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f'exec "$P" -m paddle_ccq.serve "äus[bold]" --port {port} <&- >&- 2>&-'
    environment = {**os.environ, "P": sys.executable, **C_LOCALE}
    with subprocess.Popen(["bash", "-c", line], cwd=folder, env=environment) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                with contextlib.suppress(OSError):
                    with urllib.request.urlopen(f"{url}/health") as answer:
                        assert answer.status == 200
                    break
                assert server.poll() is None
                time.sleep(0.1)
            with urllib.request.urlopen(f"{url}/v1/models") as answer:
                assert json.load(answer)["data"][0]["id"] == "äus[bold]"
        finally:
            server.terminate()
        assert server.wait() == 0


def test_a_full_disk_is_named_with_the_file(folder, tmp_path, monkeypatch, capsys) -> None:
    """The log is written a line a matrix, long after it was opened."""
    target = tmp_path / "log"
    target.symlink_to("/dev/full")
    (tmp_path / "out.ccq-partial").mkdir()  # as of a run that goes on: its log exists
    flags = ["--model", str(folder / FOREIGN), "--output", str(tmp_path / "out")]
    assert quantize_main([*flags, "--log", str(target), "--preset", "fast"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {target}: no space left on the device")


@pytest.mark.parametrize("name", ["a[/b]", "[bold]o[/]", ":smile:", "[red]", "a\\[b"])
def test_no_text_is_markup(folder, tmp_path, capsys, name) -> None:
    target = tmp_path / name  # a slash makes two folders
    model = str(folder / FOREIGN)
    assert quantize_main(["--model", model, "--output", str(target), "--preset", "fast"]) == 0
    assert str(target) in capsys.readouterr().out and target.is_dir()
    out = reporting.console()
    out.print(reporting.table([name, "x"], [[name, name]], title=name))
    out.print(detail_table({name: {"tasks": {name: {"accuracy": 0.5}}}}, title=name))
    assert capsys.readouterr().out.count(name) == 7
    out.print(reporting.table(["x\x1b[2J"], [["y\x1b[2J"]]))
    out.print(detail_table({"x\x1b[2J": {"tasks": {"y\x1b[2J": {"accuracy": 0.5}}}}))
    assert "\x1b" not in capsys.readouterr().out


def test_a_terminal_obeys_no_name() -> None:
    assert visible("a\x1b[2Jb\u202ec\td") == "a\\x1b[2Jb\\u202ec\td"
    assert str(CcqError("x\x07\ny \x9b")) == "x\\x07 y \\x9b"
    assert visible("\N{FAMILY}\u200d模\u0301") == "\N{FAMILY}\u200d模\u0301"
    assert readable("a\nb  c") == "a b  c"
    assert readable(os.fsdecode("ö".encode())) == "ö"
    assert readable(os.fsdecode(b"\xff")) == "\ufffd"


EMPTY = {
    "quantize": [["--model", ""], ["--model", "m", "--output", ""], ["--model", "m", "--log", " "]],
    "verify": [[""], ["m", "--reference", ""], ["m", "--json", ""]],
    "dequantize": [["", "--output", "o"], ["m", "--output", ""]],
    "evaluate": [[""], ["m", "--text", ""], ["m", "--tasks", "a", ""], ["m", "--reference", ""]],
    "sample": [["", "--output", "o.jsonl"], ["m", "--output", ""]],
    "sensitivity": [["--model", "", "--calibration", "x"], ["--model", "m", "--calibration", ""]],
    "tune": [["", "--model", "m", "--calibration", "x", "--output", "o"]],
    "serve": [[""], ["m", "--api-key", ""], ["m", "--host", ""]],
    "fastdeploy.check": [[""], ["m", "--json", ""]],
    "fastdeploy.launch": [[""], ["f.yaml", "--model", ""], ["f.yaml", "--set", ""]],
}


@pytest.mark.parametrize(("command", "arguments"), [(c, a) for c in EMPTY for a in EMPTY[c]])
def test_an_empty_argument_is_named(monkeypatch, tmp_path, capsys, command, arguments) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"paddle_ccq.{command}")
    assert module.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and ": is empty; " in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be(folder, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    model = str(folder / FOREIGN)
    for name, message in (
        (".", "exists already"),
        ("file", "exists already"),
        ("file/x", "file"),
        ("a\nb", r"control character, \n"),
        ("x" * 300, "File name too long"),
        ("/proc/none/x", "/proc/none"),
    ):
        assert quantize_main(["--model", model, "--output", name]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: ") and message in said[-1], said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(CcqError, match="--output: is empty"):
        output_path("")


@pytest.mark.parametrize("make", [quantize, None])
def test_functions_refuse_an_empty_output_as_commands_do(folder, make) -> None:
    from paddle_ccq.dequantize import dequantize

    with pytest.raises(CcqError, match="--output: is empty"):
        (make or dequantize)(folder / FOREIGN, "")


def test_files_are_whole_or_not_there(tmp_path, monkeypatch) -> None:
    target = tmp_path / "r.json"
    target.write_text("kept")

    def full(path: Path, *_: object, **__: object) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError) as raised:
        reporting.write_json(target, {})
    assert "r.json: no space left on the device" in describe_os_error(raised.value)
    assert target.read_text() == "kept" and list(tmp_path.iterdir()) == [target]


def test_a_place_for_results_is_tried_before_the_work(tmp_path, monkeypatch) -> None:
    def no(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    reporting.check_can_write(tmp_path / "r.json", False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CcqError, match="already exists"):
        reporting.check_can_write(tmp_path / "link", False)
    monkeypatch.setattr(Path, "touch", no)
    with pytest.raises(CcqError, match=r"--plot .*r\.svg: Read-only file system"):
        reporting.check_can_write(tmp_path / "r.svg", True, "--plot")


def test_results_can_go_into_a_pipe(tmp_path) -> None:
    read_end, write_end = os.pipe()
    reporting.check_can_write(f"/dev/fd/{write_end}", False)
    reporting.write_json(f"/dev/fd/{write_end}", {"a": 1})
    os.close(write_end)
    with os.fdopen(read_end) as file:
        assert json.load(file) == {"a": 1}
    assert os.path.exists(os.devnull) and not os.path.isfile(os.devnull)
    reporting.write_json(os.devnull, {})
    assert not os.path.isfile(os.devnull)


def test_expected_failures_are_one_line(capsys) -> None:
    def fail(error: BaseException) -> int:
        def body(_: argparse.Namespace) -> int:
            raise error

        return run_command(argparse.ArgumentParser(), [], body)

    for error, message in (
        (CcqError("a\nb"), "error: a b\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x\ny"), "error: x y: Permission den"),
        (OSError(errno.ENOSPC, "No space"), "error: no space left on the device"),
        (MemoryError(), "error: not enough memory\n"),
    ):
        assert fail(error) == 2
        said = capsys.readouterr().err
        assert said.startswith(message) and said.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)
