# SPDX-License-Identifier: Apache-2.0
"""Builds and installs the Paddle GPU ops as the module paddle_ccq_ops.

    pip install --no-build-isolation ./custom_ops

needs paddlepaddle-gpu, nvcc and an NVIDIA GPU of compute capability 8.0 or more. On a machine
without a GPU name the targets: CCQ_CUDA_ARCHITECTURES="80;90".
"""

import os
import runpy
import shutil
import sys
from pathlib import Path


def stop(message):
    sys.exit(f"error: {message}")


try:
    import paddle
    from paddle.utils.cpp_extension import CUDAExtension, setup
except ImportError as missing:
    stop(
        f"{missing}; install paddlepaddle-gpu from Paddle's index first and then run "
        "`pip install --no-build-isolation ./custom_ops`"
    )
if not paddle.is_compiled_with_cuda():
    stop("this paddlepaddle is the CPU build; the ops need paddlepaddle-gpu")
if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
    stop(
        "nvcc is not on PATH and CUDA_HOME is not set; install the CUDA toolkit of paddlepaddle-gpu"
    )

listed = os.environ.get("CCQ_CUDA_ARCHITECTURES")
if listed:
    targets = [int(a) for a in listed.replace(",", ";").split(";") if a]
elif paddle.device.cuda.device_count():
    major, minor = paddle.device.cuda.get_device_capability(0)
    targets = [10 * major + minor]
else:
    stop('no GPU here; name the targets, for example CCQ_CUDA_ARCHITECTURES="80;90"')
if min(targets) < 80:
    stop(
        f"compute capability {min(targets) / 10} is too old; the kernels need 8.0 (Ampere) or more"
    )

here = Path(__file__).resolve().parent
os.chdir(here)
recipe = here.parent / "paddle_ccq" / "ops" / "gpu_build.py"
if not recipe.exists():
    stop(f"{recipe}: not there; build the ops from a checkout of paddle-ccq")
build = runpy.run_path(str(recipe))
sources = [f"gpu/{name}" for name in build["device_sources"]()]
sources += sorted(str(path.relative_to(here)) for path in here.glob("paddle/*.cu"))
code = build["target_flags"](targets)

setup(
    name="paddle_ccq_ops",
    version="0.1.0",
    license="Apache-2.0",
    description="Paddle GPU ops on weights of 2 to 2.75 bits (paddle-ccq)",
    ext_modules=CUDAExtension(
        sources=sources,
        extra_compile_args={
            "cxx": ["-O3", "-std=c++17"],
            "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", *code],
        },
    ),
)
