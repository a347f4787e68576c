# SPDX-License-Identifier: Apache-2.0
"""Which kernel of the grouped GEMM serves which call: host code, tried without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "custom_ops" / "gpu" / "moe"
H200 = (132, 9, 232448)
# Kernels whose costs the program writes: moe_wide.cuh, some_stream.cuh, moe_wide.cuh with
# activations in fp16, few_stream.cuh.
COSTED = (*range(10, 17), 50, 51, 60, 61, *range(30, 34))
PROGRAM = r"""
#include <cstdio>
#include "choice.h"
// Lines of: multiprocessors, major, shared, the largest kernel that fits, rows, k, n, experts.
// Answers: the kernel, and what the kernels of COSTED would cost.
int main() {
  ccq::Gpu gpu{};
  ccq::Call call{};
  int most;
  while (std::scanf("%d %d %d %d %d %d %d %d", &gpu.sms, &gpu.major, &gpu.shared, &most,
                    &call.rows, &call.k, &call.n, &call.experts) == 8) {
    auto fits = [&](int variant) { return variant <= most; };
    std::printf("%d", ccq::kernel_choice(gpu, call, gpu.major == 9, fits));
    for (const auto& c : ccq::kWideCosts) std::printf(" %.3f", ccq::wide_cost(gpu, call, c));
    for (const auto& c : ccq::kSomeCosts) std::printf(" %.3f", ccq::some_cost(gpu, call, c));
    for (const auto& c : ccq::kHalvesCosts) std::printf(" %.3f", ccq::wide_cost(gpu, call, c));
    for (const auto& c : ccq::kStreamCosts) std::printf(" %.3f", ccq::stream_cost(gpu, call, c));
    std::printf("\n");
  }
}
"""

# experts, n, k and, by tokens (top-8), the fastest of kernels 11 to 15 and 61, from 3000 tokens on
# of 14 to 16, in one run on an H200 with every kernel that took at most a twentieth longer.
MEASURED = {
    (64, 7168, 8192): {
        512: {13, 61}, 1024: {15}, 2048: {15}, 3000: {14, 15, 16}, 3400: {15, 16}, 4096: {16},
        6000: {16}, 8192: {16},
    },
    (64, 8192, 3584): {
        512: {13, 14}, 1024: {15}, 2048: {15}, 4096: {15, 16}, 8192: {16},
    },
    (64, 3072, 2560): {
        512: {13, 14}, 1024: {15}, 2048: {15}, 4096: {15, 16}, 8192: {15, 16},
    },
    (64, 2560, 1536): {
        512: {13, 14}, 1024: {15}, 2048: {15}, 4096: {14, 15, 16}, 8192: {15, 16},
    },
    (128, 3072, 4096): {
        512: {61}, 1024: {13, 14}, 2048: {15}, 4096: {15}, 8192: {15, 16},
    },
    (128, 4096, 1536): {
        512: {11, 12, 61}, 1024: {13, 14}, 2048: {15}, 4096: {15}, 8192: {14, 15, 16},
    },
    (256, 1024, 7168): {
        1024: {11, 12, 61}, 2048: {13, 14}, 4096: {15}, 8192: {15},
    },
    (256, 7168, 512): {
        8192: {15},
    },
}  # fmt: skip

# The same for up to 256 tokens, in other runs: of all kernels that came into question.
MEASURED_FEW = {
    (64, 7168, 8192): {
        1: {30}, 2: {30}, 4: {31, 32, 50}, 8: {32, 50}, 16: {50}, 24: {50}, 32: {50}, 48: {50},
        64: {0, 50}, 96: {0, 50, 51, 60}, 128: {60, 61}, 256: {61},
    },
    (64, 8192, 3584): {
        1: {30}, 2: {30}, 4: {31, 32, 50}, 8: {32, 50}, 16: {50}, 24: {50}, 32: {50}, 48: {50},
        64: {0, 50, 51}, 96: {0, 50, 51, 60}, 128: {60, 61}, 256: {61},
    },
    (64, 3072, 2560): {
        1: {30}, 2: {30}, 4: {30}, 8: {31, 32, 50}, 16: {32, 50}, 24: {32, 50}, 32: {50, 51},
        48: {0, 50, 51}, 64: {0, 50, 51}, 96: {0, 50, 60}, 128: {60, 61}, 256: {11, 61},
    },
    (64, 2560, 1536): {
        1: {30}, 2: {30}, 4: {30}, 8: {31, 32}, 16: {32}, 24: {32, 50, 51}, 32: {32, 50, 51},
        48: {50, 51}, 64: {50, 51, 60}, 96: {60}, 128: {60, 61}, 256: {11},
    },
    (128, 3072, 4096): {
        1: {30}, 2: {30}, 4: {30}, 8: {31, 32, 50}, 16: {32, 50}, 24: {32, 50}, 32: {32, 50},
        48: {50}, 64: {50}, 96: {0, 50, 51}, 128: {0, 50, 51}, 256: {60, 61},
    },
    (128, 4096, 1536): {
        1: {30}, 2: {30}, 4: {30}, 8: {31, 32}, 16: {0, 32, 50}, 24: {50}, 32: {50, 51},
        48: {50, 51}, 64: {50, 51}, 96: {0, 50, 51}, 128: {0, 50, 51}, 256: {60, 61},
    },
    (256, 1024, 7168): {
        1: {30}, 2: {30}, 4: {30}, 8: {30}, 16: {31, 32}, 24: {32}, 32: {32}, 48: {32},
        64: {32}, 96: {32, 50, 51}, 128: {50, 51}, 256: {0, 50, 51},
    },
    (256, 7168, 512): {
        1: {23, 24}, 2: {24}, 4: {30}, 8: {30, 31, 32}, 16: {0, 50, 51}, 24: {50, 51},
        32: {50, 51}, 48: {50, 51}, 64: {50, 51}, 96: {0, 50, 51}, 128: {0, 50, 51},
        256: {0, 50, 51},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("c++"):
        pytest.skip("no c++")
    folder = tmp_path_factory.mktemp("choice")
    (folder / "main.cpp").write_text(PROGRAM)
    command = ["c++", "-std=c++17", "-O1", f"-I{SOURCES}", str(folder / "main.cpp")]
    subprocess.run([*command, "-o", str(folder / "choice")], check=True)
    return folder / "choice"


def choices(program: Path, calls: list[tuple], gpu: tuple = H200, most: int = 99) -> list[list]:
    """Kernel and costs of each (rows, k, n, experts)."""
    lines = "\n".join(" ".join(map(str, (*gpu, most, *call))) for call in calls)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    return [[float(v) for v in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("measured", [MEASURED, MEASURED_FEW], ids=["many rows", "few rows"])
def test_calls_get_a_kernel_that_was_measured_to_be_the_fastest(
    program: Path, measured: dict
) -> None:
    cases = [
        (8 * tokens, k, n, experts, best)
        for (experts, n, k), found in measured.items()
        for tokens, best in found.items()
    ]
    found = choices(program, [case[:4] for case in cases])
    wrong = [(c, f[0]) for c, f in zip(cases, found, strict=True) if int(f[0]) not in c[4]]
    # A kernel that is a little slower may be taken where two are alike; no more than in one of ten.
    assert len(wrong) <= len(cases) // 10, wrong


def test_the_least_cost_wins_and_costs_grow_with_rows(program: Path) -> None:
    means = (0.2, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, *range(18, 1200, 7))
    found = choices(program, [(int(64 * mean), 4096, 7168, 64) for mean in means])
    least = []
    for mean, (kernel, *costs) in zip(means, found, strict=True):
        by_kernel = dict(zip(COSTED, costs, strict=True))
        # Those for other numbers of rows are not asked.
        few, some, many = mean <= 5, mean >= 1, mean >= 12
        asked = [v for v in COSTED if (some if v >= 50 else few if v >= 30 else many)]
        asked = [v for v in asked if v < 60 or mean >= 8]
        assert by_kernel[int(kernel)] == min(by_kernel[v] for v in asked), mean
        least.append(by_kernel[int(kernel)])
    # A tile more costs at once what its rows cost little by little: up to a tenth of ups and downs.
    assert all(b > a * 0.9 for a, b in pairwise(least))
    assert least[-1] > 60 * least[0]


def test_few_rows_of_several_experts_get_more_rows_a_tile_the_more_there_are(program: Path) -> None:
    calls = [(rows, 4096, 7168, 64) for rows in (1, 8, 20, 40, 64, 100, 128, 180, 1000, 1500)]
    kernels = [int(kernel) for kernel, *_ in choices(program, calls)]
    assert kernels == sorted(kernels)
    assert kernels[0] == 30
    assert kernels[-1] >= 50


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        ((8, 8192, 7168, 64), 30),  # one token: one row a tile
        ((24, 8192, 7168, 64), 31),  # 3 tokens: two rows a tile
        ((128, 8192, 7168, 64), 50),  # 16 tokens: up to sixteen, in steps of four
        ((8, 7168, 1024, 256), 30), ((512, 8192, 7168, 64), 50), ((1088, 8192, 7168, 64), 60),
        ((512, 4096, 3072, 128), 50), ((2048, 7168, 512, 384), 50),
        ((512, 512, 7168, 256), 50), ((128, 512, 7168, 256), 24),  # short K: from about a row on
        ((1, 4096, 1024, 1), 20), ((8, 512, 7168, 256), 24), ((64, 4096, 1024, 1), 3),
    ],
)  # fmt: skip
def test_few_rows_get_the_kernels_for_few_rows(program: Path, call: tuple, kernel: int) -> None:
    assert int(choices(program, [call])[0][0]) == kernel


def test_what_does_not_fit_is_passed_over(program: Path) -> None:
    call = (8 * 4096, 8192, 7168, 64)
    assert int(choices(program, [call])[0][0]) == 16
    assert int(choices(program, [call], most=15)[0][0]) in (14, 15)  # no tiles of 256 rows
    assert int(choices(program, [call], most=12)[0][0]) in (11, 12)  # no tiles of 256 columns
    assert int(choices(program, [call], gpu=(108, 8, 166912))[0][0]) == 1  # before Hopper
    assert int(choices(program, [call], gpu=(108, 8, 101376), most=0)[0][0]) == 3
    few = (8, 8192, 7168, 64)
    assert int(choices(program, [few], most=29)[0][0]) == 22  # no ring for all columns
    assert int(choices(program, [few], most=19)[0][0]) in (0, 3)
    assert int(choices(program, [few], gpu=(108, 8, 166912))[0][0]) == 22  # before Hopper


# CCQ-2T: the fastest of kernels 40 to 42, 45 and 46, or 10 to 16 (of 14 to 16 from 3000 tokens on),
# in runs on H200s, with every one that took at most a twentieth longer; as MEASURED.
MEASURED_TRELLIS = {
    (64, 7168, 8192): {
        1: {40}, 8: {41, 42, 45}, 16: {42, 45}, 32: {45, 46}, 64: {46}, 128: {46}, 256: {11, 12},
        512: {13}, 1024: {15}, 2048: {15, 16}, 3000: {16}, 4096: {16}, 6000: {16}, 8192: {16},
    },
    (64, 8192, 3584): {
        1: {40}, 4: {41, 42}, 16: {42, 45, 46}, 32: {45, 46}, 64: {46}, 128: {46}, 256: {11, 12},
        512: {13, 14}, 1024: {15}, 2048: {14, 15, 16}, 4096: {16}, 8192: {16},
    },
    (64, 3072, 2560): {
        1: {40}, 8: {41}, 16: {42, 45}, 32: {45}, 64: {46}, 4096: {16}, 8192: {16},
    },
    (64, 2560, 1536): {
        1: {40}, 8: {41}, 16: {41, 42}, 32: {45}, 64: {45, 46}, 4096: {16}, 8192: {16},
    },
    (128, 3072, 4096): {
        1: {40}, 8: {41}, 32: {45, 46}, 64: {45}, 512: {11, 12}, 4096: {15, 16}, 8192: {16},
    },
    (128, 4096, 1536): {
        1: {40}, 8: {41}, 16: {41, 45, 46}, 32: {45}, 64: {45}, 8192: {16},
    },
    (256, 1024, 7168): {
        1: {40}, 8: {40, 41}, 16: {41}, 32: {41, 42}, 64: {42}, 256: {46}, 1024: {11, 12},
        8192: {15, 16},
    },
    (256, 7168, 512): {
        1: {40}, 8: {40, 41}, 16: {45, 46}, 32: {45}, 64: {45, 46}, 8192: {15, 16},
    },
}  # fmt: skip
TRELLIS_PROGRAM = r"""
#include <cstdio>
#include "choice.h"
// Lines of: major, rows, k, n, experts. Answers: the kernel, where shared memory is an H200's.
int main() {
  ccq::Gpu gpu{132, 9, 232448};
  ccq::Call call{};
  while (std::scanf("%d %d %d %d %d", &gpu.major, &call.rows, &call.k, &call.n,
                    &call.experts) == 5) {
    auto fits = [&](int v) { return v < 20 || (v >= 45 ? call.mean() <= 24 : call.k <= 8192); };
    std::printf("%d\n", ccq::trellis_choice(gpu, call, gpu.major == 9, fits));
  }
}
"""


def trellis_choices(tmp_path: Path, cases: list[tuple]) -> list[int]:
    source, program = tmp_path / "trellis.cpp", tmp_path / "trellis"
    source.write_text(TRELLIS_PROGRAM)
    command = ["g++", "-std=c++17", f"-I{SOURCES}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    lines = "\n".join(" ".join(map(str, case)) for case in cases)
    found = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    return list(map(int, found.stdout.split()))


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_trellis_calls_get_a_kernel_that_was_measured_to_be_the_fastest(tmp_path: Path) -> None:
    cases = [
        (9, 8 * tokens, k, n, experts, best)
        for (experts, n, k), found in MEASURED_TRELLIS.items()
        for tokens, best in found.items()
    ]
    found = trellis_choices(tmp_path, [case[:5] for case in cases])
    wrong = [(c, f) for c, f in zip(cases, found, strict=True) if f not in c[5]]
    assert len(wrong) <= len(cases) // 15, wrong


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_trellis_choice_follows_the_gpu_and_its_shared_memory(tmp_path: Path) -> None:
    # Compute capability, rows, k, n, experts: kernel.
    cases = {
        (9, 1, 4096, 4096, 1): 40,  # one matrix
        (9, 4, 14336, 4096, 8): 45,  # K that only kernels with streamed activations take
        (9, 2048, 14336, 4096, 8): 16,
        (8, 8, 8192, 7168, 64): 43,
        (8, 4096, 8192, 7168, 64): 44,
        (8, 4, 14336, 4096, 8): -1,
    }
    assert trellis_choices(tmp_path, list(cases)) == list(cases.values())


# Columns and rows of tiles of moe_wide.cuh, by kernel.
WIDE_TILES = {10: (512, 32), 11: (512, 48), 12: (512, 64), 13: (256, 96), 14: (256, 128),
              15: (256, 144), 16: (128, 256), 60: (512, 32), 61: (512, 48)}  # fmt: skip


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_few_rows_get_no_tile_whose_partial_results_have_no_room(
    program: Path, tmp_path: Path
) -> None:
    """Below a number of rows an expert the workspace holds 4096 float4 of them a multiprocessor."""
    header = (SOURCES / "choice.h").read_text()
    many = int(re.search(r"constexpr int kManyRows = (\d+);", header)[1])
    launch = (SOURCES / "gemm_launch.cuh").read_text()
    assert "partial_float4 = rows / experts < kManyRows ? 4096 : kMaxPartialFloat4;" in launch
    calls = [
        (rows, k, n, experts)
        for experts in (1, 3, 6, 64, 384)
        for k, n in ((128, 16), (640, 304), (1024, 256), (4096, 7168), (8192, 448))
        for rows in {
            max(1, int(mean * experts)) for mean in (0.5, 3, 7, 7.9, 8, 11, 13, 17, 18, 20, 23.9)
        }
    ]
    found = [int(kernel) for kernel, *_ in choices(program, calls)]
    found += trellis_choices(tmp_path, [(9, *call) for call in calls])
    for call, kernel in zip(calls * 2, found, strict=True):
        columns, rows = WIDE_TILES.get(kernel, (0, 0))
        small = call[0] // call[3] < many
        assert not small or columns * rows // 4 <= 4096, (call, kernel)
