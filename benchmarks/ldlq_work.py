# SPDX-License-Identifier: Apache-2.0
"""What the calibrated search has to do at a shape, counted, and how long that should take."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from paddle_ccq.encoder.ldlq import LdlqRecipe

# Counted beforehand. A term of a product is a multiplication and an addition; an entry of a book,
# at one local scale, came to 16.5 instructions in the compiled kernels, all that is done around the
# search included.
TERM, ENTRY = 2, 16.5
# Expected shares of the rate at which instructions can start, launches, and the host's copies.
PRODUCT_SHARE, SEARCH_SHARE = 0.80, 0.60
LAUNCH_SECONDS, COPY_BYTES, FETCH_BYTES = 3e-6, 9e9, 4e9
PARTS = ("pairs", "feedback", "descent")


@dataclass(frozen=True)
class Shape:
    """One kind of expert matrix, and how many of it a model has."""

    model: str
    name: str
    n: int
    k: int
    count: int


MODELS = ("ERNIE-4.5-21B", "ERNIE-4.5-300B")
# The wint2 expert matrices of the default plans (a test compares), written out so that this needs
# nothing but NumPy: 27 MoE layers of 64 experts, and 47 of 51 as the first four stay wint4.
SHAPES = (
    Shape("ERNIE-4.5-21B", "up_gate_proj", 3072, 2560, 1728),
    Shape("ERNIE-4.5-21B", "down_proj", 2560, 1536, 1728),
    Shape("ERNIE-4.5-300B", "up_gate_proj", 7168, 8192, 3008),
    Shape("ERNIE-4.5-300B", "down_proj", 8192, 3584, 3008),
)


def work(k: int, recipe: LdlqRecipe) -> dict[str, tuple[float, float, float]]:
    """Of each part, for each weight: terms of products, entries looked at; and launches."""
    later = (k - 64) / 2  # rows behind a weight's group
    screens = recipe.code_pairs > recipe.keep_pairs
    keep = recipe.keep_pairs if screens else recipe.code_pairs
    runs = keep * len(recipe.kappas)
    tries = recipe.window[1] - recipe.window[0] + 1
    launches = 2 * (k // 64) + k // 256
    sweeps = recipe.sweeps
    return {
        "pairs": (recipe.code_pairs * later, recipe.code_pairs * 64.0, launches)
        if screens
        else (0.0, 0.0, 0),
        "feedback": (runs * later, runs * tries * 64.0, launches),
        # H w once, H e before the first and after each sweep, and all moves of a sweep.
        "descent": ((2 + 2 * sweeps) * k, sweeps * 3 * 64.0, sweeps * (launches + 3))
        if sweeps
        else (0.0, 0.0, 0),
    }


def predicted(shape: Shape, recipe: LdlqRecipe, rate: float) -> dict[str, float]:
    """Milliseconds of each part; `rate` is instructions a second, of single threads."""
    weights = shape.n * shape.k
    out = {}
    for part, (terms, entries, launches) in work(shape.k, recipe).items():
        seconds = weights * TERM * terms / rate / PRODUCT_SHARE
        seconds += weights * ENTRY * entries / rate / SEARCH_SHARE
        out[part] = 1e3 * (seconds + launches * LAUNCH_SECONDS)
    # One matrix of factors and the weights go up before the search starts; words come back.
    out["upload"] = 1e3 * 4 * (shape.k**2 + weights) / COPY_BYTES
    out["download"] = 1e3 * weights / 2 / FETCH_BYTES
    return out


@dataclass(frozen=True)
class Device:
    """What the driver says of the first GPU."""

    name: str
    processors: int
    clock: float

    @property
    def rate(self) -> float:
        """Float32 instructions of single threads that can start in a second."""
        return self.processors * 128 * self.clock


def device() -> Device:
    driver = ctypes.CDLL("libcuda.so.1")
    name, value = ctypes.create_string_buffer(100), ctypes.c_int()
    assert driver.cuInit(0) == 0 and driver.cuDeviceGetName(name, 100, 0) == 0
    facts = []
    for attribute in (16, 13):  # multiprocessors, clock in kHz
        assert driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
        facts.append(value.value)
    return Device(name.value.decode(), facts[0], facts[1] * 1e3)
