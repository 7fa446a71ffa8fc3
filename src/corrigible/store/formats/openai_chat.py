"""OpenAI's chat files: ``{"messages": […]}`` lines for supervised fine-tuning, and preference lines
``{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}``.

https://developers.openai.com/api/docs/guides/direct-preference-optimization. A conversation's last
turn is a demonstration; a preference line is a comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corrigible.errors import BadInputError
from corrigible.store.formats.exporting import ExportRun, pair_of, prompt_of
from corrigible.store.formats.readers import read_json
from corrigible.store.formats.registry import Entry, Origin, Parsed, exporter, importer
from corrigible.store.formats.shapes import (
    comparison_row,
    conversation,
    has,
    messages_of,
    parse_any,
    recognise,
    shape,
    simplest,
    unknown_keys,
)


@shape(
    "openai-preference",
    format="openai-chat",
    matches=has("input", "preferred_output", "non_preferred_output"),
)
def preference(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A comparison in the form of OpenAI's preference fine-tuning."""
    given = row["input"]
    if not isinstance(given, Mapping) or not isinstance(given.get("messages"), list):
        raise BadInputError("input must be an object with a list of messages")
    return comparison_row(
        row,
        origin,
        prompt=conversation(given["messages"], "input.messages"),
        chosen=simplest(conversation(row["preferred_output"], "preferred_output")),
        rejected=simplest(conversation(row["non_preferred_output"], "non_preferred_output")),
        not_held=[f"input.{k}" for k, v in given.items() if k != "messages" and v not in (None, [])]
        + unknown_keys(row, "input", "preferred_output", "non_preferred_output"),
    )


def _is_openai(row: Mapping[str, Any]) -> bool:
    found = recognise(row)
    return found is not None and found.format == "openai-chat"


@importer("openai-chat", read=read_json, sniff=lambda path, rows: any(_is_openai(row) for row in rows))
def parse(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """OpenAI chat lines: conversations (demonstrations) and preference fine-tuning pairs."""
    return parse_any(row, origin)


@exporter("openai-chat")
def export(run: ExportRun) -> None:
    """OpenAI chat lines: demonstrations as messages, decided comparisons as preference lines."""

    def row(entry: Entry) -> dict[str, Any]:
        if entry.feedback.kind == "comparison":
            prompt, chosen, rejected = pair_of(entry)
            return {
                "input": {"messages": [m.to_json() for m in prompt]},
                "preferred_output": [m.to_json() for m in messages_of(chosen)],
                "non_preferred_output": [m.to_json() for m in messages_of(rejected)],
            }
        if entry.feedback.kind == "demonstration" and entry.feedback.payload is not None:
            target = entry.item(entry.feedback.targets[0].sha256)
            return {"messages": [m.to_json() for m in prompt_of(entry) + messages_of(target)]}
        raise BadInputError("neither a comparison nor a demonstration")

    run.write_jsonl(row)
