# SPDX-License-Identifier: Apache-2.0
"""The options of the Python functions: one record each, which agrees with the command's flags."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import pytest

from paddle_ccq.errors import CcqError

# Command -> its record, the positional arguments of its function, and fields that are no flag.
RECORDS = {
    "quantize": ("QuantizeOptions", ("model",), set()),
    "evaluate": ("EvaluateOptions", ("model",), {"log", "show_progress"}),
    "sensitivity": ("SensitivityOptions", ("model", "text"), {"log", "show_progress"}),
    "tune": ("TuneOptions", ("packed", "model", "text", "out"), set()),
}


def module(command: str) -> Any:
    # Not "from paddle_ccq import evaluate": that may become the function of the same name.
    return importlib.import_module(f"paddle_ccq.{command}")


@pytest.mark.parametrize("command", RECORDS)
def test_every_option_is_a_flag_of_the_command(command: str) -> None:
    record, _, other = RECORDS[command]
    names = {option.name for option in fields(getattr(module(command), record))}
    flags = {action.dest for action in module(command).build_parser()._actions}
    assert names - flags == other


@pytest.mark.parametrize("command", RECORDS)
def test_an_option_that_does_not_exist_is_a_type_error(command: str) -> None:
    _, arguments, _ = RECORDS[command]
    with pytest.raises(TypeError, match="thread"):
        getattr(module(command), command)(*arguments, thread=2)


@pytest.mark.parametrize("command", RECORDS)
def test_values_are_refused_before_anything_is_read(command: str) -> None:
    _, arguments, _ = RECORDS[command]
    with pytest.raises(CcqError, match="threads"):
        getattr(module(command), command)(*arguments, threads=0)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("evaluate", "max_tokens", 0),
        ("evaluate", "max_items", -1),
        ("sensitivity", "method", "cubic"),
        ("sensitivity", "formats", ("wint2", "wint2")),
        ("sensitivity", "formats", ("wint3",)),
        ("sensitivity", "formats", ()),
        ("sensitivity", "experts", 0),
        ("sensitivity", "preset", "slow"),
        ("sensitivity", "device", "tpu"),
    ],
)
def test_errors_name_the_flag(command: str, option: str, value: object) -> None:
    record = getattr(module(command), RECORDS[command][0])
    with pytest.raises(CcqError, match="--" + option.replace("_", "-")):
        record(**{option: value})
