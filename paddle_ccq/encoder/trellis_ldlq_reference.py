# SPDX-License-Identifier: Apache-2.0
"""The calibrated search of ccq-2t in NumPy: what the compiled core must return, bit for bit.

Slow, and written to be read; one channel at a time. All is single float32 operations in the order
written here, sums from the first term on, but for costs (integers) and losses (float64).

A survivor is a sequence of bytes with the errors e = w - w' of its own weights. In the metric of
block b (trellis_metric.py) its next byte is best nearest to w_b + sum of e_a M_ab, so every
survivor has a target of its own. Both sides are rounded to integers: the code's values in the
metric, rint(v R_b), and the survivor's target over the group's scale.

Errors of a group ask something of all weights after it. While the next group is searched, all
survivors of the group before are kept, each with its own claim on the next group's weights. The
best survivor at the end of a group then decides the bytes of the group before it: survivors that
come from other sequences are dropped, and the decided errors are fed back into all later groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ..codec import trellis
from ..codec.convolution import GROUP
from .ldlq_metric import BLOCK
from .trellis_ldlq import TrellisLdlqRecipe
from .trellis_metric import WINDOW, TrellisMetric
from .trellis_reference import BYTES, COST_LIMIT, LEAST_RMS, SCALE_MAX

F32 = np.float32
# Targets beyond it do not choose other bytes; the code's values in the metric stay within 510.
CLIP = 511


@dataclass(frozen=True)
class Survivor:
    """A sequence that ends in `state`.

    rows holds errors before the position, and from it on the weights with what the errors ask.
    """

    cost: int
    state: int
    rows: np.ndarray
    found: tuple[int, ...] = ()
    origin: int = 0


@dataclass(frozen=True)
class Factors:
    """One factorization: of the whole Hessian seen from a group's first row, or of a window."""

    m: np.ndarray
    root: np.ndarray
    unit: np.ndarray
    ratio: np.ndarray
    spread: np.ndarray


