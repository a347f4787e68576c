# SPDX-License-Identifier: Apache-2.0
"""The GPU's operators over Paddle tensors without a GPU: errors that do not say what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.synthetic import zero_tensors as stored
from paddle_ccq.errors import CcqError
from paddle_ccq.ops import paddle_gpu


@pytest.fixture
def fresh():
    paddle_gpu._ops.cache_clear()
    yield
    paddle_gpu._ops.cache_clear()


@pytest.mark.parametrize("library", [None, "no-library.so"])
def test_missing_ops_say_how_to_build_them(
    fresh: None, library: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("paddle")
    if library:
        monkeypatch.setenv(paddle_gpu.ENVIRONMENT, library)
    else:
        monkeypatch.delenv(paddle_gpu.ENVIRONMENT, raising=False)
        monkeypatch.setattr(paddle_gpu, "MODULE", "paddle_ccq_ops_not_there")
    with pytest.raises(CcqError, match=r"compiled ops do not load .*pip install .*custom_ops"):
        paddle_gpu.call("ccq_linear")


def test_tensors_that_do_not_fit_are_named_before_anything_is_sent() -> None:
    good = stored("ccq-2.75", 128, 32)
    with pytest.raises(ValueError, match="row_order must be"):
        paddle_gpu.repack("ccq-2.75", good, "backwards")
    with pytest.raises(ValueError, match="row_order: rows of ccq-2t are in plain order"):
        paddle_gpu.repack("ccq-2t", good, "fastdeploy-2.1")
    with pytest.raises(ValueError, match="super_scales is missing"):
        paddle_gpu.repack("ccq-2.75", {"quant_weight": good["quant_weight"]})
    with pytest.raises(ValueError, match=r"tensors\[1\] is \[128, 48\], tensors\[0\] is"):
        paddle_gpu.repack("ccq-2.75", [good, stored("ccq-2.75", 128, 48)])
    with pytest.raises(ValueError, match="N must be a multiple of 16, got 24"):
        paddle_gpu.repack("ccq-2.5", stored("ccq-2.5", 64, 24))
    with pytest.raises(ValueError, match="up_gate has 1 experts, down 2"):
        paddle_gpu.repack_experts("ccq-2.75", [good], [good, good])


def test_uploads_go_to_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    paddle = pytest.importorskip("paddle")
    places: list[int] = []
    monkeypatch.setattr(paddle, "CUDAPlace", places.append)
    monkeypatch.setattr(paddle, "to_tensor", lambda array, **_: array)
    for device in ("gpu:1", "gpu:0", "cpu"):
        monkeypatch.setattr(paddle.device, "get_device", lambda device=device: device)
        paddle_gpu._upload(np.zeros(2, np.float32))
    assert places == [1, 0, 0]


def test_ccq_2t_is_not_decoded_there() -> None:
    with pytest.raises(ValueError, match=r"format: ccq-2t .* ops\.dequant"):
        paddle_gpu.dequant("ccq-2t", stored("ccq-2t", 128, 32))


def test_activations_that_do_not_fit_are_named() -> None:
    paddle = pytest.importorskip("paddle")
    weight = paddle_gpu.GpuMatrices("ccq-2.75", "plain", 1, 128, 32, ())
    with pytest.raises(ValueError, match="x must be a Paddle tensor, got ndarray"):
        paddle_gpu.linear(np.zeros((2, 128), np.float16), weight)
    x = paddle.zeros([2, 128], "float16")
    if not x.place.is_gpu_place():
        with pytest.raises(ValueError, match="x must be on a GPU"):
            paddle_gpu.linear(x, weight)
    with pytest.raises(ValueError, match="experts must be GpuExperts, got GpuMatrices"):
        paddle_gpu.moe(x, weight, x, x)
    many = paddle_gpu.GpuMatrices("ccq-2.75", "plain", 3, 128, 32, ())
    with pytest.raises(ValueError, match="weight must be one matrix, it holds 3"):
        paddle_gpu.linear(x, many)
