# SPDX-License-Identifier: Apache-2.0
"""How a source holds every tensor of a model, by its files or by what config.json lets expect.

What is not quantized passes through a conversion in these very tensors, so a plan needs to know
them: names, dtypes, and the scales beside FP8 values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CcqError
from ..families.config import CONFIG_FILE, ModelConfig
from ..families.tensor import Role, Source, Storage, Tensors, TensorSpec, starred
from .safetensors_format import FLOAT_DTYPES, StoredSpec, tensor_bytes
from .safetensors_io import TensorFolder
from .sources.locate import FP8_DTYPE, SCALE_SUFFIXES, expected, locate
from .sources.scheme import SourceScheme
from .sources.stored import StoredWeight

# The naming in which tensors are kept.
KEPT_NAMING = "pt"
_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Routers' biases decide between experts whose scores are close: all families hold them so.
_EXACT = "F32"


def expect(config: ModelConfig, scheme: SourceScheme) -> ModelConfig:
    """The config with every tensor as a source without files is expected to hold it."""
    tensors = (_expected(config, scheme, tensor) for tensor in config.tensors.values())
    return replace(config, of_source=Tensors(tensors))


def _expected(config: ModelConfig, scheme: SourceScheme, tensor: TensorSpec) -> TensorSpec:
    own = _EXACT if tensor.role is Role.CORRECTION_BIAS else _FLOATS[config.dtype]
    specs = [
        spec
        for part in tensor.sources[KEPT_NAMING].parts
        for spec in expected(scheme, part, own, tensor.is_linear)
    ]
    return _with(tensor, specs, sum(tensor_bytes(dtype, shape) for _, dtype, shape in specs))


def _with(tensor: TensorSpec, specs: Iterable[StoredSpec], nbytes: int) -> TensorSpec:
    kept = () if tensor.is_expert else tuple(specs)
    return replace(tensor, kept=kept, source_bytes=nbytes)


def complete(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with every tensor as the folder's files hold it; as expected where there are none.

    Raises:
        CcqError: for a quantization of the source, or a stored tensor, that is not read.
    """
    scheme = SourceScheme.read(config.raw, folder / CONFIG_FILE)
    try:
        tensors = TensorFolder(folder, config.is_dropped)
    except CcqError:
        if config.family.discover:
            raise  # without files there is nothing to find
        return expect(config, scheme)  # opening the checkpoint says what is wrong
    return of_folder(config, scheme, tensors, {})


def of_folder(
    config: ModelConfig,
    scheme: SourceScheme,
    tensors: TensorFolder,
    packed: Mapping[str, Any],
    problems: list[str] | None = None,
) -> ModelConfig:
    """The config with every tensor as the files hold it, and with those that it does not name.

    Optional tensors that are not there are left out, and layers for multi-token prediction of which
    nothing is there. Whatever else is missing stays, for the reader to complain about.

    Args:
        packed: what the names of packed matrices begin with -> their tensors by suffix.
        problems: gets what is wrong with single tensors, which then are as expected.

    Raises:
        CcqError: for a tensor that is not read, where there are no `problems` to add it to.
    """
    if config.family.discover:
        shapes = {name: tensors.info(name).shape for name in tensors.names()}
        config = config.family.discover(config, shapes)
    matrices = {stem for stem, found in packed.items() if "quant_weight" in found}
    reading = _Reading(config, scheme, tensors, matrices, problems)
    reading.lonely = {stem: set(packed[stem].values()) for stem in packed.keys() - matrices}
    specs = list(reading.named())
    if config.family.keeps_others:
        specs += reading.others()
    return replace(config, of_source=Tensors(specs))


