# SPDX-License-Identifier: Apache-2.0
"""What may be tuned in a quantized model, where it lies in the model, and how it is stored again.

Codes and local scales of packed experts stay. Tuned are the factor of every column (super scale,
or the scale of wint4 and wint8), norm gains, routers, and dense linear layers stored in wint8 or
bf16, which are encoded anew: 8 bits are exact enough for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import paddle
from paddle import Tensor

from ..checkpoint.reader import Checkpoint
from ..codec import formats
from ..codec.weight_only import quantize_wint8, round_wint8
from ..families.tensor import QKV, UP_GATE, Role, TensorSpec
from ..models.ernie import Ernie
from ..models.gradients import FACTORS, WHOLE

# Formats that lose so little that a tuned matrix is simply encoded again.
ENCODED_ANEW = ("bf16", "wint8")
# Tensors that are never quantized and tuned as they are.
TUNED_WHOLE = frozenset({Role.NORM, Role.ROUTER})


@dataclass
class Parameter:
    """One tuned tensor. The model always computes with what would be stored: `value`, rounded.

    Gradients are taken at the rounded point and move the exact one, so that steps smaller than a
    rounding error still add up (a straight-through estimate).

    Attributes:
        kind: FACTORS: `value` holds the logarithms of column factors. WHOLE: the tensor itself.
        tensor: what the model computes with; changed in place.
        value: float64, so that many small steps add up exactly enough.
        unit: what a step of one means: 1 for logarithms, else the tensor's root mean square.
        rounded: from a float64 array to what its storage keeps of it, as float64.
        scale: FACTORS: the stored scale of each column before tuning.
    """

    spec: TensorSpec
    kind: str
    tensor: Tensor
    value: np.ndarray
    unit: float
    rounded: Callable[[np.ndarray], np.ndarray]
    scale: np.ndarray | None = None
    _shown: np.ndarray | None = None

    @property
    def name(self) -> str:
        """The canonical name of the tensor."""
        return self.spec.name

    def move(self, step: np.ndarray) -> None:
        """Subtract `step`, which is in units of the parameter."""
        self.put(self.value - step * self.unit)

    @paddle.no_grad()
    def put(self, value: np.ndarray) -> None:
        """Set the value, and the model's tensor to what is stored of it."""
        self.value = value
        if self.kind == WHOLE:
            paddle.assign(paddle.to_tensor(self.rounded(value).astype(np.float32)), self.tensor)
            return
        before = self.scale if self._shown is None else self._shown
        self._shown = self.stored_scale()
        # A column of zeros has scale 0 and is left as it is.
        ratio = np.divide(self._shown, before, out=np.ones_like(before), where=before != 0)
        self.tensor.multiply_(paddle.to_tensor(ratio.astype(np.float32)))

    def stored_scale(self) -> np.ndarray:
        """FACTORS: the scales to store, in the order of the model's columns."""
        return self.rounded(self.scale * np.exp(self.value))


def collect(model: Ernie, checkpoint: Checkpoint) -> dict[str, Parameter]:
    """All parameters of a model that was built from `checkpoint`, by canonical name."""
    found = {}
    for name in checkpoint.model_names():
        format, spec = checkpoint.format_of(name), checkpoint.config.tensors[name]
        if spec.is_linear:
            again = format in ENCODED_ANEW and not spec.is_expert
            kind = WHOLE if again else FACTORS
            if kind == FACTORS and formats.get(format).column_scale is None:
                continue
        elif spec.role in TUNED_WHOLE:
            kind = WHOLE
        else:
            continue
        tensor = _tensor(model, spec)
        if kind == FACTORS:
            stored = checkpoint.tensors.read(_scale_name(checkpoint, name))
            scale = stored.astype(np.float64)[_columns(model, spec)]
            zeros = np.zeros(scale.size)
            found[name] = Parameter(spec, kind, tensor, zeros, 1.0, _cast(stored.dtype), scale)
            continue
        value = tensor.numpy().astype(np.float64)
        unit = float(np.sqrt(np.square(value).mean()))
        wint8 = format == "wint8"
        rounded = _round_wint8 if wint8 else _cast(checkpoint.read_stored(name).dtype)
        found[name] = Parameter(spec, kind, tensor, value, unit, rounded)
    return found


def _round_wint8(value: np.ndarray) -> np.ndarray:
    return round_wint8(value.astype(np.float32)).astype(np.float64)


def _cast(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda value: value.astype(np.float32).astype(dtype).astype(np.float64)


def _scale_name(checkpoint: Checkpoint, name: str) -> str:
    suffix = formats.get(checkpoint.format_of(name)).column_scale
    return next(s for s in checkpoint.stored_names(name) if s.endswith(f".{suffix}"))


def _tensor(model: Ernie, spec: TensorSpec) -> Tensor:
    """The place in the model where a tensor is used."""
    if spec.layer is None:
        return model.norm
    block = model.blocks[spec.layer]
    if spec.role is Role.NORM:
        return block.attention_norm if spec.projection == "input_layernorm" else block.mlp_norm
    if spec.role is Role.ROUTER:
        return block.mlp.gate
    if spec.role is Role.ATTENTION:
        return block.attention.qkv if spec.projection == QKV else block.attention.out
    owner = block.mlp
    if spec.is_expert:
        owner = block.mlp.experts[spec.expert]
    elif spec.role is Role.SHARED_EXPERT:
        owner = block.mlp.shared
    return owner.up_gate if spec.projection == UP_GATE else owner.down


def stored_tensors(
    parameter: Parameter, checkpoint: Checkpoint, model: Ernie
) -> dict[str, np.ndarray]:
    """The on-disk tensors that take a parameter's present value, by on-disk name."""
    name, spec, value = parameter.name, parameter.spec, parameter.value
    format = checkpoint.format_of(name)
    stored = checkpoint.stored_names(name)
    if parameter.kind == FACTORS:
        wanted = _scale_name(checkpoint, name)
        scale = np.empty_like(checkpoint.tensors.read(wanted))
        scale[_columns(model, spec)] = parameter.stored_scale().astype(np.float32)
        return {wanted: scale}
    if not spec.is_linear:
        (only,) = stored
        dtype = checkpoint.tensors.info(only).dtype
        array = value.reshape(checkpoint.tensors.info(only).shape)
        return {only: array.astype(np.float32 if dtype == "F32" else ml_dtypes.bfloat16)}
    weight = np.empty(value.shape, np.float32)
    weight[:, _columns(model, spec)] = value
    if format == "bf16":
        (only,) = stored
        return {only: weight.astype(ml_dtypes.bfloat16)}
    codes, scale = quantize_wint8(weight)
    by_suffix = {"quant_weight": codes, "weight_scale": scale}
    return {s: by_suffix[s.rpartition(".")[2]] for s in stored}


def _columns(model: Ernie, spec: TensorSpec) -> np.ndarray | slice:
    """Where the columns of the model's tensor lie in the stored one."""
    if spec.projection == QKV:
        return model.blocks[spec.layer].attention.columns
    return slice(None)
