# SPDX-License-Identifier: Apache-2.0
"""README.md of the output: what it is, how large, how far from the original, how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...checkpoint.plan import Plan
from ...checkpoint.source_card import DEFAULT_PIPELINE, front_matter
from ...codec.row_order import FASTDEPLOY_2_1
from ...families.tensor import OUT, PROJECTIONS, QKV, Role
from ...units import gigabytes
from ...version import __version__
from .layout import needs_plugin, not_converted

# Rows of the table of errors: what is counted together.
_KINDS = {
    "experts": (frozenset({Role.EXPERT}), PROJECTIONS),
    "attention": (frozenset({Role.ATTENTION}), (QKV, OUT)),
    "dense and shared MLP": (frozenset({Role.MLP, Role.SHARED_EXPERT}), PROJECTIONS),
}


@dataclass(frozen=True)
class Recipe:
    """The choices of a run that the plan does not hold."""

    source_model: str
    preset: str
    encoder: str
    # Text, hash, tokens and settings of the calibration (paddle_ccq.calibration); None: data-free.
    calibration: dict[str, Any] | None = None
    # Target, method and predicted loss (paddle_ccq.allocation); None: a prefix, or rules alone.
    allocation: dict[str, Any] | None = None
    # Hub id of the source; None: it is known by a folder's name only.
    base_model: str | None = None
    # What source_card.read_source_card found.
    source_card: dict[str, Any] = field(default_factory=dict)


def model_card(plan: Plan, recipe: Recipe, records: Sequence[dict[str, Any]]) -> str:
    """The text of the card; depends on plan, recipe and errors alone, never on time or place."""
    stats = [record["stats"] for record in records]
    sections = [
        _front_matter(recipe),
        _summary(plan, recipe),
        _errors(plan, stats),
        _use(plan),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(recipe: Recipe) -> str:
    """Metadata that hubs show and search by; what the source's card says goes on where it holds."""
    # The library is the one that loads the output, whatever loads the source.
    metadata: dict[str, Any] = {"library_name": "PaddlePaddle"}
    carried = dict(recipe.source_card)
    pipeline = carried.pop("pipeline_tag", DEFAULT_PIPELINE)
    metadata |= {"pipeline_tag": pipeline, "tags": ["ernie4.5", "ccq", "quantization"]}
    metadata |= {key: value for key, value in carried.items() if key != "base_model"}
    if recipe.base_model:
        metadata |= {"base_model": recipe.base_model, "base_model_relation": "quantized"}
    elif "base_model" in carried:
        metadata["base_model"] = carried["base_model"]
    return front_matter(metadata)


def _summary(plan: Plan, recipe: Recipe) -> str:
    experts = [item for item in plan.items if item.tensor.is_expert]
    kind = "wint8 only (no MoE layer)" if not experts else plan.format
    rows = [
        ("base model", recipe.source_model),
        ("format", kind),
        ("size", f"{gigabytes(plan.output_bytes)} (1 GB = 1e9 bytes)"),
        ("bits per weight, whole model", f"{plan.bits_per_weight():.3f}"),
    ]
    if experts:
        layers = {item.layer for item in experts if item.format == plan.format}
        four = sorted({item.layer for item in experts if item.format == "wint4"} - {None})
        rows += [
            ("bits per weight, routed experts", f"{plan.bits_per_weight(Role.EXPERT):.3f}"),
            (f"MoE layers in {plan.format}", str(len(layers))),
            ("MoE layers in wint4", ", ".join(map(str, four)) or "none"),
            *_allocation(recipe.allocation),
            ("row order inside 64-groups", plan.row_order),
            ("encoder", _encoder(recipe)),
        ]
    rows.append(("dense linear layers", _dense(plan)))
    rows.append(("tensor parallelism", _ranks(plan)))
    rows.append(("written by", f"paddle-ccq {__version__}"))
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    title = f"# {recipe.source_model.rsplit('/', 1)[-1]}, {kind}"
    kept = "Router, correction bias, norms, embeddings and output head are not quantized. " + _data(
        recipe.calibration
    )
    return "\n\n".join([title, "\n".join(table), kept])


