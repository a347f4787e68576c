# SPDX-License-Identifier: Apache-2.0
"""Chat messages to a prompt: the checkpoint's own template, or a plain one where it has none.

Templates are Jinja programs that come with a checkpoint, so they run in Jinja's sandbox, set up as
the transformers package does: its extensions, filters and globals. That package itself is large,
and loading a tokenizer with it may run code of the checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..checkpoint.companions import TEMPLATE_FOLDER
from ..checkpoint.safetensors_io import load_json
from ..errors import CcqError

MAX_TEMPLATE_BYTES = 1 << 20
PLAIN_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == "system" %}{{ message.content }}
{% elif message.role == "user" %}User: {{ message.content }}
{% else %}Assistant: {{ message.content }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
# The names that templates know; further ones that end in _token are taken from the settings.
TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# The names under which messages have what was thought, the usual one first.
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]


class ChatTemplate:
    """Renders messages; `is_plain` where the checkpoint brought no template."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        settings = _json_object(folder / "tokenizer_config.json")
        found, where = _template(folder, settings)
        self.is_plain = found is None
        self.tokens = _special_tokens(folder, settings)
        try:
            self.template = _environment().from_string(PLAIN_TEMPLATE if found is None else found)
        except TemplateError as error:
            line = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
            raise CcqError(f"{where}: chat_template{line}: {error}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt's text, ending where the assistant begins to answer.

        Without `add_generation_prompt` it ends with the last message, as a text to learn from.

        Raises:
            ValueError: the template does not take these messages.
        """
        try:
            return self.template.render(
                messages=[_with_every_name(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except Exception as error:  # a program of the checkpoint's may fail in any way
            raise ValueError(f"the chat template: {_described(error)}") from None


def _with_every_name(message: Message) -> Message:
    """What the assistant thought, under each name that templates read, as transformers does."""
    said = (message[name] for name in _REASONING if message.get(name) is not None)
    thought = next(said, None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant says, for training.

    Here its content is the output. It is a block of its own, as elsewhere: what is set inside is
    not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Called by Jinja at the opening tag; takes all up to the closing one as it stands."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    @staticmethod
    def _content(caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    environment.filters["tojson"] = _to_json
    return environment


def _raise(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; names and order of parameters are transformers'."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


def _json_object(path: Path) -> dict[str, Any]:
    found = load_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Names such as bos_token; ERNIE's template uses cls_token and sep_token."""
    found: dict[str, Any] = {}
    # Older folders name them in a file of their own; the settings win.
    for source in (_json_object(folder / "special_tokens_map.json"), settings):
        for name, value in source.items():
            if name in TOKEN_NAMES or name.endswith("_token"):
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    found[name] = text
        more = source.get("additional_special_tokens")
        if isinstance(more, list):
            found["additional_special_tokens"] = [
                token.get("content") if isinstance(token, dict) else token for token in more
            ]
    return found


def _template(folder: Path, settings: Mapping[str, Any]) -> tuple[str | None, Path]:
    """The template's text and the file it came from, in the order that transformers looks.

    "default" of the folder of named templates, chat_template.jinja, then tokenizer_config.json,
    then chat_template.json, where processors of several kinds of input kept theirs.
    """
    for path in (folder / TEMPLATE_FOLDER / "default.jinja", folder / "chat_template.jinja"):
        if path.is_file():
            return _text(path), path
    path = folder / "tokenizer_config.json"
    template = settings.get("chat_template")
    if template is None:
        legacy = folder / "chat_template.json"
        template = _json_object(legacy).get("chat_template")
        path = legacy if template is not None else path
    if isinstance(template, list):
        # Several by name, as for chats with and without tools.
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in named}
    if template is None:
        others = sorted(entry.stem for entry in (folder / TEMPLATE_FOLDER).glob("[!.]*.jinja"))
        if others:
            template, path = dict.fromkeys(others), folder / TEMPLATE_FOLDER
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(map(str, template)) or "nothing"
            raise CcqError(f"{path}: chat_template: none is named 'default', but {names}")
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise CcqError(f"{path}: chat_template: not a string")
    return template, path


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise CcqError(f"{path}: larger than a chat template may be")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CcqError(f"{path}: not UTF-8: byte {error.start}") from None
