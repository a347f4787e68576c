# SPDX-License-Identifier: Apache-2.0
"""The plugin on FastDeploy's own classes, from a checkout of its source.

PADDLE_CCQ_FASTDEPLOY_SOURCE names the checkout. Its two modules are executed as they are; what they
import is the stand-in, since the rest of FastDeploy needs a GPU.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")
SOURCE = os.environ.get("PADDLE_CCQ_FASTDEPLOY_SOURCE")
if not SOURCE:
    pytest.skip("PADDLE_CCQ_FASTDEPLOY_SOURCE is not set", allow_module_level=True)

from helpers import fastdeploy_standin as standin  # noqa: E402
from helpers.fastdeploy_case import (  # noqa: E402
    EXPERTS,
    HIDDEN,
    WIDTH,
    expert_tensors,
    run,
    tensor,
)
from paddle_ccq.fastdeploy import fused_ops, moe_method, plugin  # noqa: E402
from paddle_ccq.targets.fastdeploy.layout import OWN_FORMATS  # noqa: E402

MODELS = "fastdeploy.model_executor"


def package(monkeypatch, name: str, folder: Path | None = None, **names) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = [str(folder)] if folder else []
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def own_kernel(rows, ends, up, down, bias, up_super, down_super, up_scale, *others):
    """moe_expert_ffn_wint2: the names and order of its arguments, the stand-in's arithmetic."""
    up_code, up_zp, down_scale, down_code, down_zp, used_in_ep = others
    assert bias is None and used_in_ep is False
    decoded = []
    for stored in (
        (up, up_scale, up_super, up_code, up_zp),
        (down, down_scale, down_super, down_code, down_zp),
    ):
        weight, *rest = (standin.numpy_of(t) for t in stored)
        weight = moe_method.checkpoint_order(paddle.to_tensor(weight)).numpy()
        parts = [weight, *rest]
        decoded.append([standin.decode([p[i] for p in parts]) for i in range(len(weight))])
    standin.calls.append("own kernel")
    out = standin.expert_block(rows.cast("float32").numpy(), ends.numpy(), *decoded)
    return paddle.to_tensor(out).cast(rows.dtype)


