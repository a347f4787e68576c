# SPDX-License-Identifier: Apache-2.0
"""The GPU library's searches of ccq-2t and with statistics, compiled for the processor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("common/library.cu", "encode/trellis.cu", "encode/host_trellis.cu"),
    *("encode/trellis_ldlq.cu", "encode/host_trellis_ldlq.cu"),
    *("ldlq/ldlq.cu", "ldlq/host_ldlq.cu"),
)
# As setup.py compiles the CPU's core: no fused operations. Contexts are switched by longjmp, which
# the fortified C library takes for an attack.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-w")


def build(folder: Path) -> Path:
    """The library in `folder`; skips the tests where that can't be."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the emulated GPU needs g++ and Linux")
    library = folder / "libemulated.so"
    host = ROOT / "tests" / "cuda_host"
    sources = [*(ROOT / "custom_ops" / "gpu" / name for name in SOURCES), host / "machine.cpp"]
    command = [compiler, *FLAGS, f"-I{host}", "-o", str(library), "-x", "c++", *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return library


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """What the device's search found is what the core finds, byte for byte."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes(), name
