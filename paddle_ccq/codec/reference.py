# SPDX-License-Identifier: Apache-2.0
"""Algorithms 2 and 3 of the paper, element by element: slow, and meant to be read.

The vectorised decoders (wint2.py, spare_scale.py) are tested against these. One column of one
group at a time; names are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def algorithm_2(
    W_q: Sequence[int],
    s_super: float,
    zp: int,
    W_shift: Sequence[int],
    w_mask: int,
    s_mask: int,
    group_size: int = 64,
) -> np.ndarray:
    """Dequantization without code cluster: the words of one group -> float64 [group_size]."""
    p_w = len(W_shift)
    s_uint = W_q[-1]
    s = (s_uint & s_mask) * s_super
    W_dq = np.empty(group_size)
    for idx in range(group_size):
        q_w = W_q[idx // p_w]
        w_uint = (q_w >> W_shift[idx % p_w]) & w_mask
        W_dq[idx] = (w_uint - zp) * s
    return W_dq


def algorithm_3(
    W_q: Sequence[int],
    s_q: int,
    s_super: float,
    zp: int,
    s_code: float,
    zp_code: float,
    W_shift: Sequence[int],
    s_shift: int,
    w_mask: int,
    s_mask: int,
    group_size: int = 64,
) -> np.ndarray:
    """Dequantization with code cluster: the bytes of one group -> float64 [group_size].

    The paper prints `>> s_shift` once more on the second expansion of w_uint; the shift of the
    scale has no meaning there and is read as a slip. `round` is half up, as in FastDeploy.
    """
    s = ((s_q >> s_shift) & s_mask) * s_super
    p_w = len(W_shift)
    W_dq = np.empty(group_size)
    for idx in range(group_size):
        q_w = W_q[idx // p_w]
        w_uint = math.floor(q_w * s_code + zp_code + 0.5)
        w_uint = (w_uint >> W_shift[idx % p_w]) & w_mask
        W_dq[idx] = (w_uint - zp) * s
    return W_dq
