# SPDX-License-Identifier: Apache-2.0
"""Stored tensors that config.json does not call for: used, passed over by a named rule, or refused.

Leaving out a tensor that a model computes with makes another model of it without a word. So only
three kinds are passed over, each with a message: the multi-token-prediction head, copies that are
equal to the tensor they copy, and tables that follow from config.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import CcqError
from ..families.ernie45 import EMBEDDING, HEAD, PADDLE, is_frequencies, why_unexpected
from ..families.family import Naming
from .config import CONFIG_FILE, ErnieConfig
from .safetensors_io import TensorFolder

# Rows that are compared at a time; bounds the memory of a comparison.
COMPARED_ROWS = 4096
# Inverse frequencies may be stored in bfloat16.
FREQUENCY_TOLERANCE = 1e-2


def resolve_head(
    config: ErnieConfig, tensors: TensorFolder, naming: Naming
) -> tuple[ErnieConfig, list[str]]:
    """The config with its tie decided by what is stored, and what to say about it.

    A head beside a tie that is not stated makes the output untied. A head beside
    `tie_word_embeddings: true` must be equal to the embedding.

    Raises:
        CcqError: if the two differ, or if a head is called for that is not there.
    """
    there = HEAD in tensors
    embedding = config.tensors[EMBEDDING].sources[naming.name].parts[0].name
    if not config.tie_stated and naming is PADDLE and there and embedding in tensors:
        # Paddle's classes store a tied head as [vocab, hidden] and any other as [hidden, vocab].
        shape = tensors.info(HEAD).shape
        if shape == tensors.info(embedding).shape != shape[::-1]:
            config = config.with_tie(True)
    if not config.tie_stated:
        if there:
            message = (
                f"config.json does not say tie_word_embeddings, and {HEAD} is stored: the output"
                " has its own weights (tie_word_embeddings false)"
            )
        else:
            message = (
                f"config.json does not say tie_word_embeddings, and no {HEAD} is stored: the"
                " output uses the embedding (tie_word_embeddings true)"
            )
        return config.with_head_of(tensors), [message]
    if not config.tie_word_embeddings:
        if not there:
            raise CcqError(
                f"{tensors.folder}: {HEAD!r} is missing, and config.json says tie_word_embeddings"
                " false; download it again, or say true if the output shares the embedding"
            )
        return config, []
    if not there:
        return config, []
    if embedding in tensors and not _equal_head(tensors, embedding):
        raise CcqError(
            f"{tensors.path_of(HEAD)}: {HEAD} differs from {embedding}, but config.json says"
            " tie_word_embeddings true; say false to use the stored head, or remove the tensor to"
            " use the embedding"
        )
    return config, [
        f"passing over {HEAD}: config.json ties the output to the embedding, and the two are equal"
    ]


def _equal_head(tensors: TensorFolder, embedding: str) -> bool:
    """Whether the head holds the embedding's values, in either orientation."""
    rows, head = tensors.read(embedding), tensors.read(HEAD)
    return _equal(rows, head) or _equal(rows, head.T)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    if first.shape != second.shape:
        return False
    for begin in range(0, max(1, len(first)), COMPARED_ROWS):
        part = slice(begin, begin + COMPARED_ROWS)
        if not np.array_equal(first[part].astype(np.float32), second[part].astype(np.float32)):
            return False
    return True


def pass_over(
    config: ErnieConfig, tensors: TensorFolder, copies: dict[str, str], used: set[str]
) -> list[str]:
    """Messages about the tensors that are not used; `copies` maps some of them to what they copy.

    Raises:
        CcqError: for a tensor that no rule allows to leave out.
    """
    mtp, tables, messages = [], [], []
    refused: list[tuple[str, str]] = []
    for name in _unused(tensors, used):
        if config.family.is_mtp(name):
            mtp.append(name)
        elif name == HEAD and name in tensors and config.tie_word_embeddings:
            continue  # resolve_head has looked at it
        elif name in copies and _equal(tensors.read(name), tensors.read(copies[name])):
            messages.append(f"passing over {name}: it is equal to {copies[name]}")
        elif is_frequencies(name) and _follows(config, tensors, name):
            tables.append(name)
        else:
            refused.append((name, _reason(config, name, copies)))
    if refused:
        name, reason = refused[0]
        where = tensors.path_of(name) if name in tensors else tensors.folder
        more = f" ({len(refused) - 1} more tensors are not called for)" if len(refused) > 1 else ""
        raise CcqError(f"{where}: {name!r} {reason}{more}")
    if mtp:
        messages.insert(0, f"passing over {len(mtp)} tensors of the multi-token-prediction head")
    if tables:
        messages.append(
            f"passing over {len(tables)} tables of rotary frequencies: they follow from rope_theta"
        )
    return messages


def _unused(tensors: TensorFolder, used: set[str]) -> Iterable[str]:
    return (name for name in (*tensors.names(), *tensors.unlisted) if name not in used)


def _follows(config: ErnieConfig, tensors: TensorFolder, name: str) -> bool:
    """Whether a table of rotary frequencies is that of config.json."""
    if name not in tensors:
        return False
    half = config.head_dim // 2
    found = tensors.read(name).astype(np.float64)
    expected = config.rope_theta ** -(np.arange(half) / half)
    return found.shape == expected.shape and np.allclose(
        found, expected, rtol=FREQUENCY_TOLERANCE, atol=0
    )


def _reason(config: ErnieConfig, name: str, copies: dict[str, str]) -> str:
    """Why a tensor cannot be left out, with what config.json says about it."""
    if name in copies:
        return f"differs from {copies[name]!r}, though both are the same tensor of the model"
    return why_unexpected(config, name)


def config_of_folder(folder: Path) -> tuple[ErnieConfig, list[str]]:
    """The config of a model folder, whose weights decide what it leaves open if they are there.

    The messages say what was found, or assumed without weights.

    Raises:
        CcqError: if config.json can't be used, or contradicts the weights on the head.
    """
    config = ErnieConfig.from_json(folder)
    try:
        tensors = TensorFolder(folder)
        naming = config.family.detect_naming(tensors.names(), folder)
    except CcqError:
        # No weights yet, or not all of them: opening the checkpoint says what is wrong.
        tied = "uses the embedding" if config.tie_word_embeddings else "has its own weights"
        stated = "" if config.tie_stated else "; not stated, so a stored head would be written too"
        shown = "true" if config.tie_word_embeddings else "false"
        return config, [
            f"no weights were read; assumed from {CONFIG_FILE} alone: the output {tied}"
            f" (tie_word_embeddings {shown}{stated})"
        ]
    return resolve_head(config, tensors, naming)
