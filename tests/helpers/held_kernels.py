# SPDX-License-Identifier: Apache-2.0
"""The GPU library's exported functions and its choices of kernels, held still.

    python tests/helpers/held_kernels.py --write    # store those of the present sources

The functions are read from the sources. The choice is made on the host: nvcc compiles it, and it is
asked through a library that pretends to be the driver of a GPU (tests/held/pretended_gpu.cpp).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "custom_ops" / "gpu"
FOLDER = Path(__file__).resolve().parents[1] / "held"
STORED = FOLDER / "kernels.json"

# Id of the pretended device -> its name; tests/held/pretended_gpu.cpp has what each one answers.
DEVICES = {0: "H100 or H200", 1: "A100", 2: "RTX 4090"}
# (experts, n, k) of the benchmarks' layers and matrices (benchmarks/gpu/measure.py), and of the
# ERNIE-4.5-21B.
SHAPES = (
    (64, 7168, 8192),
    (64, 8192, 3584),
    (256, 1024, 7168),
    (256, 7168, 512),
    (64, 3072, 2560),
    (64, 2560, 1536),
    (1, 4096, 4096),
    (1, 1024, 4096),
    (1, 8192, 8192),
    (1, 1024, 8192),
)
TOP_K = 8
TOKENS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)


class GemmArgs(ctypes.Structure):
    """struct ccq_moe_gemm_args (custom_ops/gpu/moe/moe_gemm.h)."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "offsets", "quant", "scales", "columns")],
        *[(name, ctypes.c_void_p) for name in ("row_scale", "out", "workspace")],
        *[(name, ctypes.c_int) for name in ("rows", "k", "n", "experts")],
        *[(name, ctypes.c_int) for name in ("dtype", "pairs", "row_order")],
    ]


def exported() -> list[str]:
    """Functions that the sources define for other languages, without those for tuning."""
    found = set()
    for path in SOURCES.rglob("*.cu"):
        text = re.sub(r"#ifdef CCQ_TUNING.*?#endif", "", path.read_text("utf-8"), flags=re.DOTALL)
        found |= set(re.findall(r'extern "C" [\w\s*]*?\b(ccq_\w+)\(', text))
    return sorted(found)


def build(folder: Path) -> ctypes.CDLL:
    """The choice of kernels over a pretended GPU; needs nvcc, but no GPU."""
    gemm, library = folder / "moe_gemm.o", folder / "libchoices.so"
    nvcc = ["nvcc", "-std=c++17", "-O0", "-Xcicc", "-O0", "-DCCQ_SM90A", "-Xcompiler", "-fPIC"]
    nvcc += [
        "-gencode=arch=compute_90a,code=compute_90a",
        "-c",
        str(SOURCES / "moe" / "moe_gemm.cu"),
    ]
    pretended = ["g++", "-shared", "-fPIC", "-o", str(library), str(gemm)]
    for command in ([*nvcc, "-o", str(gemm)], [*pretended, str(FOLDER / "pretended_gpu.cpp")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL)


def choices(library: ctypes.CDLL) -> Iterator[tuple[str, list[int]]]:
    """For each device and shape: the kernels' numbers, by TOKENS."""
    # Never read: the choice looks at alignment and sizes alone.
    place = ctypes.c_void_p(4096)
    pointers = dict.fromkeys(("x", "offsets", "quant", "scales", "columns", "out"), place)
    for device, name in DEVICES.items():
        ctypes.c_int.in_dll(library, "pretended_device").value = device
        for experts, n, k in SHAPES:
            top = TOP_K if experts > 1 else 1
            found = []
            for tokens in TOKENS:
                sizes = {"rows": top * tokens, "k": k, "n": n, "experts": experts}
                args = GemmArgs(**pointers, **sizes, workspace=place, dtype=0, pairs=0, row_order=1)
                found.append(library.ccq_moe_gemm_variant(ctypes.byref(args)))
            yield f"{name}: {experts} experts, N {n}, K {k}", found


def found(folder: Path) -> dict[str, Any]:
    """What kernels.json holds."""
    return {"exported": exported(), "tokens": list(TOKENS), "choices": dict(choices(build(folder)))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store what these sources have")
    args = parser.parse_args()
    if not shutil.which("nvcc"):
        print("nvcc is not on PATH", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ccq-held-") as folder:
        now = found(Path(folder))
    known = json.loads(STORED.read_text()) if STORED.exists() else None
    if args.write:
        STORED.write_text(_shown(now))
    elif now != known:
        print(f"{STORED.name} differs")
    return 1 if now != known and not args.write else 0


def _shown(content: dict[str, Any]) -> str:
    """JSON with a line for each choice."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[\d,\s-]*\]", lambda m: " ".join(m[0].split()), text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
