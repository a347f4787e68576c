# SPDX-License-Identifier: Apache-2.0
"""The paper's own encoder (Algorithm 1, equations 1 and 4): the baseline to compare with.

The paper leaves several choices open; docs/reference/formats.md lists the readings, and
docs/notes/encoder.md what each costs. The one that decides is the code cluster. Read literally,
equation (1) rounds a 15-bit code down to 8 bits, which destroys its last state and most of the
third: `literal=True` does that. The charitable reading keeps equation (1)'s code scale and
zero-point (the channel's smallest and largest code spread over 0..255) and then searches again
among the 256 vectors that are left.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..codec import formats, wint2
from ..codec.convolution import GROUP, ConvolutionalCode
from ..codec.spare_scale import CCQ_2_5, CCQ_2_75, SpareScaleFormat
from . import layouts
from .base import Encoded, ErrorStats

_SPARE_SCALE = {f.name: f for f in (CCQ_2_5, CCQ_2_75)}
# Formats that the paper has.
FORMATS = ("wint2", *_SPARE_SCALE)
# Rounds of "nearest of the 256 vectors, then equation (4)" in the charitable reading. The paper
# names no number; three come within 3 % of the plateau (rel-MSE 0.158, 0.138, 0.131, ..., 0.127).
ROUNDS = 3
# Channels at a time, so that distance tables stay in tens of MB.
CHUNK = 64


def nearest_walk(x: np.ndarray, code: ConvolutionalCode) -> np.ndarray:
    """Algorithm 1's argmin over the 2^T code words, exactly, by dynamic programming.

    x float [..., N] in units of signed states -> code words int32 [...]. The best path into every
    overlap of L - S bits is kept from state to state, so 2^L candidates a step replace 2^T.
    """
    overlap = code.L - code.S
    states = np.arange(1 << code.L)
    signed = (states - code.zero_point).astype(np.float32)
    flat = x.reshape(-1, code.N).astype(np.float32)
    best = np.zeros((len(flat), 1 << overlap), np.float32)
    came_from = []
    for i in range(code.N):
        total = (flat[:, i : i + 1] - signed) ** 2
        if i:
            total += best[:, states >> code.S]
        # A state is (bits that leave) * 2^overlap + (bits that stay).
        total = total.reshape(len(flat), 1 << code.S, 1 << overlap)
        leaving = total.argmin(axis=1)
        best = np.take_along_axis(total, leaving[:, None], axis=1)[:, 0]
        came_from.append(leaving)
    stays = best.argmin(axis=1)
    words = np.zeros(len(flat), np.int32)
    for i in reversed(range(code.N)):
        leaving = np.take_along_axis(came_from[i], stays[:, None], axis=1)[:, 0]
        state = (leaving << overlap) + stays
        words |= (state << code.shifts[i]).astype(np.int32)
        stays = state >> code.S
    return words.reshape(x.shape[:-1])


def absmax_scale(w: np.ndarray, zero_point: int) -> np.ndarray:
    """Algorithm 1's group scale, [N, G, 64] -> [N, G]: the largest weight at the range's end.

    The states reach from -zero_point to zero_point - 1; half of that width is taken as the end, so
    that no weight is clipped. The paper does not say; clipping some would lower its error.
    """
    return np.abs(w).max(axis=-1) / np.float32(zero_point - 0.5)


def refit_scale(w: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Equation (4): the scale of least squared error for given states, [N, G, 64] -> [N, G]."""
    norm = (states.astype(np.float32) ** 2).sum(axis=-1)
    dot = (w * states).sum(axis=-1)
    return np.maximum(dot / np.maximum(norm, 1), 0)


