# SPDX-License-Identifier: Apache-2.0
"""Greedy generation with a key-value cache, for batches of prompts of different lengths."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import paddle

from .ernie import Cache, Ernie


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Token rows as one tensor [rows, longest], and how many fillers each row starts with."""
    longest = max(len(row) for row in rows)
    padding = np.array([longest - len(row) for row in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, padding[index] :] = row
    return paddle.to_tensor(tokens), paddle.to_tensor(padding)


@paddle.no_grad()
def generate(
    model: Ernie,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int] = (),
    batch_size: int = 64,
) -> list[list[int]]:
    """Greedy continuations, in the order of the prompts; each ends before its first stop token.

    Prompts are batched by length and padded on the left; a finished row leaves its batch.
    """
    results: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(by_length), batch_size):
        rows = by_length[first : first + batch_size]
        step, left = left_padded([prompts[i] for i in rows])
        cache = Cache(len(model.blocks))
        for _ in range(max_new_tokens):
            hidden = model.hidden_states(step, left, cache)
            chosen = paddle.argmax(model.logits(hidden[:, -1]), axis=-1).numpy()
            going = [row for row, token in enumerate(chosen.tolist()) if token not in stop]
            for row in going:
                results[rows[row]].append(int(chosen[row]))
            if not going:
                break
            if len(going) < len(rows):
                rows, keep = [rows[row] for row in going], paddle.to_tensor(going)
                cache.select(keep)
                left = paddle.gather(left, keep)
            step = paddle.to_tensor(chosen[going]).unsqueeze(1)
    return results
