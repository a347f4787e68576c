# SPDX-License-Identifier: Apache-2.0
"""Builds paddle_ccq._core and, where CCQ_BUILD_GPU asks for it, the GPU library of a wheel.

Everything else about the package stands in pyproject.toml.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

SOURCES = "custom_ops/cpu"
# One object per instruction set; dispatch.cpp picks at run time: one wheel serves all processors.
X86_FLAGS = {
    "score_avx2.cpp": ["-mavx2"],
    "score_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
    "ldlq_avx2.cpp": ["-mavx2"],
    "ldlq_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
    "trellis_avx2.cpp": ["-mavx2"],
    "trellis_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
    "trellis_avx512vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
    "score_avx512vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
    "matmul_avx2.cpp": ["-mavx2", "-mfma"],
    "floats_avx2.cpp": ["-mavx2", "-mfma"],
    "floats_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
    "matmul_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
    "matmul_avx512vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildCore(build_ext):
    """build_ext with extra compiler flags for single files, and the GPU library beside them."""

    def run(self):
        super().run()
        asked = os.environ.get("CCQ_BUILD_GPU", "0")
        here = Path(__file__).resolve().parent
        build = runpy.run_path(str(here / "paddle_ccq" / "ops" / "gpu_build.py"))
        try:
            architectures = build["wheel_architectures"](asked)
        except ValueError as error:
            sys.exit(f"error: CCQ_BUILD_GPU={asked}: {error}")
        if not architectures:
            return
        if shutil.which("nvcc") is None:
            sys.exit(f"error: CCQ_BUILD_GPU={asked}: nvcc is not on PATH; install the CUDA toolkit")
        folder = Path(self.get_ext_fullpath("paddle_ccq._core")).parent
        output = folder / build["PACKAGED"]
        command = build["nvcc_command"](here / "custom_ops" / "gpu", output, architectures)
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, extension, cc_args, extra_postargs, pp_opts):
            flags = X86_FLAGS.get(src.rsplit("/", 1)[-1], []) if IS_X86 else []
            compile_one(obj, src, extension, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


core = Pybind11Extension(
    "paddle_ccq._core",
    sources=[
        f"{SOURCES}/{name}.cpp"
        for name in (
            "module",
            "encode",
            "dispatch",
            "score_plain",
            "score_avx2",
            "score_avx512",
            "score_avx512vnni",
            "ops_module",
            "dequant",
            "matmul",
            "matmul_plain",
            "matmul_avx2",
            "matmul_avx512",
            "matmul_avx512vnni",
            "floats_module",
            "dense",
            "attention",
            "floats_plain",
            "floats_avx2",
            "floats_avx512",
            "ldlq",
            "ldlq_plain",
            "ldlq_avx2",
            "ldlq_avx512",
            "trellis",
            "trellis_ldlq",
            "trellis_plain",
            "trellis_avx2",
            "trellis_avx512",
            "trellis_avx512vnni",
        )
    ],
    depends=[
        *glob(f"{SOURCES}/*.h"),
        *glob(f"{SOURCES}/*.inc"),
        "custom_ops/gpu/common/trellis_code.h",
    ],
    include_dirs=[SOURCES],
    cxx_std=17,
    # No contraction: a fused multiply-add rounds once where the encoder's definition rounds twice.
    # psabi: vectors wider than the registers are passed between inlined functions only.
    extra_compile_args=[
        "-O3",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-pthread",
        "-Wno-psabi",
    ],
    extra_link_args=["-pthread"],
)

setup(ext_modules=[core], cmdclass={"build_ext": BuildCore})
