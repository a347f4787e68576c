# SPDX-License-Identifier: Apache-2.0
"""Tables and the figure of docs/notes/vllm.md from benchmarks/results/vllm_engine_h200.json."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS, ROOT, markdown, put_into_doc

DOC = "docs/notes/vllm.md"
RATE = 4.54e12  # bytes a second that a read reaches on this card
MATRICES = {
    "qkv": (8192, 10240),
    "o": (8192, 8192),
    "up_gate": (8192, 57344),
    "down": (28672, 8192),
}
LINEAR_ROWS = (1, 8, 16, 32, 64)
# What was wanted of one card: tokens a second by batch, first token after so many tokens.
WANTED = {"1": 120, "8": 380, "32": 1100, "64": 1800}
WANTED_FIRST = {"1024": 0.2, "4096": 0.65, "8192": 1.3}
RUNS = {
    "speed": ("WINT2, one H200", 1),
    "speed_prefix": ("wint4 prefix, one H200", 1),
    "speed_two": ("WINT2, two H200", 2),
    "speed_int4": ("4 bits (Humming), two H200", 2),
}
ONE_CARD = ("speed", "speed_prefix")
FIGURE = ROOT / "docs" / "notes" / "vllm.svg"


def quality(results: dict[str, Any]) -> str:
    rows = [
        [
            row["name"] + (", graphs" if row["graphs"] else ""),
            f"{row['reference']:.5f}",
            f"{row['nll']:.5f}",
            f"{row['nll'] - row['reference']:+.5f}",
            f"{row['mean_difference']:.4f}",
            f"{row['greedy_agreement']:.1%}",
        ]
        for row in results["quality"]
    ]
    header = ["checkpoint", "float32, CPU", "vLLM", "difference", "mean dlogp", "greedy"]
    return markdown(header, rows)


def linear(results: dict[str, Any]) -> str:
    found = results["linear"]["microseconds"]
    rows = []
    for name, (k, n) in MATRICES.items():
        row = [f"{name} [{k}, {n}]"]
        for count in LINEAR_ROWS:
            time = found[f"{name} {count} stored"]
            row.append(f"{time:.1f} ({k * n / time / 1e-6 / RATE:.0%})")
        rows.append(row)
    return markdown(["matrix", *(f"{c} rows" for c in LINEAR_ROWS)], rows)


def speed(results: dict[str, Any]) -> str:
    rows = []
    for key, (label, cards) in RUNS.items():
        run = results.get(key)
        if run is None:
            continue
        decode = [f"{run['decode'][b]:.0f}" if b in run["decode"] else "" for b in WANTED]
        first = [run["first_token"].get(tokens) for tokens in WANTED_FIRST]
        most = max(run["decode"].values()) / cards
        rows.append([label, *decode, f"{most:.0f}", *(f"{t:.2f}" if t else "" for t in first)])
    header = [
        "300B's shape",
        *(f"batch {b}" for b in WANTED),
        "a card, most",
        *(f"{int(t) // 1024}k first, s" for t in WANTED_FIRST),
    ]
    wanted = [str(value) for value in WANTED.values()]
    last = ["wanted of one", *wanted, "", *(f"{t:.2f}" for t in WANTED_FIRST.values())]
    return markdown(header, [*rows, last, *(_reached(results, key) for key in ONE_CARD)])


def _reached(results: dict[str, Any], key: str) -> list[str]:
    """A run's rates and speeds of first tokens as shares of what was wanted."""
    run = results[key]
    decode = [run["decode"][b] / rate for b, rate in WANTED.items()]
    first = [seconds / run["first_token"][n] for n, seconds in WANTED_FIRST.items()]
    shares = [f"{share:.0%}" for share in (*decode, *first)]
    name = RUNS[key][0].removesuffix(", one H200")
    return [f"of it, {name}", *shares[: len(decode)], "", *shares[len(decode) :]]


KINDS = {
    "experts' products": r"ccq::((few|gemm|wide|stream|some)\w*_kernel|prepare|arrange)|trellis",
    "8-bit products": r"ccq_w8::",
    "attention": r"flash|reshape_and_cache",
    "head": r"nvjet",
    "router": r"topkGating|dot_kernel|reduce_1Block|sgemm|f32f32_f32|splitKreduce|^ccq_router",
}
BETWEEN = r"^$|^(swiglu|combine|gather|route)"
# Of a prompt many rows meet dense weights, which are decoded for cuBLAS.
PROMPT_KINDS = {
    "experts' products": KINDS["experts' products"],
    "dense products": r"nvjet|cutlass.*gemm|ccq_w8::(few|many|product)",
    "decoding dense weights": r"ccq_w8::dequant",
    "attention": KINDS["attention"],
    "router": KINDS["router"],
    "dispatch, SwiGLU, combine": BETWEEN,
}


