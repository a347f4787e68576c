# SPDX-License-Identifier: Apache-2.0
"""Two to sixteen cards: what each holds of the 300B and of DeepSeek-V3, worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from paddle_ccq.checkpoint.plan import Plan, PlanOptions, make_plan
from paddle_ccq.checkpoint.source_tensors import expect
from paddle_ccq.checkpoint.sources.scheme import SourceScheme
from paddle_ccq.engine_check import GIB
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.targets.fastdeploy.layout import FastDeploy
from paddle_ccq.targets.huggingface.layout import HuggingFace
from paddle_ccq.vllm import memory, packed_memory
from paddle_ccq.vllm.check import ServeConfig
from paddle_ccq.vllm.claims import Claim, Parallel, check_parallel
from paddle_ccq.vllm.expert_sizes import expert_bytes
from paddle_ccq.vllm.packed_claims import check_packed_parallel

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
SERVE = ServeConfig(card_bytes=140 * GIB, max_num_batched_tokens=4096)
FORMATS = [("wint2", -1), ("ccq-2t", -1), ("wint2", 6)]
CUTS = [(2, False), (2, True), (4, False), (8, True)]
# Bytes of a weight of experts, and of a column of it, on the card.
EXPERTS = {"wint2": (1 / 4 + 1 / 128, 16), "ccq-2t": (2176 / (64 * 128), 4)}
EXPERTS["wint4"] = (1 / 2 + 2 / 128, 0)


def plan_of(model: str, target: FastDeploy | HuggingFace, format: str, end: int) -> Plan:
    raw = json.loads((CONFIGS / model / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if k != "quantization_config"}
    raw["num_nextn_predict_layers"] = 0
    config = read_config(raw)
    if isinstance(target, HuggingFace):
        config = expect(config, SourceScheme.read(raw, Path("config.json")))
    return make_plan(config, PlanOptions(target, format=format, wint4_end_layer=end))


def of_experts(plan: Plan, ranks: int, whole: bool) -> int:
    """Bytes of all routed experts on a card: up_gate [hidden, 2 width], down [width, hidden]."""
    config = plan.config
    count = config.moe_num_experts // (ranks if whole else 1)
    hidden, width = config.hidden_size, config.moe_intermediate_size // (1 if whole else ranks)
    total = 0.0
    for format in plan.layer_formats.values():
        weight, column = EXPERTS[format]
        total += count * (weight * 3 * hidden * width + column * (2 * width + hidden))
    return int(total)


@pytest.mark.parametrize("format,end", FORMATS)
@pytest.mark.parametrize("ranks,whole", CUTS)
def test_a_card_of_the_300b(format: str, end: int, ranks: int, whole: bool) -> None:
    plan = plan_of("ernie-4.5-300b-a47b", FastDeploy(plugin_layout=True), format, end)
    claim = Claim(format, end, None, ())
    parallel = Parallel(ranks, experts=whole)
    check_parallel(plan.config, claim, parallel, 1)
    hidden, dense, moe = 8192, 3, 51
    # wint8: a byte a weight, 2 bytes for each of its columns; row cuts leave columns whole.
    qkv, heads = 10240 // ranks, 8192 // ranks
    columns = 54 * (qkv + hidden) + dense * (2 * 28672 // ranks + hidden)
    layers = 54 * hidden * (qkv + heads) + dense * 3 * hidden * 28672 // ranks + 2 * columns
    router = moe * 64 * (10 * hidden + 4)
    floats = 2 * (2 * 103424 * hidden // ranks + 109 * hidden)
    wanted = of_experts(plan, ranks, whole) + layers + router + floats
    assert memory.card_memory(plan, replace(SERVE, parallel=parallel)).weights == wanted


@pytest.mark.parametrize("format,end", FORMATS)
@pytest.mark.parametrize("ranks,whole", [*CUTS, (8, False), (16, False), (16, True)])
def test_a_card_of_deepseek_v3(format: str, end: int, ranks: int, whole: bool) -> None:
    plan = plan_of("deepseek-v3", HuggingFace(), format, end)
    parallel = Parallel(ranks, experts=whole)
    check_packed_parallel(plan.config, parallel)
    hidden, heads, rank = 7168, 128 // ranks, 512
    shared = 1536 * heads * 192 + rank * heads * 256 + heads * 128 * hidden
    whole_parts = hidden * (1536 + rank + 64) + 1536 + rank + 2 * hidden
    mlps = 3 * hidden * (3 * 18432 + 58 * 2048) // ranks
    ends = 2 * 129280 * hidden // ranks + hidden
    router = 58 * 256 * (2 * hidden + 4)
    floats = 2 * (61 * (shared + whole_parts) + mlps + ends) + router
    wanted = of_experts(plan, ranks, whole) + floats
    found = packed_memory.card_memory(plan, replace(SERVE, parallel=parallel))
    assert abs(found.weights - wanted) < 1000  # each tensor is rounded up to a byte
    assert found.token_cache == 61 * 2 * 576


@pytest.mark.parametrize("ranks,whole", CUTS)
def test_a_card_of_the_300b_in_hugging_faces_layout(ranks: int, whole: bool) -> None:
    """The experts are those of the other layout; everything else is bfloat16."""
    plan = plan_of("ernie-4.5-300b-a47b", HuggingFace(), "wint2", -1)
    parallel = Parallel(ranks, experts=whole)
    check_packed_parallel(plan.config, parallel)
    hidden = 8192
    shared = 54 * hidden * (10240 + 8192) + 3 * 3 * hidden * 28672 + 2 * 103424 * hidden
    held = 109 * hidden + 51 * 64 * hidden
    wanted = of_experts(plan, ranks, whole) + 2 * (shared // ranks + held) + 51 * 64 * 4
    found = packed_memory.card_memory(plan, replace(SERVE, parallel=parallel))
    assert abs(found.weights - wanted) < 0.002 * wanted


def test_eight_cards_are_refused_where_experts_cannot_be_cut() -> None:
    said = r"size 8 .*3584.*; sizes that work: 1, 2, 4; 8 with --enable-expert-parallel$"
    plan = plan_of("ernie-4.5-300b-a47b", FastDeploy(), "wint2", -1)
    with pytest.raises(CcqError, match=said):
        check_parallel(plan.config, Claim("wint2", -1, None, ()), Parallel(8), 1)
    plan = plan_of("ernie-4.5-300b-a47b", HuggingFace(), "wint2", -1)
    with pytest.raises(CcqError, match=said):
        check_packed_parallel(plan.config, Parallel(8))


def test_key_heads_are_on_every_card_that_needs_them() -> None:
    """Eight key heads on sixteen cards: each has a whole one, not half of one."""
    plan = plan_of("ernie-4.5-300b-a47b", FastDeploy(), "wint2", -1)
    serve = replace(SERVE, parallel=Parallel(16, experts=True))
    check_parallel(plan.config, Claim("wint2", -1, None, ()), serve.parallel, 1)
    found = memory.card_memory(plan, serve)
    eight = memory.card_memory(plan, replace(SERVE, parallel=Parallel(8, experts=True)))
    assert found.token_cache == eight.token_cache
    qkv = {p.cut.parts: p for p in plan.tensors if "qkv_proj" in p.name and p.cut}
    assert list(qkv) == [(8192, 1024, 1024)]
    less = 54 * (8192 + 2) * 8192 // 16  # half of the queries, and none of the keys
    assert eight.weights - found.weights > less


@pytest.mark.parametrize(
    "layers,stages,sizes",
    [
        (54, 1, [54]),
        (54, 2, [27, 27]),
        (61, 2, [31, 30]),
        (54, 4, [13, 14, 14, 13]),
        (61, 8, [7, 7, 8, 8, 8, 8, 8, 7]),
        (7, 4, [2, 2, 2, 1]),
    ],
)
def test_pipeline_stages_are_vllms(layers: int, stages: int, sizes: list[int]) -> None:
    numbers = memory.stage_numbers(layers, stages)
    assert [numbers.count(stage) for stage in range(stages)] == sizes
    assert numbers == sorted(numbers)


def test_the_fullest_stage_may_be_the_last() -> None:
    """Where an embedding weighs more than a layer; vLLM gives the last stage none of the rest."""
    plan = plan_of("ernie-4.5-300b-a47b", FastDeploy(), "wint2", -1)
    four = memory.card_memory(plan, replace(SERVE, parallel=Parallel(pipeline=4)))
    by_layer = [0] * 54
    head = 0
    for planned in plan.tensors:
        if planned.layer is None:
            head = prod(planned.shape) * 2 if "lm_head" in planned.name else head
        elif planned.tensor.is_expert:
            by_layer[planned.layer] += expert_bytes(planned.format, *planned.shape)
        else:
            by_layer[planned.layer] += planned.rank_bytes
    stages = [sum(by_layer[13:27]), sum(by_layer[41:]) + head]
    assert max(stages) <= four.weights < 1.003 * max(stages)  # routers, thrice more
    assert stages[1] > stages[0]


def test_both_ends_of_qwen3_are_on_every_stage() -> None:
    """vLLM's class of it builds embedding and head on each card; of GLM-4.5's on one each."""
    found = {}
    for model in ("qwen3-235b-a22b", "glm-4.5"):
        plan = plan_of(model, HuggingFace(), "wint2", -1)
        layers = plan.config.num_hidden_layers
        serve = replace(SERVE, parallel=Parallel(pipeline=layers))
        found[model] = packed_memory.card_memory(plan, serve).weights
        ends = 2 * plan.config.vocab_size * plan.config.hidden_size
        layer = sum(
            expert_bytes(p.format, *p.shape) if p.tensor.is_expert else p.rank_bytes
            for p in plan.tensors
            if p.layer == layers - 1
        )
        count = 2 if model.startswith("qwen3") else 1
        assert abs(found[model] - layer - count * ends) < 4 * plan.config.hidden_size, model


def test_one_decoded_wint4_expert_is_counted() -> None:
    plain, prefix = (plan_of("ernie-4.5-300b-a47b", FastDeploy(), "wint2", n) for n in (-1, 6))
    for serve, more in [
        (SERVE, 2 * 8192 * 2 * 3584),
        (replace(SERVE, parallel=Parallel(4)), 2 * 8192 * 2 * 896),
        (replace(SERVE, parallel=Parallel(8, experts=True)), 2 * 8192 * 2 * 3584),
        (replace(SERVE, max_num_batched_tokens=512), 0),
    ]:
        found = [memory.card_memory(plan, serve).activations for plan in (plain, prefix)]
        assert found[1] - found[0] == more
