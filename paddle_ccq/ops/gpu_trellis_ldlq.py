# SPDX-License-Identifier: Apache-2.0
"""The calibrated search of ccq-2t on the GPU, over NumPy arrays in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import checks, gpu_library
from .gpu_library import TrellisFactors, TrellisLdlqArgs

# custom_ops/gpu/encode/trellis_ldlq.h and trellis_ldlq.cu.
WINDOW = 68
MAX_N, MAX_K, MAX_BEAM = 1 << 19, 1 << 17, (1 << 22) - 1
_FACTORS = ("m", "root", "unit", "ratio", "spread")


def trellis_ldlq(
    weight: np.ndarray,
    metric: Mapping[str, np.ndarray],
    supers: np.ndarray,
    recipe: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], float]:
    """What _core.trellis_ldlq returns for these arguments, bit for bit, and milliseconds.

    Device memory: 0.3 GB on a device with 132 multiprocessors (more with fewer local scales in the
    window), 6 KB a channel, 20 bytes a weight, and the metric itself.

    Args:
        weight: float32 [N, K], 64 | K, of about unit rms.
        metric: TrellisMetric.as_dict(), float32, finite.
        supers: float32 [candidates, N].
        recipe: TrellisLdlqRecipe.as_dict().

    Raises:
        ValueError: naming the argument that does not fit.
        CcqError: without the GPU library, or when the GPU fails.
    """
    weight, supers = checks.channels(weight), checks.floats(supers, "supers")
    n, k = weight.shape
    if supers.ndim != 2 or not len(supers) or supers.shape[1] != n:
        raise ValueError(f"supers must be [candidates, {n}], got {list(supers.shape)}")
    arrays = _metric(metric, k)
    checks.within("n", n, 1, MAX_N)
    checks.within("k", k, 64, MAX_K)
    checks.within("beam", recipe["beam"], 0, MAX_BEAM)
    if recipe["window_low"] > 0 or recipe["window_high"] < 0 or recipe["sweeps"] < 0:
        raise ValueError("the window must hold 0, and sweeps be at least 0")
    library = gpu_library.load()
    found = {
        "words": np.empty((n, k // 64, 16), np.uint8),
        "scales": np.empty((n, k // 64), np.uint8),
        "supers": np.empty(n, np.float32),
        "loss": np.empty(n, np.float64),
    }
    args = TrellisLdlqArgs(
        n=n,
        k=k,
        weight=weight.ctypes.data,
        supers=supers.ctypes.data,
        candidates=len(supers),
        h=arrays["h"].ctypes.data,
        all=TrellisFactors(*(arrays[name].ctypes.data for name in _FACTORS)),
        windows=TrellisFactors(*(arrays[f"window_{name}"].ctypes.data for name in _FACTORS)),
        inverse=arrays["window_inverse"].ctypes.data,
        **{name: recipe[name] for name in ("nominal", "window_low", "window_high")},
        **{name: recipe[name] for name in ("beam", "sweeps")},
        words=found["words"].ctypes.data,
        scales=found["scales"].ctypes.data,
        found_supers=found["supers"].ctypes.data,
        loss=found["loss"].ctypes.data,
    )
    milliseconds = ctypes.c_float()
    status = library.ccq_trellis_ldlq_host(ctypes.byref(args), ctypes.byref(milliseconds))
    gpu_library.check(library, status, "encoding")
    return found, milliseconds.value


def held_bytes() -> int:
    """Device memory that the search keeps for its next call."""
    return int(gpu_library.load().ccq_trellis_ldlq_held_bytes())


def _metric(metric: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """The arrays of a TrellisMetric, held against the shapes for K rows."""
    groups, blocks = k // 64, WINDOW // 4
    shapes: dict[str, tuple[int, ...]] = {"h": (k, k), "m": (k, k), "root": (k // 4, 4, 4)}
    shapes |= dict.fromkeys(("unit", "ratio", "spread"), (k // 4,))
    shapes |= dict.fromkeys(("window_m", "window_inverse"), (groups, WINDOW, WINDOW))
    shapes["window_root"] = (groups, blocks, 4, 4)
    shapes |= dict.fromkeys(("window_unit", "window_ratio", "window_spread"), (groups, blocks))
    arrays = {name: checks.floats(metric[name], name) for name in shapes}
    for name, shape in shapes.items():
        checks.shape(arrays[name], shape, name)
    return arrays
