# SPDX-License-Identifier: Apache-2.0
"""What this machine and environment offer: processors, and Paddle where a command needs it."""

from __future__ import annotations

import os
import warnings

from .errors import CcqError


def default_threads() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def require_paddle(purpose: str) -> None:
    """Import Paddle, which only some commands need and which is therefore an extra.

    Raises:
        CcqError: if it is not installed, saying what (`purpose`) needs it and how to get it.
    """
    try:
        with warnings.catch_warnings():
            # Paddle warns at import about compilers that only building operators needs.
            warnings.simplefilter("ignore")
            import paddle  # noqa: F401
    except ImportError as error:
        raise CcqError(
            f"{purpose} needs Paddle; install it with: pip install 'paddle-ccq[eval]'"
            f" (import paddle: {error})"
        ) from None
