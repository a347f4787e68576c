# SPDX-License-Identifier: Apache-2.0
"""The known families, and the choice of one of them by config.json."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CcqError
from ..json_files import load_json
from .config import CONFIG_FILE, ModelConfig, is_packed_entry
from .family import Family
from .fields import Fields, show
from .generic import GENERIC

GENERATION_FILE = "generation_config.json"
MAX_CONFIG_BYTES = 16 << 20


def find(folders: Iterable[str]) -> tuple[Family, ...]:
    """The FAMILY of every module in the folders that has one, by the modules' names.

    The folders are those of this package: a family is there once its file is there.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(folders))
    own = __name__.rpartition(".")[2]
    modules = [importlib.import_module(f".{name}", __package__) for name in names if name != own]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


FAMILIES = find([str(Path(__file__).parent)])
# All values of --naming.
NAMINGS = tuple(dict.fromkeys(naming.name for family in FAMILIES for naming in family.namings))


# What `--family` may ask for where config.json does not decide.
ASKED = (GENERIC.name,)


def read_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    problems: list[str] | None = None,
    family: str | None = None,
) -> ModelConfig:
    """Read a config.json, the folder that holds one, or an already parsed object.

    With a list of `problems`, keys that would make another model of the same tensors are added to
    it; else they are refused like everything else that is not right. `family` is one of ASKED;
    None: config.json decides.

    Raises:
        CcqError: naming the file and the key; for an architecture of no known family too.
    """
    if isinstance(source, Mapping):
        return _parse(Fields(dict(source), CONFIG_FILE), problems, family)
    path = Path(source)
    if path.is_dir():
        path = path / CONFIG_FILE
    if not path.is_file():
        raise CcqError(f"{path}: no such file; a checkpoint folder needs its {CONFIG_FILE}")
    content = load_json(path, MAX_CONFIG_BYTES)
    if not isinstance(content, dict):
        raise CcqError(f"{path}: not a JSON object")
    config = _parse(Fields(content, str(path)), problems, family)
    check_generation(path.with_name(GENERATION_FILE), config.raw)
    return config


def _parse(fields: Fields, problems: list[str] | None, asked: str | None) -> ModelConfig:
    if asked not in (None, *ASKED):
        raise CcqError(f"--family {asked}: not one of {', '.join(ASKED)}")
    entry = fields.values.get("quantization_config")
    # The family that this package has written down with packed experts.
    stated = entry["family"] if is_packed_entry(entry, fields.where) and "family" in entry else None
    family = GENERIC if asked or stated == GENERIC.name else family_of(fields)
    if stated is not None and not asked and stated != family.name:
        raise fields.fail(
            "quantization_config",
            f"family is {show(stated)}, but by architectures and model_type this is {family.name}",
        )
    return family.parse(fields, family, problems)


def family_of(fields: Fields) -> Family:
    """The family of the first of config.json's architectures, and of its model_type."""
    # Two families may share an architecture.
    every = dict.fromkeys(name for family in FAMILIES for name in family.architectures)
    supported = ", ".join(every)
    names = fields.get("architectures", None)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise fields.fail("architectures", f"not a list of names; supported are {supported}")
    able = [family for family in FAMILIES if names[0] in family.architectures]
    stated = fields.get("model_type", "")
    for family in sorted(able, key=lambda family: not family.model_types):
        if not family.model_types or stated in family.model_types:
            return family
    raise fields.fail(
        "architectures",
        f"{show(names[0])} is not supported; supported are {supported} (quantize --family generic"
        " finds the routed experts of other models by the usual names)",
    )


def check_generation(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse special tokens of generation_config.json that contradict config.json's.

    End tokens may be lists; one file may list more of them than the other.
    """
    try:
        generation = load_json(path, MAX_CONFIG_BYTES) if path.is_file() else None
    except CcqError:
        return  # whoever reads generation settings says what is wrong with the file
    if not isinstance(generation, dict):
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        here, there = (_token_set(values.get(key)) for values in (config, generation))
        if here and there and not (here <= there or there <= here):
            raise CcqError(
                f"{path}: {key}: {show(generation[key])}, but {CONFIG_FILE} says"
                f" {show(config[key])}; keep the one that is right in both"
            )


def _token_set(value: object) -> set[int]:
    listed = value if isinstance(value, list) else [value]
    return {token for token in listed if isinstance(token, int) and not isinstance(token, bool)}
