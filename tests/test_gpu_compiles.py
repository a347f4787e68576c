# SPDX-License-Identifier: Apache-2.0
"""The GEMM's device code compiles for the oldest and the newest architecture supported."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "custom_ops" / "gpu"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("source", ["repack.cu", "moe_gemm.cu"])
def test_compiles(tmp_path, source, arch):
    command = ["nvcc", "-std=c++17", "-O1", "-c", str(SOURCES / source), "-o", str(tmp_path / "o")]
    command.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, done.stderr[-2000:]
