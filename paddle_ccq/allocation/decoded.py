# SPDX-License-Identifier: Apache-2.0
"""Matrices as a decoder returns them, after encoding them in a format as `quantize` would."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import paddle

from ..checkpoint.reader import ROW_ORDERED_FORMAT, Checkpoint
from ..codec import formats as codec_formats
from ..codec.row_order import permute_rows, unpermute_rows
from ..encoder.base import make_encoder
from ..encoder.ldlq import Moments, calibrated_encoder
from ..models.ernie import MLP

# Projection -> attribute of an expert in models/ernie.py.
ATTRIBUTES = {"up_gate_proj": "up_gate", "down_proj": "down"}


class Decoded:
    """`decoded(name, format)`; wint2 is encoded with the calibration's statistics.

    `device` is where codes are searched; the values are the same.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Sequence[str],
        preset: str,
        threads: int,
        moments: Moments | None,
        device: str = "cpu",
    ) -> None:
        self.checkpoint = checkpoint
        self._encoders = {
            f: make_encoder(f, preset, threads=threads, device=device) for f in formats
        }
        if moments is not None and "wint2" in self._encoders:
            free = self._encoders["wint2"]
            self._encoders["wint2"] = calibrated_encoder(preset, threads, moments, free, device)

    def __call__(self, name: str, format: str) -> np.ndarray:
        """The named matrix [in, out] after a round trip through a format."""
        weight = self.checkpoint.read_out_in(name)
        ordered = format == ROW_ORDERED_FORMAT
        rows = np.arange(weight.shape[1])
        if ordered:
            rows = permute_rows(rows)
            weight = np.ascontiguousarray(weight[:, rows])
        tensors = self._encoders[format].encode(weight, name, rows).tensors
        decoded = codec_formats.dequantize(format, tensors)
        return unpermute_rows(decoded) if ordered else decoded

    def expert(self, mlp: MLP, name: str, projection: str, format: str) -> MLP:
        """The expert `name` with one projection replaced."""
        changed = copy.copy(mlp)
        weight = self(f"{name}.{projection}.weight", format)
        setattr(changed, ATTRIBUTES[projection], paddle.to_tensor(np.ascontiguousarray(weight)))
        return changed
