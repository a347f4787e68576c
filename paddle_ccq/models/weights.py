# SPDX-License-Identifier: Apache-2.0
"""Where a model's weights come from: anything with a config and a read-by-name function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ..checkpoint.reader import ROW_ORDERED_FORMAT, Checkpoint
from ..codec import formats
from ..codec.row_order import FASTDEPLOY_2_1, PLAIN, unpermute_rows
from ..errors import CcqError

EXACT, BFLOAT16 = "exact", "bfloat16"
# What packed weights may be read as; evaluate's --weights explains them.
READINGS = (EXACT, BFLOAT16)


class WeightSource(Protocol):
    """A checkpoint, or something that looks like one; names are the canonical ones."""

    config: Any

    def read(self, name: str) -> np.ndarray:
        """The named weight as float32, matrices as [in, out]."""
        ...


class ExactWeights:
    """A checkpoint whose packed matrices are read exactly.

    Checkpoint.read() rounds decoded weights to bfloat16, as an engine that multiplies in bfloat16
    sees them. The packed products of paddle_ccq.ops decode exactly; this is the float model they
    stand for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config

    def read(self, name: str) -> np.ndarray:
        """The named weight as float32, matrices as [in, out]."""
        checkpoint = self.checkpoint
        format_name = checkpoint.format_of(name)
        if format_name == "bf16":
            return checkpoint.read(name)
        try:
            weight = formats.dequantize(format_name, stored_tensors(checkpoint, name), "float32")
        except ValueError as error:
            raise CcqError(f"{checkpoint.path}: {name}: cannot be decoded: {error}") from None
        return weight if row_order_of(checkpoint, name) == PLAIN else unpermute_rows(weight)


def weight_source(checkpoint: Checkpoint, reading: str) -> WeightSource:
    """The checkpoint with packed weights read as `reading` says, one of READINGS."""
    if reading not in READINGS:
        raise CcqError(f"--weights {reading}: must be one of {', '.join(READINGS)}")
    return checkpoint if reading == BFLOAT16 else ExactWeights(checkpoint)


def stored_tensors(checkpoint: Checkpoint, name: str) -> formats.Tensors:
    """The packed tensors of a matrix in the dtypes of its format."""
    tensors = checkpoint.packed(name)
    specs = formats.tensor_specs(checkpoint.format_of(name), *checkpoint.shape(name))
    return {
        suffix: tensors[suffix].astype(formats.SAFETENSORS_DTYPES[dtype], copy=False)
        for suffix, (_, dtype) in specs.items()
    }


def row_order_of(checkpoint: Checkpoint, name: str) -> str:
    """The order of a packed matrix's stored input rows."""
    ordered = checkpoint.format_of(name) == ROW_ORDERED_FORMAT
    return FASTDEPLOY_2_1 if ordered and checkpoint.row_order == FASTDEPLOY_2_1 else PLAIN


class OverriddenWeights:
    """Another source with some weights replaced, for trying a quantizer without writing files.

    `replacements` maps canonical names to arrays, or to functions that return one (called on
    each read, so that a large set need not be in memory at once).
    """

    def __init__(self, base: WeightSource, replacements: Mapping[str, Any]) -> None:
        self.base = base
        self.config = base.config
        self.replacements = replacements

    def read(self, name: str) -> np.ndarray:
        if name not in self.replacements:
            return self.base.read(name)
        value = self.replacements[name]
        return np.asarray(value() if callable(value) else value, dtype=np.float32)
