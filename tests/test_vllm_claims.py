# SPDX-License-Identifier: Apache-2.0
"""What the vLLM plugin claims and refuses, and how it reads names; without vLLM."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.synthetic import tiny_config
from paddle_ccq.checkpoint.plan import LayerFormats
from paddle_ccq.checkpoint.rules import Rule
from paddle_ccq.errors import CcqError
from paddle_ccq.families.ernie45 import ErnieConfig
from paddle_ccq.families.registry import read_config
from paddle_ccq.targets.fastdeploy.config import quantization_config
from paddle_ccq.targets.fastdeploy.layout import FastDeploy, build_plan
from paddle_ccq.vllm import names, releases
from paddle_ccq.vllm.claims import (
    Claim,
    Parallel,
    check_parallel,
    claims,
    rank_count,
    row_order_of,
)


def config_of(**changes: object) -> ErnieConfig:
    return read_config(tiny_config(**changes))


def claim_of(config: ErnieConfig, format: str = "wint2", end: int = -1, **more: object) -> Claim:
    plan = build_plan(config, format=format, wint4_end_layer=end, **more)
    return Claim.read(quantization_config(plan))


@pytest.mark.parametrize(
    "quantization,ours",
    [
        ({"quantization": "wint2"}, True),
        ({"quantization": "ccq-2.5"}, True),
        ({"quantization": "wint8", "quant_method": ""}, True),
        ({"quant_method": "ccq", "quantization": "wint2"}, True),
        ({"quant_method": "fp8", "quantization": "wint2"}, False),
        ({"quant_method": "gptq", "bits": 4}, False),
        ({"quantization": "wint4"}, True),  # to be refused in one line
        ({"quantization": "ccq-3t", "moe_quant_type": "w4w2"}, True),
        ({"quantization": {"bits": 2}}, False),
        ({}, False),
        (None, False),
    ],
)
def test_only_our_configs_are_claimed(quantization: dict | None, ours: bool) -> None:
    assert claims(quantization) is ours


@pytest.mark.parametrize("format", ["wint2", "ccq-2.5", "ccq-2.75"])
def test_every_layer_has_the_format_that_is_written(format: str) -> None:
    config = config_of()
    prefix = claim_of(config, format, 1)
    assert [prefix.expert_format(n) for n in range(4)] == ["wint4", "wint4", format, format]
    chosen = {layer: "wint4" if layer == 2 else format for layer in config.moe_layers()}
    listed = claim_of(
        config, format, layer_formats=LayerFormats(chosen, "test"), plugin_layout=True
    )
    assert [listed.expert_format(n) for n in range(4)] == [format, format, "wint4", format]
    kept = claim_of(config, format, rules=[Rule("ernie.layers.1.self_attn.o_proj", "bf16")])
    assert kept.dense_format("ernie.layers.1.self_attn.o_proj") == "bf16"
    assert kept.dense_format("ernie.layers.11.self_attn.o_proj") == "wint8"


@pytest.mark.parametrize(
    "change,said",
    [
        ({"quantization": "wint3"}, "quantization 'wint3': served are"),
        ({"dense_quant_type": "wint4"}, "dense_quant_type 'wint4'"),
        ({"modules_to_not_convert": "all"}, "modules_to_not_convert: not a list"),
        ({"moe_quant_config": {"moe_w4_quant_config": {"quant_end_layer": "x"}}}, "not a number"),
    ],
)
def test_what_cannot_be_served_is_named(change: dict, said: str) -> None:
    with pytest.raises(CcqError, match=said):
        Claim.read(quantization_config(build_plan(config_of())) | change)


def test_eight_bit_experts_are_refused() -> None:
    with pytest.raises(CcqError, match="MoE layers"):
        Claim.read({"quantization": "wint8"}).check_model(config_of())


def test_an_unknown_row_order_is_refused() -> None:
    assert row_order_of({}) == "fastdeploy-2.1"
    assert row_order_of({"paddle_ccq": {"row_order": "plain"}}) == "plain"
    with pytest.raises(CcqError, match="row_order 'odd'"):
        row_order_of({"paddle_ccq": {"row_order": "odd"}})


WIDE = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "moe_intermediate_size": 384,
    "moe_num_shared_experts": 0,
    "tie_word_embeddings": False,
}


def test_sizes_that_do_not_fit_are_refused_with_those_that_do() -> None:
    config = config_of(**WIDE)
    claim = claim_of(config)
    check_parallel(config, claim, Parallel(1), 1)
    with pytest.raises(CcqError, match=r"size 3 .* sizes that work: 1$"):
        check_parallel(config, claim, Parallel(3), 1)
    # Key heads are repeated over four ranks; experts stay whole.
    with pytest.raises(CcqError, match=r"384 .*sizes that work: 1"):
        check_parallel(config, claim, Parallel(4), 1)
    check_parallel(config, claim, Parallel(4, experts=True), 1)
    wide = config_of(**WIDE | {"moe_intermediate_size": 512})
    check_parallel(wide, claim_of(wide), Parallel(4), 1)
    with pytest.raises(CcqError, match=r"sizes that work: 1, 2, 4$"):
        check_parallel(wide, claim_of(wide), Parallel(8), 1)


def test_the_300b_fits_the_sizes_of_the_contract() -> None:
    config = config_of(
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        moe_num_experts=2,
        moe_intermediate_size=3584,
        num_hidden_layers=4,
        tie_word_embeddings=False,
    )
    claim = claim_of(config, "wint2", 1)
    for size in (1, 2, 4):
        check_parallel(config, claim, Parallel(size), 1)
    with pytest.raises(CcqError, match=r"size 8 .*sizes that work: 1, 2, 4$"):
        check_parallel(config, claim, Parallel(8), 1)  # two experts are no eight either


def test_rank_folders_want_their_own_number_of_cards(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    assert rank_count(str(tmp_path)) == 2 and rank_count(str(tmp_path / "rank0")) == 1
    config = config_of(**WIDE | {"moe_intermediate_size": 512})
    check_parallel(config, claim_of(config), Parallel(2), 2)
    with pytest.raises(CcqError, match="2 rank folders"):
        check_parallel(config, claim_of(config), Parallel(1), 2)
    with pytest.raises(CcqError, match="enable-expert-parallel"):
        check_parallel(config, claim_of(config), Parallel(2, experts=True), 2)


def test_tied_heads_and_pipelines_do_not_go_together() -> None:
    config = config_of(tie_word_embeddings=True)
    with pytest.raises(CcqError, match="tied to the embedding"):
        check_parallel(config, claim_of(config), Parallel(1, pipeline=2), 1)
    with pytest.raises(CcqError, match="tied"):  # of rank folders too
        check_parallel(config, claim_of(config), Parallel(2, pipeline=2), 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_more_stages_than_layers_are_refused(ranks: int) -> None:
    config = config_of(**WIDE)
    parallel = Parallel(ranks, pipeline=config.num_hidden_layers + 1)
    with pytest.raises(CcqError, match="the model has 3 layers; some stages would have none"):
        check_parallel(config, claim_of(config), parallel, ranks)


@pytest.mark.parametrize("format", ["wint2", "ccq-2.5", "ccq-2.75", "wint4"])
def test_every_written_name_is_taken_apart(format: str) -> None:
    config = config_of(moe_num_shared_experts=1)
    seen = 0
    for tensor in config.tensors.values():
        chosen = format if tensor.is_expert else "wint8" if tensor.is_dense else "bf16"
        for stored, _, _ in FastDeploy().stored(tensor, chosen, tensor.shape):
            found = names.parse(stored)
            if not tensor.is_linear:
                assert found is None
                continue
            seen += 1
            assert found is not None and stored.endswith(found.suffix)
            assert f".{found.layer}." in stored
            if tensor.is_expert:
                assert isinstance(found, names.ExpertTensor)
                assert f"experts.{found.expert}.{found.projection}_proj" in stored
            else:
                assert isinstance(found, names.DenseTensor)
                assert found.canonical == tensor.stem
                module = f"model.layers.{found.layer}.{found.vllm_module}"
                assert names.canonical_of(module) == found.canonical
    assert seen > 30


def test_floats_get_vllms_names_and_orientation() -> None:
    heads = (64, 16, 16)
    parts, turned = names.float_parts("ernie.layers.0.self_attn.qkv_proj.quant_weight", heads)
    stem = "model.layers.0.self_attn"
    assert turned and parts == [
        (f"{stem}.q_proj.weight", 0, 64),
        (f"{stem}.k_proj.weight", 64, 16),
        (f"{stem}.v_proj.weight", 80, 16),
    ]
    parts, turned = names.float_parts("ernie.layers.0.mlp.up_gate_proj.quant_weight", heads)
    assert turned and [p[0].split(".")[-2] for p in parts] == ["gate_proj", "up_proj"]
    whole = {
        "ernie.embed_tokens.weight": ("model.embed_tokens.weight", False),
        "ernie.norm.weight": ("model.norm.weight", False),
        "lm_head.weight": ("lm_head.weight", True),
        "ernie.layers.2.mlp.gate.weight": ("model.layers.2.mlp.gate.weight", True),
        "ernie.layers.2.input_layernorm.weight": ("model.layers.2.input_layernorm.weight", False),
    }
    for stored, (name, turn) in whole.items():
        assert names.float_parts(stored, heads) == ([(name, 0, 0)], turn)
    assert names.is_skipped("ernie.mtp_block.0.norm.weight")


def test_releases_are_judged() -> None:
    assert releases.judge("0.26.0+cu130") == (True, "")
    assert releases.judge("0.22.1")[0] is False
    good, said = releases.judge("0.99.0")
    assert good and "was not tried" in said


@pytest.mark.skipif(releases.installed() is not None, reason="vLLM is installed")
def test_the_plugin_is_silent_without_vllm(tmp_path: Path) -> None:
    """A vllm that does not import must change nothing and say nothing."""
    (tmp_path / "vllm.py").write_text("raise ImportError('no vLLM here')\n")
    code = "from paddle_ccq.vllm.plugin import register; register(); register()"
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{folder}", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not re.search("Traceback|paddle_ccq", done.stderr)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"hidden_size": 192, "head_dim": 48}, "hidden size 192 is no multiple of 128"),
        ({"moe_intermediate_size": 192}, "the width 192 of an expert"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(size: dict, said: str, experts: bool) -> None:
    """Formats of 64 rows a group can be written in sizes that the kernels in vLLM do not take."""
    config = config_of(num_attention_heads=4, num_key_value_heads=4, **size)
    with pytest.raises(CcqError, match=said):
        check_parallel(config, claim_of(config, "ccq-2.5"), Parallel(1, experts=experts), 1)


def test_rank_folders_of_sizes_that_no_kernel_takes() -> None:
    config = config_of(**WIDE)  # experts of 384, in 2 folders of 192
    with pytest.raises(CcqError, match="2 rank folders: the width 384 of an expert"):
        check_parallel(config, claim_of(config, "ccq-2.5"), Parallel(2), 2)
