# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's rules that depend on its version and on the number of cards.

The rules that hold for every version are in targets/fastdeploy/inspection.py.
"""

from __future__ import annotations

from pathlib import Path

from ..codec.row_order import FASTDEPLOY_2_1
from ..targets.fastdeploy.layout import (
    OWN_FORMATS,
    PLUGIN_RELEASES,
    VOCABULARY_MULTIPLE,
    needs_plugin,
    not_converted,
)
from ..targets.inspection import Inspection
from .releases import Release

# What FastDeploy's ERNIE processor looks for (input/ernie4_5_processor.py, text_processor.py).
_TOKENIZERS = ("tokenizer.model", "spm.model", "ernie_token_100k.model")


def contract_problems(
    inspection: Inspection, release: Release, ranks: int, plugin: bool | None = None
) -> list[str]:
    """Problems that keep this release from serving the checkpoint, or make it compute nonsense.

    Args:
        plugin: whether FastDeploy will load our plugin; None: not known.
    """
    problems = [
        *_rank_problems(inspection, ranks),
        *_format_problems(inspection, release),
        *_config_problems(inspection, release),
        *_tokenizer_problems(inspection),
    ]
    reason = plugin_reason(inspection, release)
    if reason and plugin is False and release.name in PLUGIN_RELEASES:
        problems.append(f"{reason}; --plugin of serving/launch.py loads it")
    return problems


def plugin_reason(inspection: Inspection, release: Release) -> str | None:
    """Why this release cannot serve the checkpoint without our plugin; None if it can."""
    if inspection.plan.format in OWN_FORMATS:
        return (
            f"format {inspection.plan.format}: FastDeploy refuses the name; our plugin"
            " (FD_PLUGINS=paddle_ccq, with the compiled ops) serves it"
        )
    if needs_plugin(inspection.plan):
        return (
            "wint4 layers by a list: FastDeploy must load our plugin (FD_PLUGINS=paddle_ccq);"
            " without it the load stops at missing tensors"
        )
    if inspection.plan.format == "wint2" and not release.own_wint2:
        return (
            f"FastDeploy {release.name} stops in its own WINT2 layers (a TypeError at the first"
            " request, since 5e54770b of 2026-04-15); with our plugin (FD_PLUGINS=paddle_ccq) they"
            " run, and only so"
        )
    return None


def _rank_problems(inspection: Inspection, ranks: int) -> list[str]:
    present = inspection.plan.tensor_parallel_size
    problems = []
    if present != ranks:
        found = f"{present} rank folders" if present > 1 else "no rank folders"
        problems.append(
            f"{found}, but --tensor-parallel-size {ranks}: FastDeploy does not cut a quantized"
            f" checkpoint; quantize again with --tensor-parallel-size {ranks}"
        )
    # FastDeploy counts every folder whose name begins like this.
    counted = [p for p in inspection.folder.iterdir() if p.name.startswith("rank") and p.is_dir()]
    strays = {p.name for p in counted} - {f"rank{i}" for i in range(present)}
    if strays and len(counted) > 1:
        problems.append(
            f"{', '.join(sorted(strays))}: FastDeploy would count this as a rank folder"
        )
    return problems


def _format_problems(inspection: Inspection, release: Release) -> list[str]:
    plan = inspection.plan
    problems = []
    if plan.format in OWN_FORMATS and release.name not in PLUGIN_RELEASES:
        problems.append(
            f"format {plan.format}: FastDeploy {release.name} has no such format, and our plugin"
            f" adds it to {', '.join(PLUGIN_RELEASES)} only; one of those, or quantize with"
            " --format wint2"
        )
    recorded = inspection.row_order
    if plan.format == "wint2" and recorded is not None and recorded != release.row_order:
        layout = "2.1" if release.row_order == FASTDEPLOY_2_1 else "2.0"
        problems.append(
            f"rows in {recorded} order, FastDeploy {release.name} reads {release.row_order}:"
            f" nonsense without any error; quantize with --fastdeploy-layout {layout}"
        )
    if needs_plugin(plan) and release.name not in PLUGIN_RELEASES:
        problems.append(
            f"wint4 layers by a list, which FastDeploy {release.name} can't load even with our"
            f" plugin; {', '.join(PLUGIN_RELEASES)} can, or quantize without"
            " --allow-plugin-layout"
        )
    kept = not_converted(plan)
    if kept and not release.keeps_dense:
        problems.append(
            f"{len(kept)} dense layers are bf16 (modules_to_not_convert), which FastDeploy"
            f" {release.name} does not know; 2.5 does"
        )
    return problems


def _config_problems(inspection: Inspection, release: Release) -> list[str]:
    config, raw = inspection.config, inspection.config.raw
    problems = []
    moe = config.moe_layers()
    if moe and moe != list(range(config.moe_layer_start_index, config.num_hidden_layers)):
        problems.append(
            f"config.json: FastDeploy takes every layer from {config.moe_layer_start_index} on as"
            " a MoE layer; this model has others"
        )
    # Any value but true is a problem of the config already.
    if moe and raw.get("moe_use_aux_free") is None:
        problems.append(
            "config.json: moe_use_aux_free is absent: FastDeploy would leave out the router's"
            " correction bias"
        )
    if config.vocab_size % VOCABULARY_MULTIPLE:
        problems.append(
            f"config.json: vocab_size {config.vocab_size}: FastDeploy pads it to a multiple of 64"
            " and then refuses the stored embeddings"
        )
    dense = raw["quantization_config"].get("dense_quant_type", "wint8")
    if dense != "wint8" and not release.reads_dense_type:
        problems.append(
            f"config.json: dense_quant_type {dense}: FastDeploy {release.name} takes wint8 whatever"
            " it says"
        )
    return problems


def _tokenizer_problems(inspection: Inspection) -> list[str]:
    folder = Path(inspection.folder)
    if any((folder / name).is_file() for name in _TOKENIZERS):
        return []
    beside = ""
    if (folder / "tokenizer.json").is_file():
        beside = " (it does not read tokenizer.json)"
    return [
        f"no SentencePiece file: FastDeploy's ERNIE tokenizer wants {_TOKENIZERS[0]},"
        f" {_TOKENIZERS[1]} or {_TOKENIZERS[2]}{beside} and will not start; copy the one of the"
        " original model into the folder"
    ]


def contract_warnings(
    inspection: Inspection, release: Release, max_model_len: int, plugin: bool | None = None
) -> list[str]:
    """Notes for the user that do not keep the server from starting."""
    warnings = []
    config = inspection.config
    if inspection.plan.format == "wint2" and inspection.row_order is None:
        warnings.append(
            f"the row order is not recorded; FastDeploy {release.name} reads {release.row_order},"
            " and only a look at its answers tells whether that is so"
        )
    reason = plugin_reason(inspection, release)
    if reason and plugin is None:
        warnings.append(reason)
    if max_model_len > config.max_position_embeddings:
        warnings.append(
            f"--max-model-len {max_model_len}: the model was made for"
            f" {config.max_position_embeddings} positions"
        )
    if not release.commit:
        warnings.append(f"the server flags of FastDeploy {release.name} were not looked at")
    return warnings
