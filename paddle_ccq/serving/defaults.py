# SPDX-License-Identifier: Apache-2.0
"""Sampling where a request says nothing: generation_config.json's values, else the API's own.

FastDeploy takes temperature, top_p and the penalties from that file (`_apply_default_parameters`
of its processors at e53f5184). top_k, min_p and max_new_tokens are vLLM's additions. An explicit
`do_sample: false` is greedy, as in transformers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors_io import load_json
from ..errors import CcqError

FILE = "generation_config.json"
# Field of the file -> smallest and largest value, those that a request may have, and whether whole.
_BOUNDS: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 2, False),
    "top_p": (0, 1, False),
    "top_k": (-1, 1 << 30, True),
    "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (0.01, 100, False),
    "max_new_tokens": (1, 1 << 62, True),
}
# What other engines may act on and this one does not, with the values that ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "penalty_alpha": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "stop_strings": ([], ""),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """One value for each field that a request may leave out; without a file the API's own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    def overridden(self, request: Any) -> SamplingDefaults:
        """These, with every value that the request names."""
        given = {field.name: getattr(request, field.name, None) for field in fields(self)}
        return replace(self, **{name: v for name, v in given.items() if v is not None})

    def describe(self) -> str:
        """What differs from the API's own, as `temperature 0.8, top_p 0.8`; "" if nothing does."""
        plain = SamplingDefaults()
        pairs = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ", ".join(f"{k} {v}" for k, v in pairs if v != getattr(plain, k))


def read_defaults(folder: str | os.PathLike[str]) -> tuple[SamplingDefaults, list[str]]:
    """A checkpoint's sampling defaults, and the fields of its file that have no effect here.

    Raises:
        CcqError: a value that no request could have.
    """
    path = Path(folder) / FILE
    settings = load_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise CcqError(f"{path}: not a JSON object")
    found: dict[str, Any] = {}
    for name, (low, high, whole) in _BOUNDS.items():
        value = settings.get(name)
        if value is None:
            continue
        kinds = int if whole else int | float
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            kind = "an integer" if whole else "a number"
            raise CcqError(
                f"{path}: {name}: must be {kind} of {low:g} to {high:g}, not {value!r}; correct it,"
                " or serve with --generation-config none"
            )
        found[name] = value if whole else float(value)
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])
    sampled = settings.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise CcqError(f"{path}: do_sample: must be true or false, not {sampled!r}")
    if sampled is False:
        found["temperature"] = 0.0
    passed_over = [
        name
        for name, neutral in _WITHOUT_EFFECT.items()
        if settings.get(name) is not None and settings[name] not in neutral
    ]
    return SamplingDefaults(**found), passed_over
