# SPDX-License-Identifier: Apache-2.0
"""The plugin, on a stand-in for FastDeploy and, where it is installed, on the real one."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")

from helpers import fastdeploy_standin as standin  # noqa: E402
from helpers.fastdeploy_case import EXPERTS, HIDDEN, WIDTH, installer, run, tensor  # noqa: E402
from paddle_ccq.errors import CcqError  # noqa: E402
from paddle_ccq.fastdeploy import fused_ops, moe_method, plugin  # noqa: E402
from paddle_ccq.targets.fastdeploy.config import wint4_layers_of  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture
def install(monkeypatch):
    return installer(monkeypatch)


def a_layer(modules: SimpleNamespace, index: int = 7, **quantization) -> standin.Layer:
    config = modules.config.WINT2Config.from_config({"moe_quant_config": quantization})
    return standin.Layer(config, index, HIDDEN, WIDTH, EXPERTS)


def loaded(modules: SimpleNamespace, experts: dict[str, np.ndarray], index: int = 7):
    layer = a_layer(modules, index)
    layer.create()
    state = {name: tensor(values) for name, values in experts.items()}
    layer.quant_method.process_prequanted_weights(layer, state)
    return layer


def test_the_fused_op_takes_the_kernels_place(install, experts, monkeypatch) -> None:
    modules = install("2.5.0")
    expected = run(loaded(SimpleNamespace(config=modules.config, backend=None), experts))
    assert standin.calls == ["ccq_moe_ffn"]
    modules.backend.CutlassWint2FusedMoeMethod = standin.Wint2Method
    own = run(loaded(modules, experts))
    assert standin.calls == ["ccq_moe_ffn", "own kernel"]
    np.testing.assert_array_equal(expected, own)


# moe.py's own call of apply() behind (layer, x, gate), line by line of releases.
CALLS = {
    "2.4.0": ((), {}),
    "2.5.0": ((), {"topk_ids_hookfunc": None}),
    "2.6.0": ((), {"topk_ids_hookfunc": None, "shared_experts": None}),
    "2.6.0-dev": ((None, None, None, None), {}),
}


@pytest.mark.parametrize("ops", [True, False])
@pytest.mark.parametrize("version", CALLS)
def test_fastdeploys_own_call_of_every_release(install, experts, version, ops) -> None:
    layer = loaded(install(version, ops=ops), experts)
    args, kwargs = CALLS[version]
    assert run(layer, *args, **kwargs).shape == (5, HIDDEN)
    assert standin.calls == ["ccq_moe_ffn" if ops else "own kernel"]


@pytest.mark.parametrize("ops", [True, False])
def test_the_hook_is_called_where_the_arguments_are_positional(install, experts, ops) -> None:
    seen = []
    layer = loaded(install("2.6.0-dev", ops=ops), experts)
    run(layer, lambda topk_ids: seen.append(topk_ids.shape), None, None, None)
    assert seen == [[5, 2]]


@pytest.mark.parametrize("name", ["shared_experts", "fc1_latent_proj", "fc2_latent_proj"])
def test_nothing_that_asks_for_something_is_left_out(install, experts, name) -> None:
    layer = loaded(install("2.6.0-dev", ops=False), experts)
    with pytest.raises(TypeError, match=name):
        run(layer, **{"topk_ids_hookfunc": None, name: lambda x: x})


@pytest.mark.parametrize("place", [2, 3])
def test_latent_projections_are_fastdeploys(install, experts, monkeypatch, place, caplog) -> None:
    given = [None] * 4
    given[place] = paddle.nn.Identity()
    modules = install("2.6.0-dev")
    with pytest.raises(CcqError, match=r"MoE layer 7: latent .* without paddle_ccq"):
        run(loaded(modules, experts), *given)
    seen = []

    def apply(self, layer, x, gate, hook=None, shared_experts=None, fc1=None, fc2=None):
        seen.append((fc1, fc2))
        return x

    monkeypatch.setattr(standin.Wint2Method, "apply", apply)
    layer = a_layer(modules)
    layer.fd_config.model_config.hidden_size = 2 * HIDDEN
    layer.create()
    state = {name: tensor(values) for name, values in experts.items()}
    layer.quant_method.process_prequanted_weights(layer, state)
    run(layer, *given)
    assert seen == [tuple(given[2:])] and "latent projections" in caplog.text


def test_weights_are_not_held_twice(install, experts) -> None:
    layer = loaded(install(), experts)
    assert list(layer.parameters()) == []
    held = layer.ccq_weights
    assert held.up_gate.quant.shape == [EXPERTS, 2 * WIDTH // 16, HIDDEN // 128, 512]
    assert held.down.columns.shape == [2, EXPERTS, HIDDEN // 16, 32]


def test_loading_a_second_time(install, experts) -> None:
    layer = loaded(install(), experts)
    first = run(layer)
    state = {name: tensor(values) for name, values in experts.items()}
    for name in state:
        if name.endswith("super_scales"):
            state[name] = (state[name].cast("float32") * 2).cast("bfloat16")
    layer.quant_method.process_prequanted_weights(layer, state, True)
    assert not np.array_equal(run(layer), first)
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("results", [7, 8])
def test_every_release_gives_its_own_number_of_results(install, experts, monkeypatch, results):
    monkeypatch.setattr(standin, "results_of_dispatch", results)
    seen = []
    layer = loaded(install("2.4.0"), experts)
    run(layer, topk_ids_hookfunc=lambda topk_ids: seen.append(topk_ids.shape), shared_experts=None)
    assert seen == [[5, 2]] and standin.calls == ["ccq_moe_ffn"]


def test_without_the_ops_fastdeploy_goes_on_with_one_line(install, experts, caplog) -> None:
    modules = install(ops=False)
    with caplog.at_level(logging.INFO, "paddle_ccq"):
        for index in (7, 8, 9):
            run(loaded(modules, experts, index))
    assert standin.calls == ["own kernel"] * 3
    (line,) = caplog.messages
    assert "FastDeploy's own WINT2 kernel is used" in line and "\n" not in line


@pytest.mark.parametrize(("ops", "text"), [(True, "run on ccq_moe_ffn"), (False, "own WINT2")])
def test_a_process_without_any_logging_shows_the_line(install, experts, capsys, ops, text):
    modules = install(ops=ops)
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # as in FastDeploy's workers
    try:
        for index in (7, 8):
            loaded(modules, experts, index)
    finally:
        root.handlers = handlers
    assert capsys.readouterr().err.count(text) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda layer: setattr(layer, "activation", "gelu"), "activation gelu"),
        (lambda layer: setattr(layer, "with_bias", True), "bias"),
        (lambda layer: setattr(layer, "ep_size", 2), "expert parallelism"),
        (lambda layer: setattr(layer, "routed_scaling_factor_learnable", True), "learned scale"),
        (
            lambda layer: setattr(layer.fd_config.model_config, "hidden_size", 256),
            "latent projections",
        ),
        (lambda layer: setattr(layer, "up_gate_proj_in_scale", 1.0), "quantized activations"),
        (lambda layer: setattr(layer, "moe_intermediate_size", 192), "expert width 192"),
        (lambda layer: setattr(layer, "hidden_size", 64), "hidden size 64"),
    ],
)
def test_layers_that_our_kernel_does_not_take(install, change, text) -> None:
    layer = a_layer(install())
    assert moe_method.refusal(layer) is None
    change(layer)
    assert text in moe_method.refusal(layer)


def test_a_gpu_that_is_too_old(install, experts, monkeypatch, caplog) -> None:
    modules = install()
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (7, 5))
    run(loaded(modules, experts))
    assert standin.calls == ["own kernel"] and "7.5" in caplog.messages[0]


def test_ops_that_refuse_leave_fastdeploys_weights(install, experts, monkeypatch, caplog) -> None:
    def refuse(*tensors):
        raise RuntimeError("ccq_repack: code_zp\nhas the wrong dtype")

    modules = install()
    monkeypatch.setattr(standin.Ops, "ccq_repack", refuse)
    run(loaded(modules, experts))
    assert standin.calls == ["own kernel"]
    assert caplog.messages[0].endswith("ccq_repack: code_zp has the wrong dtype")


@pytest.mark.parametrize("version", ["2.3.0", "2.0.1", "2.7.0", "3.0", "Unknown", ""])
def test_other_versions_are_left_alone(install, caplog, version) -> None:
    modules = install(version)
    assert modules.backend.CutlassWint2FusedMoeMethod is standin.Wint2Method
    assert modules.config.WINT2Config is standin.Config
    (line,) = caplog.messages
    assert "nothing changed" in line and "2.4, 2.5, 2.6" in line


def test_a_fastdeploy_without_the_names(install, monkeypatch, caplog) -> None:
    monkeypatch.delattr(standin.Wint2Method, "process_prequanted_weights")
    modules = install()
    assert modules.config.WINT2Config is standin.Config
    assert "no CutlassWint2FusedMoeMethod.process_prequanted_weights" in caplog.text


def test_no_fastdeploy(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "fastdeploy", None)
    plugin.register()
    assert "does not import" in caplog.text


def test_registering_twice_changes_nothing(install) -> None:
    modules = install()
    method, config = modules.backend.CutlassWint2FusedMoeMethod, modules.config.WINT2Config
    plugin.register()
    assert modules.backend.CutlassWint2FusedMoeMethod is method
    assert modules.config.WINT2Config is config


def test_missing_rank_folders(install, tmp_path) -> None:
    layer = a_layer(install())
    layer.fd_config.parallel_config.tensor_parallel_size = 2
    layer.fd_config.model_config.model = str(tmp_path)
    (tmp_path / "rank0").mkdir()
    with pytest.raises(CcqError, match=r"no folder rank1.*--tensor-parallel-size 2"):
        layer.create()
    (tmp_path / "rank1").mkdir()
    layer.create()


def test_wint4_by_a_list_of_layers(install) -> None:
    modules = install()
    listed = {"wint4_layers": [3, 8], "moe_w4_quant_config": {"quant_end_layer": 5}}
    kinds = [
        isinstance(a_layer(modules, index, **listed).quant_method, standin.Wint4Method)
        for index in range(2, 10)
    ]
    assert kinds == [index in (3, 8) for index in range(2, 10)]
    prefix = {"moe_w4_quant_config": {"quant_end_layer": 5}}
    assert isinstance(a_layer(modules, 5, **prefix).quant_method, standin.Wint4Method)
    config = modules.config.WINT2Config.from_config({"moe_quant_config": listed})
    assert config.get_quant_method(object()) == "dense"
    assert config.moe_w4_quant_end_layer == 5


@pytest.mark.parametrize("value", ["3", [True], [-1], {"3": 1}, [1.5]])
def test_lists_that_are_none(value) -> None:
    with pytest.raises(CcqError, match="wint4_layers"):
        wint4_layers_of({"moe_quant_config": {"wint4_layers": value}})


def test_the_ops_are_called_as_they_are_registered() -> None:
    source = "".join(p.read_text("utf-8") for p in (ROOT / "custom_ops/paddle").glob("*.cu"))

    def names(op: str, part: str) -> list[str]:
        registration = source.partition(f"PD_BUILD_OP({op})")[2].partition(";")[0]
        return re.findall(r'"(\w+)', registration.partition(f".{part}(")[2].partition("})")[0])

    assert names("ccq_repack", "Inputs") == list(standin.SUFFIXES)
    assert names("ccq_repack", "Outputs") == ["quant", "scales", "columns", "pair_kind"]
    assert names("ccq_repack_trellis", "Inputs") == list(standin.SUFFIXES[:3])
    assert names("ccq_repack_trellis", "Outputs") == ["quant", "scales", "columns"]
    parts = [f"{p}_{t}" for p in ("up_gate", "down") for t in ("quant_weight", "super_scales")]
    assert names("ccq_moe_ffn_stored", "Inputs") == ["x", "offsets", *parts]
    assert names("ccq_moe_ffn_stored", "Attrs") == ["format", "row_order"]
    parts = [f"{p}_{t}" for p in ("up_gate", "down") for t in ("quant", "scales", "columns")]
    assert names("ccq_moe_ffn", "Inputs") == ["x", "offsets", *parts]
    assert names("ccq_moe_ffn", "Attrs") == ["up_gate_integer", "down_integer", "row_order"]
    assert f'name="{fused_ops.MODULE}"' in (ROOT / "custom_ops/setup.py").read_text("utf-8")


def test_the_entry_point() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'[project.entry-points."{plugin.GROUP}"]' in text
    assert f'{plugin.NAME} = "{plugin.__name__}:{plugin.register.__name__}"' in text


@pytest.mark.skipif(not importlib.util.find_spec("fastdeploy"), reason="needs FastDeploy")
def test_the_real_fastdeploy_has_every_name() -> None:
    assert set(plugin._modules()) == set(plugin.NAMES)
