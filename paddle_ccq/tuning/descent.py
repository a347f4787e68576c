# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps on the text, and the loss on held-out windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import CcqError
from ..evaluation.text import spread
from ..models.ernie import Ernie
from ..models.gradients import WHOLE, Pass, loss_of
from .optimizer import Adam, schedule
from .parameters import Parameter
from .settings import TuningSettings


@dataclass(frozen=True)
class Example:
    """A window of tokens and the float model's final hidden states for it."""

    tokens: np.ndarray
    teacher: np.ndarray


def split_held_out(count: int, every: int) -> tuple[list[int], list[int]]:
    """Indices to learn from and indices to measure on, the latter spread evenly.

    Raises:
        CcqError: if there are not at least two windows.
    """
    if count < 2:
        raise CcqError(
            "--calibration: the text gives less than two windows, and one is needed to measure on;"
            " use more text"
        )
    wanted = max(1, count // every)
    held = spread(count, wanted)
    return [i for i in range(count) if i not in set(held)], held


def mean_loss(model: Ernie, examples: Sequence[Example], pool: ThreadPoolExecutor) -> float:
    """Mean KL(float || model) per token."""
    losses = pool.map(lambda e: loss_of(model, e.tokens, e.teacher), examples)
    return sum(losses) / sum(e.tokens.size for e in examples)


def descend(
    model: Ernie,
    parameters: dict[str, Parameter],
    learned: Sequence[Example],
    held_out: Sequence[Example],
    settings: TuningSettings,
    threads: int,
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[float, float]:
    """Tune `parameters` in place; the held-out loss before and after.

    The state with the least held-out loss is kept. A window's gradients are computed by one thread
    and added in the batch's order: the result does not depend on the number of threads.

    Raises:
        CcqError: if the loss is not finite.
    """
    wanted = {name: p.kind for name, p in parameters.items()}
    rates = {
        name: settings.dense_learning_rate if _dense(p) else settings.learning_rate
        for name, p in parameters.items()
    }
    adam = Adam(parameters, rates)
    rng = np.random.default_rng(settings.seed)
    order = np.concatenate([rng.permutation(len(learned)) for _ in range(settings.passes)])
    steps = max(1, len(order) // settings.batch)
    every = max(1, steps // settings.checks)

    def one(index: int) -> dict[str, np.ndarray]:
        window_pass = Pass(model, wanted)
        loss = window_pass.run(learned[index].tokens, learned[index].teacher)
        if not np.isfinite(loss):
            raise CcqError(
                "the loss is not finite: the weights are damaged or --learning-rate is too high"
            )
        return window_pass.gradients

    with ThreadPoolExecutor(threads) as pool:
        before = best = mean_loss(model, held_out, pool)
        best_values = {name: p.value.copy() for name, p in parameters.items()}
        report(0, steps, before)
        for step in range(steps):
            batch = order[step * settings.batch : (step + 1) * settings.batch]
            tokens = sum(learned[i].tokens.size for i in batch)
            gradients: dict[str, np.ndarray] = {}
            for found in pool.map(one, batch):
                for name, gradient in found.items():
                    known = gradients.get(name)
                    gradients[name] = gradient if known is None else known + gradient
            gradients = {name: g / tokens for name, g in gradients.items()}
            adam.step(gradients, schedule(step, steps))
            if (step + 1) % every == 0 or step + 1 == steps:
                loss = mean_loss(model, held_out, pool)
                report(step + 1, steps, loss)
                if loss < best:
                    best = loss
                    best_values = {name: p.value.copy() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.put(best_values[name])
    return before, best


def _dense(parameter: Parameter) -> bool:
    return parameter.kind == WHOLE and parameter.spec.is_linear