def compress_scales(scales: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Section 3.4: local scales 0..top and a bfloat16 super scale a channel, the largest on top."""
    supers = (scales.max(axis=1) / np.float32(top)).astype(ml_dtypes.bfloat16)
    s = supers.astype(np.float32)[:, None]
    local = np.rint(np.divide(scales, s, out=np.zeros_like(scales), where=s > 0))
    return np.clip(local, 0, top).astype(np.uint16), supers


def scaled(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """w / scale, groups of scale zero giving zeros."""
    s = scales[..., None]
    return np.divide(w, s, out=np.zeros_like(w), where=s > 0)


def nearest_entry(x: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Index of each vector's nearest entry: [C, V, D], books [C, E, D] -> int [C, V]."""
    books = books.astype(np.float32)
    score = x @ books.swapaxes(-1, -2) - (books**2).sum(axis=-1)[:, None, :] / 2
    return score.argmax(axis=-1)


class PaperEncoder:
    """Algorithm 1, then equation (1) for WINT2, equation (4) and the compression of scales."""

    def __init__(self, format: str, literal: bool = False, threads: int = 1) -> None:
        self.format = format
        self.literal = literal

    def encode(self, weight: np.ndarray, name: str = "", rows: np.ndarray | None = None) -> Encoded:
        """See MatrixEncoder.encode."""
        n, k = weight.shape
        problem = formats.shape_problem(self.format, k, n)
        if problem:
            raise ValueError(problem)
        chunks = []
        for first in range(0, n, CHUNK):
            w = weight[first : first + CHUNK].reshape(-1, k // GROUP, GROUP).astype(np.float32)
            f = _SPARE_SCALE.get(self.format)
            chunks.append(self._spare_scale(f, w) if f else self._wint2(w))
        tensors = {
            suffix: np.concatenate([c[suffix] for c in chunks], axis=-1) for suffix in chunks[0]
        }
        back = formats.decode(self.format, tensors, dtype="float32").T
        return Encoded(tensors, ErrorStats.between(weight, back))

    def _wint2(self, w: np.ndarray) -> dict[str, np.ndarray]:
        code = wint2.CODE
        c, groups, _ = w.shape
        scales = absmax_scale(w, code.zero_point)
        vectors = (c, groups * GROUP // code.N, code.N)
        words = nearest_walk(scaled(w, scales).reshape(vectors), code)

        # Equation (1)'s parameters: asymmetric uniform quantization of the channel's codes.
        low, high = words.min(axis=1), words.max(axis=1)
        code_scale = (np.maximum(high - low, 1) / 255).astype(np.float32)
        code_zp = low.astype(np.float32)
        all_bytes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], c, axis=1)
        codes = wint2.decode_codes(all_bytes, code_scale, code_zp).T
        books = code.decode(codes) - code.zero_point  # [c, 256, 4]

        def states_of(q: np.ndarray) -> np.ndarray:
            return np.take_along_axis(books, q[..., None], axis=1).reshape(w.shape)

        if self.literal:
            q = np.floor((words - code_zp[:, None]) / code_scale[:, None])
            q = np.clip(q, 0, 255).astype(np.int64)
            scales = refit_scale(w, states_of(q))
        else:
            for _ in range(ROUNDS):
                q = nearest_entry(scaled(w, scales).reshape(vectors), books)
                scales = refit_scale(w, states_of(q))
        local, supers = compress_scales(scales, wint2.SCALE_MAX)
        return {
            "quant_weight": np.ascontiguousarray(q.astype(np.uint8).T),
            "weight_scale": wint2.pack_scales(local.T),
            "super_scales": supers,
            "code_scale": code_scale,
            "code_zp": code_zp,
        }

    def _spare_scale(self, f: SpareScaleFormat, w: np.ndarray) -> dict[str, np.ndarray]:
        c, groups, _ = w.shape
        scales = absmax_scale(w, f.zero_point)
        x = scaled(w, scales)
        full = x[..., :-1].reshape(c, groups, f.words_per_group - 1, f.rows_per_word)
        words = np.zeros((c, groups, f.words_per_group), np.int32)
        states = np.empty(w.shape, np.int32)
        found = np.empty(full.shape, np.int32)
        row, below = 0, f.word_bits
        for code in f.codes:
            below -= code.T
            part = nearest_walk(full[..., row : row + code.N], code)
            words[..., :-1] |= part << below
            found[..., row : row + code.N] = code.decode(part) - f.zero_point
            row += code.N
        last = np.clip(np.rint(x[..., -1]), -f.zero_point, f.mask - f.zero_point).astype(np.int32)
        words[..., -1] = (last + f.zero_point) << f.scale_bits
        states[..., :-1], states[..., -1] = found.reshape(c, groups, -1), last
        local, supers = compress_scales(refit_scale(w, states), f.scale_max)
        return layouts.pack_spare_scale(f, words.astype(np.uint16), local, supers)
