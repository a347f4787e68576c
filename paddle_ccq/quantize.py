# SPDX-License-Identifier: Apache-2.0
"""Quantize an ERNIE-4.5 checkpoint to FastDeploy's WINT2, or to the 2.5- and 2.75-bit formats."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from . import reporting
from .checkpoint.config import CONFIG_FILE, ErnieConfig
from .checkpoint.convert import Converter
from .checkpoint.fastdeploy import output_config, quantization_config
from .checkpoint.journal import make_fingerprint
from .checkpoint.model_card import Recipe, model_card
from .checkpoint.plan import EXPERT_FORMATS, ROW_ORDERS, Plan, build_plan, gigabytes
from .checkpoint.reader import Checkpoint, open_checkpoint
from .checkpoint.rules import load_rules
from .checkpoint.safetensors_format import parse_size
from .checkpoint.source import HUBS, resolve_model
from .checkpoint.writer import CheckpointWriter, Workplace, json_bytes
from .encoder.base import ENCODERS, PRESETS, MatrixEncoder, make_encoder
from .errors import CcqError, run_cli
from .version import __version__

# Small files that belong to a model; weights, code, pickles and links are never copied.
COPIED_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
NEVER_COPIED = (CONFIG_FILE, "README.md")
MAX_COPIED_BYTES = 64_000_000

# Weights of the random matrix whose encoding is timed for a dry run: [out, in].
MEASURED_SHAPE = (512, 1024)


@dataclass(frozen=True)
class QuantizeResult:
    """What a run did; `records` holds one entry a matrix, `seconds` the total and its parts."""

    output: Path | None
    plan: Plan
    records: list[dict[str, Any]]
    seconds: dict[str, float]
    peak_rss: int


@dataclass(frozen=True)
class Options:
    """The checked options of a run."""

    preset: str
    encoder: str
    threads: int | None
    allow_nonfinite: bool
    restart: bool
    quiet: bool


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "wint2",
    preset: str = "default",
    encoder: str = "search",
    wint4_end_layer: int | None = None,
    fastdeploy_layout: str = "2.1",
    tensor_parallel_size: int = 1,
    rules: str | os.PathLike[str] | None = None,
    max_shard_size: str | int = "5GB",
    threads: int | None = None,
    source: str | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    restart: bool = False,
    allow_nonfinite: bool = False,
    log: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> QuantizeResult:
    """Write a quantized checkpoint of `model` into the new folder `output`.

    The same call after an interruption goes on where it stopped and ends with the same bytes.
    With `dry_run` only the plan is printed; a folder with nothing but config.json will do.

    Raises:
        CcqError: for anything in the input, the options or the environment that is not right.
    """
    _check_option("--preset", preset, PRESETS)
    _check_option("--encoder", encoder, ENCODERS)
    if threads is not None and threads < 1:
        raise CcqError(f"--threads {threads}: must be at least 1")
    options = Options(preset, encoder, threads, allow_nonfinite, restart, quiet)
    say: Callable[[str], object] = (lambda _: None) if quiet else _to_stderr
    loaded = load_rules(rules) if rules is not None else ()

    def plan_for(config: ErnieConfig) -> Plan:
        return build_plan(
            config,
            format,
            wint4_end_layer,
            fastdeploy_layout,
            tensor_parallel_size,
            loaded,
            max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size),
        )

    if dry_run:
        return _dry_run(model, plan_for, options)
    if output is None:
        raise CcqError("--output is missing: name the new folder to write")
    target = Path(os.path.abspath(output))
    folder = resolve_model(model, source, revision, log=say)
    plan = plan_for(ErnieConfig.from_json(folder))
    _check_separate(folder, target)
    log_path = Path(log) if log is not None else target.with_name(target.name + ".log.jsonl")
    with Workplace(target) as workplace:
        checkpoint = open_checkpoint(folder)
        if checkpoint.is_quantized:
            raise CcqError(
                f"{folder}: quantized already; quantize the original float checkpoint instead"
            )
        for message in (*checkpoint.messages, *plan.messages):
            say(message)
        return _Run(plan, options, checkpoint, _model_name(model), workplace, log_path, say).run()


def _check_option(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CcqError(f"{flag} {value}: not one of {', '.join(allowed)}")


def _check_separate(folder: Path, target: Path) -> None:
    source = folder.resolve()
    if target.resolve() == source or source in target.resolve().parents:
        raise CcqError(f"--output {target}: lies in the model's own folder; choose another")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _model_name(model: str | os.PathLike[str]) -> str:
    """What the output calls its source: a hub id or short name as given, or a folder's name."""
    text = os.fspath(model)
    return Path(text).expanduser().resolve().name if Path(text).expanduser().is_dir() else text


