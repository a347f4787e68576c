# SPDX-License-Identifier: Apache-2.0
"""Per-matrix format rules (`--rules FILE.yaml`): strict, first match wins."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..codec.formats import DENSE_FORMATS, WIDER_EXPERT_FORMATS
from ..errors import CcqError
from ..families.tensor import TensorSpec

MAX_RULES_BYTES = 1 << 20


@dataclass(frozen=True)
class Rule:
    """One line of the rules file: a glob on canonical names, and the format it asks for."""

    match: str
    format: str

    def matches(self, name: str) -> bool:
        """Whether the glob fits the name, written with or without its last part `.weight`."""
        short = name.removesuffix(".weight")
        return fnmatch.fnmatchcase(name, self.match) or fnmatch.fnmatchcase(short, self.match)


class _StrictLoader(yaml.SafeLoader):
    """Loads plain values only and refuses a key that occurs twice (YAML would take the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "a key stands twice in one entry", node.start_mark
            )
        return found


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read a rules file: a YAML list of {match: GLOB, format: NAME}; anything else is an error."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_RULES_BYTES + 1)
    except FileNotFoundError:
        raise CcqError(f"--rules {path}: no such file") from None
    if len(text) > MAX_RULES_BYTES:
        raise CcqError(f"--rules {path}: larger than {MAX_RULES_BYTES} bytes; not a rules file")
    try:
        content = yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        message = " ".join(str(error).split())
        raise CcqError(f"--rules {path}: not valid YAML: {message}") from None
    if not isinstance(content, list):
        raise CcqError(f"--rules {path}: must be a list of entries {{match: GLOB, format: NAME}}")
    return tuple(_rule(entry, f"--rules {path}: entry {i + 1}") for i, entry in enumerate(content))


def _rule(entry: object, where: str) -> Rule:
    if not isinstance(entry, dict):
        raise CcqError(f"{where} is not a map with the keys match and format")
    unknown = sorted(str(key) for key in entry if key not in ("match", "format"))
    if unknown:
        raise CcqError(f"{where}: unknown key {unknown[0]!r}; the keys are match and format")
    for key in ("match", "format"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise CcqError(f"{where}: {key!r} is missing or not a string")
    return Rule(entry["match"], entry["format"])


@dataclass(frozen=True)
class DefaultFormat:
    """The format that a tensor gets where no rule matches it."""

    tensor: TensorSpec
    format: str
    reason: str = ""  # where the format comes from


def matching_rules(
    rules: Sequence[Rule],
    defaults: Iterable[DefaultFormat],
    expert_format: str,
    dense_formats: tuple[str, ...] = DENSE_FORMATS,
) -> dict[str, Rule]:
    """Name of a tensor -> the first rule that matches it.

    Args:
        expert_format: of routed experts where no rule decides.
        dense_formats: those that a dense linear layer may take; none where it is always kept.

    Raises:
        CcqError: for a rule that matches no tensor, or one that cannot take the rule's format.
    """
    names = []
    found: dict[str, Rule] = {}
    for default in defaults:
        name = default.tensor.name
        names.append(name)
        for rule in rules:
            if rule.matches(name):
                _check_allowed(rule, default, expert_format, dense_formats)
                found[name] = rule
                break
    used = set(found.values())
    for rule in rules:
        # A rule that always comes after another one may be meant so. A rule that matches no name at
        # all is a mistake.
        if rule not in used and not any(rule.matches(name) for name in names):
            raise CcqError(f"--rules: {rule.match!r} matches no tensor of this model")
    return found


def _check_allowed(
    rule: Rule, default: DefaultFormat, expert_format: str, dense_formats: tuple[str, ...]
) -> None:
    where = f"--rules: {rule.match!r} -> {rule.format}"
    tensor = default.tensor
    if not tensor.is_linear:
        raise CcqError(
            f"{where} touches {tensor.name}: routers, correction biases, norms, embeddings and"
            " lm_head are never quantized and take no rule; make the pattern narrower"
        )
    if tensor.is_dense and not dense_formats:
        raise CcqError(
            f"{where} touches {tensor.name}, a dense linear layer: with this --target everything"
            " but the routed experts stays as it is; make the pattern narrower"
        )
    allowed = (*WIDER_EXPERT_FORMATS, expert_format) if tensor.is_expert else dense_formats
    if rule.format not in allowed:
        kind = "a routed expert" if tensor.is_expert else "a dense linear layer"
        raise CcqError(
            f"{where} is not possible for {tensor.name}, {kind}: it can be {' or '.join(allowed)}"
        )


def forced_layers(found: Mapping[str, Rule], experts: Iterable[TensorSpec]) -> dict[int, str]:
    """Formats of the MoE layers that rules decide; a layer that they decide in part is refused.

    What rules leave open is for an allocation, which knows whole layers only.
    """
    by_layer: dict[int, set[str | None]] = {}
    for expert in experts:
        if expert.layer is not None:
            rule = found.get(expert.name)
            by_layer.setdefault(expert.layer, set()).add(rule.format if rule else None)
    forced = {}
    for layer, formats in by_layer.items():
        if formats == {None}:
            continue
        if len(formats) > 1:
            raise CcqError(
                f"--rules: layer {layer} is decided for some of its experts only; with --allocate a"
                " rule must speak of all experts and both projections of a layer"
            )
        forced[layer] = next(iter(formats))
    return forced


def layer_formats(formats: Mapping[str, str], experts: Iterable[TensorSpec]) -> dict[int, str]:
    """The format of every MoE layer, after checking that none is mixed.

    Raises:
        CcqError: for a layer with experts of several formats.
    """
    by_layer: dict[int, set[str]] = {}
    for expert in experts:
        if expert.layer is not None:
            by_layer.setdefault(expert.layer, set()).add(formats[expert.name])
    for layer, found in sorted(by_layer.items()):
        if len(found) > 1:
            raise CcqError(
                f"--rules: layer {layer} would hold experts of formats {', '.join(sorted(found))};"
                " engines can't load that: all experts and both projections of a layer must be"
                " alike"
            )
    return {layer: next(iter(by_layer[layer])) for layer in sorted(by_layer)}
