# SPDX-License-Identifier: Apache-2.0
"""The compiled GPU library: where it is looked for, how it is built, and the encoder's structures.

The structures of its products are in gpu_abi.py.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..command import run_command
from ..errors import CcqError
from ..parser import Parser, count
from . import gpu_abi
from .gpu_build import ARCHITECTURES, PACKAGED, SOURCES, nvcc_command

# Names a library outside the package, for instance one built for another GPU.
ENVIRONMENT = "PADDLE_CCQ_GPU_LIBRARY"
_PACKAGE = Path(__file__).resolve().parent.parent
_BUILT = _PACKAGE / "_gpu.so"
# What a wheel made with CCQ_BUILD_GPU=1 brings; taken before a library that was built here.
_PACKAGED = _PACKAGE / PACKAGED

MAX_VECTORS, MAX_BOOKS, MAX_KAPPAS, MAX_BATCH = 32, 2, 8, 8


class EncodeVector(ctypes.Structure):
    """One vector of a group (custom_ops/gpu/encode/encode.h)."""

    _fields_ = [(name, ctypes.c_uint8) for name in ("book", "first", "dims", "word", "shift")]


class EncodeLayout(ctypes.Structure):
    """struct ccq_encode_layout."""

    _fields_ = [
        ("vectors", ctypes.c_int),
        ("vector", EncodeVector * MAX_VECTORS),
        ("books", ctypes.c_int),
        ("entries", ctypes.c_int * MAX_BOOKS),
        ("words", ctypes.c_int),
        ("fraction", ctypes.c_int),
        ("state_min", ctypes.c_int),
        ("state_max", ctypes.c_int),
        ("remainder_shift", ctypes.c_int),
        ("scale_max", ctypes.c_int),
    ]


class EncodeRecipe(ctypes.Structure):
    """struct ccq_encode_recipe."""

    _fields_ = [
        ("nominal", ctypes.c_double),
        ("kappas", ctypes.c_double * MAX_KAPPAS),
        ("kappa_count", ctypes.c_int),
        ("window_low", ctypes.c_int),
        ("window_high", ctypes.c_int),
        ("ratios", ctypes.c_double * MAX_BATCH),
        ("ratio_count", ctypes.c_int),
        ("refits", ctypes.c_int),
        ("keep_pairs", ctypes.c_int),
    ]


class EncodeArgs(ctypes.Structure):
    """struct ccq_encode_args."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("layout", EncodeLayout),
        ("recipe", EncodeRecipe),
        ("entries", ctypes.c_void_p),
        ("pairs", ctypes.c_int),
        *[(name, ctypes.c_void_p) for name in ("words", "scales", "supers", "chosen", "sums")],
        ("workspace", ctypes.c_void_p),
    ]


class LdlqArgs(ctypes.Structure):
    """struct ccq_ldlq_args (custom_ops/gpu/ldlq/ldlq.h)."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("weight", "h", "feedback")],
        *[(name, ctypes.c_void_p) for name in ("d_root", "h_root", "h_inverse")],
        *[(name, ctypes.c_void_p) for name in ("books", "supers")],
        ("pairs", ctypes.c_int),
        ("candidates", ctypes.c_int),
        ("nominal", ctypes.c_float),
        *[(name, ctypes.c_int) for name in ("low", "high", "keep_pairs", "sweeps")],
        ("run_bytes", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("words", "scales", "found_supers")],
        *[(name, ctypes.c_void_p) for name in ("found_pairs", "loss")],
        *[(name, ctypes.c_void_p) for name in ("workspace", "screened")],
    ]


class TrellisArgs(ctypes.Structure):
    """struct ccq_trellis_args (custom_ops/gpu/encode/trellis.h)."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("nominal", ctypes.c_double),
        ("kappas", ctypes.c_double * MAX_KAPPAS),
        *[(name, ctypes.c_int) for name in ("kappa_count", "window_low", "window_high", "beam")],
        ("run_bytes", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("words", "scales", "supers", "sums", "workspace")],
    ]


class TrellisFactors(ctypes.Structure):
    """struct ccq_trellis_factors (custom_ops/gpu/encode/trellis_ldlq.h)."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("m", "root", "unit", "ratio", "spread")]


class TrellisLdlqArgs(ctypes.Structure):
    """struct ccq_trellis_ldlq_args."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("supers", ctypes.c_void_p),
        ("candidates", ctypes.c_int),
        ("h", ctypes.c_void_p),
        ("all", TrellisFactors),
        ("windows", TrellisFactors),
        ("inverse", ctypes.c_void_p),
        ("nominal", ctypes.c_double),
        *[(name, ctypes.c_int) for name in ("window_low", "window_high", "beam", "sweeps")],
        *[(name, ctypes.c_void_p) for name in ("words", "scales", "found_supers", "loss")],
        ("workspace", ctypes.c_void_p),
    ]


