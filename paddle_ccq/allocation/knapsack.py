# SPDX-License-Identifier: Apache-2.0
"""The best choice of one option per item under a budget, exactly, for costs that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One format of one item, with its size (in any whole unit) and its cost."""

    format: str
    size: int
    cost: float


@dataclass(frozen=True)
class _State:
    """A choice for the first items, linked to the choice that it extends."""

    size: int
    cost: float
    option: Option | None
    before: _State | None


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """One option for every item, of least total cost with a total size of at most `budget`.

    Dynamic programming over the choices for the first items, of which only those are kept that no
    other beats in both size and cost. Nothing is rounded, so the result is exact. There are as many
    states as different sums of sizes: a few hundred for layers that are alike. Among equals the
    smaller one wins, then the one whose first options stand first.

    Returns None if even the smallest options don't fit.
    """
    # The least size of all items that are still to come.
    least = [min(option.size for option in options) for options in items]
    reserve = sum(least)
    states = [_State(0, 0.0, None, None)]
    for options, own in zip(items, least, strict=True):
        reserve -= own
        grown = [
            _State(state.size + option.size, state.cost + option.cost, option, state)
            for state in states
            for option in options
            if state.size + option.size + reserve <= budget
        ]
        grown.sort(key=lambda state: (state.size, state.cost))
        states = []
        for state in grown:
            if not states or state.cost < states[-1].cost:
                states.append(state)
    if not states:
        return None
    chosen = []
    state: _State | None = states[-1]
    while state is not None and state.option is not None:
        chosen.append(state.option)
        state = state.before
    return chosen[::-1]


def allocate_prefix(
    items: Sequence[Sequence[Option]], budget: int, format: str
) -> list[Option] | None:
    """The same, where the items in `format` must be the first ones.

    Items have at most one option in `format` and one in another; one may be missing.
    """
    best: list[Option] | None = None
    for end in range(len(items) + 1):
        chosen = [
            next((o for o in options if (o.format == format) == (i < end)), None)
            for i, options in enumerate(items)
        ]
        if None in chosen or sum(o.size for o in chosen if o) > budget:
            continue
        found = [o for o in chosen if o]
        if best is None or total_cost(found) < total_cost(best):
            best = found
    return best


def total_size(options: Sequence[Option]) -> int:
    """Sum of sizes."""
    return sum(option.size for option in options)


def total_cost(options: Sequence[Option]) -> float:
    """Sum of costs."""
    return sum(option.cost for option in options)
