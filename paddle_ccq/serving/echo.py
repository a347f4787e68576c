# SPDX-License-Identifier: Apache-2.0
"""The prompt as a completion repeats it: its text, and where each of its tokens begins there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from .detokenizer import Detokenizer
from .protocol import CompletionRequest
from .service import LONG_TEXT, Service


@dataclass(frozen=True)
class Echo:
    """A prompt's text, and where its tokens begin in it; no offsets if only the text is wanted."""

    text: str
    offsets: Sequence[int]  # one a token, in characters


async def echoes(
    service: Service, body: CompletionRequest, prompts: Sequence[Sequence[int]]
) -> list[Echo]:
    """One for each prompt: text as it came, tokens as the model's tokenizer decodes them."""
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    texts = [part if isinstance(part, str) else None for part in given]
    if body.logprobs is None and all(text is not None for text in texts):
        return [Echo(text, ()) for text in texts]

    def work() -> list[Echo]:
        # Several prompts, but for one that is a list of tokens.
        pairs = zip(prompts, texts if len(texts) == len(prompts) else [None], strict=True)
        return [_echo(service, tokens, text) for tokens, text in pairs]

    if sum(map(len, prompts)) > LONG_TEXT // 4:
        return await asyncio.to_thread(work)
    return work()


def _echo(service: Service, tokens: Sequence[int], text: str | None) -> Echo:
    tokenizer = service.tokenizer
    if text is not None:
        encoding = tokenizer.fast.encode(text, add_special_tokens=False)
        added = len(tokens) - len(encoding.ids)
        # Before the text stands the begin token, which has no place in it.
        if added >= 0 and list(tokens[added:]) == encoding.ids:
            starts = [start for start, _ in encoding.offsets]
            return Echo(text, [0] * added + starts)
    detokenizer = Detokenizer(tokenizer.decode)
    parts, offsets = [], []
    for token in tokens:
        parts.append(detokenizer.add(token))
        offsets.append(detokenizer.place)
    parts.append(detokenizer.finish())
    return Echo("".join(parts) if text is None else text, offsets)
