# SPDX-License-Identifier: Apache-2.0
"""How much each token counts for an expert: the size of the gradient at the expert's outputs.

To second order an error d of a matrix' output on a token changes the model's answer by half of
d F d^T, F being the Fisher information of that output: the mean of g g^T over gradients g of
-log p(label), with labels drawn from the model's own p. Its diagonal, taken alike for all channels,
weighs the token: s^2 = mean over channels of g^2 (docs/notes/calibration.md).

The forward pass goes layer by layer and keeps the inputs of the layers in a file. The backward pass
then goes from the last layer to the first, again with one layer's weights in memory at a time, and
computes each layer anew from its inputs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import paddle
from paddle import Tensor

from ..checkpoint.writer import TOKEN_WEIGHTS_FILE
from ..errors import CcqError
from ..families.ernie45 import FINAL_NORM, head_name
from ..families.tensor import PROJECTIONS
from ..files import write_whole
from ..models.ernie import Block, positions_of
from ..models.gradients import CHUNK_LOGITS, Backward, LayerPass
from ..models.weights import WeightSource
from ..units import gigabytes
from .sequential_forward import MEMORY_FOR_STATES, SequentialForward, state_array, state_bytes
from .settings import CalibrationSettings
from .text import CalibrationText

# Seed of the labels; it is fixed, so that the same text gives the same statistics.
SEED = 0


@dataclass(frozen=True)
class LayerWeights:
    """One MoE layer's weights of all tokens.

    Attributes:
        chosen: int16 [tokens, k], the experts of each token.
        up_gate_proj, down_proj: float32 [tokens, k], root mean square over the output channels of
            the gradient at the expert's matrix. It holds the routing weight already.
    """

    chosen: np.ndarray
    up_gate_proj: np.ndarray
    down_proj: np.ndarray

    def factors(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """The weights in the order of `chosen` [tokens, k], by projection.

        The layers were computed from inputs rounded to bfloat16, so here and there another expert
        may have been chosen; a token counts nothing for one that was not.
        """
        same = chosen[:, :, None] == self.chosen[:, None, :]
        return {name: np.einsum("tij,tj->ti", same, getattr(self, name)) for name in PROJECTIONS}


def layer_input_bytes(config: Any, tokens: int) -> int:
    """Bytes of the file with the layers' inputs."""
    layers = config.num_hidden_layers - min(config.moe_layers(), default=0)
    return 2 * layers * tokens * config.hidden_size


def kept_token_weights(
    source: WeightSource,
    text: CalibrationText,
    settings: CalibrationSettings,
    threads: int,
    folder: Path | None,
) -> dict[int, LayerWeights]:
    """The weights by layer: those that an interrupted run left in `folder`, or computed now."""
    provenance = json.dumps(text.as_dict(settings), sort_keys=True)
    path = folder / TOKEN_WEIGHTS_FILE if folder else None
    if path and path.exists():
        try:
            return _load(path, provenance)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            path.unlink()  # of another text, or cut off by a full disk
    found = token_weights(source, text.windows, threads, folder)
    if path:
        _save(path, provenance, found)
    return found