def make_encoders(plan: Plan, options: Options) -> dict[str, MatrixEncoder]:
    """One encoder for each format that occurs in the plan."""
    return {
        format: make_encoder(
            format, options.preset, encoder=options.encoder, threads=options.threads
        )
        for format in {item.format for item in plan.items if item.quantized}
    }


class _Run:
    """One run over a whole checkpoint, from the journal's end to the rename."""

    def __init__(
        self,
        plan: Plan,
        options: Options,
        checkpoint: Checkpoint,
        model_name: str,
        workplace: Workplace,
        log_path: Path,
        say: Callable[[str], object],
    ) -> None:
        self.plan = plan
        self.options = options
        self.checkpoint = checkpoint
        self.recipe = Recipe(model_name, options.preset, options.encoder)
        self.workplace = workplace
        self.log_path = log_path
        self.say = say
        self.seconds = dict.fromkeys(("total", "read", "encode", "write"), 0.0)

    def run(self) -> QuantizeResult:
        start = time.perf_counter()
        fingerprint = self._fingerprint()
        if self.options.restart:
            self.workplace.discard()
        journal = self.workplace.open_journal(fingerprint)
        try:
            if self.workplace.finished:
                self.say(f"{self.workplace.output}: was finished by the run before")
                records = [record for record in journal.records if "item" in record]
            else:
                writer = CheckpointWriter(self.plan, self.workplace, journal)
                try:
                    records = self._write(writer)
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
            "wint4_end_layer": plan.wint4_end_layer,
            "fastdeploy_layout": plan.row_order,
            "tensor_parallel_size": plan.tensor_parallel_size,
            "rules": plan.not_converted(),
            "max_shard_size": plan.max_shard_bytes,
            "allow_nonfinite": options.allow_nonfinite,
        }
        folder = self.checkpoint.path
        files = [*self.checkpoint.tensors.files.values()]
        return make_fingerprint(
            __version__,
            chosen,
            (folder / CONFIG_FILE).read_bytes(),
            [file.path for file in files],
        )

    def _write(self, writer: CheckpointWriter) -> list[dict[str, Any]]:
        self._check_room(writer)
        if writer.done:
            self.say(f"going on after {writer.done} of {len(self.plan.items)} matrices")
        encoders = make_encoders(self.plan, self.options)
        converter = Converter(self.checkpoint, self.plan, encoders, self.options.allow_nonfinite)
        done = sum(item.weights for item in self.plan.items[: writer.done])
        bar = tqdm(
            total=self.plan.weights,
            initial=done,
            unit="w",
            unit_scale=True,
            # None: only where stderr is a terminal.
            disable=True if self.options.quiet else None,
        )
        with bar, open(self.log_path, "w", encoding="utf-8") as log:
            for record in writer.item_records():
                _log(log, record)
            for item in self.plan.items[writer.done :]:
                converted = converter.convert(item)
                before = time.perf_counter()
                record = writer.write(item, converted.parts, converted.stats)
                self.seconds["write"] += time.perf_counter() - before
                self.seconds["read"] += converted.stats["read_seconds"]
                self.seconds["encode"] += converted.stats["seconds"]
                _log(log, record)
                bar.update(item.weights)
        records = writer.item_records()
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
        provenance = {
            "format": plan.format,
            "preset": self.options.preset,
            "encoder": self.options.encoder,
            "row_order": plan.row_order,
            "source_model": self.recipe.source_model,
            "wint4_end_layer": plan.wint4_end_layer,
            "tensor_parallel_size": plan.tensor_parallel_size,
        }
        quantization = quantization_config(
            plan.config, plan.format, plan.wint4_end_layer, plan.not_converted()
        )
        config = output_config(plan.config, quantization, provenance)
        files = copied_files(self.checkpoint.path)
        files[CONFIG_FILE] = json_bytes(config)
        files["README.md"] = model_card(plan, self.recipe, records).encode("utf-8")
        return files


