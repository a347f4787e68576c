# SPDX-License-Identifier: Apache-2.0
"""Finding a tensor of the model among the stored ones, in whatever numeric format it is stored."""

from __future__ import annotations

from ...codec import int4
from ...codec.block_scales import Block, grid
from ...errors import CcqError
from ...families.tensor import Source, Stacked
from ..safetensors_format import FLOAT_DTYPES, StoredSpec
from ..safetensors_io import TensorFolder
from .scheme import Kind, SourceScheme
from .stored import FloatWeight, Fp8Weight, Int4Weight, Region, StoredWeight

# What is added to the name of FP8 values for that of their scales.
SCALE_SUFFIXES = ("_scale_inv", "_scale")
FP8_DTYPE = "F8_E4M3"
# What an engine divides inputs by before it rounds them to FP8; packed experts have no use for it.
INPUT_SCALE = "input_scale"
# Bytes without a float type are UE8M0.
SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0", "U8")
PACKED, PACKED_SCALE, PACKED_SHAPE = "weight_packed", "weight_scale", "weight_shape"
ZERO_POINT, GROUP_INDEX = "weight_zero_point", "weight_g_idx"
_WEIGHT = ".weight"


def locate(tensors: TensorFolder, scheme: SourceScheme, source: Source) -> StoredWeight | None:
    """How a source tensor is stored, with every shape and dtype checked; None: it is not there.

    Looked for are, in this order, the tensor itself (float, or FP8 with its scales), its packed
    INT4 form, and its part of a stack.

    Raises:
        CcqError: naming the file and the tensor whose shape, dtype or companion is not right.
    """
    for name in (source.name, *source.aliases):
        if name in tensors:
            _check_single(tensors, source, name)
            _check_shape(tensors, name, source.shape)
            return _plain_or_fp8(tensors, scheme, Region(tensors, name))
    stem = source.name.removesuffix(_WEIGHT)
    if f"{stem}.{PACKED}" in tensors:
        _check_single(tensors, source, f"{stem}.{PACKED}")
        return _int4(tensors, scheme, stem, source.shape)
    if source.stacked is not None and source.stacked.name in tensors:
        return _stacked(tensors, scheme, source.stacked)
    return None


def _check_single(tensors: TensorFolder, source: Source, found: str) -> None:
    """Refuse a weight that is stored in a second form too: which one is right cannot be told."""
    places = [f"{source.name.removesuffix(_WEIGHT)}.{PACKED}"]
    if source.stacked is not None:
        places.append(source.stacked.name)
    for name in places:
        if name != found and name in tensors:
            raise CcqError(
                f"{tensors.path_of(found)}: {found}: is there, and {name}, which holds the same"
                " weight, is there as well; the files of two checkpoints are mixed"
            )


def expected(
    scheme: SourceScheme, source: Source, dtype: str, linear: bool
) -> tuple[StoredSpec, ...]:
    """The stored tensors that config.json alone lets expect of a source tensor.

    Args:
        dtype: of tensors that are not quantized.
        linear: whether it is the matrix of a linear layer, which a scheme can speak of.
    """
    name, shape = source.name, source.shape
    stem = name.removesuffix(_WEIGHT)
    part = scheme.kind_of(stem) if linear and len(shape) == 2 else None
    if part is None:
        return ((name, dtype, shape),)
    rows, columns = shape
    block = (part.block[0] or rows, part.block[1] or columns)
    scales = grid((rows, columns), block)
    if part.kind is Kind.FP8:
        return ((name, FP8_DTYPE, shape), (name + scheme.scale_suffix, "F32", scales))
    return (
        (f"{stem}.{PACKED}", "I32", (rows, int4.words(columns))),
        (f"{stem}.{PACKED_SCALE}", "BF16", scales),
        (f"{stem}.{PACKED_SHAPE}", "I64", (2,)),
    )


def _plain_or_fp8(tensors: TensorFolder, scheme: SourceScheme, values: Region) -> StoredWeight:
    scale = next((s for s in (values.name + x for x in SCALE_SUFFIXES) if s in tensors), None)
    where = f"{tensors.path_of(values.name)}: {values.name}"
    if values.dtype in FLOAT_DTYPES:
        if scale is not None:
            raise CcqError(
                f"{where}: has dtype {values.dtype}, but {scale} is there as well, which only FP8"
                " values have; the files of two checkpoints are mixed"
            )
        return FloatWeight(values)
    if values.dtype != FP8_DTYPE or len(values.shape) != 2:
        known = ", ".join((*FLOAT_DTYPES, *([FP8_DTYPE] if len(values.shape) == 2 else [])))
        raise CcqError(f"{where}: has dtype {values.dtype}, not one of {known}")
    if scale is None:
        raise CcqError(
            f"{where}: is {FP8_DTYPE}, but its scales {values.name + scheme.scale_suffix} are"
            " missing; the download is not complete"
        )
    shape = (values.shape[0], values.shape[1])
    block = _block(tensors, scheme, Kind.FP8, values.name, scale, shape)
    inputs = f"{values.name.removesuffix(_WEIGHT)}.{INPUT_SCALE}"
    beside = (Region(tensors, inputs),) if inputs in tensors else ()
    return Fp8Weight(values, Region(tensors, scale), block, beside=beside)


