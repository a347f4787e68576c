# SPDX-License-Identifier: Apache-2.0
"""A checkpoint cut over two ranks in a real vLLM, on a processor; where one is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.quantize import main

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

import torch

from paddle_ccq.vllm.cpu_experts import CpuCodedExpertsMethod

ROOT = Path(__file__).resolve().parents[1]
SCORES = ROOT / "tests" / "helpers" / "vllm_scores.py"
WORKERS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def binding(ranks: int) -> dict[str, str]:
    """A processor for each rank, in turn; by default vLLM wants a NUMA node for each."""
    count = os.cpu_count() or 1
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(rank % count) for rank in range(ranks))}


def run(folder: Path, work: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Score work/tokens.npy into work/scores.npy with the plugin found as an installed one."""
    information = work / "site" / "paddle_ccq-0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    information.joinpath("METADATA").write_text("Name: paddle-ccq\nVersion: 0\n")
    information.joinpath("entry_points.txt").write_text(
        "[vllm.general_plugins]\npaddle_ccq = paddle_ccq.vllm.plugin:register\n"
    )
    paths = [str(work / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [
            *(sys.executable, SCORES, folder, work / "tokens.npy", work / "scores.npy"),
            json.dumps({"skip_tokenizer_init": True, **options}),
        ],
        env=os.environ
        | WORKERS
        | binding(max(2, int(options.get("tensor_parallel_size", 1))))
        | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "model"
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 512}
    write_checkpoint(folder, tiny_config(head_dim=64, tie_word_embeddings=False, **sizes))
    return folder


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two processors")
@pytest.mark.parametrize("format", ["wint2", "ccq-2t", "ccq-2.75", "wint4 prefix"])
def test_two_ranks_score_as_one(format: str, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    chosen = ["--wint4-end-layer", "1"] if " " in format else ["--format", format]
    arguments = ["--model", str(model), "--output", str(output), "--quiet", "--preset", "fast"]
    assert main([*arguments, *chosen]) == 0
    np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(3, 319, 96))
    scores = {}
    for name, options in {
        "one": {},
        "tensor": {"tensor_parallel_size": 2},
        "expert": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    }.items():
        result = run(output, tmp_path, **options)
        assert result.returncode == 0, result.stderr[-3000:]
        scores[name] = np.load(tmp_path / "scores.npy")
        # An expert left out moves each by 0.033 to 0.089, sums in another order by 0.012.
        assert np.abs(scores[name] - scores["one"]).mean() < 0.022, name


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two processors")
def test_four_ranks_score_as_one(tmp_path: Path) -> None:
    """A quarter of each of eight experts, or two whole ones; key heads are on two ranks each."""
    model, output = tmp_path / "model", tmp_path / "out"
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "intermediate_size": 512}
    sizes |= {"moe_num_experts": 8, "num_hidden_layers": 2}
    write_checkpoint(model, tiny_config(head_dim=64, tie_word_embeddings=False, **sizes))
    arguments = ["--model", str(model), "--output", str(output), "--quiet", "--preset", "fast"]
    assert main(arguments) == 0
    np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(3, 319, 96))
    scores = []
    for options in (
        {},
        {"tensor_parallel_size": 4},
        {"tensor_parallel_size": 4, "enable_expert_parallel": True},
    ):
        result = run(output, tmp_path, **options)
        assert result.returncode == 0, result.stderr[-3000:]
        scores.append(np.load(tmp_path / "scores.npy"))
        # An expert left out moves each by 0.017, sums in another order by 0.005.
        assert np.abs(scores[-1] - scores[0]).mean() < 0.01


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two processors")
def test_rank_folders_of_ccq_2t_are_served(model: Path, tmp_path: Path) -> None:
    """Ranks are encoded apart: scores differ from the whole's by an encoder's error, 0.11."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(3, 319, 96))
    scores = []
    for ranks in (1, 2):
        output = tmp_path / f"out{ranks}"
        arguments = ["--model", str(model), "--output", str(output), "--quiet", "--preset", "fast"]
        ranks_flags = ["--tensor-parallel-size", str(ranks)]
        assert main([*arguments, "--format", "ccq-2t", *ranks_flags]) == 0
        result = run(output, tmp_path, tensor_parallel_size=ranks)
        assert result.returncode == 0, result.stderr[-3000:]
        scores.append(np.load(tmp_path / "scores.npy"))
    assert 0 < np.abs(scores[0] - scores[1]).mean() < 0.2


@pytest.mark.parametrize("already_cut", [False, True])
def test_a_ranks_bytes_before(already_cut: bool) -> None:
    """The last input rows of a rank need the byte before them; rank folders begin without one."""
    ranks, hidden, width = 2, 128, 256
    rng = np.random.default_rng(0)
    k, n = (width // ranks if already_cut else width), hidden
    stored = {
        "quant_weight": torch.from_numpy(rng.integers(0, 256, (k // 4, n), np.uint8)),
        "weight_scale": torch.from_numpy(rng.integers(0, 256, (k // 128, n), np.uint8)),
        "super_scales": torch.ones(n, dtype=torch.bfloat16),
    }
    for rank in range(ranks):
        parallel = SimpleNamespace(use_all2all_kernels=False, tp_rank=rank, tp_size=ranks)
        moe = SimpleNamespace(moe_parallel_config=parallel)
        method = CpuCodedExpertsMethod(moe, "experts", already_cut, "ccq-2t", "plain")
        layer = SimpleNamespace(expert_map=None)
        method.create_weights(layer, 1, hidden, width // ranks, torch.bfloat16)
        for suffix, value in stored.items():
            method.place(layer, 0, "down", suffix, value, suffix)
        packed = method.packed["down"][0]
        first = 0 if already_cut else rank * width // ranks // 4
        codes = stored["quant_weight"].numpy()
        part = codes[first : first + width // ranks // 4]
        np.testing.assert_array_equal(packed.unpack()["quant_weight"], part)
        expected = codes[first - 1] if first else np.zeros(n, np.uint8)
        np.testing.assert_array_equal(packed.core.before, expected)
