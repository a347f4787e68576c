# SPDX-License-Identifier: Apache-2.0
"""Matrices as a decoder returns them, after encoding them in a format as `quantize` would."""

from __future__ import annotations

import numpy as np

from ..checkpoint.reader import Checkpoint
from ..codec import formats as codec_formats
from ..codec.row_order import FASTDEPLOY_2_1
from ..encoder.factory import make_encoders
from ..encoder.ldlq import Hessians
from ..families.tensor import DOWN, UP_GATE
from .probing import Execution, Probing

# Projection -> attribute of an expert in models/ernie.py.
ATTRIBUTES = {UP_GATE: "up_gate", DOWN: "down"}


class Decoded:
    """`decoded(name, format)` returns a matrix after encoding; with Hessians where it can be."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        probing: Probing,
        hessians: Hessians | None,
        execution: Execution,
    ) -> None:
        self.checkpoint = checkpoint
        self._encoders = make_encoders(
            probing.formats,
            probing.preset,
            threads=execution.threads,
            device=execution.device,
            hessians=hessians,
        )

    def __call__(self, name: str, format: str) -> np.ndarray:
        """The named matrix [in, out] after a round trip through a format."""
        weight = self.checkpoint.read_out_in(name)
        rows = codec_formats.order_rows(np.arange(weight.shape[1]), format, FASTDEPLOY_2_1)
        weight = np.ascontiguousarray(weight[:, rows])
        tensors = self._encoders[format].encode(weight, name, rows).tensors
        return codec_formats.decode(format, tensors, "bfloat16", FASTDEPLOY_2_1)
