# SPDX-License-Identifier: Apache-2.0
"""Codes of ccq-2t in PyTorch: stacked experts' matrices, and which other bytes each could have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paddle_ccq.codec import trellis

GROUP, BYTE = 64, 4
# Weights times candidates that are looked at in one go.
AT_ONCE = 1 << 26
# First bytes of a pair that are tried with all second ones.
FIRST = 64


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
    """What the bytes of segments may be, the present ones first.

    A segment is `moved` bytes and one that stays, whose four weights change with the byte before
    it. Segments follow each other from byte `phase` on; bytes beyond the last one stay.

    Attributes:
        words: uint8 [E, N, segments, candidates, moved].
        values: the code's values of a segment's bytes, float16 [..., candidates, 4 (moved + 1)].
        rise: by how much e H e^T grows if this segment alone is changed, over a byte's mean error.
    """

    words: Tensor
    values: Tensor
    rise: Tensor
    phase: int


@torch.no_grad()
def candidates(
    codes: Codes, weight: Tensor, hessian: Tensor, count: int, moved: int = 2, phase: int = 0
) -> Candidates:
    """The `count` cheapest bytes of every segment, everything else left as it is.

    weight [E, K, N], hessian [E, K, K]; moved 1 or 2. Of two bytes, the first is one of the FIRST
    that cost least if the weights after its own four could be anything.
    """
    decoded = codes.decoded()
    found = [
        _of_expert(codes, e, weight[e] - decoded[e], hessian[e], count, moved, phase)
        for e in range(len(weight))
    ]
    words, values, rise = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Candidates(words, values.half(), rise, phase)


def _of_expert(
    codes: Codes, expert: int, error: Tensor, h: Tensor, count: int, moved: int, phase: int
) -> tuple[Tensor, ...]:
    table = book(h.device)
    words, steps = codes.words[expert].long(), codes.steps()[expert]
    length = moved + 1
    segments = (words.shape[1] - phase) // length
    starts = [phase + length * i for i in range(segments)]
    width = BYTE * length
    rows = torch.tensor(starts, device=h.device)[:, None] * BYTE
    rows = rows + torch.arange(width, device=h.device)
    own = h[rows[:, :, None], rows[:, None, :]]  # [segments, width, width]
    error = error.t().contiguous()  # [N, K]
    gradient = error @ h
    mean = (error * gradient).sum() / error.numel() * BYTE
    ahead = before(words)
    channels = torch.arange(len(words), device=h.device).repeat_interleave(segments)
    places = torch.arange(segments, device=h.device).repeat(len(words))
    parts = []
    for at in torch.arange(len(channels), device=h.device).split(
        max(1, AT_ONCE // (width * (256 if moved == 1 else 256 * FIRST)))
    ):
        n, s = channels[at], places[at]
        byte = rows[s, 0] // BYTE
        present = [words[n, byte + i] for i in range(length)]
        scale = torch.stack([steps[n, byte + i] for i in range(length)], -1)
        scale = scale.repeat_interleave(BYTE, -1)  # [segments, width]
        pull = gradient[n[:, None], rows[s]]
        previous = ahead[n, byte]
        now = torch.cat(
            [table[p, q] for p, q in zip([previous, *present], present, strict=False)], -1
        )
        if moved == 1:
            bytes_ = torch.arange(256, device=h.device).expand(len(at), -1)[..., None]
            values = torch.cat([table[previous], table.transpose(0, 1)[present[1]]], -1)
        else:
            first = _first(table[previous], now, scale, pull, own[s])  # [segments, FIRST]
            both = torch.cartesian_prod(
                torch.arange(FIRST, device=h.device), torch.arange(256, device=h.device)
            )
            bytes_ = torch.stack([first[:, both[:, 0]], both[:, 1].expand(len(at), -1)], -1)
            values = torch.cat(
                [
                    table[previous[:, None], bytes_[..., 0]],
                    table[bytes_[..., 0], bytes_[..., 1]],
                    table[bytes_[..., 1], present[2][:, None]],
                ],
                -1,
            )
        change = (values - now[:, None]) * scale[:, None]
        cost = ((change @ own[s]) * change).sum(-1) - 2 * (change @ pull[..., None])[..., 0]
        stays = torch.stack([(bytes_[..., i] == present[i][:, None]) for i in range(moved)]).all(0)
        least = cost.masked_fill(stays, torch.inf).topk(count - 1, -1, largest=False)
        chosen = least.indices[..., None]
        chosen_bytes = bytes_.gather(1, chosen.expand(-1, -1, moved))
        chosen_values = values.gather(1, chosen.expand(-1, -1, width))
        parts.append(
            (
                torch.cat([torch.stack(present[:moved], -1)[:, None], chosen_bytes], 1),
                torch.cat([now[:, None], chosen_values], 1),
                torch.cat([cost.new_zeros(len(at), 1), least.values], 1) / mean,
            )
        )
    words_, values_, rise = (torch.cat(p) for p in zip(*parts, strict=True))
    shape = (len(words), segments)
    return (
        words_.to(torch.uint8).unflatten(0, shape),
        values_.half().unflatten(0, shape),
        rise.unflatten(0, shape),
    )


def _first(own: Tensor, now: Tensor, scale: Tensor, pull: Tensor, h: Tensor) -> Tensor:
    """The FIRST cheapest first bytes of segments, when later weights do their best."""
    inverse = torch.linalg.inv(h)
    best = (inverse @ pull[..., None])[..., 0]  # the change that would cost least
    schur = torch.linalg.inv(inverse[:, :BYTE, :BYTE])
    change = (own - now[:, None, :BYTE]) * scale[:, None, :BYTE] - best[:, None, :BYTE]
    cost = ((change @ schur) * change).sum(-1)
    return cost.topk(FIRST, -1, largest=False).indices


class Soft:
    """Weights as the expectation over independent candidates of every segment."""

    def __init__(self, codes: Codes, chosen: Candidates) -> None:
        self.codes, self.chosen = codes, chosen
        words = codes.words
        self._values = book(words.device)[before(words).long(), words.long()]  # [E, N, K/4, 4]
        length = chosen.words.shape[-1] + 1
        self._region = slice(chosen.phase, chosen.phase + length * chosen.words.shape[2])

    def __call__(self, logits: Tensor, steps: Tensor) -> Tensor:
        """Expected weights [E, K, N] of logits [E, N, segments, candidates]; Codes.steps."""
        p = logits.softmax(-1)
        expected = (p[..., None] * self.chosen.values).sum(-2)  # [E, N, segments, 4 (moved + 1)]
        parts = (
            self._values[:, :, : self._region.start],
            expected.flatten(2).unflatten(2, (-1, BYTE)),
            self._values[:, :, self._region.stop :],
        )
        return (torch.cat(parts, 2) * steps[..., None]).flatten(2).transpose(1, 2)

    def hard(self, logits: Tensor) -> Codes:
        """The most likely bytes of every segment."""
        best = logits.argmax(-1)[..., None, None]
        found = self.chosen.words
        moved = found.shape[-1]
        best = best.expand(*best.shape[:-1], moved)
        words = self.codes.words.clone()
        region = words[:, :, self._region].unflatten(2, (-1, moved + 1)).clone()
        region[..., :moved] = found.gather(3, best)[..., 0, :]
        words[:, :, self._region] = region.flatten(2)
        return Codes(words, self.codes.scales, self.codes.supers)
