# SPDX-License-Identifier: Apache-2.0
"""Weights as the engine holds them: packed as they are stored, floats in as few bytes as possible.

The engine uses NumPy and not Paddle for three reasons. The packed products take and return NumPy
arrays; a step of one token is many small operators, which cost less to call in NumPy; and importing
Paddle alone takes more memory than the experts of a 21B model's layer.
"""

from __future__ import annotations

import numpy as np

from .. import ops
from ..checkpoint.reader import Checkpoint
from ..codec import formats
from ..errors import CcqError
from ..models.weights import ExactWeights
from ..ops import gpu_moe
from ..ops.dense import INTEGER_FORMATS, DenseMatrix, multiply
from ..ops.gpu_memory import Device
from ..ops.gpu_moe import ROW_MULTIPLE, GpuExperts


class Linear:
    """One matrix [in, out] that rows are multiplied by, packed where it is stored packed."""

    def __init__(self, weights: ExactWeights, name: str, threads: int | None) -> None:
        checkpoint = weights.checkpoint
        format_name, shape = checkpoint.format_of(name), checkpoint.shape(name)
        self.threads = threads
        self.packed = self.dense = None
        # The packed layout wants whole lanes of columns; the others are few and small.
        if formats.get(format_name).is_ccq and shape[1] % 16 == 0:
            self.packed = _repack(checkpoint, name)
        elif format_name in INTEGER_FORMATS:
            tensors = checkpoint.packed(name)
            self.dense = DenseMatrix.from_integers(format_name, tensors)
        else:
            self.dense = DenseMatrix.from_floats(weights.read(name))
        self.nbytes = (self.packed or self.dense).nbytes

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float32 [rows, in] -> [rows, out]."""
        if self.packed is not None:
            return ops.linear(np.ascontiguousarray(x), self.packed, self.threads, fine=True)
        return multiply(x, self.dense, self.threads)


class Embedding:
    """Vectors of tokens, and logits where the output head is tied to them (one copy for both)."""

    def __init__(self, weights: ExactWeights, threads: int | None) -> None:
        name = "ernie.embed_tokens.weight"
        self.threads = threads
        self.table = self.tied = None
        if weights.config.tie_word_embeddings:
            self.tied = DenseMatrix.from_floats(weights.read(name).T)
            self.nbytes = self.tied.nbytes
        else:
            self.table = weights.checkpoint.read_stored(name)
            self.nbytes = self.table.nbytes

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Token numbers [tokens] -> float32 [tokens, hidden]."""
        if self.tied is not None:
            return self.tied.columns(tokens)
        return self.table[tokens].astype(np.float32)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Normed states float32 [rows, hidden] -> [rows, vocab]; only where the output is tied."""
        return multiply(x, self.tied, self.threads)


class MLP:
    """SwiGLU: a dense layer's MLP, the shared experts, or an expert that runs on its own."""

    def __init__(self, weights: ExactWeights, name: str, threads: int | None) -> None:
        self.up_gate = Linear(weights, f"{name}.up_gate_proj.weight", threads)
        self.down = Linear(weights, f"{name}.down_proj.weight", threads)
        self.nbytes = self.up_gate.nbytes + self.down.nbytes

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float32 [rows, hidden] -> the same shape."""
        gate, up = np.split(self.up_gate(x), 2, axis=-1)
        return self.down(silu(gate) * up)


class Experts:
    """The routed experts of one layer.

    Experts that all have the same CCQ format run as one grouped product; WINT2 and CCQ-2T experts
    run on the GPU if a device is given. All other experts (wint4, wint8, floats, or several formats
    within one layer) run one after the other.
    """

    def __init__(
        self,
        weights: ExactWeights,
        name: str,
        threads: int | None,
        device: Device | None = None,
    ) -> None:
        checkpoint, count = weights.checkpoint, weights.config.moe_num_experts
        names = {
            part: [f"{name}.{e}.{part}_proj.weight" for e in range(count)]
            for part in ("up_gate", "down")
        }
        found = {checkpoint.format_of(n) for part in names.values() for n in part}
        self.threads, self.count = threads, count
        self.packed, self.gpu, self.single = None, None, []
        format_name = next(iter(found))
        sizes = [size for part in names.values() for size in checkpoint.shape(part[0])]
        grouped = len(found) == 1 and formats.get(format_name).is_ccq
        here = device and len(found) == 1 and format_name in gpu_moe.FORMATS
        if here and not any(size % ROW_MULTIPLE for size in sizes):
            stored = ([checkpoint.packed(n) for n in part] for part in names.values())
            order = checkpoint.row_order_of(names["down"][0])
            self.gpu = GpuExperts(*stored, order, device, format_name)
            self.nbytes = self.gpu.nbytes
        elif grouped and not any(size % 16 for size in sizes):
            # One matrix at a time, so that a layer is never in memory twice.
            up, down = (tuple(_repack(checkpoint, n) for n in part) for part in names.values())
            self.packed = ops.PackedExperts(up, down)
            self.nbytes = self.packed.nbytes
        else:
            self.single = [MLP(weights, f"{name}.{e}", threads) for e in range(count)]
            self.nbytes = sum(expert.nbytes for expert in self.single)

    def __call__(
        self, x: np.ndarray, chosen: np.ndarray, routing_weights: np.ndarray
    ) -> np.ndarray:
        """Sum over j of routing_weights[t, j] * expert chosen[t, j] of x[t]."""
        if self.gpu is not None:
            return self.gpu(x, chosen, routing_weights)
        if self.packed is not None:
            x = np.ascontiguousarray(x)
            return ops.moe(x, self.packed, chosen, routing_weights, self.threads, fine=True)
        parts = np.empty((*chosen.shape, x.shape[1]), np.float32)
        for expert in np.unique(chosen):
            rows, places = np.nonzero(chosen == expert)
            parts[rows, places] = self.single[expert](x[rows])
        # Summed one after the other, as in ops.moe: a BLAS would choose its order of summation by
        # the number of tokens.
        y = np.zeros_like(x)
        for j in range(chosen.shape[1]):
            y += routing_weights[:, j, None] * parts[:, j]
        return y


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    # exp overflows to infinity far on the left, where the quotient is 0 as it should be.
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def _repack(checkpoint: Checkpoint, name: str) -> ops.PackedMatrix:
    format_name = checkpoint.format_of(name)
    order = checkpoint.row_order_of(name)
    try:
        return ops.repack(format_name, checkpoint.packed(name), order)
    except ValueError as error:
        raise CcqError(f"{checkpoint.path}: {name}: {error}") from None
