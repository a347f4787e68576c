# SPDX-License-Identifier: Apache-2.0
"""Shared arguments: a flag that means one thing here and another there, or that is missing."""

from __future__ import annotations

import importlib

import pytest

from paddle_ccq.arguments import Arguments
from paddle_ccq.cli import COMMANDS, main, usage
from paddle_ccq.parser import Parser

PARSERS = {
    name: importlib.import_module(f"paddle_ccq.{module}").build_parser()
    for name, (module, _) in COMMANDS.items()
}
# All but gpu-library, which takes no model and no file.
WITH_MODELS = {name: parser for name, parser in PARSERS.items() if isinstance(parser, Arguments)}
# Commands that read no float model, load none from a hub, or show nothing while they work.
WITHOUT = {
    "--threads": {"verify", "dequantize", "fastdeploy-check", "fastdeploy-launch", "vllm-check"},
    "--source": {"serve", "fastdeploy-check", "fastdeploy-launch", "vllm-check"},
    "--quiet": {"fastdeploy-check", "fastdeploy-launch", "vllm-check"},
}


@pytest.mark.parametrize("flag", WITHOUT)
def test_a_shared_flag_is_everywhere_where_it_has_a_meaning(flag: str) -> None:
    having = {name for name, parser in PARSERS.items() if flag in parser._option_string_actions}
    assert having == WITH_MODELS.keys() - WITHOUT[flag]


def test_every_command_but_one_works_on_a_model() -> None:
    assert PARSERS.keys() - WITH_MODELS.keys() == {"gpu-library"}


@pytest.mark.parametrize("name", PARSERS)
def test_flags_may_have_underscores_and_are_never_abbreviated(name: str) -> None:
    parser = PARSERS[name]
    assert isinstance(parser, Parser) and not parser.allow_abbrev
    assert parser.prog == f"paddle-ccq {name}"
    for flag in parser._option_string_actions:
        if flag.startswith("--"):
            assert "--" + flag[2:].replace("-", "_") in parser._option_string_actions
    assert "--json" not in parser._option_string_actions or (
        "--force" in parser._option_string_actions
    )


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_no_number_is_named_with_its_flag_and_no_name_of_ours(name: str, capsys) -> None:
    for action in PARSERS[name]._actions:
        if action.type in (None, str.upper):
            continue
        flag = action.option_strings[0]
        for value in ("x", "", "nan", "inf", "1e999", "0x10", "1 2"):
            for written in (flag, "--" + flag[2:].replace("-", "_")):
                assert main([name, "x", f"{written}={value}"]) == 2
                out, err = capsys.readouterr()
                assert not out and err.count("\n") == 1, err
                assert err.startswith(f"error: argument {flag}: {value!r} is not a "), err


@pytest.mark.parametrize("name", PARSERS)
def test_help_names_every_flag_once(name: str) -> None:
    text = PARSERS[name].format_help()
    for flag in PARSERS[name]._option_string_actions:
        if "_" in flag:
            assert flag not in text


@pytest.mark.parametrize("name", sorted(WITH_MODELS.keys() - {"tune", "fastdeploy-launch"}))
def test_the_model_is_the_first_argument_or_a_flag(name: str, capsys) -> None:
    needed = {"sample": ["--output", "x.jsonl"], "dequantize": ["--output", "x"]}
    needed["sensitivity"] = ["--calibration", "x"]
    needed["vllm-check"] = ["--gpu-memory", "80"]
    rest, parser = needed.get(name, []), PARSERS[name]
    first, flag = parser.parse_args(["here", *rest]), parser.parse_args(["--model", "here", *rest])
    assert first == flag and "here" in vars(first).values()
    for arguments, said in (
        (rest, "name the model once: as the first argument, or with --model"),
        (["a", "--model", "b", *rest], "the model is named twice: a and --model b"),
    ):
        assert main([name, *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("name", ["evaluate", "quantize", "sample", "sensitivity", "tune"])
def test_a_number_of_threads_is_at_least_one(name: str, tmp_path, capsys) -> None:
    rest = {
        "evaluate": ["x", "--text", "x"],
        "quantize": ["x", "--output", str(tmp_path / "o")],
        "sample": ["x", "--output", str(tmp_path / "o.jsonl")],
        "sensitivity": ["x", "--calibration", "x"],
        "tune": ["x", "--reference", "y", "--calibration", "x", "--output", str(tmp_path / "o")],
    }[name]
    assert main([name, *rest, "--threads", "0"]) == 2
    assert capsys.readouterr().err == "error: --threads 0: must be at least 1\n"


def test_every_command_is_listed_with_what_it_does() -> None:
    text = usage()
    for name, (_, said) in COMMANDS.items():
        assert f"  {name} " in text and said in text
