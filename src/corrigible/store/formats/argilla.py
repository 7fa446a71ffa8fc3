"""Argilla: records with fields, responses by users, and suggestions by models.

Read are the three shapes that Argilla writes: the nested records of version 2 (``records.to_json``,
or the folder of ``to_disk``), those of version 1 (``responses`` as a list), and the flat columns of
``to_datasets`` (``rating.responses``, ``rating.responses.users``, …) in any table format. When the
folder's ``.argilla/settings.json`` is there, question types are taken from it, else from the values.

| question | record |
|---|---|
| label naming one of two response fields | comparison |
| label, multi_label | label |
| rating | rating (0 to 10 without settings) |
| ranking of fields | ranking |
| text | critique |
| span | spans |

A suggestion is a judgement by an AI judge, its agent. A discarded response is not judged (skipped).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Annotator, Feedback, Item, NotJudged, NotJudgedReason
from corrigible.store.formats import labelling
from corrigible.store.formats.exporting import ExportRun
from corrigible.store.formats.readers import read_json
from corrigible.store.formats.registry import EVERYTHING, Entry, Origin, Parsed, Row, exporter, importer
from corrigible.store.formats.shapes import shape

_NOT_FIELDS = frozenset(
    {"id", "external_id", "status", "_server_id", "inserted_at", "updated_at", "dataset_id", "score"}
)
_QUESTIONS = "_question_settings"


@dataclass(frozen=True)
class _Answer:
    question: str
    value: Any
    user: str | None = None
    status: str = "submitted"
    agent: str | None = None
    score: Any = None


def _read(path: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Records of a JSON export, or of a folder with ``records.json``, with the question settings if any."""
    source = path / "records.json" if path.is_dir() else path
    questions: dict[str, Any] = {}
    settings = source.parent / ".argilla" / "settings.json"
    if settings.is_file():
        try:
            loaded = json.loads(settings.read_text("utf-8"))
            questions = {q["name"]: q.get("settings", {}) for q in loaded["questions"]}
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(
                f"{settings} cannot be read ({error}).", advice="Export the dataset again, or remove it."
            ) from None
    for row in read_json(source, options):
        if row.value is not None and questions:
            yield Row(row.number, {**row.value, _QUESTIONS: questions}, row.raw)
        else:
            yield row


def _is_record(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("fields"), Mapping) and ("responses" in row or "suggestions" in row)


def _is_flat(row: Mapping[str, Any]) -> bool:
    return any(key.endswith((".responses", ".suggestion")) for key in row)


