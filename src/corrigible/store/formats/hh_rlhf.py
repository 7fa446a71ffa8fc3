"""HH-RLHF: two whole transcripts a line, ``{"chosen": "\\n\\nHuman: …", "rejected": …}``.

Bai et al. 2022, https://github.com/anthropics/hh-rlhf. The prompt is what both transcripts share up
to the last common human turn. ``task_id`` is ``hh:`` and the SHA-256 of the first human message, so
that a split by task never shows a model the same opening twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Message
from corrigible.records.items import sha256_of_text
from corrigible.store.formats.exporting import ExportRun, pair_of
from corrigible.store.formats.readers import read_json
from corrigible.store.formats.registry import Entry, Origin, Parsed, exporter, importer
from corrigible.store.formats.shapes import (
    Messages,
    comparison_row,
    messages_of,
    shape,
    simplest,
    split_shared,
    unknown_keys,
)

_TURN = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n\n)|$)")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_NAMES = {"user": "Human", "assistant": "Assistant"}


def parse_transcript(text: str, name: str = "transcript") -> Messages:
    """Messages of a transcript.

    Raises:
        BadInputError: it does not begin with a turn of Human or Assistant.
    """
    if not text.startswith("\n\n"):
        text = "\n\n" + text
    pieces = _TURN.split(text)
    if pieces[0] or len(pieces) < 3:
        raise BadInputError(f"{name} does not begin with 'Human:' or 'Assistant:'")
    return tuple(
        Message(role=_ROLES[who], content=said) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def write_transcript(messages: Messages) -> str:
    """The transcript of messages; the inverse of :func:`parse_transcript`.

    Raises:
        BadInputError: a message is not plain text of user or assistant, or contains a turn mark.
    """
    text = ""
    for message in messages:
        who = _NAMES.get(message.role)
        if who is None or not isinstance(message.content, str) or message.tool_calls or message.name:
            raise BadInputError(
                f"a transcript cannot hold a {message.role} message with tools, parts or names"
            )
        if _TURN.search("\n\n" + message.content if message.content.startswith("\n\n") else message.content):
            raise BadInputError("a message contains a line that reads like the start of a turn")
        text += f"\n\n{who}: {message.content}"
    return text


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:"))


@shape(
    "hh-rlhf",
    format="hh-rlhf",
    matches=lambda row: _is_transcript(row.get("chosen")) and isinstance(row.get("rejected"), str),
)
@importer(
    "hh-rlhf",
    read=read_json,
    sniff=lambda path, rows: any(_is_transcript(row.get("chosen")) for row in rows),
)
def parse(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """HH-RLHF transcripts: chosen and rejected conversations, one pair a line (.jsonl, .jsonl.gz)."""
    for key in ("chosen", "rejected"):
        if not isinstance(row.get(key), str):
            raise BadInputError(f"{key} is missing, or not text")
    first = parse_transcript(row["chosen"], "chosen")
    second = parse_transcript(row["rejected"], "rejected")
    prompt, chosen, rejected = split_shared(first, second)
    opening = next((m.text for m in prompt if m.role == "user"), "")
    return comparison_row(
        {"task_id": "hh:" + sha256_of_text(opening), **{k: v for k, v in row.items() if v is not None}},
        origin,
        prompt=prompt,
        chosen=simplest(chosen),
        rejected=simplest(rejected),
        not_held=unknown_keys(row, "chosen", "rejected"),
    )


@exporter("hh-rlhf", holds=frozenset({"task_id"}))
def export(run: ExportRun) -> None:
    """HH-RLHF transcripts, one comparison a line; ties and other kinds cannot be held."""

    def row(entry: Entry) -> dict[str, Any]:
        prompt, chosen, rejected = pair_of(entry)
        if entry.feedback.task_id and not entry.feedback.task_id.startswith("hh:"):
            run.lose("task_id")  # coming back it would be named after the first human message
        return {
            "chosen": write_transcript(prompt + messages_of(chosen)),
            "rejected": write_transcript(prompt + messages_of(rejected)),
        }

    run.write_jsonl(row)
