# SPDX-License-Identifier: Apache-2.0
"""The cards of this machine, as nvidia-smi reports them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

_QUERY = ("--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
# FastDeploy's WINT2 kernel needs Ampere or newer.
OLDEST_CAPABILITY = 8.0
MIB = 1 << 20


@dataclass(frozen=True)
class Card:
    """A GPU; `memory` in bytes, `capability` such as 9.0 for Hopper."""

    name: str
    memory: int  # bytes
    capability: float

    @property
    def too_old(self) -> bool:
        """Whether FastDeploy's WINT2 kernel does not run on it."""
        return self.capability < OLDEST_CAPABILITY


def find_cards(command: str = "nvidia-smi") -> list[Card]:
    """The cards of this machine; none where there is no driver or it does not answer."""
    try:
        answer = subprocess.run(
            [command, *_QUERY], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_cards(answer)


def parse_cards(answer: str) -> list[Card]:
    """Lines "name, MiB, capability"; a line of another form is left out."""
    cards = []
    for line in answer.splitlines():
        parts = [part.strip() for part in line.split(",")]
        try:
            name, memory, capability = parts
            cards.append(Card(name, int(memory) * MIB, float(capability)))
        except ValueError:
            continue
    return cards
