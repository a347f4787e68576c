# SPDX-License-Identifier: Apache-2.0
"""Results: tables for people before and after a run, JSON files for programs."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .checkpoint.plan import Plan
from .checkpoint.planned import KEPT, PlannedTensor
from .command import output_path
from .errors import CcqError, describe_os_error, visible
from .families.tensor import Role
from .files import is_stream, partial_name, write_whole
from .units import gigabytes

# A table that is piped into a file or a pager is not cut at 80 columns.
PIPED_WIDTH = 120


def console() -> Console:
    """Where results go: stdout, at a width that does not depend on a missing terminal.

    Names of files, models and tensors are printed as they are: nothing in a text is markup.
    """
    return Console(
        width=None if sys.stdout.isatty() else PIPED_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A plain table; all columns but the first are numbers and stand on the right."""
    result = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(visible(column), justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        result.add_row(*map(visible, row))
    return result


def duration(seconds: float) -> str:
    """A time in the largest sensible units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def peak_rss() -> int:
    """Largest memory this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 -> "1-3,7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def collapsed(tensors: Iterable[PlannedTensor]) -> list[tuple[str, list[PlannedTensor]]]:
    """Items alike in all but layer and expert, each group with a pattern that names it."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[PlannedTensor]] = {}
    for planned in tensors:
        groups.setdefault((planned.tensor.template, planned.format, planned.shape), []).append(
            planned
        )
    result = []
    for (template, _, _), members in groups.items():
        tensors = [planned.tensor for planned in members]
        layers = ranges(t.layer for t in tensors if t.layer is not None)
        experts = ranges(t.expert for t in tensors if t.expert is not None)
        result.append((template.format(layer=layers, expert=experts), members))
    return result


FORMAT_WORDS = {"bf16": "bf16 (kept)", "f32": "float32 (kept)", KEPT: "as it is"}


def plan_table(plan: Plan, quantized_only: bool = False) -> Table:
    """What every tensor becomes, repeated ones on one line; or only those that are quantized."""
    rows = []
    chosen = (p for p in plan.tensors if p.quantized or not quantized_only)
    for pattern, members in collapsed(chosen):
        stored = sum(planned.rank_bytes for planned in members) * plan.tensor_parallel_size
        weights = sum(planned.weights for planned in members)
        rows.append(
            [
                pattern.removeprefix("ernie.").removeprefix("model.").removesuffix(".weight"),
                str(list(members[0].shape)),
                f"{len(members):,}",
                FORMAT_WORDS.get(members[0].format, members[0].format),
                f"{8 * stored / max(weights, 1):.3f}",
                gigabytes(stored),
            ]
        )
    return table(["tensor", "shape [in, out]", "count", "format", "bits/weight", "size"], rows)


def layers_table(plan: Plan) -> Table:
    """What the experts of every MoE layer become, and why; layers alike on one line."""
    groups: dict[tuple[str, str], list[int]] = {}
    for layer, format in plan.layer_formats.items():
        groups.setdefault((format, plan.reasons[layer]), []).append(layer)
    rows = [
        [ranges(layers), str(len(layers)), format, reason]
        for (format, reason), layers in sorted(groups.items(), key=lambda group: group[1])
    ]
    return table(["MoE layers", "count", "experts", "chosen by"], rows)


def plan_facts(plan: Plan) -> list[tuple[str, str]]:
    """Sizes and choices that follow from the plan."""
    size = plan.output_bytes
    facts = [
        ("weights", f"{plan.weights:,}"),
        (
            "source" if any(p.tensor.source_bytes for p in plan.tensors) else "source at bf16",
            gigabytes(plan.source_bytes),
        ),
        (
            "output",
            f"{gigabytes(size)} (1 GB = 1e9 bytes; {size / 2**30:.2f} GiB)"
            f" in {len(plan.shards) * plan.tensor_parallel_size} files",
        ),
        ("bits per weight, whole model", f"{plan.bits_per_weight():.3f}"),
    ]
    if any(planned.tensor.is_expert for planned in plan.tensors):
        facts.append(
            ("bits per weight, routed experts", f"{plan.bits_per_weight(Role.EXPERT):.3f}")
        )
    facts += plan.target.facts(plan)
    if plan.tensor_parallel_size > 1:
        facts.append(("tensor parallelism", f"{plan.tensor_parallel_size} rank folders"))
    return facts


def summary_rows(plan: Plan, records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Per format: matrices, weights, bits per weight, mean rel-MSE, size; then the total."""
    groups: dict[str, list[tuple[PlannedTensor, dict[str, Any]]]] = {}
    for planned, record in zip(plan.tensors, records, strict=True):
        groups.setdefault(planned.format, []).append((planned, record["stats"]))
    rows = []
    for format, members in groups.items():
        weights = sum(planned.weights for planned, _ in members)
        stored = sum(planned.rank_bytes for planned, _ in members) * plan.tensor_parallel_size
        errors = [stats["rel_mse"] for _, stats in members if stats.get("rel_mse") is not None]
        rows.append(
            [
                FORMAT_WORDS.get(format, format),
                f"{len(members):,}",
                f"{weights:,}",
                f"{8 * stored / weights:.3f}",
                f"{sum(errors) / len(errors):.5f}" if errors else "",
                gigabytes(stored),
            ]
        )
    total = plan.output_bytes
    rows.append(
        [
            "total",
            f"{len(plan.tensors):,}",
            f"{plan.weights:,}",
            f"{8 * total / plan.weights:.3f}",
            "",
            gigabytes(total),
        ]
    )
    return rows


SUMMARY_COLUMNS = ("format", "matrices", "weights", "bits/weight", "mean rel-MSE", "size")


class Progress:
    """A progress bar, drawn if `shown`; as a context it gives a function of (done, total)."""

    def __init__(self, unit: str, total: int, shown: bool) -> None:
        self._bar = tqdm(total=total, unit=unit, disable=not shown, leave=False)

    def __enter__(self) -> Callable[[int, int], None]:
        return lambda done, total: self._bar.update(done - self._bar.n) and None

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def check_can_write(path: str | os.PathLike[str], force: bool, flag: str = "--json") -> None:
    """Called before hours of work, not after them.

    Raises:
        CcqError: if there is a file and no `force`, or none can be made there.
    """
    path = output_path(path, flag)
    try:
        if path.is_dir():
            raise CcqError(f"{flag} {path}: is a folder; name a file")
        if is_stream(path):
            return
        if os.path.lexists(path) and not force:
            raise CcqError(f"{flag} {path}: already exists; name another file or add --force")
        if not path.parent.is_dir():
            raise CcqError(f"{flag} {path}: the folder {path.parent} does not exist")
        partial_name(path).touch()
        partial_name(path).unlink()
    except OSError as error:
        raise CcqError(f"{flag} {path}: {describe_os_error(error)}") from None


def json_writer(args: argparse.Namespace) -> Callable[[Any], None]:
    """What writes a command's result where --json says, if it does.

    Raises:
        CcqError: at once, if a file is there and --force is not given.
    """
    if args.json is None:
        return lambda result: None
    check_can_write(args.json, args.force)
    return lambda result: write_json(args.json, result)


def write_json(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write the file as a whole or not at all."""
    text = json.dumps(result, indent=2) + "\n"
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))
