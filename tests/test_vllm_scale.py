# SPDX-License-Identifier: Apache-2.0
"""The benchmark of vLLM over several cards, as far as it goes without any: rows, memory, steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"))

import vllm_profile
import vllm_scale
import vllm_shapes

ROOT = Path(__file__).resolve().parents[1]
CARD = int(vllm_scale.H200_GIB * vllm_scale.GIB)
MEASURED = ROOT / "benchmarks" / "results" / "vllm_scale_h200.json"


def rank_of(*events: tuple[int, int, str]) -> dict:
    """What a worker returns: the events' names once."""
    names = list(dict.fromkeys(name for *_, name in events))
    return {"names": names, "events": [[b, n, names.index(name)] for b, n, name in events]}


REDUCE = "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*)"


def steps(delay: int) -> list[tuple[int, int, str]]:
    """Four steps of 1000 ns; the sum over cards of this rank begins `delay` ns late."""
    found = []
    for start in range(0, 4000, 1000):
        found += [(start, 300, "gemm<1>(int)"), (start + 300 + delay, 400 - delay, REDUCE)]
        found += [(start + 800, 100, "at::native::argmax")]
    return found


def test_a_step_of_two_ranks() -> None:
    found = vllm_profile.step_of([rank_of(*steps(0)), rank_of(*steps(150))])
    assert found["summary"] == {"wall_us": 1.0, "busy_us": 0.65, "kernels": 3, "all": 12}
    assert [k[1:] for k in found["kernels"]] == [
        [1, "gemm<1>"],
        [1, "vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>"],
        [1, "at::native::argmax"],
    ]
    # One waits 150 ns for the other: what it takes is what the one that came last takes.
    wanted = {"calls": 1, "mean_us": 0.325, "least_us": 0.25, "share": 0.325}
    assert found["collectives"] == wanted
    assert [rank["collectives_us"] for rank in found["ranks"]] == [0.4, 0.25]


def test_a_stage_that_chooses_no_token_is_seen_in_the_others_step() -> None:
    early = [(b, n, "ncclDevKernel_SendRecv" if n == 400 else "gemm") for b, n, _ in steps(0)]
    early = [event for event in early if event[1] > 100]
    found = vllm_profile.step_of([rank_of(*early), rank_of(*steps(0))])
    assert found["ranks"][0] == {"busy_us": 0.7, "kernels": 2, "collectives_us": 0.4}
    assert found["summary"]["kernels"] == 3


def test_one_prompt_is_all_of_its_kernels() -> None:
    events = steps(0)[:3]
    found = vllm_profile.step_of([rank_of(*events)])
    assert found["summary"] == {"wall_us": 0.9, "busy_us": 0.8, "kernels": 3, "all": 3}
    nothing = vllm_profile.step_of([rank_of(), rank_of()])
    assert nothing["summary"]["kernels"] == 0 and nothing["collectives"]["share"] == 0


@pytest.mark.parametrize(
    "name",
    [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
        "void vllm::cross_device_reduce_2stage<float, 8>",
        "multimem_all_reduce_kernel",
        "one_shot_allreduce",
        "reduce_scatter",
        "ncclDevKernel_SendRecv",
    ],
)
def test_names_of_collectives(name: str) -> None:
    assert vllm_profile.step_of([rank_of((0, 10, name))])["collectives"]["calls"] == 1
    other = "void at::native::reduce_kernel<512, 1>"
    assert vllm_profile.step_of([rank_of((0, 10, other))])["collectives"]["calls"] == 0


