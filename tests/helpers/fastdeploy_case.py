# SPDX-License-Identifier: Apache-2.0
"""An expert block of the FastDeploy plugin's tests: its weights, its tensors, one call of it."""

from __future__ import annotations

import numpy as np
import paddle

from helpers import fastdeploy_standin as standin
from paddle_ccq.codec.row_order import permute_rows
from paddle_ccq.encoder.factory import make_encoder

HIDDEN, WIDTH, EXPERTS = 128, 256, 4


def expert_tensors() -> dict[str, np.ndarray]:
    """Tensors of a layer's experts, by "expert.projection.suffix"."""
    rng = np.random.default_rng(0)
    encoder = make_encoder("wint2", preset="fast")
    found = {}
    for expert in range(EXPERTS):
        for projection, k, n in (("up_gate_proj", HIDDEN, 2 * WIDTH), ("down_proj", WIDTH, HIDDEN)):
            matrix = permute_rows(rng.standard_normal((k, n)).astype(np.float32) / np.sqrt(k))
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
