# SPDX-License-Identifier: Apache-2.0
"""GPU sources that no longer compile. Minutes of nvcc: runs where PADDLE_CCQ_COMPILE_CHECK is set.

PADDLE_CCQ_COMPILE_CHECK lists compute capabilities, for example "80 90a". No GPU is needed, and of
Paddle only the headers of its wheel (the CPU one will do).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from paddle_ccq.ops import gpu_build

SOURCES = Path(__file__).resolve().parents[1] / "custom_ops"
TARGETS = os.environ.get("PADDLE_CCQ_COMPILE_CHECK", "").split()
if not TARGETS or not shutil.which("nvcc"):
    pytest.skip("PADDLE_CCQ_COMPILE_CHECK is not set, or no nvcc", allow_module_level=True)


def compile_only(source: Path, target: Path, flags: list[str]) -> None:
    code = gpu_build.target_flags([int(target.removesuffix("a")) for target in TARGETS])
    command = ["nvcc", "-std=c++17", "-O2", "-Xcompiler", "-fPIC", "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(target), *code, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", gpu_build.SOURCES)
def test_device_code_compiles(name: str, tmp_path: Path) -> None:
    compile_only(SOURCES / "gpu" / name, tmp_path / "out.o", [])


@pytest.mark.parametrize("name", sorted(p.name for p in (SOURCES / "paddle").glob("*.cu")))
def test_registration_compiles_against_installed_paddle(name: str, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("paddle")
    if spec is None:
        pytest.skip("no paddle")
    include = Path(spec.submodule_search_locations[0]) / "include"
    compat = include / "paddle/phi/api/include/compat"
    folders = [include, include / "third_party", compat, compat / "torch/csrc/api/include"]
    flags = [f"-I{f}" for f in (*folders, sysconfig.get_paths()["include"])]
    # Without Python's parts the headers do not ask for the CUDA math libraries.
    flags += ["-DPADDLE_WITH_CUDA", "-DPADDLE_NO_PYTHON"]
    flags += ["--expt-relaxed-constexpr", "--expt-extended-lambda"]
    compile_only(SOURCES / "paddle" / name, tmp_path / "out.o", flags)
