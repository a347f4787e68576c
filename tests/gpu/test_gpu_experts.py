# SPDX-License-Identifier: Apache-2.0
"""The embedded server's experts on a GPU beside the CPU's. Needs a GPU and the library for it.

python -m paddle_ccq.ops.gpu_library --architectures 90
python -m pytest -s tests/gpu/test_gpu_experts.py
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from paddle_ccq import ops
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.codec import formats
from paddle_ccq.codec.formats import Tensors
from paddle_ccq.ops import gpu_library

if not gpu_library.available():
    pytest.skip("no GPU, or no library for it", allow_module_level=True)

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.ops.gpu_memory import Device
from paddle_ccq.ops.gpu_moe import GpuExperts
from paddle_ccq.quantize import quantize
from paddle_ccq.serving.engine_model import EngineModel, Piece

# Middle and outputs are bfloat16 on the GPU, and so are the activations that it gets.
BOUND = 8e-3


@pytest.fixture(scope="module")
def device() -> Device:
    return Device()


def stored(format: str, k: int, n: int, rng: np.random.Generator, integer: bool = True) -> Tensors:
    specs = formats.tensor_specs(format, k, n)
    tensors = {}
    for suffix, (shape, name) in specs.items():
        dtype = formats.SAFETENSORS_DTYPES[name]
        if dtype == np.uint8:
            tensors[suffix] = rng.integers(0, 256, shape, np.uint8)
        elif suffix == "super_scales":
            tensors[suffix] = (rng.uniform(0.5, 2, shape) / 400).astype(dtype)
        elif suffix == "code_scale":
            tensors[suffix] = np.full(shape, 121, dtype) if integer else rng.uniform(90, 125, shape)
        else:
            tensors[suffix] = rng.integers(0, 1800, shape)
        tensors[suffix] = tensors[suffix].astype(dtype)
    return tensors


@pytest.mark.parametrize(
    "format,integer,order",
    [*(("wint2", i, o) for i in (True, False) for o in ("plain", "fastdeploy-2.1")),
     ("ccq-2t", True, "plain")],
)  # fmt: skip
@pytest.mark.parametrize("hidden,width,experts,top_k", [(256, 128, 5, 2), (2560, 1536, 8, 6)])
def test_experts(
    device: Device, hidden: int, width: int, experts: int, top_k: int,
    format: str, integer: bool, order: str,
) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    up = [stored(format, hidden, 2 * width, rng, integer) for _ in range(experts)]
    down = [stored(format, width, hidden, rng, integer) for _ in range(experts)]
    there = GpuExperts(up, down, order, device, format)
    here = ops.repack_experts(format, up, down, order)
    for tokens in (1, 2, 17, 130, 3):  # growing and shrinking scratch
        x = rng.standard_normal((tokens, hidden)).astype(np.float32)
        ids = np.ascontiguousarray(np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k])
        weights = rng.random((tokens, top_k)).astype(np.float32)
        found, wanted = there(x, ids, weights), ops.moe(x, here, ids, weights)
        assert found.dtype == np.float32 and found.shape == wanted.shape
        assert np.linalg.norm(found - wanted) < BOUND * np.linalg.norm(wanted)
        assert np.array_equal(found, there(x, ids, weights))


def test_a_model_and_its_time(device: Device, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=512, moe_intermediate_size=256, moe_num_experts=8)
    write_checkpoint(tmp_path / "float", config)
    quantize(tmp_path / "float", tmp_path / "packed", preset="fast", quiet=True)
    checkpoint = open_checkpoint(tmp_path / "packed")
    tokens = np.random.default_rng(0).integers(3, 259, 60).tolist()

    def logits(model: EngineModel) -> np.ndarray:
        cache = model.new_cache(64)
        region = cache.allocate(64)
        model.forward([Piece(tokens[:59], 0, region)], cache)
        begun = time.perf_counter()
        found = model.forward([Piece(tokens[59:], 59, region)], cache)
        print(f"one token: {1e3 * (time.perf_counter() - begun):.2f} ms")
        return found[0]

    here, there = EngineModel(checkpoint), EngineModel(checkpoint, device=device)
    assert there.gpu_bytes > 0 and there.expert_bytes == 0
    wanted = logits(here)
    assert np.linalg.norm(logits(there) - wanted) < 0.02 * np.linalg.norm(wanted)


def test_memory_is_given_back(device: Device) -> None:
    rng = np.random.default_rng(0)
    up, down = [stored("wint2", 4096, 8192, rng)], [stored("wint2", 4096, 4096, rng)]
    for _ in range(200):  # 200 times 16 MB and the staging beside it: more than a small card has
        made = GpuExperts(up, down, "plain", device)
    assert made.nbytes > 12 << 20
