# SPDX-License-Identifier: Apache-2.0
"""Names of models become folders; hubs are faked, nothing here needs a network."""

from __future__ import annotations

import socket
import sys
import time
import types
from pathlib import Path

import pytest

from paddle_ccq.checkpoint import source
from paddle_ccq.errors import CcqError

CLIENTS = {name: hub.client for name, hub in source.HUBS.items()}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for variable in (source.SOURCE_VARIABLE, *(hub.server_variable for hub in HUBS)):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(source.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    # No test may wait for a real server.
    monkeypatch.setattr(source, "connection_problem", lambda server: None)


HUBS = list(source.HUBS.values())


def fake_client(monkeypatch, hub_name: str, download) -> None:
    """Put a client module (and its parent packages) in place of the real one."""
    parts = CLIENTS[hub_name].split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[CLIENTS[hub_name]].snapshot_download = download


def remove_client(monkeypatch, hub_name: str) -> None:
    parts = CLIENTS[hub_name].split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), None)


def recorder(calls: list):
    def download(**options):
        calls.append(options)
        Path(options["local_dir"]).mkdir(parents=True)

    return download


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("ERNIE-4.5-300B", "baidu/ERNIE-4.5-300B-A47B-Paddle"),
        ("ERNIE-4.5-21B", "baidu/ERNIE-4.5-21B-A3B-Paddle"),
        ("ernie-4.5-0.3b", "baidu/ERNIE-4.5-0.3B-Paddle"),
        ("ERNIE-4.5-0.3B-PT", "baidu/ERNIE-4.5-0.3B-PT"),
        ("ERNIE-4.5-300B-Base", "baidu/ERNIE-4.5-300B-A47B-Base-Paddle"),
        ("ERNIE-4.5-21B-A3B-Base-PT", "baidu/ERNIE-4.5-21B-A3B-Base-PT"),
        ("ERNIE-4.5-300B-A47B-Paddle", "baidu/ERNIE-4.5-300B-A47B-Paddle"),
        ("ERNIE-4.5-300B-A47B-2Bits-Paddle", "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle"),
        ("ERNIE-4.5-21B-A3B-Thinking", "baidu/ERNIE-4.5-21B-A3B-Thinking"),
        ("DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
        ("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B"),
        ("Kimi-K2-Thinking", "moonshotai/Kimi-K2-Thinking"),
        ("someone/their-model", "someone/their-model"),
    ],
)
def test_full_id(name, model):
    assert source.full_id(name) == model


@pytest.mark.parametrize("name", ["ERNIE-4.5-300B-A3B", "ERNIE-4.5", "llama", "ERNIE-4.5-21B-XY"])
def test_unknown_short_name_lists_the_known_ones(name):
    with pytest.raises(CcqError, match=rf"^{name}: .*ERNIE-4\.5-300B, .*ERNIE-4\.5-0\.3B"):
        source.full_id(name)


def test_every_listed_name_resolves():
    for name in source.known_names():
        organization, _, published = source.full_id(name).partition("/")
        assert published.startswith(name[:11])
        assert (organization == "baidu") == name.startswith("ERNIE-4.5-")


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    lines = []
    assert source.resolve_model("org/model", log=lines.append) == Path("org/model")
    assert source.resolve_model(tmp_path, log=lines.append) == tmp_path
    assert lines == []


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CcqError, match=r"model\.safetensors: not a folder"):
        source.resolve_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["/no/such", "./nothing", "../x", "~/absent-folder", "a/b/c"])
def test_paths_that_do_not_exist_are_not_taken_for_ids(name):
    with pytest.raises(CcqError, match="no such folder"):
        source.resolve_model(name)


def test_empty_name():
    with pytest.raises(CcqError, match="the name is empty"):
        source.resolve_model(" ")


@pytest.mark.parametrize(
    ("hub_name", "argument", "model"),
    [
        ("AISTUDIO", "repo_id", "PaddlePaddle/ERNIE-4.5-21B-A3B-Paddle"),
        ("MODELSCOPE", "model_id", "PaddlePaddle/ERNIE-4.5-21B-A3B-Paddle"),
        ("HUGGINGFACE", "repo_id", "baidu/ERNIE-4.5-21B-A3B-Paddle"),
    ],
)
def test_download_from_each_hub(monkeypatch, tmp_path, hub_name, argument, model):
    calls, lines = [], []
    fake_client(monkeypatch, hub_name, recorder(calls))
    folder = source.resolve_model("ERNIE-4.5-21B", hub_name.lower(), "r1", lines.append)
    assert folder == tmp_path / "cache" / model
    assert calls == [{argument: model, "local_dir": str(folder), "revision": "r1"}]
    assert lines == [f"ERNIE-4.5-21B is {model} on {hub_name}; local folder {folder}"]


