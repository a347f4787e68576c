# SPDX-License-Identifier: Apache-2.0
"""The forward pass of the float model over all windows of a text, one layer in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle

from ..errors import CcqError
from ..families.ernie45 import EMBEDDING
from ..models.ernie import MLP, Block, MoE, positions_of
from ..models.weights import WeightSource

# Hidden states larger than this are kept in a file.
MEMORY_FOR_STATES = 4_000_000_000


def state_bytes(tokens: int, hidden: int) -> int:
    """Bytes of the hidden states and the MLP inputs of all tokens in float32."""
    return 2 * 4 * tokens * hidden


class SequentialForward:
    """Hidden states of all windows, moved through the model layer by layer.

    `enter` runs a layer's attention and router. After it `inputs` holds the inputs of the layer's
    MLP, `chosen` the experts of each token and `routing_weights` their weights [tokens, k]. `leave`
    adds the MLP's outputs to `states`. Windows are independent and each is computed by one thread,
    so the numbers don't depend on the thread count.
    """

    def __init__(
        self,
        weights: WeightSource,
        windows: Sequence[np.ndarray],
        threads: int,
        spill_folder: Path | None = None,
    ) -> None:
        self.weights = weights
        self.config = weights.config
        self.pool = ThreadPoolExecutor(threads)
        ends = np.cumsum([window.size for window in windows]).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        shape = (ends[-1], self.config.hidden_size)
        spilled = state_bytes(*shape) > MEMORY_FOR_STATES
        self.states = state_array(shape, spill_folder if spilled else None)
        self.inputs = state_array(shape, spill_folder if spilled else None)
        embed = weights.read(EMBEDDING)
        for (first, last), window in zip(self.spans, windows, strict=True):
            self.states[first:last] = embed[window]
        self.layer = -1
        self.block: Block | None = None
        self.chosen: np.ndarray | None = None
        self.routing_weights: np.ndarray | None = None

    def map(self, function: Callable[[int], object], count: int) -> list[object]:
        """function(0) .. function(count - 1) on the forward pass' threads, results in order."""
        return list(self.pool.map(function, range(count)))

    @paddle.no_grad()
    def enter(self) -> None:
        """Go on to the next layer, up to the inputs of its MLP.

        Raises:
            CcqError: if activations are not finite: the model's weights are damaged.
        """
        self.layer += 1
        block = self.block = Block(self.weights, self.layer)
        moe = isinstance(block.mlp, MoE)
        self.chosen = self.routing_weights = None
        if moe:
            shape = (len(self.inputs), self.config.moe_k)
            self.chosen, self.routing_weights = (
                np.empty(shape, np.int32),
                np.empty(shape, np.float32),
            )
        lengths = {last - first for first, last in self.spans}
        self._positions = {n: positions_of(self.config, 0, n) for n in lengths}

        def window(index: int) -> None:
            first, last = self.spans[index]
            x = paddle.to_tensor(self.states[first:last]).unsqueeze(0)
            x, normed = block.attend(x, *self._positions[last - first], None)
            self.states[first:last] = x[0].numpy()
            inputs = self.inputs[first:last] = normed.numpy()
            if not np.isfinite(inputs).all():
                raise CcqError(
                    f"--calibration: the activations of layer {self.layer} are not finite; the"
                    " model's weights are damaged"
                )
            if moe:
                chosen, weights = block.mlp.route(normed)
                self.chosen[first:last] = chosen.numpy()
                self.routing_weights[first:last] = weights.numpy()

        self.map(window, len(self.spans))

    @paddle.no_grad()
    def leave(self, mlp: MLP | MoE | None = None) -> None:
        """Add the outputs of the layer's MLP, or of one put in its place."""
        mlp = mlp or self.block.mlp

        def window(index: int) -> None:
            first, last = self.spans[index]
            self.states[first:last] += mlp(paddle.to_tensor(self.inputs[first:last])).numpy()

        self.map(window, len(self.spans))
        self.block = None

    @paddle.no_grad()
    def outputs(self, mlp: MLP | MoE, into: np.ndarray) -> None:
        """Write the states that `leave(mlp)` would lead to into an array, and change no other."""

        def window(index: int) -> None:
            first, last = self.spans[index]
            added = mlp(paddle.to_tensor(self.inputs[first:last])).numpy()
            into[first:last] = self.states[first:last] + added

        self.map(window, len(self.spans))

    @paddle.no_grad()
    def carry(self, states: np.ndarray) -> None:
        """Move other states of the same windows through the whole layer, in place."""

        def window(index: int) -> None:
            first, last = self.spans[index]
            x = paddle.to_tensor(states[first:last]).unsqueeze(0)
            states[first:last] = self.block(x, *self._positions[last - first], None)[0].numpy()

        self.map(window, len(self.spans))

    def close(self) -> None:
        """End the threads and free the states."""
        self.pool.shutdown()
        self.states = self.inputs = self.block = None


def state_array(shape: tuple[int, ...], folder: Path | None) -> np.ndarray:
    """A float32 array in memory or, with a folder, in an unnamed file that ends with the array."""
    if folder is None:
        return np.empty(shape, np.float32)
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    return np.memmap(file, np.float32, "w+", shape=shape)
