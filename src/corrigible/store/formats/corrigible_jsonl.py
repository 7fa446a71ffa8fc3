"""Corrigible's own JSON lines: everything, exactly.

Each line names what it holds: ``{"corrigible": "item", "record": {…}}``, and likewise ``episode``,
``policy`` and ``feedback``. Items stand before the records that point to them. Without filters the
whole store is written (items, episodes and policy versions that no judgement mentions included);
with filters, the judgements let through and what they mention.

The *present* status of a record travels with it. Blobs are files and stay where they are; the
account says how many items point to one. Histories of policy versions stay in the store as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Episode, Feedback, Item, PolicyVersion
from corrigible.store.formats.exporting import ExportRun, references
from corrigible.store.formats.readers import read_json
from corrigible.store.formats.registry import EVERYTHING, Origin, Parsed, exporter, importer
from corrigible.store.formats.shapes import has, shape

_CHUNK = 500


@shape("corrigible", format="corrigible", matches=has("corrigible", "record"))
@importer(
    "corrigible",
    read=read_json,
    sniff=lambda path, rows: any("corrigible" in row and "record" in row for row in rows),
)
def parse(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """Corrigible's own lossless JSON lines: items, episodes, policy versions, feedback."""
    kind, record = row.get("corrigible"), row.get("record")
    if not isinstance(record, Mapping):
        raise BadInputError("record is missing, or not an object")
    match kind:
        case "feedback":
            return Parsed([Feedback.from_json(record)])
        case "item":
            return Parsed(items=[Item.from_json(record)])
        case "episode":
            return Parsed(episodes=[Episode.from_json(record)])
        case "policy":
            return Parsed(policies=[PolicyVersion.from_json(record)])
    raise BadInputError(f"a line of {kind!r}; known are feedback, item, episode and policy")


@exporter("corrigible", holds=EVERYTHING)
def export(run: ExportRun) -> None:
    """Corrigible's own JSON lines: lossless, with items, episodes and policy versions."""
    # Everything includes what was withdrawn; a filter asks for what is live unless it says otherwise.
    everything = not run.filters
    if everything:
        run.filters["status"] = None
    with run.writer() as file:

        def write(kind: str, text: str) -> None:
            file.write(f'{{"corrigible":{json.dumps(kind)},"record":{text}}}\n'.encode())

        if everything:
            _write_all(run, write)
        written: set[str] = set()
        for entry in run.entries():
            if not everything:
                for sha256 in sorted(set(entry.items) & references(entry.feedback)):
                    if sha256 not in written:
                        written.add(sha256)
                        _item(run, write, entry.items[sha256])
                for episode in _episodes(entry.feedback):
                    if episode not in written:
                        written.add(episode)
                        try:
                            write("episode", run.store.episode(episode).to_json_text())
                        except BadInputError:
                            run.lose("targets.episode (not in the store)")
            write("feedback", entry.feedback.to_json_text())
            run.written += 1


def _write_all(run: ExportRun, write: Any) -> None:
    for policy in run.store.policies():
        write("policy", policy.to_json_text())
    pending: list[str] = []

    def flush() -> None:
        for item in run.store.items(pending).values():
            _item(run, write, item)
        pending.clear()

    for change in run.store.changes():
        if change.table == "item":
            pending.append(change.id)
            if len(pending) >= _CHUNK:
                flush()
        elif change.table == "policy_event":
            run.lose("history of policy versions")
    flush()
    for episode in run.store.episodes():
        write("episode", episode.to_json_text())


def _item(run: ExportRun, write: Any, item: Item) -> None:
    if item.text is None:
        run.lose("bytes of blobs")
    write("item", item.to_json_text())


def _episodes(record: Feedback) -> Iterator[str]:
    for target in record.targets:
        if target.episode:
            yield target.episode
