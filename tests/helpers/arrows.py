# SPDX-License-Identifier: Apache-2.0
"""Which part of the package imports which: as the sources have it, and as the page says.

    python tests/helpers/arrows.py              # what differs
    python tests/helpers/arrows.py --write      # write the sources' arrows into the page

A part is a folder of the package or a module beside the folders; `__init__` is the package itself.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "paddle_ccq"
PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## Arrows"
# The compiled core: a module without a Python file.
CORE = "_core"

# Importer and imported -> the places of the imports, as FILE:LINE.
Imports = dict[tuple[str, str], list[str]]


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports that run, also those inside functions; those for type checkers do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from statements(ast.Module([other], []))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from statements(node)


def targets(statement: ast.Import | ast.ImportFrom, package: list[str]) -> Iterator[str]:
    """Dotted names that a statement imports, in a file of the dotted package `package`."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    base = package[: len(package) - statement.level + 1] if statement.level else []
    base = base + (statement.module.split(".") if statement.module else [])
    # A name may be a module or something inside one.
    yield from (".".join([*base, alias.name]) for alias in statement.names)


def module_of(name: str, package: Path = PACKAGE) -> str | None:
    """The module that a dotted name is or is in; None outside the package."""
    top, *parts = name.split(".")
    if top != package.name:
        return None
    while parts and parts != [CORE]:
        path = package.joinpath(*parts)
        if path.is_dir() or path.with_suffix(".py").is_file():
            break
        parts.pop()
    return ".".join([top, *parts])


def part_of(name: str, package: Path = PACKAGE) -> str | None:
    """The part that a dotted name belongs to; None outside the package."""
    module = module_of(name, package)
    return module and (module.split(".")[1:] or ["__init__"])[0]


def imports(package: Path = PACKAGE, node: Callable[..., str | None] = part_of) -> Imports:
    """The arrows between different parts, or between modules with `module_of`, from the sources."""
    found: Imports = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        parent = [package.name, *place.parts[:-1]]
        own_name = ".".join([*parent, place.stem]).removesuffix(".__init__")
        importer = node(own_name, package)
        tree = ast.parse(path.read_text("utf-8"), str(path))
        for statement in statements(tree):
            for name in targets(statement, parent):
                imported = node(name, package)
                if imported is not None and imported != importer:
                    where = f"{place.as_posix()}:{statement.lineno}"
                    places = found.setdefault((importer, imported), [])
                    places += [where] if where not in places else []
    return found


def block(arrows: set[tuple[str, str]]) -> str:
    """The arrows as lines `part -> parts`, each below the lines of all that it imports.

    Raises:
        graphlib.CycleError: they form a circle.
    """
    graph: dict[str, set[str]] = {}
    for importer, part in arrows:
        graph.setdefault(importer, set()).add(part)
    depth: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        depth[name] = 1 + max((depth[part] for part in graph.get(name, ())), default=-1)
    order = sorted(graph, key=lambda name: (depth[name], name))
    return "".join(f"{name} -> {', '.join(sorted(graph[name]))}\n" for name in order)


def fenced(page: str) -> re.Match[str]:
    """The block below the page's heading; group 1 is what stands between the fences."""
    found = re.search(rf"^{HEADING}\n(?:(?!^## |^```).*\n)*?^```\n((?:.*\n)*?)^```$", page, re.M)
    if found is None:
        raise ValueError(f"no fenced block under {HEADING!r}")
    return found


def written(page: str) -> set[tuple[str, str]]:
    """The arrows that the page has.

    Raises:
        ValueError: no block, or a line that is none of arrows.
    """
    found: set[tuple[str, str]] = set()
    for line in fenced(page)[1].splitlines():
        importer, arrow, parts = line.partition(" -> ")
        for part in parts.split(", "):
            if not (arrow and re.fullmatch(r"\w+", importer) and re.fullmatch(r"\w+", part)):
                raise ValueError(f"{line!r}: not of the form 'part -> part, part'")
            if (importer, part) in found:
                raise ValueError(f"{line!r}: {importer} -> {part} stands there twice")
            found.add((importer, part))
    return found


def differences(found: Imports, said: set[tuple[str, str]]) -> list[str]:
    """One line for every arrow that only the sources or only the page has."""
    missing = [
        f"the page has no {a} -> {b} ({', '.join(found[a, b])})"
        for a, b in sorted(found.keys() - said)
    ]
    return missing + [f"nothing imports as {a} -> {b} says" for a, b in sorted(said - found.keys())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the sources' arrows")
    args = parser.parse_args()
    page, found = PAGE.read_text("utf-8"), imports()
    lines = differences(found, written(page))
    print("\n".join(lines) or "no difference")
    if args.write:
        start, end = fenced(page).span(1)
        PAGE.write_text(page[:start] + block(set(found)) + page[end:], "utf-8")
    return 1 if lines and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
