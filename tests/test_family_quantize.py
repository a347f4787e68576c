# SPDX-License-Identifier: Apache-2.0
"""Models of other families that lose or swap a weight between their source and its copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from helpers import family_models
from helpers.family_models import CASES, Case, by_name, random_model, save
from helpers.published import FP8_CONFIG, fp8, from_fp8, from_int4, int4, int4_config
from helpers.synthetic import tiny_config, write_checkpoint, write_tensors
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.checkpoint.safetensors_io import TensorFolder
from paddle_ccq.codec import formats
from paddle_ccq.dequantize import dequantize
from paddle_ccq.dequantize import main as dequantize_main
from paddle_ccq.errors import CcqError
from paddle_ccq.evaluate import main as evaluate_main
from paddle_ccq.families.tensor import EXACT_ROLES
from paddle_ccq.quantize import main, quantize
from paddle_ccq.sample import main as sample_main
from paddle_ccq.sensitivity import main as sensitivity_main
from paddle_ccq.tune import main as tune_main
from paddle_ccq.verify import verify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OPTIONS = {"preset": "fast", "quiet": True}
TOKENS = torch.arange(17).reshape(1, 17) * 5 % 96
# Where transformers' classes hold what another module name stands for on disk.
_MODULES = {"block_sparse_moe": "mlp"}
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Made:
    """A model, its source folder, and the quantized folder."""

    case: Case
    model: Any
    source: Path
    output: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Quantizes a case, once for each."""
    known: dict[str, Made] = {}

    def make(case: Case) -> Made:
        if case.name not in known:
            folder = tmp_path_factory.mktemp(case.name)
            model = random_model(case)
            save(model, folder / "source")
            quantize(folder / "source", folder / "output", **OPTIONS)
            known[case.name] = Made(case, model, folder / "source", folder / "output")
        return known[case.name]

    return make


def stored(folder: Path) -> Tensors:
    """All tensors of a folder; the safetensors library has no FP8 in NumPy."""
    tensors = TensorFolder(folder)
    return {name: tensors.read(name) for name in tensors.names()}


def entry_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def decoded(tensors: Tensors, module: str, expert: int, projection: str, format: str) -> np.ndarray:
    """An expert's matrix [out, in] from its packed tensors, as bfloat16 holds it."""
    stem = f"{module}.{expert}.{projection}."
    parts = {n.removeprefix(stem): v for n, v in tensors.items() if n.startswith(stem)}
    return formats.decode(format, parts, "bfloat16", "plain").T


