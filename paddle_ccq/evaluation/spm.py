# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models behind the methods of `tokenizers.Tokenizer` that this package uses.

Special and added tokens are cut out of a text first and what lies between is encoded piece by
piece, as transformers' and FastDeploy's Python tokenizers do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors_io import load_json
from ..errors import CcqError

SPACE = "\u2581"  # what SentencePiece writes a space as
_LFS = b"version https://git-lfs"


class Encoding:
    """Ids of a text, and where each begins and ends in it, in characters (worked out if asked)."""

    def __init__(self, ids: list[int], offsets: Callable[[], list[tuple[int, int]]]) -> None:
        self.ids = ids
        self._offsets = offsets

    @cached_property
    def offsets(self) -> list[tuple[int, int]]:
        """(begin, end) of each id in the text, in characters."""
        return self._offsets()


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for before anything else; lstrip and rstrip swallow white space."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class SentencePieceTokenizer:
    """One SentencePiece model and the added tokens of the folder that it lies in.

    Raises:
        CcqError: the package is missing, the file is no SentencePiece model, or the folder's files
            give one token two ids.
    """

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise CcqError(
                f"{path}: reading it needs the sentencepiece package; install it with:"
                " pip install 'paddle-ccq[eval]'"
            ) from None
        data = path.read_bytes()
        if data.startswith(_LFS):
            raise CcqError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
        if not data:
            raise CcqError(f"{path}: not a usable SentencePiece model: the file is empty")
        try:
            self._model = SentencePieceProcessor(model_proto=data)
            self._size = self._model.get_piece_size()
        except Exception as error:  # the library raises RuntimeError and others for a bad file
            raise CcqError(f"{path}: not a usable SentencePiece model: {error}") from None
        self._added = {token.content: token for token in self._special_pieces()}
        self._added |= {token.content: token for token in _listed(path, self._piece_id)}
        self._by_id = {token.id: token for token in self._added.values()}
        self._pattern = _pattern(self._added.values())
        self._ordered = _longest_first(self._added.values())

    def _special_pieces(self) -> Iterator[AddedToken]:
        """Control pieces such as <s>, and the unknown one."""
        for number in range(self._size):
            if self._model.is_control(number) or self._model.is_unknown(number):
                yield AddedToken(self._model.id_to_piece(number), number)

    def _piece_id(self, text: str) -> int | None:
        number = self._model.piece_to_id(text)
        return number if self._model.id_to_piece(number) == text else None

    def default_id(self, name: str) -> int | None:
        """The model's own id of bos_token or eos_token."""
        number = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}[name]
        return number if number >= 0 else None

    def token_to_id(self, text: str) -> int | None:
        """The id of an added token or else of a piece; None for any other text."""
        if text in self._added:
            return self._added[text].id
        return self._piece_id(text)

    def id_to_token(self, number: int) -> str | None:
        """The added token's text or else the piece, whose spaces are U+2581; None beyond both."""
        if number in self._by_id:
            return self._by_id[number].content
        return self._model.id_to_piece(number) if 0 <= number < self._size else None

    def get_vocab_size(self) -> int:
        """One more than the largest id, so that added tokens beyond the pieces count, gaps too."""
        return max(self._size, *(number + 1 for number in self._by_id))

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Ids of a text; nothing is put around it, whatever `add_special_tokens` says."""
        ids: list[int] = []
        for begin, part in self._parts(text):
            ids += self._model.encode(text[begin:part]) if isinstance(part, int) else [part.id]
        return Encoding(ids, lambda: self._offsets(text))

    def _parts(self, text: str) -> Iterator[tuple[int, int | AddedToken]]:
        """Where each part begins, and its end, or the added token that it is."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > end:
                yield end, match.start()
            # The token itself, without white space that it swallows.
            yield match.start(match.lastindex), self._ordered[match.lastindex - 1]
            end = match.end()
        if end < len(text):
            yield end, len(text)

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for begin, part in self._parts(text):
            if isinstance(part, AddedToken):
                found.append((begin, begin + len(part.content)))
                continue
            found += [(begin + a, begin + b) for a, b in self._spans(text[begin:part])]
        return found

    def _spans(self, text: str) -> list[tuple[int, int]]:
        try:
            found = self._model.encode(text, return_type="proto")
        except TypeError:  # before sentencepiece 0.2.2
            found = self._model.encode(text, out_type="immutable_proto")
        # By the texts that pieces stand for, which together are the whole text: whether begin and
        # end count bytes or characters differs between versions of the library.
        ends = list(accumulate(len(piece.surface) for piece in found.pieces))
        return list(zip([0, *ends], ends, strict=False))

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added and special tokens by id."""
        return dict(self._by_id)

    def to_str(self) -> str:
        """The part of a tokenizer.json that says how tokens become text."""
        space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        decoder = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}]}
        return json.dumps({"decoder": decoder})

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; those that are no token of this tokenizer have none."""
        parts: list[str] = []
        run: list[int] = []
        for number in ids:
            token = self._by_id.get(number)
            if token is None:
                if 0 <= number < self._size:
                    run.append(number)
                continue
            if token.special and skip_special_tokens:
                continue
            parts += [self._model.decode(run), token.content]
            run = []
        return "".join([*parts, self._model.decode(run)])

    def decode_batch(
        self, batch: Iterable[Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """As decode() of each sequence by itself."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]


def _longest_first(tokens: Iterable[AddedToken]) -> list[AddedToken]:
    return sorted(tokens, key=lambda token: (-len(token.content), token.content))


def _pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """One group for each token, in the order of _longest_first."""
    space = {True: r"\s*", False: ""}
    parts = [
        f"{space[t.lstrip]}({re.escape(t.content)}){space[t.rstrip]}"
        for t in _longest_first(tokens)
    ]
    return re.compile("|".join(parts)) if parts else None


def _listed(path: Path, piece_id: Callable[[str], int | None]) -> Iterator[AddedToken]:
    """The tokens that files beside the model add, or call special."""
    folder = path.parent
    settings = _object(folder / "tokenizer_config.json")
    seen: dict[str, int] = {}

    def token(where: str, content: object, number: object, flags: dict[str, Any]) -> AddedToken:
        known = piece_id(content) if isinstance(content, str) else None
        if not isinstance(content, str) or not content or not isinstance(number, int):
            raise CcqError(f"{folder / where}: {content!r} is not an added token with an id")
        if known not in (None, number) or seen.setdefault(content, number) != number:
            other = known if known is not None else seen[content]
            raise CcqError(
                f"{folder / where}: gives {content!r} the id {number}, elsewhere it is {other}"
            )
        chosen = {key: bool(flags[key]) for key in ("special", "lstrip", "rstrip") if key in flags}
        return AddedToken(content, number, **chosen)

    listed = settings.get("added_tokens_decoder")
    for number, flags in listed.items() if isinstance(listed, dict) else ():
        if not isinstance(flags, dict) or not number.isdecimal():
            raise CcqError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: {number!r}")
        yield token("tokenizer_config.json", flags.get("content"), int(number), flags)
    for content, number in _object(folder / "added_tokens.json").items():
        if content not in seen:
            yield token("added_tokens.json", content, number, {"special": False})
    for where in ("tokenizer_config.json", "special_tokens_map.json"):
        for content in _special_names(_object(folder / where)):
            number = piece_id(content)
            if number is not None and content not in seen:
                yield token(where, content, number, {})


def _special_names(settings: dict[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if not key.endswith(("_token", "additional_special_tokens")):
            continue
        for part in value if isinstance(value, list) else [value]:
            text = part.get("content") if isinstance(part, dict) else part
            if isinstance(text, str) and text:
                yield text


def _object(path: Path) -> dict[str, Any]:
    content = load_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