def _by_kind(profile: dict[str, Any], kinds: dict[str, str], between: bool) -> list[str]:
    """Milliseconds in all, of each kind of kernels, of all others, and without any."""
    sums = dict.fromkeys([*kinds, "all others"], 0.0)
    for microseconds, _, name in profile["kernels"]:
        if between or not re.search(BETWEEN, name):
            kind = next((k for k, p in kinds.items() if re.search(p, name)), "all others")
            sums[kind] += microseconds / 1e3
    summary = profile["summary"]
    idle = (summary["wall_us"] - summary["busy_us"]) / 1e3
    return [f"{summary['wall_us'] / 1e3:.1f}", *(f"{v:.2f}" for v in sums.values()), f"{idle:.2f}"]


def steps(results: dict[str, Any]) -> str:
    """What a decoding step consists of, in milliseconds, by kernel."""
    # Dispatch, SwiGLU and combine are left out: launched early, they mostly wait.
    profiles = results["speed"]["profile"]
    rows = [[batch, *_by_kind(profile, KINDS, False)] for batch, profile in profiles.items()]
    return markdown(["batch", "a step, ms", *KINDS, "all others", "idle"], rows)


def prompts(results: dict[str, Any]) -> str:
    """What the step of a whole prompt consists of, in milliseconds, by kernel."""
    profiles = results["speed"].get("profile_prompts", {})
    rows = [[tokens, *_by_kind(found, PROMPT_KINDS, True)] for tokens, found in profiles.items()]
    return markdown(["tokens", "the step, ms", *PROMPT_KINDS, "all others", "idle"], rows)


def ranks(results: dict[str, Any]) -> str:
    """Small models on one and on two GPUs."""
    rows = [
        [
            row["name"],
            row["ranks"],
            f"{row['reference']:.5f}",
            f"{row['nll']:.5f}",
            f"{row['mean_difference']:.4f}",
            f"{row['from_one']:.4f}",
        ]
        for row in results["ranks"]
    ]
    header = ["experts", "GPUs", "float32, CPU", "vLLM", "mean dlogp", "mean dlogp from one GPU"]
    return markdown(header, rows)


SHAPES = {"ernie-300b": "300B", "deepseek-v3": "DeepSeek-V3"}
CUTS = {"tp": "tensor", "ep": "experts", "pp": "pipeline"}
SCALE_BATCHES, SCALE_PROMPT = ("1", "8", "32", "128"), "4096"
# Rows that the other table's run measured: without a batch of 128 and collectives.
FROM_SPEED = {"ernie-300b wint2 tp1": "speed"}


def scale(results: dict[str, Any], speeds: dict[str, Any]) -> str:
    """Shapes by cards: speed, memory of the fullest card, collectives."""
    rows = []
    for name, stated in results.items():
        shape, bits, cut = name.split()
        run = stated
        if stated["state"] != "measured" and name in FROM_SPEED:
            run = stated | speeds[FROM_SPEED[name]] | {"state": "measured"}
        cards = int(cut[2:])
        label = f"{cards}, {CUTS[cut[:2]]}" if cards > 1 else "1"
        row = [SHAPES[shape], "2" if bits == "wint2" else "4", label]
        memory = run.get("memory")
        if memory:
            row.append(f"{max(m['weights'] for m in memory) / 1e9:.1f}")
            row.append(f"{max(m['most'] - m['cache'] for m in memory) / 1e9:.1f}")
        else:
            row += [f"({run['weights'] / 1e9:.1f})" if "weights" in run else "", ""]
        if run["state"] != "measured":
            rows.append([*row, run["state"], *[""] * (len(SCALE_BATCHES) + 1)])
            continue
        row += [f"{run['decode'][b]:.0f}" if b in run["decode"] else "" for b in SCALE_BATCHES]
        first = run["first_token"].get(SCALE_PROMPT)
        row.append(f"{first:.2f}" if first else "")
        rows.append([*row, _collectives(run)])
    header = ["shape", "bits", "cards", "weights, GB", "at most, GB"]
    header += [f"batch {b}" for b in SCALE_BATCHES] + ["4k first, s", "collectives"]
    return markdown(header, rows)


def _collectives(run: dict[str, Any]) -> str:
    """Shares of a step by batch; of a pipeline nothing, for its are waiting."""
    if run.get("pipeline_parallel_size", 1) > 1:
        return "half waiting"
    found = run.get("profile", {}).values()
    return ", ".join(f"{p['collectives']['share']:.0%}" for p in found if p.get("collectives"))


