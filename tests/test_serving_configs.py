# SPDX-License-Identifier: Apache-2.0
"""serving/: files that FastDeploy understands and cards can hold, the launcher, the clients."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.engine_check import GIB
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.fastdeploy import launch
from paddle_ccq.fastdeploy.memory import card_memory
from paddle_ccq.fastdeploy.releases import RELEASES, release_of
from paddle_ccq.fastdeploy.server_flags import PORTS, arguments, unknown_settings
from paddle_ccq.fastdeploy.settings import (
    load_settings,
    serve_config_of,
    with_overrides,
    with_ports,
)
from paddle_ccq.quantize import quantize
from paddle_ccq.targets.fastdeploy.layout import build_plan

ROOT = Path(__file__).parent.parent
SERVING = ROOT / "serving"
FILES = sorted(SERVING.glob("*.yaml"))
# What the cards of a file's name report, in GiB; the smallest of their kind.
CARDS = {"141gb": 140.4, "80gb": 79.2, "24gb": 22.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    write_checkpoint(root / "m", tiny_config(num_hidden_layers=2, moe_num_experts=2))
    (root / "m" / "tokenizer.model").write_bytes(b"spm")  # only its name is looked at
    quantize(root / "m", root / "out", preset="fast", quiet=True)
    return root / "out"


def start(arguments: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **changes}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


def four_free_ports() -> int:
    """The first of four: below those that the system gives to connections, which come and go."""
    for first in range(20_000 + os.getpid() % 5_000, 32_000, len(PORTS)):
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in PORTS]
            with contextlib.suppress(OSError):
                for i, probe in enumerate(probes):
                    probe.bind(("127.0.0.1", first + i))
                return first
    raise AssertionError("no four free ports")


def test_there_are_files() -> None:
    assert len(FILES) == 4


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("version", ["2.3", "2.4", "2.5", "2.6", "develop"])
def test_keys_are_flags_of_the_server(path: Path, version: str) -> None:
    settings = load_settings(path)
    assert unknown_settings(settings, RELEASES[version]) == []
    assert set(PORTS) <= set(settings)
    assert settings["host"] == "127.0.0.1"
    assert settings["max_num_seqs"] <= RELEASES[version].most_sequences
    # What releases choose differently is said.
    assert settings["workers"] == 1
    assert settings["max_concurrency"] >= settings["max_num_seqs"]
    assert settings["max_model_len"] % 64 == 0 and settings["load_choices"] == "default"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_model_fits_the_cards_in_the_name(path: Path) -> None:
    found = re.fullmatch(r"(ernie-4\.5-\d+b)-(\d)x(\d+gb)", path.stem)
    settings = load_settings(path)
    assert settings["tensor_parallel_size"] == int(found[2])
    (config,) = (ROOT / "examples/configs").glob(f"{found[1]}-*")
    serve = serve_config_of(settings, RELEASES["2.5"], int(CARDS[found[3]] * GIB))
    memory = card_memory(
        build_plan(read_config(config), tensor_parallel_size=serve.tensor_parallel_size),
        serve.card_bytes,
        serve.max_num_seqs,
        serve.max_num_batched_tokens,
        serve.gpu_memory_utilization,
    )
    assert memory.sequences(serve.max_model_len) >= 4


def test_the_dry_run_prints_the_exact_command(model, tmp_path) -> None:
    done = start(
        [
            *(str(SERVING / "launch.py"), str(SERVING / "ernie-4.5-21b-1x24gb.yaml")),
            *("--model", str(model), "--gpu-memory", "24", "--dry-run", "--devices", "0"),
            *("--port", "9000", "--set", "max_num_seqs=32", "--log-dir", str(tmp_path)),
            *("--set", "enable_prefix_caching=false", "--fastdeploy-version", "2.5.0"),
        ]
    )
    assert done.returncode == 0, done.stderr
    command = done.stdout[done.stdout.index("CUDA_VISIBLE_DEVICES") :].replace("\\\n", " ").split()
    assert command == [
        "CUDA_VISIBLE_DEVICES=0",
        f"FD_LOG_DIR={tmp_path}",
        *(sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"),
        *("--model", str(model), "--host", "127.0.0.1", "--port", "9000"),
        *("--metrics-port", "9001", "--engine-worker-queue-port", "9002"),
        *("--cache-queue-port", "9003", "--served-model-name", "ernie-4.5-21b-2bit"),
        *("--tensor-parallel-size", "1", "--max-model-len", "32768", "--max-num-seqs", "32"),
        *("--max-num-batched-tokens", "8192", "--gpu-memory-utilization", "0.9"),
        *("--workers", "1", "--max-concurrency", "512"),
        *("--load-choices", "default", "--no-enable-prefix-caching", "--enable-chunked-prefill"),
    ]


def test_it_becomes_the_server(model, tmp_path) -> None:
    """A package named fastdeploy that reports its arguments stands in for the real one."""
    package = tmp_path / "fastdeploy" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(
        "import json, os, sys\n"
        "keys = os.environ['FD_API_KEY'], os.environ['CUDA_VISIBLE_DEVICES']\n"
        "print(json.dumps([sys.argv[1:], keys]), flush=True)\nsys.exit(7)\n"
    )
    port = four_free_ports()
    done = start(
        [
            *(str(SERVING / "launch.py"), str(FILES[0]), "--model", str(model)),
            *("--gpu-memory", "24", "--devices", "3", "--port", str(port)),
        ],
        PYTHONPATH=str(tmp_path),
        FD_API_KEY="secret",
    )
    assert done.returncode == 7, done.stdout + done.stderr
    arguments, keys = json.loads(done.stdout.splitlines()[-1])
    assert arguments[:2] == ["--model", str(model)] and keys == ["secret", "3"]
    assert "secret" not in done.stdout.rpartition("\n[[")[0]


def test_a_bad_checkpoint_is_not_started(model, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "bad"))
    next(folder.glob("*.safetensors")).unlink()
    arguments = [str(FILES[0]), "--model", str(folder), "--gpu-memory", "24"]
    assert launch.main(arguments) == 1
    out = capsys.readouterr().out
    assert "NOT good" in out and "api_server" not in out
    assert launch.main([*arguments, "--no-check", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["none.yaml"], "none.yaml"),
        ([str(FILES[0])], "--model: needed"),
        ([str(FILES[0]), "--model", "no/where", "--gpu-memory", "24"], "no such folder"),
        ([str(FILES[0]), "--model", "x", "--set", "max_seqs=3"], "max_seqs: FastDeploy"),
        ([str(FILES[0]), "--model", "x", "--set", "max_num_seqs"], "must be NAME=VALUE"),
        ([str(FILES[0]), "--model", "x", "--set", "metrics_port=8180"], "different ports"),
        ([str(FILES[0]), "--model", "x", "--set", "port=http"], "not a whole number"),
        ([str(FILES[0]), "--model", "x", "--devices", "gpu"], "--devices gpu"),
        ([str(FILES[0]), "--model", "x", "--fastdeploy-version", "9.9"], "not a release line"),
        (
            [str(FILES[0]), "--model", ".", "--gpu-memory", "24", "--set", "max_num_seqs=lots"],
            "max_num_seqs: 'lots'",
        ),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, text) -> None:
    assert launch.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words\n", "a: [1\n", "1: 2\n", ""])
def test_files_that_are_no_settings(tmp_path, content) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(CcqError, match=r"x\.yaml"):
        load_settings(path)


def test_settings() -> None:
    assert with_overrides({"a": 1, "b": 2}, ["a=null", "--c-d=[1, 2]"]) == {"b": 2, "c_d": [1, 2]}
    found = with_ports({"port": 9000, "metrics_port": 7000}, None)
    assert [found[name] for name in PORTS] == [9000, 7000, 9002, 9003]
    with pytest.raises(CcqError):
        with_overrides({}, ["a={"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_key": ["one", "two"]}, ["--api-key", "one", "--api-key", "two"]),
        ({"api_key": ["a,b"]}, ["--api-key", "a,b"]),
        ({"api_key": ["-x", 7]}, ["--api-key=-x", "--api-key", "7"]),
        ({"api_key": []}, []),
        ({"logits_processors": ["a.B", "c.D"]}, ["--logits-processors", "a.B", "c.D"]),
        ({"ips": ["10.0.0.1", "10.0.0.2"]}, ["--ips", "10.0.0.1,10.0.0.2"]),
        ({"rdma_comm_ports": [7001, 7002]}, ["--rdma-comm-ports", "7001,7002"]),
        ({"seed": -1}, ["--seed", "-1"]),
        ({"served_model_name": "-x"}, ["--served-model-name=-x"]),
    ],
)
def test_lists_reach_the_server_as_it_takes_them(settings, words) -> None:
    release = release_of("2.5")
    assert arguments(settings, release) == words
    # As the server's own parser reads them.
    parser = argparse.ArgumentParser()
    parser.add_argument("--api-key", action="append")
    parser.add_argument("--logits-processors", nargs="+")
    for flag in ("ips", "rdma-comm-ports", "seed", "served-model-name"):
        parser.add_argument(f"--{flag}", type=lambda text: text.split(","))
    ((key, value),) = settings.items()
    wanted = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    assert (getattr(parser.parse_args(words), key) or []) == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": [1, 2]},
        {"model": ["a", "b"]},
        {"ips": ["10.0.0.1,10.0.0.2"]},
        {"api_key": ["one", None]},
        {"api_key": ["one", ""]},
        {"api_key": [["one", "two"]]},
        {"logits_processors": ["a.B", "-x"]},
    ],
)
def test_lists_that_the_server_would_misread_are_refused(settings) -> None:
    with pytest.raises(CcqError, match=f"^{next(iter(settings))}: "):
        arguments(settings, release_of("2.5"))


def test_a_list_in_a_file_reaches_the_command(model, tmp_path, capsys) -> None:
    path = tmp_path / "two keys.yaml"
    path.write_text(FILES[0].read_text(encoding="utf-8") + "api_key: [one, two]\n", "utf-8")
    command = [str(path), "--model", str(model), "--no-check", "--dry-run"]
    assert launch.main([*command, "--fastdeploy-version", "2.5"]) == 0
    assert "--api-key one" in (out := capsys.readouterr().out) and "--api-key two" in out


def test_the_plugin_is_loaded_on_request(model, monkeypatch, capsys) -> None:
    arguments = [str(FILES[0]), "--model", str(model), "--no-check", "--dry-run", "--plugin"]
    monkeypatch.setattr(launch.metadata, "entry_points", lambda group: SimpleNamespace(names=[]))
    assert launch.main(arguments) == 2
    assert "pip install -e ." in capsys.readouterr().err
    found = SimpleNamespace(names=["paddle_ccq"])
    monkeypatch.setattr(launch.metadata, "entry_points", lambda group: found)
    monkeypatch.setenv("FD_PLUGINS", "other,paddle_ccq")
    assert launch.main(arguments) == 0
    assert "FD_PLUGINS=other,paddle_ccq " in capsys.readouterr().out
    monkeypatch.delenv("FD_PLUGINS")
    assert launch.main(arguments) == 0
    assert "FD_PLUGINS=paddle_ccq " in capsys.readouterr().out
    assert launch.main([*arguments, "--fastdeploy-version", "2.3"]) == 2


def test_develop_is_not_started_without_the_plugin(model, monkeypatch, capsys) -> None:
    arguments = [str(FILES[0]), "--model", str(model), "--gpu-memory", "24", "--dry-run"]
    arguments += ["--fastdeploy-version", "2.6.0-dev"]
    monkeypatch.delenv("FD_PLUGINS", raising=False)
    assert launch.main(arguments) == 1
    out = capsys.readouterr().out
    assert "problem: FastDeploy develop" in out and "--plugin of serving/launch.py" in out
    monkeypatch.setenv("FD_PLUGINS", "other,paddle_ccq")
    assert launch.main(arguments) == 0
    monkeypatch.delenv("FD_PLUGINS")
    found = SimpleNamespace(names=["paddle_ccq"])
    monkeypatch.setattr(launch.metadata, "entry_points", lambda group: found)
    assert launch.main([*arguments, "--plugin"]) == 0
    assert "FD_PLUGINS=paddle_ccq " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "version", "text"),
    [
        ("max_model_len=1000", "2.5", "960 or 1024"),
        ("block_size=48", "2.5", "block size, 48"),
        ('speculative_config={"method": "mtp", "num_speculative_tokens": 5}', "2.6", "6 tokens a"),
        ('speculative_config={"method": "mtp", "num_model_steps": 4}', "2.6", "5 tokens a"),
        ('speculative_config="{\\"method\\": \\"ngram\\"}"', "develop", "2 tokens a"),
        ("speculative_config=fast", "2.6", "speculative_config: 'fast' is not JSON"),
        ("speculative_config=[1]", "2.6", "speculative_config: takes one value, not a list"),
        ("workers=many", "2.6", "workers: 'many'"),
        ("max_concurrency=0", "2.6", "--max-concurrency must be positive"),
    ],
)
def test_settings_against_the_rules_of_a_release(model, capsys, setting, version, text) -> None:
    arguments = [str(FILES[0]), "--model", str(model), "--gpu-memory", "24", "--dry-run"]
    batched = ["--set", "max_num_batched_tokens=100"] if "tokens a" in text else []
    arguments += ["--set", "max_num_seqs=64", *batched, "--set", setting]
    assert launch.main([*arguments, "--fastdeploy-version", version]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error


def test_drafts_that_ask_for_nothing() -> None:
    for value in (None, {}, {"method": None}, {"method": "naive", "num_speculative_tokens": 0}):
        serve = serve_config_of({"speculative_config": value}, RELEASES["2.6"], None)
        assert serve.draft_tokens == 0
    assert serve_config_of({"workers": 2}, RELEASES["2.6"], None).api_processes == 2
    assert serve_config_of({}, RELEASES["2.6"], None).api_processes == 4
    assert serve_config_of({}, RELEASES["2.5"], None).api_processes == 1


def test_ports_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = dict.fromkeys(PORTS, port)
        assert launch.busy_ports(settings) == [port] * 4


class _Server(BaseHTTPRequestHandler):
    """Enough of the API for one answer, unready for the first two looks at /health."""

    looks = 0

    def log_message(self, *args: object) -> None:
        pass

    def _send(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/health":
            type(self).looks += 1
            self._send(b"", status=200 if self.looks > 2 else 503)
        else:
            self._send(json.dumps({"object": "list", "data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer k1":
            self._send(b'{"error": "Unauthorized"}', status=401)
        elif asked.get("stream"):
            words = [{"choices": [{"index": 0, "delta": {"content": w}}]} for w in ("Hi ", "you")]
            events = [f"data: {json.dumps(word)}\n\n" for word in [*words, {"choices": []}]]
            self._send("".join([*events, "data: [DONE]\n\n"]).encode(), "text/event-stream")
        else:
            message = {"role": "assistant", "content": asked["messages"][0]["content"].upper()}
            self._send(json.dumps({"choices": [{"index": 0, "message": message}]}).encode())


@pytest.fixture
def server():
    _Server.looks = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_waiting(server, capsys, monkeypatch) -> None:
    monkeypatch.setattr(launch, "_POLL_SECONDS", 0.05)
    _Server.looks = -1000
    assert launch.main([str(FILES[0]), "--port", str(min(server, 65000)), "--wait", "0.1"]) == 1
    _Server.looks = 0
    settings = {"host": "0.0.0.0", "port": server}
    assert launch.wait(settings, 20) == 0
    assert "ready after" in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("openai"), reason="needs the openai package")
def test_the_python_client(server) -> None:
    url = f"http://127.0.0.1:{server}/v1"
    client = [str(SERVING / "client.py"), "hello", "--url", url]
    assert start(client, FD_API_KEY="k1,k2").stdout == "HELLO\n"
    assert start([*client, "--stream"], FD_API_KEY="k1").stdout == "Hi you\n"
    refused = start(client, FD_API_KEY="other")
    assert refused.returncode == 2 and "401" in refused.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_curl_client(server) -> None:
    done = subprocess.run(
        ["sh", str(SERVING / "client.sh"), 'say "hi"', f"http://127.0.0.1:{server}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "FD_API_KEY": "k1"},
    )
    assert done.returncode == 0 and done.stdout.endswith("data: [DONE]\n\n")


def test_the_sizing_table_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("sizing", SERVING / "sizing.py")
    sizing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizing)
    assert sizing.table() in (SERVING / "README.md").read_text("utf-8")


def test_settings_in_the_runbook() -> None:
    text = (SERVING / "README.md").read_text("utf-8")
    for assignment in re.findall(r"--set (\w+=[^\s`]+)", text):
        name, _, value = assignment.partition("=")
        assert unknown_settings({name: yaml.safe_load(value)}, RELEASES["2.5"]) == []
