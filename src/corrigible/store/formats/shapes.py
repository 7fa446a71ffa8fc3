"""The shapes a row can have, whatever file it comes from.

``{"prompt", "chosen", "rejected"}`` means the same in JSON lines, CSV, Parquet and a Hugging Face
dataset. A shape is recognised by its keys; each format's file registers its own with
:func:`shape`, and the container formats (``csv``, ``parquet``, ``hf-dataset``) take them all.

Next to its own keys every row may carry the envelope columns ``annotator``, ``annotator_type``,
``criterion``, ``strength``, ``confidence``, ``rationale``, ``task_id`` and ``created_at``. Any
other key is reported by name as not held, never silently dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Annotator, Item, Message, as_messages, comparison
from corrigible.store.formats.registry import UNKNOWN_ANNOTATOR, Origin, Parse, Parsed

Messages = tuple[Message, ...]

ENVELOPE_COLUMNS = frozenset(
    {
        "annotator",
        "annotator_type",
        "criterion",
        "strength",
        "confidence",
        "rationale",
        "task_id",
        "created_at",
    }
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A registered row shape."""

    name: str
    #: The format that rows of this shape are called by in JSON lines.
    format: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Parse


SHAPES: list[Shape] = []


def shape(
    name: str, *, format: str, matches: Callable[[Mapping[str, Any]], bool]
) -> Callable[[Parse], Parse]:
    """Register the parser of a row shape. Shapes are tried in the order of registration."""

    def register(parse: Parse) -> Parse:
        SHAPES.append(Shape(name, format, matches, parse))
        return parse

    return register


def has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    """Rows with all of these keys, none of them null."""
    return lambda row: all(row.get(key) is not None for key in keys)


def recognise(row: Mapping[str, Any]) -> Shape | None:
    """The first shape whose keys the row has."""
    return next((found for found in SHAPES if found.matches(row)), None)