def with_decoded_experts(model: Any, folder: Path, modules: Iterable[str] | None = None) -> None:
    """Put the folder's experts into the model, by names and shapes stated here once more."""
    tensors, parameters = stored(folder), dict(model.named_parameters())
    formats_of = entry_of(folder)["experts"]
    for module in modules or formats_of:
        own = module
        for disk, python in _MODULES.items():
            own = own.replace(disk, python)
        for projection in ("gate_up_proj", "down_proj"):
            target = parameters[f"{own}.{projection}"]
            with torch.no_grad():
                for expert in range(4):
                    values = decoded(tensors, module, expert, projection, formats_of[module])
                    target[expert] = torch.from_numpy(np.ascontiguousarray(values))


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def loaded(case: Case, folder: Path) -> Any:
    """The folder as transformers reads it, which must find every tensor that it wants."""
    auto = getattr(transformers, case.auto)
    model, info = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dequantized_the_logits_are_those_of_the_decoded_weights(case, made, tmp_path):
    found = made(case)
    report = verify(found.output, found.source)
    assert report.sound, report.problems
    assert len(report.matrices) == 2 * 4 * len(entry_of(found.output)["experts"])
    assert 0.05 < np.mean([m["rel_mse"] for m in report.matrices]) < 0.2
    dequantize(found.output, tmp_path / "float", log=lambda _: None)
    again = loaded(case, tmp_path / "float")
    before = logits(found.model)
    changed = random_model(case)
    with_decoded_experts(changed, found.output)
    expected = logits(changed)
    assert not torch.equal(expected, before)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_but_the_experts_is_the_source_byte_for_byte(case, made):
    found = made(case)
    source, output = stored(found.source), stored(found.output)
    entry = entry_of(found.output)
    kept = {name: value for name, value in source.items() if ".experts." not in name}
    packed = {
        name for name in output if any(name.startswith(f"{module}.") for module in entry["experts"])
    }
    assert output.keys() - packed == kept.keys()
    for name, value in kept.items():
        assert output[name].dtype == value.dtype
        assert output[name].tobytes() == value.tobytes(), name
    suffixes = {name.rpartition(".")[2] for name in packed}
    assert suffixes == set(formats.tensor_specs("wint2", 128, 128))
    assert {name.split(".")[-2] for name in packed} == {"gate_up_proj", "down_proj"}
    assert (entry["quant_method"], entry["family"]) == ("ccq", case.family)
    assert entry["source_quantization_config"] is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stacked_experts_give_the_same_checkpoint(case, made, tmp_path):
    found = made(case)
    save(found.model, tmp_path / "stacked", stacked=True)
    assert len(stored(tmp_path / "stacked")) < len(stored(found.source))
    quantize(tmp_path / "stacked", tmp_path / "output", **OPTIONS)
    expected, output = stored(found.output), stored(tmp_path / "output")
    renamed = {
        name: name if name in output else name.replace("block_sparse_moe", "mlp")
        for name in expected
    }
    assert set(renamed.values()) == output.keys()
    for name, value in expected.items():
        assert output[renamed[name]].tobytes() == value.tobytes(), name
    assert verify(tmp_path / "output", tmp_path / "stacked").sound
    dequantize(tmp_path / "output", tmp_path / "float", log=lambda _: None)
    loaded(case, tmp_path / "float")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_config_json_alone_says_how_large_the_output_is(case, made, tmp_path):
    found = made(case)
    (tmp_path / "alone").mkdir()
    shutil.copy(found.source / "config.json", tmp_path / "alone")
    alone = quantize(tmp_path / "alone", dry_run=True, **OPTIONS).plan
    whole = quantize(found.source, dry_run=True, **OPTIONS).plan
    known = {planned.name: planned for planned in whole.tensors}
    optional = 0
    for planned in alone.tensors:
        if planned.tensor.optional and planned.name not in known:
            optional += planned.rank_bytes
            continue
        wanted = known[planned.name]
        # transformers has own rules for the dtypes of routers and their biases.
        if planned.tensor.role not in EXACT_ROLES:
            assert planned.specs == wanted.specs
            assert planned.tensor.source_bytes == wanted.tensor.source_bytes
    assert {planned.name for planned in alone.tensors} >= known.keys()
    assert alone.output_bytes - optional == pytest.approx(whole.output_bytes, rel=1e-2)


# --- sources in FP8 and INT4 ----------------------------------------------------------------------


def write(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 3) -> None:
    folder.mkdir()
    write_tensors(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(config))


def with_prediction_layer(tensors: Tensors, layer: int) -> Tensors:
    """A layer for multi-token prediction beside the others, made of the one before it."""
    before, rng = f"model.layers.{layer - 1}.", np.random.default_rng(1)
    found = dict(tensors)
    for name, value in tensors.items():
        if name.startswith(before):
            noise = rng.permutation(value.reshape(-1)).reshape(value.shape)
            found[name.replace(before, f"model.layers.{layer}.")] = noise
    hidden = 128
    for name, shape in (
        ("enorm.weight", (hidden,)),
        ("hnorm.weight", (hidden,)),
        ("eh_proj.weight", (hidden, 2 * hidden)),
        ("shared_head.norm.weight", (hidden,)),
    ):
        values = rng.standard_normal(shape, dtype=np.float32)
        found[f"model.layers.{layer}.{name}"] = values.astype(ml_dtypes.bfloat16)
    return found


