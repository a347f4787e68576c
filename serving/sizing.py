# SPDX-License-Identifier: Apache-2.0
"""The sizing table of README.md, computed by the check's own functions; --write puts it there."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddle_ccq.checkpoint.plan import Plan
from paddle_ccq.engine_check import GIB
from paddle_ccq.families.registry import read_config
from paddle_ccq.fastdeploy.memory import card_memory
from paddle_ccq.targets.fastdeploy.layout import build_plan

HERE = Path(__file__).resolve().parent
LENGTH = 32768
SEQUENCES = 128
# (model, cards, as sold, GiB as nvidia-smi reports it)
CASES = (
    ("ernie-4.5-300b-a47b", 1, "141 GB (H200, H20)", 140.4),
    ("ernie-4.5-300b-a47b", 1, "96 GB (H20)", 95.6),
    ("ernie-4.5-300b-a47b", 2, "96 GB (H20)", 95.6),
    ("ernie-4.5-300b-a47b", 2, "80 GB (H100, A100)", 79.6),
    ("ernie-4.5-300b-a47b", 4, "80 GB (H100, A100)", 79.6),
    ("ernie-4.5-300b-a47b", 4, "48 GB (L20, L40)", 45.0),
    ("ernie-4.5-300b-a47b", 4, "24 GB", 22.5),
    ("ernie-4.5-21b-a3b", 1, "80 GB (H100, A100)", 79.6),
    ("ernie-4.5-21b-a3b", 1, "24 GB (RTX 4090)", 24.0),
    ("ernie-4.5-21b-a3b", 1, "24 GB (A10, L4)", 22.5),
    ("ernie-4.5-21b-a3b", 1, "16 GB", 15.7),
)
COLUMNS = (
    "model",
    "cards",
    "GiB a card",
    "weights a card, GiB",
    "left for KV cache, GiB",
    "tokens in the cache",
    f"sequences of {LENGTH}",
)


@cache
def plan_of(model: str, cards: int) -> Plan:
    config = read_config(HERE.parent / "examples" / "configs" / model)
    return build_plan(config, tensor_parallel_size=cards)


def table() -> str:
    rows = []
    for model, cards, sold, gib in CASES:
        memory = card_memory(plan_of(model, cards), int(gib * GIB), SEQUENCES)
        sequences = memory.sequences(LENGTH)
        rows.append(
            (
                model.removeprefix("ernie-4.5-").upper(),
                f"{cards} x {sold}",
                f"{gib}",
                f"{memory.weights / GIB:.1f}",
                f"{memory.cache / GIB:.1f}",
                f"{memory.tokens:,}" if sequences else "",
                str(sequences) if sequences else "does not fit",
            )
        )
    lines = [" | ".join(COLUMNS), "|".join(["---", "---", *["---:"] * (len(COLUMNS) - 2)])]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def main() -> int:
    if sys.argv[1:] != ["--write"]:
        print(table())
        return 0
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = r"(<!-- table: sizing -->\n).*?(<!-- end -->)"
    new = re.sub(pattern, lambda m: m[1] + table() + "\n" + m[2], text, flags=re.S)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
