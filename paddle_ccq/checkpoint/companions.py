# SPDX-License-Identifier: Apache-2.0
"""Companion files: what belongs to a model beside weights and config.json, and the rule for links.

One list and one rule for every command that writes a checkpoint. A link is followed and what it
leads to is copied, wherever that lies: hubs' caches and hand-made folders consist of links. Code,
pickles and weights are never copied, so `auto_map`, which names code, is left out of the copies.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import CcqError
from ..families.config import CONFIG_FILE, ModelConfig
from ..json_files import load_json
from .safetensors_format import INDEX_FILE, SINGLE_FILE

# Compared in lower case.
PATTERNS = (
    *("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"),
    *("tokenizer*", "vocab*", "merges*", "chat_template*"),
    *("license*", "licence*", "notice*", "copying*"),
)
# Another model's card, index or manifest, code, and what is loaded by running code.
_NEVER = (
    *(CONFIG_FILE, "readme*", "*.index.json", "*-manifest.json"),
    *("*.py", "*.pyc", "*.so", "*.sh", "*.bin", "*.pkl", "*.pickle", "*.pt", "*.pth", "*.ckpt"),
    *("*.pdparams", "*.pdopt", "*.safetensors", "*.npz", "*.npy", "*.gguf", "*.onnx", "*.lock"),
)
MAX_BYTES = 64_000_000

# Where transformers keeps templates beside chat_template.jinja, as NAME.jinja.
TEMPLATE_FOLDER = "additional_chat_templates"

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What FastDeploy's ERNIE processor looks for (input/ernie4_5_tokenizer.py), in its order.
SENTENCEPIECE_FILES = ("tokenizer.model", "spm.model", "ernie_token_100k.model")
_AUTO_MAP = "auto_map"


@dataclass(frozen=True)
class Companions:
    """The content of every companion file by its name, and what a user should know about them.

    Names are relative to the folder, with / where a file lies in TEMPLATE_FOLDER.
    """

    files: dict[str, bytes]
    messages: tuple[str, ...]


def read_companions(folder: Path) -> Companions:
    """Read what is to be copied beside a model's weights.

    Raises:
        CcqError: a link that leads nowhere, or a file that is none (a pipe, a device).
    """
    files, messages, outside = {}, [], []
    for path in _candidates(folder):
        name = path.relative_to(folder).as_posix()
        status = check_file(path)
        if stat.S_ISDIR(status.st_mode):
            continue
        if status.st_size > MAX_BYTES:
            messages.append(
                f"{name}: left out, its {status.st_size} bytes are more than the"
                f" {MAX_BYTES} that a companion file may have"
            )
            continue
        data, dropped = _without_code(path, path.read_bytes(), folder)
        files[name] = data
        if dropped:
            messages.append(dropped)
        linked = path.is_symlink() or (path.parent != folder and path.parent.is_symlink())
        if linked and not _belongs(path, folder):
            outside.append(name)
    if outside:
        shown = ", ".join(outside[:4]) + (f" and {len(outside) - 4} more" if outside[4:] else "")
        messages.append(f"links out of {folder} are followed, their content is copied: {shown}")
    messages += _about_tokenizers(folder, files)
    return Companions(files, tuple(messages))


def check_regular(folder: Path) -> None:
    """Refuse links that lead nowhere and special files in place of config.json and the index.

    Opening a pipe would wait for ever, and "missing" would be said of a file that a listing shows.

    Raises:
        CcqError: naming the file.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name in (CONFIG_FILE, INDEX_FILE, SINGLE_FILE):
            check_file(entry)


def check_weights(folder: Path, config: ModelConfig) -> None:
    """The same of weights, but for shards that only hold tensors which the config has dropped.

    Raises:
        CcqError: naming the file.
    """
    unneeded = _dropped_shards(folder, config) if config.dropped is not None else set()
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        hidden = entry.name.startswith(".") or entry.name in unneeded
        if entry.suffix == ".safetensors" and not hidden:
            check_file(entry)


def _dropped_shards(folder: Path, config: ModelConfig) -> set[str]:
    """Shards that by the index hold nothing else; none where opening it says what is wrong."""
    try:
        content = load_json(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else None
    except CcqError:
        return set()
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        return set()
    found = {str(shard) for name, shard in weight_map.items() if config.is_dropped(name)}
    return found - {str(shard) for name, shard in weight_map.items() if not config.is_dropped(name)}


def _candidates(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        name = entry.name.lower()
        if entry.name == TEMPLATE_FOLDER and stat.S_ISDIR(check_file(entry).st_mode):
            yield from sorted(entry.glob("[!.]*.jinja"))
            continue
        if (
            not name.startswith(".")
            and any(fnmatchcase(name, pattern) for pattern in PATTERNS)
            and not any(fnmatchcase(name, pattern) for pattern in _NEVER)
        ):
            yield entry


def check_file(path: Path) -> os.stat_result:
    """What a path is, its links followed.

    Raises:
        CcqError: a link that leads nowhere, or a file that is none (a pipe, a device).
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CcqError(
            f"{path}: a link to {os.readlink(path)}, which is not there; download the model again"
            " or remove the link"
        ) from None
    except OSError as error:  # links in a circle, no permission
        raise CcqError(f"{path}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise CcqError(f"{path}: not a regular file but a pipe, socket or device; remove it")
    return status


def _belongs(path: Path, folder: Path) -> bool:
    """Whether a link stays in the folder, or in the blobs of the hub cache that it is part of."""
    target, home = path.resolve(), folder.resolve()
    return home in target.parents or (
        target.parent.name == "blobs" and target.parent.parent in home.parents
    )


def _without_code(path: Path, data: bytes, folder: Path) -> tuple[bytes, str | None]:
    """The content without references to code that is not copied, and a message if one was there."""
    if not path.name.endswith(".json") or b'"auto_map"' not in data:
        return data, None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data, None
    # In a vocabulary the same word would stand for a token's number.
    if not isinstance(content, dict) or not isinstance(content.get(_AUTO_MAP), dict):
        return data, None
    named = _code_names(content.pop(_AUTO_MAP))
    message = f"{path.name}: auto_map left out, the code that it names is not copied"
    classes = {name.rpartition(".")[2] for name in named}
    if path.name == TOKENIZER_CONFIG and content.get("tokenizer_class") in classes:
        # Without that code no library knows the class; the files are read by these.
        fast = (folder / TOKENIZER_FILE).is_file()
        known = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
        message += f"; tokenizer_class {content['tokenizer_class']} is now {known}"
        content["tokenizer_class"] = known
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "surrogatepass"), message


def _code_names(auto_map: dict[str, Any]) -> list[str]:
    names: list[str] = []
    for value in auto_map.values():
        names += [name for name in (value if isinstance(value, list) else [value]) if name]
    return [name for name in names if isinstance(name, str)]


def _about_tokenizers(folder: Path, files: dict[str, bytes]) -> list[str]:
    if any(name in files for name in SENTENCEPIECE_FILES):
        return []
    if TOKENIZER_FILE in files:
        return [
            f"{folder}: no {SENTENCEPIECE_FILES[0]}, which FastDeploy's ERNIE processor needs (or"
            f" {' or '.join(SENTENCEPIECE_FILES[1:])}); put the original model's into the output"
        ]
    return [
        f"{folder}: no tokenizer ({TOKENIZER_FILE} or {SENTENCEPIECE_FILES[0]}); the output cannot"
        " be served before one is put there"
    ]
