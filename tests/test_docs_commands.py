# SPDX-License-Identifier: Apache-2.0
"""Commands in the documents: they parse as written, and every flag, command and operator exists."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from paddle_ccq.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = [
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("serving/**/*.md")),
    *(ROOT / folder / "README.md" for folder in ("examples", "custom_ops/gpu")),
]
# What stands after `paddle-ccq` or `python -m paddle_ccq.` -> the module.
MODULES = {name: module for name, (module, _) in COMMANDS.items()}
MODULES |= {module: module for module in MODULES.values()}
# Documents that speak of no other program's flags.
OWN_FLAGS_ONLY = ("architecture.md", "notes/encoder.md", "reference/checkpoints.md")
OWN_FLAGS_ONLY += ("reference/formats.md",)
COMMAND = re.compile(r"(?:python3? -m paddle_ccq\.|paddle-ccq +)([\w-]+(?:\.\w+)*)([^\n#]*)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parser_of(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"paddle_ccq.{MODULES[command]}").build_parser()


def flags_of(command: str) -> set[str]:
    parser = parser_of(command)
    return {flag for action in parser._actions for flag in action.option_strings}


def commands_in(text: str) -> list[tuple[str, str]]:
    """(command, the rest of its line) for all mentions in blocks and in inline code."""
    fence = re.compile(r"^```.*?^```", re.S | re.M)
    blocks = [block.replace("\\\n", " ") for block in fence.findall(text)]
    inline = [s.replace("\n", " ") for s in re.findall(r"`([^`]+)`", fence.sub("", text))]
    return [found for part in blocks + inline for found in COMMAND.findall(part)]


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_flags_after_a_command_exist(path: Path) -> None:
    for command, rest in commands_in(path.read_text("utf-8")):
        assert command in MODULES or importlib.util.find_spec(f"paddle_ccq.{command}")
        if command not in MODULES:
            continue
        unknown = set(re.findall(r"--[a-z][\w-]*", rest)) - flags_of(command)
        assert not unknown, f"{command} has no {unknown}"


@pytest.mark.parametrize("name", OWN_FLAGS_ONLY)
def test_flags_on_their_own_exist_in_some_command(name: str) -> None:
    known = set().union(*map(flags_of, MODULES))
    text = (ROOT / "docs" / name).read_text("utf-8")
    mentioned = set(re.findall(r"`(?:quantize |verify )?(--[a-z][\w-]*)", text))
    assert mentioned - known == set()


def test_commands_in_blocks_parse_as_they_are_written() -> None:
    """Every value, choice and required argument too; `...` stands for more."""
    seen = 0
    for path in DOCS:
        blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", path.read_text("utf-8"), re.S | re.M)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            for command, rest in COMMAND.findall(line):
                words = shlex.split(re.split(r" (?:&&|\||>) ", rest)[0])
                if command not in MODULES or "..." in words:
                    continue
                parsed = parser_of(command).parse_args(words)  # exits where it does not parse
                assert parsed, (name_of(path), line)
                seen += 1
    assert seen > 30


def strings_of(script: Path, seen: set[Path]) -> set[str]:
    """Strings of a script and of the repository's scripts that it imports."""
    seen.add(script)
    nodes = list(ast.walk(ast.parse(script.read_text("utf-8"))))
    found = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in names:
        for base in (script.parent, script.parent.parent, ROOT):
            file = base / (name.replace(".", "/") + ".py")
            if file.exists() and file not in seen:
                found |= strings_of(file, seen)
    return found


def test_flags_of_scripts_exist() -> None:
    call = re.compile(r"python3? ((?:benchmarks|serving|examples|tests)/[\w/.-]+\.py)([^\n#`|&]*)")
    found = {
        (name_of(path), script, flag)
        for path in DOCS
        for script, rest in call.findall(path.read_text("utf-8").replace("\\\n", " "))
        for flag in ["", *re.findall(r"--[a-z][\w-]*", rest)]
    }
    assert len(found) > 60
    missing = [entry for entry in found if not (ROOT / entry[1]).exists()]
    assert missing == []
    known = {script: strings_of(ROOT / script, set()) for _, script, _ in found}
    assert sorted(e for e in found if e[2] and e[2] not in known[e[1]]) == []


def test_the_api_page_has_every_command() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text("utf-8")
    assert sorted(re.findall(r"^\| `([\w-]+)`", text, re.M)) == sorted(COMMANDS)


def test_the_operators_page_has_every_paddle_op() -> None:
    text = (ROOT / "docs" / "reference" / "ops.md").read_text("utf-8")
    sources = [path.read_text("utf-8") for path in (ROOT / "custom_ops/paddle").glob("*.cu")]
    built = set(re.findall(r"PD_BUILD_OP\((\w+)\)", "".join(sources)))
    table = text.partition("| op | inputs |")[2]
    assert built == set(re.findall(r"^\| `(\w+)` \|", table, re.M))
