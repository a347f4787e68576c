# SPDX-License-Identifier: Apache-2.0
"""Tensors that are taken for others, or lose or double a column on their way from the disk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import paddle_ccq
from helpers.synthetic import random_weights, stored_weights, tiny_config
from paddle_ccq.errors import CcqError
from paddle_ccq.families.ernie45 import ERNIE45
from paddle_ccq.families.fields import Fields
from paddle_ccq.families.registry import FAMILIES, family_of, find, read_config
from paddle_ccq.families.tensor import Role

CONFIG = tiny_config(tie_word_embeddings=False, num_key_value_heads=1)


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_storage_matches_an_independent_statement_of_the_layout(layout):
    config = read_config(CONFIG)
    weights = random_weights(CONFIG)
    stored = stored_weights(CONFIG, weights, layout, "f32")
    seen = set()
    for name, tensor in config.tensors.items():
        storage = tensor.sources[layout]
        for part in storage.parts:
            values = stored[part.name]
            assert values.shape == part.shape
            whole = weights[name]
            expected = whole[:, part.columns].T if storage.transposed else whole
            np.testing.assert_array_equal(values, expected)
            seen.add(part.name)
        if storage.transposed:
            columns = [c for p in storage.parts for c in range(tensor.shape[1])[p.columns]]
            assert columns == list(range(tensor.shape[1]))
    assert seen == set(stored)


@pytest.mark.parametrize(
    ("name", "role", "linear", "place"),
    [
        (
            "ernie.layers.2.mlp.experts.3.up_gate_proj.weight",
            Role.EXPERT,
            True,
            (2, 3, "up_gate_proj"),
        ),
        (
            "ernie.layers.2.mlp.shared_experts.down_proj.weight",
            Role.SHARED_EXPERT,
            True,
            (2, None, "down_proj"),
        ),
        ("ernie.layers.0.self_attn.o_proj.weight", Role.ATTENTION, True, (0, None, "o_proj")),
        ("ernie.layers.0.mlp.up_gate_proj.weight", Role.MLP, True, (0, None, "up_gate_proj")),
        ("ernie.layers.2.mlp.gate.weight", Role.ROUTER, False, (2, None, "gate")),
        (
            "ernie.layers.2.mlp.moe_statics.e_score_correction_bias",
            Role.CORRECTION_BIAS,
            False,
            (2, None, "e_score_correction_bias"),
        ),
        (
            "ernie.layers.1.input_layernorm.weight",
            Role.NORM,
            False,
            (1, None, "input_layernorm"),
        ),
        ("ernie.norm.weight", Role.NORM, False, (None, None, "norm")),
        ("ernie.embed_tokens.weight", Role.EMBEDDING, False, (None, None, "embed_tokens")),
        ("lm_head.weight", Role.HEAD, False, (None, None, "lm_head")),
    ],
)
def test_what_a_tensor_is(name, role, linear, place):
    tensors = read_config(CONFIG).tensors
    tensor = tensors[name]
    assert (tensor.role, tensor.is_linear) == (role, linear)
    assert (tensor.layer, tensor.expert, tensor.projection) == place
    assert tensors.find(role, place[2], place[0], place[1]) is tensor
    assert tensor.template.format(layer=tensor.layer, expert=tensor.expert) == name


def test_no_place_is_taken_twice():
    tensors = read_config(CONFIG).tensors
    places = {(t.role, t.layer, t.expert, t.projection) for t in tensors.values()}
    assert len(places) == len(tensors)


# A tensor's name read for what it says: its beginning or end, a pattern, a part.
_SAYS = r"""["'][^"']*(_proj|mlp|experts|embed|lm_head|layers|norm|gate)[^"']*["']"""
READS_NAMES = re.compile(
    r"(endswith|startswith|removesuffix|fullmatch|search|match|compile)\(+[rf]?"
    + _SAYS
    + "|"
    + _SAYS
    + r" (not )?in \w*name"
)


@pytest.mark.parametrize(
    "line",
    [
        'if name.endswith(("down_proj.weight", "x")):',
        'found = re.compile(r"ernie\\.layers\\.(\\d+)")',
        'if ".mlp.experts." not in name:',
    ],
)
def test_reading_a_name_is_noticed(line):
    assert READS_NAMES.search(line)


def test_names_are_read_in_the_families_files_alone():
    package = Path(paddle_ccq.__file__).parent
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        # vLLM hands over the names of its own modules, which vllm/names.py takes apart.
        if not {"families", "vllm"} & set(path.relative_to(package).parts)
        for line in path.read_text("utf-8").splitlines()
        if READS_NAMES.search(line.split("#")[0])
    ]
    assert found == []


@pytest.mark.parametrize(
    ("name", "mtp"),
    [
        ("ernie.mtp_emb_norm.0.weight", True),
        ("model.mtp_block.0.self_attn.q_proj.weight", True),
        ("mtp.layers.0.weight", True),
        ("ernie.layers.0.self_attn.o_proj.weight", False),
        ("model.layers.0.mtpx.weight", False),
    ],
)
def test_multi_token_prediction_names(name, mtp):
    assert ERNIE45.is_mtp(name) is mtp


def test_detect_layout():
    assert ERNIE45.detect_naming(["lm_head.weight", "model.norm.weight"], "x").name == "pt"
    assert ERNIE45.detect_naming(["ernie.norm.weight"], "x").name == "paddle"
    with pytest.raises(CcqError, match=r"^x: tensors of two layouts, such as 'model.norm"):
        ERNIE45.detect_naming(["ernie.norm.weight", "model.norm.weight"], "x")
    with pytest.raises(CcqError, match="no tensor is named like an ERNIE"):
        ERNIE45.detect_naming(["transformer.h.0.weight", "model.mtp_norm.weight"], "x")


ONE_FILE = """
from paddle_ccq.families.config import ModelConfig
from paddle_ccq.families.family import Family

FAMILY = Family("Toy", ("ToyForCausalLM",), (), None, None, "embedding", "head", "toy.*")
"""


def test_a_family_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(ONE_FILE)
    (tmp_path / "shared_by_families.py").write_text("nothing = None")
    monkeypatch.setattr(paddle_ccq.families, "__path__", [str(tmp_path)])
    (toy,) = find([str(tmp_path)])
    assert toy.architectures == ("ToyForCausalLM",)


def test_the_families_that_are_found():
    assert ERNIE45 in FAMILIES
    for family in FAMILIES:
        for name in family.architectures:
            for kind in family.model_types or ("", "unheard-of"):
                stated = {"architectures": [name], "model_type": kind}
                assert family_of(Fields(stated, "x")) is family


@pytest.mark.parametrize("names", [None, [], "Ernie4_5_MoeForCausalLM", [3]])
def test_architectures_that_are_no_list_of_names(names):
    with pytest.raises(CcqError, match=r"^x: architectures: not a list of names; supported are"):
        family_of(Fields({"architectures": names}, "x"))
