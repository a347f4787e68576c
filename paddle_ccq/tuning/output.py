# SPDX-License-Identifier: Apache-2.0
"""The tuned checkpoint: every tensor of the old one in its place, the tuned ones replaced."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.companions import read_companions
from ..checkpoint.manifest import MANIFEST_FILE, manifest_bytes
from ..checkpoint.reader import PROVENANCE_KEY, Checkpoint
from ..checkpoint.safetensors_format import DTYPES, FLOAT_DTYPES, INDEX_FILE, StoredSpec
from ..checkpoint.safetensors_writer import SafetensorsWriter, sync_folder
from ..checkpoint.values import count_nonfinite
from ..checkpoint.writer import SMALL_FILES_BYTES, json_bytes, write_file
from ..errors import CcqError
from ..families.config import CONFIG_FILE
from ..targets.fastdeploy.layout import SHARD_METADATA
from ..units import gigabytes

CARD = "README.md"
SECTION = "## Tuning"
_FLOATS = tuple(DTYPES[name] for name in FLOAT_DTYPES)


def check_room(checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse, before the work starts, an output that the disk has no room for."""
    files = [file.path for file in checkpoint.tensors.files.values()]
    needed = sum(path.stat().st_size for path in files) + SMALL_FILES_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CcqError(
            f"{folder}: needs {gigabytes(needed)}, the disk has {gigabytes(free)} free; make"
            " room and run the same command again"
        )


def write_tuned(
    checkpoint: Checkpoint,
    target: Path,
    tensors: Mapping[str, np.ndarray],
    provenance: Mapping[str, Any],
) -> None:
    """Write the whole checkpoint into the new folder `target`, the manifest last.

    Raises:
        CcqError: if a replaced tensor is not of the stored dtype and shape, or not finite.
    """
    for name, array in tensors.items():
        if array.dtype in _FLOATS and count_nonfinite(array):
            raise CcqError(
                f"{name}: tuning led to NaN or infinity; nothing is written (try fewer passes)"
            )
    target.mkdir()
    hashes = {}
    for name, file in checkpoint.tensors.files.items():
        specs: list[StoredSpec] = [(n, i.dtype, i.shape) for n, i in file.tensors.items()]
        with SafetensorsWriter(target / name, specs, file.metadata or SHARD_METADATA) as writer:
            for tensor, _, _ in specs:
                array = tensors.get(tensor)
                writer.write(tensor, file.read(tensor) if array is None else array)
        hashes[name] = writer.sha256()
    for name, data in read_companions(checkpoint.path).files.items():
        write_file(target / name, data)
    index = checkpoint.path / INDEX_FILE
    if index.is_file():
        write_file(target / INDEX_FILE, index.read_bytes())
    config = dict(checkpoint.config.raw)
    known = checkpoint.provenance
    earlier = {"earlier": known["tuning"]} if "tuning" in known else {}
    config[PROVENANCE_KEY] = {**known, "tuning": {**provenance, **earlier}}
    write_file(target / CONFIG_FILE, json_bytes(config))
    write_file(target / CARD, _card(checkpoint.path / CARD, provenance).encode("utf-8"))
    write_file(target / MANIFEST_FILE, manifest_bytes(target, hashes))
    sync_folder(target)


def _card(old: Path, provenance: Mapping[str, Any]) -> str:
    """The old model card with a section on the tuning."""
    text = old.read_text(encoding="utf-8", errors="replace") if old.is_file() else ""
    text = text.split(SECTION)[0].rstrip()
    text = text + "\n\n" if text else ""
    rows = [
        ("text", f"{provenance['text']} (sha256 {provenance['text_sha256'][:16]}...)"),
        ("tokens", f"{provenance['tokens_learned']:,}, {provenance['passes']} times"),
        (
            "KL to the float model on held-out text, nats per token",
            f"{provenance['loss_before']:.4f} before, {provenance['loss_after']:.4f} after",
        ),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return (
        f"{text}{SECTION}\n\nColumn scales, norm gains, routers and dense layers were tuned against"
        " the float model's\nlogits; the experts' codes are unchanged. Errors listed above are"
        " those before it.\n\n" + "\n".join(lines) + "\n"
    )
