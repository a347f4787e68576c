# SPDX-License-Identifier: Apache-2.0
"""What a family's file says: architectures, names on disk, and the tensors of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CcqError
from .fields import Fields
from .tensor import TensorSpec


@dataclass(frozen=True)
class Naming:
    """One way in which a family's checkpoints name and turn their tensors.

    Attributes:
        name: what `--naming` calls it.
        prefix: what names of tensors inside the model begin with.
        description: for messages.
        format_tag: the entry `format` of a shard's metadata that loaders of the naming accept.
        dtype_key: the entry of config.json that states the type of the weights.
        unwanted: entries of config.json that its loaders misread.
        turned_head: the output head is stored as [hidden, vocabulary], and as [vocabulary, hidden]
            where it is tied to the embedding.
    """

    name: str
    prefix: str
    description: str
    format_tag: str
    dtype_key: str
    unwanted: tuple[str, ...] = ()
    turned_head: bool = False


def _none(_config: Any, _name: str) -> None:
    return None


def _unexpected(_config: Any, _name: str) -> str:
    return "is not called for by config.json; without it this would be another model"


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: as messages call it.
        architectures: entries of config.json's `architectures` that it covers.
        namings: the first one whose prefix occurs in a checkpoint is its naming.
        parse: (fields of config.json, the family, problems) -> the config, a ModelConfig. With a
            list of `problems`, keys that would make another model of the same tensors are added to
            it; else they are refused like everything else that is not right.
        tensors: the tensors of a parsed config, in model order.
        embedding: of a config, the canonical name of the embedding.
        head: the canonical name of the output head, which may be the same matrix.
        is_mtp: whether an on-disk name belongs to a layer for multi-token prediction.
        mtp_keys: entries of config.json that say how many such layers there are.
        table: (config, on-disk name) -> the values of a stored table that follows from the config;
            None for every other tensor.
        why_unexpected: (config, on-disk name) -> why a stored tensor that the model does not have
            can't be left out.
        wint4_end_layer: of a config, the last MoE layer that is wint4 where the user does not
            choose; -1 for none.
        model_types: config.json's `model_type` of these alone; empty: of all others.
        keeps_others: tensors that it does not name are kept as they are; else they are refused.
        is_mine: of a family that keeps others, whether an on-disk name can only be that of a routed
            expert, so that it is refused where config.json does not call for it.
        discover: of a family without shapes of its own, (config, shape by on-disk name) -> the
            config with what is stored.
        examples: what its tensors are called, for the message that none was found.
        unread: what names of a naming that is not read begin with -> what to do, for the message.
    """

    name: str
    architectures: tuple[str, ...]
    namings: tuple[Naming, ...]
    parse: Callable[[Fields, Any, list[str] | None], Any]
    tensors: Callable[[Any], Iterable[TensorSpec]]
    embedding: Callable[[Any], str]
    head: str
    examples: str
    is_mtp: Callable[[str], bool] = lambda _: False
    mtp_keys: tuple[str, ...] = ("num_nextn_predict_layers",)
    table: Callable[[Any, str], Sequence[float] | None] = _none
    why_unexpected: Callable[[Any, str], str] = _unexpected
    wint4_end_layer: Callable[[Any], int] = lambda _: -1
    model_types: tuple[str, ...] = ()
    keeps_others: bool = False
    discover: Callable[[Any, Mapping[str, tuple[int, ...]]], Any] | None = None
    is_mine: Callable[[str], bool] = lambda _: False
    unread: Mapping[str, str] = field(default_factory=dict)

    def naming(self, name: str) -> Naming:
        """The naming of that name."""
        return next(naming for naming in self.namings if naming.name == name)

    def detect_naming(self, names: Iterable[str], where: object) -> Naming:
        """The naming that a checkpoint's tensors show; `where` names it in errors."""
        found = {naming.name: "" for naming in self.namings}
        for name in names:
            for prefix, problem in self.unread.items():
                if name.startswith(prefix):
                    raise CcqError(f"{where}: {name}: {problem}")
            for naming in self.namings:
                if name.startswith(naming.prefix) and not self.is_mtp(name):
                    found[naming.name] = found[naming.name] or name
        seen = [example for example in found.values() if example]
        if len(seen) > 1:
            raise CcqError(
                f"{where}: tensors of two layouts, such as {seen[0]!r} and {seen[1]!r};"
                " the folder mixes two checkpoints"
            )
        if not seen:
            article = "an" if self.name[0] in "AEIOU" else "a"
            raise CcqError(
                f"{where}: no tensor is named like {article} {self.name} weight ({self.examples})"
            )
        return next(naming for naming in self.namings if found[naming.name])
