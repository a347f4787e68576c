# SPDX-License-Identifier: Apache-2.0
"""Which target a finished checkpoint was written for, by its config.json."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.source import snapshot_folder
from ..errors import CcqError
from ..families.config import CONFIG_FILE, is_packed_entry
from ..json_files import load_json
from .fastdeploy.inspection import FastDeployInspection
from .huggingface.config import QUANTIZATION
from .huggingface.inspection import HuggingFaceInspection
from .inspection import Inspection


def inspect(folder: Path) -> Inspection:
    """Open a quantized checkpoint for a check.

    Raises:
        CcqError: if it is none, or its config.json can't be used.
    """
    try:
        content = load_json(snapshot_folder(folder) / CONFIG_FILE)
        entry = content.get(QUANTIZATION) if isinstance(content, dict) else None
    except (CcqError, OSError):
        entry = None  # opening says what is wrong
    packed = is_packed_entry(entry, str(Path(folder) / CONFIG_FILE))
    return (HuggingFaceInspection if packed else FastDeployInspection)(folder)
