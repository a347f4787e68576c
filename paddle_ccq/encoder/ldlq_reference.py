# SPDX-License-Identifier: Apache-2.0
"""The calibrated search in NumPy: what the compiled core must return, bit for bit.

Slow, and written to be read. Arrays are [rows, channels]; every channel stands alone. All is single
float32 operations in the order written here, sums from the first term on; losses of whole channels
are float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np

from ..codec.convolution import GROUP
from .ldlq_metric import BLOCK, LdlqMetric

if TYPE_CHECKING:
    from .ldlq import LdlqRecipe

SCALE_MAX = 15
F32 = np.float32


def times(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """matrix^T x for x [rows, N]: one sum over the rows of x for each column of the matrix."""
    out = []
    for column in matrix.T:
        total = np.zeros(x.shape[1:], F32)
        for value, factor in zip(x, column, strict=True):
            total = total + value * factor
        out.append(total)
    return np.stack(out)


def add_products(start: np.ndarray, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """start[r] + sum over i of rows[r, i] x[i]."""
    out = start.copy()
    for i in range(len(x)):
        out = out + x[i] * rows[:, i, None]
    return out


def times_root(x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """R^T x for upper triangular R [4, 4], x [4, N]."""
    return np.concatenate([times(x[: j + 1], r[: j + 1, j : j + 1]) for j in range(BLOCK)])


def square_norm(y: np.ndarray) -> np.ndarray:
    """|y|^2 of each column of y [rows, N], float32 [N]."""
    total = y[0] * y[0]
    for row in y[1:]:
        total = total + row * row
    return total


def nearest(y: np.ndarray, book: np.ndarray, r: np.ndarray) -> np.ndarray:
    """For every y [4, N] the index of the entry c = R^T book with the largest y.c - |c|^2 / 2."""
    c = times_root(np.ascontiguousarray(book.T), r)
    half = F32(0.5) * square_norm(c)
    y = y[:, :, None]
    score = y[0] * c[0] + y[1] * c[1] + (y[2] * c[2] + y[3] * c[3]) - half
    return np.argmax(score, axis=1)


def clamp(local: np.ndarray) -> np.ndarray:
    """Local scales held to 1..15, the four bits of WINT2 without the zero."""
    return np.clip(local, F32(1), F32(SCALE_MAX))


def best_of(losses: list[np.ndarray], *columns: list[np.ndarray]) -> list[np.ndarray]:
    """For every channel the column of the least loss, the first among equals."""
    chosen = np.argmin(losses, axis=0)
    n = np.arange(chosen.size)
    return [np.stack(column)[chosen, ..., n].T for column in (losses, *columns)]


def feed_back(
    w: np.ndarray,
    metric: LdlqMetric,
    book: np.ndarray,
    supers: np.ndarray,
    nominal: float,
    window: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words [K/4, N], local scales [K/64, N] and loss [N] by error feedback, for w [K, N]."""
    k, n = w.shape
    x = w.copy()
    words, locals_ = np.zeros((k // BLOCK, n), np.int64), np.zeros((k // GROUP, n), F32)
    loss = np.zeros(n)
    for first in range(0, k, GROUP):
        group = slice(first, first + GROUP)
        rms = np.sqrt(times(x[group] * x[group], np.ones((GROUP, 1), F32))[0] * F32(1 / GROUP))
        middle = np.rint(rms * F32(nominal) / supers)
        tried = []
        for step in range(window[0], window[1] + 1):
            local = clamp(middle + F32(step))
            scale = local * supers
            inverse = F32(1) / scale
            trial, error = x[group].copy(), np.zeros((GROUP, n), F32)
            cost = np.zeros(n, F32)
            found = np.zeros((GROUP // BLOCK, n), np.int64)
            for b in range(GROUP // BLOCK):
                at = slice(b * BLOCK, (b + 1) * BLOCK)
                r = metric.d_root[first // BLOCK + b]
                found[b] = nearest(times_root(trial[at], r) * inverse, book, r)
                states = scale * book[found[b]].T
                cost = cost + square_norm(times_root(trial[at] - states, r))
                error[at] = w[group][at] - states
                rest = slice((b + 1) * BLOCK, GROUP)
                rows = metric.feedback[group, group][rest, at]
                trial[rest] = add_products(trial[rest], error[at], rows)
            tried.append((cost, local, found, error))
        cost, local, found, error = best_of(*(list(part) for part in zip(*tried, strict=True)))
        locals_[first // GROUP] = local
        words[first // BLOCK : (first + GROUP) // BLOCK] = found
        loss = loss + cost
        later = slice(first + GROUP, k)
        x[later] = add_products(x[later], error, metric.feedback[later, group])
    return words, locals_, loss


def errors(
    w: np.ndarray, book: np.ndarray, words: np.ndarray, locals_: np.ndarray, supers: np.ndarray
) -> np.ndarray:
    """w - w', [K, N]."""
    scale = np.repeat(locals_ * supers, GROUP, axis=0)
    return w - scale * book[words].transpose(0, 2, 1).reshape(w.shape)


class _State(NamedTuple):
    """What a sweep changes in place."""

    words: np.ndarray
    locals_: np.ndarray
    error: np.ndarray  # w - w'
    gradient: np.ndarray  # error H


def descend(
    w: np.ndarray,
    metric: LdlqMetric,
    book: np.ndarray,
    supers: np.ndarray,
    words: np.ndarray,
    locals_: np.ndarray,
    sweeps: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Words, local scales, super scales and loss after coordinate descent."""
    zero = np.zeros_like(w)
    words, locals_, supers = words.copy(), locals_.copy(), supers.copy()
    target = add_products(zero, w, metric.h)
    error = errors(w, book, words, locals_, supers)
    gradient = add_products(zero, error, metric.h)
    for _ in range(sweeps):
        state = _State(words, locals_, error, gradient)
        for first in range(0, len(w), GROUP):
            _descend_group(w, metric, book, supers, state, first)
        cross, norm = np.zeros(w.shape[1], F32), np.zeros(w.shape[1], F32)
        for r in range(len(w)):
            encoded = w[r] - error[r]
            cross = cross + encoded * gradient[r]
            norm = norm + encoded * (target[r] - gradient[r])
        fitted = (supers + supers * (cross / norm)).astype(ml_dtypes.bfloat16).astype(F32)
        t = fitted / supers - F32(1)
        better = (norm > 0) & (fitted > 0) & (t * (t * norm - F32(2) * cross) < 0)
        supers = np.where(better, fitted, supers)
        error = errors(w, book, words, locals_, supers)
        gradient = add_products(zero, error, metric.h)
    loss = np.zeros(w.shape[1])
    for r in range(len(w)):
        loss = loss + error[r].astype(np.float64) * gradient[r]
    return words, locals_, supers, loss


def _descend_group(
    w: np.ndarray,
    metric: LdlqMetric,
    book: np.ndarray,
    supers: np.ndarray,
    state: _State,
    first: int,
) -> None:
    """Improve one group in a sweep, in place."""
    words, locals_, error, gradient = state
    group = slice(first, first + GROUP)
    blocks = slice(first // BLOCK, (first + GROUP) // BLOCK)
    h = metric.h[group, group]
    own = locals_[first // GROUP]
    states = book[words[blocks]].transpose(0, 2, 1).reshape(GROUP, -1)
    moved = add_products(np.zeros_like(states), states, h)
    tried = []
    for step in (0, -1, 1):
        local = clamp(own + F32(step))
        scale = local * supers
        inverse = F32(1) / scale
        away = own * supers - scale
        e, g = error[group] + away * states, gradient[group] + away * moved
        delta = np.zeros_like(own)
        for r in range(GROUP):
            delta = delta + away * states[r] * (gradient[first + r] + g[r])
        found = np.zeros((GROUP // BLOCK, own.size), np.int64)
        for b in range(GROUP // BLOCK):
            at = slice(b * BLOCK, (b + 1) * BLOCK)
            root = metric.h_root[first // BLOCK + b]
            zero = np.zeros((BLOCK, own.size), F32)
            rest = g[at] - add_products(zero, e[at], h[at, at])
            x = add_products(w[group][at], rest, metric.h_inverse[first // BLOCK + b])
            found[b] = nearest(times_root(x, root) * inverse, book, root)
            now = w[group][at] - scale * book[found[b]].T
            move, before = now - e[at], g[at].copy()
            e[at] = now
            g = add_products(g, move, h[:, at])
            for i in range(BLOCK):
                delta = delta + move[i] * (before[i] + g[at][i])
        tried.append((delta, local, found, e))
    delta, local, found, e = best_of(*(list(part) for part in zip(*tried, strict=True)))
    gain = delta < 0
    locals_[first // GROUP] = np.where(gain, local, own)
    words[blocks] = np.where(gain, found, words[blocks])
    moves = np.where(gain, e, error[group]) - error[group]
    error[group] = np.where(gain, e, error[group])
    gradient[:] = add_products(gradient, moves, metric.h[:, group])


def encode(
    weight: np.ndarray,
    metric: LdlqMetric,
    books: np.ndarray,
    supers: np.ndarray,
    recipe: LdlqRecipe,
) -> dict[str, np.ndarray]:
    """The result of _core.ldlq for the same arguments, bit for bit.

    Args:
        weight: float32 [N, K].
        books: float32 [pairs, 4, 256].
        supers: float32 [candidates, N].
    """
    w = np.ascontiguousarray(weight.T)
    n = w.shape[1]
    books = books.transpose(0, 2, 1)
    screened = np.zeros((len(books), n))
    if len(books) > recipe.keep_pairs:
        for p, book in enumerate(books):
            _, _, screened[p] = feed_back(w, metric, book, supers[0], recipe.nominal, (0, 0))
    kept = np.argsort(screened, axis=0, kind="stable")[: recipe.keep_pairs]
    result = []
    for channel in range(n):
        one, best = w[:, channel : channel + 1], None
        # Pairs in the order of their numbers, not of their losses.
        for pair in sorted(kept[:, channel].tolist()):
            mine = None
            for s in supers[:, channel]:
                s = np.array([s], F32)
                run = feed_back(one, metric, books[pair], s, recipe.nominal, recipe.window)
                if mine is None or run[2][0] < mine[2][0]:
                    mine = (*run, s, pair)
            if best is None or mine[2][0] < best[2][0]:
                best = mine
        words, locals_, loss, s, pair = best
        if recipe.sweeps:
            book = books[pair]
            words, locals_, s, loss = descend(one, metric, book, s, words, locals_, recipe.sweeps)
        result.append((words[:, 0], locals_[:, 0], s[0], pair, loss[0]))
    words, scales, chosen, pairs, loss = zip(*result, strict=True)
    return {
        "words": np.stack(words).astype(np.uint16),
        "scales": np.stack(scales).astype(np.uint16),
        "supers": np.array(chosen, F32),
        "pairs": np.array(pairs, np.int32),
        "loss": np.array(loss),
    }