def test_deepseek_from_fp8_with_its_layer_for_prediction(made, tmp_path):
    case = by_name("deepseek-v3")
    plain = made(case)
    tensors = with_prediction_layer(stored(plain.source), 2)
    exact = {}
    for name in [n for n in tensors if n.endswith("_proj.weight") and "eh_proj" not in n]:
        tensors[name], tensors[name + "_scale_inv"] = fp8(tensors[name].astype(np.float32))
        exact[name] = from_fp8(tensors[name], tensors[name + "_scale_inv"])
    config = json.loads((plain.source / "config.json").read_text())
    write(tmp_path / "source", {**config, "quantization_config": FP8_CONFIG}, tensors)
    quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    report = verify(tmp_path / "output", tmp_path / "source")
    assert report.sound, report.problems
    output, entry = stored(tmp_path / "output"), entry_of(tmp_path / "output")
    assert set(entry["experts"]) == {"model.layers.1.mlp.experts", "model.layers.2.mlp.experts"}
    assert entry["source_quantization_config"] == FP8_CONFIG
    for name, value in tensors.items():
        if ".experts." not in name:
            assert output[name].dtype == value.dtype
            assert output[name].tobytes() == value.tobytes(), name
    # The same experts from their exact values in float32.
    floats = {n: exact.get(n, v) for n, v in tensors.items() if not n.endswith("_scale_inv")}
    write(tmp_path / "float32", config, floats)
    quantize(tmp_path / "float32", tmp_path / "from-float32", **OPTIONS)
    expected = stored(tmp_path / "from-float32")
    packed = [name for name in output if ".experts." in name]
    assert all(output[name].tobytes() == expected[name].tobytes() for name in packed)

    dequantize(tmp_path / "output", tmp_path / "again", log=lambda _: None)
    changed = random_model(case)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name, value in exact.items():
            if name in parameters:
                parameters[name].copy_(torch.from_numpy(value))
    # transformers' class has no layer for prediction.
    with_decoded_experts(changed, tmp_path / "output", ["model.layers.1.mlp.experts"])
    assert torch.equal(logits(loaded(case, tmp_path / "again")), logits(changed))
    back = stored(tmp_path / "again")
    assert "model.layers.2.eh_proj.weight" in back
    assert not any(name.endswith("_scale_inv") for name in back)
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


def test_kimi_from_int4(made, tmp_path):
    plain = made(by_name("deepseek-v3"))
    tensors, exact = stored(plain.source), {}
    for name in [n for n in tensors if ".experts." in n]:
        packed = int4(tensors[name].astype(np.float32))
        exact[name] = from_int4(packed, tensors.pop(name).shape[1])
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{suffix}": value for suffix, value in packed.items()}
    config = json.loads((plain.source / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "quantization_config": int4_config()}
    write(tmp_path / "source", config, tensors)
    quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    entry = entry_of(tmp_path / "output")
    assert entry["family"] == "Kimi-K2"
    assert verify(tmp_path / "output", tmp_path / "source").sound
    floats = {**{n: v for n, v in tensors.items() if ".experts." not in n}, **exact}
    config.pop("quantization_config")
    write(tmp_path / "float32", config, floats)
    quantize(tmp_path / "float32", tmp_path / "expected", **OPTIONS)
    output, expected = stored(tmp_path / "output"), stored(tmp_path / "expected")
    assert output.keys() == expected.keys()
    assert all(output[name].tobytes() == expected[name].tobytes() for name in output)


# --- what else a source may hold, and what is refused ---------------------------------------------


def changed_source(plain: Made, folder: Path, **changes: np.ndarray | None) -> Path:
    """The source with tensors added, replaced or (None) taken away."""
    tensors = stored(plain.source)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    write(folder, json.loads((plain.source / "config.json").read_text()), tensors)
    return folder


def test_tensors_that_the_family_does_not_name_are_kept(made, tmp_path):
    plain = made(by_name("qwen3-moe"))
    more = {
        "model.layers.0.self_attn.extra.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "model.counts": np.arange(4, dtype=np.int64),
        "a{b}c": np.ones((2, 2), np.float16),
    }
    source = changed_source(plain, tmp_path / "source", **more)
    quantize(source, tmp_path / "output", **OPTIONS)
    assert verify(tmp_path / "output", source).sound
    dequantize(tmp_path / "output", tmp_path / "again", log=lambda _: None)
    for folder in ("output", "again"):
        found = stored(tmp_path / folder)
        for name, value in more.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({EXPERT: None}, f"1 tensor is missing, the first '{EXPERT}'"),
        ({"model.norm.weight": None}, "1 tensor is missing, the first 'model.norm.weight'"),
        ({"lm_head.weight": None}, "lm_head.weight"),
        (
            {EXPERT.replace(".3.", ".4."): np.zeros((128, 128), np.float32)},
            "is not called for by config.json: 4 experts of width 128 in 1 layers",
        ),
        (
            {EXPERT.replace("layers.1", "layers.0"): np.zeros((128, 128), np.float32)},
            "is not called for by config.json",
        ),
        ({EXPERT: np.zeros((64, 128), np.float32)}, r"has shape \[64, 128\], config.json calls"),
        ({EXPERT: np.full((128, 128), np.nan, np.float32)}, "NaN or infinite"),
        ({"model.norm.weight": np.full(128, np.inf, np.float32)}, "NaN or infinite"),
    ],
)
def test_sources_that_are_not_right_are_refused(changes, problem, made, tmp_path):
    source = changed_source(made(by_name("qwen3-moe")), tmp_path / "source", **changes)
    with pytest.raises(CcqError, match=problem):
        quantize(source, tmp_path / "output", **OPTIONS)
    assert not (tmp_path / "output").exists()


