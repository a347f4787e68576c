# SPDX-License-Identifier: Apache-2.0
"""Encoders by name: which class encodes a format, with which search, on which device."""

from __future__ import annotations

from collections.abc import Iterable

from ..codec import formats, trellis
from ..host import default_threads
from . import paper
from .base import DEVICES, ENCODERS, PRESETS, MatrixEncoder
from .integer import IntegerEncoder
from .ldlq import Hessians, LdlqEncoder
from .paper import PaperEncoder
from .search import SearchEncoder
from .trellis import TrellisEncoder
from .trellis_ldlq import TrellisLdlqEncoder


def make_encoder(
    format: str,
    preset: str = "default",
    *,
    encoder: str = "search",
    threads: int | None = None,
    device: str = "cpu",
) -> MatrixEncoder:
    """A data-free encoder: for a CCQ format by `encoder` and `preset`, or for wint8 and wint4.

    `device` chooses where the search runs; the result is the same.

    Raises:
        ValueError: for an unknown format, preset, encoder or device, or an encoder that the format
            does not have.
        CcqError: for the device "gpu" without the GPU library.
    """
    threads = threads or default_threads()
    for what, value, known in (
        ("preset", preset, PRESETS),
        ("encoder", encoder, ENCODERS),
        ("device", device, DEVICES),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    kind = formats.FORMATS[format].kind if format in formats.FORMATS else None
    if kind is formats.Kind.INTEGER:
        return IntegerEncoder(format)
    if kind is not formats.Kind.CCQ:
        raise ValueError(f"no encoder for format {format!r}")
    problem = encoder_problem([format], encoder)
    if problem:
        raise ValueError(problem)
    if format == trellis.NAME:
        if device == "gpu":
            from .search_gpu import GpuTrellisEncoder

            return GpuTrellisEncoder(preset, threads)
        return TrellisEncoder(preset, threads)
    if encoder != "search":
        return PaperEncoder(format, literal=encoder == "paper-literal", threads=threads)
    if device == "gpu":
        from .search_gpu import GpuSearchEncoder

        return GpuSearchEncoder(format, preset, threads)
    return SearchEncoder(format, preset, threads)


def encoder_problem(names: Iterable[str], encoder: str) -> str | None:
    """Why an encoder cannot make one of the formats, in plain words; None if it can."""
    if encoder == "search":
        return None
    codes = (name for name in names if name in formats.CCQ_FORMATS)
    return next((f"the paper has no {name}" for name in codes if name not in paper.FORMATS), None)


def calibrated_encoder(
    preset: str, threads: int, hessians: Hessians, data_free: MatrixEncoder, device: str = "cpu"
) -> LdlqEncoder:
    """A calibrated encoder of the format of `data_free`; where it searches changes no byte.

    Factors of the statistics and metrics of the outputs are computed on the CPU either way.
    """
    if data_free.format == trellis.NAME:
        if device == "gpu":
            from .search_gpu import GpuTrellisLdlqEncoder

            return GpuTrellisLdlqEncoder(preset, threads, hessians, data_free)
        return TrellisLdlqEncoder(preset, threads, hessians, data_free)
    if device == "gpu":
        from .search_gpu import GpuLdlqEncoder

        return GpuLdlqEncoder(preset, threads, hessians, data_free)
    return LdlqEncoder(preset, threads, hessians, data_free)


def make_encoders(
    names: Iterable[str],
    preset: str = "default",
    *,
    encoder: str = "search",
    threads: int | None = None,
    device: str = "cpu",
    hessians: Hessians | None = None,
) -> dict[str, MatrixEncoder]:
    """One encoder for each of the formats; with `hessians`, calibrated where the format can be.

    Raises:
        ValueError, CcqError: as make_encoder.
    """
    threads = threads or default_threads()
    made: dict[str, MatrixEncoder] = {}
    for name in sorted(set(names)):
        made[name] = make_encoder(name, preset, encoder=encoder, threads=threads, device=device)
        if hessians is not None and formats.get(name).calibrated:
            made[name] = calibrated_encoder(preset, threads, hessians, made[name], device)
    return made