def parse_any(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """Parse a row of whatever shape.

    Raises:
        BadInputError: no shape has these keys, or the row breaks the rules of its shape.
    """
    found = recognise(row)
    if found is None:
        keys = ", ".join(sorted(k for k, v in row.items() if v is not None)) or "none"
        raise BadInputError(
            f"no known kind of feedback has these keys: {keys}",
            advice="`corrigible import --help` lists the shapes.",
        )
    return found.parse(row, origin)


# --- the envelope ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """What a row says besides its judgement."""

    annotator: Annotator
    criterion: str
    strength: int | None
    envelope: dict[str, Any]


def given(row: Mapping[str, Any], origin: Origin, part: str = "", **more: Any) -> Given:
    """Read the envelope columns of ``row``."""
    name = row.get("annotator")
    if name in (None, ""):
        annotator = UNKNOWN_ANNOTATOR
    else:
        annotator = Annotator(pseudonym=str(name), type=row.get("annotator_type") or "human")
    strength = row.get("strength")
    confidence = row.get("confidence")
    at = micros(row.get("created_at"))
    envelope = origin.envelope(
        part,
        at,
        task_id=_text_or_none(row.get("task_id")),
        rationale=_text_or_none(row.get("rationale")),
        confidence=_number(confidence, "confidence"),
        **more,
    )
    return Given(
        annotator,
        str(row.get("criterion") or "overall"),
        None if strength in (None, "") else int(_number(strength, "strength") or 0),
        envelope,
    )


def unknown_keys(row: Mapping[str, Any], *known: str) -> list[str]:
    """Names of the keys of ``row`` that hold something Corrigible has no place for."""
    return [
        f"column {key!r}"
        for key, value in row.items()
        if value not in (None, "", []) and key not in known and key not in ENVELOPE_COLUMNS
    ]


def micros(value: Any) -> int:
    """Microseconds since the epoch from microseconds or from ISO 8601 text; 0 for nothing.

    Raises:
        BadInputError: neither of them.
    """
    if value in (None, ""):
        return 0
    if isinstance(value, datetime):
        moment = value
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    else:
        text = str(value)
        if text.isdigit():
            return int(text)
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise BadInputError(
                f"created_at is {text!r}, which is neither ISO 8601 nor microseconds since 1970"
            ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _text_or_none(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _number(value: Any, name: str) -> float | None:
    if value in (None, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise BadInputError(f"{name} is {value!r}, not a number") from None


# --- messages and responses -----------------------------------------------------------------------


def conversation(value: Any, name: str) -> Messages:
    """Messages from a cell: a list of OpenAI messages, or text as one user message.

    Raises:
        BadInputError: anything else.
    """
    if isinstance(value, str):
        return as_messages(value)
    if isinstance(value, Sequence) and value and all(isinstance(m, Mapping) for m in value):
        # Tables spell an absent key as null.
        return as_messages([{k: v for k, v in m.items() if v is not None} for m in value])
    raise BadInputError(f"{name} is {_kind(value)}, where text or a list of messages was expected")


def response(value: Any, name: str) -> str | Messages:
    """A response from a cell: text, or messages when it is more than one plain assistant message."""
    if isinstance(value, str):
        return value
    return simplest(conversation(value, name))


def simplest(messages: Messages) -> str | Messages:
    """Text for one plain assistant message, so that equal responses have equal hashes everywhere."""
    if len(messages) == 1:
        only = messages[0]
        plain = isinstance(only.content, str) and only.name is None and not only.tool_calls
        if only.role == "assistant" and plain:
            return only.text
    return messages


def response_item(value: str | Messages) -> Item:
    """The item of a response."""
    if isinstance(value, str):
        return Item.of_text(value, "response")
    return Item.of_messages(value, "response")


def messages_of(item: Item, role: str = "assistant") -> Messages:
    """The messages of an item, or its text as one message of ``role``.

    Raises:
        BadInputError: the item holds neither.
    """
    if item.media_type.endswith("messages+json"):
        return item.messages()
    if item.text is None:
        raise BadInputError(f"the item {item.sha256[:12]}… is {item.media_type}, not text")
    return (Message(role=role, content=item.text),)


def split_last_turn(messages: Messages) -> tuple[Messages, Messages]:
    """Conversation up to and including the last user (or system) message, and the turn after it.

    Raises:
        BadInputError: the conversation does not end with an assistant turn.
    """
    cut = len(messages)
    while cut and messages[cut - 1].role in ("assistant", "tool"):
        cut -= 1
    if cut == len(messages) or not any(m.role == "assistant" for m in messages[cut:]):
        raise BadInputError("the conversation does not end with an assistant message")
    return messages[:cut], messages[cut:]


def split_shared(first: Messages, second: Messages) -> tuple[Messages, Messages, Messages]:
    """Shared prompt of two conversations, and the two continuations.

    The cut is the longest common prefix, moved back to where an assistant turn begins in both.

    Raises:
        BadInputError: the two are equal, or no assistant turn follows what they share.
    """
    if first == second:
        raise BadInputError("chosen and rejected are equal: nothing was preferred")
    cut = 0
    while cut < min(len(first), len(second)) and first[cut] == second[cut]:
        cut += 1
    while cut >= 0:
        ahead = (first[cut : cut + 1], second[cut : cut + 1])
        if all(m and m[0].role == "assistant" for m in ahead) and (
            cut == 0 or first[cut - 1].role != "assistant"
        ):
            return first[:cut], first[cut:], second[cut:]
        cut -= 1
    raise BadInputError("chosen and rejected share no prompt that an assistant turn follows")


def comparison_row(
    row: Mapping[str, Any],
    origin: Origin,
    *,
    prompt: Messages,
    chosen: str | Messages,
    rejected: str | Messages,
    tie: bool = False,
    not_held: list[str] | None = None,
    **more: Any,
) -> Parsed:
    """One comparison of two responses to one prompt, with the envelope of ``row``."""
    if chosen == rejected:
        raise BadInputError("chosen and rejected are equal: nothing was preferred")
    said = given(row, origin, **more)
    strength = 0 if tie else 1 if said.strength is None else said.strength
    record, items = comparison(
        list(prompt),
        chosen,
        rejected,
        annotator=said.annotator,
        criterion=said.criterion,
        strength=strength,
        tie=tie,
        **said.envelope,
    )
    return Parsed([record], list(items), not_held=not_held or [])


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence):
        return "an empty list" if not value else "a list of something else"
    return f"{value!r}"[:60]