def test_rows_are_judged_by_a_cards_memory() -> None:
    judged = {row.name: vllm_scale.judge(row, CARD) for row in vllm_scale.ROWS}
    assert len(judged) == len(vllm_scale.ROWS)
    not_fitting = [name for name, found in judged.items() if found["state"] == "does not fit"]
    assert not_fitting == ["ernie-300b int4 tp1", "deepseek-v3 wint2 tp1", "deepseek-v3 int4 tp2"]
    refused = {name: found for name, found in judged.items() if found["state"] == "refused"}
    assert list(refused) == ["ernie-300b wint2 tp8"]
    assert "sizes that work: 1, 2, 4" in refused["ernie-300b wint2 tp8"]["why"]
    assert vllm_scale.judge(vllm_scale.ROWS[0], CARD // 2)["state"] == "does not fit"


def test_what_was_measured_weighs_what_was_worked_out() -> None:
    """vLLM says what its weights take; the check may differ by blocks of the allocator."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    runs = {name: run for name, run in found.items() if run["state"] == "measured"}
    assert len(runs) >= 6
    rows = {row.name: row for row in vllm_scale.ROWS}
    for name, run in runs.items():
        most = max(card["weights"] for card in run["memory"])
        worked_out = vllm_scale.judge(rows[name], CARD)["weights"]
        assert 0.996 < worked_out / most <= 1.0005, name


def test_rows_that_fit_together_start_together() -> None:
    sized = [
        (row, {"needed": n}) for row, n in zip(vllm_scale.ROWS, (60, 30, 50, 100), strict=False)
    ]
    found = [[row.name for row in group] for group in vllm_scale.groups(sized, 100)]
    names = [row.name for row in vllm_scale.ROWS]
    assert found == [names[:2], names[2:3], names[3:4]]


def test_without_cards_everything_is_named(tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.json"
    measured = {"ernie-300b wint2 ep2": {"state": "measured", "decode": {"1": 1.0}}}
    output.write_text(json.dumps(measured))
    assert vllm_scale.main([str(output), "--cards", "2", "--seconds", "0"]) == 0
    found = json.loads(output.read_text())
    assert set(found) == {row.name for row in vllm_scale.ROWS}
    assert found["ernie-300b wint2 ep2"] == measured["ernie-300b wint2 ep2"]
    assert found["ernie-300b wint2 tp2"]["why"] == "no time was left"
    assert found["deepseek-v3 wint2 tp4"]["why"] == "4 cards; 2 here"
    assert vllm_scale.main([str(output), "--only", "tp2"]) == 2
    assert "--only 'tp2': known are ernie-300b wint2 tp1," in capsys.readouterr().err


def test_what_a_row_is_told() -> None:
    options = vllm_scale.parse(["out.json", "--latent-attention", "torch"])
    row = vllm_scale.Row("deepseek-v3", "int4", 8, experts=True)
    found = vllm_scale.arguments_of(row, Path("x.json"), 10**9, options)
    assert (found.tensor_parallel_size, found.enable_expert_parallel, found.peer) == (8, True, True)
    assert found.batches == [1, 8, 32, 128] and found.prompts == [4096]
    assert found.latent_attention == "torch" and found.kv_bytes == 10**9
    plain = vllm_scale.Row("ernie-300b", "wint2", pipeline=2)
    found = vllm_scale.arguments_of(plain, Path("x.json"), 10**9, options)
    assert (found.pipeline_parallel_size, found.latent_attention) == (2, "vllm")


@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("name", list(vllm_shapes.SHAPES))
def test_configs_of_the_shapes(name: str, peer: bool, tmp_path: Path) -> None:
    folder = vllm_shapes.shape_folder(tmp_path, 5, -1, peer, name)
    written = json.loads((folder / "config.json").read_text())
    assert written["num_hidden_layers"] == 5
    stated = written["quantization_config"]
    if peer:
        parts = stated["modules_in_block_to_quantize"]
        assert stated["quant_method"] == "gptq" and "mlp.experts" in parts
        kept = ["self_attn.kv_b_proj", "self_attn.q_a_proj", "mlp.gate", "lm_head"]
        assert not any(part in place for part in parts for place in kept)
    else:
        assert stated["quant_method" if name == "deepseek-v3" else "quantization"] in (
            "ccq",
            "wint2",
        )
