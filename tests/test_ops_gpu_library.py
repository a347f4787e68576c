# SPDX-License-Identifier: Apache-2.0
"""The way to the GPU: a missing library or GPU that is no clear error, structures that differ."""

from __future__ import annotations

import ctypes
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from helpers.synthetic import tiny_config, write_checkpoint, zero_tensors
from paddle_ccq import _core
from paddle_ccq.codec import formats
from paddle_ccq.encoder import layouts, recipes
from paddle_ccq.encoder.factory import make_encoder
from paddle_ccq.encoder.search import pair_books
from paddle_ccq.errors import CcqError
from paddle_ccq.ops import gpu, gpu_build, gpu_library
from paddle_ccq.quantize import main

ROOT = Path(__file__).resolve().parents[1]


class DecodesNothing:
    """Stands for the library: remembers the format's number and writes zeros."""

    number = -1

    def ccq_dequant_host(self, arguments: Any) -> int:
        args = arguments._obj
        self.number = args.format
        ctypes.memset(args.out, 0, args.k * args.n * 4)
        return 0


@pytest.mark.parametrize("format", [name for name in formats.CCQ_FORMATS if name != "ccq-2t"])
def test_decoding_names_the_format_by_the_headers_number(
    monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    library = DecodesNothing()
    monkeypatch.setattr(gpu_library, "load", lambda: library)
    found = gpu.dequant(format, zero_tensors(format, 256, 32), "float32")
    assert found.shape == (256, 32) and not found.any()
    header = (ROOT / "custom_ops/gpu/common/dequant.h").read_text()
    name = format.upper().replace("-", "").replace(".", "")
    assert f"CCQ_{name} = {library.number}" in header


def test_what_a_gpu_only_multiplies_with_is_not_decoded() -> None:
    with pytest.raises(ValueError, match=r"format: ccq-2t .* ops\.dequant"):
        gpu.dequant("ccq-2t", zero_tensors("ccq-2t", 128, 32))


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(gpu_library.ENVIRONMENT, str(tmp_path / "none.so"))
    gpu_library.load.cache_clear()
    yield
    gpu_library.load.cache_clear()


def test_a_missing_library_says_how_to_build_it(no_library: None) -> None:
    assert not gpu_library.available()
    encoder = make_encoder("wint2", device="gpu")
    with pytest.raises(CcqError, match=r"python -m paddle_ccq\.ops\.gpu_library"):
        encoder.encode(np.ones((8, 128), np.float32))


def test_quantize_on_a_gpu_that_is_not_there_is_one_line(
    no_library: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_checkpoint(model, tiny_config())
    code = main(["--model", str(model), "--output", str(tmp_path / "out"), "--device", "gpu"])
    error = capsys.readouterr().err
    assert code == 2 and "GPU library" in error and not (tmp_path / "out").exists()


def test_a_file_that_is_no_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setenv(gpu_library.ENVIRONMENT, str(tmp_path / "broken.so"))
    gpu_library.load.cache_clear()
    try:
        with pytest.raises(CcqError, match=r"broken\.so: cannot be loaded"):
            gpu_library.load()
    finally:
        gpu_library.load.cache_clear()


def test_a_library_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any shared library without the functions will do.
    monkeypatch.setenv(gpu_library.ENVIRONMENT, _core.__file__)
    gpu_library.load.cache_clear()
    try:
        with pytest.raises(CcqError, match=r"of another version.*build it again"):
            gpu_library.load()
    finally:
        gpu_library.load.cache_clear()


@pytest.mark.parametrize("format", list(layouts.LAYOUTS))
def test_every_recipe_fits_the_c_structures(format: str) -> None:
    layout = layouts.LAYOUTS[format]
    for recipe in recipes.RECIPES[format].values():
        books = pair_books(format, recipe)
        c = gpu._layout(layout.as_dict(), books[0])
        used = [c.vector[i] for i in range(c.vectors)]
        covered = sorted(v.first + d for v in used for d in range(v.dims))
        assert covered == list(range(64 - bool(layout.remainder_shift)))
        r = gpu._recipe(recipe.as_dict())
        assert list(r.kappas[: r.kappa_count]) == list(recipe.kappas)
        entries = gpu._entries(books, layout.fraction)
        assert len(entries) == len(books) * sum(c.entries[: c.books])
        assert recipe.keep_pairs <= 4 and sum(c.entries[: c.books]) * recipe.keep_pairs <= 1024
        assert recipe.window[1] - recipe.window[0] < 10
        arguments = gpu.encode_arguments(books, layout.as_dict(), recipe.as_dict())
        np.testing.assert_array_equal(arguments[0], entries.reshape(len(books), -1, 2))
        assert np.array(arguments[1], np.int32).tobytes() == bytes(c)
        assert np.array(arguments[2], np.int32).tobytes() == bytes(r)
    assert ctypes.sizeof(gpu_library.EncodeVector) == 5


def test_a_wheels_library_is_taken_before_a_built_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(gpu_library.ENVIRONMENT, raising=False)
    packaged, built = tmp_path / "packaged.so", tmp_path / "built.so"
    monkeypatch.setattr(gpu_library, "_PACKAGED", packaged)
    monkeypatch.setattr(gpu_library, "_BUILT", built)
    built.touch()
    assert gpu_library.library_path() == built
    packaged.touch()
    assert gpu_library.library_path() == packaged
    monkeypatch.setenv(gpu_library.ENVIRONMENT, "elsewhere.so")
    assert gpu_library.library_path() == Path("elsewhere.so")


def test_the_version_is_the_sources_and_others_are_refused() -> None:
    from paddle_ccq.ops import gpu_abi

    source = (ROOT / "custom_ops" / "gpu" / "common" / "library.cu").read_text()
    assert f"return {gpu_abi.VERSION};" in source

    class Other:
        @staticmethod
        def ccq_library_version() -> int:
            return gpu_abi.VERSION + 1

    with pytest.raises(CcqError, match=rf"interface {gpu_abi.VERSION + 1}, this package needs"):
        gpu_library._check_version(Other(), Path("x.so"))


def test_every_source_of_the_library_is_compiled() -> None:
    folder = ROOT / "custom_ops" / "gpu"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.cu")} == set(gpu_build.SOURCES)
    command = gpu_build.nvcc_command(folder, Path("out.so"), (80, 90))
    assert all(str(folder / name) in command for name in gpu_build.SOURCES)
    assert "-gencode=arch=compute_90a,code=sm_90a" in command and "-DCCQ_SM90A" in command
    assert "-DCCQ_SM90A" not in gpu_build.target_flags([80])


def test_a_wheel_has_the_architectures_that_were_asked_for() -> None:
    assert gpu_build.wheel_architectures("1") == gpu_build.WHEEL_ARCHITECTURES
    assert gpu_build.wheel_architectures("0") == gpu_build.wheel_architectures("") == ()
    assert gpu_build.wheel_architectures("90,80") == (90, 80)
    for wrong in ("yes", "91", "80,", "80 90", "true"):
        with pytest.raises(ValueError, match="80,86,89"):
            gpu_build.wheel_architectures(wrong)


def test_the_paddle_ops_are_built_from_the_same_list(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    paddle, utils, extension = (
        ModuleType(name) for name in ("paddle", "paddle.utils", "paddle.utils.cpp_extension")
    )
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True, raising=False)
    monkeypatch.setattr(extension, "CUDAExtension", lambda **given: given, raising=False)
    monkeypatch.setattr(extension, "setup", lambda **given: found.update(given), raising=False)
    for module in (paddle, utils, extension):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("CUDA_HOME", "somewhere")
    monkeypatch.setenv("CCQ_CUDA_ARCHITECTURES", "80;90")
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "custom_ops" / "setup.py"))
    sources = found["ext_modules"]["sources"]
    assert all((ROOT / "custom_ops" / name).is_file() for name in sources)
    device = {name.removeprefix("gpu/") for name in sources if name.startswith("gpu/")}
    assert device == {name for name in gpu_build.SOURCES if "/host" not in name}
    assert {name for name in sources if name.startswith("paddle/")} == {
        f"paddle/{path.name}" for path in (ROOT / "custom_ops" / "paddle").glob("*.cu")
    }
    flags = found["ext_modules"]["extra_compile_args"]["nvcc"]
    assert "-gencode=arch=compute_90a,code=sm_90a" in flags and "-DCCQ_SM90A" in flags
