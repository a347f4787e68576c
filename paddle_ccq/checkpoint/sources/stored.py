# SPDX-License-Identifier: Apache-2.0
"""A matrix as it lies in a source's files: its tensors, its values, and what is wrong in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...codec import block_scales, fp8, int4
from ...codec.block_scales import Block
from ...errors import CcqError
from ...host import on_stripes
from ..safetensors_format import StoredSpec, tensor_bytes
from ..safetensors_io import TensorFolder

FLOAT32 = np.dtype(np.float32)
# (rows, matrix of these rows) -> None: writes into the matrix.
Decode = Callable[[slice, np.ndarray], object]
# Rows that are worth a thread's while.
_ROWS = 64


@dataclass(frozen=True)
class Region:
    """A stored tensor of two dimensions, or rows of one entry of a tensor of three."""

    tensors: TensorFolder
    name: str
    index: int | None = None
    rows: slice | None = None  # of the entry; both are None for a whole tensor

    @property
    def label(self) -> str:
        """The name for messages, with the expert's place in a stack."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    @property
    def where(self) -> str:
        """File and name for messages."""
        return f"{self.tensors.path_of(self.name)}: {self.label}"

    @property
    def dtype(self) -> str:
        """Its safetensors dtype, such as BF16 or F8_E4M3."""
        return self.tensors.info(self.name).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is read."""
        stored = self.tensors.info(self.name).shape
        return stored if self.rows is None else (self.rows.stop - self.rows.start, stored[2])

    @property
    def nbytes(self) -> int:
        """Bytes of what is read, not of the whole stack that it lies in."""
        return tensor_bytes(self.dtype, self.shape)

    def read(self) -> np.ndarray:
        """The values in their stored dtype; nothing else is read from the file."""
        if self.index is None or self.rows is None:
            return self.tensors.read(self.name)
        return self.tensors.read_rows(self.name, self.index, self.rows)


class StoredWeight:
    """A tensor of a source in whatever numeric format it has.

    Attributes:
        regions: every stored tensor, or part of one, that it is read from; its values come first.
    """

    regions: tuple[Region, ...]

    @property
    def values(self) -> Region:
        """The region of the values, without scales."""
        return self.regions[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The on-disk tensors, scales included."""
        return tuple(region.name for region in self.regions)

    @property
    def specs(self) -> tuple[StoredSpec, ...]:
        """Name, dtype and shape of these tensors as they are stored, whole."""
        infos = [(name, self.values.tensors.info(name)) for name in self.names]
        return tuple((name, info.dtype, info.shape) for name, info in infos)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it; of a stacked tensor its part."""
        return sum(region.nbytes for region in self.regions)

    @property
    def dtype(self) -> str:
        """Safetensors dtype of the stored values."""
        return self.values.dtype

    @property
    def is_float(self) -> bool:
        """Whether the stored values are those of the model, without scales."""
        return False

    def read(self) -> np.ndarray:
        """The weight [out, in]: floats in their stored dtype, everything else in float32.

        Raises:
            CcqError: for a scale that no weight can have, naming the tensor and its block.
        """
        raise NotImplementedError

    def read_into(self, out: np.ndarray) -> None:
        """Like read(), into a float32 matrix [out, in]."""
        out[...] = self.read()

    def nonfinite(self) -> np.ndarray | None:
        """Which values are NaN or infinite, as a mask [out, in]; None if none is.

        Raises:
            CcqError: as read() does.
        """
        wrong = ~np.isfinite(self.read())
        return wrong if wrong.any() else None

    def nonfinite_place(self) -> str | None:
        """Where the first NaN or infinity lies, in words, or None; reads the weight again."""
        return None


class FloatWeight(StoredWeight):
    """BF16, F16 or F32."""

    def __init__(self, values: Region) -> None:
        self.regions = (values,)

    @property
    def is_float(self) -> bool:
        return True

    def read(self) -> np.ndarray:
        return self.values.read()


class _Scaled(StoredWeight):
    """A matrix whose values share scales by blocks."""

    shape: tuple[int, int]
    block: Block
    scales: Region
    first_row = 0  # the place of the first row in its block

    def _decoder(self) -> Decode:
        """What writes the values of some rows, without scales, into a float32 matrix of them."""
        raise NotImplementedError

    def read(self) -> np.ndarray:
        result = np.empty(self.shape, FLOAT32)
        self._read_into(result)
        return result

    def read_into(self, out: np.ndarray) -> None:
        if out.dtype == FLOAT32 and out.flags.c_contiguous:
            self._read_into(out)
        else:
            out[...] = self.read()

    def _read_into(self, out: np.ndarray) -> None:
        decode = self._decoder()
        on_stripes(lambda rows: decode(rows, out[rows]), len(out), _ROWS)
        scales = self._read_scales()
        wrong = block_scales.wrong_scale(out, scales, self.block, self.first_row)
        if wrong is not None:
            raise CcqError(
                f"{self.scales.where}: the scale {scales[wrong]:g} of {self.place(wrong)} is no"
                " positive number; the file is damaged"
            )
        on_stripes(lambda rows: self._scale(out[rows], scales, rows), len(out), _ROWS)

    def _scale(self, values: np.ndarray, scales: np.ndarray, rows: slice) -> None:
        with np.errstate(over="ignore"):  # whoever stores the weight looks for infinities
            block_scales.multiply(values, scales, self.block, self.first_row + rows.start)

    def nonfinite(self) -> np.ndarray | None:
        scales = self._read_scales()
        if not np.all(np.isfinite(scales) & (scales > 0)):
            return super().nonfinite()  # only values tell whether a scale of 0 is wrong
        # Some rows at a time, so that the weight is never whole in float32.
        decode, wrong = self._decoder(), np.empty(self.shape, bool)

        def look(rows: slice) -> bool:
            for begin in range(rows.start, rows.stop, _ROWS):
                part = slice(begin, min(begin + _ROWS, rows.stop))
                values = np.empty((part.stop - part.start, self.shape[1]), FLOAT32)
                decode(part, values)
                self._scale(values, scales, part)
                np.logical_not(np.isfinite(values), out=wrong[part])
            return bool(wrong[rows].any())

        return wrong if any(on_stripes(look, len(wrong), _ROWS)) else None

    def _read_scales(self) -> np.ndarray:
        """Scales [row blocks, column blocks] of the blocks that the matrix touches."""
        grid = block_scales.grid((self.first_row + self.shape[0], self.shape[1]), self.block)
        return block_scales.scale_values(self.scales.read()).reshape(grid)

    def place(self, block: tuple[int, int]) -> str:
        """A block of the matrix in words; in a stack its place in the expert's whole matrix."""
        rows, columns = block_scales.block_slices(block, self.block, self.shape, self.first_row)
        above = 0 if self.values.rows is None else self.values.rows.start
        return (
            f"block [{above // self.block[0] + block[0]}, {block[1]}] (rows {above + rows.start} to"
            f" {above + rows.stop - 1}, columns {columns.start} to {columns.stop - 1}) of"
            f" {self.values.label}"
        )

    def nonfinite_place(self) -> str | None:
        found = block_scales.first_nonfinite_block(self.read(), self.block, self.first_row)
        return None if found is None else self.place(found)


