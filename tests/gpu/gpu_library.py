# SPDX-License-Identifier: Apache-2.0
"""The kernels' library for tests that drive it through ctypes and torch."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

import ccqlib  # noqa: E402


@cache
def library(folder: Path) -> ccqlib.Library:
    """CCQ_GPU_LIBRARY, or what nvcc makes of the sources in `folder`."""
    path = os.environ.get("CCQ_GPU_LIBRARY")
    if not path:
        if not shutil.which("nvcc"):
            pytest.skip("neither CCQ_GPU_LIBRARY nor nvcc")
        path = str(folder / "libccq.so")
        major, minor = torch.cuda.get_device_capability()
        ccqlib.build(path, "90a" if major == 9 else f"{major}{minor}")
    return ccqlib.Library(path)
