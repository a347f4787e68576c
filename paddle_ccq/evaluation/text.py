# SPDX-License-Identifier: Apache-2.0
"""From documents to windows of tokens, by the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.companions import SENTENCEPIECE_FILES, TOKENIZER_FILE, check_file
from ..errors import CcqError
from ..texts.chats import ChatRenderer
from ..texts.documents import Chat, Document
from .spm import SentencePieceTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

FRAMING = (
    "every document is bos + text + eos; all are joined and cut into full windows that do not"
    " overlap; every token of a window but the first is predicted"
)


class Tokenizer:
    """The tokenizer of one checkpoint folder."""

    def __init__(self, folder: str | os.PathLike[str], config: dict[str, Any]) -> None:
        self.path = _tokenizer_file(Path(folder))
        self.fast: FastTokenizer | SentencePieceTokenizer
        if self.path.name == TOKENIZER_FILE:
            self.fast = _fast(self.path)
        else:
            self.fast = SentencePieceTokenizer(self.path)
        settings = _tokenizer_config(Path(folder))
        self.bos = self._special("bos_token", config, settings)
        self.eos = self._special("eos_token", config, settings)

    def _special(self, name: str, config: dict[str, Any], settings: dict[str, Any]) -> int:
        """Id of the begin or end token: config.json's number, else tokenizer_config's text."""
        number = config.get(f"{name}_id")
        if isinstance(number, list) and number:
            number = number[0]
        if isinstance(number, int) and not isinstance(number, bool):
            return number
        text = settings.get(name)
        if isinstance(text, dict):
            text = text.get("content")
        number = self.fast.token_to_id(text) if isinstance(text, str) else None
        if number is None and isinstance(self.fast, SentencePieceTokenizer):
            number = self.fast.default_id(name)
        if number is None:
            raise CcqError(
                f"{self.path.parent}: neither config.json ({name}_id) nor tokenizer_config.json"
                f" ({name}) names the {name[:3]} token"
            )
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of a text without begin and end tokens around it."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, without the special ones among them."""
        return self.fast.decode(list(tokens), skip_special_tokens=True)

    def newline_tokens(self) -> set[int]:
        """Ids of all tokens whose text holds a newline."""
        vocabulary = range(self.fast.get_vocab_size())
        texts = self.fast.decode_batch([[token] for token in vocabulary])
        return {token for token, text in zip(vocabulary, texts, strict=True) if "\n" in text}


def _tokenizer_file(folder: Path) -> Path:
    """tokenizer.json, else the SentencePiece model."""
    for name in (TOKENIZER_FILE, *SENTENCEPIECE_FILES):
        path = folder / name
        if os.path.lexists(path):
            check_file(path)
        if path.is_file():
            return path
    raise CcqError(
        f"{folder}: no {TOKENIZER_FILE} and no {SENTENCEPIECE_FILES[0]}; put the one of the"
        " original model there"
    )


def _fast(path: Path) -> FastTokenizer:
    try:
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError:
        raise CcqError(
            "the tokenizers package is missing; install it with: pip install 'paddle-ccq[eval]'"
        ) from None
    try:
        # Not from_file: it wants a path that is Unicode text.
        return FastTokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises plain Exception for a bad file
        raise CcqError(f"{path}: not a usable tokenizer: {error}") from None


def check_same_tokenizer(a: Tokenizer, b: Tokenizer) -> None:
    """Numbers of two models can only be compared on the same tokens.

    Raises:
        CcqError: if the two differ.
    """
    if a.path.read_bytes() != b.path.read_bytes():
        raise CcqError(f"{a.path} and {b.path} differ; the two models cannot be compared")


def token_stream(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one row of tokens, each framed by bos and eos.

    Chats are rendered by the model's template first, which may write one or both itself.
    """
    stream: list[int] = []
    renderer = ChatRenderer(tokenizer.path.parent)
    for document in documents:
        if isinstance(document, Chat):
            tokens = tokenizer.encode(renderer.render(document))
            tokens = tokens[1:] if tokens[:1] == [tokenizer.bos] else tokens
            tokens = tokens[:-1] if tokens[-1:] == [tokenizer.eos] else tokens
        else:
            tokens = tokenizer.encode(document)
        stream += [tokenizer.bos, *tokens, tokenizer.eos]
    return np.asarray(stream, dtype=np.int64)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of 0 .. count - 1, the middles of equal parts; all if there are no more."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def cut_windows(stream: np.ndarray, window: int, max_tokens: int | None = None) -> list[np.ndarray]:
    """Non-overlapping full windows from the start of the stream.

    What is left over at the end is not used, unless it is all there is: windows of one length
    weigh the same in every mean. With `max_tokens`, at most that many tokens, in windows spread
    evenly over the stream.

    Raises:
        CcqError: for a window, or a number of tokens, that is too small.
    """
    if window < 2:
        raise CcqError(f"--window {window}: must be at least 2, the first token is only context")
    full = stream.size // window
    if full == 0:
        return [stream]
    wanted = full
    if max_tokens is not None:
        wanted = min(full, max_tokens // window)
        if wanted < 1:
            raise CcqError(f"--max-tokens {max_tokens}: less than one window of {window} tokens")
    chosen = spread(full, wanted)
    return [stream[index * window : (index + 1) * window] for index in chosen]


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CcqError(f"{path}: not JSON: {error}") from None
    return settings if isinstance(settings, dict) else {}
