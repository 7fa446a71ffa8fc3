"""What Argilla and Label Studio have in common: named fields, questions, and answers by people.

Neither says in its export which field is the prompt and which are the responses, so it is read from
the names: ``prompt``, ``instruction``, ``question``, ``context``, … are what was asked, everything
else is what is judged. A file written by Corrigible carries each whole record as metadata next to the
answer that people see; it is taken back as it was unless that answer has been changed since.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import (
    Comparison,
    Critique,
    Feedback,
    Item,
    Label,
    Message,
    Ranking,
    Rating,
    Reaction,
    Scale,
    Span,
    Spans,
    TargetRef,
)
from corrigible.records.payloads import PayloadBase
from corrigible.store.formats.exporting import prompt_of, references
from corrigible.store.formats.registry import Entry, Parsed
from corrigible.store.formats.shapes import conversation, messages_of, response, response_item, simplest

_ASKED = re.compile(r"^(prompt|instruction|question|query|context|input|history|conversation|chat|system)s?$")
_TIES = frozenset({"tie", "equal", "same", "none", "neither", "both", "draw"})
KEY = "corrigible"


@dataclass(frozen=True)
class Fields:
    """A record's fields: the prompt they make, and the candidates that are judged, in order."""

    context: Item | None
    candidates: dict[str, Item]

    def items(self) -> list[Item]:
        """All items, the context first."""
        return [*([self.context] if self.context else []), *self.candidates.values()]


def read_fields(fields: Mapping[str, Any]) -> Fields:
    """Sort named fields into prompt and candidates.

    Raises:
        BadInputError: there is no field with text.
    """
    filled = {k: v for k, v in fields.items() if isinstance(v, str | list) and v and not k.startswith(KEY)}
    asked = {k: v for k, v in filled.items() if _ASKED.match(k.lower())}
    if len(asked) == len(filled):  # only a prompt: then it is what is judged
        asked = {}
    messages: list[Message] = []
    for name, value in asked.items():
        role = "system" if name.lower() == "system" and isinstance(value, str) else None
        messages += [Message(role="system", content=str(value))] if role else list(conversation(value, name))
    candidates: dict[str, Item] = {}
    for name, value in filled.items():
        if name not in asked and (isinstance(value, str) or _are_messages(value)):
            candidates[name] = response_item(response(value, name))
    if not candidates:
        raise BadInputError("there is no field with text to judge")
    return Fields(Item.of_messages(messages) if messages else None, candidates)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, Mapping) and "role" in m for m in value)


def pick(fields: Fields, name: str) -> str | None:
    """The candidate a name refers to: itself, but for punctuation, or by its last letter or digit."""
    plain = {re.sub(r"\W|_", "", key).lower(): key for key in fields.candidates}
    wanted = re.sub(r"\W|_", "", str(name)).lower()
    if wanted in plain:
        return plain[wanted]
    ends = {key[-1:]: original for key, original in plain.items()}
    if len(ends) == len(plain) and (len(wanted) == 1 or wanted[-1:].isdigit()):
        return ends.get(wanted[-1:])
    return None


def target(fields: Fields, question: str, items: list[Item]) -> TargetRef:
    """What a question about one thing is about; the whole record when no single field is meant."""
    names = list(fields.candidates)
    found = names[0] if len(names) == 1 else pick(fields, question)
    if found is not None:
        return TargetRef.of(fields.candidates[found])
    whole = Item.of_json({name: item.text for name, item in fields.candidates.items()}, "document")
    items.append(whole)
    return TargetRef.of(whole)


Judgement = tuple[list[TargetRef], PayloadBase]


def choice(
    fields: Fields, question: str, values: Sequence[str], options: Sequence[str], items: list[Item]
) -> Judgement:
    """A choice among labels; a comparison when it names one of two candidates, or a tie."""
    names = list(fields.candidates)
    if len(values) == 1 and len(names) == 2:
        winner = {"left": names[0], "right": names[1]}.get(values[0].lower()) or pick(fields, values[0])
        both = [TargetRef.of(item) for item in fields.candidates.values()]
        if winner is not None:
            outcome = "first" if winner == names[0] else "second"
            return both, Comparison(outcome=outcome, criterion=question)
        if values[0].lower() in _TIES:
            return both, Comparison(outcome="tie", criterion=question)
    known = tuple(options) if set(values) <= set(options) else ()
    return [target(fields, question, items)], Label(values=tuple(values), label_set=known, action="confirm")


def rating(
    fields: Fields, question: str, value: float, low: float, high: float, items: list[Item]
) -> Judgement:
    """A number on a whole-numbered scale."""
    scale = Scale(id=f"{question}:{low:g}-{high:g}", min=low, max=high, step=1)
    return [target(fields, question, items)], Rating(value=value, scale=scale, criterion=question)


def critique(fields: Fields, question: str, text: str, items: list[Item]) -> Judgement:
    """Free text."""
    return [target(fields, question, items)], Critique(text=text)


