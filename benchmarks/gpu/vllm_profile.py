# SPDX-License-Identifier: Apache-2.0
"""The kernels of one step on every rank: which, how long, and how long the GPU waits.

`Ranks` is what vLLM's workers are extended with (worker_extension_cls), so that each records its
own GPU; `step_of` puts together what they saw.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

EXTENSION = "vllm_profile.Ranks"
# NCCL's kernels, and vLLM's and PyTorch's own sums over cards.
COLLECTIVE = r"nccl|cross_device_reduce|all_?reduce|all_?gather|reduce_?scatter|multimem"
Event = tuple[int, int, str]  # begin and length in ns, name


def short_name(name: str) -> str:
    """A kernel's name without types of arguments."""
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    return re.sub(r"\(.*$", "", name)[:110]


class Ranks:
    """Methods of a worker, called by name in all of them at once."""

    def ccq_profile_start(self) -> None:
        import torch

        kinds = torch.profiler.ProfilerActivity
        kind = kinds.CUDA if torch.cuda.is_available() else kinds.CPU  # the latter has no kernels
        self.ccq_profile = torch.profiler.profile(activities=[kind])
        self.ccq_profile.start()

    def ccq_profile_stop(self) -> dict[str, Any]:
        """Names, and [begin ns, length ns, index into names] of every kernel in its order."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ccq_profile.stop()
        found = []
        for event in self.ccq_profile.profiler.kineto_results.events():
            if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0:
                found.append((event.start_ns(), event.duration_ns(), event.name()))
        found.sort()
        names = {name: i for i, name in enumerate(dict.fromkeys(name for *_, name in found))}
        return {"names": list(names), "events": [[b, n, names[name]] for b, n, name in found]}

    def ccq_set(self, name: str, value: int) -> int:
        """Set a number of paddle_ccq.vllm.torch_ops; returns the one before."""
        from paddle_ccq.vllm import torch_ops

        before = getattr(torch_ops, name)
        setattr(torch_ops, name, value)
        return before

    def ccq_memory(self) -> dict[str, int]:
        """Bytes on this card: weights, KV cache, the most that PyTorch held at once."""
        import torch

        most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        runner = self.model_runner
        caches = {t.untyped_storage().data_ptr(): t for t in _tensors(runner.kv_caches)}
        return {
            "weights": int(getattr(runner, "model_memory_usage", 0)),
            "cache": sum(tensor.untyped_storage().nbytes() for tensor in caches.values()),
            "most": most,
        }


def _tensors(found: Any) -> list[Any]:
    if isinstance(found, (list, tuple)):
        return [tensor for part in found for tensor in _tensors(part)]
    return [found] if hasattr(found, "untyped_storage") else []


def _window(events: list[Event]) -> tuple[int, int] | None:
    """Begin and end of the last step but one: what lies between two choices of a token."""
    marks = [
        begin + length for begin, length, name in events if re.search("argmax|gumbel", name.lower())
    ]
    return (marks[-3], marks[-2]) if len(marks) >= 3 else None


def _busy(step: list[Event]) -> int:
    busy, end = 0, step[0][0] if step else 0
    for begin, length, _ in step:
        busy += max(0, begin + length - max(begin, end))
        end = max(end, begin + length)
    return busy


def step_of(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One step of what `Ranks.ccq_profile_stop` returned on every rank.

    The ranks' clocks are one machine's, so that the step of a rank that chooses no token (an early
    stage of a pipeline) is what it did in the time of the others' step. All kernels are taken where
    no such choice is found, as of a single prompt.

    Returns:
        summary: wall time of the step, time with a kernel running, kernels, of the last rank;
        kernels: [microseconds in all, calls, name] of the last rank, the longest first;
        names, timeline: [begin, length, index into names] of the last rank;
        ranks: of each rank, wall, busy and collective microseconds;
        collectives: their calls on a rank, the ranks' mean time in them, and the least: with the
            time of whoever came last for each, where all ranks have the same. In microseconds.
    """
    all_events: list[list[Event]] = [
        [(begin, length, rank["names"][i]) for begin, length, i in rank["events"]] for rank in ranks
    ]
    windows = [window for window in map(_window, all_events) if window]
    if windows:
        first, last = windows[-1]
    else:
        first = min((events[0][0] for events in all_events if events), default=0)
        last = max((max(b + n for b, n, _ in events) for events in all_events if events), default=0)
    steps = [
        [event for event in events if first <= event[0] + event[1] / 2 < last]
        for events in all_events
    ]
    shared = [[event for event in step if re.search(COLLECTIVE, event[2])] for step in steps]
    sums = [sum(length for _, length, _ in found) for found in shared]
    counts = {len(found) for found in shared}
    least = None
    if len(counts) == 1:
        together = zip(*shared, strict=True)
        least = sum(min(length for _, length, _ in calls) for calls in together) / 1e3
    result = _one_rank(steps[-1], first, last, len(all_events[-1]))
    result["ranks"] = [
        {"busy_us": _busy(step) / 1e3, "kernels": len(step), "collectives_us": total / 1e3}
        for step, total in zip(steps, sums, strict=True)
    ]
    result["collectives"] = {
        "calls": max(counts, default=0),
        "mean_us": sum(sums) / len(sums) / 1e3,
        "least_us": least,
        "share": sum(sums) / len(sums) / max(last - first, 1),
    }
    return result


def _one_rank(step: list[Event], first: int, last: int, count: int) -> dict[str, Any]:
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for _, length, name in step:
        entry = totals[short_name(name)]
        entry[0] += length / 1e3
        entry[1] += 1
    kernels = sorted(([us, n, name] for name, (us, n) in totals.items()), reverse=True)
    names = [name for _, _, name in kernels]
    summary = {"wall_us": (last - first) / 1e3, "busy_us": _busy(step) / 1e3}
    return {
        "summary": summary | {"kernels": len(step), "all": count},
        "kernels": kernels,
        "names": names,
        "timeline": [
            [round((b - first) / 1e3, 2), round(n / 1e3, 2), names.index(short_name(s))]
            for b, n, s in step
        ],
    }
