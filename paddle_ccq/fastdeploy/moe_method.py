# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's WINT2 method for a MoE layer, with our fused operator in its kernel's place.

FastDeploy loads the weights itself, in its own layout. They are then put back into the
checkpoint's order, repacked for our kernel, and FastDeploy's copy is given up, one layer at a time.
Where our kernel cannot run, nothing of this happens and FastDeploy's own goes on.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CcqError
from ..families.tensor import PROJECTIONS
from .fused_ops import FusedOps, Repacked, load_ops, shape_refusal

logger = logging.getLogger("paddle_ccq")

# FastDeploy's names of a projection's parameters, in the order that ccq_repack takes them.
PARAMETERS = ("weight", "weight_scale", "super_scales", "code_scale", "code_zp")
_WEIGHTS = "ccq_weights"
# The arguments that FusedMoE passes to a method's apply() after (layer, x, gate), in order. Each
# release line added some, and not every method takes all of them.
EXTRA_ARGUMENTS = ("topk_ids_hookfunc", "shared_experts", "fc1_latent_proj", "fc2_latent_proj")
LATENT = EXTRA_ARGUMENTS[2:]


@dataclass(frozen=True)
class LayerWeights:
    """The experts of one layer, repacked on the card, with the operator that multiplies by them."""

    ops: FusedOps
    up_gate: Repacked
    down: Repacked

    def __call__(self, rows: Any, ends: Any) -> Any:
        """Rows sorted by expert, and their running counts (int64) -> outputs of the same type."""
        return self.ops.moe_ffn(rows, ends, self.up_gate, self.down)


class _Once:
    """Logs each message only once in a process, however many layers it applies to."""

    def __init__(self) -> None:
        self.reported: set[str] = set()

    def say(self, level: int, text: str) -> None:
        if text not in self.reported:
            self.reported.add(text)
            logger.log(level, text)


once = _Once()


