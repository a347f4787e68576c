# SPDX-License-Identifier: Apache-2.0
"""Chat messages to a prompt: the checkpoint's own template, or a plain one where it has none.

Templates are Jinja programs that come with a checkpoint, so they run in Jinja's sandbox. The
transformers package would render them the same way; it is large, and loading a tokenizer with it
may run code of the checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

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

Message = Mapping[str, Any]


class ChatTemplate:
    """Renders messages; `is_plain` where the checkpoint brought no template."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        settings = _settings(folder)
        found, where = _template(folder, settings)
        self.is_plain = found is None
        # Names such as bos_token; ERNIE's template uses cls_token and sep_token.
        self.tokens = {
            name: value.get("content") if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        # Jinja's own tojson escapes for HTML.
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        try:
            self.template = environment.from_string(PLAIN_TEMPLATE if found is None else found)
        except TemplateError as error:
            raise CcqError(f"{where}: chat_template: {error}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt's text, ending where the assistant begins to answer.

        Without `add_generation_prompt` it ends with the last message, as a text to learn from.

        Raises:
            ValueError: the template does not take these messages.
        """
        try:
            return self.template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                **self.tokens,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"the chat template: {error}") from None


def _raise(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    settings = load_json(path) if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _template(folder: Path, settings: dict[str, Any]) -> tuple[str | None, Path]:
    """The template's text and file: chat_template.jinja goes before tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CcqError(f"{path}: larger than a chat template may be")
        return path.read_text(encoding="utf-8", errors="replace"), path
    path = folder / "tokenizer_config.json"
    template = settings.get("chat_template")
    if isinstance(template, list):
        # Several by name, as for chats with and without tools.
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CcqError(f"{path}: chat_template: not a string")
    return template, path
