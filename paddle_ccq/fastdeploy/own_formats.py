# SPDX-License-Identifier: Apache-2.0
"""FastDeploy's MoE method for the formats that only this package has: CCQ-2T, 2.5 and 2.75 bits.

FastDeploy itself refuses their names, so there is no kernel of its own to go on with. A layer that
our operators do not know is refused while the model is built. Where the compiled ops are missing or
refuse a layer, its experts run on the processor, and a line of the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..codec import formats
from ..codec.floats import BFLOAT16
from ..errors import CcqError
from ..families.tensor import PROJECTIONS
from .fused_ops import FusedOps, Repacked, Stored, load_ops
from .moe_method import (
    general_refusal,
    missing_rank_folders,
    named_arguments,
    once,
    refuse_latent,
    routed,
)

_EXPERTS = "ccq_experts"
# Suffix -> how FastDeploy's weight_key_map calls it.
_KEYS = {"quant_weight": "weight", "weight_scale": "weight_scale", "super_scales": "super_scales"}
_DTYPES = {"U8": "uint8", "I16": "int16", "BF16": "bfloat16"}
_NO_GRAPHS = """--graph-optimization-config '{"use_cudagraph": false}'"""

# One projection's tensors of every expert, by suffix, each a Paddle tensor.
ExpertTensors = list[dict[str, Any]]
# Rows sorted by expert and their running counts (int64) -> rows of the same type.
Experts = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class GpuExperts:
    """The experts of a layer on the compiled ops."""

    ops: FusedOps
    up_gate: Repacked | Stored
    down: Repacked | Stored

    def __call__(self, rows: Any, ends: Any) -> Any:
        """Rows sorted by expert, and their running counts (int64) -> outputs of the same type."""
        return self.ops.moe_ffn(rows, ends, self.up_gate, self.down)


@dataclass(frozen=True)
class HostExperts:
    """The experts of a layer on the processor, through host memory."""

    experts: Any  # ops.PackedExperts

    def __call__(self, rows: Any, ends: Any) -> Any:
        """As GpuExperts; computed in float32, and brought back to the rows' device."""
        import paddle

        from .. import ops

        y = ops.moe_ffn(rows.cast("float32").numpy(), self.experts, ends.numpy())
        return paddle.to_tensor(y, place=rows.place).cast(rows.dtype)


def read_experts(
    layer: Any, state: Any, format: str, to_device: Callable[[Any], Any]
) -> dict[str, ExpertTensors]:
    """The checkpoint's tensors of a layer's experts, by projection.

    Args:
        state: tensor names and what FastDeploy read, as a mapping or as pairs.
        to_device: as for make_own_method().

    Raises:
        CcqError: for a tensor that is missing or not as the format has it.
    """
    state = dict(state) if isinstance(state, list) else state
    hidden, width = layer.hidden_size, layer.moe_intermediate_size
    shapes = {"up_gate_proj": (hidden, 2 * width), "down_proj": (width, hidden)}
    found: dict[str, ExpertTensors] = {projection: [] for projection in PROJECTIONS}
    for projection in PROJECTIONS:
        specs = formats.tensor_specs(format, *shapes[projection])
        for expert in range(layer.num_experts):
            tensors = {}
            for suffix, (shape, dtype) in specs.items():
                key = layer.weight_key_map[f"{projection}_expert_{_KEYS[suffix]}_key"]
                name = key.format(layer.expert_id_offset + expert)
                if name not in state:
                    raise CcqError(f"{name}: missing; a {format} matrix has {', '.join(specs)}")
                value = to_device(state[name])
                kind = str(value.dtype).removeprefix("paddle.")
                if (kind, tuple(value.shape)) != (_DTYPES[dtype], shape):
                    raise CcqError(
                        f"{name}: {kind} {list(value.shape)}, should be {_DTYPES[dtype]}"
                        f" {list(shape)}"
                    )
                tensors[suffix] = value
            found[projection].append(tensors)
    return found


