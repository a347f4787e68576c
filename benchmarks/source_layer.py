# SPDX-License-Identifier: Apache-2.0
"""Table of docs/notes/families.md: one MoE layer of DeepSeek-V3's shape, from FP8, by `quantize`.

    python benchmarks/source_layer.py --scratch DIR [--experts 256] [--device gpu] [--format ccq-2t]

The layer is random, in E4M3 with float32 scales of 128 x 128 blocks, and has the shapes of
DeepSeek-V3: experts of 2048 x 7168, latent attention, a shared expert; the vocabulary alone is cut
to 1024. Whole it takes 11.5 GB, and the output 3 GB. With fewer --experts the rate of the experts
is the same: they are encoded one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from common import ROOT, markdown, processor, put_into_doc, save_result

from paddle_ccq.checkpoint.manifest import MANIFEST_FILE
from paddle_ccq.checkpoint.safetensors_io import SafetensorsWriter, StoredSpec
from paddle_ccq.checkpoint.sources.locate import expected
from paddle_ccq.checkpoint.sources.scheme import SourceScheme
from paddle_ccq.families.registry import read_config

CONFIG = ROOT / "examples" / "configs" / "deepseek-v3" / "config.json"
VOCABULARY = 1024
# Values of a matrix before its scale, and the scale, as in a matrix of standard deviation 0.02.
TYPICAL, SCALE = 100.0, 2e-4
CHILD = """
import json, resource, sys
from paddle_ccq.quantize import quantize
model, output, format, preset, device = sys.argv[1:]
result = quantize(model, output, format=format, preset=preset, device=device, quiet=True)
usage = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which a process takes over from the one that started it.
status = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
print(json.dumps({
    "peak": 1024 * int(status["VmHWM"].split()[0]),
    "processor_seconds": usage.ru_utime + usage.ru_stime,
    "estimate": result.plan.peak_memory(),
    "seconds": result.seconds,
    "read": int(io["rchar"]),
    "written": int(io["wchar"]),
    "records": [record["stats"] for record in result.records],
}))
"""


def model_config(experts: int) -> dict:
    """DeepSeek-V3's config.json with one layer, which has experts."""
    return json.loads(CONFIG.read_text()) | {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": experts,
        "num_experts_per_tok": min(8, experts),
        "vocab_size": VOCABULARY,
    }


def tensors(raw: dict) -> Iterator[StoredSpec]:
    """The stored tensors of the source."""
    config, scheme = read_config(raw), SourceScheme.read(raw, CONFIG)
    for tensor in config.tensors.values():
        for part in tensor.sources["pt"].parts:
            yield from expected(scheme, part, "BF16", tensor.is_linear)


def write_model(folder: Path, experts: int) -> int:
    """The layer in one file, written tensor by tensor; returns its bytes."""
    raw = model_config(experts)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    specs = list(tensors(raw))
    # One block of Gaussian values, begun elsewhere for every tensor: making random numbers is not
    # what is measured.
    block = np.random.default_rng(0).standard_normal((1 << 24) + 8191).astype(np.float32)
    codes = (block * TYPICAL).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    floats = (block * TYPICAL * SCALE).astype(ml_dtypes.bfloat16)
    scales = (SCALE * np.exp(0.2 * block[: 1 << 16])).astype(np.float32)
    of_dtype = {"F8_E4M3": codes, "BF16": floats, "F32": scales}
    path = folder / "model.safetensors"
    with SafetensorsWriter(path, specs) as writer:
        for number, (name, dtype, shape) in enumerate(specs):
            values = of_dtype[dtype]
            values = values[number * 1543 % (len(values) // 2) :]
            writer.write(name, np.resize(values, shape))
    return path.stat().st_size


def run(model: Path, output: Path, format: str, preset: str, device: str) -> dict:
    """Quantize in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-c", CHILD, str(model), str(output), format, preset, device]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def measure(scratch: Path, experts: int, format: str, preset: str, device: str) -> dict:
    """Write the layer, quantize it, remove both."""
    folder = scratch / f"ccq-source-layer-{os.getpid()}"
    try:
        begin = time.perf_counter()
        size = write_model(folder / "model", experts)
        print(f"{size / 1e9:.2f} GB made in {time.perf_counter() - begin:.0f} s", flush=True)
        result = run(folder / "model", folder / "out", format, preset, device)
        manifest = json.loads((folder / "out" / MANIFEST_FILE).read_text())["files"]
        shards = {n: e["sha256"] for n, e in manifest.items() if n.endswith(".safetensors")}
        output = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    chosen = [r for r in result.pop("records") if r["format"] == format]
    weights = sum(int(np.prod(r["shape"])) for r in chosen)
    assert len(chosen) == 2 * experts
    return {
        "experts": experts,
        "format": format,
        "preset": preset,
        "device": device,
        "source": size,
        "output": output,
        "shards": shards,
        "weights": weights,
        "encode_rate": weights / sum(r["seconds"] for r in chosen),
        "rate": weights / result["seconds"]["total"],
        "rel_mse": float(np.mean([r["rel_mse"] for r in chosen])),
        **result,
    }


def row(result: dict) -> list[str]:
    seconds = result["seconds"]
    return [
        f"{result['device']}, {result.get('format', 'wint2')}, {result['preset']}",
        str(result["experts"]),
        f"{result['read'] / 1e9:.2f}",
        f"{result['written'] / 1e9:.2f}",
        f"{result['peak'] / 1e9:.2f}" if result["peak"] else "",
        f"{seconds['total']:.0f}",
        *(f"{seconds[part] / seconds['total']:.0%}" for part in ("read", "encode", "write")),
        f"{result['rate'] / 1e6:.2f}",
        f"{result['weights'] / result['processor_seconds'] / 1e6:.2f}",
        f"{result['rel_mse']:.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, help="where to write and remove the models")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--format", default="wint2")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", default="", help="what else the machine did, for the page")
    parser.add_argument("--json", type=Path, help="add a line with the result to this file")
    parser.add_argument("--page", type=Path, nargs="+", help="only put such files into the page")
    args = parser.parse_args()
    if args.page:
        lines = [line for path in args.page for line in path.read_text().splitlines()]
        write_page([json.loads(line) for line in lines], args.note)
        return
    if args.scratch is None:
        parser.error("--scratch is missing")
    result = measure(args.scratch, args.experts, args.format, args.preset, args.device)
    result["machine"] = machine(args.device)
    print(row(result), flush=True)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(result) + "\n")


def machine(device: str) -> str:
    """The processor with its usable cores, and the GPU where one was used."""
    cores = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    if device != "gpu":
        return cores
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return f"{found.splitlines()[0]}, {cores}"


def write_page(results: list[dict], note: str) -> None:
    header = ["device, format, preset", "experts", "read, GB", "written, GB", "peak memory, GB",
              "seconds",
              "reading", "encoding", "writing", "M weights/s", "M weights per core and second",
              "rel-MSE"]  # fmt: skip
    save_result("source_layer", {"rows": results})
    machines = "; ".join(dict.fromkeys(result["machine"] for result in results))
    text = (
        f"\n\nOne MoE layer of DeepSeek-V3's shape in FP8, made of random values; {machines}."
        f" {note} `python benchmarks/source_layer.py --scratch DIR`."
    )
    table = markdown(header, [row(result) for result in results])
    put_into_doc("docs/notes/families.md", "source layer", table + text)


if __name__ == "__main__":
    main()
