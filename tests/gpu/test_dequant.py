# SPDX-License-Identifier: Apache-2.0
"""The GPU's decoder: bits that differ from the codec's. Needs a GPU and the library for it."""

from __future__ import annotations

import numpy as np
import pytest

from paddle_ccq.codec import formats
from paddle_ccq.ops import gpu, gpu_library

if not gpu_library.available():
    pytest.skip("no GPU, or no library for it", allow_module_level=True)


def stored(kind: str, k: int, n: int, seed: int) -> tuple[str, formats.Tensors]:
    rng = np.random.default_rng(seed)
    format = kind.removesuffix("-general")
    tensors = {}
    for suffix, (shape, name) in formats.tensor_specs(format, k, n).items():
        dtype = formats.SAFETENSORS_DTYPES[name]
        if suffix == "super_scales":
            values = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 2, shape)
            tensors[suffix] = values.astype(dtype)
        elif suffix == "code_scale":
            general = rng.uniform(-128, 128, shape)
            tensors[suffix] = (np.full(shape, 121.0) if kind == format else general).astype(dtype)
        elif suffix == "code_zp":
            integer, general = rng.integers(0, 1913, shape), rng.uniform(-900, 9000, shape)
            tensors[suffix] = (integer if kind == format else general).astype(dtype)
        else:
            raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
            tensors[suffix] = raw.view(dtype).reshape(shape)
    return format, tensors


@pytest.mark.parametrize("kind", ["wint2", "wint2-general", "ccq-2.5", "ccq-2.75"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gpu_equals_codec_bit_for_bit(kind: str, dtype: str) -> None:
    for k, n in ((128, 16), (1024, 1000), (512, 3584)):
        format, tensors = stored(kind, k, n, seed=n)
        found = gpu.dequant(format, tensors, dtype)
        assert str(found.dtype) == dtype
        expected = formats.decode(format, tensors, dtype)
        np.testing.assert_array_equal(
            found.astype(np.float32).view(np.uint32), expected.view(np.uint32)
        )


def test_every_byte_of_many_pairs() -> None:
    rng = np.random.default_rng(1)
    n = 4096
    tensors = {
        "quant_weight": np.repeat(np.arange(256, dtype=np.uint8)[:, None], n, axis=1),
        "weight_scale": np.full((8, n), 0x11, np.uint8),
        "super_scales": np.ones(n, formats.SAFETENSORS_DTYPES["BF16"]),
        "code_scale": rng.uniform(-128, 128, n).astype(np.float32),
        "code_zp": rng.uniform(0, 16000, n).astype(np.float32),
    }
    expected = formats.decode("wint2", tensors, "float32")
    np.testing.assert_array_equal(gpu.dequant("wint2", tensors, "float32"), expected)
