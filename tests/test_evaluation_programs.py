# SPDX-License-Identifier: Apache-2.0
"""lm-eval and evalscope against the server; they run where their programs are on the PATH."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from helpers.server import (
    EXAMPLES,
    NAME,
    ROOT,
    quantized_folder,
    reference,
    rolling_windows,
    running,
    tokenizer,
)

ITEMS = 24
TASKS = ("arith", "recall", "word", "defmc", "cont")


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with running() as (found, _):
        yield f"{found}/v1"


def program(*command: str, scratch: Path, **environment: str) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, **offline, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)


@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm_eval is not on the PATH")
def test_lm_eval_gives_evaluates_numbers(base: str, tmp_path: Path) -> None:
    from paddle_ccq.evaluate import main

    program(
        "sh", str(EXAMPLES / "evaluate_with_lm_eval.sh"), str(quantized_folder()), base,
        str(ITEMS), "--output_path", str(tmp_path), scratch=tmp_path, MODEL=NAME,
    )  # fmt: skip
    results = json.loads(newest(tmp_path, "results_*.json").read_text())["results"]
    files = [str(EXAMPLES / "data" / f"{task}.jsonl") for task in TASKS]
    report = str(tmp_path / "own.json")
    arguments = [str(quantized_folder()), "--max-items", str(ITEMS), "--json", report]
    assert main([*arguments, "--tasks", *files]) == 0
    [own] = json.loads(Path(report).read_text())["results"].values()
    wanted = {task: own["tasks"][task]["accuracy"] for task in TASKS}
    assert {task: results[f"ccq_{task}"]["acc,none"] for task in TASKS} == pytest.approx(wanted)


@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm_eval is not on the PATH")
def test_lm_evals_rolling_log_likelihood_is_the_models(base: str, tmp_path: Path) -> None:
    longest = 64  # of a request, its one answer token among them: texts take several
    model = (
        f"model={NAME},base_url={base}/completions,tokenizer={quantized_folder()},"
        f"tokenizer_backend=huggingface,max_length={longest}"
    )
    program(
        "lm_eval", "run", "--model", "local-completions", "--model_args", model,
        "--include_path", "examples/lm_eval", "--tasks", "ccq_text", "--limit", "4",
        "--batch_size", "4", "--output_path", str(tmp_path), scratch=tmp_path,
    )  # fmt: skip
    found = json.loads(newest(tmp_path, "results_*.json").read_text())["results"]["ccq_text"]
    lines = (EXAMPLES / "data" / "cont.jsonl").read_text("utf-8").splitlines()[:4]
    nats, size = 0.0, 0
    for item in map(json.loads, lines):
        text = f"{item['prompt']} {item['answer']}"
        size += len(text.encode())
        for context, scored in rolling_windows(tokenizer().encode(text), longest - 2):
            scores = reference([*context, *scored], 1)[len(context) - 1 :]
            nats -= sum(score.logprob for score in scores)
    assert found["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-6)


@pytest.mark.skipif(shutil.which("evalscope") is None, reason="evalscope is not on the PATH")
def test_evalscope_measures_answers_of_the_length_it_asks_for(base: str, tmp_path: Path) -> None:
    program(
        "sh", str(EXAMPLES / "measure_with_evalscope.sh"), base, "12",
        "--number", "6", "--parallel", "3", "--outputs-dir", str(tmp_path), scratch=tmp_path,
        MODEL=NAME,
    )  # fmt: skip
    summary = json.loads(newest(tmp_path, "benchmark_summary.json").read_text())
    assert (summary["Success Requests"], summary["Avg Output Tokens"]) == (6, 12)
