# SPDX-License-Identifier: Apache-2.0
"""The plan from config.json alone: formats, sizes, shards, rules, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.synthetic import tiny_config
from paddle_ccq.checkpoint.plan import LayerFormats, rule_forced_layers
from paddle_ccq.checkpoint.rules import Rule, load_rules
from paddle_ccq.errors import CcqError
from paddle_ccq.families.ernie45 import ErnieConfig
from paddle_ccq.families.registry import read_config
from paddle_ccq.families.tensor import Role
from paddle_ccq.targets.fastdeploy.layout import (
    build_plan,
    needs_plugin,
    not_converted,
    wint4_end_layer,
)

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"


@pytest.fixture(scope="module")
def large() -> ErnieConfig:
    return read_config(CONFIGS / "ernie-4.5-300b-a47b")


def tiny(**overrides) -> ErnieConfig:
    return read_config(tiny_config(**overrides))


def test_300b_comes_to_the_published_size(large):
    plan = build_plan(large)
    # Published as 89 GB: 93.8 in 1e9 bytes, 87.4 in 2**30 bytes.
    assert 87 < plan.output_bytes / 2**30 < 91
    assert 93 < plan.output_bytes / 1e9 < 95
    assert 2.20 < plan.bits_per_weight(Role.EXPERT) < 2.25
    counts = {}
    for planned in plan.tensors:
        counts[planned.format] = counts.get(planned.format, 0) + 1
    # 47 wint2 and 4 wint4 MoE layers of 64 experts, two projections each.
    assert counts["wint2"] == 47 * 64 * 2
    assert counts["wint4"] == 4 * 64 * 2
    assert counts["wint8"] == 54 * 2 + 3 * 2
    assert counts["f32"] == 51 * 2
    assert counts["bf16"] == 54 * 2 + 3
    assert (
        sum(len(planned.specs) for planned in plan.tensors)
        == 47 * 640 + 4 * 256 + 114 * 2 + 102 + 111
    )
    assert wint4_end_layer(plan) == 6
    assert plan.peak_memory() < 16e9


def test_memory_does_not_grow_with_depth(large):
    shallow = read_config({**large.raw, "num_hidden_layers": 8})
    assert build_plan(shallow).peak_memory() == build_plan(large).peak_memory()


def test_small_models_get_no_wint4_prefix():
    config = read_config(CONFIGS / "ernie-4.5-21b-a3b")
    plan = build_plan(config)
    assert wint4_end_layer(plan) == -1
    assert {planned.format for planned in plan.tensors if planned.tensor.is_expert} == {"wint2"}
    assert 6.5e9 < plan.output_bytes < 7.5e9


def test_shards_respect_the_limit_and_keep_matrices_whole():
    plan = build_plan(tiny(), max_shard_bytes=100_000)
    assert len(plan.shards) > 3
    for shard in plan.shards:
        size = sum(planned.rank_bytes for planned in shard.tensors)
        assert size <= 100_000 or len(shard.tensors) == 1
    assert [i for shard in plan.shards for i in shard.tensors] == list(plan.tensors)
    assert plan.shards[-1].name == f"model-{len(plan.shards):05d}-of-{len(plan.shards):05d}" + (
        ".safetensors"
    )


def test_dense_model_becomes_wint8_and_says_so():
    plan = build_plan(tiny(moe_num_experts=0))
    assert plan.format == "wint8"
    assert any("no MoE layer" in message for message in plan.messages)
    assert {planned.format for planned in plan.tensors} == {"wint8", "bf16"}


def test_tied_models_have_no_lm_head():
    assert not any(i.name == "lm_head.weight" for i in build_plan(tiny()).tensors)
    untied = build_plan(tiny(tie_word_embeddings=False))
    assert untied.tensors[-1].name == "lm_head.weight"
    assert untied.tensors[-1].format == "bf16"


@pytest.mark.parametrize(
    ("overrides", "options", "text"),
    [
        ({"hidden_size": 192}, {}, "multiple of 128, got 192"),
        ({"moe_intermediate_size": 64}, {}, "experts.0.down_proj.weight: wint2 needs K"),
        ({"moe_intermediate_size": 64}, {"wint4_end_layer": 2}, "wint4 needs K"),
        ({"intermediate_size": 96}, {}, "layers.0.mlp.down_proj.weight: wint8 needs K"),
        ({}, {"format": "wint3"}, "--format wint3"),
        ({}, {"wint4_end_layer": 3}, "--wint4-end-layer 3: this model's layers are 0 to 2"),
        ({}, {"wint4_end_layer": -2}, "--wint4-end-layer -2"),
        ({}, {"fastdeploy_layout": "3"}, "--fastdeploy-layout 3"),
        ({}, {"tensor_parallel_size": 0}, "must be at least 1"),
    ],
)
def test_refusals_name_the_tensor_or_flag(overrides, options, text):
    with pytest.raises(CcqError) as caught:
        build_plan(tiny(**overrides), **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_64_rows_are_enough_for_the_higher_rates():
    assert build_plan(tiny(moe_intermediate_size=192), format="ccq-2.75").format == "ccq-2.75"


def test_tensor_parallel_sizes_that_work_are_named(large):
    for size in (1, 2, 4):
        assert build_plan(large, tensor_parallel_size=size).tensor_parallel_size == size
    with pytest.raises(CcqError, match=r"sizes that work: 1, 2, 4$"):
        build_plan(large, tensor_parallel_size=8)


@pytest.mark.parametrize("format", ["ccq-2t", "ccq-2.5", "ccq-2.75", "dense", "wint4"])
def test_a_layout_that_orders_nothing_is_not_ignored_silently(format):
    changes = {"moe_num_experts": 0} if format == "dense" else {}
    options = {} if format in ("dense", "wint4") else {"format": format, "wint4_end_layer": -1}
    if format == "wint4":
        options = {"wint4_end_layer": 2}
    said = "--fastdeploy-layout 2.0: changes nothing, no layer is wint2"
    for layout, there in (("2.0", True), ("2.1", False)):
        plan = build_plan(tiny(**changes), fastdeploy_layout=layout, **options)
        assert (said in plan.messages) is there
    assert said not in build_plan(tiny(), fastdeploy_layout="2.0").messages


def test_messages_about_what_fastdeploy_cannot_load():
    messages = build_plan(tiny(vocab_size=300, moe_layer_interval=2)).messages
    assert any("multiple of 64" in m for m in messages)
    assert any("every layer from 1 on" in m for m in messages)


# --- wint4 layers that are no prefix ------------------------------------------------------------


def test_any_list_of_layers_only_where_it_is_allowed():
    rules = [Rule("*.layers.2.mlp.experts.*", "wint4")]
    with pytest.raises(CcqError, match="--allow-plugin-layout"):
        build_plan(tiny(), rules=rules)
    plan = build_plan(tiny(), rules=rules, plugin_layout=True)
    assert plan.layer_formats == {1: "wint2", 2: "wint4"}
    assert plan.wint4_layers == [2] and needs_plugin(plan)
    # FastDeploy without the plugin must not take this for a checkpoint without wint4 ...
    assert wint4_end_layer(plan) == -1
    assert any("plugin" in message for message in plan.messages)
    assert plan.reasons == {1: "--format", 2: "rule *.layers.2.mlp.experts.*"}


def test_rules_come_before_an_allocation():
    layer_formats = LayerFormats({1: "wint4", 2: "wint2"}, "allocation")
    plan = build_plan(tiny(), layer_formats=layer_formats)
    assert wint4_end_layer(plan) == 1 and not needs_plugin(plan)
    assert plan.reasons == {1: "allocation", 2: "allocation"}
    rules = [Rule("*.layers.1.mlp.experts.*", "wint2"), Rule("*.o_proj", "bf16")]
    plan = build_plan(tiny(), layer_formats=layer_formats, rules=rules)
    assert plan.layer_formats == {1: "wint2", 2: "wint2"}
    assert rule_forced_layers(tiny(), "wint2", rules) == {1: "wint2"}
    with pytest.raises(CcqError, match=r"layer 1 is decided for some of its experts only"):
        rule_forced_layers(tiny(), "wint2", [Rule("*.1.mlp.experts.0.*", "wint4")])
    with pytest.raises(CcqError, match="matches no tensor"):
        rule_forced_layers(tiny(), "wint2", [Rule("*.layers.7.*", "wint4")])


# --- rules --------------------------------------------------------------------------------------


def formats_of(plan, part: str) -> set[str]:
    return {planned.format for planned in plan.tensors if part in planned.name}


def test_first_matching_rule_wins():
    rules = [Rule("*.0.self_attn.o_proj", "bf16"), Rule("*.self_attn.*", "wint8")]
    plan = build_plan(tiny(), rules=rules)
    assert not_converted(plan) == ["ernie.layers.0.self_attn.o_proj"]
    assert any("2.5" in message for message in plan.messages)
    stored = {name: dtype for planned in plan.tensors for name, dtype, _ in planned.specs}
    assert stored["ernie.layers.0.self_attn.o_proj.quant_weight"] == "BF16"


def test_rules_may_make_a_wint4_prefix():
    plan = build_plan(tiny(), rules=[Rule("*.layers.1.mlp.experts.*", "wint4")])
    assert wint4_end_layer(plan) == 1
    assert formats_of(plan, "layers.1.mlp.experts") == {"wint4"}
    assert formats_of(plan, "layers.2.mlp.experts") == {"wint2"}


def test_rules_may_remove_the_wint4_prefix(large):
    plan = build_plan(large, rules=[Rule("*.mlp.experts.*", "wint2")])
    assert wint4_end_layer(plan) < 3
    assert formats_of(plan, ".mlp.experts.") == {"wint2"}


@pytest.mark.parametrize(
    ("match", "format", "text"),
    [
        ("*.mlp.gate", "wint8", "never quantized"),
        ("*embed_tokens*", "wint8", "never quantized"),
        ("ernie.norm.weight", "bf16", "never quantized"),
        ("ernie.layers.*", "wint8", "never quantized"),
        ("*.qkv_proj", "wint2", "it can be wint8 or bf16"),
        ("*.experts.*", "bf16", "it can be wint4 or wint2"),
        ("*.layers.2.mlp.experts.*", "wint4", "FastDeploy"),
        ("*.layers.1.mlp.experts.0.*", "wint4", "engines can't load that"),
        ("*.layers.1.mlp.experts.*.down_proj", "wint4", "engines can't load that"),
        ("*.layers.9.*", "wint4", "matches no tensor"),
    ],
)
def test_rules_that_cannot_be(match, format, text):
    with pytest.raises(CcqError, match="--rules") as caught:
        build_plan(tiny(), rules=[Rule(match, format)])
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("rules: []", "must be a list"),
        ("- {match: a, form: b}", "unknown key 'form'"),
        ("- {match: a}", "'format' is missing"),
        ("- {match: 3, format: wint8}", "'match' is missing or not a string"),
        ("- [a, b]", "not a map"),
        ("- {match: a", "not valid YAML"),
        ("- {match: a, format: wint8, match: b}", "a key stands twice"),
        ("- {match: a, format: wint8, formats: b}", "unknown key 'formats'"),
        ("- !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_rules_files_are_strict(tmp_path, content, text):
    path = tmp_path / "rules.yaml"
    path.write_text(content)
    with pytest.raises(CcqError) as caught:
        load_rules(path)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_rules_file(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text('- {match: "*.o_proj", format: bf16}\n- match: "*.qkv_proj"\n  format: wint8\n')
    assert load_rules(path) == (Rule("*.o_proj", "bf16"), Rule("*.qkv_proj", "wint8"))
    with pytest.raises(CcqError, match="no such file"):
        load_rules(tmp_path / "none.yaml")


def test_a_number_of_ranks_beyond_all_heads_is_refused_at_once():
    """Every size up to the number asked for was tried before."""
    with pytest.raises(CcqError, match=r"sizes that work: 1$"):
        build_plan(read_config(tiny_config()), tensor_parallel_size=10**12)