class _Reading:
    """The tensors of one folder, and which of them have been claimed."""

    def __init__(
        self,
        config: ModelConfig,
        scheme: SourceScheme,
        tensors: TensorFolder,
        packed: set[str],
        problems: list[str] | None,
    ) -> None:
        self.config, self.scheme, self.tensors, self.packed = config, scheme, tensors, packed
        self.problems = problems
        self.naming = config.family.detect_naming(tensors.names(), tensors.folder).name
        self.used: set[str] = set()
        # What names begin with -> tensors named like parts of a packed matrix without quant_weight.
        self.lonely: dict[str, set[str]] = {}

    def named(self) -> Iterator[TensorSpec]:
        """The tensors that the family names."""
        found = [(tensor, self._parts(tensor)) for tensor in self.config.tensors.values()]
        # A layer for multi-token prediction is there as a whole or not at all. What such layers
        # share has no layer: it is there with any of them, and then all of them are.
        is_prediction = self.config.is_prediction
        there = [tensor for tensor, parts in found if parts is None or any(parts)]
        begun = {tensor.layer for tensor in there if is_prediction(tensor)}
        for tensor, parts in found:
            if parts is None:  # packed
                yield tensor
            elif any(parts):
                yield self._held(tensor, [part for part in parts if part is not None])
            elif not tensor.optional and (
                not is_prediction(tensor)
                or tensor.layer in begun
                or (begun if tensor.layer is None else None in begun)
            ):
                yield _expected(self.config, self.scheme, tensor)  # and missing

    def _parts(self, tensor: TensorSpec) -> list[StoredWeight | None] | None:
        storage = tensor.sources[self.naming]
        if tensor.is_linear and {storage.packed, storage.packed_here} & self.packed:
            return None
        return [self._located(part) for part in storage.parts]

    def _located(self, part: Source) -> StoredWeight | None:
        try:
            return locate(self.tensors, self.scheme, part)
        except CcqError as error:
            if self.problems is None:
                raise
            self.problems.append(str(error))
            self.used.update((part.name, *part.aliases))
            return None

    def _held(self, tensor: TensorSpec, parts: list[StoredWeight]) -> TensorSpec:
        self.used.update(name for part in parts for name in part.names)
        nbytes = sum(part.nbytes for part in parts)
        if self.naming == KEPT_NAMING:
            return _with(tensor, (spec for part in parts for spec in part.specs), nbytes)
        dtype = parts[0].dtype if parts[0].is_float else "F32"
        renamed = tensor.sources[KEPT_NAMING].parts
        return _with(tensor, ((part.name, dtype, part.shape) for part in renamed), nbytes)

    def others(self) -> Iterator[TensorSpec]:
        """The tensors that the family does not name, but for what belongs to its experts."""
        lonely = self._lonely_parts()
        for name in sorted(self.tensors.names()):
            if name in lonely:
                continue  # the family's matrix is reported as missing
            if name in self.used or self._is_packed(name) or self.config.family.is_mine(name):
                continue
            if any(
                name.endswith(suffix) and name.removesuffix(suffix) in self.tensors
                for suffix in SCALE_SUFFIXES
            ):
                continue  # beside the values that it belongs to
            yield self._other(name)

    def _lonely_parts(self) -> set[str]:
        """Those of the lonely tensors that would belong to a matrix which the family names."""
        if not self.lonely:
            return set()
        storages = [t.sources[self.naming] for t in self.config.tensors.values() if t.is_linear]
        stems = {stem for s in storages for stem in (s.packed, s.packed_here)}
        return {name for stem, names in self.lonely.items() if stem in stems for name in names}

    def _is_packed(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.packed

    def _other(self, name: str) -> TensorSpec:
        info = self.tensors.info(name)
        source = Source(name, info.shape)
        spec = TensorSpec(name, starred(name), Role.OTHER, info.shape, name)
        readable = info.dtype in FLOAT_DTYPES or (info.dtype == FP8_DTYPE and len(info.shape) == 2)
        part = self._located(source) if readable else None
        if part is None:
            kept: tuple[StoredSpec, ...] = ((name, info.dtype, info.shape),)
            parts: tuple[Source, ...] = ()
        else:
            kept, parts = part.specs, (source,)
        storage = Storage(parts, False, name.removesuffix(".weight"))
        nbytes = sum(tensor_bytes(dtype, shape) for _, dtype, shape in kept)
        return replace(spec, sources={self.naming: storage}, kept=kept, source_bytes=nbytes)
