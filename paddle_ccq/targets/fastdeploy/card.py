# SPDX-License-Identifier: Apache-2.0
"""README.md of the output: what it is, how large, how far from the original, how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...checkpoint.plan import Plan
from ...codec.row_order import FASTDEPLOY_2_1
from .. import card
from ..recipe import Recipe
from .layout import OWN_FORMATS, PLUGIN_RELEASES, needs_plugin, not_converted

UNQUANTIZED = "Router, correction bias, norms, embeddings and output head are not quantized."


def model_card(plan: Plan, recipe: Recipe, records: Sequence[dict[str, Any]]) -> str:
    """The text of the card; depends on plan, recipe and errors alone, never on time or place."""
    own = [("dense linear layers", _dense(plan)), ("tensor parallelism", _ranks(plan))]
    sections = [
        card.metadata(recipe, "PaddlePaddle", ["ernie4.5", "ccq", "quantization"]),
        card.summary(plan, recipe, own, UNQUANTIZED),
        card.errors(plan, records),
        _use(plan),
    ]
    return "\n\n".join(sections) + "\n"


def _dense(plan: Plan) -> str:
    unquantized = len(not_converted(plan))
    total = sum(planned.tensor.is_dense for planned in plan.tensors)
    if not unquantized:
        return "wint8 per channel"
    wint8 = total - unquantized
    return f"{wint8} in wint8 per channel, {unquantized} in bf16 (needs FastDeploy 2.5 or later)"


def _ranks(plan: Plan) -> str:
    if plan.tensor_parallel_size == 1:
        return "1 (one folder)"
    return f"{plan.tensor_parallel_size} (folders rank0 to rank{plan.tensor_parallel_size - 1})"


def _use(plan: Plan) -> str:
    check = ["## Check", "", "```", "python -m paddle_ccq.verify .", "```"]
    own = plan.format in OWN_FORMATS
    # FastDeploy reserves the cache in blocks of 64 tokens, which must divide the length.
    length = max(min(plan.config.max_position_embeddings, 32768) // 64 * 64, 64)
    start = "FD_PLUGINS=paddle_ccq " if own or needs_plugin(plan) else ""
    serve = [
        "## Serve with FastDeploy",
        "",
        "```",
        f"{start}python -m fastdeploy.entrypoints.openai.api_server \\",
        "    --model . \\",
        "    --port 8180 --metrics-port 8181 \\",
        "    --engine-worker-queue-port 8182 --cache-queue-port 8183 \\",
        f"    --tensor-parallel-size {plan.tensor_parallel_size} \\",
        f"    --max-model-len {length} --max-num-seqs 128 \\",
        # Without it a dense checkpoint fails to load; for wint2 FastDeploy takes it by itself.
        "    --load-choices default",
        "```",
        "",
        "No `--quantization` is needed: config.json says it.",
    ]
    if own:
        serve.append(
            f"FastDeploy itself refuses {plan.format}; paddle-ccq's plugin serves it in FastDeploy"
            f" {', '.join(PLUGIN_RELEASES)} (`pip install paddle-ccq`, then its compiled ops:"
            " `pip install --no-build-isolation ./custom_ops`). Expert parallelism does not work"
            " with it."
        )
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
    return "\n".join([*check, "", *serve, "", *card.vllm(plan.config, plan.tensor_parallel_size)])