def _sniff(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    if path.is_dir():
        return (path / "records.json").is_file()
    return any(_is_record(row) or _is_flat(row) for row in rows)


@shape("argilla", format="argilla", matches=lambda row: _is_record(row) or _is_flat(row))
@importer("argilla", read=_read, sniff=_sniff)
def parse(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """Argilla records (version 1 or 2, nested or flat) with responses and suggestions."""
    names, metadata, answers = _normal(row)
    parsed = Parsed()
    taken: set[str] = set()
    back = labelling.restored(metadata)
    if back is not None:
        entry = labelling.entry_of(back)
        written = to_row(entry)
        if written["fields"] == dict(names):
            wanted = {
                (question, json.dumps(one["value"]), one["user_id"])
                for question, given in written["responses"].items()
                for one in given
            }
            for index, answer in enumerate(answers):
                if (answer.question, json.dumps(answer.value), answer.user) in wanted:
                    taken.add(str(index))
                    parsed = back
    if all(str(index) in taken for index in range(len(answers))):
        return parsed
    fields = labelling.read_fields(names)
    types: Mapping[str, Any] = row.get(_QUESTIONS) or {}
    for index, answer in enumerate(answers):
        if str(index) in taken:
            continue
        if answer.status in ("draft", "pending"):
            parsed.not_held.append(f"{answer.status} responses")
            continue
        extra: list[Item] = []
        record = _judgement(fields, answer, types.get(answer.question) or {}, origin, str(index), extra)
        parsed.feedback.append(record)
        parsed.items += [*fields.items(), *extra]
    kept = {k: v for k, v in metadata.items() if v is not None and labelling.KEY not in k}
    parsed.not_held += [f"metadata.{name}" for name in kept]
    if row.get("vectors"):
        parsed.not_held.append("vectors")
    return parsed


def _judgement(
    fields: labelling.Fields,
    answer: _Answer,
    settings: Mapping[str, Any],
    origin: Origin,
    part: str,
    items: list[Item],
) -> Feedback:
    if answer.agent is not None:
        annotator = Annotator(pseudonym=answer.agent, type="ai_judge")
    else:
        annotator = Annotator(pseudonym=answer.user or "unknown", type="human")
    score = answer.score if isinstance(answer.score, int | float) and 0 <= answer.score <= 1 else None
    envelope = origin.envelope(part, confidence=score)
    if fields.context is not None:
        envelope["context"] = fields.context.sha256
    if answer.status == "discarded":
        where = labelling.target(fields, answer.question, items)
        missing = NotJudged(intended="label", reason=NotJudgedReason.skipped, detail=answer.question)
        return Feedback.on([where], missing, annotator=annotator, **envelope)
    targets, payload = _payload(fields, answer, settings, items)
    return Feedback.on(targets, payload, annotator=annotator, **envelope)


def _payload(
    fields: labelling.Fields, answer: _Answer, settings: Mapping[str, Any], items: list[Item]
) -> labelling.Judgement:
    kind, question, value = settings.get("type"), answer.question, answer.value
    options: list[Any] = [o.get("value") for o in settings.get("options") or [] if isinstance(o, Mapping)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = (min(options), max(options)) if kind == "rating" and options else (0, 10)
        return labelling.rating(fields, question, float(value), low, high, items)
    if isinstance(value, str):
        if kind == "text" or (kind is None and (len(value) > 60 or value.count(" ") > 3)):
            return labelling.critique(fields, question, value, items)
        return labelling.choice(fields, question, [value], [str(o) for o in options], items)
    if isinstance(value, list) and value:
        if all(isinstance(v, Mapping) and {"start", "end", "label"} <= set(v) for v in value):
            return labelling.spans(fields, str(settings.get("field") or question), value, items)
        if all(isinstance(v, Mapping) and "value" in v for v in value):
            ranks = sorted({v.get("rank") or 0 for v in value})
            levels = [[v["value"] for v in value if (v.get("rank") or 0) == rank] for rank in ranks]
            return labelling.ranking(fields, question, levels)
        if all(isinstance(v, list) for v in value):
            return labelling.ranking(fields, question, value)
        if all(isinstance(v, str) for v in value):
            named = len(value) > 1 and all(labelling.pick(fields, v) for v in value)
            if kind == "ranking" or (kind is None and named):
                return labelling.ranking(fields, question, [[v] for v in value])
            return labelling.choice(fields, question, value, [str(o) for o in options], items)
    raise BadInputError(f"the answer to {question!r} is {str(value)[:60]!r}, which no question type has")


def _normal(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], list[_Answer]]:
    """Fields, metadata and answers, whichever of the three shapes the record has."""
    if not _is_record(row):
        return _flat(row)
    answers: list[_Answer] = []
    responses = row.get("responses") or {}
    if isinstance(responses, Mapping):
        for question, given in responses.items():
            for one in given or []:
                answers.append(
                    _Answer(question, one.get("value"), one.get("user_id"), one.get("status") or "submitted")
                )
    else:
        for one in responses:
            for question, given in (one.get("values") or {}).items():
                value = given.get("value") if isinstance(given, Mapping) else given
                answers.append(_Answer(question, value, one.get("user_id"), one.get("status") or "submitted"))
    suggestions = row.get("suggestions") or {}
    if not isinstance(suggestions, Mapping):
        suggestions = {s["question_name"]: s for s in suggestions if "question_name" in s}
    for question, one in suggestions.items():
        if one and one.get("value") is not None:
            answers.append(
                _Answer(question, one["value"], agent=one.get("agent") or "unknown", score=one.get("score"))
            )
    metadata = row.get("metadata")
    return row["fields"], metadata if isinstance(metadata, Mapping) else {}, answers


def _flat(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], list[_Answer]]:
    answers: list[_Answer] = []
    for key, value in row.items():
        if key.endswith(".responses") and value:
            users = row.get(f"{key}.users") or [None] * len(value)
            states = row.get(f"{key}.status") or ["submitted"] * len(value)
            question = key.removesuffix(".responses")
            answers += [
                _Answer(question, one, user, status or "submitted")
                for one, user, status in zip(value, users, states, strict=True)
            ]
        elif key.endswith(".suggestion") and value is not None:
            agent, score = row.get(f"{key}.agent") or "unknown", row.get(f"{key}.score")
            answers.append(_Answer(key.removesuffix(".suggestion"), value, agent=agent, score=score))
    fields = {k: v for k, v in row.items() if "." not in k and k not in _NOT_FIELDS and k != _QUESTIONS}
    metadata = {k.removeprefix("metadata."): v for k, v in row.items() if k.startswith("metadata.")}
    return fields, metadata, answers


def to_row(entry: Entry) -> dict[str, Any]:
    """One Argilla record, in the nested shape of version 2."""
    shown, user = labelling.visible(entry.feedback), entry.feedback.annotator.pseudonym
    return {
        "id": entry.feedback.id,
        "fields": labelling.visible_fields(entry),
        "metadata": labelling.carried(entry),
        "suggestions": {},
        "responses": {shown.question: [{"value": shown.value, "user_id": user}]},
        "vectors": {},
        "_server_id": None,
    }


@exporter("argilla", holds=EVERYTHING)
def export(run: ExportRun) -> None:
    """Argilla records (records.from_json), with each whole record as metadata."""
    run.write_array(to_row)
