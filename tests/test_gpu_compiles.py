# SPDX-License-Identifier: Apache-2.0
"""Device code compiles for the oldest and the newest architecture and stays in registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from paddle_ccq.host import default_threads

SOURCES = Path(__file__).resolve().parents[1] / "custom_ops" / "gpu"
ARCHITECTURES = ["80", "90"]


def compiled(tmp_path: Path, source: str, arch: str, *flags: str) -> str:
    command = ["nvcc", "-std=c++17", *flags, "-c", str(SOURCES / source)]
    command += ["-o", str(tmp_path / "o"), f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.fixture(scope="module")
def compilations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[str]]]:
    """Those of test_compiles that were asked for, on all processors: one by one takes minutes."""
    with ThreadPoolExecutor(default_threads()) as pool:
        asked = [
            (item.callspec.params["source"], item.callspec.params["arch"])
            for item in request.session.items
            if getattr(item, "originalname", "") == "test_compiles"
        ]
        yield {
            (source, arch): pool.submit(
                compiled, tmp_path_factory.mktemp("compiled"), source, arch, "-O1"
            )
            for source, arch in asked
        }


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "source",
    [
        *("moe/repack.cu", "moe/moe_gemm.cu", "moe/few_stream.cu", "moe/linear_w8.cu"),
        *("moe/some_stream.cu", "moe/wide_halves.cu"),
        *("moe/trellis_repack.cu", "moe/trellis_gemm.cu"),
        *("encode/trellis.cu", "encode/host_trellis.cu", "encode/trellis_ldlq.cu"),
        *("encode/trellis_ldlq_narrow.cu", "encode/host_trellis_ldlq.cu", "ldlq/host_ldlq.cu"),
    ],
)
def test_compiles(compilations: dict[tuple[str, str], Future[str]], source: str, arch: str) -> None:
    compilations[source, arch].result()


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize(
    "name", ["moe_gemm", "few_stream", "some_stream", "wide_halves", "trellis_gemm"]
)
def test_what_needs_hoppers_own_instructions_compiles(tmp_path: Path, name: str) -> None:
    """Templates are used where -DCCQ_SM90A is given alone; to PTX, for that takes seconds."""
    command = ["nvcc", "-std=c++17", "-DCCQ_SM90A", "-ptx", "-arch=compute_90a"]
    command += [str(SOURCES / "moe" / f"{name}.cu"), "-o", str(tmp_path / "o.ptx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_calibrated_search_compiles_without_warnings_and_local_memory(
    tmp_path: Path, arch: str
) -> None:
    said = compiled(tmp_path, "ldlq/ldlq.cu", arch, "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall")
    assert "warning" not in said
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", said)
    assert len(frames) > 15
    # How registers are given out is the compiler's business; this is of the one it was tuned with.
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    if "release 13.0" in version.stdout:
        assert set(frames) == {("0", "0")}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize(
    ("weights", "tile"),
    [
        *product(
            ("PairWeights<Pairs::kInteger>", "TrellisWeights"),
            ("4, 48, 5", "2, 128, 4", "2, 144, 4", "1, 256, 3"),
        ),
        ("PairWeights<Pairs::kGeneral>", "1, 256, 3"),
    ],
)
def test_warpgroup_products_are_not_serialized(tmp_path: Path, tile: str, weights: str) -> None:
    """A path too many, or a branch among them, and the compiler waits after each, and says so."""
    source = tmp_path / "wide.cu"
    source.write_text(
        '#include "moe_gemm.h"\n#include "moe_wide.cuh"\n#include "wide_trellis.cuh"\n'
        "namespace ccq {\n"
        f"template __global__ void wide_kernel<WideConfig<{weights}, true, {tile}>>(\n"
        "    const GemmParams, const __grid_constant__ CUtensorMap);\n}\n"
    )
    flags = ("-O3", f"-I{SOURCES / 'moe'}", "-Xptxas", "-v")
    said = compiled(tmp_path, str(source), "90a", *flags)
    assert "wide_kernel" in said and "serialized" not in said


TRELLIS_KERNELS = [
    *(
        ("few", f"TrellisFewConfig<{tile}>", "const FewParams")
        for tile in ("1, 4", "2, 2", "4, 1", "1, 1, 1")
    ),
    *(("some", f"TrellisSomeConfig<true, {tile}>", "const GemmParams") for tile in (8, 16)),
]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize(("kernel", "config", "params"), TRELLIS_KERNELS)
def test_trellis_products_stay_in_registers_and_are_not_serialized(
    tmp_path: Path, kernel: str, config: str, params: str
) -> None:
    source = tmp_path / "trellis.cu"
    source.write_text(
        f'#include "trellis_{kernel}.cuh"\nnamespace ccq {{\n'
        f"template __global__ void trellis_{kernel}_kernel<{config}>({params});\n}}\n"
    )
    said = compiled(tmp_path, str(source), "90a", "-O3", f"-I{SOURCES / 'moe'}", "-Xptxas", "-v")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    found = re.search(
        rf"trellis_{kernel}_kernel.*?(\d+) bytes stack frame, (\d+) bytes spill", said, re.DOTALL
    )
    assert found and "serialized" not in said
    if "release 13.0" in version.stdout:  # a tile's rows may wait there, nothing of its stages does
        assert int(found[1]) <= 128


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_streams_of_few_rows_stay_in_registers(tmp_path: Path, rows: int) -> None:
    """What the warps that multiply spill, their loop waits for."""
    source = tmp_path / "few.cu"
    source.write_text(
        '#include "few_stream.cuh"\nnamespace ccq {\n'
        "template __global__ void stream_kernel<\n"
        f"    StreamFew<Pairs::kInteger, {rows}>>(FewParams);\n}}\n"
    )
    flags = ("-O3", f"-I{SOURCES / 'moe'}", "-Xptxas", "-v")
    said = compiled(tmp_path, str(source), "90a", *flags)
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    found = re.search(
        r"stream_kernel.*?(\d+) bytes stack frame, (\d+) bytes spill", said, re.DOTALL
    )
    assert found
    if "release 13.0" in version.stdout:
        assert found.groups() == ("0", "0")


def test_no_reduction_over_a_warp_stands_under_a_condition() -> None:
    """nvcc 13.0 predicates such a one, at times by what holds another condition by then."""
    conditional = re.compile(r"\?\s*uniform\(|\?[^;?]*:\s*uniform\(")
    sources = {path.name: re.sub(r"//.*", "", path.read_text()) for path in SOURCES.rglob("*.cuh")}
    assert "uniform(" in sources["few_schedule.cuh"]
    assert not [name for name, text in sources.items() if conditional.search(text)]