def test_values_that_cannot_be_stored_are_set_to_zero_if_asked(made, tmp_path):
    norm = np.ones(128, np.float32)
    norm[3] = np.nan
    plain = made(by_name("qwen3-moe"))
    source = changed_source(plain, tmp_path / "source", **{"model.norm.weight": norm})
    quantize(source, tmp_path / "output", allow_nonfinite=True, **OPTIONS)
    found = stored(tmp_path / "output")["model.norm.weight"]
    assert found[3] == 0
    assert found.sum() == 127
    assert verify(tmp_path / "output", source).sound


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--target", "fastdeploy"], "FastDeploy serves ERNIE-4.5 text models"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size: is for --target fastdeploy"),
        (["--fastdeploy-layout", "2.0"], "--fastdeploy-layout: is for --target fastdeploy"),
        (["--calibration", "TEXT"], "--calibration: computes the model"),
        (["--allocate", "2.3bpw", "--calibration", "TEXT"], "computes the model"),
        (["--wint4-end-layer", "7"], "this model's layers are 0 to 1"),
        (["--rules", "RULES"], "everything but the routed experts stays as it is"),
    ],
)
def test_what_other_families_cannot_have(flags, problem, made, tmp_path, capsys):
    (tmp_path / "TEXT").with_suffix(".jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "RULES.yaml").write_text("- {match: '*self_attn*', format: wint8}\n")
    flags = [
        str(tmp_path / {"TEXT": "TEXT.jsonl", "RULES": "RULES.yaml"}.get(flag, flag))
        if flag in ("TEXT", "RULES")
        else flag
        for flag in flags
    ]
    source = made(by_name("qwen3-moe")).source
    assert main([str(source), "--output", str(tmp_path / "output"), *flags]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("command", ["evaluate", "sample", "sensitivity", "tune"])
def test_commands_that_compute_the_model_say_that_they_cannot(command, made, tmp_path, capsys):
    pytest.importorskip("paddle")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n' * 8)
    found = made(by_name("qwen3-moe"))
    run, flags = {
        "evaluate": (evaluate_main, [str(found.output), "--text", str(text)]),
        "sample": (sample_main, [str(found.source), "--output", str(tmp_path / "new.jsonl")]),
        "sensitivity": (
            sensitivity_main,
            [str(found.source), "--calibration", str(text), "--json", str(tmp_path / "s.json")],
        ),
        "tune": (
            tune_main,
            [
                *(str(found.output), "--reference", str(found.source)),
                *("--calibration", str(text), "--output", str(tmp_path / "tuned")),
            ],
        ),
    }[command]
    assert run(flags) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{command}: computes the model, which this package does for ERNIE-4.5 alone" in said


@pytest.mark.parametrize("format", ["ccq-2.5", "ccq-2.75"])
def test_other_formats_and_layers_in_wint4(format, made, tmp_path):
    found = made(by_name("minimax-m2"))
    quantize(found.source, tmp_path / "output", format=format, wint4_end_layer=0, **OPTIONS)
    assert entry_of(tmp_path / "output")["experts"] == {
        "model.layers.0.block_sparse_moe.experts": "wint4",
        "model.layers.1.block_sparse_moe.experts": format,
    }
    assert verify(tmp_path / "output", found.source).sound
    dequantize(tmp_path / "output", tmp_path / "float", log=lambda _: None)
    changed = random_model(found.case)
    with_decoded_experts(changed, tmp_path / "output")
    assert torch.equal(logits(loaded(found.case, tmp_path / "float")), logits(changed))


def test_dequantize_knows_the_families_namings(made, tmp_path, capsys):
    found = made(by_name("qwen3-moe"))
    flags = [str(found.output), "--output", str(tmp_path / "x"), "--naming", "paddle"]
    assert dequantize_main(flags) == 2
    assert "--naming paddle: Qwen3-MoE checkpoints have pt" in capsys.readouterr().err


# --- broken outputs -------------------------------------------------------------------------------


def broken(found: Made, folder: Path, change: Any) -> list[str]:
    """The problems that verify finds once `change` has been made to a copy of the output."""
    shutil.copytree(found.output, folder)
    tensors = stored(folder)
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "ccq-manifest.json").unlink()
    write_tensors(folder, tensors, 1)
    (folder / "config.json").write_text(json.dumps(config))
    return verify(folder, found.source).problems


PACKED = "model.layers.1.mlp.experts.2.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t, c: t.pop(f"{PACKED}.super_scales"), f"{PACKED}.super_scales: missing"),
        (lambda t, c: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (
            lambda t, c: t.update({"model.norm.weight": 2 * t["model.norm.weight"]}),
            "model.norm.weight: not the reference's bytes",
        ),
        (
            lambda t, c: t.update({f"{PACKED}.quant_weight": t[f"{PACKED}.quant_weight"][::-1]}),
            "these are other weights",
        ),
        (
            lambda t, c: t.update({f"{PACKED}.code_zp": t[f"{PACKED}.code_zp"] * np.nan}),
            "NaN or infinite",
        ),
        (
            lambda t, c: c["quantization_config"].update(row_order="fastdeploy-2.1"),
            "row_order",
        ),
        (
            lambda t, c: c["quantization_config"]["experts"].update({"model.x": "wint2"}),
            "model.x: the model has no such experts",
        ),
    ],
)
def test_verify_finds_what_is_wrong(change, problem, made, tmp_path):
    problems = broken(made(by_name("qwen3-moe")), tmp_path / "broken", change)
    assert any(problem in found for found in problems), problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "version: 2 is not known here"),
        ({"format": "wint3"}, "format: 'wint3' is not one of"),
        ({"experts": None}, "experts: must map"),
        ({"experts": {"model.layers.1.mlp.experts": "wint8"}}, "'wint8' is not one of"),
    ],
)
def test_entries_of_config_json_that_are_none(change, problem, made, tmp_path):
    with pytest.raises(CcqError, match=problem):
        broken(
            made(by_name("qwen3-moe")),
            tmp_path / "broken",
            lambda t, c: c["quantization_config"].update(change),
        )


