# SPDX-License-Identifier: Apache-2.0
"""The encoder's search and the decoder on the GPU, over NumPy arrays in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..codec.floats import RUNTIME_DTYPES
from . import checks, gpu_library
from .gpu_library import DequantArgs, EncodeArgs, EncodeLayout, EncodeRecipe

_RUNTIMES = ("bfloat16", "float16", "float32")


def _pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _layout(layout: Mapping[str, Any], books: Sequence[np.ndarray]) -> EncodeLayout:
    """The CPU core's layout (lane sets) with every vector on its own."""
    out = EncodeLayout(books=len(books))
    for s in layout["sets"]:
        for lane in range(s["lanes"]):
            v = out.vector[out.vectors]
            v.book, v.dims, v.shift = s["book"], s["dims"], s["shift"]
            v.first, v.word = s["first"] + lane * s["stride"], s["word"] + lane
            out.vectors += 1
    for b, book in enumerate(books):
        out.entries[b] = len(book)
    for name in ("words", "fraction", "state_min", "state_max", "remainder_shift", "scale_max"):
        setattr(out, name, layout[name])
    return out


def _recipe(recipe: Mapping[str, Any]) -> EncodeRecipe:
    out = EncodeRecipe(kappa_count=len(recipe["kappas"]), ratio_count=len(recipe["ratios"]))
    out.kappas[: len(recipe["kappas"])] = recipe["kappas"]
    out.ratios[: len(recipe["ratios"])] = recipe["ratios"]
    for name in ("nominal", "window_low", "window_high", "refits", "keep_pairs"):
        setattr(out, name, recipe[name])
    return out


def _entries(pairs: Sequence[Sequence[np.ndarray]], fraction: int) -> np.ndarray:
    """int32 [all entries, 2], by pair and book: four int8 states (zeros where fewer), -norm / 2."""
    books = []
    for pair in pairs:
        for book in pair:
            states = np.zeros((len(book), 4), np.int8)
            states[:, : book.shape[1]] = book
            half_norm = (book.astype(np.int64) ** 2).sum(axis=1) << (fraction - 1)
            packed = np.stack([states.view(np.int32)[:, 0], -half_norm.astype(np.int32)], axis=1)
            books.append(packed)
    return np.ascontiguousarray(np.concatenate(books), np.int32)


def encode_arguments(
    pairs: Sequence[Sequence[np.ndarray]], layout: Mapping[str, Any], recipe: Mapping[str, Any]
) -> tuple[np.ndarray, list[int], list[int]]:
    """What the Paddle op ccq_encode takes beside the weight: entries, layout, recipe.

    The last two are the C structures as int32 words, so that doubles keep all their bits.
    """
    structures = _layout(layout, pairs[0]), _recipe(recipe)
    words = [np.frombuffer(bytes(s), np.int32).tolist() for s in structures]
    entries = _entries(pairs, layout["fraction"]).reshape(len(pairs), -1, 2)
    return entries, words[0], words[1]


def encode(
    weight: np.ndarray,
    pairs: Sequence[Sequence[np.ndarray]],
    layout: Mapping[str, Any],
    recipe: Mapping[str, Any],
    timed: bool = False,
) -> tuple[dict[str, np.ndarray], float | None]:
    """ccq_encode: what the CPU core's encode() returns, bit for bit, and milliseconds of kernel.

    Args:
        weight: float32 [N, K], 64 | K, finite.
        pairs: code books of every pair.
        layout: SearchLayout.as_dict().
        recipe: Recipe.as_dict().
        timed: measure the kernel, which keeps copies and kernel from overlapping; else None.

    Raises:
        ValueError: naming the argument that does not fit.
        CcqError: without the GPU library, or when the GPU fails.
    """
    weight = checks.array(weight, "weight")
    if weight.dtype != np.float32 or weight.ndim != 2 or weight.shape[1] % 64 or not weight.size:
        raise ValueError(
            f"weight must be float32 [N, K] with 64 | K, got {weight.dtype}{list(weight.shape)}"
        )
    library = gpu_library.load()
    n, k = weight.shape
    found = {
        "words": np.empty((n, k // 64, layout["words"]), np.uint16),
        "scales": np.empty((n, k // 64), np.uint16),
        "supers": np.empty(n, np.float32),
        "pairs": np.empty(n, np.int32),
        "sums": np.empty((n, 3), np.float64),
    }
    entries = _entries(pairs, layout["fraction"])
    args = EncodeArgs(
        weight=_pointer(weight),
        n=n,
        k=k,
        layout=_layout(layout, pairs[0]),
        recipe=_recipe(recipe),
        entries=_pointer(entries),
        pairs=len(pairs),
        words=_pointer(found["words"]),
        scales=_pointer(found["scales"]),
        supers=_pointer(found["supers"]),
        chosen=_pointer(found["pairs"]),
        sums=_pointer(found["sums"]),
    )
    if not timed:
        status = library.ccq_encode_overlapped(ctypes.byref(args))
        gpu_library.check(library, status, "encoding")
        return found, None
    milliseconds = ctypes.c_float()
    status = library.ccq_encode_host(ctypes.byref(args), ctypes.byref(milliseconds))
    gpu_library.check(library, status, "encoding")
    return found, milliseconds.value


def dequant(format: str, tensors: Mapping[str, np.ndarray], dtype: str = "bfloat16") -> np.ndarray:
    """ccq_dequant on the GPU: as ops.dequant, bit for bit.

    Raises:
        ValueError: naming the tensor or argument that does not fit; ccq-2t is decoded by the CPU's
            operator alone.
        CcqError: without the GPU library, or when the GPU fails.
    """
    if dtype not in RUNTIME_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(RUNTIME_DTYPES)}, got {dtype!r}")
    found, k, n = checks.stored(format, tensors)
    number = checks.decoded_on_gpu(format)
    library = gpu_library.load()
    out = np.empty((k, n), RUNTIME_DTYPES[dtype])
    args = DequantArgs(
        format=number,
        runtime=_RUNTIMES.index(dtype),
        k=k,
        n=n,
        out=_pointer(out),
        **{suffix: _pointer(value) for suffix, value in found.items()},
    )
    status = library.ccq_dequant_host(ctypes.byref(args))
    gpu_library.check(library, status, "decoding")
    return out