def test_organization_follows_the_hub(monkeypatch):
    calls = []
    fake_client(monkeypatch, "HUGGINGFACE", recorder(calls))
    source.resolve_model("PaddlePaddle/ERNIE-4.5-0.3B-PT", "HUGGINGFACE", log=lambda text: None)
    assert calls[0]["repo_id"] == "baidu/ERNIE-4.5-0.3B-PT"
    assert "revision" not in calls[0]


def test_default_hub_and_environment(monkeypatch):
    calls = []
    fake_client(monkeypatch, "AISTUDIO", recorder(calls))
    source.resolve_model("ERNIE-4.5-0.3B", log=lambda text: None)
    monkeypatch.setenv(source.SOURCE_VARIABLE, "MODELSCOPE")
    fake_client(monkeypatch, "MODELSCOPE", lambda **options: calls.append("modelscope"))
    source.resolve_model("ERNIE-4.5-0.3B", log=lambda text: None)
    assert calls[0]["repo_id"] == "PaddlePaddle/ERNIE-4.5-0.3B-Paddle"
    assert calls[1] == "modelscope"


def test_cache_defaults_to_home(monkeypatch, tmp_path):
    monkeypatch.delenv(source.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fake_client(monkeypatch, "AISTUDIO", recorder([]))
    folder = source.resolve_model("org/name", log=lambda text: None)
    assert folder == tmp_path / "home" / "org" / "name"


def test_unknown_hub_is_refused(monkeypatch):
    with pytest.raises(CcqError, match=r"--source: 'GITHUB' is not one of AISTUDIO, MODELSCOPE"):
        source.resolve_model("a/b", "github")
    monkeypatch.setenv(source.SOURCE_VARIABLE, "nowhere")
    with pytest.raises(CcqError, match="FD_MODEL_SOURCE: 'NOWHERE'"):
        source.resolve_model("a/b")


@pytest.mark.parametrize("hub_name", list(source.HUBS))
def test_missing_client_names_the_extra(monkeypatch, hub_name):
    remove_client(monkeypatch, hub_name)
    extra = rf"pip install 'paddle-ccq\[{hub_name.lower()}\]'"
    with pytest.raises(CcqError, match=extra):
        source.resolve_model("ERNIE-4.5-21B", hub_name, log=lambda text: None)


def test_no_network_is_one_line_that_names_the_way_out(monkeypatch):
    fake_client(monkeypatch, "AISTUDIO", pytest.fail)
    monkeypatch.setattr(source, "connection_problem", lambda server: f"{server}: no route")
    with pytest.raises(CcqError, match=r"AISTUDIO is out of reach .*no route.*pass the folder"):
        source.resolve_model("ERNIE-4.5-21B", log=lambda text: None)


def test_earlier_download_serves_without_a_network(monkeypatch, tmp_path):
    folder = tmp_path / "cache" / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    lines = []
    remove_client(monkeypatch, "AISTUDIO")
    assert source.resolve_model("org/name", log=lines.append) == folder
    assert "not installed" in lines[-1]
    fake_client(monkeypatch, "AISTUDIO", pytest.fail)
    monkeypatch.setattr(source, "connection_problem", lambda server: "no route")
    assert source.resolve_model("org/name", log=lines.append) == folder
    assert "out of reach" in lines[-1]


def test_failed_download_is_one_line(monkeypatch):
    def download(**options):
        raise RuntimeError("404 not found\n<html>")

    fake_client(monkeypatch, "AISTUDIO", download)
    with pytest.raises(CcqError, match=r"org/name: .*RuntimeError: 404 not found;") as error:
        source.resolve_model("org/name", log=lambda text: None)
    assert "\n" not in str(error.value)


def test_client_that_downloads_nothing(monkeypatch):
    fake_client(monkeypatch, "AISTUDIO", lambda *args, **options: None)
    with pytest.raises(CcqError, match="reported success"):
        source.resolve_model("org/name", log=lambda text: None)


class TestConnectionProblem:
    """The reachability check itself, against this machine only."""

    @pytest.fixture(autouse=True)
    def real_function(self, monkeypatch):
        monkeypatch.undo()
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.delenv(variable, raising=False)

    def test_open_and_closed_port(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            assert source.connection_problem(f"http://127.0.0.1:{port}") is None
            assert source.connection_problem(f"127.0.0.1:{port}") is None
        assert "127.0.0.1" in source.connection_problem(f"http://127.0.0.1:{port}")

    def test_proxy_is_what_must_be_reachable(self, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
            assert source.connection_problem("https://unreachable.invalid") is None

    def test_hanging_name_resolution_is_left_behind(self, monkeypatch):
        def hang(*args, **options):
            time.sleep(2)
            raise OSError

        monkeypatch.setattr(socket, "create_connection", hang)
        started = time.monotonic()
        assert "no answer" in source.connection_problem("https://x.invalid", seconds=0.1)
        assert time.monotonic() - started < 1.9

    def test_malformed_server(self):
        assert source.connection_problem("http://host:notaport") is not None
