# SPDX-License-Identifier: Apache-2.0
"""The calibrated search on the GPU, over NumPy arrays in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import checks, gpu_library
from .gpu_library import LdlqArgs

# Device memory for the runs in flight, beside the matrices: all of the 300B's largest expert
# matrix at the default preset. With less there are fewer channels at a time, and the same result.
RUN_BYTES = 4 << 30
LIMITS = {"n": 1 << 20, "k": 1 << 17, "pairs": 1024, "candidates": 64, "local scales": 8}
TIMES = ("upload", "pairs", "feedback", "descent", "download")


def ldlq(
    weight: np.ndarray,
    metric: Mapping[str, np.ndarray],
    books: np.ndarray,
    supers: np.ndarray,
    recipe: Mapping[str, Any],
    run_bytes: int = RUN_BYTES,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What _core.ldlq returns for the same arguments, bit for bit, and milliseconds by part.

    Args:
        weight: float32 [N, K], 64 | K.
        metric: LdlqMetric.as_dict(), float32, finite.
        books: float32 [pairs, 4, 256].
        supers: float32 [candidates, N].
        recipe: LdlqRecipe.as_dict().
        run_bytes: device memory for the runs in flight; halved where the device has less.

    Raises:
        ValueError: naming the argument that does not fit.
        CcqError: without the GPU library, or when the GPU fails.
    """
    arrays = _checked(weight, metric, books, supers, recipe)
    n, k = arrays["weight"].shape
    library = gpu_library.load()
    # On the device a book's entries lie whole, one behind the other.
    arrays["books"] = np.ascontiguousarray(arrays["books"].transpose(0, 2, 1))
    found = {
        "words": np.empty((n, k // 4), np.uint16),
        "scales": np.empty((n, k // 64), np.uint16),
        "supers": np.empty(n, np.float32),
        "pairs": np.empty(n, np.int32),
        "loss": np.empty(n, np.float64),
    }
    args = LdlqArgs(
        n=n,
        k=k,
        **{name: array.ctypes.data for name, array in arrays.items()},
        pairs=len(books),
        candidates=len(supers),
        nominal=recipe["nominal"],
        low=recipe["window_low"],
        high=recipe["window_high"],
        keep_pairs=recipe["keep_pairs"],
        sweeps=recipe["sweeps"],
        run_bytes=run_bytes,
        words=found["words"].ctypes.data,
        scales=found["scales"].ctypes.data,
        found_supers=found["supers"].ctypes.data,
        found_pairs=found["pairs"].ctypes.data,
        loss=found["loss"].ctypes.data,
    )
    if library.ccq_ldlq_workspace(ctypes.byref(args)) == 0:
        raise ValueError(f"run_bytes {run_bytes}: too little for the runs of one channel")
    times = (ctypes.c_float * len(TIMES))()
    gpu_library.check(library, library.ccq_ldlq_host(ctypes.byref(args), times), "encoding")
    return found, dict(zip(TIMES, times, strict=True))


def _checked(
    weight: np.ndarray,
    metric: Mapping[str, np.ndarray],
    books: np.ndarray,
    supers: np.ndarray,
    recipe: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """All arrays by their name in LdlqArgs, contiguous, of shapes that belong together."""
    weight = checks.channels(weight)
    n, k = weight.shape
    arrays = {"books": checks.floats(books, "books"), "supers": checks.floats(supers, "supers")}
    pairs, candidates = len(books), len(supers)
    shapes = {"books": (pairs, 4, 256), "supers": (candidates, n)}
    of_metric = {"h": (k, k), "feedback": (k, k)}
    of_metric |= dict.fromkeys(("d_root", "h_root", "h_inverse"), (k // 4, 4, 4))
    arrays |= {name: checks.floats(metric[name], name) for name in of_metric}
    for name, shape in (shapes | of_metric).items():
        checks.shape(arrays[name], shape, name)
    tries = recipe["window_high"] - recipe["window_low"] + 1
    sizes = {"n": n, "k": k, "pairs": pairs, "candidates": candidates, "local scales": tries}
    for name, most in LIMITS.items():
        checks.within(name, sizes[name], 1, most)
    if recipe["keep_pairs"] < 1 or recipe["sweeps"] < 0:
        raise ValueError("keep_pairs must be at least 1, sweeps at least 0")
    return {"weight": weight, **arrays}


def held_bytes() -> int:
    """Device memory that the search keeps for its next call."""
    return int(gpu_library.load().ccq_ldlq_held_bytes())
