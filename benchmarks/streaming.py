# SPDX-License-Identifier: Apache-2.0
"""Table of docs/notes/encoder.md: peak memory and time shares of `quantize`, growing depth.

    python benchmarks/streaming.py --scratch DIR [--depths 1 2 4] [--preset default]

The models are random, but every matrix has the shape it has in ERNIE-4.5-300B-A47B: embedding and
output head of 103424 x 8192, dense MLP of 28672, experts of 8192 x 7168 and 3584 x 8192; there are
two experts a layer instead of 64. Needs about 15 GB of disk in --scratch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from common import ROOT, markdown, processor, put_into_doc, save_result

from paddle_ccq.checkpoint.safetensors_io import SafetensorsWriter
from paddle_ccq.families.registry import read_config

CONFIG = ROOT / "examples" / "configs" / "ernie-4.5-300b-a47b" / "config.json"
EXPERTS = 2


def write_model(folder: Path, depth: int) -> int:
    """One dense layer and `depth` MoE layers in -Paddle layout; returns the bytes written."""
    raw = json.loads(CONFIG.read_text())
    raw |= {
        "num_hidden_layers": depth + 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": depth,
        "moe_num_experts": EXPERTS,
        "moe_k": 1,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = read_config(raw).tensors.shapes
    specs = [(name, "BF16", shape) for name, shape in shapes.items()]
    # One block of Gaussian values, cut and repeated: making random numbers is not what is measured.
    block = np.random.default_rng(depth).standard_normal(1 << 22) * 0.02
    block = block.astype(ml_dtypes.bfloat16)
    path = folder / "model.safetensors"
    with SafetensorsWriter(path, specs) as writer:
        for name, _, shape in specs:
            writer.write(name, np.resize(block, shape))
    return path.stat().st_size


def run(model: Path, output: Path, preset: str) -> dict:
    """Quantize in a process of its own, so that its peak memory is its own."""
    code = (
        "import sys, json, resource; from paddle_ccq.quantize import quantize; "
        "r = quantize(sys.argv[1], sys.argv[2], preset=sys.argv[3], quiet=True); "
        "print(json.dumps({'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "
        "'estimate': r.plan.peak_memory(), 'seconds': r.seconds, "
        "'records': [x['stats'] for x in r.records]}))"
    )
    command = [sys.executable, "-c", code, str(model), str(output), preset]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", required=True, type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--preset", default="default")
    args = parser.parse_args()
    rows, results = [], []
    for depth in args.depths:
        folder = args.scratch / f"ccq-streaming-{depth}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            size = write_model(folder / "model", depth)
            result = run(folder / "model", folder / "out", args.preset)
            written = sum(f.stat().st_size for f in (folder / "out").glob("*.safetensors"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = result["seconds"]
        experts = [r for r in result["records"] if r["format"] == "wint2"]
        encoding = sum(r["seconds"] for r in experts)
        reading = sum(r["read_seconds"] for r in experts)
        rate = sum(int(np.prod(r["shape"])) for r in experts) / encoding
        del result["records"]
        results.append({"depth": depth, "source": size, "written": written, "rate": rate, **result})
        rows.append(
            [
                str(depth),
                f"{size / 1e9:.2f}",
                f"{written / 1e9:.2f}",
                f"{result['peak'] / 1e9:.2f}",
                f"{seconds['total']:.0f}",
                *(
                    f"{seconds[part] / seconds['total']:.0%}"
                    for part in ("read", "encode", "write")
                ),
                f"{reading / (reading + encoding):.1%}",
                f"{rate / 1e6:.1f}",
            ]
        )
        print(rows[-1], flush=True)
    save_result("streaming", {"processor": processor(), "rows": results})
    header = ["MoE layers", "source, GB", "written, GB", "peak memory, GB", "seconds", "read",
              "encode", "write", "read, experts alone", "experts, M weights/s"]  # fmt: skip
    note = (
        f"\n\nAll matrices in the shapes of the 300B model, {EXPERTS} experts a layer, preset "
        f"{args.preset}, files in the page cache or on the local disk as the system had them; "
        f"{processor()}. `python benchmarks/streaming.py --scratch DIR`."
    )
    put_into_doc("docs/notes/encoder.md", "streaming", markdown(header, rows) + note)


if __name__ == "__main__":
    main()
