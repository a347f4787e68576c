# SPDX-License-Identifier: Apache-2.0
"""Server settings: YAML files in the form that FastDeploy's own --config takes, and overrides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from ..errors import CcqError
from .check import DEFAULT_PORT, ServeConfig
from .memory import BLOCK_TOKENS, DEFAULT_BATCHED_TOKENS, DEFAULT_UTILIZATION
from .releases import Release
from .server_flags import PORTS, four_ports

ServerSettings = dict[str, object]
# FastDeploy's defaults for settings that a file leaves out (engine/args_utils.py).
_FASTDEPLOY_DEFAULTS = {"max_model_len": 2048, "max_num_seqs": 8, "tensor_parallel_size": 1}


def load_settings(path: Path) -> ServerSettings:
    """A YAML file of server flags, written with underscores.

    Raises:
        CcqError: if it is no mapping of names to values.
    """
    if not path.is_file():
        raise CcqError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CcqError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CcqError(f"{path}: must be a list of `flag_name: value`")
    return content


def with_overrides(settings: Mapping[str, object], overrides: Iterable[str]) -> ServerSettings:
    """The settings with `name=value` texts on top; values are read as YAML, null removes.

    Raises:
        CcqError: for a text of another form.
    """
    result = dict(settings)
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CcqError(f"--set {text}: must be NAME=VALUE")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise CcqError(f"--set {text}: {value!r} is not a YAML value") from None
        result[name.removeprefix("--").replace("-", "_")] = parsed
    return {name: value for name, value in result.items() if value is not None}


def with_ports(settings: Mapping[str, object], first: int | None) -> ServerSettings:
    """The settings with all four ports: from `first` on, or those missing after `port`.

    Raises:
        CcqError: for equal ports.
    """
    if first is not None:
        return {**settings, **four_ports(first)}
    ports = four_ports(_integer(settings, "port", DEFAULT_PORT))
    result = {**settings, **{name: settings.get(name, port) for name, port in ports.items()}}
    values = [result[name] for name in PORTS]
    if len(set(map(str, values))) < len(values):
        raise CcqError(f"{', '.join(PORTS)}: must be different ports, got {values}")
    return result


def serve_config_of(
    settings: Mapping[str, object],
    release: Release,
    card_bytes: int | None,
    plugin: bool | None = None,
) -> ServeConfig:
    """The serve config of a file's settings; `plugin` as in ServeConfig.

    Raises:
        CcqError: for a value that is no number, naming the setting.
    """
    length, sequences, ranks = (
        _integer(settings, name, default) for name, default in _FASTDEPLOY_DEFAULTS.items()
    )
    utilization = settings.get("gpu_memory_utilization", DEFAULT_UTILIZATION)
    if isinstance(utilization, bool) or not isinstance(utilization, (int, float)):
        raise CcqError(f"gpu_memory_utilization: {utilization!r} is not a number")
    return ServeConfig(
        tensor_parallel_size=ranks,
        card_bytes=card_bytes,
        max_model_len=length,
        max_num_seqs=sequences,
        max_num_batched_tokens=_integer(settings, "max_num_batched_tokens", DEFAULT_BATCHED_TOKENS),
        gpu_memory_utilization=float(utilization),
        release=release,
        port=_integer(settings, "port", DEFAULT_PORT),
        block_size=_integer(settings, "block_size", BLOCK_TOKENS),
        draft_tokens=_draft_tokens(settings.get("speculative_config")),
        plugin=plugin,
        workers=_given(settings, "workers"),
        concurrency=_given(settings, "max_concurrency"),
    )


def _draft_tokens(value: object) -> int:
    """Tokens that a speculative_config adds to a sequence's step (config.py, SpeculativeConfig)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise CcqError(f"speculative_config: {value!r} is not JSON") from None
    if value is None:
        return 0
    if not isinstance(value, Mapping):
        raise CcqError(f"speculative_config: {value!r} is not a mapping")
    if value.get("method") in (None, "naive"):
        return 0
    # The number of steps of the draft model is a lower bound; both are 1 by default.
    return max(_integer(value, name, 1) for name in ("num_speculative_tokens", "num_model_steps"))


def _given(settings: Mapping[str, object], name: str) -> int | None:
    return _integer(settings, name, 0) if name in settings else None


def _integer(settings: Mapping[str, object], name: str, default: int) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CcqError(f"{name}: {value!r} is not a whole number")
    return value
