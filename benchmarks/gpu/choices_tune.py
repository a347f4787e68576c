# SPDX-License-Identifier: Apache-2.0
"""Tuning as the product does it, in PyTorch; and of more than the product tunes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from choices_list import Way
from torch import Tensor
from torch_ernie import Ernie, Weights

MEAN_MEMORY, SQUARE_MEMORY, WARM_UP = 0.9, 0.99, 0.05
FACTOR, CODE = "factor of ", "code of "


@dataclass
class Coded:
    """Experts as decoded, and what they are decoded from, by expert key."""

    weights: Weights
    supers: dict[str, Tensor] = field(default_factory=dict)  # [E, N]
    scales: dict[str, Tensor] = field(default_factory=dict)  # [E, N, K/64]
    books: dict[str, Tensor] = field(default_factory=dict)  # [E, N, 4, 256]


def straight(x: Tensor, stored: Tensor) -> Tensor:
    """What is stored of x, with the gradient of x itself."""
    return x + (stored - x).detach()


def in_bfloat16(x: Tensor) -> Tensor:
    return straight(x, x.detach().bfloat16().float())


def in_wint8(x: Tensor) -> Tensor:
    scale = (x.detach().abs().amax(0) / 127).clamp_min(1e-30).bfloat16().float()
    return straight(x, (x.detach() / scale).round().clamp(-127, 127) * scale)


class Tuned:
    """The tuned values in float64, by name, and the model that is stored of them."""

    def __init__(self, net: Ernie, coded: Coded, way: Way) -> None:
        self.coded = coded
        self.dense = set(net.dense_names(coded.weights))
        self.values: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        self.units: dict[str, float] = {}
        for name, value in coded.weights.items():
            if name in self.dense:
                self._add(name, value, way.dense)
            elif name.endswith(("norm.weight", "mlp.gate.weight")):
                self._add(name, value, way.rate)
            elif name == "ernie.embed_tokens.weight" and way.embedding:
                self._add(name, value, way.embedding)
        self.states: dict[str, Tensor] = {}
        for name, supers in coded.supers.items():
            self._add(FACTOR + name, torch.zeros_like(supers), way.rate, 1.0)
            scale = coded.scales[name].repeat_interleave(64, -1) * supers[..., None]
            states = coded.weights[name].transpose(1, 2) / scale.clamp_min(1e-30)
            self.states[name] = states
            if way.codes:
                size = float(coded.books[name].square().mean().sqrt())
                self._add(CODE + name, states, way.codes, size)

    def _add(self, name: str, value: Tensor, rate: float, unit: float | None = None) -> None:
        self.values[name] = value.double()
        self.rates[name] = rate
        self.units[name] = float(value.double().square().mean().sqrt()) if unit is None else unit

    def weights(self) -> tuple[Weights, dict[str, Tensor]]:
        """The model, and the leaves that gradients are wanted of."""
        leaves = {n: v.float().requires_grad_() for n, v in self.values.items()}
        weights = dict(self.coded.weights)
        for name, leaf in leaves.items():
            if name.startswith((FACTOR, CODE)):
                continue
            exact = name.endswith("mlp.gate.weight")
            weights[name] = (
                in_wint8(leaf) if name in self.dense else leaf if exact else in_bfloat16(leaf)
            )
        for name, supers in self.coded.supers.items():
            factor = in_bfloat16(supers * leaves[FACTOR + name].exp())
            if CODE + name in leaves:
                moved = leaves[CODE + name]
                states = straight(moved, self._nearest(name, moved.detach()))
                local = self.coded.scales[name].repeat_interleave(64, -1)
                weights[name] = (states * local * factor[..., None]).transpose(1, 2)
            else:
                ratio = factor / supers.clamp_min(1e-30)
                weights[name] = self.coded.weights[name] * ratio[:, None, :]
        return weights, leaves

    def _nearest(self, name: str, states: Tensor) -> Tensor:
        """The decodable vectors nearest to `states` [E, N, K]."""
        book = self.coded.books[name].flatten(0, 1)  # [E N, 4, 256]
        vectors = states.reshape(len(book), -1, 4)
        match = torch.baddbmm(-0.5 * book.square().sum(1, keepdim=True), vectors, book)
        best = match.argmax(-1)[..., None].expand(-1, -1, 4)
        return torch.gather(book.transpose(1, 2), 1, best).reshape(states.shape)


def tune(net: Ernie, reference: Weights, coded: Coded, windows: Tensor, way: Way) -> Weights:
    """The tuned model; Adam with relative steps, as paddle_ccq/tuning/optimizer.py."""
    tuned = Tuned(net, coded, way)
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(windows)) for _ in range(way.passes)])
    steps = len(order) // way.batch
    with torch.no_grad():  # once for all passes
        parts = windows.split(way.batch)
        hidden = torch.cat([net.hidden(reference, part) for part in parts])
    mean = {n: torch.zeros_like(v, dtype=torch.float32) for n, v in tuned.values.items()}
    square = {n: torch.zeros_like(m) for n, m in mean.items()}
    for step in range(steps):
        batch = order[step * way.batch : (step + 1) * way.batch]
        chosen = torch.from_numpy(batch).to(windows.device)
        tokens, wanted = windows[chosen], net.log_p(reference, hidden[chosen])
        weights, leaves = tuned.weights()
        loss = (wanted.exp() * (wanted - net(weights, tokens))).sum() / tokens.numel()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
        schedule = warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for name, gradient in zip(leaves, gradients, strict=True):
                gradient = gradient * tuned.units[name]
                mean[name].lerp_(gradient, 1 - MEAN_MEMORY)
                square[name].lerp_(gradient.square(), 1 - SQUARE_MEMORY)
                root = (square[name] / (1 - SQUARE_MEMORY ** (step + 1))).sqrt()
                direction = mean[name] / (1 - MEAN_MEMORY ** (step + 1)) / root
                direction = torch.where(root > 0, direction, 0).double()
                tuned.values[name] -= tuned.rates[name] * schedule * tuned.units[name] * direction
    with torch.no_grad():
        return tuned.weights()[0]
