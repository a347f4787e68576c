# SPDX-License-Identifier: Apache-2.0
"""The FastDeploy plugin's tests: the plugin installed, an expert block's weights, one call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from helpers import fastdeploy_standin as standin
from paddle_ccq.codec import formats
from paddle_ccq.codec.row_order import FASTDEPLOY_2_1
from paddle_ccq.encoder.factory import make_encoder
from paddle_ccq.fastdeploy import fused_ops, moe_method, plugin

HIDDEN, WIDTH, EXPERTS = 128, 256, 4


def installer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Puts the stand-in, of a version, into sys.modules and registers the plugin."""
    monkeypatch.setattr(moe_method, "once", moe_method._Once())
    monkeypatch.setattr(standin, "calls", [])

    def put(version: str = "2.5.0", ops: bool = True) -> SimpleNamespace:
        for name in [n for n in sys.modules if n.split(".")[0] == "fastdeploy"]:
            monkeypatch.delitem(sys.modules, name)
        made = standin.modules(version)
        for name, module in made.items():
            monkeypatch.setitem(sys.modules, name, module)
        if ops:
            monkeypatch.setitem(sys.modules, fused_ops.MODULE, standin.Ops)
            monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
            monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (9, 0))
        plugin.register()
        return SimpleNamespace(
            backend=made[plugin.BACKEND],
            config=made[plugin.CONFIG],
            quantization=made[plugin.QUANTIZATION],
        )

    return put


def expert_tensors(format: str = "wint2") -> dict[str, np.ndarray]:
    """Tensors of a layer's experts, by "expert.projection.suffix"."""
    rng = np.random.default_rng(0)
    encoder = make_encoder(format, preset="fast")
    found = {}
    for expert in range(EXPERTS):
        for projection, k, n in (("up_gate_proj", HIDDEN, 2 * WIDTH), ("down_proj", WIDTH, HIDDEN)):
            matrix = rng.standard_normal((k, n)).astype(np.float32) / np.sqrt(k)
            matrix = formats.order_rows(matrix, format, FASTDEPLOY_2_1)
            encoded = encoder.encode(np.ascontiguousarray(matrix.T))
            for suffix, values in encoded.tensors.items():
                found[f"{expert}.{projection}.{suffix}"] = values
    return found


def tensor(values: np.ndarray):
    if values.dtype == standin.BFLOAT16:
        return paddle.to_tensor(values.astype(np.float32)).cast("bfloat16")
    return paddle.to_tensor(values)


def run(layer: standin.Layer, *args, tokens: int = 5, **more) -> np.ndarray:
    rng = np.random.default_rng(1)
    x = paddle.to_tensor(rng.standard_normal((tokens, HIDDEN)).astype(np.float32))
    router = paddle.to_tensor(rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32))
    out = layer.quant_method.apply(layer, x.cast("bfloat16"), lambda v: v @ router, *args, **more)
    assert out.dtype == paddle.bfloat16
    return out.cast("float32").numpy()
