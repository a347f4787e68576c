# SPDX-License-Identifier: Apache-2.0
"""The registry of formats: each record says all that the rest of the package knows of a format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from . import trellis, wint2
from .convolution import bits_per_weight
from .floats import BFLOAT16, round_to
from .row_order import FASTDEPLOY_2_1, PLAIN, permute_rows, unpermute_rows
from .spare_scale import CCQ_2_5, CCQ_2_75, SpareScaleFormat, SpareScaleTensors
from .spare_scale import dequantize as dequantize_spare_scale
from .weight_only import COLUMN_MULTIPLE, TILE_ROWS, dequantize_wint4, dequantize_wint8

Tensors = dict[str, np.ndarray]
# Suffix -> (shape, safetensors dtype); suffixes are FastDeploy's.
Specs = dict[str, tuple[tuple[int, ...], str]]

SAFETENSORS_DTYPES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
}


class Kind(Enum):
    """How a format stores a weight."""

    FLOAT = "float"
    INTEGER = "integer with one scale a column, rounded to nearest"
    CCQ = "convolutional code with scales of groups"


class Use(Enum):
    """What a format may be chosen for."""

    EXPERTS = "routed experts of a whole model: a value of --format"
    WIDER_EXPERTS = "routed experts of single layers that are to lose less"
    DENSE = "linear layers outside the routed experts"


@dataclass(frozen=True)
class Format:
    """One storage format of a [K, N] matrix.

    Attributes:
        bits_per_weight: of codes and group scales, without what is stored once a column.
        row_multiple, column_multiple: what K and N must be multiples of.
        specs: (K, N) -> the stored tensors.
        decode_stored: (tensors, dtype) -> float32 [K, N] in stored row order, rounded to dtype.
        column_scale: suffix of the tensor with one scale a column; None where there is none.
        row_ordered: an engine may want the rows inside a 64-group in its own order
            (row_order.py); the tensors do not say which.
        calibrated: activation statistics can choose the codes.
        largest_error: rel-MSE beyond which a matrix is another matrix.
    """

    name: str
    kind: Kind
    bits_per_weight: float
    row_multiple: int
    column_multiple: int
    specs: Callable[[int, int], Specs]
    decode_stored: Callable[[Tensors, str], np.ndarray]
    uses: frozenset[Use] = frozenset()
    column_scale: str | None = None
    row_ordered: bool = False
    calibrated: bool = False
    largest_error: float = 0.5

    @property
    def is_ccq(self) -> bool:
        """Convolutional code (as opposed to plain floats or integers)."""
        return self.kind is Kind.CCQ


def _spare_scale(f: SpareScaleFormat) -> Format:
    storage = "U8" if f.storage == np.uint8 else "I16"
    return Format(
        f.name,
        Kind.CCQ,
        f.bits_per_weight,
        row_multiple=64,
        column_multiple=1,
        specs=lambda k, n: {
            "quant_weight": ((k // 64 * f.words_per_group, n), storage),
            "super_scales": ((n,), "BF16"),
        },
        decode_stored=lambda t, dtype: dequantize_spare_scale(SpareScaleTensors(f, **t), dtype),
        uses=frozenset({Use.EXPERTS}),
        column_scale="super_scales",
    )


def _weight_only(
    bits: int,
    dequantize: Callable[[np.ndarray, np.ndarray], np.ndarray],
    use: Use,
    largest_error: float,
) -> Format:
    return Format(
        f"wint{bits}",
        Kind.INTEGER,
        float(bits),
        row_multiple=TILE_ROWS,
        column_multiple=COLUMN_MULTIPLE,
        specs=lambda k, n: {
            "quant_weight": ((n * bits // 8, k), "I8"),
            "weight_scale": ((n,), "BF16"),
        },
        decode_stored=lambda t, dtype: round_to(
            dequantize(t["quant_weight"], t["weight_scale"]), dtype
        ),
        uses=frozenset({use}),
        column_scale="weight_scale",
        largest_error=largest_error,
    )


_ALL = (
    # Rounding errors of 8 bits are below 1e-4 of a matrix's energy; 0.05 leaves room for outliers.
    _weight_only(8, dequantize_wint8, Use.DENSE, largest_error=0.05),
    _weight_only(4, dequantize_wint4, Use.WIDER_EXPERTS, largest_error=0.5),
    Format(
        "wint2",
        Kind.CCQ,
        bits_per_weight(8, wint2.ROWS_PER_BYTE, wint2.GROUP, scale_bits=4),
        row_multiple=wint2.ROW_MULTIPLE,
        # FastDeploy's loader regroups columns by eight.
        column_multiple=8,
        specs=lambda k, n: {
            "quant_weight": ((k // 4, n), "U8"),
            "weight_scale": ((k // 128, n), "U8"),
            "super_scales": ((n,), "BF16"),
            "code_scale": ((n,), "F32"),
            "code_zp": ((n,), "F32"),
        },
        decode_stored=lambda t, dtype: wint2.dequantize(wint2.Wint2Tensors(**t), dtype),
        uses=frozenset({Use.EXPERTS}),
        column_scale="super_scales",
        row_ordered=True,
        calibrated=True,
    ),
    Format(
        trellis.NAME,
        Kind.CCQ,
        bits_per_weight(8, wint2.ROWS_PER_BYTE, wint2.GROUP, scale_bits=4),
        row_multiple=wint2.ROW_MULTIPLE,
        column_multiple=1,
        specs=lambda k, n: {
            "quant_weight": ((k // 4, n), "U8"),
            "weight_scale": ((k // 128, n), "U8"),
            "super_scales": ((n,), "BF16"),
        },
        decode_stored=lambda t, dtype: trellis.dequantize(trellis.TrellisTensors(**t), dtype),
        uses=frozenset({Use.EXPERTS}),
        column_scale="super_scales",
        calibrated=True,
    ),
    _spare_scale(CCQ_2_5),
    _spare_scale(CCQ_2_75),
    Format(
        "bf16",
        Kind.FLOAT,
        16.0,
        row_multiple=1,
        column_multiple=1,
        specs=lambda k, n: {"weight": ((k, n), "BF16")},
        decode_stored=lambda t, dtype: round_to(t["weight"].astype(np.float32), dtype),
        uses=frozenset({Use.DENSE}),
    ),
)

FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
# What is taken where nobody chooses.
DEFAULT_EXPERTS = "wint2"


def named(kind: Kind | None = None, use: Use | None = None) -> tuple[str, ...]:
    """Names of all formats of a kind and for a use, in the registry's order."""
    return tuple(
        f.name
        for f in FORMATS.values()
        if (kind is None or f.kind is kind) and (use is None or use in f.uses)
    )