def copied_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer, generation and licence files of a model, by name."""
    found = {}
    for path in sorted({path for pattern in COPIED_PATTERNS for path in folder.glob(pattern)}):
        name = path.name
        skipped = name in NEVER_COPIED or name.endswith((".index.json", "-manifest.json"))
        outside = path.resolve().parent != folder.resolve() and not _hub_cached(path, folder)
        if skipped or outside or not path.is_file() or path.stat().st_size > MAX_COPIED_BYTES:
            continue
        found[name] = path.read_bytes()
    return found


def _hub_cached(path: Path, folder: Path) -> bool:
    """Whether a link leads into the blobs of the hub cache that the folder itself is part of."""
    target = path.resolve().parent
    return target.name == "blobs" and target.parent in folder.resolve().parents


def _log(file: TextIO, record: dict[str, Any]) -> None:
    entry = {"name": record["name"], **record["stats"]}
    file.write(json.dumps(entry) + "\n")
    file.flush()


def _dry_run(
    model: str | os.PathLike[str], plan_for: Callable[[ErnieConfig], Plan], options: Options
) -> QuantizeResult:
    folder = Path(model).expanduser()
    if not folder.exists():
        raise CcqError(
            f"{model}: a dry run downloads nothing; put the model's {CONFIG_FILE} into a folder and"
            " pass that"
        )
    plan = plan_for(ErnieConfig.from_json(folder))
    out = reporting.console()
    out.print(reporting.plan_table(plan))
    out.print()
    rates = measured_rates(make_encoders(plan, options))
    seconds = sum(item.weights / rates[item.format] for item in plan.items if item.quantized)
    quantized = {item.format: 0 for item in plan.items if item.quantized}
    for item in plan.items:
        if item.quantized:
            quantized[item.format] += item.weights
    main_format = max(quantized, key=lambda format: quantized[format])
    facts = [
        *reporting.plan_facts(plan),
        ("peak memory (estimate)", gigabytes(plan.peak_memory())),
        ("disk needed", gigabytes(plan.output_bytes * 1.001)),
        (
            "time (estimate)",
            f"{reporting.duration(seconds)} of encoding on this machine, reading and writing not"
            f" counted; from {rates[main_format] / 1e6:.1f} million weights/s of {main_format},"
            f" measured just now on a random matrix of {MEASURED_SHAPE[0]} x {MEASURED_SHAPE[1]}",
        ),
    ]
    for name, value in facts:
        out.print(f"{name}: {value}", soft_wrap=True)
    for message in plan.messages:
        out.print(f"note: {message}", soft_wrap=True)
    return QuantizeResult(None, plan, [], {"estimate": seconds}, reporting.peak_rss())


def measured_rates(encoders: Mapping[str, MatrixEncoder]) -> dict[str, float]:
    """Weights a second of each encoder on a small random matrix."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(MEASURED_SHAPE, dtype=np.float32)
    rates = {}
    for format, encoder in encoders.items():
        encoder.encode(weight[:64])  # start threads, load tables
        start = time.perf_counter()
        encoder.encode(weight)
        rates[format] = weight.size / (time.perf_counter() - start)
    return rates


def print_summary(result: QuantizeResult) -> None:
    """The tables at the end of a run."""
    out = reporting.console()
    rows = reporting.summary_rows(result.plan, result.records)
    out.print(reporting.table(reporting.SUMMARY_COLUMNS, rows))
    seconds = result.seconds
    parts = ", ".join(f"{k} {reporting.duration(seconds[k])}" for k in ("read", "encode", "write"))
    out.print(
        f"{reporting.duration(seconds['total'])} ({parts}); peak memory"
        f" {gigabytes(result.peak_rss)}",
        soft_wrap=True,
    )
    out.print(f"{result.output}", soft_wrap=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paddle_ccq.quantize", description=__doc__, allow_abbrev=False
    )

    def add(flag: str, **kwargs: Any) -> None:
        names = [flag]
        if "-" in flag[2:]:
            names.append("--" + flag[2:].replace("-", "_"))
        parser.add_argument(*names, **kwargs)

    add("--model", required=True, help="checkpoint folder, hub id or short name (ERNIE-4.5-21B)")
    add("--output", help="new folder for the result")
    add("--format", choices=EXPERT_FORMATS, default="wint2", help="of routed experts")
    add("--preset", choices=PRESETS, default="default", help="time against error")
    add("--encoder", choices=ENCODERS, default="search", help="search, or the paper's algorithm")
    add(
        "--wint4-end-layer",
        type=int,
        metavar="N",
        help="MoE layers up to N are wint4, -1 for none (default: 6 from 40 layers on, else -1)",
    )
    add(
        "--fastdeploy-layout",
        choices=tuple(ROW_ORDERS),
        default="2.1",
        help="row order of WINT2: for FastDeploy 2.1 and later, or for 2.0",
    )
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="write N rank folders")
    add("--rules", metavar="FILE", help="YAML list of {match: GLOB, format: NAME}")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    add("--threads", type=int, metavar="N", help="encoder threads (default: all cores)")
    add("--source", choices=tuple(HUBS), type=str.upper, help="hub to download from")
    add("--revision", help="branch, tag or commit on the hub")
    add("--dry-run", action="store_true", help="print the plan; config.json is enough")
    add("--restart", action="store_true", help="throw away an interrupted run's work")
    add("--allow-nonfinite", action="store_true", help="set NaN and infinite weights to 0")
    add("--log", metavar="FILE", help="JSON lines, one a matrix (default: OUTPUT.log.jsonl)")
    add("--quiet", action="store_true", help="no progress, no messages, no summary")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))

    def body() -> int:
        result = quantize(**args)
        if result.output is not None and not args["quiet"]:
            print_summary(result)
        return 0

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
