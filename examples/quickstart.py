# SPDX-License-Identifier: Apache-2.0
"""Quantize the example model, verify it, and measure it before and after, in about two minutes.

    python examples/quickstart.py [--output DIR]

The same four calls work on any ERNIE-4.5 checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from paddle_ccq.errors import CcqError, run_cli
from paddle_ccq.evaluate import evaluate
from paddle_ccq.evaluation.report import detail_table
from paddle_ccq.quantize import print_summary, quantize
from paddle_ccq.reporting import console
from paddle_ccq.verify import print_result, verify

HERE = Path(__file__).resolve().parent
MODEL = HERE / "ernie-45-moe-3m"
TEXT = HERE / "data" / "public-domain-sample.txt"
TASKS = [HERE / "data" / f"{name}.jsonl" for name in ("arith", "word", "recall", "defmc", "cont")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="keep the quantized model in this new folder")
    args = parser.parse_args()
    if args.output is None:
        scratch = Path(tempfile.mkdtemp(prefix="paddle-ccq-"))
        try:
            return run(scratch / "model")
        finally:
            shutil.rmtree(scratch)
    return run(args.output)


def run(output: Path) -> int:
    print(f"1. Quantize {MODEL.name}: experts to 2.06 bits, other linear layers to 8\n")
    result = quantize(MODEL, output)
    print_summary(result)

    print("\n2. Verify structure, hashes, code ranges, and the error of every matrix\n")
    checked = verify(output, reference=MODEL)
    print_result(checked)
    if checked.problems:
        raise CcqError(f"{output}: did not verify")

    print("\n3. Evaluate before and after: perplexity, KL divergence, tasks\n")
    measured = evaluate(output, reference=MODEL, text=TEXT, tasks=TASKS)
    scores = measured["results"]
    named = {"before, bf16": scores["reference"], "after, 2.06 bits": scores["model"]}
    console().print(detail_table(named))
    print(f"Tasks are in parts of 1, 200 items each; the text is examples/data/{TEXT.name}.")
    print("So small a model pays far more than a larger one: docs/accuracy.md measures one.")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
