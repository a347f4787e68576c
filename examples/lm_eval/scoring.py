# SPDX-License-Identifier: Apache-2.0
"""How the example's tasks are scored in lm-eval: as `paddle-ccq evaluate` scores them."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

SOLUTION = re.compile(r"The answer is\s*(-?\d+)")


def first_line(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The generated line is the answer."""
    return {"acc": float(results[0].split("\n")[0].strip() == doc["answer"].strip())}


def solution(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The generated line ends in the answer."""
    found = SOLUTION.search(results[0].split("\n")[0])
    return {"acc": float(found is not None and found.group(1) == doc["answer"].strip())}


def likeliest(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The choice with the largest mean log-likelihood of a token is the answer.

    lm-eval's own acc_norm divides by characters, so the tokens are counted here; the environment's
    TOKENIZER is the checkpoint folder.
    """
    sums = [loglikelihood for loglikelihood, _ in results]
    means = [s / _count(f" {choice}") for s, choice in zip(sums, doc["choices"], strict=True)]
    return {"acc": float(doc["choices"][means.index(max(means))] == doc["answer"])}


@functools.cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.environ["TOKENIZER"])


def _count(text: str) -> int:
    return len(_tokenizer()(text, add_special_tokens=False).input_ids)
