# SPDX-License-Identifier: Apache-2.0
"""Imports that the architecture page lacks, circles, long lists of parameters, tests' imports."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import arrows

TESTS = Path(__file__).resolve().parent
# The console script and the Python API import a command by its name, when it is asked for; `ops`
# does so with its own modules, and the registry of families with all that lie beside it.
BY_NAME = {"api.py", "cli.py", "families/registry.py", "ops/__init__.py"}


@pytest.fixture(scope="module")
def imports() -> arrows.Imports:
    return arrows.imports()


def test_the_pages_arrows_are_the_imports(imports) -> None:
    found = arrows.differences(imports, arrows.written(arrows.PAGE.read_text("utf-8")))
    assert not found, "\n".join([*found, "meant? then: python tests/helpers/arrows.py --write"])


def test_no_circle_among_folders_nor_among_modules(imports) -> None:
    arrows.block(set(imports))
    modules = arrows.imports(node=arrows.module_of)
    assert len(modules) > 2 * len(imports)
    arrows.block(set(modules))


def test_the_block_is_what_the_script_writes(imports) -> None:
    assert arrows.fenced(arrows.PAGE.read_text("utf-8"))[1] == arrows.block(set(imports))


def test_imports_by_a_name_made_at_run_time() -> None:
    """No page has them, so they are few and known."""
    found = {
        path.relative_to(arrows.PACKAGE).as_posix()
        for path in arrows.PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).rpartition(".")[2] in ("import_module", "__import__")
        and len(call.args) > 1  # a second argument: relative to a package, hence our own
    }
    assert found == BY_NAME


# --- functions ------------------------------------------------------------------------------------

# More are one record, such as the options of a command.
MOST_PARAMETERS = 8
# The paper's own signature.
LONG_LISTS = {"codec/reference.py:algorithm_3"}


def test_lists_of_parameters_are_short() -> None:
    found = set()
    for path in arrows.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len(given) - (bool(given) and given[0].arg in ("self", "cls"))
            if count > MOST_PARAMETERS:
                found.add(f"{path.relative_to(arrows.PACKAGE).as_posix()}:{node.name}")
    assert found == LONG_LISTS


# --- the reading of sources and page --------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package `house` with every way to import."""
    sources = {
        "__init__.py": "from .version import number\n",
        "version.py": "number = 1\n",
        "cellar/__init__.py": "",
        "cellar/wine.py": "import json\nfrom .. import __doc__, number\n",
        "attic/__init__.py": "from .box import lid\n",
        "attic/box.py": "from house.cellar import wine\ndef lid():\n    from ..stairs import up\n",
        "stairs.py": (
            "from typing import TYPE_CHECKING\nimport typing\n"
            "if TYPE_CHECKING:\n    from . import attic\n"
            "else:\n    from .cellar.wine import number as n\n"
            "if typing.TYPE_CHECKING:\n    import house.attic.box\n"
            "try:\n    import house.version as up\nexcept ImportError:\n    up = None\n"
        ),
    }
    for name, text in sources.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "house"


def test_every_kind_of_import_is_seen(package: Path) -> None:
    assert arrows.imports(package) == {
        ("__init__", "version"): ["__init__.py:1"],
        ("cellar", "__init__"): ["cellar/wine.py:2"],
        ("attic", "cellar"): ["attic/box.py:1"],
        ("attic", "stairs"): ["attic/box.py:3"],
        ("stairs", "cellar"): ["stairs.py:6"],
        ("stairs", "version"): ["stairs.py:10"],
    }


def test_imports_of_modules(package: Path) -> None:
    found = arrows.imports(package, arrows.module_of)
    assert set(found) - {(f"house.{a}", f"house.{b}") for a, b in arrows.imports(package)} == {
        ("house", "house.version"),
        ("house.cellar.wine", "house"),
        ("house.attic", "house.attic.box"),
        ("house.attic.box", "house.cellar.wine"),
        ("house.attic.box", "house.stairs"),
        ("house.stairs", "house.cellar.wine"),
    }


def test_what_differs_is_named_with_its_place(package: Path) -> None:
    found = arrows.imports(package)
    said = set(found) - {("attic", "stairs")} | {("cellar", "version")}
    assert arrows.differences(found, said) == [
        "the page has no attic -> stairs (attic/box.py:3)",
        "nothing imports as cellar -> version says",
    ]
    assert arrows.differences(found, set(found)) == []


def test_the_block_goes_from_the_ground_up(package: Path) -> None:
    said = arrows.block(set(arrows.imports(package)))
    assert said.splitlines() == [
        "__init__ -> version",
        "cellar -> __init__",
        "stairs -> cellar, version",
        "attic -> cellar, stairs",
    ]
    page = f"# Page\n\n## Arrows\n\nWords.\n\n```\n{said}```\n\n## Other\n\n```\na -> b\n```\n"
    assert arrows.written(page) == set(arrows.imports(package))
    with pytest.raises(graphlib.CycleError):
        arrows.block({*arrows.imports(package), ("cellar", "attic")})


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("## Other\n\n```\na -> b\n```\n", "no fenced block under '## Arrows'"),
        ("## Arrows\n\n## Other\n\n```\na -> b\n```\n", "no fenced block under '## Arrows'"),
        ("## Arrows\n```\na <- b\n```\n", "'a <- b': not of the form"),
        ("## Arrows\n```\na -> b,c\n```\n", "'a -> b,c': not of the form"),
        ("## Arrows\n```\na -> b\na -> c, b\n```\n", "a -> b stands there twice"),
    ],
)
def test_pages_that_cannot_be_read(page: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        arrows.written(page)


# --- the tests themselves -------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """Top names that a file imports, also inside functions."""
    return {
        name.split(".")[0]
        for statement in arrows.statements(ast.parse(path.read_text("utf-8")))
        for name in arrows.targets(statement, [])
    }


def test_no_test_file_imports_a_test_file() -> None:
    files = sorted(TESTS.rglob("*.py"))
    tests = {path.stem for path in files if path.name.startswith("test_")} | {"conftest"}
    assert "test_architecture" in tests
    assert {path.name: found for path in files if (found := imported(path) & tests)} == {}


def test_every_helper_is_used() -> None:
    helpers = {path.stem for path in (TESTS / "helpers").glob("*.py")} - {"__init__"}
    used = {
        name.split(".")[1]
        for path in TESTS.rglob("*.py")
        for statement in arrows.statements(ast.parse(path.read_text("utf-8")))
        for name in arrows.targets(statement, [])
        if name.startswith("helpers.")
    }
    assert helpers == used & helpers and helpers


@pytest.mark.parametrize("script", ["arrows", "held_bytes", "held_kernels"])
def test_the_scripts_among_the_helpers_start_from_anywhere(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "helpers" / f"{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--write" in done.stdout, done.stderr
