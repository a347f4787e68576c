# SPDX-License-Identifier: Apache-2.0
"""What may be tuned in a quantized model, where it lies in the model, and how it is stored again.

Codes and local scales of packed experts stay. Tuned are the factor of every column (super scale,
or the scale of wint4 and wint8), norm gains, routers, and dense linear layers stored in wint8 or
bf16, which are encoded anew: 8 bits are exact enough for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import paddle
from paddle import Tensor

from ..checkpoint.naming import is_linear
from ..checkpoint.reader import Checkpoint
from ..codec.weight_only import quantize_wint8
from ..models.ernie import Ernie
from .gradients import FACTORS, WHOLE

# The tensor that holds a column's factor, by format.
SCALE_SUFFIXES = {
    "wint2": "super_scales",
    "ccq-2.5": "super_scales",
    "ccq-2.75": "super_scales",
    "wint4": "weight_scale",
    "wint8": "weight_scale",
}
# Formats that lose so little that a tuned matrix is simply encoded again.
ENCODED_ANEW = ("bf16", "wint8")


@dataclass
class Parameter:
    """One tuned tensor.

    Attributes:
        kind: FACTORS: `value` holds the logarithms of column factors. WHOLE: the tensor itself.
        tensor: what the model computes with; changed in place.
        value: float64, so that many small steps add up exactly enough.
        unit: what a step of one means: 1 for logarithms, else the tensor's root mean square.
    """

    name: str
    kind: str
    tensor: Tensor
    value: np.ndarray
    unit: float

    @paddle.no_grad()
    def move(self, step: np.ndarray) -> None:
        """Take `step` (in units) off."""
        step = step * self.unit
        self.value -= step
        if self.kind == FACTORS:
            self.tensor.multiply_(paddle.to_tensor(np.exp(-step).astype(np.float32)))
        else:
            paddle.assign(paddle.to_tensor(self.value.astype(np.float32)), self.tensor)

    @paddle.no_grad()
    def put(self, value: np.ndarray) -> None:
        """Set the value, as after the steps that lead there."""
        if self.kind == FACTORS:
            factors = np.exp(value - self.value).astype(np.float32)
            self.tensor.multiply_(paddle.to_tensor(factors))
        self.value = value.copy()
        if self.kind == WHOLE:
            paddle.assign(paddle.to_tensor(value.astype(np.float32)), self.tensor)


def collect(model: Ernie, checkpoint: Checkpoint) -> dict[str, Parameter]:
    """All parameters of a model that was built from `checkpoint`, by canonical name."""
    found = {}
    for name in checkpoint.names():
        format = checkpoint.format_of(name)
        if is_linear(name):
            again = format in ENCODED_ANEW and ".experts." not in name
            kind = WHOLE if again else FACTORS
            if kind == FACTORS and format not in SCALE_SUFFIXES:
                continue
        elif name.endswith(("norm.weight", "mlp.gate.weight")):
            kind = WHOLE
        else:
            continue
        tensor = _tensor(model, name)
        if kind == FACTORS:
            value, unit = np.zeros(tensor.shape[1]), 1.0
        else:
            value = tensor.numpy().astype(np.float64)
            unit = float(np.sqrt(np.square(value).mean()))
        found[name] = Parameter(name, kind, tensor, value, unit)
    return found


def _tensor(model: Ernie, name: str) -> Tensor:
    if name == "ernie.norm.weight":
        return model.norm
    _, _, layer, rest = name.split(".", 3)
    block = model.blocks[int(layer)]
    if rest.startswith("mlp.experts."):
        expert, rest = rest.removeprefix("mlp.experts.").split(".", 1)
        owner = block.mlp.experts[int(expert)]
    elif rest.startswith("mlp.shared_experts."):
        owner, rest = block.mlp.shared, rest.removeprefix("mlp.shared_experts.")
    else:
        owner, rest = block.mlp, rest.removeprefix("mlp.")
    return {
        "input_layernorm.weight": lambda: block.attention_norm,
        "post_attention_layernorm.weight": lambda: block.mlp_norm,
        "self_attn.qkv_proj.weight": lambda: block.attention.qkv,
        "self_attn.o_proj.weight": lambda: block.attention.out,
        "gate.weight": lambda: owner.gate,
        "up_gate_proj.weight": lambda: owner.up_gate,
        "down_proj.weight": lambda: owner.down,
    }[rest]()


def stored_tensors(
    parameter: Parameter, checkpoint: Checkpoint, model: Ernie
) -> dict[str, np.ndarray]:
    """The on-disk tensors that take a parameter's present value, by on-disk name."""
    name, value = parameter.name, parameter.value
    format = checkpoint.format_of(name)
    stored = checkpoint.stored_names(name)
    if parameter.kind == FACTORS:
        wanted = next(s for s in stored if s.endswith("." + SCALE_SUFFIXES[format]))
        scale = checkpoint.tensors.read(wanted)
        columns = _columns(model, name)
        factors = np.empty_like(value)
        factors[columns] = np.exp(value)
        return {wanted: (scale.astype(np.float64) * factors).astype(scale.dtype)}
    if not is_linear(name):
        (only,) = stored
        dtype = checkpoint.tensors.info(only).dtype
        array = value.reshape(checkpoint.tensors.info(only).shape)
        return {only: array.astype(np.float32 if dtype == "F32" else ml_dtypes.bfloat16)}
    weight = np.empty(value.shape, np.float32)
    weight[:, _columns(model, name)] = value
    if format == "bf16":
        (only,) = stored
        return {only: weight.astype(ml_dtypes.bfloat16)}
    codes, scale = quantize_wint8(weight)
    by_suffix = {"quant_weight": codes, "weight_scale": scale}
    return {s: by_suffix[s.rpartition(".")[2]] for s in stored}


def _columns(model: Ernie, name: str) -> np.ndarray | slice:
    """Where the columns of the model's tensor lie in the stored one."""
    if name.endswith("qkv_proj.weight"):
        return model.blocks[int(name.split(".")[2])].attention.columns
    return slice(None)
