# SPDX-License-Identifier: Apache-2.0
"""Stored tensors that config.json does not call for: used, passed over by a named rule, or refused.

Leaving out a tensor that a model computes with makes another model of it without a word. So only
three kinds are passed over, each with a message: layers for multi-token prediction that
config.json does not count, copies that are equal to the tensor they copy, and tables that follow
from config.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import CcqError
from ..families.config import CONFIG_FILE, ModelConfig
from ..families.family import Naming
from ..families.registry import read_config
from . import source_tensors
from .companions import check_weights
from .safetensors_io import TensorFolder

# Rows that are compared at a time; bounds the memory of a comparison.
COMPARED_ROWS = 4096
# Inverse frequencies may be stored in bfloat16.
FREQUENCY_TOLERANCE = 1e-2


def resolve_head(
    config: ModelConfig, tensors: TensorFolder, naming: Naming
) -> tuple[ModelConfig, list[str]]:
    """The config with its tie decided by what is stored, and what to say about it.

    A head beside a tie that is not stated makes the output untied. A head beside
    `tie_word_embeddings: true` must be equal to the embedding.

    Raises:
        CcqError: if the two differ, or if a head is called for that is not there.
    """
    if config.family.keeps_others:
        return config.with_head_of(tensors), []  # a head that is not called for is kept as well
    head, there = config.family.head, config.family.head in tensors
    embedding = config.tensors[config.family.embedding(config)].sources[naming.name].parts[0].name
    if not config.tie_stated and naming.turned_head and there and embedding in tensors:
        # A tied head is stored as [vocab, hidden] and any other as [hidden, vocab].
        shape = tensors.info(head).shape
        if shape == tensors.info(embedding).shape != shape[::-1]:
            config = config.with_tie(True)
    if not config.tie_stated:
        if there:
            message = (
                f"config.json does not say tie_word_embeddings, and {head} is stored: the output"
                " has its own weights (tie_word_embeddings false)"
            )
        else:
            message = (
                f"config.json does not say tie_word_embeddings, and no {head} is stored: the"
                " output uses the embedding (tie_word_embeddings true)"
            )
        return config.with_head_of(tensors), [message]
    if not config.tie_word_embeddings:
        if not there:
            raise CcqError(
                f"{tensors.folder}: {head!r} is missing, and config.json says tie_word_embeddings"
                " false; download it again, or say true if the output shares the embedding"
            )
        return config, []
    if not there:
        return config, []
    if embedding in tensors and not _equal_head(tensors, head, embedding):
        raise CcqError(
            f"{tensors.path_of(head)}: {head} differs from {embedding}, but config.json says"
            " tie_word_embeddings true; say false to use the stored head, or remove the tensor to"
            " use the embedding"
        )
    return config, [
        f"passing over {head}: config.json ties the output to the embedding, and the two are equal"
    ]


def resolve_mtp(config: ModelConfig, tensors: TensorFolder) -> tuple[ModelConfig, list[str]]:
    """The config without layers for multi-token prediction of which nothing is stored.

    config.json of some checkpoints calls for one that was never published.
    """
    called_for = config.num_nextn_predict_layers and not config.family.keeps_others
    if not called_for or any(map(config.family.is_mtp, tensors.names())):
        return config, []
    return config.without_mtp(), [
        f"config.json says {config.family.mtp_keys[0]} {config.num_nextn_predict_layers}, but no"
        " tensor of that layer is stored: taken as 0"
    ]


def _equal_head(tensors: TensorFolder, head: str, embedding: str) -> bool:
    """Whether the head holds the embedding's values, in either orientation."""
    rows, columns = tensors.read(embedding), tensors.read(head)
    return _equal(rows, columns) or _equal(rows, columns.T)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    if first.shape != second.shape:
        return False
    for begin in range(0, max(1, len(first)), COMPARED_ROWS):
        part = slice(begin, begin + COMPARED_ROWS)
        if not np.array_equal(first[part].astype(np.float32), second[part].astype(np.float32)):
            return False
    return True