def _stacked(tensors: TensorFolder, scheme: SourceScheme, stacked: Stacked) -> StoredWeight:
    name = stacked.name
    _check_shape(tensors, name, stacked.shape)
    rows = stacked.rows or slice(0, stacked.shape[1])
    values = Region(tensors, name, stacked.index, rows)
    where = f"{tensors.path_of(name)}: {name}"
    scale = next((s for s in (name + x for x in SCALE_SUFFIXES) if s in tensors), None)
    if values.dtype in FLOAT_DTYPES and scale is None:
        return FloatWeight(values)
    if values.dtype != FP8_DTYPE or scale is None:
        problem = f"and {scale} beside it" if scale else "without scales"
        raise CcqError(
            f"{where}: has dtype {values.dtype} {problem}; read are {', '.join(FLOAT_DTYPES)}"
            f" without scales and {FP8_DTYPE} with {name + scheme.scale_suffix}"
        )
    experts, height, width = stacked.shape
    block = _block(tensors, scheme, Kind.FP8, name, scale, (height, width), experts)
    covered = slice(rows.start // block[0], -(-rows.stop // block[0]))
    scales = Region(tensors, scale, stacked.index, covered)
    return Fp8Weight(values, scales, block, rows.start % block[0])


def _int4(
    tensors: TensorFolder, scheme: SourceScheme, stem: str, shape: tuple[int, ...]
) -> StoredWeight:
    name = f"{stem}.{PACKED}"
    where = f"{tensors.path_of(name)}: {name}"
    if len(shape) != 2:
        raise CcqError(f"{where}: is packed, but the tensor is no matrix")
    rows, columns = shape
    _check(tensors, name, ("I32",), (rows, int4.words(columns)))
    needed = f"{stem}.{PACKED_SCALE}", f"{stem}.{PACKED_SHAPE}"
    for part in needed:
        if part not in tensors:
            raise CcqError(
                f"{where}: is there, but {part} is missing; the download is not complete"
            )
    if f"{stem}.{GROUP_INDEX}" in tensors:
        raise CcqError(f"{where}: has {GROUP_INDEX}; weights in activation order are not read")
    scale, stated = needed
    _check(tensors, stated, ("I32", "I64"), (2,))
    block = _block(tensors, scheme, Kind.INT4, name, scale, (rows, columns))
    zero = f"{stem}.{ZERO_POINT}"
    points = None
    if zero in tensors:
        groups = grid((rows, columns), block)
        if groups[0] != rows:
            raise CcqError(f"{where}: has {ZERO_POINT}, which is read only with a scale per row")
        _check(tensors, zero, ("I32",), (int4.words(rows), groups[1]))
        points = Region(tensors, zero)
    regions = Region(tensors, name), Region(tensors, scale), Region(tensors, stated)
    return Int4Weight(*regions, points, (rows, columns), block)


def _block(
    tensors: TensorFolder,
    scheme: SourceScheme,
    kind: Kind,
    name: str,
    scale: str,
    shape: tuple[int, int],
    stacked: int | None = None,
) -> Block:
    """The block size by which the stored scales fit a matrix, out of those that are stated."""
    info = tensors.info(scale)
    where = f"{tensors.path_of(scale)}: {scale}"
    allowed = SCALE_DTYPES if kind is Kind.FP8 else FLOAT_DTYPES
    if info.dtype not in allowed:
        raise CcqError(f"{where}: has dtype {info.dtype}, not one of {', '.join(allowed)}")
    stated = scheme.blocks(kind, shape)
    if not stated:
        raise CcqError(
            f"{tensors.path_of(name)}: {name} is stored as {kind.value}, of which {scheme.where}"
            " says nothing; config.json must have the quantization_config of these files"
        )
    found = _fitting(info.shape, stated, shape, stacked)
    if found is None:
        sizes = " or ".join(f"{rows}x{columns}" for rows, columns in sorted(stated))
        grids = " or ".join(str([*_lead(stacked), *grid(shape, b)]) for b in sorted(stated))
        raise CcqError(
            f"{where}: has shape {list(info.shape)}; blocks of {sizes} in {list(shape)} need"
            f" {grids}"
        )
    return found


def _fitting(
    stored: tuple[int, ...], stated: set[Block], shape: tuple[int, int], stacked: int | None
) -> Block | None:
    for block in sorted(stated):
        rows, columns = grid(shape, block)
        accepted = [(*_lead(stacked), rows, columns)]
        if stacked is None and (rows, columns) == (1, 1):
            accepted += [(), (1,)]  # of a matrix with one scale
        elif stacked is None and columns == 1:
            accepted.append((rows,))  # a scale per row
        if stored in accepted:
            return block
    return None


def _lead(stacked: int | None) -> tuple[int, ...]:
    return () if stacked is None else (stacked,)


def _check_shape(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> None:
    found = tensors.info(name).shape
    if found != shape:
        turned = " (transposed: two layouts are mixed)" if found == shape[::-1] else ""
        raise CcqError(
            f"{tensors.path_of(name)}: {name}: has shape {list(found)}, config.json calls for"
            f" {list(shape)}{turned}"
        )


def _check(
    tensors: TensorFolder, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    info = tensors.info(name)
    if info.dtype not in dtypes or info.shape != shape:
        raise CcqError(
            f"{tensors.path_of(name)}: {name}: is {info.dtype} {list(info.shape)}, not"
            f" {' or '.join(dtypes)} {list(shape)}"
        )
