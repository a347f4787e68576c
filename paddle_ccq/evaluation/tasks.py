# SPDX-License-Identifier: Apache-2.0
"""Task accuracy: greedy exact match, or choice by the mean log-likelihood of a continuation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from ..errors import CcqError, readable
from ..models.ernie import Cache, Ernie
from ..models.generation import generate, left_padded
from ..texts.files import KINDS, PACKED
from ..texts.records import check_unicode, read_objects
from .metrics import log_sum_exp
from .text import Tokenizer

# Rows of one forward pass: enough tokens for large matrix products, little padding.
BATCH_ITEMS = 32
MAX_NEW_TOKENS = 64
# Tasks whose answer stands at the end of a worked solution instead of being the whole line.
SOLUTION_TASKS = frozenset({"word"})
SOLUTION = re.compile(r"The answer is\s*(-?\d+)")


@dataclass(frozen=True)
class TaskItem:
    """One question. With choices it is scored by likelihood, without by greedy generation."""

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    where: str = ""  # file:line, for error messages


def read_items(path: str | Path, limit: int | None = None) -> list[TaskItem]:
    """Items of one file of JSON objects, at most `limit`.

    Raises:
        CcqError: for a record that is no item, naming its line.
    """
    items: list[TaskItem] = []
    for where, record in read_objects(path, "--tasks"):
        if limit is not None and len(items) >= limit:
            break
        for field in ("prompt", "answer"):
            if not isinstance(record.get(field), str) or not record[field].strip():
                raise CcqError(f'{where}: no field "{field}" with a string')
        choices = record.get("choices") or []
        if not isinstance(choices, list) or not all(
            isinstance(c, str) and c.strip() for c in choices
        ):
            raise CcqError(f'{where}: field "choices" must be a list of strings')
        if choices and record["answer"] not in choices:
            raise CcqError(f"{where}: the answer is not one of the choices")
        task = record.get("task", _stem(path))
        if not isinstance(task, str):
            raise CcqError(f'{where}: field "task" must be a string')
        for text in (task, record["prompt"], record["answer"], *choices):
            check_unicode(text, where)
        items.append(TaskItem(task, record["prompt"], record["answer"], tuple(choices), where))
    if not items:
        raise CcqError(f"--tasks {path}: holds no task items")
    return items


def _stem(path: str | Path) -> str:
    """The file's name without what says how it is written and packed."""
    name = Path(path)
    while name.suffix.lower() in (*KINDS, *PACKED) and name.stem:
        name = name.with_suffix("")
    return readable(name.name)


def answer_in(task: str, text: str) -> str:
    """What a generated text answers: its first line, or the number that a solution ends in."""
    line = text.split("\n", 1)[0].strip()
    if task not in SOLUTION_TASKS:
        return line
    found = SOLUTION.search(line)
    return found.group(1) if found else ""


def score_items(
    model: Ernie,
    tokenizer: Tokenizer,
    items: Sequence[TaskItem],
    run: Callable[[Callable, Iterable], Iterable] = map,
) -> np.ndarray:
    """Whether each item is answered correctly. `run` may be the map of a thread pool.

    Raises:
        CcqError: for an item that the model or the tokenizer cannot take, naming its line.
    """
    correct = np.zeros(len(items), dtype=bool)
    limit = getattr(model.config, "max_position_embeddings", None)
    stop = tokenizer.newline_tokens() | {tokenizer.eos}
    prompts = [[tokenizer.bos, *tokenizer.encode(item.prompt)] for item in items]
    choices = [[tokenizer.encode(f" {choice}") for choice in item.choices] for item in items]
    for item, prompt, options in zip(items, prompts, choices, strict=True):
        budget = max((len(option) for option in options), default=MAX_NEW_TOKENS)
        if limit is not None and len(prompt) + budget > limit:
            raise CcqError(
                f"{item.where}: the prompt has {len(prompt)} tokens and needs {budget} more, but"
                f" the model's max_position_embeddings is {limit}; shorten or remove this item"
            )
        largest = max(max(tokens) for tokens in (prompt, *options))
        if largest >= model.config.vocab_size:
            raise CcqError(
                f"{item.where}: {tokenizer.path} gives token {largest}, but config.json has"
                f" vocab_size {model.config.vocab_size}"
            )

    def score_batch(batch: list[int]) -> list[bool]:
        chosen = [items[i] for i in batch]
        if chosen[0].choices:
            likelihoods = choice_likelihoods(
                model, [prompts[i] for i in batch], [choices[i] for i in batch]
            )
            best = [int(np.argmax(values)) for values in likelihoods]
            return [i.choices[b] == i.answer for i, b in zip(chosen, best, strict=True)]
        outputs = generate(model, [prompts[i] for i in batch], MAX_NEW_TOKENS, stop)
        answers = [
            answer_in(item.task, tokenizer.decode(output))
            for item, output in zip(chosen, outputs, strict=True)
        ]
        return [a == item.answer.strip() for a, item in zip(answers, chosen, strict=True)]

    order = sorted(range(len(items)), key=lambda i: (bool(items[i].choices), len(prompts[i])))
    batches: list[list[int]] = []
    for i in order:
        full = not batches or len(batches[-1]) == BATCH_ITEMS
        if full or bool(items[batches[-1][0]].choices) != bool(items[i].choices):
            batches.append([])
        batches[-1].append(i)
    for batch, results in zip(batches, run(score_batch, batches), strict=True):
        correct[batch] = results
    return correct


@paddle.no_grad()
def choice_likelihoods(
    model: Ernie, prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]
) -> list[np.ndarray]:
    """Mean log-likelihood per token of each choice after its prompt, which is read only once."""
    tokens, padding = left_padded(prompts)
    cache = Cache(len(model.blocks))
    prompt_end = model.hidden_states(tokens, padding, cache)[:, -1:]
    rows = [(i, option) for i, options in enumerate(choices) for option in options]
    repeat = paddle.to_tensor([i for i, _ in rows])
    longest = max(len(option) for _, option in rows)
    targets = np.zeros((len(rows), longest), dtype=np.int64)
    for row, (_, option) in enumerate(rows):
        targets[row, : len(option)] = option
    # The prompt's last position predicts a choice's first token; fillers on the right of the
    # shorter choices are computed and thrown away.
    hidden = paddle.index_select(prompt_end, repeat, axis=0)
    if longest > 1:
        cache.select(repeat)
        given = paddle.to_tensor(targets[:, :-1])
        rest = model.hidden_states(given, paddle.gather(padding, repeat), cache)
        hidden = paddle.concat([hidden, rest], axis=1)
    means = np.zeros(len(rows))
    for row, (_, option) in enumerate(rows):
        count = len(option)
        logits = model.logits(hidden[row, :count])
        wanted = paddle.to_tensor(targets[row, :count]).unsqueeze(1)
        chosen = paddle.take_along_axis(logits, wanted, axis=1).astype("float64").squeeze(1)
        means[row] = (chosen.numpy() - log_sum_exp(logits)[0]).mean()
    ends = np.cumsum([len(options) for options in choices])
    return np.split(means, ends[:-1])
