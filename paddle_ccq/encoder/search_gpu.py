# SPDX-License-Identifier: Apache-2.0
"""The data-free encoder with its search on a GPU: the bytes of the CPU, many times faster."""

from __future__ import annotations

import numpy as np

from ..ops import gpu
from .search import SearchEncoder


class GpuSearchEncoder(SearchEncoder):
    """SearchEncoder on the first GPU (see MatrixEncoder); needs the compiled GPU library."""

    def _search(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        found, _ = gpu.encode(weight, self._books, self._layout.as_dict(), self._recipe.as_dict())
        return found
