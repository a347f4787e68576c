# SPDX-License-Identifier: Apache-2.0
"""Codes of ccq-2t in PyTorch: stacked experts' matrices, and which other bytes each could have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paddle_ccq.codec import trellis

GROUP, BYTE = 64, 4
# Weights times candidates that are looked at in one go.
AT_ONCE = 1 << 27


def book(device: torch.device) -> Tensor:
    """float32 [256, 256, 4], by the byte before and the byte."""
    return torch.from_numpy(trellis.codebook()).to(device).float()


@dataclass(frozen=True)
class Codes:
    """Matrices [E, K, N]: words uint8 [E, N, K/4], local scales [E, N, K/64], supers [E, N]."""

    words: Tensor
    scales: Tensor
    supers: Tensor

    def steps(self) -> Tensor:
        """Local times super scale of every byte [E, N, K/4]."""
        return self.scales.repeat_interleave(GROUP // BYTE, -1) * self.supers[..., None]

    def decoded(self) -> Tensor:
        """float32 [E, K, N]."""
        values = book(self.words.device)[before(self.words).long(), self.words.long()]
        return (values * self.steps()[..., None]).flatten(2).transpose(1, 2).contiguous()


def before(words: Tensor) -> Tensor:
    """The byte before every byte; 0 before a column's first."""
    return torch.cat([torch.zeros_like(words[..., :1]), words[..., :-1]], -1)


@dataclass(frozen=True)
class Candidates:
    """The bytes that each position may get [E, N, K/4, k], the present one first.

    rise: by how much e H e^T grows if this byte alone is changed, over the mean error of a byte.
    """

    bytes: Tensor
    rise: Tensor


@torch.no_grad()
def candidates(codes: Codes, weight: Tensor, hessian: Tensor, count: int) -> Candidates:
    """The `count` bytes of every position that cost least, everything else left as it is.

    weight [E, K, N], hessian [E, K, K]. A changed byte changes its own four weights and the next
    byte's four, so its cost is a form of eight errors.
    """
    values = book(weight.device)
    decoded = codes.decoded()
    found = []
    for expert in range(len(weight)):
        h = hessian[expert]
        error = (weight[expert] - decoded[expert]).t().contiguous()  # [N, K]
        gradient = error @ h
        positions = codes.words.shape[-1]
        mean = (error * gradient).sum() / error.numel() * BYTE
        # Blocks of H of the eight rows from each byte on; beyond the last there is nothing.
        wide = torch.nn.functional.pad(h, (0, BYTE, 0, BYTE))
        own = torch.stack(
            [wide[BYTE * b : BYTE * b + 8, BYTE * b : BYTE * b + 8] for b in range(positions)]
        )
        pulls = torch.nn.functional.pad(gradient, (0, BYTE)).unfold(1, 8, BYTE)  # [N, K/4, 8]
        step = codes.steps()[expert]
        after = torch.cat([step[:, 1:], torch.zeros_like(step[:, :1])], 1)
        words = codes.words[expert].long()
        previous = before(words)
        following = torch.cat([words[:, 1:], torch.zeros_like(words[:, :1])], 1)
        rows = max(1, AT_ONCE // (positions * 256 * 8))
        parts = []
        for n in range(0, len(words), rows):
            at = slice(n, n + rows)
            mine = values[previous[at]]  # [n, K/4, 256, 4], by the new byte
            mine = mine - values[previous[at], words[at]][:, :, None]
            other = values.transpose(0, 1)[following[at]]
            other = other - values[words[at], following[at]][:, :, None]
            change = torch.cat(
                [mine * step[at, :, None, None], other * after[at, :, None, None]], -1
            )
            cost = ((change @ own) * change).sum(-1) - 2 * (change @ pulls[at, :, :, None])[..., 0]
            cost.scatter_(-1, words[at, :, None], -torch.inf)  # the present one comes first
            least = cost.topk(count, -1, largest=False)
            rise = least.values.clone()
            rise[..., 0] = 0
            parts.append((least.indices.to(torch.uint8), rise / mean))
        found.append([torch.cat(p) for p in zip(*parts, strict=True)])
    chosen, rises = (torch.stack(p) for p in zip(*found, strict=True))
    return Candidates(chosen, rises)


class Soft:
    """Weights as the expectation over independent candidates of every position.

    The byte at a position and the one before it make its vector, so the expectation runs over
    pairs of candidates.
    """

    def __init__(self, codes: Codes, chosen: Candidates) -> None:
        self.codes, self.chosen = codes, chosen
        words = chosen.bytes.long()
        count = words.shape[-1]
        ahead = torch.cat([torch.zeros_like(words[..., :1, :]), words[..., :-1, :]], -2)
        pairs = ahead[..., :, None] << 8 | words[..., None, :]  # [E, N, K/4, k, k]
        # Whole numbers up to 255 are exact as float16.
        flat = book(words.device).view(-1, BYTE).half()
        self._vectors = flat[pairs.flatten(-2)]  # [E, N, K/4, k k, 4]
        self._first = torch.zeros(count, device=words.device)
        self._first[0] = 1

    def __call__(self, logits: Tensor, steps: Tensor) -> Tensor:
        """Expected weights [E, K, N] of logits [E, N, K/4, k]; steps as Codes.steps."""
        p = logits.softmax(-1)
        first = self._first.expand(*p.shape[:2], 1, -1)
        ahead = torch.cat([first, p[..., :-1, :]], -2)
        pairs = (ahead[..., :, None] * p[..., None, :]).flatten(-2)
        values = (pairs[..., None] * self._vectors).sum(-2)
        return (values * steps[..., None]).flatten(2).transpose(1, 2)

    def hard(self, logits: Tensor) -> Codes:
        """The most likely byte of every position."""
        best = logits.argmax(-1, keepdim=True)
        words = self.chosen.bytes.gather(-1, best)[..., 0]
        return Codes(words, self.codes.scales, self.codes.supers)
