# SPDX-License-Identifier: Apache-2.0
"""Argument checks: everything a caller can get wrong, as a ValueError that names the argument."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ..codec import formats, trellis
from ..codec.floats import BFLOAT16
from ..codec.formats import SAFETENSORS_DTYPES, Tensors
from ..codec.row_order import (
    FASTDEPLOY_2_1,
    INPUT_FROM_STORED,
    PLAIN,
    ROW_ORDERS,
    STORED_FROM_INPUT,
)

ACTIVATIONS = (np.dtype(np.float32), BFLOAT16, np.dtype(np.float16))
# Codes beyond this leave 32-bit integers, where conversions differ from one processor to the next.
CODE_LIMIT = 1 << 30
# What ccq_dequant decodes on a GPU, by number (enum ccq_format in custom_ops/gpu/common/dequant.h).
DECODED_ON_GPU = ("wint2", "ccq-2.5", "ccq-2.75")


def array(value: object, name: str) -> np.ndarray:
    """`value` if it is a C-contiguous NumPy array.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if not isinstance(value, np.ndarray):
        kind = type(value)
        raise ValueError(f"{name} must be a NumPy array, got {kind.__module__}.{kind.__name__}")
    if not value.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous, got strides {value.strides}")
    return value


def floats(value: object, name: str) -> np.ndarray:
    """`value` as a C-contiguous float32 array, copied where it must be.

    Raises:
        ValueError: if it is no float32 array.
    """
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        raise ValueError(f"{name} must be a float32 array, got {getattr(value, 'dtype', value)}")
    return np.ascontiguousarray(value)


def channels(weight: object) -> np.ndarray:
    """A weight matrix as encoders on a GPU take it: float32 [N, K], 64 | K.

    Raises:
        ValueError: for another dtype or shape.
    """
    found = floats(weight, "weight")
    if found.ndim != 2 or found.shape[1] % 64 or not found.size:
        raise ValueError(f"weight must be float32 [N, K] with 64 | K, got {list(found.shape)}")
    return found


def shape(value: np.ndarray, expected: tuple[int, ...], name: str) -> None:
    """Hold an array against its shape.

    Raises:
        ValueError: if it has another one.
    """
    if value.shape != expected:
        raise ValueError(f"{name} must be {list(expected)}, got {list(value.shape)}")


def within(name: str, value: int, low: int, high: int) -> None:
    """Hold a size against its limits, which belong to the range.

    Raises:
        ValueError: if it is beyond them.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high}, got {value}")


def activations(value: object, name: str, width: int) -> np.ndarray:
    """[tokens, width] of float32, bfloat16 or float16.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    x = array(value, name)
    if x.dtype not in ACTIVATIONS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{name} must be [tokens, {width}], got {list(x.shape)}")
    return x


def decoded_on_gpu(format: str) -> int:
    """The number that ccq_dequant knows the format by.

    Raises:
        ValueError: for one that a GPU only multiplies with.
    """
    if format not in DECODED_ON_GPU:
        raise ValueError(
            f"format: {format} is not decoded on a GPU, only multiplied with; ops.dequant is for it"
        )
    return DECODED_ON_GPU.index(format)


