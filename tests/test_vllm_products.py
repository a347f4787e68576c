# SPDX-License-Identifier: Apache-2.0
"""How vLLM's operators drive the GPU library, with a library of NumPy in its place."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from paddle_ccq.vllm import torch_ops  # noqa: E402


class Library:
    """ccq_dequant_w4 of custom_ops/gpu/moe/linear_w4.h."""

    def __init__(self) -> None:
        self.decoded = 0

    def ccq_dequant_w4(
        self, weight: int, scale: int, stride: int, k: int, n: int, out: int, stream: int
    ) -> int:
        def memory(address: int, kind: type, shape: tuple[int, ...]) -> np.ndarray:
            size = int(np.prod(shape))
            return np.ctypeslib.as_array((kind * size).from_address(address)).reshape(shape)

        packed = memory(weight, ctypes.c_uint8, (n, k // 2))
        scales = memory(scale, ctypes.c_uint16, (n, stride)).copy()
        states = (
            torch.from_numpy(np.stack([packed & 15, packed >> 4], -1).reshape(n, k)).float() - 8
        )
        first = torch.from_numpy(scales[:, :1].view(np.int16)).view(torch.bfloat16).float()
        values = (states * first).to(torch.bfloat16).view(torch.int16).numpy()
        memory(out, ctypes.c_int16, (n, k))[:] = values
        self.decoded += 1
        return 0


def test_rows_of_a_long_prompt_meet_their_own_decoded_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Library()
    monkeypatch.setattr(torch_ops, "library", lambda: library)
    monkeypatch.setattr(torch_ops, "_stream", lambda: 0)
    experts, k, n = 4, 64, 48
    weight = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8)
    scale = (torch.rand((experts, n, 1)) + 0.5).to(torch.bfloat16).repeat(1, 1, 2)
    ends = [3, 3, 10, 11]  # the second expert has no rows, the last two rows no expert
    x = torch.randn((13, k)).to(torch.bfloat16)
    found = torch_ops._w4_decoded(x, ends, [weight, scale])
    assert library.decoded == 3
    states = torch.stack([weight & 15, weight >> 4], -1).reshape(experts, n, k).double() - 8
    begin = 0
    for expert, end in enumerate(ends):
        wanted = x[begin:end].double() @ (states[expert] * scale[expert, :, :1].double()).t()
        assert (found[begin:end].double() - wanted).norm() <= 0.01 * wanted.norm()
        begin = end


@pytest.mark.parametrize(
    "tokens,capturing,served",
    [
        (1, True, True),
        (torch_ops.W4_TOKENS, True, True),
        (torch_ops.W4_TOKENS + 1, False, False),
        (torch_ops.W4_DECODED_TOKENS, False, True),
        (torch_ops.W4_DECODED_TOKENS, True, False),
    ],
)
def test_what_asks_the_card_for_counts_is_in_no_graph(
    tokens: int, capturing: bool, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert torch_ops.serves_w4(tokens) is served
