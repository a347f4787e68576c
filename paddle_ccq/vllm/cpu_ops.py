# SPDX-License-Identifier: Apache-2.0
"""The package's CPU operators as torch operators, for vLLM's builds that run on a processor.

A layer's packed weights are objects of the compiled core; operators know them by a number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import ops
from ..ops.dense import DenseMatrix, multiply
from ..ops.packed import PackedExperts

_KEPT: list[Any] = []


def keep(weights: Any) -> int:
    """The number by which an operator finds a layer's weights."""
    _KEPT.append(weights)
    return len(_KEPT) - 1


class SingleExperts:
    """Experts of an integer format, one MLP each."""

    def __init__(self, up_gate: list[DenseMatrix], down: list[DenseMatrix]) -> None:
        self.up_gate, self.down = up_gate, down

    def __len__(self) -> int:
        return len(self.up_gate)

    def __call__(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Sum over a token's experts `ids` [tokens, k] of their outputs times `weights`.

        Experts of other ranks, -1 among them, add nothing.
        """
        y = np.zeros_like(x)
        for expert in np.unique(ids):
            if not 0 <= expert < len(self):  # of another rank
                continue
            rows, places = np.nonzero(ids == expert)
            gate, up = np.split(multiply(x[rows], self.up_gate[expert]), 2, axis=-1)
            with np.errstate(over="ignore"):
                middle = gate / (1 + np.exp(-gate)) * up
            # A token chooses an expert once, so no row stands twice.
            y[rows] += weights[rows, places, None] * multiply(middle, self.down[expert])
        return y


def _float32(x: torch.Tensor) -> np.ndarray:
    return x.detach().to(torch.float32).contiguous().numpy()


def _experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, number: int
) -> torch.Tensor:
    experts = _KEPT[number]
    chosen, routing_weights = ids.to(torch.int64).numpy(), _float32(weights)
    if isinstance(experts, PackedExperts):
        elsewhere = (chosen < 0) | (chosen >= len(experts))  # experts of other ranks add nothing
        if elsewhere.any():
            chosen, routing_weights = (
                np.where(elsewhere, 0, chosen),
                np.where(elsewhere, 0, routing_weights),
            )
        routing_weights = np.ascontiguousarray(routing_weights, np.float32)
        y = ops.moe(_float32(x), experts, np.ascontiguousarray(chosen), routing_weights, fine=True)
    else:
        y = experts(_float32(x), chosen, routing_weights)
    return torch.from_numpy(y).to(x.dtype)


def _linear(x: torch.Tensor, number: int, columns: int) -> torch.Tensor:
    rows = _float32(x.reshape(-1, x.shape[-1]))
    y = torch.from_numpy(multiply(rows, _KEPT[number])).to(x.dtype)
    return y.view(*x.shape[:-1], columns)


_LIBRARY = torch.library.Library("paddle_ccq_cpu", "DEF")
_LIBRARY.define("experts(Tensor x, Tensor weights, Tensor ids, int number) -> Tensor")
_LIBRARY.impl("experts", _experts, "CPU")
_LIBRARY._register_fake("experts", lambda x, *_: torch.empty_like(x))
_LIBRARY.define("linear(Tensor x, int number, int columns) -> Tensor")
_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY._register_fake("linear", lambda x, number, columns: x.new_empty((*x.shape[:-1], columns)))

experts = torch.ops.paddle_ccq_cpu.experts
linear = torch.ops.paddle_ccq_cpu.linear
