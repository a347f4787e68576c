# SPDX-License-Identifier: Apache-2.0
"""Speed, memory and collectives of vLLM on one to eight cards: 300B's and DeepSeek-V3's shapes.

    python benchmarks/gpu/vllm_scale.py OUT.json --seconds 3600 [--only NAME...] [--list]

Runs the rows of ROWS that the machine has cards for, each in a process of its own; those whose
memory allows it start together and measure in turns, once all are up. What does not fit, cannot be
cut so, or finds no time is in the result by name; of a row measured before, the older result stays
until there is a newer one. With vLLM and the GPU library; vllm_report.py makes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

GIB = 1 << 30
H200_GIB = 139.8  # what PyTorch says that a card has
BATCHES, PROMPT = (1, 8, 32, 128), 4096
CACHE_TOKENS = 24576  # of all sequences at once; vLLM wants room for the longest one too
KERNELS = 30  # of a step, that are kept
UP_SECONDS = 100  # without which a row is not begun: vLLM starts, and something is measured


@dataclass(frozen=True)
class Row:
    """A shape, its bits, and how it is spread over cards."""

    shape: str
    bits: str  # "wint2" or "int4"
    tensor: int = 1
    pipeline: int = 1
    experts: bool = False

    @property
    def cards(self) -> int:
        return self.tensor * self.pipeline

    @property
    def name(self) -> str:
        cut = "pp" if self.pipeline > 1 else "ep" if self.experts else "tp"
        return f"{self.shape} {self.bits} {cut}{self.cards}"


_ERNIE, _DEEPSEEK = "ernie-300b", "deepseek-v3"
ROWS = (
    *(Row(_ERNIE, "wint2", cards) for cards in (1, 2)),
    Row(_ERNIE, "wint2", 2, experts=True),
    Row(_ERNIE, "wint2", pipeline=2),
    *(Row(_ERNIE, "wint2", cards) for cards in (4, 8)),
    Row(_ERNIE, "wint2", 8, experts=True),
    *(Row(_ERNIE, "int4", cards) for cards in (1, 2, 4)),
    Row(_ERNIE, "int4", 8, experts=True),
    *(Row(_DEEPSEEK, "wint2", cards) for cards in (1, 2)),
    Row(_DEEPSEEK, "wint2", 2, experts=True),
    *(Row(_DEEPSEEK, "wint2", cards) for cards in (4, 8)),
    Row(_DEEPSEEK, "wint2", 8, experts=True),
    *(Row(_DEEPSEEK, "int4", cards) for cards in (2, 4, 8)),
    Row(_DEEPSEEK, "int4", 8, experts=True),
)


def judge(row: Row, card_bytes: int) -> dict[str, Any]:
    """Whether a row can run on cards of this size, and what a card of it holds, in bytes."""
    from vllm_shapes import card_memory

    from paddle_ccq.errors import CcqError
    from paddle_ccq.vllm.check import ServeConfig
    from paddle_ccq.vllm.claims import Parallel

    serve = ServeConfig(
        card_bytes=card_bytes,
        parallel=Parallel(row.tensor, row.pipeline, row.experts),
        max_model_len=PROMPT + 1024,
        max_num_batched_tokens=PROMPT,
        gpu_memory_utilization=0.94,
    )
    try:
        memory = card_memory(row.shape, row.bits == "int4", serve)
    except CcqError as error:
        return {"state": "refused", "why": str(error)}
    cache = CACHE_TOKENS * memory.token_cache
    needed = memory.weights + memory.activations + memory.libraries + cache
    found = {"weights": memory.weights, "needed": needed, "cache": cache}
    return found | {"state": "fits" if memory.cache >= cache else "does not fit"}


def groups(rows: list[tuple[Row, dict[str, Any]]], card_bytes: int) -> Iterator[list[Row]]:
    """Rows in their order, those together that a card has room for at the same time."""
    group: list[Row] = []
    filled = 0
    for row, found in rows:
        if group and filled + found["needed"] > 0.94 * card_bytes:
            yield group
            group, filled = [], 0
        group.append(row)
        filled += found["needed"]
    if group:
        yield group


def arguments_of(row: Row, output: Path, cache: int, options: argparse.Namespace) -> Any:
    """What `vllm_engine.py speed` is told for a row."""
    from vllm_engine import parse

    words = ["speed", str(output), "--shape", row.shape, "--few-graphs"]
    words += ["--answer", str(options.answer), "--kv-bytes", str(cache)]
    words += ["--tensor-parallel-size", str(row.tensor)]
    words += ["--pipeline-parallel-size", str(row.pipeline)]
    words += ["--batched-tokens", str(options.prompt), "--prompts", str(options.prompt)]
    batches = [str(batch) for batch in options.batches]
    words += ["--batches", *batches, "--profile", *map(str, options.profile)]
    if row.experts:
        words.append("--enable-expert-parallel")
    if row.bits == "int4":
        words.append("--peer")
    if options.layers:
        words += ["--layers", str(options.layers)]
    if row.shape == _DEEPSEEK:
        words += ["--latent-attention", options.latent_attention]
    return parse(words)


def _shortened(result: dict[str, Any]) -> dict[str, Any]:
    """Without the course of each profiled step, which would be megabytes."""
    profile = {
        batch: {k: v for k, v in found.items() if k not in ("timeline", "names")}
        | {"kernels": found["kernels"][:KERNELS]}
        for batch, found in result.get("profile", {}).items()
    }
    return result | {"profile": profile}


def _child(row: Row, cache: int, options: argparse.Namespace, output: Path, log: Path) -> None:
    """A row in this process, which was made for it."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ["CCQ_BENCH_GATE"] = str(_gate(options))
    os.environ["VLLM_CACHE_ROOT"] = str(options.work / "cache" / row.name.replace(" ", "-"))
    from vllm_speed import speed

    def save(result: dict[str, Any]) -> None:
        written = output.with_suffix(".part")
        written.write_text(json.dumps(_shortened(result)))
        written.replace(output)

    save(speed(arguments_of(row, output, cache, options), save))


