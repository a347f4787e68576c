# SPDX-License-Identifier: Apache-2.0
"""Holding a checkpoint in Hugging Face's naming against what its own config.json promises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...checkpoint.entries import packed_tensors
from ...checkpoint.plan import LayerFormats, Plan, PlanOptions, make_plan
from ...checkpoint.planned import KEPT, PlannedTensor
from ...checkpoint.reader import PROVENANCE_KEY
from ...checkpoint.safetensors_io import DTYPES, TensorFolder
from ...checkpoint.source_tensors import KEPT_NAMING, expect, of_folder
from ...checkpoint.sources.locate import locate
from ...checkpoint.sources.scheme import SourceScheme
from ...codec.formats import EXPERT_FORMATS, WIDER_EXPERT_FORMATS
from ...codec.row_order import PLAIN
from ...errors import CcqError
from ...families.config import CONFIG_FILE, ModelConfig
from ..inspection import Inspection
from .config import QUANTIZATION, VERSION
from .layout import HuggingFace, packed_stem


class HuggingFaceInspection(Inspection):
    """A checkpoint whose experts are packed, and all else is as in its source."""

    engine = "vLLM"

    def expected_plan(self) -> Plan:
        where = self.folder / CONFIG_FILE
        entry = self.config.raw.get(QUANTIZATION)
        format, formats = read_entry(entry, where)
        self.scheme = SourceScheme.read(self.config.raw, where)
        self.source: TensorFolder | None = None
        try:
            self.source = TensorFolder(self.folder)
            packed = packed_tensors(self.source)
            found: list[str] = []
            self.config = of_folder(self.config, self.scheme, self.source, packed, found)
            self.problems += map(self.without_folder, found)
            self._check_prediction_layers()
        except CcqError as error:
            self.problems.append(self.without_folder(error))
            self.config = expect(self.config, self.scheme)
        layers = self._layers(formats, format)
        options = PlanOptions(
            HuggingFace(), format=format, layer_formats=LayerFormats(layers, "config.json")
        )
        return make_plan(self.config, options)

    def _check_prediction_layers(self) -> None:
        """Note that layers for multi-token prediction are missing as a whole.

        Outputs of families that keep others repeat what config.json said of a source without them;
        there the entry lists the layers' experts.
        """
        config = self.config
        if config.family.keeps_others or not config.num_nextn_predict_layers:
            return
        if not any(map(config.is_prediction, config.tensors.values())):
            key = config.family.mtp_keys[0]
            self.problems.append(
                f"{CONFIG_FILE}: {key}: {config.num_nextn_predict_layers}, but no tensor of such a"
                " layer is stored"
            )

    def _layers(self, formats: Mapping[str, str], default: str) -> dict[int, str]:
        """The format of every MoE layer; what the entry says too much or too little is noted."""
        modules = modules_of(self.config)
        where = f"{CONFIG_FILE}: {QUANTIZATION}.experts"
        for module in modules.keys() - formats.keys():
            self.problems.append(f"{where}: {module} is missing, which has routed experts")
        for module in formats.keys() - modules.keys():
            self.problems.append(f"{where}: {module}: the model has no such experts")
        return {layer: formats.get(module, default) for module, layer in modules.items()}

    def accepted(self, planned: PlannedTensor, name: str, dtype: str) -> tuple[str, ...]:
        # Without the whole folder it is not known how the source held what is kept.
        return tuple(DTYPES) if planned.format == KEPT and self.source is None else (dtype,)

    def config_problems(self) -> list[str]:
        recorded = self.config.raw.get(PROVENANCE_KEY)
        found = {QUANTIZATION: self.config.raw[QUANTIZATION].get("row_order")}
        if isinstance(recorded, dict) and recorded.get("row_order") is not None:
            found[PROVENANCE_KEY] = recorded["row_order"]
        return [
            f"{CONFIG_FILE}: {key}.row_order is {order!r}, must be {PLAIN!r}"
            for key, order in found.items()
            if order != PLAIN
        ]

    def value_problems(self, planned: PlannedTensor, rank: int) -> Iterator[str]:
        yield from super().value_problems(planned, rank)
        if planned.format != KEPT or self.source is None:
            return
        for part in planned.tensor.sources[KEPT_NAMING].parts:
            try:
                weight = locate(self.source, self.scheme, part)
                if weight is None or weight.is_float:
                    continue
                wrong = weight.nonfinite()
            except CcqError as error:
                problem = self.without_folder(error)
                if problem not in self.problems:  # opening has said it
                    yield problem
                continue
            if wrong is not None:
                yield f"{part.name}: {wrong.sum()} values are NaN or infinite once scaled"


def modules_of(config: ModelConfig) -> dict[str, int]:
    """Module of routed experts, by its name on disk -> its layer."""
    return {
        packed_stem(tensor).rsplit(".", 2)[0]: tensor.layer
        for tensor in config.tensors.values()
        if tensor.is_expert and tensor.layer is not None
    }


def read_entry(entry: Any, where: object) -> tuple[str, dict[str, str]]:
    """The experts' main format, and the format of every module of experts.

    Raises:
        CcqError: for an entry that is not of this structure, naming its key.
    """

    def fail(key: str, problem: str) -> CcqError:
        return CcqError(f"{where}: {QUANTIZATION}.{key}: {problem}")

    if entry.get("version") != VERSION:
        raise fail(
            "version", f"{entry.get('version')!r} is not known here; this package reads {VERSION}"
        )
    format, experts = entry.get("format"), entry.get("experts")
    if format not in EXPERT_FORMATS:
        raise fail("format", f"{format!r} is not one of {', '.join(EXPERT_FORMATS)}")
    if not isinstance(experts, dict) or not experts:
        raise fail("experts", "must map modules of experts to their formats")
    known = (*EXPERT_FORMATS, *WIDER_EXPERT_FORMATS)
    for module, found in experts.items():
        if found not in known:
            raise fail("experts", f"{module}: {found!r} is not one of {', '.join(known)}")
    return format, experts
