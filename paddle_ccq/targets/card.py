# SPDX-License-Identifier: Apache-2.0
"""What model cards of all targets have: metadata, the table of choices, errors of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoint.plan import Plan
from ..checkpoint.source_card import DEFAULT_PIPELINE, front_matter
from ..families.config import ModelConfig
from ..families.tensor import OUT, PROJECTIONS, QKV, Role
from ..units import gigabytes
from ..version import __version__
from .recipe import Recipe
from .vllm_sizes import unfit_for_vllm

_VLLM = (
    "## Serve with vLLM",
    "",
    "```",
    "pip install vllm paddle-ccq    # and the GPU library: python -m paddle_ccq.ops.gpu_library",
)
# Rows of the table of errors: what is counted together.
_KINDS = {
    "experts": (frozenset({Role.EXPERT}), PROJECTIONS),
    "attention": (frozenset({Role.ATTENTION}), (QKV, OUT)),
    "dense and shared MLP": (frozenset({Role.MLP, Role.SHARED_EXPERT}), PROJECTIONS),
}


def vllm(config: ModelConfig, ranks: int = 1) -> list[str]:
    """How vLLM is started; with `ranks` folders, on as many cards."""
    unfit = unfit_for_vllm(config, ranks)
    if unfit:
        return [_VLLM[0], "", f"vLLM can't serve it: {'; '.join(unfit)}."]
    if ranks > 1:
        flag, cards = (
            f" --tensor-parallel-size {ranks}",
            f"rank folders need {ranks} cards there too",
        )
    else:
        flag, cards = "", "several cards are cut at load (`--tensor-parallel-size N`)"
    use = f"vLLM finds paddle-ccq's plugin by itself; {cards}."
    return [*_VLLM, f"vllm serve .{flag}", "```", "", use]


def metadata(recipe: Recipe, library: str, tags: Sequence[str]) -> str:
    """Metadata that hubs show and search by; what the source's card says goes on where it holds.

    Args:
        library: the one that loads the output, whatever loads the source.
    """
    metadata: dict[str, Any] = {"library_name": library}
    carried = dict(recipe.source_card)
    pipeline = carried.pop("pipeline_tag", DEFAULT_PIPELINE)
    metadata |= {"pipeline_tag": pipeline, "tags": list(tags)}
    metadata |= {key: value for key, value in carried.items() if key != "base_model"}
    if recipe.base_model:
        metadata |= {"base_model": recipe.base_model, "base_model_relation": "quantized"}
    elif "base_model" in carried:
        metadata["base_model"] = carried["base_model"]
    return front_matter(metadata)


def summary(plan: Plan, recipe: Recipe, own: Sequence[tuple[str, str]], unquantized: str) -> str:
    """The title and the table of choices; `own` are the target's rows."""
    experts = [planned for planned in plan.tensors if planned.tensor.is_expert]
    kind = "wint8 only (no MoE layer)" if not experts else plan.format
    rows = [
        ("base model", recipe.source_model),
        ("format", kind),
        ("size", f"{gigabytes(plan.output_bytes)} (1 GB = 1e9 bytes)"),
        ("bits per weight, whole model", f"{plan.bits_per_weight():.3f}"),
    ]
    if experts:
        layers = {planned.layer for planned in experts if planned.format == plan.format}
        four = sorted({planned.layer for planned in experts if planned.format == "wint4"} - {None})
        rows += [
            ("bits per weight, routed experts", f"{plan.bits_per_weight(Role.EXPERT):.3f}"),
            (f"MoE layers in {plan.format}", str(len(layers))),
            ("MoE layers in wint4", ", ".join(map(str, four)) or "none"),
            *_allocation(recipe.allocation),
            ("row order inside 64-groups", plan.row_order),
            ("encoder", _encoder(recipe)),
        ]
    rows += [*own, ("written by", f"paddle-ccq {__version__}")]
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    title = f"# {recipe.source_model.rsplit('/', 1)[-1]}, {kind}"
    return "\n\n".join([title, "\n".join(table), f"{unquantized} {_data(recipe.calibration)}"])


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


def errors(plan: Plan, records: Sequence[dict[str, Any]]) -> str:
    """The table of errors by kind of matrix and format."""
    stats = [record["stats"] for record in records]
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
        for planned, found in zip(plan.tensors, stats, strict=True):
            tensor = planned.tensor
            chosen = tensor.role in roles and tensor.projection == projection
            if chosen and found.get("rel_mse") is not None:
                groups.setdefault(planned.format, []).append(found)
        for format, found_stats in groups.items():
            sizes = [s["rel_mse"] for s in found_stats]
            cosines = [s["cosine"] for s in found_stats]
            lines.append(
                f"| {kind}, {projection} | {format} | {len(sizes)}"
                f" | {sum(sizes) / len(sizes):.6f} | {max(sizes):.6f}"
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