def stored(format: str, tensors: Mapping[str, np.ndarray]) -> tuple[Tensors, int, int]:
    """The tensors of one matrix as the format stores them, and its K and N.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if format not in formats.CCQ_FORMATS:
        raise ValueError(f"format must be one of {', '.join(formats.CCQ_FORMATS)}, got {format!r}")
    if "quant_weight" not in tensors:
        raise ValueError(f"quant_weight is missing; got {', '.join(tensors) or 'nothing'}")
    words = array(tensors["quant_weight"], "quant_weight")
    if words.ndim != 2:
        raise ValueError(f"quant_weight must have two dimensions, got {list(words.shape)}")
    step = formats.get(format).row_multiple
    rows_per_step = formats.tensor_specs(format, step, 1)["quant_weight"][0][0]
    if words.shape[0] == 0 or words.shape[0] % rows_per_step:
        raise ValueError(
            f"quant_weight has {words.shape[0]} rows; {format} needs a multiple of {rows_per_step} "
            f"(K a multiple of {step})"
        )
    k, n = words.shape[0] // rows_per_step * step, words.shape[1]
    if n == 0:
        raise ValueError("quant_weight has no columns")
    found = {}
    for suffix, (shape, dtype) in formats.tensor_specs(format, k, n).items():
        if suffix not in tensors:
            raise ValueError(f"{suffix} is missing for format {format}")
        value, expected = array(tensors[suffix], suffix), SAFETENSORS_DTYPES[dtype]
        if value.shape != shape or value.dtype != expected:
            raise ValueError(
                f"{suffix} must be {expected}{list(shape)}, got {value.dtype}{list(value.shape)}"
            )
        found[suffix] = value
    if "code_zp" in found:
        first = found["code_zp"].astype(np.float64)
        last = first + 255 * found["code_scale"].astype(np.float64)
        for name, codes in (("code_zp", first), ("code_scale", last)):
            if not np.all(np.abs(codes) < CODE_LIMIT):
                column = int(np.argmax(~(np.abs(codes) < CODE_LIMIT)))
                raise ValueError(f"{name} of column {column} gives codes beyond {CODE_LIMIT}")
    return found, k, n


def before(format: str, value: object, n: int) -> np.ndarray:
    """The code bytes before a matrix' first ones; empty for none.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if value is None:
        return np.zeros(0, np.uint8)
    if format != trellis.NAME:
        raise ValueError(f"before: {format} has no byte before the first one, only {trellis.NAME}")
    found = array(value, "before")
    if found.dtype != np.uint8 or found.shape != (n,):
        raise ValueError(f"before must be uint8[{n}], got {found.dtype}{list(found.shape)}")
    return found


def projections(up_gate: tuple[int, int], down: tuple[int, int]) -> None:
    """[K, N] of an expert's two matrices, which must belong together.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    (hidden, both), (width, out) = up_gate, down
    if (hidden, both) != (out, 2 * width):
        raise ValueError(
            f"down is [{width}, {out}]; with up_gate [{hidden}, {both}] it must be "
            f"[{both // 2}, {hidden}]"
        )


def row_order(value: str) -> np.ndarray:
    """For every stored row of a 64-group the input row that it multiplies.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if value not in ROW_ORDERS:
        raise ValueError(f"row_order must be one of {', '.join(ROW_ORDERS)}, got {value!r}")
    assert ROW_ORDERS == (FASTDEPLOY_2_1, PLAIN)
    return STORED_FROM_INPUT if value == FASTDEPLOY_2_1 else np.arange(len(INPUT_FROM_STORED))


def row_order_of(format: str, value: str) -> str:
    """The row order of a format's stored rows, of which ccq-2t has one alone.

    Raises:
        ValueError: for an order that is not known, or that the format does not have.
    """
    row_order(value)
    if format == trellis.NAME and value != PLAIN:
        raise ValueError(f"row_order: rows of {format} are in plain order, got {value!r}")
    return value


def offsets(value: object, experts: int, tokens: int) -> list[int]:
    """Inclusive running token counts [experts], as integers.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    ends = array(value, "offsets")
    if ends.dtype not in (np.int32, np.int64) or ends.shape != (experts,):
        raise ValueError(
            f"offsets must be int32 or int64 [{experts}], got {ends.dtype}{list(ends.shape)}"
        )
    if np.any(np.diff(ends, prepend=0) < 0):
        raise ValueError("offsets must not fall: entry e is the number of rows of experts 0..e")
    if ends[-1] != tokens:
        raise ValueError(f"offsets must end at the {tokens} rows of x, not at {int(ends[-1])}")
    return [int(end) for end in ends]


def threads(value: int | None) -> int:
    """A usable thread count; None means every processor this process may use.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if value is None:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if value < 1:
        raise ValueError(f"threads must be at least 1, got {value}")
    return value