def ranking(fields: Fields, question: str, levels: Sequence[Sequence[str]]) -> Judgement:
    """An order of candidates, best level first."""
    picked = [[pick(fields, name) for name in level] for level in levels]
    flat = [name for level in picked for name in level]
    if None in flat or len(set(flat)) != len(flat) or len(flat) < 2:
        raise BadInputError(f"the ranking {question!r} does not name two or more different fields")
    places = {name: index for index, name in enumerate(flat)}
    payload = Ranking(
        levels=tuple(tuple(places[name] for name in level) for level in picked), criterion=question
    )
    return [TargetRef.of(fields.candidates[name]) for name in flat if name], payload


def spans(fields: Fields, field: str, marks: Sequence[Mapping[str, Any]], items: list[Item]) -> Judgement:
    """Marked stretches of one field; ``marks`` have start, end (code points) and label."""
    where = target(fields, field, items)
    text = next((item.text or "" for item in fields.candidates.values() if item.sha256 == where.sha256), None)
    if text is not None and any(mark["end"] > len(text) for mark in marks):
        raise BadInputError(f"a span ends after the end of the text ({len(text)} characters)")
    ordered = sorted(marks, key=lambda mark: (mark["start"], mark["end"], str(mark["label"])))
    return [where], Spans(
        spans=tuple(
            Span(start=mark["start"], end=mark["end"], label=str(mark["label"]), polarity=0)
            for mark in ordered
        )
    )


# --- out ------------------------------------------------------------------------------------------

#: Field names of exported targets.
NAMES = tuple(f"response_{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")


def visible_fields(entry: Entry) -> dict[str, Any]:
    """The fields people see: ``prompt``, ``response_a``, ``response_b``, …

    Raises:
        BadInputError: a target is not text, or there are more than 26.
    """
    prompt = simplest_prompt(entry)
    if len(entry.feedback.targets) > len(NAMES):
        raise BadInputError("more than 26 targets")
    shown: dict[str, Any] = {"prompt": prompt} if prompt else {}
    for name, where in zip(NAMES, entry.feedback.targets, strict=False):
        item = entry.item(where.sha256)
        simple = simplest(messages_of(item))
        shown[name] = simple if isinstance(simple, str) else [m.to_json() for m in simple]
    return shown


def simplest_prompt(entry: Entry) -> Any:
    """Text for a prompt of one plain user message, else a list of messages."""
    messages = prompt_of(entry)
    if len(messages) == 1 and messages[0].role == "user" and isinstance(messages[0].content, str):
        return messages[0].content
    return [message.to_json() for message in messages]


@dataclass(frozen=True)
class Visible:
    """The answer people see: the kind of question, its name, and the value."""

    type: str
    question: str
    value: Any


def visible(record: Feedback) -> Visible:
    """The question and answer that show ``record`` to people.

    Raises:
        BadInputError: the kind has no such form.
    """
    match record.payload:
        case Comparison() as p:
            value = {"first": NAMES[0], "second": NAMES[1]}.get(p.outcome, p.outcome)
            return Visible("label_selection", p.criterion, value)
        case Ranking() as p if not p.unranked:
            return Visible("ranking", p.criterion, [[NAMES[i] for i in level] for level in p.levels])
        case Rating() as p if p.value is not None and p.at is None:
            return Visible("rating", p.criterion, p.value)
        case Reaction() as p:
            return Visible("label_selection", "reaction", {1: "good", -1: "bad", 0: "retracted"}[p.value])
        case Label() as p if p.values:
            return Visible("multi_label_selection", "label", list(p.values))
        case Critique() as p:
            return Visible("text", "critique", p.text)
        case Spans() as p if all(s.unit == "char" for s in p.spans):
            marks = [{"start": s.start, "end": s.end, "label": s.label} for s in p.spans]
            return Visible("span", "spans", marks)
    raise BadInputError("not judged" if record.payload is None else "labelling tools have no such question")


def carried(entry: Entry) -> dict[str, Any]:
    """The whole record and its items, to travel as metadata."""
    known = [entry.items[sha].to_json() for sha in sorted(references(entry.feedback)) if sha in entry.items]
    return {
        KEY: entry.feedback.to_json_text(),
        f"{KEY}_items": json.dumps(known, ensure_ascii=False),
    }


def restored(metadata: Mapping[str, Any]) -> Parsed | None:
    """The record that travelled in ``metadata``, if there is one and it can be read."""
    text, items = metadata.get(KEY), metadata.get(f"{KEY}_items")
    if not isinstance(text, str) or not isinstance(items, str):
        return None
    try:
        return Parsed([Feedback.from_json(text)], [Item.from_json(item) for item in json.loads(items)])
    except (BadInputError, ValueError):
        return None


def entry_of(parsed: Parsed) -> Entry:
    """A restored record as an export entry, to compare what people see now with what was written."""
    return Entry(parsed.feedback[0], {item.sha256: item for item in parsed.items})
