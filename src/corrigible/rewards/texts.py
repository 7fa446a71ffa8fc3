"""Messages as plain text, for models that read text rather than a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corrigible.records import Message

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}


def message_text(message: Message) -> str:
    """The text of one message; parts that are not text (images, files) are left out."""
    content = message.content
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if "text" in part)


def transcript(messages: Iterable[Message]) -> str:
    """``Human: ...`` and ``Assistant: ...`` paragraphs, in order."""
    return "\n\n".join(f"{SPEAKERS[message.role]}: {message_text(message)}" for message in messages)


def response_text(messages: Iterable[Message]) -> str:
    """The text of a response: the bare text of a single message, a transcript of several."""
    held = tuple(messages)
    return message_text(held[0]) if len(held) == 1 else transcript(held)


def first_user_text(messages: Iterable[Message]) -> str:
    """The first user message, or "" when there is none: what a conversation is about."""
    return next((message_text(message) for message in messages if message.role == "user"), "")
