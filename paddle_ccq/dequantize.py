# SPDX-License-Identifier: Apache-2.0
"""Turn any checkpoint, quantized or not, into a plain bfloat16 one in either naming."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .arguments import Arguments
from .checkpoint.companions import read_companions
from .checkpoint.reader import (
    JOURNAL_FILE,
    PARTIAL_SUFFIX,
    PROVENANCE_KEY,
    Checkpoint,
    open_checkpoint,
)
from .checkpoint.safetensors_io import (
    DTYPES,
    INDEX_FILE,
    SafetensorsWriter,
    StoredSpec,
    index_bytes,
    parse_size,
    shard_name,
    split_shards,
    sync_folder,
    tensor_bytes,
)
from .checkpoint.source import resolve_model
from .checkpoint.sources.scheme import without_entries
from .checkpoint.values import count_nonfinite
from .checkpoint.writer import write_file
from .command import messages, output_path, refuse_inside, run_command, to_stderr
from .errors import CcqError
from .families.registry import NAMINGS
from .families.tensor import EXACT_ROLES
from .units import gigabytes


def dequantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    naming: str | None = None,
    max_shard_size: str | int = "5GB",
    *,
    source: str | None = None,
    row_order: str | None = None,
    log: Callable[[str], object] = to_stderr,
) -> Path:
    """Write `model` as a bfloat16 checkpoint in a new folder `output`, which is returned.

    `naming` None is the family's: "paddle" for ERNIE-4.5, "pt" for all others. Router weights and
    biases that are stored as float32 stay so, and in other families than ERNIE-4.5 all floats that
    the source has. One tensor is in memory at a time; the folder gets its name only when everything
    is written.

    Raises:
        CcqError: if the model cannot be read, or `output` is there already.
    """
    if naming not in (None, *NAMINGS):
        raise CcqError(f"--naming: {naming!r} is not one of {', '.join(NAMINGS)}")
    limit = max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size)
    target = output_path(output)
    if target.exists() or target.is_symlink():
        raise CcqError(f"{target}: already exists; give another --output or remove it")
    checkpoint = open_checkpoint(resolve_model(model, source, log=log), row_order)
    naming = _naming(checkpoint, naming)
    refuse_inside(target, checkpoint.path)
    companions = read_companions(checkpoint.path)
    for message in (*checkpoint.messages, *companions.messages):
        log(message)
    specs = [spec for name in checkpoint.names() for spec in _specs(checkpoint, name, naming)]
    partial = _start_folder(target, sum(tensor_bytes(d, s) for _, d, s in specs))
    try:
        _write_shards(checkpoint, partial, naming, split_shards(specs, limit), log)
        config = json.dumps(_config(checkpoint, naming), indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(config, encoding="utf-8")
        for name, data in companions.files.items():
            write_file(partial / name, data)
        sync_folder(partial)
        os.rename(partial, target)
        sync_folder(target.parent)
    except BaseException:
        # There is nothing to resume from: reading and writing is all the work there is.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _naming(checkpoint: Checkpoint, asked: str | None) -> str:
    family = checkpoint.config.family
    names = [naming.name for naming in family.namings]
    if asked is None:
        return names[-1]
    if asked not in names:
        raise CcqError(f"--naming {asked}: {family.name} checkpoints have {' or '.join(names)}")
    return asked


def _is_raw(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is of no type that has a value here, and is copied."""
    tensor = checkpoint.config.tensors[name]
    return bool(tensor.kept) and not tensor.sources[checkpoint.naming.name].parts


def _specs(checkpoint: Checkpoint, name: str, naming: str) -> list[StoredSpec]:
    if _is_raw(checkpoint, name):
        return list(checkpoint.config.tensors[name].kept)
    storage = checkpoint.config.tensors[name].sources[naming]
    return [(part.name, _target_dtype(checkpoint, name), part.shape) for part in storage.parts]


def _target_dtype(checkpoint: Checkpoint, name: str) -> str:
    stored = checkpoint.stored_dtype(name)
    if checkpoint.config.family.keeps_others:
        packed = checkpoint.format_of(name) != "bf16"
        return "BF16" if packed or not checkpoint.parts(name)[0].is_float else stored
    router = checkpoint.config.tensors[name].role in EXACT_ROLES
    return "F32" if router and stored == "F32" else "BF16"


