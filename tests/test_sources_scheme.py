# SPDX-License-Identifier: Apache-2.0
"""A source's quantization_config: what is read, and everything else refused by name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.published import FP8_CONFIG, int4_config
from paddle_ccq.checkpoint.sources.scheme import Kind, SourceScheme
from paddle_ccq.errors import CcqError


def read(config) -> SourceScheme:
    return SourceScheme.read({"quantization_config": config}, "config.json")


def test_floats_say_nothing():
    fastdeploy = {"quantization": "wint2"}, {"is_quantized": False, "dense_quant_type": "wint8"}
    ours = {"quant_method": "ccq", "version": 1}
    for entry in (None, {}, *fastdeploy, ours):
        raw = {"quantization_config": entry}
        scheme = SourceScheme.read(raw, "config.json")
        assert scheme.method is None and not scheme.parts
        assert scheme.kind_of("model.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize(
    ("size", "shape", "block"),
    [([128, 128], (300, 200), (128, 128)), ([64, 32], (8, 8), (64, 32)), (None, (9, 7), (9, 7))],
)
def test_fp8_blocks(size, shape, block):
    scheme = read({**FP8_CONFIG, "weight_block_size": size})
    assert scheme.blocks(Kind.FP8, shape) == {block}
    assert not scheme.blocks(Kind.INT4, shape)


def test_groups_may_differ_by_target():
    config = int4_config(32)
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    down = {"targets": ["re:.*down_proj$"], "weights": weights, "format": "float-quantized"}
    config["config_groups"]["group_1"] = down
    config["format"] = "mixed-precision"
    scheme = read(config)
    assert scheme.blocks(Kind.INT4, (8, 64)) == {(1, 32)}
    assert scheme.blocks(Kind.FP8, (8, 64)) == {(1, 64)}
    assert scheme.kind_of("model.layers.0.mlp.experts.0.down_proj").kind is Kind.FP8
    assert scheme.kind_of("model.layers.0.mlp.experts.0.up_proj").kind is Kind.INT4
    assert scheme.kind_of("model.layers.0.self_attn.o_proj") is None


@pytest.mark.parametrize(
    ("pattern", "module", "float"),
    [
        ("gate", "model.layers.0.block_sparse_moe.gate", True),
        ("gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.0", "model.layers.0.mlp.up_proj", True),
        ("model.layers.0", "model.layers.01.mlp.up_proj", False),
        ("lm_head", "lm_head", True),
        ("re:.*self_attn.*", "model.layers.3.self_attn.o_proj", True),
        ("re:self_attn", "model.layers.3.self_attn.o_proj", False),
    ],
)
def test_modules_that_stay_float(pattern, module, float):
    scheme = read({**FP8_CONFIG, "modules_to_not_convert": [pattern]})
    assert (scheme.kind_of(module) is None) is float


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def compressed(**changes) -> dict:
    return {**int4_config(), **changes}


def of_weights(**changes) -> dict:
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **changes}}
    return compressed(config_groups={"group_0": group})


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (7, "config.json: quantization_config: not an object"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not read"),
        ({"quant_method": ["fp8"]}, "quant_method is not a text"),
        ({**FP8_CONFIG, "fmt": "e5m2"}, "fmt 'e5m2' is not read"),
        ({**FP8_CONFIG, "weight_block_size": [128]}, "weight_block_size [128] is not two sizes"),
        ({**FP8_CONFIG, "weight_block_size": [0, 1]}, "is not two sizes"),
        ({**FP8_CONFIG, "weight_block_size": [True, 1]}, "is not two sizes"),
        ({**FP8_CONFIG, "modules_to_not_convert": "gate"}, "is not a list of texts"),
        (compressed(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not read"),
        (compressed(config_groups=[1]), "config_groups is not an object"),
        (compressed(config_groups={"g": 1}), "config_groups.'g': not an object"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not"),
        (compressed(ignore=["re:("]), "ignore: 're:(': "),
        (of_weights(num_bits=8), "weights of type 'int' with 8 bits are not read"),
        (of_weights(type="float"), "weights of type 'float' with 4 bits are not read"),
        (of_weights(actorder="group"), "actorder 'group' is not read"),
        (of_weights(group_size=None), "group_size None is no number"),
        (of_weights(group_size=-1), "group_size -1 is no number"),
        (of_weights(strategy="tensor_group"), "strategy 'tensor_group' is not read"),
        (of_weights(strategy="block"), "block_structure None is not two sizes"),
    ],
)
def test_what_is_not_read_is_refused(config, problem):
    with pytest.raises(CcqError, match=re.escape(problem)) as error:
        read(config)
    assert "\n" not in str(error.value)


def test_our_own_outputs_hold_the_scheme_of_their_source():
    scheme = read({"quant_method": "ccq", "version": 1, "source_quantization_config": FP8_CONFIG})
    assert scheme.method == "fp8" and scheme.blocks(Kind.FP8, (8, 8)) == {(128, 128)}
    with pytest.raises(
        CcqError, match=r"quantization_config.source_quantization_config: .*quant_method 'awq'"
    ):
        read(
            {
                "quant_method": "ccq",
                "version": 1,
                "source_quantization_config": {"quant_method": "awq"},
            }
        )


def test_two_names_of_the_entry_must_agree():
    raw = {"quantization_config": FP8_CONFIG, "compression_config": int4_config()}
    with pytest.raises(CcqError, match="quantization_config and compression_config differ"):
        SourceScheme.read(raw, "config.json")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["re:(", "\ud800", "re:\ud800(", "a\nb"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        *("quant_method", "fmt", "weight_block_size", "modules_to_not_convert", "format"),
        *("config_groups", "ignore", "sparsity_config", "source_quantization_config"),
        *("targets", "weights", "num_bits", "type", "strategy", "group_size"),
        *("block_structure", "actorder"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    base=st.sampled_from([FP8_CONFIG, int4_config(), {"quant_method": "ccq", "version": 1}, {}]),
)
def test_any_entry_is_read_or_refused_in_one_line(data, base):
    config = {**base, **data.draw(st.dictionaries(KEYS, JSON, max_size=3))}
    group = data.draw(st.dictionaries(KEYS, JSON, max_size=3))
    if data.draw(st.booleans()) and isinstance(config.get("config_groups"), dict):
        weights = {**WEIGHTS, **group}
        name = data.draw(st.text(max_size=5) | st.just("\ud800"))
        config["config_groups"] = {name: {"weights": weights, **group}}
    try:
        scheme = read(config)
    except CcqError as error:
        assert "\n" not in str(error)
        str(error).encode()  # any output can show it
    else:
        scheme.kind_of("model.layers.0.mlp.up_proj")
        for kind in Kind:
            for block in scheme.blocks(kind, (8, 16)):
                assert min(block) > 0
