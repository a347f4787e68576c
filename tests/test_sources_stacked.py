# SPDX-License-Identifier: Apache-2.0
"""Stacked experts: a part is read alone, in float and in FP8, and wrong stacks are refused."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers.published import FP8_CONFIG, fp8, from_fp8
from helpers.synthetic import tiny_config
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.checkpoint.safetensors_io import SafetensorsFile, TensorFolder
from paddle_ccq.checkpoint.sources.locate import locate
from paddle_ccq.checkpoint.sources.scheme import SourceScheme
from paddle_ccq.checkpoint.sources.stored import StoredWeight
from paddle_ccq.errors import CcqError
from paddle_ccq.families.tensor import Source, Stacked

EXPERTS, INNER, HIDDEN = 3, 192, 256
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"


def gate_or_up(expert: int, which: str, name: str = GATE_UP) -> Source:
    rows = slice(0, INNER) if which == "gate" else slice(INNER, 2 * INNER)
    stacked = Stacked(name, (EXPERTS, 2 * INNER, HIDDEN), expert, rows)
    plain = f"model.layers.0.mlp.experts.{expert}.{which}_proj.weight"
    return Source(plain, (INNER, HIDDEN), stacked=stacked)


def find(folder, source, config=None) -> StoredWeight | None:
    raw = {"quantization_config": config} if config else {}
    return locate(TensorFolder(folder), SourceScheme.read(raw, "config.json"), source)


def random(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.02


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_each_part_of_a_float_stack(tmp_path, dtype, monkeypatch):
    gate_up = random((EXPERTS, 2 * INNER, HIDDEN)).astype(dtype)
    down = random((EXPERTS, HIDDEN, INNER), 1).astype(dtype)
    save_file({GATE_UP: gate_up, DOWN: down}, tmp_path / "model.safetensors")
    taken = []
    read = SafetensorsFile._read

    def watch(self, name, begin, nbytes):
        taken.append(nbytes)
        return read(self, name, begin, nbytes)

    monkeypatch.setattr(SafetensorsFile, "_read", watch)
    for expert in range(EXPERTS):
        for which, half in (("gate", gate_up[expert, :INNER]), ("up", gate_up[expert, INNER:])):
            weight = find(tmp_path, gate_or_up(expert, which))
            values = weight.read()
            assert values.dtype == dtype and weight.is_float
            np.testing.assert_array_equal(values, half)
            assert weight.nbytes == half.nbytes and weight.names == (GATE_UP,)
        stacked = Stacked(DOWN, (EXPERTS, HIDDEN, INNER), expert)
        whole = find(tmp_path, Source("x.weight", (HIDDEN, INNER), stacked=stacked))
        np.testing.assert_array_equal(whole.read(), down[expert])
    # Never more than one matrix at a time.
    assert max(taken) == max(gate_up[0, :INNER].nbytes, down[0].nbytes)
    assert len(taken) == 3 * EXPERTS


def test_fp8_stacks_whose_halves_begin_inside_a_block(tmp_path):
    block = (128, 128)  # 192 rows of gate: the second row of blocks holds gate and up
    pairs = [fp8(random((2 * INNER, HIDDEN), seed), block) for seed in range(EXPERTS)]
    tensors = {
        GATE_UP: np.stack([values for values, _ in pairs]),
        GATE_UP + "_scale_inv": np.stack([scales for _, scales in pairs]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    for expert, (values, scales) in enumerate(pairs):
        whole = from_fp8(values, scales, block)
        for which, half in (("gate", whole[:INNER]), ("up", whole[INNER:])):
            weight = find(tmp_path, gate_or_up(expert, which), FP8_CONFIG)
            np.testing.assert_array_equal(weight.read(), half)
            assert weight.nbytes == half.size + 2 * 2 * 4


def test_a_wrong_scale_in_a_stack_is_named_with_its_expert(tmp_path):
    values, scales = fp8(random((2 * INNER, HIDDEN)))
    stack = np.stack([scales] * EXPERTS)
    stack[2, 1, 1] = np.nan
    tensors = {GATE_UP: np.stack([values] * EXPERTS), GATE_UP + "_scale_inv": stack}
    save_file(tensors, tmp_path / "model.safetensors")
    find(tmp_path, gate_or_up(1, "up"), FP8_CONFIG).read()
    for which, rows in (("gate", "128 to 191"), ("up", "192 to 255")):
        weight = find(tmp_path, gate_or_up(2, which), FP8_CONFIG)
        place = re.escape(f"{GATE_UP}_scale_inv[2]: the scale nan of block [1, 1] (rows {rows}")
        with pytest.raises(CcqError, match=place):
            weight.read()


@pytest.mark.parametrize(
    ("tensors", "config", "problem"),
    [
        ({GATE_UP: np.zeros((EXPERTS, 8, HIDDEN), np.float32)}, None, "config.json calls for"),
        ({GATE_UP: np.zeros((8, HIDDEN), np.float32)}, None, "config.json calls for"),
        (
            {GATE_UP: np.zeros((EXPERTS, 2 * INNER, HIDDEN), ml_dtypes.float8_e4m3fn)},
            FP8_CONFIG,
            "has dtype F8_E4M3 without scales",
        ),
        (
            {
                GATE_UP: np.zeros((EXPERTS, 2 * INNER, HIDDEN), np.float32),
                GATE_UP + "_scale_inv": np.zeros((EXPERTS, 3, 2), np.float32),
            },
            FP8_CONFIG,
            "has dtype F32 and .*_scale_inv beside it",
        ),
        (
            {
                GATE_UP: np.zeros((EXPERTS, 2 * INNER, HIDDEN), ml_dtypes.float8_e4m3fn),
                GATE_UP + "_scale_inv": np.zeros((3, 2), np.float32),
            },
            FP8_CONFIG,
            r"has shape \[3, 2\]; .* need \[3, 3, 2\]",
        ),
        ({GATE_UP: np.zeros((EXPERTS, 2 * INNER, HIDDEN), np.int8)}, None, "has dtype I8"),
    ],
)
def test_wrong_stacks_are_refused_by_name(tmp_path, tensors, config, problem):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CcqError, match=problem) as error:
        find(tmp_path, gate_or_up(0, "gate"), config)
    assert "model.safetensors" in str(error.value) and GATE_UP in str(error.value)


@pytest.mark.parametrize("form", ["weight", "weight_packed"])
def test_a_matrix_beside_the_stack_that_holds_it_is_refused(tmp_path, form):
    source = gate_or_up(0, "gate")
    name = source.name.removesuffix("weight") + form
    stack = np.zeros((EXPERTS, 2 * INNER, HIDDEN), np.float32)
    save_file({name: random((INNER, HIDDEN)), GATE_UP: stack}, tmp_path / "model.safetensors")
    with pytest.raises(CcqError, match="the files of two checkpoints are mixed") as error:
        find(tmp_path, source)
    assert name in str(error.value) and GATE_UP in str(error.value)


def test_ernie_as_transformers_stacks_it(tmp_path):
    """The same values from both layouts that transformers' class of ERNIE-4.5 writes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {key: value for key, value in tiny_config().items() if key != "architectures"}
    config = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    opened = []
    for original in (True, False):
        folder = tmp_path / str(original)
        model.save_pretrained(folder, save_original_format=original)
        opened.append(open_checkpoint(folder))
    published, stacked = opened
    experts = "model.layers.1.mlp.experts"
    assert f"{experts}.gate_up_proj" in stacked.tensors
    assert f"{experts}.gate_up_proj" not in published.tensors
    assert stacked.names() == published.names()
    for name in published.names():
        np.testing.assert_array_equal(stacked.read(name), published.read(name), err_msg=name)
