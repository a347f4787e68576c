# SPDX-License-Identifier: Apache-2.0
"""Tiny models with layers for multi-token prediction, and such layers in a shard of their own."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from helpers import family_models
from helpers.synthetic import write_tensors
from paddle_ccq.checkpoint.safetensors_io import INDEX_FILE, TensorFolder, shard_name
from paddle_ccq.families.registry import read_config


def with_layer(folder: Path, case: str, **changes: object) -> set[str]:
    """A tiny model of a family with random tensors of its layer for prediction; their names."""
    config = {**family_models.by_name(case).config, **changes}
    rng = np.random.default_rng(1)
    model = read_config(config)
    tensors, added = {}, set()
    for tensor in model.tensors.values():
        for part in tensor.sources["pt"].parts:
            values = rng.standard_normal(part.shape).astype(np.float32) * 0.05
            tensors[part.name] = values.astype(ml_dtypes.bfloat16)
            if model.is_prediction(tensor):
                added.add(part.name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors, shards=2)
    return added


def in_own_shard(source: Path, folder: Path, names: Collection[str]) -> Path:
    """A copy of a model whose tensors `names` lie in the second of two shards; that shard."""
    tensors = TensorFolder(source)
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    homes = {name: shard_name(name in names, 2) for name in sorted(tensors.names())}
    for shard in set(homes.values()):
        chosen = {name: tensors.read(name) for name, home in homes.items() if home == shard}
        save_file(chosen, folder / shard, metadata={"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder / shard_name(1, 2)
