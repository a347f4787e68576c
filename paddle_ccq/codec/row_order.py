# SPDX-License-Identifier: Apache-2.0
"""The order of input rows inside a 64-group that FastDeploy 2.1 and later expect of WINT2.

Its fused kernel reads B fragments straight from the packed bytes, so rows are stored in the order
in which the tensor-core fragment wants them: stored row 16a + 2b + c of a group holds input row
8b + 2a + c (a in 0..3, b in 0..7, c in 0..1). The permutation happens before quantizing; groups and
their scales stay where they are. Nothing in the file tells the two orders apart. FastDeploy 2.0
used plain order.
"""

from __future__ import annotations

import numpy as np

from .convolution import GROUP

FASTDEPLOY_2_1 = "fastdeploy-2.1"
PLAIN = "plain"
ROW_ORDERS = (FASTDEPLOY_2_1, PLAIN)

# STORED_FROM_INPUT[s] is the input row that stored row s holds.
STORED_FROM_INPUT: np.ndarray = np.arange(GROUP).reshape(8, 4, 2).swapaxes(0, 1).reshape(GROUP)
INPUT_FROM_STORED: np.ndarray = np.argsort(STORED_FROM_INPUT)


def _reorder(weight: np.ndarray, order: np.ndarray, axis: int) -> np.ndarray:
    size = weight.shape[axis]
    if size % GROUP:
        raise ValueError(f"axis {axis} has {size} rows; row groups need a multiple of {GROUP}")
    index = (np.arange(0, size, GROUP)[:, None] + order).reshape(-1)
    return np.take(weight, index, axis=axis)


def permute_rows(weight: np.ndarray, axis: int = 0) -> np.ndarray:
    """Input order -> FastDeploy's stored order along `axis` (the K axis), same shape and dtype."""
    return _reorder(weight, STORED_FROM_INPUT, axis)


def unpermute_rows(weight: np.ndarray, axis: int = 0) -> np.ndarray:
    """FastDeploy's stored order -> input order along `axis`: the inverse of permute_rows."""
    return _reorder(weight, INPUT_FROM_STORED, axis)
