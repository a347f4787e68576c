# SPDX-License-Identifier: Apache-2.0
"""Sizes as people read them: decimal for disks and downloads, binary for memory."""

from __future__ import annotations


def gigabytes(size: float) -> str:
    """A size in GB (1e9 bytes), or MB where that says more."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def gibibytes(size: float) -> str:
    """A size in GiB (2^30 bytes), as tools for memory say it, or MiB where that says more."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
