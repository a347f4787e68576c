# SPDX-License-Identifier: Apache-2.0
"""The relaxation of codes that benchmarks/gpu/trellis.py measures: costs and decoding are exact."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"))

import torch
from trellis_codes import Candidates, Codes, Soft, candidates

from paddle_ccq.codec import trellis


def problem() -> tuple[Codes, torch.Tensor, torch.Tensor]:
    """Random codes of two matrices [128, 3], weights near them, and Hessians."""
    rng = np.random.default_rng(0)
    words = torch.from_numpy(rng.integers(0, 256, (2, 3, 32), dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(1, 16, (2, 3, 2)).astype(np.float32))
    codes = Codes(words, scales, torch.full((2, 3), 1e-3))
    weight = codes.decoded() + torch.from_numpy(rng.normal(0, 0.3, (2, 128, 3))).float()
    x = torch.from_numpy(rng.normal(size=(2, 500, 128))).float()
    return codes, weight, x.transpose(1, 2) @ x / 500


def changed(codes: Codes, found: Candidates, at: tuple[int, int, int, int]) -> Codes:
    expert, n, segment, choice = at
    words, moved = codes.words.clone(), found.words.shape[-1]
    first = found.phase + segment * (moved + 1)
    words[expert, n, first : first + moved] = found.words[expert, n, segment, choice]
    return Codes(words, codes.scales, codes.supers)


def test_decoding_is_the_codecs() -> None:
    codes, _, _ = problem()
    values = trellis.decode_values(codes.words[1].numpy().T).astype(np.float32)
    scale = codes.scales[1].repeat_interleave(64, -1).numpy().T * np.float32(1e-3)
    np.testing.assert_allclose(codes.decoded()[1].numpy(), values * scale, rtol=1e-6)


@pytest.mark.parametrize(("moved", "phase"), [(1, 0), (1, 1), (2, 0), (2, 2)])
def test_a_candidates_rise_is_what_its_bytes_cost(moved: int, phase: int) -> None:
    codes, weight, hessian = problem()
    found = candidates(codes, weight, hessian, 4, moved, phase)

    def loss(of: Codes, expert: int) -> float:
        e = (weight - of.decoded())[expert].double()
        return float(((hessian[expert].double() @ e) * e).sum())

    segments = found.words.shape[2]
    for at in ((0, 0, 0, 1), (1, 2, segments - 1, 3), (1, 1, 15 // (moved + 1), 2)):
        before = loss(codes, at[0])
        rise = (loss(changed(codes, found, at), at[0]) - before) / (before / (3 * 32))
        assert float(found.rise[at]) == pytest.approx(rise, rel=1e-3, abs=1e-3)
    assert bool((found.rise[..., 1:].diff(dim=-1) >= 0).all())


@pytest.mark.parametrize(("moved", "phase"), [(1, 1), (2, 2)])
def test_certain_logits_decode_as_the_bytes_do(moved: int, phase: int) -> None:
    codes, weight, hessian = problem()
    soft = Soft(codes, candidates(codes, weight, hessian, 3, moved, phase))
    for choice in range(3):
        logits = torch.full(soft.chosen.rise.shape, -1e4)
        logits[..., choice] = 0
        hard = soft.hard(logits)
        torch.testing.assert_close(soft(logits, codes.steps()), hard.decoded())
        assert torch.equal(hard.words, codes.words) == (choice == 0)
