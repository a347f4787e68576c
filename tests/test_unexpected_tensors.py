# SPDX-License-Identifier: Apache-2.0
"""No stored tensor is left out silently, and a head is used as config.json and the weights say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import reference_ernie
from helpers.synthetic import DTYPES, random_weights, stored_weights, tiny_config, write_tensors
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.checkpoint.safetensors_io import INDEX_FILE
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import main as quantize_main
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import verify

HEAD = "lm_head.weight"
SMALL = {"num_hidden_layers": 2, "moe_num_experts": 2}
MODEL, PADDLE = "model.layers.1.", "ernie.layers.1."


def write(
    folder: Path,
    head: str = "missing",
    flag: bool | None = True,
    layout: str = "pt",
    shards: int = 1,
    extra: dict | None = None,
    drop: tuple[str, ...] = (),
    **changes,
) -> dict[str, np.ndarray]:
    """A checkpoint with a head that is missing, equal to the embedding or different.

    Returns the weights by canonical name, as they are rounded on disk.
    """
    config = tiny_config(**SMALL, tie_word_embeddings=False) | changes
    weights = random_weights(config)
    if head == "equal":
        weights[HEAD] = np.ascontiguousarray(weights["ernie.embed_tokens.weight"].T)
    if head == "missing":
        del weights[HEAD]
    folder.mkdir()
    stored = {**stored_weights(config, weights, layout, "bf16"), **(extra or {})}
    for name in drop:
        del stored[name]
    write_tensors(folder, stored, shards)
    config["dtype" if layout == "paddle" else "torch_dtype"] = "bfloat16"
    del config["tie_word_embeddings"]
    if flag is not None:
        config["tie_word_embeddings"] = flag
    (folder / "config.json").write_text(json.dumps(config))
    rounded = stored_weights(config, weights, "paddle", "bf16")
    return {name: rounded[name].astype(np.float32) for name in weights}


def logits(folder: Path) -> np.ndarray:
    paddle = pytest.importorskip("paddle")
    from paddle_ccq.models.ernie import Ernie

    model = Ernie(open_checkpoint(folder))
    return model.logits(model.hidden_states(paddle.to_tensor([[1, 5, 9, 200]])))[0].numpy()


# --- the head -----------------------------------------------------------------------------------

# (flag, head) -> tied, untied, or the error.
RULE = {
    (True, "missing"): True,
    (True, "equal"): True,
    (True, "different"): "differs from .*embed_tokens.weight, but config.json says",
    (None, "missing"): True,
    (None, "equal"): False,
    (None, "different"): False,
    (False, "missing"): "'lm_head.weight' is missing, and config.json says",
    (False, "equal"): False,
    (False, "different"): False,
}


@pytest.mark.parametrize(("flag", "head"), RULE)
@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize("shards", [1, 3])
def test_flag_and_stored_head(tmp_path, flag, head, layout, shards):
    folder = tmp_path / "m"
    weights = write(folder, head, flag, layout, shards)
    expected = RULE[flag, head]
    if isinstance(expected, str):
        with pytest.raises(CcqError, match=expected):
            open_checkpoint(folder)
        with pytest.raises(CcqError, match=expected):
            quantize(folder, tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()
        assert quantize_main(["--model", str(folder), "--dry-run"]) == 2
        return
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tie_word_embeddings is expected
    assert (HEAD in checkpoint.names()) is not expected
    said = " ".join(checkpoint.messages)
    assert ("passing over lm_head.weight" in said) == (flag is True and head == "equal")
    assert ("does not say tie_word_embeddings" in said) == (flag is None)
    if not expected:
        np.testing.assert_array_equal(checkpoint.read(HEAD), weights[HEAD])


@pytest.mark.parametrize(
    ("flag", "head"), [key for key, rule in RULE.items() if not isinstance(rule, str)]
)
def test_outputs_say_what_was_written_and_compute_it(tmp_path, flag, head):
    folder, tied = tmp_path / "m", RULE[flag, head]
    weights = write(folder, head, flag)
    config = tiny_config(**SMALL, tie_word_embeddings=tied)
    expected = reference_ernie.logits(config, weights, [1, 5, 9, 200])
    np.testing.assert_allclose(logits(folder), expected, atol=1e-3)
    for naming in ("pt", "paddle"):
        written = dequantize(folder, tmp_path / naming, naming)
        stated = json.loads((written / "config.json").read_text())
        assert stated["tie_word_embeddings"] is tied
        assert (HEAD in load_file(next(written.glob("*.safetensors")))) is not tied
        np.testing.assert_allclose(logits(written), expected, atol=1e-3)
    quantize(folder, tmp_path / "out", quiet=True, preset="fast")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated["tie_word_embeddings"] is tied
    result = verify(tmp_path / "out", folder)
    assert result.sound, result.problems
    head_of_output = open_checkpoint(tmp_path / "out")
    if not tied:
        np.testing.assert_array_equal(head_of_output.read(HEAD), weights[HEAD])


def test_verify_takes_the_head_of_a_checkpoint_that_does_not_say(tmp_path):
    write(tmp_path / "m", "different", None)
    quantize(tmp_path / "m", tmp_path / "out", quiet=True, preset="fast")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    problems = verify(tmp_path / "out", tmp_path / "m", hashes=False).problems
    assert not [problem for problem in problems if "lm_head" in problem]


def test_a_tied_head_as_paddle_stores_it(tmp_path):
    weights = write(tmp_path / "m", "missing", None, "paddle")
    table = weights["ernie.embed_tokens.weight"].astype(DTYPES["bf16"])
    write(tmp_path / "same", "missing", None, "paddle", extra={HEAD: table})
    assert open_checkpoint(tmp_path / "same").config.tie_word_embeddings
    write(tmp_path / "other", "missing", None, "paddle", extra={HEAD: table + table})
    with pytest.raises(CcqError, match=r"lm_head.weight differs from ernie.embed_tokens"):
        open_checkpoint(tmp_path / "other")


def test_one_changed_value_in_the_head_is_a_difference(tmp_path):
    table = write(tmp_path / "m")["ernie.embed_tokens.weight"].astype(np.float32)
    table[-1, -1] += 1
    write(tmp_path / "other", extra={HEAD: table})
    with pytest.raises(CcqError, match="differs"):
        open_checkpoint(tmp_path / "other")


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        (True, "the output uses the embedding (tie_word_embeddings true)"),
        (False, "the output has its own weights (tie_word_embeddings false)"),
        (None, "tie_word_embeddings true; not stated, so a stored head would be written too"),
    ],
)
def test_a_dry_run_says_what_it_assumes(tmp_path, capsys, flag, text):
    write(tmp_path / "m", "different", flag)
    (tmp_path / "m" / "model.safetensors").unlink()
    assert quantize_main(["--model", str(tmp_path / "m"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "no weights were read; assumed from config.json alone" in out
    assert text in out


def test_a_dry_run_looks_at_weights_that_are_there(tmp_path, capsys):
    write(tmp_path / "m", "different", None, shards=2)
    assert quantize_main(["--model", str(tmp_path / "m"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "lm_head.weight is stored" in out and "\nlm_head   " in out


# --- other tensors ------------------------------------------------------------------------------

ONE = np.ones((128, 128), np.float32)
NORM = np.ones(32, np.float32)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        (f"{MODEL}self_attn.q_proj.bias", ONE[0], "is a bias"),
        (f"{MODEL}self_attn.q_norm.weight", NORM, "a norm of queries or keys"),
        (f"{MODEL}self_attn.k_layernorm.weight", NORM, "a norm of queries or keys"),
        ("model.layers.2.input_layernorm.weight", ONE[0], "num_hidden_layers is 2"),
        (f"{MODEL}mlp.experts.2.up_proj.weight", ONE, "moe_num_experts is 2"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", ONE, "layer 0 is no MoE layer"),
        ("model.layers.0.mlp.gate.weight", ONE, "layer 0 is no MoE layer"),
        (f"{MODEL}mlp.gate.weight_1", ONE, "not called for"),
        (f"{MODEL}mlp.experts.0.up_proj.weight_scale_inv", ONE, "only FP8 values have"),
        (f"{MODEL}self_attn.k_proj.lora_A.weight", ONE, "another model"),
        ("vision_model.patch_embed.proj.weight", ONE, "another model"),
        ("model.rotary_emb.inv_freq", np.zeros(16, np.float32), "other rotary frequencies"),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_tensor_that_is_not_called_for_is_refused(tmp_path, name, values, text, shards):
    write(tmp_path / "m", extra={name: values}, shards=shards)
    with pytest.raises(CcqError, match=text) as caught:
        open_checkpoint(tmp_path / "m")
    assert name in str(caught.value) and str(tmp_path / "m" / "model") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1"),
        ({"moe_num_shared_experts": 0}, "moe_num_shared_experts is 0"),
        ({"moe_num_experts": 1, "moe_k": 1}, "gate.weight: has shape|moe_num_experts is 1"),
    ],
)
def test_a_config_that_calls_for_less_than_is_stored(tmp_path, changes, text):
    write(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CcqError, match=text):
        open_checkpoint(tmp_path / "m")


def test_a_router_bias_under_two_names(tmp_path):
    bias = f"{PADDLE}mlp.moe_statics.e_score_correction_bias"
    other = f"{PADDLE}mlp.gate.e_score_correction_bias"
    value = random_weights(tiny_config(**SMALL, tie_word_embeddings=False))[bias]
    write(tmp_path / "same", layout="paddle", extra={other: value})
    assert any("equal" in message for message in open_checkpoint(tmp_path / "same").messages)
    write(tmp_path / "other", layout="paddle", extra={other: value + 1})
    with pytest.raises(CcqError, match=f"'{other}' differs from '{bias}'"):
        open_checkpoint(tmp_path / "other")


def test_a_tensor_that_only_the_shards_know(tmp_path):
    write(tmp_path / "m", "different", None, shards=2)
    path = tmp_path / "m" / INDEX_FILE
    index = json.loads(path.read_text())
    del index["weight_map"][HEAD]
    path.write_text(json.dumps(index))
    with pytest.raises(CcqError, match=r"'lm_head.weight' is not called for"):
        open_checkpoint(tmp_path / "m")


def test_verify_lists_a_key_that_would_make_another_model(tmp_path):
    write(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "out", quiet=True, preset="fast")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "moe_gate_act": "sigmoid"}))
    problems = verify(tmp_path / "out", hashes=False).problems
    assert any("config.json: moe_gate_act: 'sigmoid' is not supported" in p for p in problems)
