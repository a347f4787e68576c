# SPDX-License-Identifier: Apache-2.0
"""The data-free search of ccq-2t in NumPy: what the compiled core must return, bit for bit.

Slow, and written to be read. A column is encoded by the Viterbi algorithm over bytes: the state is
the last byte, and the survivor of a state is the cheapest sequence of bytes that ends in it. All
costs are integers, so neither an order of summation nor an instruction set can change a choice.

1. A column gets one super scale for each kappa, as in reference.py; what follows is done for each,
   and the super scale with the largest gain wins, the first among equals.
2. A group is live where its rms is at least LEAST_RMS of what local scale 1 is best for. All other
   groups are stored as zeros: local scale 0, bytes 0. A run of live groups begins behind byte 0.
3. A live group tries the local scales of the window around its nominal one, all from the same
   survivors. With scale = local * super in float32,

       u = rint(clip(w * (1 / scale), -CLIP, CLIP))

   is a weight in units of the code's values, and a word whose values are v costs |u - v|^2 at its
   position. After every position the cost of the cheapest survivor is taken off all survivors;
   those left above the recipe's beam are dropped at the next one.
4. The local scale with the least local^2 * (sum of what was taken off - |u|^2) is kept, the lowest
   among equals; the others' survivors are dropped. The error of clipped weights would be wrong in
   this sum by a function of u only, which is why |u|^2 is taken off: the rest is -2 u.v + |v|^2.
5. The next group begins with the survivors' costs in its own units, rounded:

       min((cost * before^2 + local^2 // 2) // local^2, COST_LIMIT)

6. At the end of a run of live groups the cheapest survivor is traced back.

Among equal costs the byte with the lowest number wins, everywhere.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..codec import trellis
from ..codec.convolution import GROUP
from .recipes import TrellisRecipe
from .reference import SMALLEST_SUPER

# |u - v|^2 over four weights stays below 2^22; so do the differences of survivors' costs, since
# every byte can follow every byte.
CLIP = 767
COST_LIMIT = (1 << 22) - 1
# Gaussian weights at local scale 1 have rel-MSE 0.72 where the scale is five times too large for
# them; zeros have 1.
LEAST_RMS = 3 / 16
SCALE_MAX = 15
BYTES = GROUP // 4

# A cost no survivor reaches: of states that no sequence has come to.
_NEVER = 1 << 40


def fixed_point(w: np.ndarray, scale: np.float32) -> np.ndarray:
    """w / scale as int64, in units of the code's values."""
    x = w.astype(np.float32) * (np.float32(1) / scale)
    return np.rint(np.clip(x, np.float32(-CLIP), np.float32(CLIP))).astype(np.int64)


def viterbi_group(
    u: np.ndarray, costs: np.ndarray, beam: int, book: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    """Sixteen positions for u [64]: (cost taken off, costs [256], the byte before [16, 256])."""
    taken, before = 0, np.zeros((BYTES, 256), np.int64)
    for i, x in enumerate(u.reshape(BYTES, 4)):
        alive = np.where(costs <= beam, costs, _NEVER)
        through = alive[:, None] + np.square(x - book).sum(axis=-1)
        before[i] = np.argmin(through, axis=0)
        costs = through[before[i], np.arange(256)]
        least = int(costs.min())
        taken += least
        costs = costs - least
    return taken, costs, before


def encode_run(
    groups: np.ndarray, nominal: np.ndarray, super_: np.float32, recipe: TrellisRecipe
) -> tuple[int, np.ndarray, np.ndarray]:
    """A run of live groups [G, 64]: (value, bytes [G, 16], local scales [G])."""
    book = trellis.codebook().astype(np.int64)
    costs = np.full(256, _NEVER)
    costs[0] = 0
    total, pointers, locals_ = 0, [], []
    for w, middle in zip(groups, nominal, strict=True):
        best = None
        low, high = middle + recipe.window[0], middle + recipe.window[1]
        for local in range(max(low, 1), min(high, SCALE_MAX) + 1):
            start = costs
            if locals_:
                square = local * local
                start = np.minimum((costs * locals_[-1] ** 2 + square // 2) // square, COST_LIMIT)
            u = fixed_point(w, np.float32(local) * super_)
            taken, ends, before = viterbi_group(u, start, recipe.beam, book)
            value = local * local * (taken - int((u * u).sum()))
            if best is None or value < best[0]:
                best = value, local, ends, before
        value, local, costs, before = best
        total += value
        locals_.append(local)
        pointers.append(before)
    found = np.zeros(len(groups) * BYTES, np.int64)
    found[-1] = np.argmin(costs)
    before = np.concatenate(pointers)
    for i in range(len(found) - 1, 0, -1):
        found[i - 1] = before[i, found[i]]
    return total, found.reshape(-1, BYTES), np.array(locals_)


def encode_channel(
    w: np.ndarray, recipe: TrellisRecipe
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """One channel [K] -> (bytes [K/64, 16], local scales [K/64], super scale)."""
    groups = w.reshape(-1, GROUP)
    # Sums run row by row in float64, as the core's do.
    energy = np.array([np.add.accumulate(g.astype(np.float64) ** 2)[-1] for g in groups])
    rms = np.sqrt(energy / GROUP)
    reference = np.sqrt(np.add.accumulate(energy)[-1] / w.size)
    supers: list[np.float32] = []
    for kappa in recipe.kappas:
        s = np.float32(ml_dtypes.bfloat16(np.float32(recipe.nominal * reference / kappa)))
        if s >= SMALLEST_SUPER and s not in supers:
            supers.append(s)

    best, most = None, 0.0
    for super_ in supers:
        words = np.zeros((len(groups), BYTES), np.int64)
        scales = np.zeros(len(groups), np.int64)
        ratio = recipe.nominal * rms / float(super_)
        live = ratio >= LEAST_RMS
        middle = np.clip(np.rint(ratio), 1, SCALE_MAX).astype(np.int64)
        total, g = 0, 0
        while g < len(groups):
            end = g
            while end < len(groups) and live[end]:
                end += 1
            if end > g:
                run = slice(g, end)
                found = encode_run(groups[run], middle[run], super_, recipe)
                value, words[run], scales[run] = found
                total += value
            g = end + 1
        gain = float(super_) * float(super_) * float(-total)
        if best is None or gain > most:
            best, most = (words, scales, super_), gain
    if best is None:
        nothing = np.zeros((len(groups), BYTES), np.int64)
        return nothing, np.zeros(len(groups), np.int64), np.float32(0)
    return best


def encode(weight: np.ndarray, recipe: TrellisRecipe) -> dict[str, np.ndarray]:
    """float32 [N, K] -> words, scales and supers in the arrays of the compiled core."""
    channels = [encode_channel(w, recipe) for w in weight]
    words, scales, supers = zip(*channels, strict=True)
    return {
        "words": np.stack(words).astype(np.uint8),
        "scales": np.stack(scales).astype(np.uint8),
        "supers": np.array(supers, np.float32),
    }
