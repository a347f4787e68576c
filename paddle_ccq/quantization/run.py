# SPDX-License-Identifier: Apache-2.0
"""Encoding and writing a whole checkpoint, from where the journal ends to the rename."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import reporting
from ..calibration.session import output_errors
from ..checkpoint.companions import read_companions
from ..checkpoint.convert import Converter
from ..checkpoint.journal import make_fingerprint
from ..checkpoint.plan import Plan
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import CheckpointWriter, Workplace, json_bytes
from ..codec.formats import CCQ_FORMATS
from ..encoder import factory
from ..encoder.base import MatrixEncoder
from ..encoder.ldlq import Hessians
from ..errors import CcqError
from ..families.config import CONFIG_FILE
from ..ops import gpu_library
from ..targets.outputs import OUTPUTS
from ..targets.recipe import Recipe
from ..units import gigabytes
from ..version import __version__
from .options import QuantizeOptions


@dataclass(frozen=True)
class QuantizeResult:
    """The result of a run; `records` has an entry per matrix, `seconds` the total and its parts."""

    output: Path | None
    plan: Plan
    records: list[dict[str, Any]]
    seconds: dict[str, float]
    peak_rss: int


def check_devices(plan: Plan, options: QuantizeOptions) -> None:
    """Say at once that the compiled core or the GPU library is missing, where it is needed.

    Raises:
        CcqError: saying what to build.
    """
    used = {planned.format for planned in plan.tensors if planned.quantized}
    problem = factory.encoder_problem(sorted(used), options.encoder)
    if problem:
        raise CcqError(f"--encoder {options.encoder}: {problem}; leave the flag out")
    if options.encoder == "search" and used & set(CCQ_FORMATS):
        from .. import compiled  # noqa: F401
    if options.device == "gpu":
        if options.encoder != "search":
            raise CcqError("--device gpu: only --encoder search runs on a GPU")
        gpu_library.require()


def encoders_for(
    plan: Plan, options: QuantizeOptions, hessians: Hessians | None = None
) -> dict[str, MatrixEncoder]:
    """One encoder for each format that occurs in the plan; see factory.make_encoders."""
    check_devices(plan, options)
    return factory.make_encoders(
        (planned.format for planned in plan.tensors if planned.quantized),
        options.preset,
        encoder=options.encoder,
        threads=options.threads,
        device=options.device,
        hessians=hessians,
    )


class QuantizeRun:
    """One run over a whole checkpoint, from the journal's end to the rename."""

    def __init__(
        self,
        plan: Plan,
        options: QuantizeOptions,
        encoders: dict[str, MatrixEncoder],
        checkpoint: Checkpoint,
        recipe: Recipe,
        workplace: Workplace,
        log_path: Path,
    ) -> None:
        self.plan = plan
        self.options = options
        self.encoders = encoders
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.workplace = workplace
        self.log_path = log_path
        self.seconds = dict.fromkeys(("total", "read", "encode", "write"), 0.0)

    def run(self, say: Callable[[str], object]) -> QuantizeResult:
        """Continue where the journal ends, up to the finished folder; `say` receives messages."""
        start = time.perf_counter()
        fingerprint = self._fingerprint()
        if self.options.restart:
            self.workplace.discard()
        journal = self.workplace.open_journal(fingerprint)
        try:
            if self.workplace.finished:
                say(f"{self.workplace.output}: was finished by the run before")
                records = [record for record in journal.records if "item" in record]
            else:
                writer = CheckpointWriter(self.plan, self.workplace, journal)
                try:
                    records = self._write(writer, say)
                finally:
                    writer.abort()
        finally:
            journal.close()
        self.workplace.clean()
        self.seconds["total"] = time.perf_counter() - start
        return QuantizeResult(
            self.workplace.output, self.plan, records, self.seconds, reporting.peak_rss()
        )

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output."""
        plan, options = self.plan, self.options
        chosen = {
            "model": self.recipe.source_model,
            "format": plan.format,
            "preset": options.preset,
            "encoder": options.encoder,
            **plan.target.choices(plan),
            "tensor_parallel_size": plan.tensor_parallel_size,
            "max_shard_size": plan.max_shard_bytes,
            "allow_nonfinite": options.allow_nonfinite,
        }
        if options.drop_mtp:
            chosen["drop_mtp"] = True
        if self.recipe.calibration:
            chosen["calibration"] = self.recipe.calibration
        if self.recipe.allocation:
            chosen["allocate"] = self.recipe.allocation
        folder = self.checkpoint.path
        files = [*self.checkpoint.tensors.files.values()]
        return make_fingerprint(
            __version__,
            chosen,
            (folder / CONFIG_FILE).read_bytes(),
            [file.path for file in files],
        )

    def _write(
        self, writer: CheckpointWriter, say: Callable[[str], object]
    ) -> list[dict[str, Any]]:
        self._check_room(writer)
        if writer.done:
            say(f"going on after {writer.done} of {len(self.plan.tensors)} matrices")
        converter = Converter(
            self.checkpoint, self.plan, self.encoders, self.options.allow_nonfinite
        )
        done = sum(planned.weights for planned in self.plan.tensors[: writer.done])
        bar = tqdm(
            total=self.plan.weights,
            initial=done,
            unit="w",
            unit_scale=True,
            # None shows the bar only if stderr is a terminal.
            disable=True if self.options.quiet else None,
        )
        with bar, open(self.log_path, "wb", buffering=0) as log:
            for record in writer.tensor_records():
                _log(log, record)
            for planned in self.plan.tensors[writer.done :]:
                converted = converter.convert(planned)
                before = time.perf_counter()
                record = writer.write(planned, converted.parts, converted.stats)
                self.seconds["write"] += time.perf_counter() - before
                self.seconds["read"] += converted.stats["read_seconds"]
                self.seconds["encode"] += converted.stats["seconds"]
                _log(log, record)
                bar.update(planned.weights)
        records = writer.tensor_records()
        before = time.perf_counter()
        writer.finish(self._small_files(records))
        self.workplace.publish()
        self.seconds["write"] += time.perf_counter() - before
        return records

    def _check_room(self, writer: CheckpointWriter) -> None:
        needed = writer.remaining_bytes()
        free = shutil.disk_usage(self.workplace.folder).free
        if free < needed:
            raise CcqError(
                f"{self.workplace.output}: needs {gigabytes(needed)} more, the disk has"
                f" {gigabytes(free)} free; make room and run the same command again"
            )

    def _small_files(self, records: list[dict[str, Any]]) -> dict[str, bytes]:
        plan = self.plan
        outputs = OUTPUTS[plan.target.name]
        provenance = {
            "format": plan.format,
            "preset": self.options.preset,
            "encoder": self.options.encoder,
            "row_order": plan.row_order,
            "source_model": self.recipe.source_model,
            **outputs.recorded(plan),
        }
        if self.recipe.calibration:
            provenance["calibration"] = {
                **self.recipe.calibration,
                "output_errors": output_errors(plan, records),
            }
        if self.recipe.allocation:
            provenance["allocation"] = self.recipe.allocation
        config = outputs.config(plan, provenance)
        files = dict(read_companions(self.checkpoint.path).files)
        files[CONFIG_FILE] = json_bytes(config)
        files["README.md"] = outputs.card(plan, self.recipe, records).encode("utf-8")
        return files


def _log(file: io.FileIO, record: dict[str, Any]) -> None:
    entry = {"name": record["name"], **record["stats"]}
    left = memoryview((json.dumps(entry) + "\n").encode())
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        error.filename = error.filename or str(file.name)
        raise
