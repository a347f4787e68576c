# SPDX-License-Identifier: Apache-2.0
"""What a family's file says: architectures, names on disk, and the tensors of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import CcqError
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
    """

    name: str
    prefix: str
    description: str
    format_tag: str
    dtype_key: str


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architectures: entries of config.json's `architectures` that it covers.
        namings: the first one whose prefix occurs in a checkpoint is its naming.
        tensors: the tensors of a parsed config, in model order.
        is_mtp: whether an on-disk name belongs to a head that is not used.
        examples: what its tensors are called, for the message that none was found.
    """

    name: str
    architectures: tuple[str, ...]
    namings: tuple[Naming, ...]
    tensors: Callable[[Any], Iterable[TensorSpec]]
    is_mtp: Callable[[str], bool]
    examples: str

    def naming(self, name: str) -> Naming:
        """The naming of that name."""
        return next(naming for naming in self.namings if naming.name == name)

    def detect_naming(self, names: Iterable[str], where: object) -> Naming:
        """The naming that a checkpoint's tensors show; `where` names it in errors."""
        found = {naming.name: "" for naming in self.namings}
        for name in names:
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
