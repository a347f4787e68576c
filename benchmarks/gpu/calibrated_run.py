# SPDX-License-Identifier: Apache-2.0
"""`quantize --calibration` with made-up statistics: whole files where there is no Paddle.

    python benchmarks/gpu/calibrated_run.py --model DIR --output DIR --device gpu [--preset fast]

Only the forward pass through the model needs Paddle. Here every expert matrix gets a Hessian
made up from its name; a few get none, like experts that no token reached. Everything else is the
product's own: plan, reading, encoding, writing.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import numpy as np

from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from paddle_ccq.checkpoint.writer import Workplace
from paddle_ccq.encoder.base import DEVICES, PRESETS
from paddle_ccq.encoder.ldlq import Hessians
from paddle_ccq.encoder.ldlq_metric import InputHessian
from paddle_ccq.quantization.options import QuantizeOptions
from paddle_ccq.quantization.run import QuantizeRun, encoders_for
from paddle_ccq.targets.fastdeploy.layout import build_plan
from paddle_ccq.targets.recipe import Recipe

TOKENS = 512
# One matrix in so many has no statistics.
EMPTY = 7


def made_up_hessians(checkpoint: Checkpoint) -> Hessians:
    """Hessians of inputs with uneven sizes and a few common directions, by name."""
    shapes = checkpoint.config.tensors.shapes

    def hessians(name: str) -> InputHessian:
        seed = zlib.crc32(name.encode())
        if seed % EMPTY == 0:
            return InputHessian(None, 0)
        rng, k = np.random.default_rng(seed), shapes[name][0]
        x = rng.standard_normal((TOKENS, k)) * rng.lognormal(0, 0.5, k)
        x += rng.standard_normal((TOKENS, 4)) @ rng.standard_normal((4, k))
        return InputHessian(x.T @ x / TOKENS, TOKENS)

    return hessians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="fast")
    args = parser.parse_args()
    options = QuantizeOptions(preset=args.preset, device=args.device, quiet=True)
    target = Path(args.output)
    checkpoint = open_checkpoint(Path(args.model))
    plan = build_plan(checkpoint.config)
    # The journal and config.json want to know what was used.
    said = {"text": "made up", "text_sha256": "0" * 64, "tokens_used": TOKENS}
    with Workplace(target) as workplace:
        run = QuantizeRun(
            plan,
            options,
            encoders_for(plan, options, made_up_hessians(checkpoint)),
            checkpoint,
            Recipe(checkpoint.path.name, options.preset, options.encoder, said),
            workplace,
            target.with_name(target.name + ".log.jsonl"),
        )
        result = run.run(print)
    counts = [r["stats"].get("calibration_tokens") for r in result.records]
    print(
        f"{args.device}: {sum(c is not None for c in counts)} expert matrices,"
        f" {counts.count(0)} of them without statistics; {result.seconds['encode']:.1f} s encoding"
    )


if __name__ == "__main__":
    main()
