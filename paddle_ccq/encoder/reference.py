# SPDX-License-Identifier: Apache-2.0
"""The data-free search in NumPy: what the compiled core must return, bit for bit.

Slow, and written to be read. Notation: w is one output channel, in groups of 64; s = local * super
is a group's scale; C the code book. For one scale, the squared error of a vector v is

    |v - s c|^2 = |v|^2 - 2 s^2 (x.c - |c|^2 / 2),      x = v / s,

so the best entry maximises the score x.c - |c|^2/2, and among scales the best one maximises the
gain s^2 * (sum of scores). x is rounded to fixed point, and scores are integers: no order of
summation and no instruction set can change a choice.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..codec.convolution import GROUP
from .layouts import SearchLayout
from .recipes import Recipe

# Below this a super scale's reciprocal would leave float32; such a channel is stored as zeros.
SMALLEST_SUPER = np.float32(7.9e-31)


def fixed_point(w: np.ndarray, scale: np.float32, fraction: int) -> np.ndarray:
    """w / scale with `fraction` bits after the point, saturated to 16 bits: int64."""
    x = w.astype(np.float32) * (np.float32(1 << fraction) / scale)
    return np.rint(np.clip(x, np.float32(-32767), np.float32(32767))).astype(np.int64)


def search_group(
    w: np.ndarray, scale: np.float32, layout: SearchLayout, books: list[np.ndarray]
) -> tuple[int, np.ndarray, np.ndarray]:
    """Best words of one group at one scale: (score, words, signed states).

    The score is in units of 2^-fraction. Among equal scores the entry with the larger index wins.
    """
    x = fixed_point(w, scale, layout.fraction)
    words = np.zeros(layout.words, np.uint16)
    states = np.zeros(GROUP, np.int64)
    total = 0
    for s in layout.sets:
        book = books[s.book].astype(np.int64)
        half_norm = (book**2).sum(axis=1) << (layout.fraction - 1)
        for lane in range(s.lanes):
            rows = slice(s.first + lane * s.stride, s.first + lane * s.stride + s.dims)
            scores = book @ x[rows] - half_norm
            best = len(scores) - 1 - int(np.argmax(scores[::-1]))
            total += int(scores[best])
            words[s.word + lane] |= best << s.shift
            states[rows] = book[best]
    if layout.remainder_shift:
        # The row left over stands alone; its nearest state is plain rounding.
        q = (int(x[-1]) + (1 << (layout.fraction - 1))) >> layout.fraction
        q = min(max(q, layout.state_min), layout.state_max)
        total += int(x[-1]) * q - ((q * q) << layout.fraction) // 2
        words[-1] = (q - layout.state_min) << layout.remainder_shift
        states[-1] = q
    return total, words, states


class _Channel:
    """The search over one channel [K]; sums run row by row in float64, as the core's do."""

    def __init__(
        self, w: np.ndarray, layout: SearchLayout, recipe: Recipe, pairs: list[list[np.ndarray]]
    ) -> None:
        self.layout, self.recipe, self.pairs = layout, recipe, pairs
        self.groups = w.reshape(-1, GROUP)
        energy = [np.add.accumulate(g.astype(np.float64) ** 2)[-1] for g in self.groups]
        self.rms = np.sqrt(np.array(energy) / GROUP)
        self.mean_rms = np.sqrt(np.add.accumulate(np.array(energy))[-1] / w.size)
        self.live = [g for g in range(len(self.groups)) if self.rms[g] > 0]

    def supers(self) -> list[np.float32]:
        """The super scales to try."""
        reference = self.rms.max() if self.recipe.ratios else self.mean_rms
        found: list[np.float32] = []
        for kappa in self.recipe.kappas:
            s = np.float32(ml_dtypes.bfloat16(np.float32(self.recipe.nominal * reference / kappa)))
            if s >= SMALLEST_SUPER and s not in found:
                found.append(s)
        return found

    def clamp(self, scale: float) -> int:
        return int(min(max(np.rint(scale), 1), self.layout.scale_max))

    def nominal(self, g: int, super_: np.float32, ratio: float = 1.0) -> int:
        """The local scale that suits a group's size."""
        return self.clamp(self.recipe.nominal * self.rms[g] * ratio / float(super_))

    def attempt(
        self, g: int, local: int, super_: np.float32, pair: int
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """Gain, states and words of a group at one scale."""
        scale = np.float32(local) * super_
        found = search_group(self.groups[g], scale, self.layout, self.pairs[pair])
        score, words, states = found
        return float(scale) * float(scale) * float(score), states, words

    def kept_pairs(self, super_: np.float32) -> list[int]:
        """The pairs that suit the channel, compared on every group's nominal scale."""
        everything = list(range(len(self.pairs)))
        if len(everything) <= self.recipe.keep_pairs:
            return everything
        gains = []
        for p in everything:
            total = 0.0
            for g in self.live:
                total += self.attempt(g, self.nominal(g, super_), super_, p)[0]
            gains.append(total)
        return sorted(everything, key=lambda p: -gains[p])[: self.recipe.keep_pairs]

    def best_local(self, g: int, super_: np.float32, pair: int) -> tuple[float, int]:
        """The greatest gain of a group, and the local scale that has it."""
        return (self._refitted if self.recipe.ratios else self._in_window)(g, super_, pair)

    def _in_window(self, g: int, super_: np.float32, pair: int) -> tuple[float, int]:
        nominal, (below, above) = self.nominal(g, super_), self.recipe.window
        top, best = -1.0, 0
        for local in range(
            max(nominal + below, 1), min(nominal + above, self.layout.scale_max) + 1
        ):
            value, _, _ = self.attempt(g, local, super_, pair)
            if value > top:
                top, best = value, local
        return top, best

    def _refitted(self, g: int, super_: np.float32, pair: int) -> tuple[float, int]:
        """Some scales around the nominal one; then equation (4) and a new search at its scale."""
        top, best, found = -1.0, 0, None
        for ratio in self.recipe.ratios:
            local = self.nominal(g, super_, ratio)
            value, states, _ = self.attempt(g, local, super_, pair)
            if value > top:
                top, best, found = value, local, states
        v = self.groups[g].astype(np.float64)
        for _ in range(self.recipe.refits):
            dot = np.add.accumulate(v * found)[-1]
            norm = float((found * found).sum())
            if norm == 0:
                break
            local = self.clamp(dot / norm / float(super_))
            if local == best:
                break
            value, states, _ = self.attempt(g, local, super_, pair)
            if not value > top:
                break
            top, best, found = value, local, states
        return top, best


def encode_channel(
    w: np.ndarray, layout: SearchLayout, recipe: Recipe, pairs: list[list[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.float32, int]:
    """One channel [K] -> (words [K/64, words], local scales [K/64], super scale, pair)."""
    channel = _Channel(w, layout, recipe, pairs)
    words = np.zeros((len(channel.groups), layout.words), np.uint16)
    scales = np.zeros(len(channel.groups), np.int64)
    supers = channel.supers()
    if not supers:
        return words, scales, np.float32(0), 0
    # 1. Which code pairs suit this channel?
    kept = channel.kept_pairs(supers[0])
    # 2. Local scales of every group, for every super scale and pair that is left.
    best = (-1.0, np.float32(0), 0, scales)
    for super_ in supers:
        for p in kept:
            total, local_of = 0.0, np.zeros(len(scales), np.int64)
            for g in channel.live:
                gain, local_of[g] = channel.best_local(g, super_, p)
                total += gain
            if total > best[0]:
                best = (total, super_, p, local_of)
    # 3. The words of the winner.
    _, super_, pair, scales = best
    for g in channel.live:
        words[g] = channel.attempt(g, scales[g], super_, pair)[2]
    return words, scales, super_, pair


def encode(
    weight: np.ndarray, layout: SearchLayout, recipe: Recipe, pairs: list[list[np.ndarray]]
) -> dict[str, np.ndarray]:
    """float32 [N, K] -> words, scales, supers and pairs in the arrays of the compiled core."""
    channels = [encode_channel(w, layout, recipe, pairs) for w in weight]
    words, scales, supers, chosen = zip(*channels, strict=True)
    return {
        "words": np.stack(words),
        "scales": np.stack(scales).astype(np.uint16),
        "supers": np.array(supers, np.float32),
        "pairs": np.array(chosen, np.int32),
    }