class Fp8Weight(_Scaled):
    """E4M3 values; the weight is value x scale, rounded once, in float32.

    `beside` is stored with them and is no part of the weight: the scale of its inputs.
    """

    def __init__(
        self,
        values: Region,
        scales: Region,
        block: Block,
        first_row: int = 0,
        beside: tuple[Region, ...] = (),
    ) -> None:
        self.regions = (values, scales, *beside)
        self.scales, self.block, self.first_row = scales, block, first_row
        self.shape = (values.shape[0], values.shape[1])

    def _decoder(self) -> Decode:
        codes = self.values.read()
        return lambda rows, out: fp8.decode_e4m3(codes[rows], out)


class Int4Weight(_Scaled):
    """Integers from -8 to 7 in words; the weight is (value - zero point) x scale, in float32."""

    def __init__(
        self,
        packed: Region,
        scales: Region,
        stated_shape: Region,
        zero_points: Region | None,
        shape: tuple[int, int],
        block: Block,
    ) -> None:
        optional = () if zero_points is None else (zero_points,)
        self.regions = (packed, scales, stated_shape, *optional)
        self.scales, self.stated_shape, self.zero_points = scales, stated_shape, zero_points
        self.shape, self.block = shape, block

    def _decoder(self) -> Decode:
        stated = self.stated_shape.read().tolist()
        if stated != list(self.shape):
            raise CcqError(
                f"{self.stated_shape.where}: says {stated}, config.json calls for"
                f" {list(self.shape)}"
            )
        packed, points = self.values.read(), None
        if self.zero_points is not None:
            points = int4.unpack_columns(self.zero_points.read(), self.shape[0])
        groups = np.arange(self.shape[1]) // self.block[1]

        def decode(rows: slice, out: np.ndarray) -> None:
            out[...] = int4.unpack(packed[rows], self.shape[1])
            if points is not None:
                out -= points[rows][:, groups]

        return decode