def on_gpu(ops: FusedOps, format: str, experts: Mapping[str, ExpertTensors]) -> GpuExperts:
    """The experts as the compiled ops read them."""
    import paddle

    prepared = []
    for projection in PROJECTIONS:
        parts = experts[projection]
        stacked = {suffix: paddle.stack([part[suffix] for part in parts]) for suffix in parts[0]}
        prepared.append(ops.prepare(format, stacked))
    return GpuExperts(ops, *prepared)


def on_host(format: str, experts: Mapping[str, ExpertTensors]) -> HostExperts:
    """The experts as the CPU's operators read them."""
    from .. import ops

    both = ([{s: _numpy(t) for s, t in part.items()} for part in experts[p]] for p in PROJECTIONS)
    return HostExperts(ops.repack_experts(format, *both))


def _numpy(value: Any) -> np.ndarray:
    array: np.ndarray = value.numpy()
    # Paddle shows bfloat16 as uint16.
    return array.view(BFLOAT16) if str(value.dtype) == "paddle.bfloat16" else array


def prepare_experts(layer: Any, format: str, experts: Mapping[str, ExpertTensors]) -> Experts:
    """The experts where they will run; a line of the log says where.

    Raises:
        CcqError: if that is the processor and FastDeploy captures CUDA graphs.
    """
    try:
        made = on_gpu(load_ops(), format, experts)
    except (CcqError, RuntimeError, ValueError, OSError) as error:
        # What Paddle raises for a refused argument, beside load_ops() own.
        reason = " ".join(str(error).split())
    else:
        once.say(logging.WARNING, f"paddle_ccq: {format} layers run on our GPU operators")
        return made
    graphs = getattr(getattr(layer, "fd_config", None), "graph_opt_config", None)
    if getattr(graphs, "use_cudagraph", False):
        raise CcqError(
            f"MoE layer {layer.layer_idx}: {format} does not run on this GPU: {reason}. It would"
            f" run on the processor, slowly and without CUDA graphs: {_NO_GRAPHS}"
        )
    once.say(
        logging.WARNING,
        f"paddle_ccq: {format} layers run on the processor, many times slower: {reason}",
    )
    return on_host(format, experts)


def make_own_method(
    base: type,
    dispatch: Callable[..., Any],
    reduce: Callable[..., Any],
    to_device: Callable[[Any], Any],
) -> type:
    """A MoE method for targets.fastdeploy.layout.OWN_FORMATS, made with (config, format).

    Args:
        base: FastDeploy's CutlassWint2FusedMoeMethod, whose interface is taken.
        dispatch, reduce: as for moe_method.make_method().
        to_device: get_tensor: what FastDeploy read -> a Paddle tensor on its device.
    """

    class CcqOwnMoeMethod(base):  # type: ignore[misc, valid-type]
        ccq_base = base

        def __init__(self, quant_config: Any, format: str) -> None:
            super().__init__(quant_config)
            self.ccq_format = format

        def create_weights(self, layer: Any, **attributes: Any) -> None:
            """No parameters: experts are prepared as they are loaded."""
            reason = general_refusal(layer)
            if reason:
                raise CcqError(
                    f"MoE layer {layer.layer_idx}: {reason}: experts in {self.ccq_format} do not"
                    " run with that"
                )
            problem = missing_rank_folders(layer)
            if problem:
                raise CcqError(problem)
            setattr(layer, _EXPERTS, None)

        def process_prequanted_weights(
            self, layer: Any, state_dict: Any, is_rearrange: bool = False
        ) -> None:
            setattr(layer, _EXPERTS, None)  # loaded a second time: not held twice
            found = read_experts(layer, state_dict, self.ccq_format, to_device)
            setattr(layer, _EXPERTS, prepare_experts(layer, self.ccq_format, found))

        def apply(self, layer: Any, x: Any, gate: Any, *args: Any, **kwargs: Any) -> Any:
            experts = getattr(layer, _EXPERTS)
            if experts is None:
                raise CcqError(
                    f"MoE layer {layer.layer_idx}: FastDeploy loaded no weights into it; start it"
                    " with --load-choices default"
                )
            named = named_arguments(args, kwargs)
            refuse_latent(layer, named)
            kind = self.moe_quant_type
            return routed(layer, x, gate, named, kind, dispatch, reduce, experts)

    return CcqOwnMoeMethod
