# SPDX-License-Identifier: Apache-2.0
"""Typed access to the fields of a config.json, with errors that name the file and the key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import CcqError

_REQUIRED = object()
# Builds the error for a key and what is wrong with it.
Fail = Callable[[str, str], Exception]


class Fields:
    """Typed access to the fields of one config; a null counts as absent."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, problem: str) -> CcqError:
        """The error to raise for a key, which names the file and the key before the problem."""
        return CcqError(f"{self.where}: {key}: {problem}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """A value of any type; without a default the key is required.

        Raises:
            CcqError: if it is required and absent.
        """
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(key, "missing")
            return default
        return value

    def integer(self, key: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        """An integer from `low` to `high`, both included; true and 1.0 are none.

        A default is held to the same limits.

        Raises:
            CcqError: for any other value, or if the key is required and absent.
        """
        value = self.get(key, default)
        if isinstance(value, list) and key.startswith("moe_"):
            raise self.fail(
                key, "a list, as vision-language models have; only text models are supported"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            shown = value if isinstance(value, bool) else show(value)
            raise self.fail(key, f"{shown} is not an integer from {low} to {high}")
        return value

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number above 0 and below 1e30.

        Raises:
            CcqError: for any other value, or if the key is required and absent.
        """
        value = self.get(key, default)
        # Integers beyond the float range are compared as integers and so never converted.
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30
        if not good or not math.isfinite(value):
            raise self.fail(key, f"{show(value)} is not a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; 0 and 1 are neither.

        Raises:
            CcqError: for any other value.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"{show(value)} is neither true nor false")
        return value


def check_same(first: str, value: Any, second: str, other: Any, fail: Fail) -> None:
    """Refuse two keys that state one value differently."""
    if not same(value, other):
        raise fail(
            first,
            f"{show(value)}, but {second} says {show(other)}; both mean the same, so keep the one"
            " that is right",
        )


def same(value: Any, other: Any) -> bool:
    """Equality of JSON values in which true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def show(value: object) -> str:
    """A value for an error message, cut where it is long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer too long for Python to print
        text = "the number"
    return text if len(text) <= 60 else text[:57] + "..."
