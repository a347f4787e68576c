# SPDX-License-Identifier: Apache-2.0
"""One tuning run: from two checkpoints and a text to a finished folder."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.settings import CalibrationSettings
from ..calibration.text import CalibrationText, read_calibration_text
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import Workplace
from ..errors import CcqError
from ..families.ernie45 import EMBEDDING
from ..models.ernie import Ernie
from ..texts.documents import Texts
from ..version import __version__
from .descent import Example, descend, mean_loss, split_held_out
from .memory import check_memory
from .output import check_room, write_tuned
from .parameters import collect, stored_tensors
from .settings import TuningSettings
from .teacher import final_states

Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TuneResult:
    """The result of a run; losses are the mean KL to the float model on the held-out windows.

    `after` is that of the stored, rounded tensors.
    """

    output: Path
    before: float
    after: float
    tokens: int
    tensors: int


def check_same_model(quantized: Checkpoint, source: Checkpoint) -> None:
    """Refuse a float model that the quantized one was not made from.

    Raises:
        CcqError: naming the first thing that differs.
    """
    if not quantized.is_quantized:
        raise CcqError(f"{quantized.path}: not quantized; there is nothing to tune")
    if source.is_quantized:
        raise CcqError(f"--model {source.path}: quantized itself; give the float checkpoint")
    ours, theirs = (one.config.without_mtp().tensors.shapes for one in (quantized, source))
    if ours != theirs:
        name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
        raise CcqError(f"--model {source.path}: another model; the two differ in {name}")
    name = EMBEDDING
    if not np.array_equal(quantized.read(name), _as_stored(source.read(name), quantized, name)):
        raise CcqError(
            f"--model {source.path}: another model than {quantized.path} was made from: their"
            f" {name} differ"
        )


def _as_stored(values: np.ndarray, checkpoint: Checkpoint, name: str) -> np.ndarray:
    stored = checkpoint.read_stored(name).dtype
    return values.astype(stored).astype(np.float32)


def run_tuning(
    quantized: Checkpoint,
    source: Checkpoint,
    calibration: Texts,
    output: Path,
    settings: TuningSettings,
    threads: int,
    report: Report = lambda step, steps, loss: None,
) -> TuneResult:
    """Tune `quantized` towards `source` on a text and write the result into the new `output`.

    Nothing is left behind by a run that fails or is interrupted.

    Raises:
        CcqError: if `output` is there already, the two are not one model, or the loss did
            not go down.
    """
    settings.check()
    check_same_model(quantized, source)
    check_memory(quantized, settings, threads)
    text_settings = CalibrationSettings(tokens=settings.tokens, window=settings.window)
    with Workplace(output) as workplace:
        # A tuning run has no journal, so files that lie here were left by a run that was killed.
        workplace.discard()
        if output.exists():
            raise CcqError(f"{output}: exists already; choose another --output or remove it")
        try:
            check_room(quantized, workplace.folder)
            text = read_calibration_text(calibration, source, text_settings)
            result = _tuned(quantized, source, text, workplace, settings, threads, report)
            workplace.publish()
        except BaseException:
            workplace.discard()
            raise
        workplace.clean()
    return result


def _tuned(
    quantized: Checkpoint,
    source: Checkpoint,
    text: CalibrationText,
    workplace: Workplace,
    settings: TuningSettings,
    threads: int,
    report: Report,
) -> TuneResult:
    learned_at, held_at = split_held_out(len(text.windows), settings.held_out)
    states = final_states(source, text.windows, threads, workplace.folder)
    examples = [Example(w, s) for w, s in zip(text.windows, states, strict=True)]
    learned, held_out = [examples[i] for i in learned_at], [examples[i] for i in held_at]
    model = Ernie(quantized)
    parameters = collect(model, quantized)
    before, best = descend(model, parameters, learned, held_out, settings, threads, report)
    if not best < before:
        raise CcqError(
            f"tuning did not lower the loss on held-out text ({before:.4f} nats); nothing was"
            " written; use more --tokens or a lower --learning-rate"
        )
    tensors: dict[str, np.ndarray] = {}
    for parameter in parameters.values():
        tensors |= stored_tensors(parameter, quantized, model)
    del model, parameters
    rounded = Ernie(quantized.with_replaced(tensors))
    with ThreadPoolExecutor(threads) as pool:
        after = mean_loss(rounded, held_out, pool)
    if not after < before:
        raise CcqError(
            f"rounding to the stored types undid the tuning ({before:.4f} nats before,"
            f" {after:.4f} after); nothing was written; use a higher --learning-rate"
        )
    tokens = sum(example.tokens.size for example in learned)
    provenance: dict[str, Any] = {
        "version": __version__,
        "text": text.label,
        "text_sha256": text.sha256,
        "tokens_learned": tokens,
        "tokens_held_out": sum(example.tokens.size for example in held_out),
        **settings.as_dict(),
        "loss_before": round(before, 6),
        "loss_after": round(after, 6),
    }
    write_tuned(quantized, workplace.checkpoint, tensors, provenance)
    return TuneResult(workplace.output, before, after, tokens, len(tensors))
