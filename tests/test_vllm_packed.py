# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in Hugging Face's naming in vLLM: what their config promises, and their answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddle_ccq.errors import CcqError
from paddle_ccq.vllm.packed_claims import PackedClaim, PackedTensor
from paddle_ccq.vllm.packed_models import PACKED_MODELS

MODULE = "model.layers.3.mlp.experts"
GOOD = {
    "quant_method": "ccq",
    "version": 1,
    "family": "Qwen3-MoE",
    "format": "wint2",
    "row_order": "plain",
    "experts": {MODULE: "wint2", "mtp.layers.0.mlp.experts": "wint4"},
    "source_quantization_config": None,
}


def test_a_claim_tells_packed_tensors_from_all_others() -> None:
    claim = PackedClaim.read(GOOD)
    found = claim.parse(f"{MODULE}.12.gate_up_proj.quant_weight")
    assert found == PackedTensor(MODULE, 12, "up_gate", "quant_weight")
    found = claim.parse("mtp.layers.0.mlp.experts.0.down_proj.weight_scale")
    assert found is not None and found.projection == "down"
    for name in (
        f"{MODULE}.12.up_proj.quant_weight",
        f"{MODULE}.x.down_proj.quant_weight",
        "model.layers.4.mlp.experts.0.down_proj.quant_weight",
        "model.layers.3.mlp.gate.weight",
        "lm_head.weight",
    ):
        assert claim.parse(name) is None


