"""Content: messages, content-addressed items, and references to what a judgement is about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, TypeAdapter, ValidationError, model_validator

from corrigible.errors import BadInputError
from corrigible.records.base import Record, Sha256, bad_input, canonical_json

MESSAGES_MEDIA_TYPE = "application/vnd.corrigible.messages+json"
"""Media type of an item whose text is the canonical JSON of a list of messages."""

Role = Literal["system", "user", "assistant", "tool"]

ItemType = Literal[
    "text",
    "response",
    "turn",
    "trajectory",
    "segment",
    "image",
    "video",
    "document",
    "tree",
    "plan",
    "action",
    "suggestion",
    "model",
    "rule",
    "prompt",
]


class ToolFunction(Record):
    """Name and JSON text of the arguments of one tool call."""

    name: str = Field(min_length=1)
    arguments: str


class ToolCall(Record):
    """One call of a tool by an assistant message."""

    id: str
    type: Literal["function"] = "function"
    function: ToolFunction


class Message(Record):
    """One chat message in the OpenAI form; ``content`` is text, a list of content parts, or None."""

    role: Role
    content: str | tuple[dict[str, JsonValue], ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a {self.role} message needs content (only tool calls may go without)")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only assistant messages carry tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("only tool messages carry tool_call_id")
        if isinstance(self.content, tuple) and not all(isinstance(p.get("type"), str) for p in self.content):
            raise ValueError("every content part needs a 'type'")
        return self

    @property
    def text(self) -> str:
        """The text of the message: its content, or its text parts joined."""
        if isinstance(self.content, tuple):
            return "".join(str(part.get("text", "")) for part in self.content if part["type"] == "text")
        return self.content or ""


MessageLike = Message | Mapping[str, Any]
_MESSAGES: TypeAdapter[tuple[Message, ...]] = TypeAdapter(tuple[Message, ...])


def as_messages(value: str | Sequence[MessageLike]) -> tuple[Message, ...]:
    """Messages from a plain user text, from messages, or from dicts in the OpenAI form.

    Raises:
        BadInputError: naming the key or message that is wrong.
    """
    if isinstance(value, str):
        return (Message(role="user", content=value),)
    try:
        return _MESSAGES.validate_python(tuple(value))
    except ValidationError as error:
        raise bad_input(Message, error, what="messages") from None


def messages_text(messages: Sequence[MessageLike]) -> str:
    """The canonical JSON text that stands for a list of messages (and is hashed)."""
    return canonical_json([m.to_json() for m in as_messages(messages)])


def sha256_of_text(text: str) -> str:
    """SHA-256 of the UTF-8 bytes of a text, exactly as given (no Unicode normalisation).

    Raises:
        BadInputError: when the text holds a lone surrogate, which has no UTF-8 form.
    """
    try:
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"the text holds a lone surrogate at character {error.start}, which cannot be stored.",
            advice="Decode the source with the right encoding, or with errors='replace'.",
        ) from None


class Item(Record):
    """A piece of content, named by the hash of its bytes: text inline, anything else by ``uri``."""

    sha256: Sha256
    type: ItemType
    media_type: str = Field(min_length=1)
    text: str | None = None
    uri: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) == (self.uri is None):
            raise ValueError("an item holds either text or a uri, and not both")
        if self.text is not None and hashlib.sha256(self.text.encode("utf-8")).hexdigest() != self.sha256:
            raise ValueError("sha256 is not the hash of the text")
        return self

    @staticmethod
    def of_text(text: str, type: ItemType = "text", *, media_type: str = "text/plain") -> Item:
        """Item of a plain text. Text is kept exactly; it is not normalised."""
        # The hash was just computed, so the check would only compute it again.
        return Item.model_construct(
            sha256=sha256_of_text(text), type=type, media_type=media_type, text=text, uri=None
        )

    @staticmethod
    def of_messages(messages: Sequence[MessageLike], type: ItemType = "prompt") -> Item:
        """Item of a list of chat messages, as canonical JSON."""
        return Item.of_text(messages_text(messages), type, media_type=MESSAGES_MEDIA_TYPE)

    @staticmethod
    def of_json(value: Any, type: ItemType = "tree", *, media_type: str = "application/json") -> Item:
        """Item of a JSON value (tree, table, plan, action), as canonical JSON."""
        return Item.of_text(canonical_json(value), type, media_type=media_type)

    @staticmethod
    def of_blob(sha256: str, type: ItemType, media_type: str, uri: str | None = None) -> Item:
        """Item whose bytes lie in a blob store under ``sha256``."""
        return Item(sha256=sha256, type=type, media_type=media_type, uri=uri or f"blob:{sha256}")

    def messages(self) -> tuple[Message, ...]:
        """The messages of an item made by :meth:`of_messages`.

        Raises:
            BadInputError: when the item holds something else.
        """
        if self.media_type != MESSAGES_MEDIA_TYPE or self.text is None:
            raise BadInputError(
                f"item {self.sha256[:12]} holds {self.media_type}, not messages.",
                advice="Read its text instead, or make it with Item.of_messages.",
            )
        try:
            return _MESSAGES.validate_json(self.text)
        except ValidationError as error:
            raise bad_input(Message, error, what=f"messages of item {self.sha256[:12]}") from None

    def json_value(self) -> Any:
        """The parsed value of an item that holds JSON.

        Raises:
            BadInputError: when its text is not JSON.
        """
        try:
            return json.loads(self.text or "")
        except ValueError as error:
            raise BadInputError(f"item {self.sha256[:12]} does not hold JSON: {error}.") from None


StepRange = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class TargetRef(Record):
    """What a judgement is about: content by hash, and where it happened if it came from an episode.

    ``steps`` is a half-open range of environment steps (or turns) of ``episode``.
    """

    sha256: Sha256
    type: ItemType
    role: str | None = None
    episode: str | None = None
    steps: StepRange | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.steps[0] >= self.steps[1]:
            raise ValueError(f"steps {self.steps} is empty: it is half-open, start < end")
        return self

    @classmethod
    def of(
        cls,
        item: Item,
        *,
        role: str | None = None,
        episode: str | None = None,
        steps: tuple[int, int] | None = None,
    ) -> Self:
        """Reference to an item."""
        return cls(sha256=item.sha256, type=item.type, role=role, episode=episode, steps=steps)

    @property
    def sort_key(self) -> tuple[str, str, tuple[int, int]]:
        """Targets are ordered by content hash; equal content by where it happened."""
        return (self.sha256, self.episode or "", self.steps or (-1, -1))