class DequantArgs(ctypes.Structure):
    """struct ccq_dequant_args."""

    _fields_ = [
        ("format", ctypes.c_int),
        ("runtime", ctypes.c_int),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("quant_weight", ctypes.c_void_p),
        ("weight_scale", ctypes.c_void_p),
        ("super_scales", ctypes.c_void_p),
        ("code_scale", ctypes.c_void_p),
        ("code_zp", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


def build(architectures: Sequence[int] = ARCHITECTURES, output: Path = _BUILT) -> Path:
    """Compile the library with nvcc for the given compute capabilities (90 is an H100 or H200).

    Raises:
        CcqError: without nvcc or the sources (they are in a checkout, not in a wheel), or when the
            compiler fails.
    """
    sources = Path(__file__).resolve().parents[2] / "custom_ops" / "gpu"
    if shutil.which("nvcc") is None:
        raise CcqError("nvcc is not on PATH; install the CUDA toolkit (12.0 or newer) to build")
    if not (sources / SOURCES[0]).exists():
        raise CcqError(f"{sources}: no sources of the GPU library; build it from a checkout")
    command = nvcc_command(sources, output, architectures)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CcqError(f"nvcc failed: {done.stderr.strip()[-400:]}")
    return output


def library_path() -> Path:
    """The library that is loaded: the one asked for, else a wheel's own, else one built here."""
    asked = os.environ.get(ENVIRONMENT)
    if asked:
        return Path(asked)
    return _PACKAGED if _PACKAGED.exists() else _BUILT


@cache
def load() -> ctypes.CDLL:
    """The library with its functions declared.

    Raises:
        CcqError: where there is none, saying how to build it.
    """
    path = library_path()
    if not path.exists():
        raise CcqError(
            f"{path}: the GPU library is not there; build it with "
            f"`python -m paddle_ccq.ops.gpu_library` (needs nvcc) or install a wheel that brings it"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CcqError(
            f"{path}: cannot be loaded: {error}; build it again with"
            " `python -m paddle_ccq.ops.gpu_library`, or install the wheel of the same release"
        ) from error
    _check_version(library, path)
    try:
        library.ccq_error_text.restype = ctypes.c_char_p
        library.ccq_encode_overlapped.argtypes = [ctypes.POINTER(EncodeArgs)]
        timing = [ctypes.POINTER(EncodeArgs), ctypes.POINTER(ctypes.c_float)]
        library.ccq_encode_host.argtypes = timing
        library.ccq_dequant_host.argtypes = [ctypes.POINTER(DequantArgs)]
        timing = [ctypes.POINTER(LdlqArgs), ctypes.POINTER(ctypes.c_float)]
        library.ccq_ldlq_host.argtypes = timing
        library.ccq_ldlq_workspace.argtypes = [ctypes.POINTER(LdlqArgs)]
        library.ccq_ldlq_workspace.restype = ctypes.c_size_t
        library.ccq_ldlq_held_bytes.restype = ctypes.c_size_t
        timing = [ctypes.POINTER(TrellisArgs), ctypes.POINTER(ctypes.c_float)]
        library.ccq_trellis_host.argtypes = timing
        library.ccq_trellis_workspace.argtypes = [ctypes.POINTER(TrellisArgs)]
        library.ccq_trellis_workspace.restype = ctypes.c_size_t
        library.ccq_trellis_held_bytes.restype = ctypes.c_size_t
        timing = [ctypes.POINTER(TrellisLdlqArgs), ctypes.POINTER(ctypes.c_float)]
        library.ccq_trellis_ldlq_host.argtypes = timing
        library.ccq_trellis_ldlq_workspace.argtypes = [ctypes.POINTER(TrellisLdlqArgs)]
        library.ccq_trellis_ldlq_workspace.restype = ctypes.c_size_t
        library.ccq_trellis_ldlq_held_bytes.restype = ctypes.c_size_t
    except AttributeError as error:
        raise CcqError(
            f"{path}: of another version ({error}); build it again with "
            f"`python -m paddle_ccq.ops.gpu_library`"
        ) from error
    return library


def load_products() -> ctypes.CDLL:
    """The library with the products for a model declared too (gpu_abi.FUNCTIONS).

    Raises:
        CcqError: where there is none, or one without all of them, saying what to do.
    """
    try:
        return gpu_abi.declare(load())
    except AttributeError as error:
        raise CcqError(
            f"{library_path()}: no products for a model ({error}); build it again with "
            "`python -m paddle_ccq.ops.gpu_library`"
        ) from None


def _check_version(library: ctypes.CDLL, path: Path) -> None:
    """Refuse a library whose C interface is not the one that this package speaks."""
    try:
        found = library.ccq_library_version()
    except AttributeError:
        found = 1  # before there was a number
    if found != gpu_abi.VERSION:
        raise CcqError(
            f"{path}: of another version (interface {found}, this package needs"
            f" {gpu_abi.VERSION}); build it again with `python -m paddle_ccq.ops.gpu_library`, or"
            " install the wheel of the same release"
        )


def available() -> bool:
    """A library is there and finds a GPU."""
    try:
        return load().ccq_device_count() > 0
    except CcqError:
        return False


def require() -> None:
    """Raise a CcqError where --device gpu cannot work: no library, no driver or no GPU."""
    load()
    if not available():
        raise CcqError("--device gpu: no NVIDIA GPU, or no driver for it; use --device cpu")


def check(library: ctypes.CDLL, status: int, what: str) -> None:
    """A CUDA error as a CcqError."""
    if status:
        text = library.ccq_error_text(status).decode()
        raise CcqError(f"{what} on the GPU failed: {text} (CUDA error {status})")


def build_parser() -> Parser:
    """One flag; there is no model and no file that other commands' arguments could name."""
    parser = Parser("gpu-library", "Compile the GPU library (needs nvcc).")
    parser.add_argument(
        "--architectures",
        type=count,
        nargs="+",
        default=list(ARCHITECTURES),
        metavar="N",
        help="compute capabilities times ten (default: 80 90)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The library's path is printed; exit code 0, or 2 if it can't be built."""

    def body(args: argparse.Namespace) -> int:
        print(build(args.architectures))
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