@pytest.mark.parametrize(
    "change,said",
    [
        ({"version": 2}, "version 2: this release reads version 1"),
        ({"experts": {}}, "experts: not a table"),
        ({"experts": ["a"]}, "experts: not a table"),
        ({"experts": {MODULE: "wint3"}}, f"{MODULE} is 'wint3'; served are wint2"),
        ({"row_order": None}, "row_order None: not one of"),
        ({"source_quantization_config": "fp8"}, "neither an object nor null"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_key(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CcqError) as refused:
        PackedClaim.read(GOOD | change)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_format_that_quantize_writes_is_served() -> None:
    from paddle_ccq.codec.formats import EXPERT_FORMATS, WIDER_EXPERT_FORMATS

    for format in (*EXPERT_FORMATS, *WIDER_EXPERT_FORMATS):
        claim = PackedClaim.read(GOOD | {"format": format, "experts": {MODULE: format}})
        assert claim.experts == {MODULE: format}


def test_every_family_of_this_layout_has_a_class() -> None:
    from paddle_ccq.families.registry import FAMILIES
    from paddle_ccq.targets.huggingface.config import VLLM_ARCHITECTURES
    from paddle_ccq.vllm.plugin import MODELS

    assert set(VLLM_ARCHITECTURES) <= {*PACKED_MODELS, *MODELS}
    assert set(VLLM_ARCHITECTURES) >= set(PACKED_MODELS)
    names = {name for family in FAMILIES for name in family.architectures}
    assert set(PACKED_MODELS) <= names
    assert {name for name in names if "Ernie" not in name} == set(PACKED_MODELS)


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# vLLM's latent attention has kernels for real sizes alone.
os.environ.setdefault("VLLM_MLA_DISABLE", "1")

# Keys that published models have and transformers' classes do not write.
KEYS = {
    "deepseek-v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "minimax-m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
}
# Mean difference of log-probabilities: bfloat16 moves them by 0.005, the tiny DeepSeek by 0.045,
# with the decoded checkpoint in vLLM's own class too; packing moves them by 0.03 to 0.18.
BOUNDS = {"qwen3-moe": 0.012, "glm-4.5": 0.012, "minimax-m2": 0.012, "deepseek-v3": 0.07}
BOUNDS["qwen3.5-moe"] = 0.07
# Widths that vLLM has kernels for.
WIDTHS: dict[str, dict[str, int]] = {
    "qwen3.5-moe": {
        "hidden_size": 256,
        "head_dim": 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "shared_expert_intermediate_size": 128,
    }
}


def reference(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """transformers' float32 log-probabilities of each token."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(tokens)[None]).logits[0].double()
    rows = logits.log_softmax(-1).numpy()
    return rows[np.arange(len(tokens) - 1), tokens[1:]]


@needs_vllm
@pytest.mark.parametrize("name", list(BOUNDS))
def test_packed_experts_answer_as_the_decoded_model(name: str, tmp_path: Path) -> None:
    from helpers import family_models
    from helpers.vllm_scores import found
    from paddle_ccq.dequantize import main as dequantize
    from paddle_ccq.quantize import main as quantize

    if name == "qwen3.5-moe":  # vLLM's class of it reads images too
        pytest.importorskip("torchvision")
    source, packed, decoded = (tmp_path / part for part in ("source", "packed", "decoded"))
    case = family_models.by_name(name)
    case = dataclasses.replace(case, config=case.config | WIDTHS.get(name, {}))
    family_models.save(family_models.random_model(case), source)
    options = ["--target", "huggingface", "--preset", "fast", "--quiet"]
    assert quantize(["--model", str(source), "--output", str(packed), *options]) == 0
    assert dequantize(["--model", str(packed), "--output", str(decoded)]) == 0
    for folder in (source, packed, decoded):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | KEYS.get(name, {})))
    tokens = np.random.default_rng(3).integers(3, 90, 64)
    own = found(packed, tokens, skip_tokenizer_init=True, dtype="bfloat16")
    right, other = (np.abs(own - reference(f, tokens)).mean() for f in (decoded, source))
    assert right < BOUNDS[name]
    assert other > 2 * right


@needs_vllm
@pytest.mark.parametrize("experts", [False, True])
def test_cards_that_do_not_fit_are_refused_with_those_that_do(
    experts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from helpers import family_models
    from paddle_ccq.quantize import quantize
    from paddle_ccq.vllm.packed_config import PackedConfig

    case = family_models.by_name("glm-4.5")
    family_models.write_source(tmp_path / "m", case.config, family_models.random_tensors(case))
    quantize(tmp_path / "m", tmp_path / "packed", preset="fast", quiet=True)
    raw = json.loads((tmp_path / "packed" / "config.json").read_text())
    config = PackedConfig.from_config(raw["quantization_config"])
    cards = SimpleNamespace(
        tensor_parallel_size=2, pipeline_parallel_size=1, enable_expert_parallel=experts
    )
    monkeypatch.chdir(tmp_path / "packed")
    config.check_parallel(cards)  # of no model yet, and not the one of the folder that we are in
    config.maybe_update_config("someone/packed")
    config.check_parallel(cards)  # of a hub's model nothing is known here
    config.maybe_update_config(str(tmp_path / "packed"))
    if experts:
        config.check_parallel(cards)
        return
    with pytest.raises(
        CcqError,
        match=r"size 2 does not fit .* sizes that work: 1; 2 with --enable-expert-parallel$",
    ):
        config.check_parallel(cards)


@needs_vllm
def test_a_class_of_text_alone_answers_for_its_states() -> None:
    """As in vLLM 0.24 and 0.26, where only the class that reads images too does."""
    from types import SimpleNamespace

    from paddle_ccq.vllm.model import _what_it_lacks
    from paddle_ccq.vllm.packed_models import STATE_NAMES, WHOLE_MODELS

    class Text:
        pass

    class Whole:
        is_hybrid = True

        @classmethod
        def get_mamba_state_shape_from_config(cls, config: int) -> tuple[type, int]:
            return cls, config

        get_mamba_state_dtype_from_config = get_mamba_state_shape_from_config
        get_mamba_state_copy_func = get_mamba_state_shape_from_config

    for architecture, whole in WHOLE_MODELS.items():
        module = SimpleNamespace(**{architecture: Text, whole: Whole})
        made = type("Made", (Text,), _what_it_lacks(module, architecture))
        assert made.is_hybrid is True
        for name in STATE_NAMES[1:]:
            assert getattr(made, name)(3) == (made, 3)
        positions, delta = made().get_mrope_input_positions([5, 6, 7], [])
        assert positions.tolist() == [[0, 1, 2]] * 3 and delta == 0
        # A release whose class has all of it keeps its own.
        assert (
            _what_it_lacks(SimpleNamespace(**{architecture: made, whole: Whole}), architecture)
            == {}
        )
    assert _what_it_lacks(SimpleNamespace(), "Qwen3MoeForCausalLM") == {}


@needs_vllm
@pytest.mark.parametrize("architecture", list(PACKED_MODELS))
def test_every_class_answers_what_vllm_asks_of_its_kind(architecture: str) -> None:
    from vllm.model_executor.models.interfaces import has_inner_state, is_hybrid

    from paddle_ccq.vllm import model
    from paddle_ccq.vllm.packed_models import PREFIX, STATE_NAMES

    if architecture.startswith("Qwen3_5"):
        pytest.importorskip("torchvision")
    made = getattr(model, PREFIX + architecture)
    base = made.__mro__[2]
    assert base.__name__ == architecture
    for name in (n for n in dir(base) if n.startswith(("supports_", "is_", "has_", "packed_"))):
        assert getattr(made, name) is getattr(base, name) or callable(getattr(made, name))
    if has_inner_state(made) or is_hybrid(made):
        assert all(hasattr(made, name) for name in STATE_NAMES)


@needs_vllm
def test_names_that_this_vllm_does_not_know_are_registered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.models import ModelRegistry, config

    from paddle_ccq.vllm import packed_models

    known = set(ModelRegistry.get_supported_archs())
    registered: dict[str, str] = {}
    maps = dict(config.MODELS_CONFIG_MAP)
    for name, whole in packed_models.WHOLE_MODELS.items():
        known.discard(name)
        maps.pop(name, None)
        maps[whole] = object
    monkeypatch.setattr(ModelRegistry, "get_supported_archs", lambda: known)
    monkeypatch.setattr(ModelRegistry, "register_model", registered.__setitem__)
    monkeypatch.setattr(config, "MODELS_CONFIG_MAP", maps)
    monkeypatch.setattr(packed_models, "_registered", set())
    assert packed_models.register_unknown() == list(packed_models.WHOLE_MODELS)
    for name in packed_models.WHOLE_MODELS:
        assert registered[name] == f"paddle_ccq.vllm.model:Ccq{name}"
        assert maps[name] is object
    known.update(packed_models.WHOLE_MODELS)
    assert packed_models.register_unknown() == []


@needs_vllm
@pytest.mark.parametrize("layout", ["fastdeploy", "huggingface"])
def test_adapters_are_refused_by_their_flag(layout: str) -> None:
    from types import SimpleNamespace

    from paddle_ccq.vllm import model
    from paddle_ccq.vllm.config import CcqConfig
    from paddle_ccq.vllm.packed_config import PackedConfig

    made = {"fastdeploy": CcqConfig, "huggingface": PackedConfig}[layout]
    loads = {"fastdeploy": model._Loads, "huggingface": model._LoadsPacked}[layout]
    asked = SimpleNamespace(quant_config=made.__new__(made), lora_config=object())
    with pytest.raises(CcqError, match="--enable-lora"):
        loads(vllm_config=asked)
    # Other checkpoints may have adapters.
    with pytest.raises(TypeError):  # of object.__init__: there is no class of vLLM behind it
        loads(vllm_config=SimpleNamespace(quant_config=None, lora_config=object()))


@needs_vllm
@pytest.mark.parametrize("form", ["dummy", "sharded_state"])
@pytest.mark.parametrize("layout", ["fastdeploy", "huggingface"])
def test_loaders_that_ask_no_model_are_refused_by_their_flag(layout: str, form: str) -> None:
    """Packed weights would stay what the memory held, and the server would answer."""
    from types import SimpleNamespace

    from paddle_ccq.vllm import model
    from paddle_ccq.vllm.config import CcqConfig
    from paddle_ccq.vllm.packed_config import PackedConfig

    made = {"fastdeploy": CcqConfig, "huggingface": PackedConfig}[layout]
    loads = {"fastdeploy": model._Loads, "huggingface": model._LoadsPacked}[layout]
    load = SimpleNamespace(load_format=form)
    asked = SimpleNamespace(quant_config=made.__new__(made), load_config=load)
    with pytest.raises(CcqError, match=f"--load-format {form}: packed weights"):
        loads(vllm_config=asked)
