# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/notes/families.md: sizes, cards and times of models from their config.json alone.

    python benchmarks/sizes.py

Every number comes from the plan that `quantize --dry-run` prints. Times are the experts' weights at
the rates measured by encoder_speed.py (two cores), encode_gpu.py (one H100) and trellis_gpu.py (one
H200).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, ROOT, markdown, put_into_doc, save_result

from paddle_ccq.checkpoint.plan import Plan, PlanOptions, make_plan
from paddle_ccq.checkpoint.unexpected import config_of_folder
from paddle_ccq.families.config import ModelConfig
from paddle_ccq.targets.outputs import TargetChoice

CONFIGS = ROOT / "examples" / "configs"
MODELS = {
    "deepseek-v3": "DeepSeek-V3",
    "kimi-k2": "Kimi-K2",
    "ernie-4.5-vl-424b-a47b": "ERNIE-4.5-VL-424B-A47B",
    "glm-4.5": "GLM-4.5",
    "ernie-4.5-300b-a47b": "ERNIE-4.5-300B-A47B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
    "ernie-4.5-21b-a3b": "ERNIE-4.5-21B-A3B",
}
FORMATS = ("wint2", "ccq-2.5", "ccq-2.75")
NAMES = {"wint2": "2.06 bits (WINT2)", "ccq-2.5": "2.5 bits", "ccq-2.75": "2.75 bits"}
# Of DeepSeek-V3, in "GB" (tables of the paper, arXiv 2507.07145). They are taken for 2^30 bytes:
# the files that config.json calls for have 689 * 10^9 bytes, which are 641.3 of them.
PAPER = {"source": 642, "wint2": 184, "ccq-2.5": 212, "ccq-2.75": 230}
# Memory of a card as its driver reports it, and the part of it that weights may take: the rest is
# for keys and values, activations and libraries.
CARDS = {"80 GB": 80 << 30, "96 GB": 95 << 30, "141 GB": 140 << 30}
SHARE = 0.85
COUNTS = (1, 2, 4, 8, 16)
# Weights/s of the default preset, WINT2, from host memory to host memory (docs/notes/operators.md).
GPU_RATE = 1111e6


@dataclass(frozen=True)
class Model:
    """A model by its config.json, with a plan for every format."""

    name: str
    config: ModelConfig
    plans: dict[str, Plan]

    @property
    def experts(self) -> int:
        """Weights of routed experts."""
        plan = self.plans["wint2"]
        return sum(planned.weights for planned in plan.tensors if planned.tensor.is_expert)


def read(folder: str, name: str) -> Model:
    config, _ = config_of_folder(CONFIGS / folder)
    target = TargetChoice().of(config)
    # One format for all MoE layers, so that bits mean what they say.
    plans = {f: make_plan(config, PlanOptions(target, f, wint4_end_layer=-1)) for f in FORMATS}
    return Model(name, config, plans)


def cards(size: int, memory: int) -> str:
    """The fewest cards that hold the weights."""
    fitting = [count for count in COUNTS if size <= SHARE * memory * count]
    return str(fitting[0]) if fitting else f"over {COUNTS[-1]}"


def cpu_rate(path: Path = RESULTS / "encoder_speed.json") -> float:
    """Weights/s of the default preset, WINT2, on two cores."""
    for row in json.loads(path.read_text())["rows"]:
        if (row["format"], row["preset"], row["threads"]) == ("wint2", "default", 2):
            return max(row["speeds"].values())
    raise SystemExit(f"error: {path} has no row of WINT2 at the default preset")


def trellis_rate(path: Path = RESULTS / "trellis_gpu_h200.json") -> float:
    """Weights/s of the default preset, CCQ-2T without data, in whole calls on an H200."""
    for row in json.loads(path.read_text())["rows"]:
        if (row["kind"], row["preset"]) == ("data-free", "default"):
            return row["call"]
    raise SystemExit(f"error: {path} has no row of CCQ-2T at the default preset")


def shown(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def size_rows(models: list[Model]) -> list[list[str]]:
    rate, rows = cpu_rate(), []
    for model in models:
        plan = model.plans["wint2"]
        size = plan.output_bytes
        rows.append(
            [
                model.name,
                f"{plan.weights / 1e9:.0f}",
                f"{model.experts / plan.weights:.1%}",
                f"{plan.source_bytes / 1e9:.0f}",
                *(f"{model.plans[format].output_bytes / 1e9:.0f}" for format in FORMATS),
                *(cards(size, memory) for memory in CARDS.values()),
                shown(model.experts / rate / 3600),
                shown(model.experts / GPU_RATE / 60),
                shown(model.experts / trellis_rate() / 60),
            ]
        )
    return rows


def paper_rows(model: Model) -> list[list[str]]:
    """DeepSeek-V3 beside the paper's sizes, and what of the difference is known, in GiB."""
    source = model.plans["wint2"].source_bytes
    rows = [["source, FP8", str(PAPER["source"]), f"{source / 2**30:.1f}", "", ""]]
    for format in FORMATS:
        plan = model.plans[format]
        kept = [planned for planned in plan.tensors if planned.rank_bytes == 2 * planned.weights]
        second = sum(planned.weights for planned in kept)
        values = plan.output_bytes, second, plan.output_bytes - second
        gib = [f"{value / 2**30:.1f}" for value in values]
        rows.append([NAMES[format], str(PAPER[format]), *gib])
    return rows


def main() -> None:
    models = [read(folder, name) for folder, name in MODELS.items()]
    rows = size_rows(models)
    header = ["model", "10^9 weights", "in experts", "source, GB", "WINT2, GB", "2.5 bits",
              "2.75 bits", *(f"cards of {card}" for card in CARDS), "hours on 2 cores",
              "minutes on an H100", "CCQ-2T, minutes on an H200"]  # fmt: skip
    text = (
        f"\n\nFrom `config.json` alone. Sources in the type that is published (DeepSeek-V3 and"
        f" Kimi-K2: FP8, the others: BF16). Layers for multi-token prediction are included. Cards:"
        f" the fewest of 1, 2, 4, 8, 16 whose memory WINT2's weights fill to at most {SHARE:.0%}."
        f" Times: WINT2 at the default preset, encoding alone, from the rates measured for"
        f" [two cores](encoder.md#cost) ({cpu_rate() / 1e6:.1f} million weights/s) and"
        f" [one H100](operators.md#gpu-encoder) ({GPU_RATE / 1e6:.0f} million); CCQ-2T likewise on"
        f" [one H200](ccq-2t.md#on-a-gpu) ({trellis_rate() / 1e6:.0f} million)."
        f" `python benchmarks/sizes.py`."
    )
    put_into_doc("docs/notes/families.md", "sizes", markdown(header, rows) + text)
    paper = paper_rows(models[0])
    columns = ["DeepSeek-V3", "paper", "here", "second byte of bfloat16 tensors", "here without it"]
    put_into_doc("docs/notes/families.md", "paper", markdown(columns, paper))
    save_result(
        "sizes", {"header": header, "rows": rows, "paper": {"header": columns, "rows": paper}}
    )


if __name__ == "__main__":
    main()