def _allocation(allocation: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not allocation:
        return []
    return [("formats of MoE layers", f"allocated for {allocation['target']} by measured costs")]


def _data(calibration: dict[str, Any] | None) -> str:
    if not calibration:
        return "No data was used: every matrix was encoded from its weights alone."
    return (
        "The 2-bit experts were encoded for the least error of their outputs on"
        f" {calibration['tokens_used']:,} tokens of {calibration['text']}"
        f" (sha256 {calibration['text_sha256']}); all other matrices from their weights alone."
        " A rel-MSE of weights says little about them."
    )


def _encoder(recipe: Recipe) -> str:
    if recipe.calibration:
        return f"calibrated search, preset {recipe.preset}"
    if recipe.encoder == "search":
        return f"search, preset {recipe.preset}"
    return f"{recipe.encoder} (the algorithm of arXiv 2507.07145)"


def _dense(plan: Plan) -> str:
    kept = len(not_converted(plan))
    total = sum(item.tensor.is_dense for item in plan.items)
    if not kept:
        return "wint8 per channel"
    return f"{total - kept} in wint8 per channel, {kept} in bf16 (needs FastDeploy 2.5 or later)"


def _ranks(plan: Plan) -> str:
    if plan.tensor_parallel_size == 1:
        return "1 (one folder)"
    return f"{plan.tensor_parallel_size} (folders rank0 to rank{plan.tensor_parallel_size - 1})"


def _errors(plan: Plan, stats: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## Error of the weights",
        "",
        "rel-MSE is the squared error over the squared weights of a matrix; the mean is over"
        " matrices.",
        "",
        "| matrices | format | count | mean rel-MSE | worst rel-MSE | mean cosine |",
        "|---|---|---|---|---|---|",
    ]
    kinds = [(kind, roles, p) for kind, (roles, ps) in _KINDS.items() for p in ps]
    for kind, roles, projection in kinds:
        groups: dict[str, list[dict[str, Any]]] = {}
        for item, found in zip(plan.items, stats, strict=True):
            tensor = item.tensor
            chosen = tensor.role in roles and tensor.projection == projection
            if chosen and found.get("rel_mse") is not None:
                groups.setdefault(item.format, []).append(found)
        for format, found_stats in groups.items():
            errors = [s["rel_mse"] for s in found_stats]
            cosines = [s["cosine"] for s in found_stats]
            lines.append(
                f"| {kind}, {projection} | {format} | {len(errors)}"
                f" | {sum(errors) / len(errors):.6f} | {max(errors):.6f}"
                f" | {sum(cosines) / len(cosines):.6f} |"
            )
    zeroed = sum(s.get("nonfinite_set_to_zero", 0) for s in stats)
    if zeroed:
        lines += [
            "",
            f"{zeroed} weights of the source were NaN, infinite or beyond bfloat16's range"
            " and were set to 0.",
        ]
    return "\n".join(lines)


_VLLM = (
    "## Serve with vLLM",
    "",
    "```",
    "pip install vllm paddle-ccq    # and the GPU library: python -m paddle_ccq.ops.gpu_library",
    "vllm serve .",
    "```",
    "",
    "vLLM finds paddle-ccq's plugin by itself; several cards are cut at load"
    " (`--tensor-parallel-size N`).",
)


def _use(plan: Plan) -> str:
    check = ["## Check", "", "```", "python -m paddle_ccq.verify .", "```"]
    if plan.format not in ("wint2", "wint8"):
        text = (
            f"FastDeploy has no model path for {plan.format} and refuses this checkpoint; vLLM and"
            " `paddle_ccq` (serve, evaluate, dequantize, operators) read it."
        )
        return "\n".join([*check, "", "## Use", "", text, "", *_VLLM])
    serve = [
        "## Serve with FastDeploy",
        "",
        "```",
        "python -m fastdeploy.entrypoints.openai.api_server \\",
        "    --model . \\",
        "    --port 8180 --metrics-port 8181 \\",
        "    --engine-worker-queue-port 8182 --cache-queue-port 8183 \\",
        f"    --tensor-parallel-size {plan.tensor_parallel_size} \\",
        "    --max-model-len 32768 --max-num-seqs 128 \\",
        # Without it a dense checkpoint fails to load; for wint2 FastDeploy takes it by itself.
        "    --load-choices default",
        "```",
        "",
        "No `--quantization` is needed: config.json says it.",
    ]
    if plan.format == "wint2":
        version = "2.1 and later" if plan.row_order == FASTDEPLOY_2_1 else "2.0.x only"
        serve.append(
            f"The rows of the 2-bit matrices are in the order that FastDeploy {version} expects;"
            " another version loads the files without complaint and computes nonsense."
        )
        serve.append("Expert parallelism does not work with this format.")
        serve.append(
            "Builds of FastDeploy's develop branch since 2026-04-15 run it only with paddle-ccq's"
            " plugin (`FD_PLUGINS=paddle_ccq`)."
        )
    if needs_plugin(plan):
        serve.append(
            "The wint4 layers are not the first ones: FastDeploy needs paddle-ccq's plugin"
            " (`FD_PLUGINS=paddle_ccq`) and stops at missing tensors without it."
        )
    return "\n".join([*check, "", *serve, "", *_VLLM])
