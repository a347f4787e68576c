# SPDX-License-Identifier: Apache-2.0
"""Matrices as models are published: FP8 with block scales, INT4 groups, and stacks of experts.

The numbers are worked out here on their own, value by value, so that the package's readers are
checked against a second statement of the formats.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
LARGEST = 448.0
FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def int4_config(group: int = 32, **weights: Any) -> dict[str, Any]:
    """A quantization_config as Kimi-K2-Thinking has it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": group,
                    "symmetric": True,
                    **weights,
                },
            }
        },
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    }


def fp8(weight: np.ndarray, block: tuple[int, int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as E4M3 values and the float32 scale of every block."""
    rows, columns = weight.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    values = np.empty(weight.shape, E4M3)
    scales = np.empty(grid, np.float32)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = max(np.abs(weight[place]).max() / LARGEST, 1e-12)
            values[place] = (weight[place] / scales[i, j]).astype(E4M3)
    return values, scales


def from_fp8(
    values: np.ndarray, scales: np.ndarray, block: tuple[int, int] = (128, 128)
) -> np.ndarray:
    """value x scale in float32."""
    rows, columns = values.shape
    result = values.astype(np.float32)
    for row in range(rows):
        for column in range(columns):
            result[row, column] *= np.float32(scales[row // block[0], column // block[1]])
    return result


def int4(weight: np.ndarray, group: int = 32) -> dict[str, np.ndarray]:
    """The tensors of a matrix in symmetric INT4 groups, by suffix."""
    rows, columns = weight.shape
    groups = -(-columns // group)
    scales = np.empty((rows, groups), ml_dtypes.bfloat16)
    words = np.zeros((rows, -(-columns // 8)), np.uint32)
    for row in range(rows):
        for g in range(groups):
            part = weight[row, g * group : (g + 1) * group]
            scales[row, g] = max(np.abs(part).max() / 7, 1e-6)
        for column in range(columns):
            scale = np.float32(scales[row, column // group])
            value = int(np.clip(np.rint(weight[row, column] / scale), -8, 7))
            words[row, column // 8] |= np.uint32((value + 8) << (4 * (column % 8)))
    return {
        "weight_packed": words.view(np.int32),
        "weight_scale": scales,
        "weight_shape": np.array([rows, columns], np.int64),
    }


def from_int4(tensors: dict[str, np.ndarray], columns: int, group: int = 32) -> np.ndarray:
    """value x scale in float32."""
    words = tensors["weight_packed"].view(np.uint32)
    result = np.empty((len(words), columns), np.float32)
    for column in range(columns):
        nibble = (words[:, column // 8] >> np.uint32(4 * (column % 8))) & np.uint32(15)
        scale = tensors["weight_scale"][:, column // group].astype(np.float32)
        result[:, column] = (nibble.astype(np.float32) - 8) * scale
    return result