def experts4(results: dict[str, Any]) -> str:
    """4-bit experts of few tokens, and the router's product."""
    found = results["w4"]["microseconds, experts read"]
    router = results["router"]["microseconds, cuBLAS"]
    shapes = {"up_gate": (8192, 7168), "down": (3584, 8192)}
    rows = []
    for tokens in (1, 8, 16, 32, 64):
        row = [str(tokens)]
        for name, (k, n) in shapes.items():
            time, used = found[f"{name} {tokens}"]
            row.append(f"{time:.0f} ({used * k * n / 2 / time / 1e-6 / RATE:.0%})")
        rows.append([*row, *(f"{v:.1f}" for v in router[str(tokens)])])
    header = ["tokens", "up_gate, wint4", "down, wint4", "router", "router, cuBLAS"]
    return markdown(header, rows)


def prompts4(results: dict[str, Any]) -> str:
    """4-bit experts of many tokens: a layer of the 300B by this package and by vLLM."""
    found = results.get("w4_prompts", {})
    rows = [[tokens, *(f"{value:.1f}" for value in times)] for tokens, times in found.items()]
    return markdown(["tokens", "decoded, then cuBLAS, ms", "vLLM's own, ms"], rows)


def loading(results: dict[str, Any]) -> str:
    """Reading a checkpoint's files, and starting vLLM with it."""
    rows = []
    whole = {k: v for k, v in results.get("load", {}).items() if v.get("up_seconds")}
    for name, found in whole.items():
        peak = found.get("peak_host_bytes", {})
        seconds = (found.get(key) for key in ("up_seconds", "first_answer_seconds"))
        rows.append(
            [
                name,
                *(f"{value:.0f}" if value else "" for value in seconds),
                *(f"{peak.get(kind, 0) / 1e9:.1f}" for kind in ("RssAnon", "RssFile", "all")),
            ]
        )
    header = ["start", "engine up, s", "first answer, s"]
    return markdown([*header, "own memory, GB", "mapped files, GB", "both at once, GB"], rows)


def rounding() -> str:
    """Where bfloat16 moves the 3M model's loss (vllm_rounding.py)."""
    found = json.loads((RESULTS / "vllm_rounding_3m.json").read_text(encoding="utf-8"))["places"]
    rows = [
        [name, f"{entry['nll']:+.5f}", f"{entry['error']:.5f}", f"{entry['each']:.4f}"]
        for name, entry in found.items()
        if "random" not in name
    ]
    random = [entry["nll"] for name, entry in found.items() if "random" in name]
    rows.append(
        [
            f"all places, up or down at random, {len(random)} runs",
            f"{min(random):+.5f} to {max(random):+.5f}",
            "",
            f"{max(e['each'] for n, e in found.items() if 'random' in n):.4f}",
        ]
    )
    return markdown(["rounded to bfloat16", "loss", "standard error", "mean dlogp"], rows)


def figure(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "paddle-ccq"
    from matplotlib import pyplot

    drawn = ("speed", "speed_two", "speed_int4")
    shown = {k: v for k, v in RUNS.items() if k in results and k in drawn}
    drawing, axes = pyplot.subplots(figsize=(7.2, 2.9))
    width = 0.8 / len(shown)
    for i, (key, (label, _)) in enumerate(shown.items()):
        heights = [results[key]["decode"][batch] for batch in WANTED]
        places = [j + (i - (len(shown) - 1) / 2) * width for j in range(len(WANTED))]
        bars = axes.bar(places, heights, width * 0.92, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(
        range(len(WANTED)), ["1 sequence", *(f"{batch} sequences" for batch in list(WANTED)[1:])]
    )
    axes.set_ylabel("tokens a second")
    axes.set_title("ERNIE-4.5-300B's shape in vLLM, decoding", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    drawing.tight_layout()
    drawing.savefig(FIGURE, metadata={"Date": None})
    print(f"wrote {FIGURE}")


def main() -> int:
    results = json.loads((RESULTS / "vllm_engine_h200.json").read_text(encoding="utf-8"))
    for marker, table in (
        ("quality", quality),
        ("linear", linear),
        ("speed", speed),
        ("steps", steps),
        ("prompts", prompts),
        ("loading", loading),
        ("ranks", ranks),
        ("experts4", experts4),
        ("prompts4", prompts4),
    ):
        put_into_doc(DOC, f"vllm-{marker}", table(results))
    scaled = json.loads((RESULTS / "vllm_scale_h200.json").read_text(encoding="utf-8"))
    put_into_doc(DOC, "vllm-scale", scale(scaled, results))
    put_into_doc(DOC, "vllm-rounding", rounding())
    figure(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