def checkpoint_order(weight: Any) -> Any:
    """FastDeploy's [E, N/8, K/64, 8, 16] seen as [E, K/4, N] -> the checkpoint's [E, K/4, N]."""
    experts, rows, columns = weight.shape
    tiles = weight.reshape([experts, columns // 8, rows // 16, 8, 16])
    return tiles.transpose([0, 2, 4, 1, 3]).reshape([experts, rows, columns])


def general_refusal(layer: Any) -> str | None:
    """What our operators do not know about this layer, whatever its sizes; None if nothing."""
    if getattr(layer, "activation", "swiglu") != "swiglu":
        return f"activation {layer.activation}"
    if getattr(layer, "with_bias", False):
        return "experts with bias"
    if getattr(layer, "up_gate_proj_in_scale", None) is not None:
        return "quantized activations"
    if getattr(layer, "ep_size", 1) > 1:
        return "expert parallelism"
    if getattr(layer, "routed_scaling_factor_learnable", False):
        return "a learned scale for each expert"
    model = getattr(getattr(layer, "fd_config", None), "model_config", None)
    # FusedMoE is told its own hidden size where latent projections stand around the experts.
    if getattr(model, "hidden_size", layer.hidden_size) != layer.hidden_size:
        return "latent projections around the experts"
    return None


def refusal(layer: Any) -> str | None:
    """Why our kernel cannot run this WINT2 layer; None if it can."""
    return general_refusal(layer) or shape_refusal(layer.hidden_size, layer.moe_intermediate_size)


def missing_rank_folders(layer: Any) -> str | None:
    """The problem of several cards with a checkpoint that was not cut for them, or None."""
    config = getattr(layer, "fd_config", None)
    ranks = getattr(getattr(config, "parallel_config", None), "tensor_parallel_size", 1)
    folder = getattr(getattr(config, "model_config", None), "model", None)
    if ranks < 2 or not isinstance(folder, str) or not os.path.isdir(folder):
        return None
    missing = [i for i in range(ranks) if not os.path.isdir(os.path.join(folder, f"rank{i}"))]
    if not missing:
        return None
    return (
        f"{folder}: no folder rank{missing[0]}; FastDeploy cannot cut a WINT2 checkpoint for"
        f" {ranks} cards, quantize it with --tensor-parallel-size {ranks}"
    )


def named_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that FusedMoE passed to apply() after the gate, by name."""
    return {**dict(zip(EXTRA_ARGUMENTS, args, strict=False)), **kwargs}


def call_taking(
    method: Callable[..., Any], first: tuple[Any, ...], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Call FastDeploy's own apply() with what its signature takes.

    Only arguments that ask for nothing (None) are left out. One that asks for something and is
    not taken is handed over all the same, and FastDeploy's TypeError names it.
    """
    signature = inspect.signature(method)
    try:
        signature.bind(*first, *args, **kwargs)
    except TypeError:
        if len(args) <= len(EXTRA_ARGUMENTS):
            named = named_arguments(args, kwargs)
            taken = {k: v for k, v in named.items() if v is not None or k in signature.parameters}
            return method(*first, **taken)
    return method(*first, *args, **kwargs)


def repacked(layer: Any, ops: FusedOps) -> LayerWeights:
    """The layer's parameters in our layout."""
    parts = []
    for projection in PROJECTIONS:
        weight, *others = (getattr(layer, f"{projection}_{name}") for name in PARAMETERS)
        parts.append(ops.repack(checkpoint_order(weight), *others))
    return LayerWeights(ops, *parts)


def take_over(layer: Any) -> LayerWeights | None:
    """Repack a loaded layer's parameters and give up FastDeploy's; None where it goes on itself."""
    try:
        reason = refusal(layer)
        weights = None if reason else repacked(layer, load_ops())
    except (CcqError, RuntimeError, ValueError, OSError) as error:
        # What Paddle raises for a refused argument; FastDeploy's weights are untouched.
        reason, weights = " ".join(str(error).split()), None
    if weights is None:
        text = f"paddle_ccq: FastDeploy's own WINT2 kernel is used: {reason}"
        once.say(logging.WARNING, text)
        return None
    for projection in PROJECTIONS:
        for name in PARAMETERS:
            delattr(layer, f"{projection}_{name}")
    # Also a warning: FastDeploy's workers have no handler that shows an INFO message.
    once.say(logging.WARNING, "paddle_ccq: WINT2 layers run on ccq_moe_ffn")
    return weights


def refuse_latent(layer: Any, named: Mapping[str, Any]) -> None:
    """Raise a CcqError if apply() was given projections around the experts."""
    if any(named.get(name) is not None for name in LATENT):
        raise CcqError(
            f"MoE layer {getattr(layer, 'layer_idx', '?')}: latent projections, which this"
            " plugin does not run; start FastDeploy without paddle_ccq in FD_PLUGINS"
        )


def routed(
    layer: Any,
    x: Any,
    gate: Any,
    named: Mapping[str, Any],
    kind: str,
    dispatch: Callable[..., Any],
    reduce: Callable[..., Any],
    experts: Callable[[Any, Any], Any],
) -> Any:
    """FastDeploy's dispatch and reduction around `experts` (rows, running counts) -> rows.

    Args:
        named: as of named_arguments().
        kind: the moe_quant_type that dispatch is told.
    """
    scores, bias = gate(x.cast("float32")), layer.gate_correction_bias
    found = dispatch(x, scores, bias, None, layer.top_k, False, kind, topk_only_mode=False)
    # The first five results are the same in every release; how many follow is not.
    rows, ends, places, topk_weights, topk_ids = found[:5]
    chosen = named.get("topk_ids_hookfunc")
    if chosen is not None:
        chosen(topk_ids=topk_ids)
    scaling = {"norm_topk_prob": True, "routed_scaling_factor": 1.0}
    return reduce(experts(rows, ends), topk_weights, places, topk_ids, None, **scaling)


def make_method(base: type, dispatch: Callable[..., Any], reduce: Callable[..., Any]) -> type:
    """A subclass of FastDeploy's CutlassWint2FusedMoeMethod.

    Args:
        base: that class.
        dispatch: moe_expert_dispatch: choice of experts and rows sorted by expert.
        reduce: moe_expert_reduce: weighted sum of a token's rows.
    """

    class CcqWint2MoeMethod(base):  # type: ignore[misc, valid-type]
        ccq_base = base

        def create_weights(self, layer: Any, **attributes: Any) -> None:
            problem = missing_rank_folders(layer)
            if problem:
                raise CcqError(problem)
            self._ccq_attributes = attributes
            super().create_weights(layer, **attributes)

        def process_prequanted_weights(
            self, layer: Any, state_dict: Any, is_rearrange: bool = False
        ) -> None:
            if getattr(layer, _WEIGHTS, None) is not None:  # loaded a second time
                setattr(layer, _WEIGHTS, None)
                super().create_weights(layer, **self._ccq_attributes)
            super().process_prequanted_weights(layer, state_dict, is_rearrange)
            weights = take_over(layer)
            if weights is not None:
                setattr(layer, _WEIGHTS, weights)

        def apply(self, layer: Any, x: Any, gate: Any, *args: Any, **kwargs: Any) -> Any:
            weights = getattr(layer, _WEIGHTS, None)
            if weights is None:
                return call_taking(super().apply, (layer, x, gate), args, kwargs)
            named = named_arguments(args, kwargs)
            refuse_latent(layer, named)
            kind = self.moe_quant_type
            return routed(layer, x, gate, named, kind, dispatch, reduce, weights)

    return CcqWint2MoeMethod
