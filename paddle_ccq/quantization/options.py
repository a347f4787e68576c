# SPDX-License-Identifier: Apache-2.0
"""All choices of a quantization: one record, which flags, keywords and defaults come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

from ..allocation.session import AllocationRequest
from ..allocation.session import make_request as make_allocation
from ..calibration.session import CalibrationRequest
from ..calibration.session import make_request as make_calibration
from ..checkpoint.plan import PlanOptions
from ..checkpoint.rules import Rule, load_rules
from ..checkpoint.safetensors_format import parse_size
from ..codec.formats import DEFAULT_EXPERTS
from ..encoder.base import DEVICES, ENCODERS, PRESETS
from ..errors import CcqError
from ..families.config import ModelConfig
from ..families.registry import ASKED
from ..host import thread_count
from ..targets.fastdeploy.layout import DEFAULT_LAYOUT
from ..targets.outputs import HUGGINGFACE, TargetChoice

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class QuantizeOptions:
    """The keywords of `quantize`; each is the command's flag of the same name.

    Attributes:
        format: of routed experts, one of codec.formats.EXPERT_FORMATS.
        target: whose layout is written, one of targets.outputs.TARGETS; None: FastDeploy's for
            ERNIE-4.5 text models, Hugging Face's for all others.
        family: "generic" for a model of no known family, whose experts are found by their names.
        preset, encoder: time against error; the search, or the paper's algorithm.
        calibration: a file of text or a data set's hub id; None encodes without data.
        calibration_tokens, calibration_weights: see calibration/settings.py.
        wint4_end_layer: MoE layers up to it are wint4, -1 for none; None for the default.
        fastdeploy_layout: row order of WINT2, "2.1" or "2.0".
        tensor_parallel_size: number of rank folders; 1 writes one folder.
        rules: a YAML file of {match: GLOB, format: NAME}.
        allocate: a size such as "2.3bpw" or "100GB" that formats of MoE layers are chosen for.
        sensitivity: a file of costs for `allocate`; None measures them in this run.
        allow_plugin_layout: wint4 in any layers, which FastDeploy needs our plugin for.
        drop_mtp: leave out the layers for multi-token prediction.
        max_shard_size: bytes of one file, or a size such as "5GB".
        threads: of the encoder; None takes all processors. Bytes do not depend on it.
        device: "cpu" or "gpu"; where codes are searched. Bytes do not depend on it.
        source, revision: hub to download from, and its branch, tag or commit.
        restart: throw away an interrupted run's work.
        allow_nonfinite: set NaN, infinity and what bfloat16 cannot hold to 0.
        log: a file of JSON lines, one a matrix; None for OUTPUT.log.jsonl.
        quiet: no progress, no messages, no summary.

    Raises:
        CcqError: naming the flag whose value is not one of those allowed.
    """

    format: str = DEFAULT_EXPERTS
    target: str | None = None
    family: str | None = None
    preset: str = "default"
    encoder: str = "search"
    calibration: PathLike | None = None
    calibration_tokens: str | int | None = None
    calibration_weights: str | None = None
    wint4_end_layer: int | None = None
    fastdeploy_layout: str = DEFAULT_LAYOUT
    tensor_parallel_size: int = 1
    rules: PathLike | None = None
    allocate: str | int | None = None
    sensitivity: PathLike | None = None
    allow_plugin_layout: bool = False
    drop_mtp: bool = False
    max_shard_size: str | int = "5GB"
    threads: int | None = None
    device: str = "cpu"
    source: str | None = None
    revision: str | None = None
    restart: bool = False
    allow_nonfinite: bool = False
    log: PathLike | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("--preset", self.preset, PRESETS),
            ("--encoder", self.encoder, ENCODERS),
            ("--device", self.device, DEVICES),
        ):
            if value not in allowed:
                raise CcqError(f"{flag} {value}: not one of {', '.join(allowed)}")
        thread_count(self.threads)
        if self.family not in (None, *ASKED):
            raise CcqError(f"--family {self.family}: not one of {', '.join(ASKED)}")
        _ = self.target_choice

    @property
    def target_choice(self) -> TargetChoice:
        """What is asked of the target."""
        return TargetChoice(
            self.target,
            self.fastdeploy_layout,
            self.allow_plugin_layout,
            self.tensor_parallel_size,
        )

    @cached_property
    def read_rules(self) -> tuple[Rule, ...]:
        """The rules of the file, which is read here."""
        return load_rules(self.rules) if self.rules is not None else ()

    def plan(self, config: ModelConfig) -> PlanOptions:
        """The options that decide the plan of a model."""
        size = self.max_shard_size
        return PlanOptions(
            target=self.target_choice.of(config),
            format=self.format,
            wint4_end_layer=self.wint4_end_layer,
            tensor_parallel_size=self.tensor_parallel_size,
            rules=self.read_rules,
            max_shard_bytes=size if isinstance(size, int) else parse_size(size),
        )

    def calibration_request(self, fetch: bool) -> CalibrationRequest | None:
        """The calibration request; with `fetch` a data set is fetched from its hub."""
        return make_calibration(
            self.calibration, self.calibration_tokens, self.calibration_weights, fetch=fetch
        )

    def allocation_request(self) -> AllocationRequest | None:
        """The allocation request."""
        return make_allocation(
            self.allocate,
            self.format,
            self.read_rules,
            self.sensitivity,
            # Only FastDeploy has a rule on which layers may be wint4.
            self.allow_plugin_layout or self.target == HUGGINGFACE,
            self.wint4_end_layer,
            self.calibration is not None,
        )
