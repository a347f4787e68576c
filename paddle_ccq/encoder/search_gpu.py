# SPDX-License-Identifier: Apache-2.0
"""The encoders with their search on a GPU: the bytes of the CPU, many times faster."""

from __future__ import annotations

import numpy as np

from ..ops import gpu, gpu_ldlq, gpu_trellis, gpu_trellis_ldlq
from .ldlq import LdlqEncoder, Prepared
from .ldlq_metric import LdlqMetric
from .search import SearchEncoder
from .trellis import TrellisEncoder
from .trellis_ldlq import TrellisLdlqEncoder
from .trellis_metric import TrellisMetric


class GpuSearchEncoder(SearchEncoder):
    """SearchEncoder on the first GPU (see MatrixEncoder); needs the compiled GPU library."""

    def _search(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        found, _ = gpu.encode(weight, self._books, self._layout.as_dict(), self._recipe.as_dict())
        return found


class GpuTrellisEncoder(TrellisEncoder):
    """TrellisEncoder on the first GPU; needs the compiled GPU library."""

    def _search(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        found, _ = gpu_trellis.trellis(weight, self._recipe.as_dict())
        return found


class GpuLdlqEncoder(LdlqEncoder):
    """LdlqEncoder on the first GPU; needs the compiled GPU library."""

    def _find(self, prepared: Prepared, metric: LdlqMetric) -> dict[str, np.ndarray]:
        found, _ = gpu_ldlq.ldlq(
            prepared.weight,
            metric.as_dict(),
            self._books,
            prepared.supers,
            self._recipe.as_dict(),
        )
        return found


class GpuTrellisLdlqEncoder(TrellisLdlqEncoder):
    """TrellisLdlqEncoder on the first GPU; needs the compiled GPU library."""

    def _find(self, prepared: Prepared, metric: TrellisMetric) -> dict[str, np.ndarray]:
        found, _ = gpu_trellis_ldlq.trellis_ldlq(
            prepared.weight, metric.as_dict(), prepared.supers, self._recipe.as_dict()
        )
        return found