def start(row: Row, cache: int, options: argparse.Namespace) -> int:
    """The process of a row: its id, which is its group's too."""
    output, log = _files(row, options)
    output.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    code = 1
    try:
        _child(row, cache, options, output, log)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _gate(options: argparse.Namespace) -> Path:
    """A file that whoever measures has locked (vllm_speed.py)."""
    return options.work / "gate"


def _files(row: Row, options: argparse.Namespace) -> tuple[Path, Path]:
    stem = options.work / row.name.replace(" ", "-")
    return stem.with_suffix(".json"), stem.with_suffix(".log")


def finish(pid: int, deadline: float) -> str:
    """Wait for a row's process, and end all that it started; "" or what went wrong."""
    status = None
    while status is None and time.monotonic() < deadline:
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            status = found
        else:
            time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
        return "the time was over"
    return f"status {status}" if status else ""


def _wait_until_up(pids: dict[Row, int], options: argparse.Namespace, deadline: float) -> None:
    """Until every row has a first result, or its process has ended."""
    waiting = dict(pids)
    while waiting and time.monotonic() < deadline:
        for row, pid in list(waiting.items()):
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended or _files(row, options)[0].is_file():
                del waiting[row]
        time.sleep(0.1)


def run_group(
    group: list[Row], found: dict[str, Any], options: argparse.Namespace, deadline: float
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The rows of a group, with what was measured of each."""
    with _gate(options).open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        pids = {row: start(row, found[row.name]["cache"], options) for row in group}
        _wait_until_up(pids, options, deadline)
        # By name: the rows' processes have this file too.
        fcntl.flock(gate, fcntl.LOCK_UN)
    for row, pid in pids.items():
        wrong = finish(pid, deadline)
        output, log = _files(row, options)
        result = json.loads(output.read_text()) if output.is_file() else {}
        if wrong and not result:
            lines = [n for n in log.read_text(errors="replace").splitlines() if "Error" in n]
            result = {"state": "failed", "why": f"{wrong}: {(lines or [''])[0][-300:]}"}
        else:
            result |= {"state": "measured", "date": date.today().isoformat()}
            result |= {"together": len(group)} | ({"why": wrong} if wrong else {})
        yield row, result


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=3600, help="of all together")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="in this order")
    parser.add_argument("--list", action="store_true", help="what would run, and end")
    parser.add_argument("--cards", type=int, help="that the machine has; counted if left out")
    parser.add_argument("--gpu-memory", type=float, default=H200_GIB, help="GiB of a card")
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--profile", type=int, nargs="*", default=[1, 32, 128])
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--layers", type=int, help="the first of them alone: a try, no result")
    parser.add_argument("--latent-attention", default="vllm", choices=["vllm", "torch", "none"])
    parser.add_argument("--work", type=Path, help="for logs and caches")
    options = parser.parse_args(argv)
    options.work = options.work or Path(tempfile.mkdtemp(prefix="ccq-scale-"))
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    deadline = time.monotonic() + options.seconds
    known = {row.name: row for row in ROWS}
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        print(f"--only {unknown[0]!r}: known are {', '.join(known)}", file=sys.stderr)
        return 2
    rows = [known[name] for name in options.only] if options.only else list(ROWS)
    if options.cards is None:
        import torch

        options.cards = torch.cuda.device_count()
    card_bytes = int(options.gpu_memory * GIB)
    results: dict[str, Any] = {}
    if options.output.is_file():
        results = json.loads(options.output.read_text())

    def save(name: str, result: dict[str, Any]) -> None:
        if result["state"] != "measured" and results.get(name, {}).get("state") == "measured":
            print(name, result, flush=True)
            return
        results[name] = judged[name] | result
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        shown = {k: v for k, v in results[name].items() if k != "profile"}
        print(name, json.dumps(shown)[:1000], flush=True)

    judged = {row.name: judge(row, card_bytes) for row in rows}
    todo = []
    for row in rows:
        found = judged[row.name]
        if found["state"] == "fits" and row.cards > options.cards:
            found = {"state": "not run", "why": f"{row.cards} cards; {options.cards} here"}
        elif found["state"] == "fits":
            todo.append((row, found))
            continue
        if options.list:
            print(row.name, found)
        else:
            save(row.name, found)
    for group in groups(todo, card_bytes):
        if options.list:
            print("together:", *(row.name for row in group), sep="\n  ")
            continue
        if deadline - time.monotonic() < UP_SECONDS:
            for row in group:
                save(row.name, {"state": "not run", "why": "no time was left"})
            continue
        import vllm  # noqa: F401  (once for all the rows' processes)

        for row, result in run_group(group, judged, options, deadline):
            save(row.name, result)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main(sys.argv[1:]))
