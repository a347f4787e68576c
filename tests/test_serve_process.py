# SPDX-License-Identifier: Apache-2.0
"""The server as a process: start, memory, drain on SIGTERM, kill, and mistakes on its line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from helpers.server import ROOT, checkpoint, process, quantized_folder
from helpers.synthetic import tiny_config, write_tensors, write_tokenizer
from paddle_ccq.codec import formats
from paddle_ccq.families.registry import read_config
from paddle_ccq.texts.chat_template import ChatTemplate

LONG = {"model": "model", "prompt": "a", "max_tokens": 600, "ignore_eos": True, "stream": True}


def test_sigterm_finishes_what_runs_and_refuses_the_rest() -> None:
    with process(str(quantized_folder())) as (server, base):
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{base}/v1/completions", json=LONG, timeout=30) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(10)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        refused = httpx.post(f"{base}/v1/completions", json={**LONG, "stream": False})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "draining"
        assert httpx.get(f"{base}/health").status_code == 503
        reader.join(20)
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.wait(10) == 0


def test_a_drain_has_an_end_and_a_second_signal_ends_it_at_once() -> None:
    for flags, signals in ((("--drain-timeout", "1"), 1), ((), 2)):
        with process(str(quantized_folder()), *flags) as (server, base):
            begun = time.monotonic()
            long = {**LONG, "max_tokens": 1900, "n": 16}
            with httpx.stream("POST", f"{base}/v1/completions", json=long, timeout=30) as answer:
                next(iter(answer.iter_raw(16)))
                for _ in range(signals):
                    server.send_signal(signal.SIGTERM)
                    time.sleep(0.2)
                server.wait(12)
            assert time.monotonic() - begun < 12


def test_a_killed_server_breaks_its_streams_and_leaves_the_port_free() -> None:
    folder = str(quantized_folder())
    with process(folder) as (server, base):
        with (
            pytest.raises(httpx.TransportError),
            httpx.stream("POST", f"{base}/v1/completions", json=LONG, timeout=30) as answer,
        ):
            for index, _ in enumerate(answer.iter_raw(64)):
                if index == 0:
                    server.kill()
        server.wait(10)
        port = base.rpartition(":")[2]
        with process(folder, "--port", port) as (_, again):
            assert again == base
            answer = httpx.post(f"{again}/v1/completions", json={**LONG, "max_tokens": 1})
            assert answer.status_code == 200


def test_experts_stay_packed_in_memory(tmp_path: Path) -> None:
    config = tiny_config(
        hidden_size=512, moe_num_experts=32, moe_intermediate_size=512, num_hidden_layers=5
    )
    write_random_packed(tmp_path, config)
    code = (
        "import sys; from paddle_ccq.checkpoint.reader import open_checkpoint;"
        "from paddle_ccq.serving.engine_model import EngineModel, Piece;"
        "from paddle_ccq.serving.resources import resident_bytes as r;"
        "c = open_checkpoint(sys.argv[1]); before = r(); m = EngineModel(c, threads=1);"
        "k = m.new_cache(64); m.forward([Piece([5] * 32, 0, k.allocate(32))], k);"
        "print(r() - before, m.expert_bytes, m.dense_bytes)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    grown, experts, dense = map(int, done.stdout.split())
    weights = 4 * 32 * 3 * 512 * 512
    assert experts < weights * 2.3 / 8  # bits, with what is stored once a column
    # Experts as float32 are 400 MB.
    assert grown < experts + dense + (24 << 20) < weights * 4 / 5


def write_random_packed(folder: Path, values: dict) -> None:
    """A checkpoint with WINT2 experts of random bytes; their values do not matter."""
    rng = np.random.default_rng(0)
    config = read_config(values)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in config.tensors.shapes.items():
        if ".experts." not in name:
            tensors[name] = (rng.standard_normal(shape) * 0.02).astype(np.float32)
            continue
        stored = name.removesuffix(".weight")
        for suffix, (extent, dtype) in formats.tensor_specs("wint2", *shape).items():
            kind = formats.SAFETENSORS_DTYPES[dtype]
            if kind == np.uint8:
                value = rng.integers(0, 256, extent, np.uint8)
            else:
                value = np.full(extent, {"code_scale": 64, "code_zp": 8}.get(suffix, 1e-4), kind)
            tensors[f"{stored}.{suffix}"] = value
    write_tensors(folder, tensors)
    (folder / "config.json").write_text(
        json.dumps({**values, "paddle_ccq": {"row_order": "plain"}})
    )
    write_tokenizer(folder)


@pytest.mark.parametrize(
    "flags,words",
    [
        (["/nowhere/at/all"], "no such folder"),
        (["--max-model-len", "4096"], "max_position_embeddings"),
        (["--kv-cache-tokens", "100"], "--kv-cache-tokens 100"),
        (["--kv-cache-tokens", "100000000000000000"], "does not give so much memory"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from paddle_ccq.serve import main

    folder = [] if flags[0].startswith("/") else [str(quantized_folder())]
    capsys.readouterr()  # what making the folder said
    assert main([*folder, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_templates_of_a_checkpoint_run_in_a_sandbox(tmp_path: Path) -> None:
    def template(text: object) -> ChatTemplate:
        settings = {"chat_template": text, "cls_token": "<B>", "eos_token": {"content": "<E>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return ChatTemplate(tmp_path)

    messages = [{"role": "user", "content": "hi"}]
    own = "{{ cls_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert template(own).render(messages) == "<B>hi<E>"
    assert template([{"name": "default", "template": own}]).render(messages) == "<B>hi<E>"
    for hostile in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ .__subclasses__()[0] }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(ValueError, match="chat template"):
            template(hostile).render(messages)
    plain = template(None)
    assert plain.is_plain
    chat = [{"role": "system", "content": "S"}, *messages, {"role": "assistant", "content": "A"}]
    assert plain.render(chat) == "S\nUser: hi\nAssistant: A\nAssistant:"


def test_the_example_has_no_template_and_one_end_token() -> None:
    from paddle_ccq.evaluation.text import Tokenizer
    from paddle_ccq.serving.service import _end_tokens

    tokenizer = Tokenizer(quantized_folder(), checkpoint().config.raw)
    assert _end_tokens(checkpoint(), tokenizer) == {tokenizer.eos}
    assert ChatTemplate(quantized_folder()).is_plain
