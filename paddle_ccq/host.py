# SPDX-License-Identifier: Apache-2.0
"""What this machine and environment offer: processors, and Paddle where a command needs it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .errors import CcqError


def default_threads() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Beyond any machine; the core counts threads in 32 bits.
MOST_THREADS = 1 << 16


def thread_count(threads: int | None) -> int:
    """The number asked for, or all processors.

    Raises:
        CcqError: for a number below 1, and for one that no machine has.
    """
    if threads is not None and threads < 1:
        raise CcqError(f"--threads {threads}: must be at least 1")
    if threads is not None and threads > MOST_THREADS:
        raise CcqError(f"--threads {threads}: must be at most {MOST_THREADS}")
    return threads or default_threads()


def on_stripes(work: Callable[[slice], object], count: int, least: int) -> list[object]:
    """What `work` returns for slices that cover range(count), in order; all processors share them.

    NumPy lets go of the interpreter within a call, so its work on single slices runs side by side.

    Args:
        least: items in a slice, except in the last one, which has what is left.
    """
    threads = default_threads()
    step = max(least, -(-count // (4 * threads)))
    stripes = [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]
    if threads == 1 or len(stripes) < 2:
        return [work(stripe) for stripe in stripes]
    with ThreadPoolExecutor(min(threads, len(stripes))) as pool:
        return list(pool.map(work, stripes))


def proc_bytes(path: str | os.PathLike[str], key: str) -> int | None:
    """The bytes that a line "KEY: N kB" of a file of /proc states; None where there is none."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(f"{key}:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def available_memory(path: str | os.PathLike[str] = "/proc/meminfo") -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    return proc_bytes(path, "MemAvailable")


def use_fast_products(cpuinfo: str = "/proc/cpuinfo") -> None:
    """Let the math library of Paddle's CPU build use AVX2 where it would not.

    That library (MKL 2019) takes its slowest path on processors of other makers than its own: on
    an AMD EPYC a product runs at 38 GFLOP/s a core, and at 90 with the variable that names the
    AVX2 path. It is read at the library's first product; who has set it keeps their choice.
    """
    try:
        with open(cpuinfo, encoding="ascii", errors="replace") as file:
            first = file.read(8192)
    except OSError:
        return
    if "AuthenticAMD" in first and " avx2 " in first and " fma " in first:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


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