CCQ_FORMATS = named(kind=Kind.CCQ)
EXPERT_FORMATS = named(use=Use.EXPERTS)
WIDER_EXPERT_FORMATS = named(use=Use.WIDER_EXPERTS)
DENSE_FORMATS = named(use=Use.DENSE)


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def tensor_specs(name: str, k: int, n: int) -> Specs:
    """Stored tensors of a [k, n] matrix: suffix -> (shape, safetensors dtype)."""
    return get(name).specs(k, n)


def stored_order(name: str, row_order: str | None) -> str:
    """The order in which a format's rows lie in a checkpoint whose row order is given."""
    ordered = get(name).row_ordered and row_order == FASTDEPLOY_2_1
    return FASTDEPLOY_2_1 if ordered else PLAIN


def order_rows(weight: np.ndarray, name: str, row_order: str | None, axis: int = 0) -> np.ndarray:
    """Plain rows along `axis` -> the order in which the format stores them."""
    plain = stored_order(name, row_order) == PLAIN
    return weight if plain else permute_rows(weight, axis)


def decode(name: str, tensors: Tensors, dtype: str, row_order: str | None = PLAIN) -> np.ndarray:
    """Stored tensors -> float32 [K, N] with rows in plain order.

    Args:
        dtype: what an engine computes in ("bfloat16", "float16", "float32"): every value is
            rounded to it.
        row_order: of the checkpoint (row_order.py); plain leaves rows as they are stored.

    Raises:
        ValueError: for tensors that are not those of the format.
    """
    weight = get(name).decode_stored(tensors, dtype)
    return weight if stored_order(name, row_order) == PLAIN else unpermute_rows(weight)


def shape_problem(name: str, k: int, n: int) -> str | None:
    """Why a [k, n] matrix cannot be stored in this format, in plain words; None if it can."""
    f = get(name)
    if k % f.row_multiple:
        return f"{name} needs K (input size) a multiple of {f.row_multiple}, got {k}"
    if n % f.column_multiple:
        return f"{name} needs N (output size) a multiple of {f.column_multiple}, got {n}"
    return None


def stored_bits_per_weight(name: str, k: int, n: int) -> float:
    """Bits per weight including everything stored once a column."""
    total = 0
    for shape, dtype in tensor_specs(name, k, n).values():
        total += int(np.prod(shape)) * SAFETENSORS_DTYPES[dtype].itemsize * 8
    return total / (k * n)