def test_a_packed_checkpoint_is_not_quantized_again(made, tmp_path):
    with pytest.raises(CcqError, match="quantized already"):
        quantize(made(by_name("qwen3-moe")).output, tmp_path / "again", **OPTIONS)


# --- ERNIE-4.5 in this layout ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_ernie_can_be_written_so_from_both_namings(layout, tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, tiny_config(moe_intermediate_size=128), layout=layout)
    quantize(source, tmp_path / "output", target="huggingface", **OPTIONS)
    report = verify(tmp_path / "output", source)
    assert report.sound, report.problems
    found, original = open_checkpoint(tmp_path / "output"), open_checkpoint(source)
    assert found.naming.name == "pt"
    for name in original.names():
        if found.format_of(name) == "bf16":
            np.testing.assert_array_equal(found.read(name), original.read(name))
            assert found.stored_dtype(name) == original.stored_dtype(name)
        else:
            assert found.config.tensors[name].is_expert
    names = stored(tmp_path / "output")
    assert "model.layers.1.mlp.experts.0.gate_up_proj.quant_weight" in names
    if layout == "pt":
        for name, value in stored(source).items():
            if ".experts." not in name:
                assert names[name].tobytes() == value.tobytes()
    dequantize(tmp_path / "output", tmp_path / "float", naming="pt", log=lambda _: None)
    assert open_checkpoint(tmp_path / "float").names() == original.names()


def test_the_families_models_are_small():
    assert sum(1 for _ in family_models.CASES) == len({case.name for case in CASES})


# --- models of no known family --------------------------------------------------------------------


def unknown(found: Made, folder: Path, change: Any = None) -> Path:
    """The model under an architecture that nobody knows."""
    tensors = stored(found.source)
    config = json.loads((found.source / "config.json").read_text())
    config |= {"architectures": ["UnheardOfForCausalLM"], "model_type": "unheard_of"}
    if change is not None:
        change(tensors)
    write(folder, config, tensors)
    return folder


