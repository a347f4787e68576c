# SPDX-License-Identifier: Apache-2.0
"""A source tree that was never built: what needs no compiled core works, the rest says so.

Every command runs in a process of its own, on a copy of the package without any compiled file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.quantize import quantize

PACKAGE = Path(__file__).parent.parent / "paddle_ccq"
CONFIG = tiny_config(num_hidden_layers=2, moe_num_experts=2)
HOW = "python setup.py build_ext --inplace"
# An editable install puts a finder into every process, which would find the checkout's core.
NO_EDITABLE_INSTALL = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
"""


def python(tree: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(PACKAGE, root / "paddle_ccq", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    (root / "sitecustomize.py").write_text(NO_EDITABLE_INSTALL)
    write_checkpoint(root / "model", CONFIG)
    (root / "model" / "tokenizer.model").write_bytes(b"spm")
    quantize(root / "model", root / "quantized", preset="fast", quiet=True)
    return root


def run(tree: Path, *args: str) -> subprocess.CompletedProcess[str]:
    done = python(tree, "-m", *args)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_copy_has_no_core(tree):
    done = python(tree, "-c", "import paddle_ccq._core")
    assert done.returncode == 1 and "paddle_ccq._core" in done.stderr


@pytest.mark.parametrize("how", ["paddle_ccq.quantize", "paddle_ccq"])
def test_a_dry_run_prints_the_plan_and_what_to_build(tree, how):
    command = [how] if how.endswith("quantize") else [how, "quantize"]
    done = run(tree, *command, "--model", "model", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "disk needed" in done.stdout
    assert "time (estimate): not known: the compiled core" in done.stdout and HOW in done.stdout


@pytest.mark.parametrize(
    "flags", [("--encoder", "paper"), ("--wint4-end-layer", "1"), ("--format", "ccq-2.5")]
)
def test_a_dry_run_measures_encoders_that_need_no_core(tree, flags):
    done = run(tree, "paddle_ccq.quantize", "--model", "model", "--dry-run", *flags)
    assert done.returncode == 0, done.stderr
    assert ("not known" in done.stdout) == (flags[0] == "--format")


def test_quantize_says_what_to_run_and_writes_nothing(tree, tmp_path):
    out = tmp_path / "out"
    done = run(tree, "paddle_ccq.quantize", "--model", "model", "--output", str(out))
    assert done.returncode == 2
    assert HOW in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_needs_no_core_works(tree, tmp_path):
    assert run(tree, "paddle_ccq.verify", "quantized", "--reference", "model").returncode == 0
    done = run(tree, "paddle_ccq.dequantize", "quantized", "--output", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    flags = ("--model", "model", "--output", str(tmp_path / "b"), "--encoder", "paper", "--quiet")
    assert run(tree, "paddle_ccq.quantize", *flags).returncode == 0
    check = run(tree, "paddle_ccq.fastdeploy.check", "quantized", "--gpu-memory", "80")
    assert "--tensor-parallel-size" in check.stdout  # the command that it proposes


@pytest.mark.parametrize("command", ["serve", "sensitivity", "evaluate", "tune", "sample"])
def test_every_command_explains_itself(tree, command):
    assert run(tree, "paddle_ccq", command, "--help").returncode == 0


def test_the_server_names_the_core_and_not_a_package(tree):
    pytest.importorskip("fastapi")
    done = run(tree, "paddle_ccq.serve", "quantized", "--port", "0")
    assert done.returncode == 2
    assert HOW in done.stderr and len(done.stderr.splitlines()) == 1


def test_operators_name_the_core(tree):
    code = (
        "from paddle_ccq import ops, errors\n"
        "try:\n    ops.dequant\n"
        "except errors.CcqError as error:\n    print(error)"
    )
    done = python(tree, "-c", code)
    assert HOW in done.stdout, done.stderr