def _tensors(
    checkpoint: Checkpoint, naming: str, log: Callable[[str], object]
) -> Iterator[tuple[str, np.ndarray]]:
    """The on-disk tensors of the output, in the order of the specs."""
    for name in checkpoint.names():
        if _is_raw(checkpoint, name):
            yield from checkpoint.read_kept(name, checkpoint.config.tensors[name].kept).items()
            continue
        storage = checkpoint.config.tensors[name].sources[naming]
        if storage.transposed:
            values = checkpoint.read_out_in(name)
        elif checkpoint.format_of(name) == "bf16":
            values = checkpoint.read_stored(name)
        else:
            values = checkpoint.read(name)
        _check_finite(checkpoint, name, values, log)
        dtype = DTYPES[_target_dtype(checkpoint, name)]
        for part in storage.parts:
            held = values if part.columns is None else values[part.columns]
            yield part.name, held.astype(dtype, copy=False)


def _check_finite(
    checkpoint: Checkpoint, name: str, values: np.ndarray, log: Callable[[str], object]
) -> None:
    """NaN and infinity of a float source are copied with a message; none may come into being."""
    damaged = count_nonfinite(values)
    where = f"{checkpoint.path}: {name}"
    if damaged and checkpoint.format_of(name) != "bf16":
        raise CcqError(
            f"{where}: {damaged} values decode to NaN or infinity; its scales are damaged"
            " (paddle_ccq.verify says which)"
        )
    beyond = count_nonfinite(values, _target_dtype(checkpoint, name)) - damaged
    if beyond:
        finite = values[np.isfinite(values)]
        raise CcqError(
            f"{where}: {beyond} values beyond bfloat16's range, up to"
            f" {float(np.abs(finite).max()):.7g} in magnitude, would become infinite"
        )
    if damaged:
        log(f"{name}: {damaged} values are NaN or infinite, as in the source")


def _start_folder(target: Path, size: int) -> Path:
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    if (partial / JOURNAL_FILE).exists():
        raise CcqError(
            f"{partial}: an unfinished quantization; finish it with the command that began it, or"
            " remove the folder"
        )
    if partial.is_dir():
        shutil.rmtree(partial)  # ours, from a run that was killed
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < size:
        partial.rmdir()
        raise CcqError(f"{target}: needs {gigabytes(size)}, the disk has {gigabytes(free)} free")
    return partial


def _write_shards(
    checkpoint: Checkpoint,
    folder: Path,
    naming: str,
    shards: list[list[StoredSpec]],
    log: Callable[[str], object],
) -> None:
    tensors = _tensors(checkpoint, naming, log)
    files = {shard_name(i, len(shards)): specs for i, specs in enumerate(shards)}
    total = sum(map(len, shards))
    # disable=None: a bar only where stderr is a terminal.
    with tqdm(total=total, unit="tensor", disable=None) as progress:
        for file, specs in files.items():
            metadata = {"format": checkpoint.config.family.naming(naming).format_tag}
            with SafetensorsWriter(folder / file, specs, metadata) as writer:
                for _ in specs:
                    writer.write(*next(tensors))
                    progress.update()
    (folder / INDEX_FILE).write_bytes(index_bytes(files))
    log(f"{total} tensors in {len(files)} files")


def _config(checkpoint: Checkpoint, naming: str) -> dict[str, Any]:
    config = without_entries(checkpoint.config.raw)
    # auto_map names code, which is not copied.
    for key in (PROVENANCE_KEY, "dtype", "torch_dtype", "auto_map"):
        config.pop(key, None)
    chosen = checkpoint.config.family.naming(naming)
    for key in chosen.unwanted:
        config.pop(key, None)
    config[chosen.dtype_key] = "bfloat16"
    checkpoint.config.spell_out(config)
    return config


def build_parser() -> Arguments:
    """Each argument but --quiet is a parameter of dequantize() by its destination."""
    parser = Arguments("dequantize", __doc__)
    parser.subject("model", "checkpoint: folder, hub id or short name")
    add = parser.add_argument
    add("--output", required=True, help="new folder for the result")
    add(
        "--naming",
        choices=NAMINGS,
        help="tensor names and orientation of the result (default: paddle for ERNIE-4.5, else pt)",
    )
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of one file (default: %(default)s)",
    )
    parser.source()
    parser.row_order()
    parser.quiet()
    return parser


def main(argv: list[str] | None = None) -> int:
    """The new folder is printed; exit code 0, or 2 for bad input."""

    def body(args: argparse.Namespace) -> int:
        target = dequantize(
            args.model,
            args.output,
            args.naming,
            args.max_shard_size,
            source=args.source,
            row_order=args.row_order,
            log=messages(args.quiet),
        )
        print(target)
        return 0

    return run_command(build_parser(), argv, body)


if __name__ == "__main__":
    sys.exit(main())