@pytest.mark.parametrize("name", ["qwen3-moe", "minimax-m2", "qwen3.5-moe-vision"])
@pytest.mark.parametrize("stacked", [False, True])
def test_generic_packs_what_the_family_would_pack(name, stacked, made, tmp_path, capsys):
    found = made(by_name(name))
    if stacked:
        save(found.model, tmp_path / "stacked", stacked=True)
        found = Made(found.case, found.model, tmp_path / "stacked", found.output)
    source = unknown(found, tmp_path / "source")
    with pytest.raises(CcqError, match=r"'UnheardOfForCausalLM' is not supported; .*--family gen"):
        quantize(source, tmp_path / "output", **OPTIONS)
    quantize(source, tmp_path / "output", family="generic", preset="fast")
    said = capsys.readouterr().err
    assert "found and quantized:" in said
    assert "experts.0-3.gate_up_proj" in said
    expected, output = stored(found.output), stored(tmp_path / "output")
    if name == "minimax-m2" and stacked:
        expected = {n.replace("block_sparse_moe", "mlp"): v for n, v in expected.items()}
    assert output.keys() == expected.keys()
    assert all(output[name].tobytes() == expected[name].tobytes() for name in output)
    assert entry_of(tmp_path / "output")["family"] == "generic"
    report = verify(tmp_path / "output", source)
    assert report.sound, report.problems
    assert report.matrices
    dequantize(tmp_path / "output", tmp_path / "float", log=lambda _: None)
    dequantize(found.output, tmp_path / "expected", log=lambda _: None)
    again, wanted = stored(tmp_path / "float"), stored(tmp_path / "expected")
    if not (name == "minimax-m2" and stacked):
        assert again.keys() == wanted.keys()
        assert all(again[name].tobytes() == wanted[name].tobytes() for name in again)


def test_generic_from_int4_and_fp8(made, tmp_path):
    plain = made(by_name("deepseek-v3"))
    tensors, exact = stored(plain.source), {}
    for index, name in enumerate([n for n in tensors if ".experts." in n]):
        weight = tensors.pop(name)
        stem = name.removesuffix(".weight")
        if index % 2:
            tensors[name], tensors[f"{stem}.weight_scale_inv"] = fp8(weight.astype(np.float32))
        else:
            packed = int4(weight.astype(np.float32))
            tensors |= {f"{stem}.{suffix}": value for suffix, value in packed.items()}
            exact[name] = from_int4(packed, weight.shape[1])
    config = json.loads((plain.source / "config.json").read_text())
    config |= {"architectures": ["X"], "quantization_config": FP8_CONFIG}
    write(tmp_path / "mixed", config, tensors)
    # INT4 of which config.json says nothing is refused by name.
    with pytest.raises(CcqError, match="weight_packed is stored as INT4, of which"):
        quantize(tmp_path / "mixed", tmp_path / "output", family="generic", **OPTIONS)


E0 = "model.layers.1.mlp.experts.0."


def _rename(old: str, new: str) -> Any:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_rename(".experts.", ".specialists."), "no stored tensor is named like a routed expert"),
        (_rename("up_proj", "upper"), "experts.0 has down_proj, gate_proj, upper; known are"),
        (lambda t: t.pop(E0 + "down_proj.weight"), "experts.0 has gate_proj, up_proj; known"),
        (_rename(".experts.2.", ".experts.7."), "experts.2 is not like the others: None"),
        (
            lambda t: t.update({E0 + "gate_proj.bias": np.zeros(128, np.float32)}),
            "'model.layers.1.mlp.experts.0.gate_proj.bias' lies in a module of experts",
        ),
        (
            lambda t: t.update({E0.replace(".0.", ".1.") + "up_proj.weight": np.zeros((2, 2))}),
            "experts.1 is not like the others",
        ),
        (
            lambda t: (
                t.update({"a.experts.gate_up_proj": np.zeros((2, 128, 256), np.float32)}),
                t.update({"a.experts.down_proj": np.zeros((2, 128, 128), np.float32)}),
            ),
            r"a.experts: gate_up_proj \[2, 128, 256\] and down_proj \[2, 128, 128\] are not",
        ),
    ],
)
def test_generic_guesses_nothing(change, problem, made, tmp_path):
    source = unknown(made(by_name("qwen3-moe")), tmp_path / "source", change)
    with pytest.raises(CcqError, match=problem):
        quantize(source, tmp_path / "output", family="generic", **OPTIONS)
    assert not (tmp_path / "output").exists()


def test_generic_needs_the_weights(made, tmp_path):
    (tmp_path / "alone").mkdir()
    shutil.copy(made(by_name("qwen3-moe")).source / "config.json", tmp_path / "alone")
    with pytest.raises(CcqError, match=r"neither model\.safetensors nor"):
        quantize(tmp_path / "alone", dry_run=True, family="generic", **OPTIONS)
    with pytest.raises(CcqError, match="--family x: not one of generic"):
        quantize(tmp_path / "alone", dry_run=True, family="x", **OPTIONS)
