# SPDX-License-Identifier: Apache-2.0
"""What the checks before an engine loads a checkpoint share: a card's memory, result, and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import reporting
from .checkpoint.manifest import check_manifest
from .checkpoint.source import snapshot_folder
from .errors import CcqError, visible
from .families.config import CONFIG_FILE
from .json_files import load_json

GIB = 1 << 30
MOST_GIBIBYTES = 1 << 20
# Tokens of a sequence where --max-model-len is not given and the model was made for more.
DEFAULT_LENGTH = 32768


def default_length(folder: Path, multiple: int = 1) -> int:
    """--max-model-len where it is not given: not beyond the positions that a folder states.

    Args:
        multiple: of which the length is to be one; the length is at least that.

    Raises:
        CcqError: if config.json is no JSON. One that is missing is the check's to report.
    """
    path = snapshot_folder(folder) / CONFIG_FILE
    stated = load_json(path) if path.is_file() else None
    fields = stated if isinstance(stated, dict) else {}
    text = fields.get("text_config")
    for values in (text if isinstance(text, dict) else {}, fields):
        positions = values.get("max_position_embeddings")
        if isinstance(positions, int) and positions > 0:
            return max(min(positions, DEFAULT_LENGTH) // multiple * multiple, multiple)
    return DEFAULT_LENGTH


def card_bytes(gibibytes: float) -> int:
    """--gpu-memory in bytes.

    Raises:
        CcqError: for more than any card has.
    """
    if gibibytes > MOST_GIBIBYTES:
        raise CcqError(f"--gpu-memory {gibibytes}: more GiB than any card has")
    return int(gibibytes * GIB)


@dataclass(frozen=True)
class CardMemory:
    """One card's memory, in bytes: an engine fills `utilization` of it, what is left is KV cache.

    Attributes:
        weights: exact, of the fullest card.
        activations: estimated peak of one step.
        libraries: allowance for the CUDA context, graphs and workspaces.
        token_cache: KV cache of one token.
        block_tokens: tokens of a block, which the engine reserves as a whole.
    """

    total: int
    utilization: float
    weights: int
    activations: int
    libraries: int
    token_cache: int
    block_tokens: int

    @property
    def usable(self) -> int:
        """Bytes that the engine fills: weights, activations, libraries and KV cache together."""
        return int(self.total * self.utilization)

    @property
    def cache(self) -> int:
        """Bytes left for the KV cache; negative if not even the rest fits."""
        return self.usable - self.weights - self.activations - self.libraries

    @property
    def block(self) -> int:
        """Bytes of a block of the KV cache."""
        return self.token_cache * self.block_tokens

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together that the cache holds, in whole blocks."""
        return max(0, self.cache // self.block) * self.block_tokens

    def sequences(self, length: int) -> int:
        """Sequences of a length that fit at the same time."""
        return self.tokens // (-(-length // self.block_tokens) * self.block_tokens)


@dataclass
class CheckResult:
    """The result of a check; `problems` keep the engine from serving, `warnings` do not."""

    folder: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory: CardMemory | None = None
    command: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether the engine can serve the checkpoint; warnings don't count."""
        return not self.problems

    def add_manifest(self, folder: Path, hashes: bool) -> None:
        """Add what the manifest of `folder` finds wrong with the files.

        A missing or short file shows up in the structure too, which is checked before; one line
        for each is enough.
        """
        named = {problem.split(":", 1)[0] for problem in self.problems}
        found = check_manifest(folder, hashes)
        self.problems += [p for p in found.problems if p.split(":", 1)[0] not in named]
        self.warnings += found.notes

    def judge_memory(self, memory: CardMemory, length: int, sequences: int) -> None:
        """Add what `memory` means for so many sequences of `length` tokens (--max-model-len)."""
        self.memory = memory
        if not memory.tokens:
            # Rounded up, so that what is said to be missing is never nothing.
            tenths = math.ceil((memory.block - memory.cache) * 10 / GIB)
            self.problems.append(
                "memory: weights, activations, libraries and one block of the KV cache need"
                f" {tenths / 10:.1f} GiB more than a card's usable part; more cards, a larger card"
                " or fewer batched tokens"
            )
        elif memory.tokens < length:
            self.problems.append(
                f"memory: the KV cache holds {memory.tokens} tokens, one sequence of"
                f" --max-model-len {length} does not fit; at most --max-model-len {memory.tokens}"
            )
        elif memory.tokens // sequences < length:
            self.warnings.append(
                f"memory: {memory.sequences(length)} sequences of {length} tokens fit at once; all"
                f" {sequences} together have room for {memory.tokens // sequences} tokens each,"
                " beyond which some wait or are computed again"
            )

    def to_json(self) -> dict[str, Any]:
        """What --json writes: all fields, and the sizes that follow from those of the memory."""
        found = {"good": self.good, **asdict(self)}
        if self.memory:
            found["memory"] |= {"cache": self.memory.cache, "tokens": self.memory.tokens}
        return found


def check_positive(numbers: dict[str, int]) -> None:
    """Flag -> value, none of which may be zero or less.

    Raises:
        CcqError: naming the flag.
    """
    for flag, value in numbers.items():
        if value < 1:
            raise CcqError(f"{flag} must be positive")


def check_utilization(value: float) -> None:
    """Raise a CcqError unless --gpu-memory-utilization is a part of a card."""
    if not 0 < value <= 1:
        raise CcqError(f"--gpu-memory-utilization {value}: must be above 0 and at most 1")


def print_result(result: CheckResult, engine: str, start: str, facts: Sequence[str] = ()) -> None:
    """The memory table, warnings, problems, and how to start the engine if there are none.

    Args:
        engine: its name and release.
        start: the shell command, or nothing.
        facts: lines before the warnings.
    """
    out = reporting.console()
    m = result.memory
    if m is not None:
        rows = [
            ["card", f"{m.total / GIB:.1f} GiB"],
            [f"usable ({m.utilization} of it)", f"{m.usable / GIB:.1f} GiB"],
            ["weights", f"{m.weights / GIB:.1f} GiB"],
            ["activations (estimate)", f"{m.activations / GIB:.1f} GiB"],
            ["CUDA and libraries (allowance)", f"{m.libraries / GIB:.1f} GiB"],
            ["left for the KV cache", f"{m.cache / GIB:.1f} GiB"],
            ["KV cache of a token", f"{m.token_cache / 1024:g} KiB"],
            ["tokens in the cache", f"{m.tokens:,}"],
        ]
        out.print(reporting.table(["memory of each card", ""], rows))
    lines = [*facts, *(f"warning: {text}" for text in result.warnings)]
    lines += [f"problem: {text}" for text in result.problems]
    if not result.good:
        lines.append(f"NOT good: {len(result.problems)} problems in {result.folder}")
    else:
        lines += [f"\n{start}\n"] if start else []
        lines.append(f"good: {result.folder} for {engine}")
    for line in lines:
        out.print(visible(line), soft_wrap=True)
