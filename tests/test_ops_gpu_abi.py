# SPDX-License-Identifier: Apache-2.0
"""The structures and functions of ops/gpu_abi.py against the C headers that they mirror."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from paddle_ccq.ops import gpu_abi

ROOT = Path(__file__).resolve().parents[1]
HEADERS = sorted((ROOT / "custom_ops" / "gpu" / "moe").glob("*.h"))
STRUCTURES = {
    "ccq_moe_projection": gpu_abi.Projection,
    "ccq_moe_shape": gpu_abi.Shape,
    "ccq_moe_gemm_args": gpu_abi.GemmArgs,
    "ccq_router_args": gpu_abi.RouterArgs,
    "ccq_w4_gemm_args": gpu_abi.W4Args,
    "ccq_spare_gemm_args": gpu_abi.SpareArgs,
    "ccq_linear_w8_args": gpu_abi.LinearW8Args,
}
TYPES = {
    "int": ctypes.c_int,
    "cudaError_t": ctypes.c_int,
    "size_t": ctypes.c_size_t,
    "cudaStream_t": ctypes.c_void_p,
}


def c_text() -> str:
    """What the headers declare for C, without comments and preprocessor lines."""
    found = []
    for path in HEADERS:
        text = re.sub(r"//.*", "", path.read_text("utf-8"))
        text = re.sub(r"#ifdef __CUDACC__.*?#endif", "", text, flags=re.DOTALL)
        found += re.findall(r'extern "C" \{\s*#endif(.*?)#ifdef __cplusplus', text, flags=re.DOTALL)
    return re.sub(r"^#.*$", "", "\n".join(found), flags=re.MULTILINE)


def c_type(declaration: str) -> Any:
    return ctypes.c_void_p if "*" in declaration else TYPES[declaration.split()[0]]


def structures() -> dict[str, list[tuple[str, Any]]]:
    """C name -> its fields, `int a, b;` as two of them."""
    found = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", c_text(), flags=re.DOTALL):
        fields = []
        for line in filter(str.strip, body.split(";")):
            first, *others = line.split(",")
            kind = c_type(first.strip())
            fields += [(re.findall(r"\w+", part)[-1], kind) for part in (first, *others)]
        found[name] = fields
    return found


def functions() -> dict[str, tuple[list[Any], Any]]:
    """C name -> (types of the arguments, type of the result)."""
    found = {}
    pattern = r"^(\w+) (ccq_\w+)\(([^)]*)\);"
    for result, name, arguments in re.findall(pattern, c_text(), flags=re.MULTILINE):
        found[name] = ([c_type(a.strip()) for a in arguments.split(",")], TYPES[result])
    return found


def test_structures_are_those_of_the_headers() -> None:
    declared = structures()
    assert declared.keys() == STRUCTURES.keys()
    for name, structure in STRUCTURES.items():
        assert list(structure._fields_) == declared[name], name


def test_functions_are_those_of_the_headers() -> None:
    assert functions() == gpu_abi.FUNCTIONS


def test_numbers_are_those_of_the_headers() -> None:
    text = "\n".join(p.read_text("utf-8") for p in (ROOT / "custom_ops" / "gpu").rglob("*.h"))
    numbers = {name: int(value) for name, value in re.findall(r"\b(CCQ_\w+) = (\d+)", text)}
    assert (numbers["CCQ_BF16"], numbers["CCQ_FP16"]) == (gpu_abi.BFLOAT16, gpu_abi.FLOAT16)
    pairs = tuple(numbers[f"CCQ_PAIRS_{name}"] for name in ("INTEGER", "GENERAL", "TRELLIS"))
    assert pairs == (gpu_abi.PAIRS_INTEGER, gpu_abi.PAIRS_GENERAL, gpu_abi.PAIRS_TRELLIS)
    orders = numbers["CCQ_ROWS_PLAIN"], numbers["CCQ_ROWS_FASTDEPLOY"]
    assert orders == (gpu_abi.ROWS_PLAIN, gpu_abi.ROWS_FASTDEPLOY)
    spare = {"ccq-2.5": numbers["CCQ_CCQ25"], "ccq-2.75": numbers["CCQ_CCQ275"]}
    assert spare == gpu_abi.SPARE_FORMATS
    assert f"#define CCQ_LINEAR_W8_MAX_ROWS {gpu_abi.LINEAR_W8_MAX_ROWS}\n" in text


def test_the_harness_has_no_definition_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    monkeypatch.delitem(sys.modules, "ccqlib", raising=False)
    import ccqlib

    own = [v for v in vars(ccqlib).values() if isinstance(v, type(ctypes.Structure))]
    assert not own
    assert ccqlib.abi.FUNCTIONS == gpu_abi.FUNCTIONS
