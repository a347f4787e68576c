# SPDX-License-Identifier: Apache-2.0
"""The data-free search of ccq-2t on the GPU, over NumPy arrays in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import checks, gpu_library
from .gpu_library import MAX_KAPPAS, TrellisArgs

# custom_ops/gpu/encode/trellis.h.
MAX_TRIES, MAX_BEAM = 15, 65534
MAX_N, MAX_K = 1 << 24, 1 << 20
# Device memory for the survivors' costs of the channels in flight: 128 bytes for each of their
# weights. An H200 filled with channels of 8,192 rows takes 4.4 GiB at the default preset; with less
# there are fewer channels at a time, and the same result.
RUN_BYTES = 6 << 30


def trellis(
    weight: np.ndarray, recipe: Mapping[str, Any], run_bytes: int = RUN_BYTES
) -> tuple[dict[str, np.ndarray], float]:
    """What _core.trellis returns for the same arguments, bit for bit, and milliseconds of kernels.

    Args:
        weight: float32 [N, K], 64 | K, finite.
        recipe: TrellisRecipe.as_dict().
        run_bytes: device memory for the channels in flight; halved where the device has less.

    Raises:
        ValueError: naming the argument that does not fit.
        CcqError: without the GPU library, or when the GPU fails.
    """
    weight = checks.channels(weight)
    n, k = weight.shape
    tries = recipe["window_high"] - recipe["window_low"] + 1
    for name, value, low, high in (
        ("n", n, 1, MAX_N),
        ("k", k, 64, MAX_K),
        ("kappas", len(recipe["kappas"]), 1, MAX_KAPPAS),
        ("local scales", tries, 1, MAX_TRIES),
        ("beam", recipe["beam"], 0, MAX_BEAM),
    ):
        checks.within(name, value, low, high)
    library = gpu_library.load()
    found = {
        "words": np.empty((n, k // 64, 16), np.uint8),
        "scales": np.empty((n, k // 64), np.uint8),
        "supers": np.empty(n, np.float32),
        "sums": np.empty((n, 3), np.float64),
    }
    args = TrellisArgs(
        weight=weight.ctypes.data,
        n=n,
        k=k,
        nominal=recipe["nominal"],
        kappas=tuple(recipe["kappas"]),
        kappa_count=len(recipe["kappas"]),
        window_low=recipe["window_low"],
        window_high=recipe["window_high"],
        beam=recipe["beam"],
        run_bytes=run_bytes,
        **{name: array.ctypes.data for name, array in found.items()},
    )
    if library.ccq_trellis_workspace(ctypes.byref(args)) == 0:
        raise ValueError(f"run_bytes {run_bytes}: too little for the channels of one block")
    milliseconds = ctypes.c_float()
    status = library.ccq_trellis_host(ctypes.byref(args), ctypes.byref(milliseconds))
    gpu_library.check(library, status, "encoding")
    return found, milliseconds.value


def held_bytes() -> int:
    """Device memory that the search keeps for its next call."""
    return int(gpu_library.load().ccq_trellis_held_bytes())
