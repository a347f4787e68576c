# SPDX-License-Identifier: Apache-2.0
"""Text that a model makes up: calibration text in the proportions of what it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle

from ..models.ernie import Cache, Ernie

# Streams that one thread continues side by side.
ROWS = 64


@paddle.no_grad()
def sample_streams(model: Ernie, begin: int, rows: int, length: int, seed: list[int]) -> np.ndarray:
    """Token streams [rows, length] from the begin token on, at temperature 1.

    Streams go on after an end token, as training text does: what follows it is a new document.
    """
    rng = np.random.default_rng(seed)
    streams = np.empty((rows, length), np.int64)
    streams[:, 0] = begin
    cache = Cache(len(model.blocks))
    for position in range(1, length):
        step = paddle.to_tensor(streams[:, position - 1 : position])
        logits = model.logits(model.hidden_states(step, None, cache)[:, -1]).numpy()
        # The largest of logits plus Gumbel noise is a sample of their softmax.
        noise = rng.gumbel(size=logits.shape).astype(np.float32)
        streams[:, position] = np.argmax(logits + noise, axis=1)
    return streams


def sample_documents(
    model: Ernie, begin: int, end: int, tokens: int, window: int, seed: int, threads: int
) -> Iterator[list[int]]:
    """Documents as token lists, about `tokens` tokens in all, in streams of `window`.

    The same seed gives the same documents for any number of threads.
    """
    count = max(1, tokens // window)
    sizes = [min(ROWS, count - first) for first in range(0, count, ROWS)]

    def batch(index: int) -> np.ndarray:
        return sample_streams(model, begin, sizes[index], window, [seed, index])

    with ThreadPoolExecutor(threads) as pool:
        for streams in pool.map(batch, range(len(sizes))):
            for stream in streams:
                ends = np.flatnonzero(stream == end)
                for part in np.split(stream, ends):
                    document = [token for token in part.tolist() if token not in (begin, end)]
                    if document:
                        yield document
