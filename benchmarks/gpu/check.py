# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU to be checked, in one command: tests, sanitizers, quantize.

    python benchmarks/gpu/ccqlib.py /tmp/libccq.so
    python benchmarks/gpu/check.py --library /tmp/libccq.so [--steps tests,sanitize,quantize]

A library built with -DCCQ_TUNING can be told which kernel to run: with it the tests, and the
sanitizers, also see those that this GPU would not choose for small shapes.

Paddle's ops need a Paddle for this GPU and the ops compiled for it: --paddle-ops names them,
--paddle the folder of a Paddle outside the environment. Logs go to --logs; exit code 1 if a step
fails. The compiled core (`python setup.py build_ext --inplace`) must be there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "ernie-45-moe-3m"
# The files whose kernels come from the library; small cases of each for the sanitizers.
SUITES = {
    "test_moe_gemm.py": (
        "test_row_counts and (17-dtype0 or 3-dtype1 or 65-dtype0) or test_repack or tail_rows "
        "or test_all_codes and pair4 or test_shapes and (5-shape3 or 5-shape1)",
        *(f"test_forced and ({' or '.join(f'[{v}]' for v in some)})"
          for some in (range(4), range(10, 17), range(20, 26), range(26, 30),
                       range(30, 34), (50, 51, 60, 61))),
    ),
    "test_trellis_gemm.py": (
        "test_row_counts and (17-dtype0 or 3-dtype1 or 65-dtype0) or test_repack or nobody",
        *(f"test_forced and ({' or '.join(f'[{v}]' for v in some)})"
          for some in ((10, 12, 15), range(40, 45), range(45, 47))),
    ),
    "test_moe_block.py": ("dispatch or swiglu or (block and (integer or ccq-2t) and 9)",),
    "test_linear_ccq.py": ("rows_of_nobody and counts0 or refused",),
    "test_encode.py": ("test_gpu_equals_cpu and gaussian and fast",),
    "test_dequant.py": ("bfloat16",),
    "test_ldlq.py": ("bit_for_bit and fast and smooth or equal_entries",),
    "test_trellis.py": ("bit_for_bit and gaussian and narrow",),
    "test_trellis_ldlq.py": ("bit_for_bit and fast and steps",),
}  # fmt: skip
TOOLS = ("memcheck", "racecheck")
SIDE_BY_SIDE = 8
FORMATS = ("wint2", "ccq-2t", "ccq-2.5", "ccq-2.75")
SECONDS = {
    "tests": 400, "paddle": 200, "sanitize": 250, "quantize": 60, "encode": 100, "ldlq": 120,
}  # fmt: skip