def token_weights(
    source: WeightSource, windows: Sequence[np.ndarray], threads: int, folder: Path | None = None
) -> dict[int, LayerWeights]:
    """The weights of all MoE layers.

    Each window is computed by one thread: the numbers don't depend on how many there are.

    Raises:
        CcqError: if the disk has no room for the layers' inputs, or the weights are damaged.
    """
    config = source.config
    first = min(config.moe_layers())
    tokens = sum(window.size for window in windows)
    states = state_bytes(tokens, config.hidden_size)
    needed = layer_input_bytes(config, tokens)
    if states > MEMORY_FOR_STATES:
        # Both arrays of the forward pass and the array of gradients are files on this disk too.
        needed += states * 3 // 2
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if free < needed:
        raise CcqError(
            "--calibration-weights gradient: keeping the inputs of the layers needs"
            f" {gigabytes(needed)}, the disk has {gigabytes(free)} free; make room, use fewer"
            " --calibration-tokens, or --calibration-weights router"
        )
    forward = SequentialForward(source, windows, threads, folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            shape = (config.num_hidden_layers - first, *forward.states.shape)
            inputs = np.memmap(file, ml_dtypes.bfloat16, "w+", shape=shape)
            for layer in range(config.num_hidden_layers):
                if layer >= first:
                    for begin, end in forward.spans:
                        part = forward.states[begin:end].astype(ml_dtypes.bfloat16)
                        inputs[layer - first, begin:end] = part
                forward.enter()
                forward.leave()
            spilled = isinstance(forward.states, np.memmap)
            gradients = state_array(forward.states.shape, folder if spilled else None)
            _last_layer_gradients(source, windows, forward, gradients)
            forward.states = forward.inputs = None
            found = {}
            for layer in reversed(range(first, config.num_hidden_layers)):
                weights = _layer_backward(source, layer, forward, inputs[layer - first], gradients)
                if weights is not None:
                    found[layer] = weights
            del inputs
    finally:
        forward.close()
    return found


def _last_layer_gradients(
    source: WeightSource,
    windows: Sequence[np.ndarray],
    forward: SequentialForward,
    gradients: np.ndarray,
) -> None:
    """Gradients of -log p(label), summed over a window's tokens, at the last layer's outputs."""
    config = source.config
    norm = paddle.to_tensor(source.read(FINAL_NORM))
    head = paddle.to_tensor(np.ascontiguousarray(source.read(head_name(config)), np.float32))
    tied = config.tie_word_embeddings

    @paddle.no_grad()
    def one(index: int) -> None:
        rng = np.random.default_rng([SEED, index])
        first, last = forward.spans[index]
        states = paddle.to_tensor(forward.states[first:last])
        hidden, backward = LayerPass(config, {}).norm(FINAL_NORM, states, norm)
        at_once = max(1, CHUNK_LOGITS // config.vocab_size)
        parts = []
        for row in range(0, last - first, at_once):
            logits = paddle.matmul(hidden[row : row + at_once], head, transpose_y=tied)
            p = paddle.nn.functional.softmax(logits, axis=-1).numpy()
            p[np.arange(len(p)), draw(p, rng)] -= 1
            parts.append(paddle.matmul(paddle.to_tensor(p), head, transpose_y=not tied))
        gradients[first:last] = backward(paddle.concat(parts)).numpy()
        if not np.isfinite(gradients[first:last]).all():
            raise CcqError(
                "--calibration: the model's gradients are not finite; its weights are damaged"
            )

    forward.map(one, len(windows))


def draw(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index for each row of probabilities [rows, count]."""
    sums = np.cumsum(p, axis=1)
    at = rng.random(len(p), dtype=np.float32)[:, None] * sums[:, -1:]
    return np.minimum((sums <= at).sum(axis=1), p.shape[1] - 1)


def _layer_backward(
    source: WeightSource,
    layer: int,
    forward: SequentialForward,
    inputs: np.ndarray,
    gradients: np.ndarray,
) -> LayerWeights | None:
    """Turn `gradients` at a layer's outputs into those at its inputs, in place.

    Returns the token weights of the layer's experts, or None for a layer without experts.
    """
    config = source.config
    block = Block(source, layer)
    lengths = {last - first for first, last in forward.spans}
    positions = {n: positions_of(config, 0, n) for n in lengths}
    moe = config.is_moe_layer(layer)
    shape = (len(gradients), config.moe_k)
    chosen = np.zeros(shape, np.int16)
    found = {name: np.zeros(shape, np.float32) for name in PROJECTIONS}

    @paddle.no_grad()
    def one(index: int) -> None:
        first, last = forward.spans[index]
        layer_pass = _Recording(config)
        x = paddle.to_tensor(inputs[first:last].astype(np.float32))
        _, backward = layer_pass.block(f"ernie.layers.{layer}", block, x, *positions[last - first])
        gradients[first:last] = backward(paddle.to_tensor(gradients[first:last])).numpy()
        if moe:
            chosen[first:last] = layer_pass.chosen
            for name, into in found.items():
                layer_pass.put(name, into[first:last])

    forward.map(one, len(forward.spans))
    return LayerWeights(chosen, **found) if moe else None


class _Recording(LayerPass):
    """Keeps the size of the gradient at the output of every expert's matrix."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, {})
        self.chosen: np.ndarray | None = None
        self.sizes: dict[str, np.ndarray] = {}

    def routed(self, name: str, chosen: Tensor) -> None:
        self.chosen = chosen.numpy()

    def _product(self, name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Backward]:
        y, backward = super()._product(name, x, weight)
        if not self.config.tensors[name].is_expert:
            return y, backward

        def recorded(gradient: Tensor) -> Tensor:
            self.sizes[name] = paddle.square(gradient).mean(axis=-1).sqrt().numpy()
            return backward(gradient)

        return y, recorded

    def put(self, projection: str, into: np.ndarray) -> None:
        """The sizes of a projection, at [token, slot]; an expert's tokens are in order."""
        for name, sizes in self.sizes.items():
            tensor = self.config.tensors[name]
            if tensor.projection == projection:
                into[np.nonzero(self.chosen == tensor.expert)] = sizes


def _save(path: Path, provenance: str, found: dict[int, LayerWeights]) -> None:
    arrays = {f"{layer}.{k}": v for layer, w in found.items() for k, v in vars(w).items()}

    def write(to: Path) -> None:
        with open(to, "wb") as file:
            np.savez(file, of=np.array(provenance), **arrays)

    write_whole(path, write)


def _load(path: Path, provenance: str) -> dict[int, LayerWeights]:
    with np.load(path) as file:
        if str(file["of"]) != provenance:
            raise ValueError("of another calibration")
        layers = sorted({int(name.split(".")[0]) for name in file.files if name != "of"})
        parts = ("chosen", *PROJECTIONS)
        return {n: LayerWeights(*(file[f"{n}.{part}"] for part in parts)) for n in layers}
