# SPDX-License-Identifier: Apache-2.0
"""Formats that FastDeploy has not, served by the plugin, on a stand-in for FastDeploy."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")

from helpers import fastdeploy_standin as standin  # noqa: E402
from helpers.fastdeploy_case import (  # noqa: E402
    EXPERTS,
    HIDDEN,
    WIDTH,
    expert_tensors,
    installer,
    run,
    tensor,
)
from paddle_ccq.codec import formats  # noqa: E402
from paddle_ccq.errors import CcqError  # noqa: E402
from paddle_ccq.fastdeploy import fused_ops, own_formats, plugin  # noqa: E402
from paddle_ccq.targets.fastdeploy.layout import OWN_FORMATS  # noqa: E402

OPS = {"ccq-2t": "ccq_moe_ffn", "ccq-2.5": "ccq_moe_ffn_stored", "ccq-2.75": "ccq_moe_ffn_stored"}


@pytest.fixture
def install(monkeypatch):
    return installer(monkeypatch)


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, np.ndarray]]:
    """A layer's tensors by format."""
    return {format: expert_tensors(format) for format in OWN_FORMATS}


def parse_quant_config(modules: SimpleNamespace, quantization: dict) -> object:
    """FastDeploy's function of that name, for a checkpoint whose config.json has the entry."""
    found = modules.quantization.get_quantization_config(quantization["quantization"])
    return found.from_config(quantization)


def a_layer(modules, format: str, index: int = 7, graphs: bool = False, **moe) -> standin.Layer:
    entry = {"quantization": format, "moe_quant_config": moe}
    layer = standin.Layer(parse_quant_config(modules, entry), index, HIDDEN, WIDTH, EXPERTS)
    layer.fd_config.graph_opt_config.use_cudagraph = graphs
    return layer


def load(layer: standin.Layer, values: dict[str, np.ndarray]) -> standin.Layer:
    layer.create()
    state = {name: tensor(array) for name, array in values.items()}
    layer.quant_method.process_prequanted_weights(layer, state)
    return layer


def reference(values: dict[str, np.ndarray], format: str) -> list[list[np.ndarray]]:
    """float32 matrices of each projection's experts."""
    suffixes = formats.tensor_specs(format, 128, 128)
    return [
        [
            formats.decode(format, {s: values[f"{e}.{p}.{s}"] for s in suffixes}, "float32")
            for e in range(EXPERTS)
        ]
        for p in ("up_gate_proj", "down_proj")
    ]


def expected(layer: standin.Layer, values: dict[str, np.ndarray], format: str) -> np.ndarray:
    """What run() must give: the definition's weights in the layer's place."""
    matrices = reference(values, format)

    def block(rows, ends):
        out = standin.expert_block(rows.cast("float32").numpy(), ends.numpy(), *matrices)
        return paddle.to_tensor(out).cast(rows.dtype)

    kept, layer.ccq_experts = layer.ccq_experts, block
    try:
        return run(layer)
    finally:
        layer.ccq_experts = kept


def test_the_formats_are_all_that_quantize_writes_for_experts_but_wint2() -> None:
    assert set(OWN_FORMATS) == set(formats.EXPERT_FORMATS) - {"wint2"}
    assert set(OWN_FORMATS) == set(OPS)


@pytest.mark.parametrize("format", OWN_FORMATS)
def test_our_operators_run_the_experts(install, stored, format) -> None:
    layer = load(a_layer(install(), format, graphs=True), stored[format])
    found = run(layer)
    assert standin.calls == [OPS[format]]
    np.testing.assert_array_equal(found, expected(layer, stored[format], format))
    assert np.abs(found).max() > 0
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("format", OWN_FORMATS)
def test_without_the_ops_the_processor_runs_them_with_one_line(
    install, stored, format, caplog
) -> None:
    modules = install(ops=False)
    with caplog.at_level(logging.INFO, "paddle_ccq"):
        for index in (7, 8):
            layer = load(a_layer(modules, format, index), stored[format])
    (line,) = caplog.messages
    assert "run on the processor, many times slower: the compiled ops do not load" in line
    found, wanted = run(layer), expected(layer, stored[format], format)
    assert standin.calls == []
    # Activations of 16 bits, one rounding to bfloat16.
    assert np.linalg.norm(found - wanted) < 4e-3 * np.linalg.norm(wanted)


def test_the_processor_is_refused_inside_cuda_graphs(install, stored) -> None:
    layer = a_layer(install(ops=False), "ccq-2t", graphs=True)
    with pytest.raises(CcqError, match=r"MoE layer 7: ccq-2t .*custom_ops.*use_cudagraph\": false"):
        load(layer, stored["ccq-2t"])


@pytest.mark.parametrize("format", OWN_FORMATS)
def test_the_name_is_fastdeploys_error_without_the_plugin(install, format) -> None:
    modules = install("2.3.0")  # left alone
    with pytest.raises(ValueError, match=f"Invalid quantization method: {format}"):
        modules.quantization.get_quantization_config(format)
    registered = install("2.5.0").quantization.get_quantization_config
    assert registered(format) is registered("wint2")
    with pytest.raises(ValueError, match="Invalid quantization method: ccq-3"):
        registered("ccq-3")


