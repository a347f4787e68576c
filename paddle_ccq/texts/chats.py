# SPDX-License-Identifier: Apache-2.0
"""A conversation as text, by the template that the embedded server would use for the model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CcqError
from .documents import Chat

if TYPE_CHECKING:
    from .chat_template import ChatTemplate


class ChatRenderer:
    """Renders with the template of one checkpoint folder, which is read at the first chat."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _template(self) -> ChatTemplate:
        from .chat_template import ChatTemplate

        return ChatTemplate(self.folder)

    def render(self, chat: Chat) -> str:
        """The whole conversation; nothing is begun after its end.

        Raises:
            CcqError: naming FILE:LINE, if the template does not take it, or Jinja is missing.
        """
        try:
            template = self._template
        except ImportError as error:
            raise CcqError(
                f"{chat.where}: chats need Jinja for the model's template; install it with:"
                f" pip install 'paddle-ccq[eval]' (import {error.name}: {error})"
            ) from None
        try:
            return template.render(chat.messages, add_generation_prompt=False)
        except ValueError as error:
            raise CcqError(f"{chat.where}: {error}") from None
