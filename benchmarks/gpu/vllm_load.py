# SPDX-License-Identifier: Apache-2.0
"""How long vLLM takes to load a checkpoint of the 300B's shape, beside reading its files.

    python benchmarks/gpu/vllm_load.py make FOLDER [--layers 54]
    python benchmarks/gpu/vllm_load.py time FOLDER OUT.json [--read-files N] [--kv-bytes N]
    python benchmarks/gpu/vllm_load.py time FOLDER OUT.json --read-files 0 --start-only

`make` writes a whole checkpoint of random stored tensors. `time` reads its files, or the first N,
and starts the engine, both with nothing of the files in the page cache, and generates: a few
tokens, then as vllm_speed.py does. The second line is a later start, for which torch.compile's
results are kept. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BUFFER = 64 << 20
READERS = 16
BATCHES = [1, 8, 32, 64]
ANSWER = 96
# Values that make sense, so that the model's outputs are finite numbers.
CONSTANTS = {
    "super_scales": 2e-4,
    "code_scale": 127.0,
    "code_zp": 40.0,
    "weight_scale": 2e-4,  # of wint8 and wint4; wint2's is bytes
    "norm.weight": 1.0,
    "layernorm.weight": 1.0,
}


def _pattern(name: str, dtype: str, random: np.random.Generator) -> bytes:
    """Bytes to be repeated over a tensor."""
    import ml_dtypes

    if dtype in ("U8", "I8", "I16"):
        return random.bytes(BUFFER)
    made = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}[dtype]
    for suffix, value in CONSTANTS.items():
        if name.endswith(suffix):
            return np.full(1 << 20, value, made).tobytes()
    return (0.02 * random.standard_normal(1 << 22)).astype(made).tobytes()


def make(folder: Path, layers: int, wint4_end: int) -> None:
    """Write the checkpoint that the plan of this shape calls for."""
    from vllm_shapes import shape_plan

    from paddle_ccq.checkpoint.safetensors_format import build_header, index_bytes, tensor_bytes
    from paddle_ccq.targets.fastdeploy.config import output_config

    plan = shape_plan(layers, wint4_end)
    folder.mkdir(parents=True)
    random, patterns, lock = np.random.default_rng(0), {}, threading.Lock()

    def pattern(name: str, dtype: str) -> memoryview:
        ending = next((s for s in CONSTANTS if name.endswith(s)), "")
        key = (ending if dtype in ("BF16", "F32") else "", dtype)
        with lock:
            if key not in patterns:
                patterns[key] = memoryview(_pattern(name, dtype, random))
            return patterns[key]

    def write(shard: Any) -> int:
        with open(folder / shard.name, "wb", buffering=0) as file:
            file.write(build_header(shard.specs, plan.target.shard_metadata))
            for name, dtype, shape in shard.specs:
                left, source = tensor_bytes(dtype, shape), pattern(name, dtype)
                while left:
                    left -= file.write(source[: min(left, len(source))])
            size = file.tell()
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return size

    begin = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        total = sum(pool.map(write, plan.shards))
    index = index_bytes({shard.name: shard.specs for shard in plan.shards})
    (folder / "model.safetensors.index.json").write_bytes(index)
    config = output_config(plan, {"row_order": plan.row_order})
    (folder / "config.json").write_text(json.dumps(config))
    seconds = time.perf_counter() - begin
    print(f"wrote {total / 1e9:.1f} GB in {seconds:.0f} s", flush=True)


def forget(folder: Path) -> None:
    """Nothing of the folder stays in the page cache."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def read(files: list[Path], threads: int) -> float:
    """Seconds to read files once, in pieces of 16 MiB."""
    tasks = [(path, offset) for path in files for offset in range(0, path.stat().st_size, 16 << 20)]
    local = threading.local()

    def one(task: tuple[Path, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(16 << 20)
        descriptor = os.open(task[0], os.O_RDONLY)
        try:
            return os.preadv(descriptor, [local.buffer], task[1])
        finally:
            os.close(descriptor)

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        sum(pool.map(one, tasks))
    return time.perf_counter() - begin


class Memory(threading.Thread):
    """Watches host memory: of all processes below this one, own pages and mapped ones."""

    def __init__(self, save: Callable[[dict[str, float]], None]) -> None:
        super().__init__(daemon=True)
        self.save = save
        self.peak: dict[str, float] = {}
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.5):
            sizes = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
            for pid in self.family():
                try:
                    text = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                for line in text.splitlines():
                    key, _, rest = line.partition(":")
                    if key in sizes:
                        sizes[key] += int(rest.split()[0]) * 1024
            sizes["all"] = sum(sizes.values())
            for key, size in sizes.items():
                self.peak[key] = max(self.peak.get(key, 0), size)
            self.save(self.peak)

    @staticmethod
    def family() -> set[int]:
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = path.read_text()
            except OSError:
                continue
            parents[int(path.parent.name)] = int(text.rpartition(")")[2].split()[1])
        found, grown = {os.getpid()}, True
        while grown:
            more = {pid for pid, parent in parents.items() if parent in found}
            grown = not more <= found
            found |= more
        return found


def measure(
    folder: Path,
    options: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
    read_files: int | None,
    start_only: bool,
) -> dict[str, Any]:
    """Saved step by step, for a load may be cut short."""
    files = sorted(folder.glob("*.safetensors"))
    result: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in files)}
    chosen = files[:read_files]
    if chosen:
        forget(folder)
        seconds = read(chosen, READERS)
        result["read"] = {"bytes": sum(p.stat().st_size for p in chosen), "seconds": seconds}
        print("read", result["read"], flush=True)
    forget(folder)
    save(result)
    memory = Memory(lambda peak: save(result | {"peak_host_bytes": peak}))
    memory.start()
    begin = time.perf_counter()
    from vllm import LLM, SamplingParams
    from vllm_speed import PROMPT, Runner

    result["import_seconds"] = time.perf_counter() - begin
    engine = LLM(
        str(folder), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=9216,
        max_num_batched_tokens=8192, max_num_seqs=64, enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": BATCHES}, **options,
    )  # fmt: skip
    result["up_seconds"] = time.perf_counter() - begin
    save(result | {"peak_host_bytes": memory.peak})
    settings = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": list(range(10, 74))}]
    answers = engine.generate(asked, settings, use_tqdm=False)
    result["first_answer_seconds"] = time.perf_counter() - begin
    result["answer"] = list(answers[0].outputs[0].token_ids)
    memory.stopped.set()
    result["peak_host_bytes"] = memory.peak
    save(result)
    if start_only:
        return result
    run = Runner(engine)
    result |= {"decode": {}, "first_token": {}}
    for batch in BATCHES:
        result["decode"][batch] = batch * ANSWER / min(run(batch, PROMPT, ANSWER) for _ in range(2))
        print("decode", batch, round(result["decode"][batch], 1), flush=True)
        save(result)
    for tokens in (1024, 4096, 8192):
        result["first_token"][tokens] = min(run(1, tokens, 1) for _ in range(3))
        print("first token", tokens, round(result["first_token"][tokens], 3), flush=True)
        save(result)
    return result


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make")
    one.add_argument("folder", type=Path)
    one.add_argument("--layers", type=int, default=54)
    one.add_argument("--wint4-end-layer", type=int, default=-1)
    two = commands.add_parser("time")
    two.add_argument("folder", type=Path)
    two.add_argument("output", type=Path)
    two.add_argument("--tensor-parallel-size", type=int, default=1)
    two.add_argument("--kv-bytes", type=int, help="of the KV cache; else all that is free")
    two.add_argument("--read-files", type=int, help="so many files before; all where left out")
    two.add_argument("--start-only", action="store_true", help="without the speed afterwards")
    arguments = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if arguments.command == "make":
        make(arguments.folder, arguments.layers, arguments.wint4_end_layer)
        return 0
    import vllm_random

    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ[vllm_random.SPLIT] = "1"
    vllm_random.use_in_all_processes()
    options: dict[str, Any] = {"tensor_parallel_size": arguments.tensor_parallel_size}
    options["gpu_memory_utilization"] = 0.3 if arguments.kv_bytes else 0.94
    if arguments.kv_bytes:
        options["kv_cache_memory_bytes"] = arguments.kv_bytes

    def save(result: dict[str, Any]) -> None:
        arguments.output.write_text(json.dumps(options | result, indent=1) + "\n")

    chosen = arguments.read_files, arguments.start_only
    result = measure(arguments.folder, options, save, *chosen)
    save(result)
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
