# SPDX-License-Identifier: Apache-2.0
"""Per-matrix format rules (`--rules FILE.yaml`): strict, first match wins."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import CcqError

# What a rule may ask of a dense linear layer. A layer left in bf16 is named to FastDeploy in
# modules_to_not_convert, which it honours from release 2.5 on.
DENSE_FORMATS = ("wint8", "bf16")
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
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CcqError(f"--rules {path}: not valid YAML: {error}") from None
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
class Candidate:
    """A matrix the rules may speak about; `role` is "expert", "dense" or "kept"."""

    name: str
    role: str
    layer: int | None
    default: str


def apply_rules(
    rules: Sequence[Rule], candidates: Iterable[Candidate], expert_format: str
) -> dict[str, str]:
    """Format of every candidate after the rules; kept tensors must not be touched by any."""
    unused = set(rules)
    resolved = {}
    for candidate in candidates:
        resolved[candidate.name] = candidate.default
        for rule in rules:
            if rule.matches(candidate.name):
                unused.discard(rule)
                resolved[candidate.name] = _allowed(rule, candidate, expert_format)
                break
    for rule in rules:
        shadowed = rule in unused and any(rule.matches(name) for name in resolved)
        if rule in unused and not shadowed:
            raise CcqError(f"--rules: {rule.match!r} matches no tensor of this model")
    return resolved


def _allowed(rule: Rule, candidate: Candidate, expert_format: str) -> str:
    where = f"--rules: {rule.match!r} -> {rule.format}"
    if candidate.role == "kept":
        raise CcqError(
            f"{where} touches {candidate.name}: routers, correction biases, norms, embeddings and"
            " lm_head are never quantized and take no rule; make the pattern narrower"
        )
    allowed = ("wint4", expert_format) if candidate.role == "expert" else DENSE_FORMATS
    if rule.format not in allowed:
        kind = "a routed expert" if candidate.role == "expert" else "a dense linear layer"
        raise CcqError(
            f"{where} is not possible for {candidate.name}, {kind}: it can be"
            f" {' or '.join(allowed)}"
        )
    return rule.format


def wint4_prefix(formats: dict[str, str], experts: Sequence[Candidate]) -> int:
    """Last layer whose experts are wint4 (-1 for none), after checking that they form a prefix.

    FastDeploy decides by `layer <= quant_end_layer` alone (quantization/wint2.py), so a choice
    that differs inside a layer or returns to wint4 later cannot be written down for it.
    """
    by_layer: dict[int, set[str]] = {}
    for expert in experts:
        if expert.layer is not None:
            by_layer.setdefault(expert.layer, set()).add(formats[expert.name])
    end = -1
    left = None
    for layer, found in sorted(by_layer.items()):
        if len(found) > 1:
            raise CcqError(
                f"--rules: layer {layer} would hold experts of formats {', '.join(sorted(found))};"
                " FastDeploy can't load that: all experts and both projections of a layer must be"
                " alike"
            )
        if found == {"wint4"}:
            if left is not None:
                raise CcqError(
                    f"--rules: layer {layer} would be wint4 after layer {left} is not; FastDeploy"
                    " can't load that: wint4 layers must be the first MoE layers without a gap"
                )
            end = layer
        elif left is None:
            left = layer
    return end
