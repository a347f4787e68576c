# SPDX-License-Identifier: Apache-2.0
"""wint8 / wint4: bytes differ from Paddle's, or do not come back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from paddle_ccq.codec import weight_only as wo

QUANTIZE = {8: wo.quantize_wint8, 4: wo.quantize_wint4}
DEQUANTIZE = {8: wo.dequantize_wint8, 4: wo.dequantize_wint4}


def weights(k: int, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((k, n)) * rng.lognormal(0, 2, (1, n))
    return w.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k,n", [(64, 64), (128, 64), (192, 128), (256, 320)])
def test_same_bytes_as_paddle_weight_quantize(bits: int, k: int, n: int) -> None:
    paddle = pytest.importorskip("paddle")
    from paddle.nn.quant import weight_quantize

    w = weights(k, n, seed=k + n + bits)
    w[:, 3] = 0
    w[5, 4] = -0.0
    x = paddle.to_tensor(w.view(np.uint16), dtype="bfloat16")
    q, s = weight_quantize(x, algo=f"weight_only_int{bits}", arch=80)
    ours_q, ours_s = QUANTIZE[bits](w)
    np.testing.assert_array_equal(ours_q, q.numpy())
    np.testing.assert_array_equal(ours_s.view(np.uint16), s.numpy())


@pytest.mark.parametrize("bits", [8, 4])
def test_interleaving_is_a_bijection(bits: int) -> None:
    rng = np.random.default_rng(0)
    top = 1 << (bits - 1)
    states = rng.integers(-top, top, (192, 48)).astype(np.int8)
    np.testing.assert_array_equal(wo.deinterleave(wo.interleave(states, bits), bits), states)


@pytest.mark.parametrize("bits,bound", [(8, 0.5 / 127), (4, 0.5 / 7)])
def test_error_stays_within_half_a_step(bits: int, bound: float) -> None:
    w = weights(128, 32, seed=1)
    back = DEQUANTIZE[bits](*QUANTIZE[bits](w))
    w = w.astype(np.float32)
    # A bfloat16 scale is off by up to 2^-9, which moves the largest weight by that much more.
    assert np.all(np.abs(back - w) <= np.abs(w).max(axis=0) * (bound + 2**-8))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("k,n", [(32, 64), (64, 24)])
def test_shapes_the_layout_cannot_hold_are_refused(bits: int, k: int, n: int) -> None:
    with pytest.raises(ValueError, match="multiple of"):
        QUANTIZE[bits](np.zeros((k, n), np.float32))