def products(start: np.ndarray, e: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """start + e[0] rows[0] + e[1] rows[1] + ..., in this order."""
    for value, row in zip(e, rows, strict=True):
        start = start + value * row
    return start


def total(values: np.ndarray) -> np.float32:
    """The sum from the first term on."""
    return np.add.accumulate(values, dtype=F32)[-1]


def rescaled(cost: int, factor: np.float32) -> int:
    """A cost in the units of the next position, rounded, and at most COST_LIMIT."""
    return int(np.rint(np.minimum(F32(cost) * factor, F32(COST_LIMIT))))


def position(
    survivors: list[Survivor],
    b: int,
    w: np.ndarray,
    factors: Factors,
    scale: np.float32,
    beam: int,
    fixed: int | None = None,
) -> tuple[list[Survivor], float]:
    """One byte more on every survivor, and the value that the cheapest one costs."""
    at = slice(BLOCK * b, BLOCK * (b + 1))
    root = factors.root[b]
    book = trellis.codebook().astype(F32)

    def in_metric(x: np.ndarray) -> np.ndarray:
        """x R for x [..., 4]."""
        columns = []
        for j in range(BLOCK):
            column = x[..., 0] * root[0, j]
            for i in range(1, j + 1):
                column = column + x[..., i] * root[i, j]
            columns.append(column)
        return np.stack(columns, axis=-1)

    best = np.full(256, 1 << 62)
    through = np.zeros(256, np.int64)
    for i, s in enumerate(survivors):
        y = in_metric(s.rows[at]) * (F32(1) / scale)
        u = np.rint(np.clip(y, F32(-CLIP), F32(CLIP))).astype(np.int64)
        entries = np.rint(in_metric(book[s.state])).astype(np.int64)
        cost = s.cost + np.square(entries - u).sum(axis=1)
        better = cost < best  # survivors are in the order of their states
        best[better], through[better] = cost[better], i
    least = int(best.min() if fixed is None else best[fixed])
    value = float(least) * float(factors.unit[b]) * float(scale) * float(scale)
    limit = int(np.rint(F32(beam) * factors.spread[b]))
    found = []
    for byte in range(256) if fixed is None else (fixed,):
        if best[byte] - least > limit:
            continue
        i = int(through[byte])
        s = survivors[i]
        rows = s.rows.copy()
        e = w[at] - scale * book[s.state, byte]
        rows[at] = e
        rows[at.stop :] = products(rows[at.stop :], e, factors.m[at, at.stop : len(rows)])
        origin = s.origin if b else i
        found.append(Survivor(int(best[byte]) - least, byte, rows, (*s.found, byte), origin))
    return found, value


def cheapest(survivors: list[Survivor]) -> int:
    """Index of the survivor of the least cost, the first among equals."""
    return int(np.argmin([s.cost for s in survivors]))


def through_group(
    survivors: list[Survivor], w: np.ndarray, factors: Factors, scale: np.float32, beam: int
) -> tuple[float, list[Survivor]]:
    """The loss of a group's cheapest bytes at one scale, and the survivors at its end."""
    value = 0.0
    for b in range(BYTES):
        if b:
            survivors = [with_cost(s, rescaled(s.cost, factors.ratio[b])) for s in survivors]
        survivors, more = position(survivors, b, w, factors, scale, beam)
        value += more
    return value, survivors


def feed_back(
    w: np.ndarray, metric: TrellisMetric, super_: np.float32, recipe: TrellisLdlqRecipe
) -> tuple[np.ndarray, np.ndarray, float]:
    """Bytes [K/4], local scales [K/64] and loss of one channel [K]."""
    groups = len(w) // GROUP
    x = w.copy()
    words, locals_ = np.zeros(len(w) // 4, np.int64), np.zeros(groups, np.int64)
    loss, before = 0.0, 1
    survivors = [Survivor(0, 0, np.zeros(0, F32))]
    pending = False

    def decide(g: int, survivor: Survivor) -> None:
        words[BYTES * g : BYTES * (g + 1)] = survivor.found
        # What the next group was asked, its survivors knew already.
        after = GROUP * (g + 2)
        errors = survivor.rows[:GROUP]
        x[after:] = products(x[after:], errors, metric.m[GROUP * g : GROUP * (g + 1), after:])

    for g in range(groups):
        rows = slice(GROUP * g, GROUP * (g + 1))
        earlier = survivors
        start = []
        for s in survivors:
            own = x[rows]
            if pending:
                own = products(own, s.rows[:GROUP], metric.m[rows.start - GROUP : rows.start, rows])
            start.append(Survivor(s.cost, s.state, own))
        own = start[cheapest(start)].rows
        rms = np.sqrt(total(own * own) * F32(1 / GROUP))
        ratio = rms * F32(recipe.nominal) / super_
        if not ratio >= F32(LEAST_RMS):
            # Zeros: what came before is decided, and the chain begins anew.
            if pending:
                decide(g - 1, earlier[cheapest(earlier)])
            x[rows.stop :] = products(x[rows.stop :], w[rows], metric.m[rows, rows.stop :])
            survivors, pending, before = [Survivor(0, 0, np.zeros(0, F32))], False, 1
            continue
        middle = int(np.clip(np.rint(ratio), 1, SCALE_MAX))
        block = slice(BYTES * g, BYTES * (g + 1))
        factors = Factors(
            metric.m[rows, rows],
            *(part[block] for part in (metric.root, metric.unit, metric.ratio, metric.spread)),
        )
        best = None
        low, high = middle + recipe.window[0], middle + recipe.window[1]
        for local in range(max(low, 1), min(high, SCALE_MAX) + 1):
            trial = start
            if g:
                factor = F32(before * before) / F32(local * local) * factors.ratio[0]
                trial = [Survivor(rescaled(s.cost, factor), s.state, s.rows) for s in start]
            value, trial = through_group(trial, w[rows], factors, F32(local) * super_, recipe.beam)
            if best is None or value < best[0]:
                best = value, local, trial
        value, before, found = best
        origin = found[cheapest(found)].origin
        if pending:
            decide(g - 1, earlier[origin])
        survivors = [s for s in found if s.origin == origin]
        loss, locals_[g], pending = loss + value, before, True
    if pending:
        decide(groups - 1, survivors[cheapest(survivors)])
    return words, locals_, loss


def with_cost(s: Survivor, cost: int) -> Survivor:
    """The same survivor at another cost."""
    return Survivor(cost, s.state, s.rows, s.found, s.origin)


def errors_of(
    w: np.ndarray, words: np.ndarray, locals_: np.ndarray, super_: np.float32
) -> np.ndarray:
    """e = w - w' [K]."""
    values = trellis.decode_values(words.astype(np.uint8)[:, None])[:, 0].astype(F32)
    return w - np.repeat(locals_.astype(F32) * super_, GROUP) * values


def times(e: np.ndarray, h: np.ndarray) -> np.ndarray:
    """e H for e [K] and H [K, columns]."""
    return products(np.zeros(h.shape[1], F32), e, h)


def window_factors(metric: TrellisMetric, g: int) -> Factors:
    """Those of a group with the next one's first weights."""
    return Factors(
        metric.window_m[g],
        metric.window_root[g],
        metric.window_unit[g],
        metric.window_ratio[g],
        metric.window_spread[g],
    )


def descend_group(
    g: int,
    w: np.ndarray,
    metric: TrellisMetric,
    state: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    super_: np.float32,
    beam: int,
) -> None:
    """A group anew with its neighbours fixed; `state`: words, local scales, errors and e H."""
    words, locals_, error, gradient = state
    last = g + 1 == len(locals_)
    count = GROUP if last else WINDOW
    if not locals_[g] or (not last and not locals_[g + 1]):
        return
    rows = slice(GROUP * g, GROUP * g + count)
    own = metric.h[rows, rows]
    # Without the window's own errors the gradient is q; its weights would best be w + q H^-1.
    q = gradient[rows] - times(error[rows], own)
    wanted = products(w[rows], q, metric.window_inverse[g, :count, :count])
    factors = window_factors(metric, g)
    best = None
    for step in (0, -1, 1):
        local = int(locals_[g]) + step
        if not 1 <= local <= SCALE_MAX:
            continue
        trial = [Survivor(0, int(words[BYTES * g - 1]) if g else 0, wanted)]
        value = 0.0
        for b in range(count // BLOCK):
            scale, fixed, factor = F32(local) * super_, None, factors.ratio[b]
            if b == BYTES:
                # The next group's first byte stays; its weights change with the byte before.
                following = int(locals_[g + 1])
                scale, fixed = F32(following) * super_, int(words[BYTES * (g + 1)])
                factor = F32(local * local) / F32(following * following) * factor
            if b:
                trial = [with_cost(s, rescaled(s.cost, factor)) for s in trial]
            trial, more = position(trial, b, wanted, factors, scale, beam, fixed)
            value += more
        if best is None or value < best[0]:
            best = value, local, trial[cheapest(trial)]
    _, local, found = best
    # Errors counted from the wanted weights, back to errors of the weights.
    now = found.rows - wanted + w[rows]
    move = now - error[rows]
    # Growth of e H e^T: v.(g before + g after) for a move v. Where nothing is gained nothing
    # changes, so rounding cannot make a channel worse.
    growth = total(move * (gradient[rows] + (gradient[rows] + times(move, own))))
    if not growth < 0:
        return
    error[rows] = now
    locals_[g] = local
    words[BYTES * g : BYTES * (g + 1)] = found.found[:BYTES]
    gradient[:] = products(gradient, move, metric.h[rows])


def encode_channel(
    w: np.ndarray, metric: TrellisMetric, super_: np.float32, recipe: TrellisLdlqRecipe
) -> tuple[np.ndarray, np.ndarray, np.float32, float]:
    """One channel [K] for one super scale: bytes, local scales, super scale and loss."""
    words, locals_, loss = feed_back(w, metric, super_, recipe)
    if not recipe.sweeps:
        return words, locals_, super_, loss
    target = times(w, metric.h)
    error = errors_of(w, words, locals_, super_)
    gradient = times(error, metric.h)
    for _ in range(recipe.sweeps):
        state = words, locals_, error, gradient
        for g in range(len(locals_)):
            descend_group(g, w, metric, state, super_, recipe.beam)
        # The best factor on w' = w - e is 1 + (w' H e) / (w' H w').
        decoded = w - error
        cross, norm = total(decoded * gradient), total(decoded * (target - gradient))
        with np.errstate(divide="ignore", invalid="ignore"):
            fitted = F32(ml_dtypes.bfloat16(super_ + super_ * (cross / norm)))
            t = fitted / super_ - F32(1)
        if norm > 0 and fitted > 0 and t * (t * norm - F32(2) * cross) < 0:
            super_ = fitted
        error = errors_of(w, words, locals_, super_)
        gradient = times(error, metric.h)
    loss = np.add.accumulate(error.astype(np.float64) * gradient.astype(np.float64))[-1]
    return words, locals_, super_, float(loss)


def encode(
    weight: np.ndarray, metric: TrellisMetric, supers: np.ndarray, recipe: TrellisLdlqRecipe
) -> dict[str, np.ndarray]:
    """float32 [N, K] and super scales [candidates, N] -> the arrays of the compiled core."""
    chosen = []
    for w, candidates in zip(weight, supers.T, strict=True):
        tried = [encode_channel(w, metric, super_, recipe) for super_ in candidates]
        chosen.append(tried[int(np.argmin([loss for *_, loss in tried]))])
    words, locals_, found, losses = zip(*chosen, strict=True)
    n = len(weight)
    return {
        "words": np.stack(words).astype(np.uint8).reshape(n, -1, BYTES),
        "scales": np.stack(locals_).astype(np.uint8),
        "supers": np.array(found, F32),
        "loss": np.array(losses),
    }