class Runner:
    """Runs commands with a limit, a log each, and a line of verdict."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.failed = args, []
        self.logs = Path(args.logs)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
        # One library serves both: the kernels' interface and the encoder's.
        for name in ("CCQ_GPU_LIBRARY", "PADDLE_CCQ_GPU_LIBRARY"):
            self.environment[name] = str(Path(args.library).resolve())

    def run(self, name: str, command: list[str], seconds: float, **environment: str) -> bool:
        """True if the command succeeds in time; the end of its output is shown either way."""
        log, start = self.logs / f"{name}.log", time.perf_counter()
        with log.open("w") as out:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=self.environment | environment, stdout=out,
                    stderr=subprocess.STDOUT, timeout=seconds, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = 124
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        shown = [f"    {line[:200]}" for line in lines[-3 if code == 0 else -25 :]]
        seconds = time.perf_counter() - start
        self.verdict(name, code == 0, f"exit {code}, {seconds:.1f} s", shown)
        return code == 0

    def verdict(self, name: str, good: bool, detail: str, shown: Sequence[str] = ()) -> None:
        # One print: steps may run side by side.
        print("\n".join([*shown, f"{'pass' if good else 'FAIL'}  {name}  ({detail})"]), flush=True)
        if not good:
            self.failed.append(name)


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *arguments]


def tests(runner: Runner) -> None:
    """The GPU tests on the library."""
    files = [f"tests/gpu/{name}" for name in SUITES]
    runner.run("tests", pytest(*files), SECONDS["tests"])


def paddle(runner: Runner) -> None:
    """The tests through Paddle."""
    if not runner.args.paddle_ops:
        runner.verdict("paddle", False, "--paddle-ops is not given")
        return
    extra = {"PADDLE_CCQ_PADDLE_OPS": str(Path(runner.args.paddle_ops).resolve())}
    if runner.args.paddle:
        folder = Path(runner.args.paddle).resolve()
        extra["PYTHONPATH"] = f"{ROOT}:{folder}:{folder / 'site'}"
        extra["CUDA_MODULE_LOADING"] = "LAZY"
        extra["LD_LIBRARY_PATH"] = f"{folder / 'stubs'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    command = pytest("tests/gpu/test_paddle_ops.py")
    runner.run("paddle", command, SECONDS["paddle"], **extra)


def sanitize(runner: Runner) -> None:
    """compute-sanitizer on small cases of every kernel, some of them side by side."""
    only = runner.args.only
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for name, selections in SUITES.items():
            if only and only not in name:
                continue
            for tool, (i, selected) in product(TOOLS, enumerate(selections)):
                command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
                command += pytest(f"tests/gpu/{name}", "-k", selected)
                title = f"{tool}-{Path(name).stem}{f'-{i}' if i else ''}"
                pool.submit(runner.run, title, command, SECONDS["sanitize"])


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def same_files(runner: Runner, name: str, command: Callable[[str, Path], list[str]]) -> None:
    """A command with either device writes the same files, byte for byte."""
    with tempfile.TemporaryDirectory() as scratch:
        done, outputs = True, {}
        for device in ("cpu", "gpu"):
            outputs[device] = Path(scratch) / device
            ran = [sys.executable, *command(device, outputs[device])]
            done = runner.run(f"{name}-{device}", ran, SECONDS["quantize"]) and done
        if done:
            cpu, gpu = hashes(outputs["cpu"]), hashes(outputs["gpu"])
            differ = sorted(n for n in cpu.keys() | gpu.keys() if cpu.get(n) != gpu.get(n))
            detail = f"{len(cpu)} files, different: {', '.join(differ) or 'none'}"
            runner.verdict(f"{name}-same-bytes", not differ, detail)


def quantize(runner: Runner) -> None:
    """`quantize --device gpu` from end to end."""
    for format in FORMATS:

        def command(device: str, output: Path, format: str = format) -> list[str]:
            what = ["--model", str(MODEL), "--output", str(output), "--format", format]
            return ["-m", "paddle_ccq.quantize", *what, "--device", device, "--quiet"]

        same_files(runner, f"quantize-{format}", command)


def ldlq(runner: Runner) -> None:
    """The calibrated search: its tests, and whole files with made-up statistics."""
    for name in ("ldlq", "trellis_ldlq"):
        runner.run(name, pytest(f"tests/gpu/test_{name}.py"), SECONDS["ldlq"])

    def command(device: str, output: Path) -> list[str]:
        what = ["--model", str(MODEL), "--output", str(output), "--device", device]
        return ["benchmarks/gpu/calibrated_run.py", *what]

    same_files(runner, "quantize-calibrated", command)


def encode(runner: Runner) -> None:
    """Speed of the encoder (its log has the table)."""
    runner.run("encode", [sys.executable, "benchmarks/encode_gpu.py"], SECONDS["encode"])


STEPS: dict[str, Callable[[Runner], None]] = {
    "tests": tests, "paddle": paddle, "quantize": quantize, "encode": encode, "sanitize": sanitize,
    "ldlq": ldlq,
}  # fmt: skip


def main() -> int:
    """Run the steps asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True, help="what benchmarks/gpu/ccqlib.py built")
    parser.add_argument("--steps", default="tests,quantize,sanitize", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--paddle-ops", metavar="SO", help="compiled custom_ops/paddle")
    parser.add_argument("--paddle", metavar="FOLDER", help="Paddle outside the environment")
    parser.add_argument("--only", metavar="TEXT", help="sanitize only suites with this in the name")
    parser.add_argument("--logs", default="gpu-logs", metavar="FOLDER")
    args = parser.parse_args()
    steps = args.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--steps: unknown {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    runner = Runner(args)
    for step in steps:
        STEPS[step](runner)
    print(f"failed: {', '.join(runner.failed)}" if runner.failed else "all passed")
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
