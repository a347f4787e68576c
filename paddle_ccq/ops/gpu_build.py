# SPDX-License-Identifier: Apache-2.0
"""How the GPU library is compiled; imports nothing of the package: setup scripts run it alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# The one list of sources, relative to custom_ops/gpu; every build of the device code takes it.
SOURCES = (
    *("common/library.cu", "common/host.cu", "common/dequant.cu"),
    *("encode/encode.cu", "encode/host_encode.cu", "encode/trellis.cu", "encode/host_trellis.cu"),
    *("encode/trellis_ldlq.cu", "encode/trellis_ldlq_narrow.cu", "encode/host_trellis_ldlq.cu"),
    *("ldlq/ldlq.cu", "ldlq/host_ldlq.cu"),
    *("moe/repack.cu", "moe/moe_gemm.cu", "moe/few_stream.cu", "moe/some_stream.cu"),
    "moe/wide_halves.cu",
    *("moe/trellis_repack.cu", "moe/trellis_gemm.cu", "moe/activation.cu", "moe/dispatch.cu"),
    *("moe/moe_block.cu", "moe/linear_ccq.cu", "moe/linear_w8.cu", "moe/linear_w4.cu"),
    "moe/router.cu",
)
# The library's name in a wheel that brings it.
PACKAGED = "_gpu_packaged.so"
# Compute capabilities times ten: of a build for this machine, and of a wheel for others.
ARCHITECTURES = (80, 90)
WHEEL_ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def wheel_architectures(asked: str) -> tuple[int, ...]:
    """What CCQ_BUILD_GPU asks for: "1" all of them, "80,90" these, "0" or "" no library.

    Raises:
        ValueError: for anything else.
    """
    if asked in ("", "0", "1"):
        return WHEEL_ARCHITECTURES if asked == "1" else ()
    known = {str(a): a for a in WHEEL_ARCHITECTURES}
    chosen = asked.split(",")
    if not set(chosen) <= set(known):
        raise ValueError(f"neither 0, nor 1 for all, nor some of {','.join(known)}")
    return tuple(known[a] for a in chosen)


def device_sources() -> list[str]:
    """SOURCES without those that copy from and to host memory, for callers without a framework."""
    return [name for name in SOURCES if not Path(name).name.startswith("host")]


def target_flags(architectures: Sequence[int]) -> list[str]:
    """nvcc's flags for compute capabilities times ten (90 is an H100 or H200)."""
    # Hopper's own instructions need the "a" target; the choice of kernels must know of it.
    suffixed = [f"{a}a" if a == 90 else str(a) for a in architectures]
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in suffixed]
    return code + (["-DCCQ_SM90A"] if 90 in architectures else [])


def nvcc_command(
    folder: Path, output: Path, architectures: Sequence[int], flags: Sequence[str] = ()
) -> list[str]:
    """The command that compiles the sources in `folder` into one shared library.

    Args:
        flags: more of nvcc's, for measurements and tests.
    """
    command = ["nvcc", "-std=c++17", "-O3", "-t0", "-shared", "-Xcompiler", "-fPIC"]
    command += [*target_flags(architectures), *flags, "-o", str(output)]
    return [*command, *(str(folder / name) for name in SOURCES)]