@pytest.fixture
def fastdeploy(monkeypatch):
    root = Path(SOURCE) / "fastdeploy"
    text = (root / "model_executor/layers/moe/fused_moe_wint2_backend.py").read_text("utf-8")
    body = text.partition("class CutlassWint2FusedMoeMethod")[2].partition("def apply")[2]
    results = body.partition("= moe_expert_dispatch")[0].rpartition("(\n")[2].count(",\n")
    assert results in (7, 8)
    monkeypatch.setattr(standin, "results_of_dispatch", results)
    monkeypatch.setattr(standin, "calls", [])
    monkeypatch.setattr(moe_method, "once", moe_method._Once())
    for name in [n for n in sys.modules if n.split(".")[0] == "fastdeploy"]:
        monkeypatch.delitem(sys.modules, name)

    def set_weight_attrs(parameter, attributes):
        for name, value in attributes.items():
            setattr(parameter, name, value)

    fastdeploy = package(monkeypatch, "fastdeploy", __version__="2.5.0")
    package(monkeypatch, "fastdeploy.platforms", current_platform=None)
    package(monkeypatch, "fastdeploy.utils", ceil_div=lambda a, b: -(-a // b))
    package(monkeypatch, MODELS, root / "model_executor")
    package(monkeypatch, f"{MODELS}.utils", set_weight_attrs=set_weight_attrs)
    package(monkeypatch, f"{MODELS}.ops")
    package(
        monkeypatch,
        f"{MODELS}.ops.gpu",
        moe_expert_dispatch=standin.dispatch,
        moe_expert_reduce=standin.reduce,
        moe_expert_ffn_wint2=own_kernel,
    )
    layers = root / "model_executor/layers"
    package(monkeypatch, f"{MODELS}.layers", layers)
    package(monkeypatch, f"{MODELS}.layers.utils", get_tensor=lambda value, *rest: value)
    package(monkeypatch, f"{MODELS}.layers.moe", layers / "moe", FusedMoE=SourceLayer)
    package(
        monkeypatch,
        f"{MODELS}.layers.quantization",
        layers / "quantization",
        get_quantization_config=Named,
    )
    for name in (plugin.BACKEND, plugin.CONFIG):
        importlib.import_module(name)
    yield fastdeploy
    for name in [n for n in sys.modules if n.split(".")[0] == "fastdeploy"]:
        sys.modules.pop(name, None)


def own_call() -> Callable[..., Any]:
    """FusedMoE.forward_normal of the checkout's moe.py, compiled on its own."""
    path = Path(SOURCE) / "fastdeploy/model_executor/layers/moe/moe.py"
    tree = ast.parse(path.read_text("utf-8"), str(path))
    (layer,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "FusedMoE")
    (method,) = (n for n in layer.body if getattr(n, "name", None) == "forward_normal")
    names = {
        "paddle": paddle,
        "nn": paddle.nn,
        "Callable": Callable,
        "ForwardMeta": object,
        "current_platform": SimpleNamespace(is_cuda=lambda: True),
    }
    exec(compile(ast.Module([method], []), str(path), "exec"), names)
    return names["forward_normal"]


def through_moe(layer: SourceLayer, hook: Any = None) -> np.ndarray:
    """One call of the layer as FusedMoE itself makes it."""
    rng = np.random.default_rng(1)
    x = paddle.to_tensor(rng.standard_normal((5, HIDDEN)).astype(np.float32)).cast("bfloat16")
    router = paddle.to_tensor(rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32))
    call = own_call()
    given = {"forward_meta": None, "topk_ids_hookfunc": hook}
    taken = inspect.signature(call).parameters
    given = {name: value for name, value in given.items() if name in taken}
    return call(layer, x, lambda v: v @ router, **given).cast("float32").numpy()


class Named:
    """A quantization config of FastDeploy's by its name alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def from_config(self, config: dict) -> Named:
        return self

    def get_quant_method(self, layer: object) -> str:
        return self.name


class SourceLayer(standin.Layer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fd_config.graph_opt_config.use_cudagraph = False

    def load_experts_weight(self, state, up_key: str, down_key: str):
        experts = range(self.num_experts)
        found = [[state[key.format(e)] for e in experts] for key in (up_key, down_key)]
        return (*found, None, None)


def loaded(experts, index: int = 7, format: str = "wint2") -> SourceLayer:
    config = sys.modules[plugin.CONFIG].WINT2Config.from_config({"quantization": format})
    previous = paddle.get_default_dtype()
    paddle.set_default_dtype("bfloat16")
    try:
        layer = SourceLayer(config, index, HIDDEN, WIDTH, EXPERTS)
        if isinstance(layer.quant_method, str):
            return layer
        layer.create()
    finally:
        paddle.set_default_dtype(previous)
    state = {name: tensor(values) for name, values in experts.items()}
    layer.quant_method.process_prequanted_weights(layer, state)
    return layer


def test_same_outputs_as_fastdeploys_own_path(fastdeploy, experts, monkeypatch) -> None:
    own = run(loaded(experts))
    plugin.register()
    kept = run(loaded(experts))
    monkeypatch.setitem(sys.modules, fused_ops.MODULE, standin.Ops)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (9, 0))
    layer = loaded(experts)
    fused = run(layer)
    assert standin.calls == ["own kernel", "own kernel", "ccq_moe_ffn"]
    assert list(layer.parameters()) == []
    np.testing.assert_array_equal(kept, own)
    np.testing.assert_array_equal(fused, own)


def test_through_fastdeploys_own_call(fastdeploy, experts, monkeypatch) -> None:
    """FusedMoE hands apply() what its line has; on develop, its own WINT2 method refuses that."""
    layer = loaded(experts)
    own = run(layer)
    if "fc1_latent_proj" in inspect.signature(own_call()).parameters:
        with pytest.raises(TypeError, match="positional arguments"):
            through_moe(layer)
    else:
        np.testing.assert_array_equal(through_moe(layer), own)
    plugin.register()
    seen: list[list[int]] = []
    hook = None
    if "topk_ids_hookfunc" in inspect.signature(own_call()).parameters:
        hook = lambda topk_ids: seen.append(topk_ids.shape)  # noqa: E731
    kept = through_moe(loaded(experts), hook)
    monkeypatch.setitem(sys.modules, fused_ops.MODULE, standin.Ops)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (9, 0))
    standin.calls.clear()
    fused = through_moe(loaded(experts), hook)
    assert standin.calls == ["ccq_moe_ffn"]
    assert seen == ([[5, 2]] * 2 if hook else [])
    np.testing.assert_array_equal(kept, own)
    np.testing.assert_array_equal(fused, own)


def test_its_config_with_and_without_a_list(fastdeploy, experts) -> None:
    plugin.register()
    config = sys.modules[plugin.CONFIG].WINT2Config
    listed = config.from_config({"moe_quant_config": {"wint4_layers": [8]}})
    layer = loaded(experts)
    kinds = []
    for index in (6, 7, 8):
        layer.layer_idx = index
        kinds.append(
            (
                config.from_config({}).get_quant_method(layer) == "wint4",
                listed.get_quant_method(layer) == "wint4",
            )
        )
    assert kinds == [(True, False), (False, False), (False, True)]
    assert listed.get_quant_method(object()) == "wint8"


@pytest.mark.parametrize("format", OWN_FORMATS)
def test_a_format_of_ours_on_its_own_classes(fastdeploy, monkeypatch, format) -> None:
    quantization = sys.modules[plugin.QUANTIZATION]
    assert quantization.get_quantization_config(format).name == format  # the stand-in's
    plugin.register()
    found = quantization.get_quantization_config(format)
    assert found is sys.modules[plugin.CONFIG].WINT2Config
    assert found.from_config({"quantization": format}).name() == "wint2"
    stored = expert_tensors(format)
    host = run(loaded(stored, format=format))
    monkeypatch.setitem(sys.modules, fused_ops.MODULE, standin.Ops)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (9, 0))
    layer = loaded(stored, format=format)
    fused = through_moe(layer)
    assert len(standin.calls) == 1 and list(layer.parameters()) == []
    assert np.linalg.norm(fused - host) < 4e-3 * np.linalg.norm(fused)
