# SPDX-License-Identifier: Apache-2.0
"""The GPU library's exported functions and its choices of kernels, held still.

    python tests/helpers/held_kernels.py --write    # store those of the present sources

The functions are read from the sources. The choice is host code (custom_ops/gpu/moe/choice.h),
which the host's compiler builds.
"""

from __future__ import annotations

import argparse
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

# Multiprocessors, compute capability, shared memory a block may have: every kernel fits there. What
# fits on smaller GPUs only their driver knows.
DEVICES = {"H100 or H200": (132, 9, 232448)}
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


PROGRAM = r"""
#include <cstdio>
#include "choice.h"
// Lines of: multiprocessors, major, shared, rows, k, n, experts. Answers: the kernel.
int main() {
  ccq::Gpu gpu{};
  ccq::Call call{};
  while (std::scanf("%d %d %d %d %d %d %d", &gpu.sms, &gpu.major, &gpu.shared, &call.rows,
                    &call.k, &call.n, &call.experts) == 7)
    std::printf("%d\n", ccq::kernel_choice(gpu, call, gpu.major == 9, [](int) { return true; }));
}
"""


def exported() -> list[str]:
    """Functions that the sources define for other languages, without those for tuning."""
    found = set()
    for path in SOURCES.rglob("*.cu"):
        text = re.sub(r"#ifdef CCQ_TUNING.*?#endif", "", path.read_text("utf-8"), flags=re.DOTALL)
        found |= set(re.findall(r'extern "C" [\w\s*]*?\b(ccq_\w+)\(', text))
    return sorted(found)


def build(folder: Path) -> Path:
    """The choice of kernels as a program that reads calls and prints kernels; needs g++ alone."""
    source, program = folder / "choice.cpp", folder / "choice"
    source.write_text(PROGRAM, "utf-8")
    command = ["g++", "-std=c++17", "-O1", f"-I{SOURCES / 'moe'}", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return program


def choices(program: Path) -> Iterator[tuple[str, list[int]]]:
    """For each device and shape: the kernels' numbers, by TOKENS."""
    for name, device in DEVICES.items():
        for experts, n, k in SHAPES:
            top = TOP_K if experts > 1 else 1
            lines = [(*device, top * tokens, k, n, experts) for tokens in TOKENS]
            text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
            done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
            yield f"{name}: {experts} experts, N {n}, K {k}", [int(x) for x in done.stdout.split()]


def found(folder: Path) -> dict[str, Any]:
    """What kernels.json holds."""
    return {"exported": exported(), "tokens": list(TOKENS), "choices": dict(choices(build(folder)))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store what these sources have")
    args = parser.parse_args()
    if not shutil.which("g++"):
        print("g++ is not on PATH", file=sys.stderr)
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
