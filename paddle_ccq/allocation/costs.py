# SPDX-License-Identifier: Apache-2.0
"""What each layer and projection costs in each format, as measured, and its JSON file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.journal import file_fingerprint
from ..checkpoint.reader import Checkpoint
from ..codec.formats import FORMATS
from ..errors import CcqError
from ..families.ernie45 import ErnieConfig
from ..families.tensor import PROJECTIONS
from ..version import __version__

KIND = "paddle-ccq sensitivity"
METHODS = ("quadratic", "kl")
MAX_FILE_BYTES = 1 << 24
# Entries of config.json that make another model of the same files' names.
_SHAPE_KEYS = ("num_hidden_layers", "hidden_size", "moe_num_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Sensitivities:
    """KL(model || quantized model) in nats per token, measured or estimated, part by part.

    Attributes:
        method: "kl" (measured) or "quadratic" (estimated).
        settings: how; all that decides the numbers.
        calibration: the text, as a checkpoint's provenance has it.
        model: what the measured model is called.
        shape: sizes of the model, to be compared with another's.
        weights_sha256: of samples of the weights.
        costs: layer -> projection -> format -> cost with only that part quantized.
    """

    method: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    model: str
    shape: Mapping[str, int]
    weights_sha256: str
    costs: Mapping[int, Mapping[str, Mapping[str, float]]]

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that were measured."""
        return tuple(next(iter(next(iter(self.costs.values())).values())))

    def layer(self, layer: int, format: str) -> float:
        """Cost of a whole layer in a format: the sum over its projections."""
        return sum(self.costs[layer][projection][format] for projection in PROJECTIONS)

    def check(self, config: ErnieConfig, formats: Sequence[str], where: str) -> None:
        """Refuse costs of another model, and costs that lack a format that is needed."""
        for key, value in model_shape(config).items():
            if self.shape.get(key) != value:
                raise CcqError(
                    f"{where}: measured on another model ({self.model}): {key} is"
                    f" {self.shape.get(key)} there, {value} here"
                )
        missing = [format for format in formats if format not in self.formats]
        if missing:
            raise CcqError(
                f"{where}: holds no costs of {missing[0]}; measure again with --formats"
                f" {','.join([*self.formats, *missing])}"
            )

    def check_weights(self, checkpoint: Checkpoint, where: str) -> None:
        """Refuse costs of a model that has the same sizes but other weights."""
        if self.weights_sha256 != weights_sha256(checkpoint):
            raise CcqError(
                f"{where}: measured on other weights than {checkpoint.path} holds; measure again"
            )

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "kind": KIND,
            "version": __version__,
            "method": self.method,
            "settings": dict(self.settings),
            "calibration": dict(self.calibration),
            "model": self.model,
            "shape": dict(self.shape),
            "weights_sha256": self.weights_sha256,
            "unit": "nats a token: KL divergence of the next token, only this part quantized",
            "layers": {
                str(layer): {projection: dict(row) for projection, row in parts.items()}
                for layer, parts in self.costs.items()
            },
        }

    @property
    def sha256(self) -> str:
        """Hash of the numbers, for provenance."""
        text = json.dumps(self.as_dict()["layers"], sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


def model_shape(config: ErnieConfig) -> dict[str, int]:
    """The sizes by which models are told apart before their weights are read."""
    return {key: int(getattr(config, key) or 0) for key in _SHAPE_KEYS}


def weights_sha256(checkpoint: Checkpoint) -> str:
    """A hash of headers and samples of the files that tokens are computed from.

    Their times do not matter, nor do files that hold only layers for multi-token prediction.
    """
    stored = {n for name in checkpoint.model_names() for n in checkpoint.stored_names(name)}
    paths = {checkpoint.tensors.path_of(name) for name in stored}
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        found = file_fingerprint(path)
        digest.update((found["header_sha256"] + found["samples_sha256"]).encode("ascii"))
    return digest.hexdigest()


def load_sensitivities(path: str | Path, flag: str = "--sensitivity") -> Sensitivities:
    """Read a file that `paddle_ccq.sensitivity --json` wrote.

    Raises:
        CcqError: if it is none, or damaged.
    """
    where = f"{flag} {path}"
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise CcqError(f"{where}: no such file") from None
    try:
        content = json.loads(text) if len(text) <= MAX_FILE_BYTES else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CcqError(f"{where}: not a file of `python -m paddle_ccq.sensitivity --json`")
    try:
        return _parsed(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CcqError(f"{where}: damaged: {error}; measure again") from None


def _parsed(content: dict[str, Any]) -> Sensitivities:
    costs = {
        int(layer): {p: {f: _number(v) for f, v in parts[p].items()} for p in PROJECTIONS}
        for layer, parts in content["layers"].items()
    }
    if content["method"] not in METHODS:
        raise ValueError(f"method {content['method']!r}")
    rows = [tuple(row) for parts in costs.values() for row in parts.values()]
    if not rows or any(row != rows[0] for row in rows) or any(f not in FORMATS for f in rows[0]):
        raise ValueError("layers are not all of the same known formats")
    return Sensitivities(
        method=content["method"],
        settings=dict(content["settings"]),
        calibration=dict(content["calibration"]),
        model=str(content["model"]),
        shape={key: int(value) for key, value in content["shape"].items()},
        weights_sha256=str(content["weights_sha256"]),
        costs=dict(sorted(costs.items())),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a cost")
    return float(value)
