# SPDX-License-Identifier: Apache-2.0
"""The kernels of one decoding step: which, how long, and how long the GPU waits between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any


def short_name(name: str) -> str:
    """A kernel's name without types of arguments."""
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    return re.sub(r"\(.*$", "", name)[:110]


def one_step(events: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The kernels of the last step but one: what lies between two choices of a token.

    All kernels where no such choice is found.
    """
    marks = [i for i, (_, _, name) in enumerate(events) if re.search("argmax|gumbel", name.lower())]
    if len(marks) < 3:
        return events
    return events[marks[-3] + 1 : marks[-2] + 1]


def profile_step(work: Callable[[], Any]) -> dict[str, Any]:
    """Kernels of one step, by name, with microseconds, and all of them in their order.

    Returns:
        summary: wall time of the step, time with a kernel running, kernels;
        kernels: [microseconds in all, calls, name], the longest first;
        timeline: [begin, length, index into names].
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    found = []
    for event in profile.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0:
            found.append((event.start_ns() / 1e3, event.duration_ns() / 1e3, event.name()))
    found.sort()
    step = one_step(found)
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for _, length, name in step:
        entry = totals[short_name(name)]
        entry[0] += length
        entry[1] += 1
    busy, end = 0.0, step[0][0]
    for begin, length, _ in step:
        busy += max(0.0, begin + length - max(begin, end))
        end = max(end, begin + length)
    kernels = sorted(([us, n, name] for name, (us, n) in totals.items()), reverse=True)
    names = [name for _, _, name in kernels]
    first = step[0][0]
    summary = {"wall_us": end - first, "busy_us": busy, "kernels": len(step), "all": len(found)}
    return {
        "summary": summary,
        "kernels": kernels,
        "names": names,
        "timeline": [
            [round(b - first, 2), round(n, 2), names.index(short_name(s))] for b, n, s in step
        ],
    }
