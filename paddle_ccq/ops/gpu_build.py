# SPDX-License-Identifier: Apache-2.0
"""How the GPU library is compiled; imports nothing of the package, since setup.py runs it alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SOURCES = (
    *("library.cu", "encode.cu", "dequant.cu", "host.cu", "host_encode.cu"),
    *("ldlq.cu", "host_ldlq.cu", "repack.cu", "moe_gemm.cu", "activation.cu", "dispatch.cu"),
    *("moe_block.cu", "linear_ccq.cu", "linear_w8.cu"),
)
# The library's name in a wheel that brings it.
PACKAGED = "_gpu_packaged.so"
# Compute capabilities times ten: of a build for this machine, and of a wheel for others.
ARCHITECTURES = (80, 90)
WHEEL_ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def nvcc_command(folder: Path, output: Path, architectures: Sequence[int]) -> list[str]:
    """The command that compiles the sources in `folder` into one shared library."""
    # Hopper's own instructions need the "a" target; the choice of kernels must know of it.
    suffixed = [f"{a}a" if a == 90 else str(a) for a in architectures]
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in suffixed]
    code += ["-DCCQ_SM90A"] if 90 in architectures else []
    command = ["nvcc", "-std=c++17", "-O3", "-t0", "-shared", "-Xcompiler", "-fPIC", *code]
    return [*command, "-o", str(output), *(str(folder / name) for name in SOURCES)]