def test_wint4_layers_and_wint2_checkpoints_are_not_ours(install) -> None:
    modules = install()
    prefix = {"moe_w4_quant_config": {"quant_end_layer": 5}}
    listed = {"wint4_layers": [3, 8], "moe_w4_quant_config": {"quant_end_layer": -1}}
    for moe, four in ((prefix, range(6)), (listed, (3, 8))):
        for index in range(10):
            method = a_layer(modules, "ccq-2t", index, **moe).quant_method
            assert isinstance(method, standin.Wint4Method) == (index in four)
            if index not in four:
                assert method.ccq_format == "ccq-2t"
    assert not hasattr(a_layer(modules, "wint2").quant_method, "ccq_format")
    config = parse_quant_config(modules, {"quantization": "ccq-2t"})
    assert config.get_quant_method(object()) == "dense"


def test_a_tensor_that_is_missing_or_another(install, stored) -> None:
    modules, good = install(), stored["ccq-2t"]
    name = "2.down_proj.weight_scale"
    without = {n: values for n, values in good.items() if n != name}
    with pytest.raises(CcqError, match=rf"{name}: missing; a ccq-2t matrix has quant_weight, "):
        load(a_layer(modules, "ccq-2t"), without)
    short = {**good, name: good[name][:, :64]}
    with pytest.raises(CcqError, match=rf"{name}: uint8 \[2, 64\], should be uint8 \[2, 128\]"):
        load(a_layer(modules, "ccq-2t"), short)
    wide = {**good, "0.up_gate_proj.super_scales": np.ones(2 * WIDTH, np.float32)}
    with pytest.raises(
        CcqError, match=r"super_scales: float32 \[512\], should be bfloat16 \[512\]"
    ):
        load(a_layer(modules, "ccq-2t"), wide)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda layer: setattr(layer, "activation", "gelu"), "activation gelu"),
        (lambda layer: setattr(layer, "with_bias", True), "bias"),
        (lambda layer: setattr(layer, "ep_size", 2), "expert parallelism"),
    ],
)
def test_layers_that_nothing_runs_are_refused_before_loading(install, change, text) -> None:
    layer = a_layer(install(), "ccq-2t")
    change(layer)
    with pytest.raises(CcqError, match=rf"MoE layer 7: .*{text}.*ccq-2t"):
        layer.create()


def test_latent_projections_are_refused_in_the_call(install, stored) -> None:
    layer = load(a_layer(install("2.6.0-dev"), "ccq-2t"), stored["ccq-2t"])
    assert run(layer, None, None, None, None).shape == (5, HIDDEN)
    with pytest.raises(CcqError, match="MoE layer 7: latent"):
        run(layer, None, None, paddle.nn.Identity(), None)


def test_the_hook_sees_the_choices(install, stored) -> None:
    seen = []
    layer = load(a_layer(install(), "ccq-2t"), stored["ccq-2t"])
    run(layer, topk_ids_hookfunc=lambda topk_ids: seen.append(topk_ids.shape))
    assert seen == [[5, 2]]


def test_missing_rank_folders(install, tmp_path) -> None:
    layer = a_layer(install(), "ccq-2t")
    layer.fd_config.parallel_config.tensor_parallel_size = 2
    layer.fd_config.model_config.model = str(tmp_path)
    with pytest.raises(CcqError, match=r"no folder rank0.*--tensor-parallel-size 2"):
        layer.create()


def test_loading_a_second_time_and_not_at_all(install, stored) -> None:
    layer = a_layer(install(), "ccq-2t")
    layer.create()
    with pytest.raises(CcqError, match=r"MoE layer 7: .*no weights.*--load-choices default"):
        run(layer)
    first = run(load(layer, stored["ccq-2t"]))
    doubled = {
        name: (values.astype(np.float32) * 2).astype(values.dtype)
        if name.endswith("super_scales")
        else values
        for name, values in stored["ccq-2t"].items()
    }
    assert not np.array_equal(run(load(layer, doubled)), first)


def test_ops_that_refuse_are_said_with_their_reason(install, stored, monkeypatch, caplog) -> None:
    def refuse(*tensors):
        raise RuntimeError("ccq_repack_trellis: weight_scale\nhas the wrong dtype")

    modules = install()
    monkeypatch.setattr(standin.Ops, "ccq_repack_trellis", refuse)
    run(load(a_layer(modules, "ccq-2t"), stored["ccq-2t"]))
    (line,) = caplog.messages
    assert line.endswith("ccq_repack_trellis: weight_scale has the wrong dtype")


def test_pairs_of_names_and_tensors(install, stored) -> None:
    layer = a_layer(install(), "ccq-2t")
    layer.create()
    values = stored["ccq-2t"]
    layer.quant_method.process_prequanted_weights(
        layer, [(n, tensor(v)) for n, v in values.items()]
    )
    np.testing.assert_array_equal(run(layer), expected(layer, values, "ccq-2t"))


def test_ops_of_another_version(install, monkeypatch) -> None:
    install()
    monkeypatch.delattr(standin.Ops, "ccq_repack_trellis")
    with pytest.raises(CcqError, match=r"compiled ops are of another version.*ccq_repack_t"):
        fused_ops.load_ops()


def test_every_suffix_has_a_key_of_fastdeploys_map() -> None:
    keys = standin.Layer.weight_key_map
    for format in OWN_FORMATS:
        for suffix in formats.tensor_specs(format, 128, 128):
            assert f"down_proj_expert_{own_formats._KEYS[suffix]}_key" in keys
    assert plugin.QUANTIZATION in plugin.NAMES
