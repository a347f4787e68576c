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


def encode_channel(
    w: np.ndarray, layout: SearchLayout, recipe: Recipe, pairs: list[list[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.float32, int]:
    """One channel [K] -> (words [K/64, words], local scales [K/64], super scale, pair)."""
    groups = w.reshape(-1, GROUP)
    # Sums run row by row in float64, as the core's do.
    energy = np.array([np.add.accumulate(g.astype(np.float64) ** 2)[-1] for g in groups])
    rms = np.sqrt(energy / GROUP)
    words = np.zeros((len(groups), layout.words), np.uint16)
    scales = np.zeros(len(groups), np.int64)

    reference = np.sqrt(np.add.accumulate(energy)[-1] / w.size)
    if recipe.ratios:
        reference = rms.max()
    supers: list[np.float32] = []
    for kappa in recipe.kappas:
        s = np.float32(ml_dtypes.bfloat16(np.float32(recipe.nominal * reference / kappa)))
        if s >= SMALLEST_SUPER and s not in supers:
            supers.append(s)
    if not supers:
        return words, scales, np.float32(0), 0

    def clamp(scale: float) -> int:
        return int(min(max(np.rint(scale), 1), layout.scale_max))

    def gain(local: int, super_: np.float32, score: int) -> float:
        scale = float(np.float32(local) * super_)
        return scale * scale * float(score)

    def attempt(g: int, local: int, super_: np.float32, pair: int) -> tuple[float, np.ndarray]:
        scale = np.float32(local) * super_
        score, _, states = search_group(groups[g], scale, layout, pairs[pair])
        return gain(local, super_, score), states

    live = [g for g in range(len(groups)) if rms[g] > 0]

    # 1. Which code pairs suit this channel? Compare them on every group's nominal scale.
    kept = list(range(len(pairs)))
    if len(pairs) > recipe.keep_pairs:
        gains = []
        for p in kept:
            total = 0.0
            for g in live:
                local = clamp(recipe.nominal * rms[g] / float(supers[0]))
                total += attempt(g, local, supers[0], p)[0]
            gains.append(total)
        kept = sorted(kept, key=lambda p: -gains[p])[: recipe.keep_pairs]

    # 2. Local scales of every group, for every super scale and pair that is left.
    best = (-1.0, np.float32(0), 0, scales)
    for super_ in supers:
        for p in kept:
            total, local_of = 0.0, np.zeros(len(groups), np.int64)
            for g in live:
                top, local_of[g] = -1.0, 0
                if recipe.ratios:
                    found = None
                    for ratio in recipe.ratios:
                        local = clamp(recipe.nominal * rms[g] * ratio / float(super_))
                        value, states = attempt(g, local, super_, p)
                        if value > top:
                            top, local_of[g], found = value, local, states
                    for _ in range(recipe.refits):
                        # Equation (4), then a new search at the fitted scale.
                        v = groups[g].astype(np.float64)
                        dot = np.add.accumulate(v * found)[-1]
                        norm = float((found * found).sum())
                        if norm == 0:
                            break
                        local = clamp(dot / norm / float(super_))
                        if local == local_of[g]:
                            break
                        value, states = attempt(g, local, super_, p)
                        if not value > top:
                            break
                        top, local_of[g], found = value, local, states
                else:
                    nominal = clamp(recipe.nominal * rms[g] / float(super_))
                    low = max(nominal + recipe.window[0], 1)
                    high = min(nominal + recipe.window[1], layout.scale_max)
                    for local in range(low, high + 1):
                        value, _ = attempt(g, local, super_, p)
                        if value > top:
                            top, local_of[g] = value, local
                total += top
            if total > best[0]:
                best = (total, super_, p, local_of)

    # 3. The words of the winner.
    _, super_, pair, scales = best
    for g in live:
        scale = np.float32(scales[g]) * super_
        _, words[g], _ = search_group(groups[g], scale, layout, pairs[pair])
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