def pass_over(
    config: ModelConfig, tensors: TensorFolder, copies: dict[str, str], used: set[str]
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
        elif name == config.family.head and name in tensors and config.tie_word_embeddings:
            continue  # resolve_head has looked at it
        elif name in copies and _equal(tensors.read(name), tensors.read(copies[name])):
            messages.append(f"passing over {name}: it is equal to {copies[name]}")
        elif _follows(config, tensors, name):
            tables.append(name)
        else:
            refused.append((name, _reason(config, name, copies)))
    if refused:
        name, reason = refused[0]
        where = tensors.path_of(name) if name in tensors else tensors.folder
        more = f" ({len(refused) - 1} more tensors are not called for)" if len(refused) > 1 else ""
        raise CcqError(f"{where}: {name!r} {reason}{more}")
    if mtp:
        messages.insert(
            0,
            f"passing over {len(mtp)} tensors for multi-token prediction: config.json says"
            f" {config.family.mtp_keys[0]} {config.num_nextn_predict_layers}",
        )
    if tables:
        messages.append(
            f"passing over {len(tables)} tables of rotary frequencies: they follow from rope_theta"
        )
    return messages


def _unused(tensors: TensorFolder, used: set[str]) -> Iterable[str]:
    return (name for name in (*tensors.names(), *tensors.unlisted) if name not in used)


def _follows(config: ModelConfig, tensors: TensorFolder, name: str) -> bool:
    """Whether a tensor is a table of rotary frequencies, and that of config.json."""
    expected = config.family.table(config, name)
    if expected is None or name not in tensors:
        return False
    found = tensors.read(name).astype(np.float64)
    return found.shape == np.shape(expected) and np.allclose(
        found, expected, rtol=FREQUENCY_TOLERANCE, atol=0
    )


def _reason(config: ModelConfig, name: str, copies: dict[str, str]) -> str:
    """Why a tensor cannot be left out, with what config.json says about it."""
    if name in copies:
        return f"differs from {copies[name]!r}, though both are the same tensor of the model"
    return config.family.why_unexpected(config, name)


def dropped_message(layers: int, tensors: TensorFolder | None) -> str:
    """What --drop-mtp did to a model.

    Args:
        layers: how many such layers config.json calls for.
        tensors: the folder, opened without them; None where no weights are there.
    """
    if tensors is not None and tensors.dropped:
        count = len(tensors.dropped)
        found = f"{count} stored tensors" if count > 1 else "the one stored tensor"
        verb = "are" if count > 1 else "is"
        return f"--drop-mtp: {found} for multi-token prediction {verb} left out"
    if tensors is None and layers:
        return "--drop-mtp: the layers for multi-token prediction are left out"
    return "--drop-mtp: the model has no layers for multi-token prediction, all of it is kept"


def config_of_folder(
    folder: Path, family: str | None = None, *, drop_mtp: bool = False
) -> tuple[ModelConfig, list[str]]:
    """The config of a model folder, whose weights decide what it leaves open if they are there.

    The messages say what was found, or assumed without weights. With `drop_mtp` it is the model
    without layers for multi-token prediction, and the first message is about them.

    Raises:
        CcqError: if config.json can't be used, or contradicts the weights on the head.
    """
    config = read_config(folder, family=family)
    layers = config.num_nextn_predict_layers
    if drop_mtp:
        config = config.without_mtp()
    check_weights(folder, config)
    config, messages, tensors = _completed(config, folder)
    return config, [dropped_message(layers, tensors), *messages] if drop_mtp else messages


def _completed(
    config: ModelConfig, folder: Path
) -> tuple[ModelConfig, list[str], TensorFolder | None]:
    """The config with what the weights decide, messages, and the weights if they are there."""
    try:
        tensors = TensorFolder(folder, config.is_dropped)
        naming = config.family.detect_naming(tensors.names(), folder)
    except CcqError:
        # No weights yet, or not all of them: opening the checkpoint says what is wrong.
        if config.family.keeps_others:
            message = (
                f"no weights were read; names, shapes and dtypes are what {CONFIG_FILE} lets expect"
            )
            return source_tensors.complete(config, folder), [message], None
        tied = "uses the embedding" if config.tie_word_embeddings else "has its own weights"
        stated = "" if config.tie_stated else "; not stated, so a stored head would be written too"
        shown = "true" if config.tie_word_embeddings else "false"
        message = (
            f"no weights were read; assumed from {CONFIG_FILE} alone: the output {tied}"
            f" (tie_word_embeddings {shown}{stated})"
        )
        return config, [message], None
    config, messages = resolve_head(config, tensors, naming)
    if config.family.keeps_others:
        return source_tensors.complete(config, folder), messages, tensors
    config, more = resolve_mtp(config, tensors)
    return config, [*messages, *more], tensors
