"""Label Studio: tasks with annotations (people) and predictions (models), as its JSON export has them.

https://labelstud.io/guide/task_format. Understood are the results of the tags Pairwise, Choices,
Rating, TextArea, Labels on text, and Ranker without buckets; every other result is named in the
account. All results of one annotation share a ``judgement_id``.

| tag | record |
|---|---|
| Pairwise | comparison |
| Choices | label (a comparison when a choice names one of two texts) |
| Rating | rating (1 to 5, or 1 to 10 when there are more stars) |
| TextArea | critique |
| Labels | spans |
| Ranker | ranking |

A cancelled annotation is not judged (skipped).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Annotator, Comparison, Feedback, Item, NotJudged, NotJudgedReason, TargetRef
from corrigible.store.formats import labelling
from corrigible.store.formats.exporting import ExportRun
from corrigible.store.formats.readers import read_json
from corrigible.store.formats.registry import EVERYTHING, Entry, Origin, Parsed, exporter, importer
from corrigible.store.formats.shapes import micros, shape

_STARS = 5


def _is_task(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("data"), Mapping) and ("annotations" in row or "predictions" in row)


def _sniff(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    return path.is_file() and any(_is_task(row) for row in rows)


@shape("label-studio", format="label-studio", matches=_is_task)
@importer("label-studio", read=read_json, sniff=_sniff)
def parse(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """Label Studio's JSON export: tasks with annotations and predictions."""
    data = row.get("data")
    if not isinstance(data, Mapping):
        raise BadInputError("data is missing, or not an object")
    parsed = Parsed()
    meta = row.get("meta")
    back = labelling.restored(meta) if isinstance(meta, Mapping) else None
    unchanged = None if back is None else to_row(labelling.entry_of(back))
    fields: labelling.Fields | None = None
    for source, human in (("annotations", True), ("predictions", False)):
        for index, given in enumerate(row.get(source) or []):
            if not isinstance(given, Mapping):
                raise BadInputError(f"{source}[{index}] is not an object")
            if unchanged is not None and human and data == unchanged["data"]:
                written = unchanged["annotations"][0]
                if _plain(given.get("result")) == _plain(written["result"]) and back is not None:
                    parsed.feedback += back.feedback
                    parsed.items += back.items
                    continue
            fields = fields or labelling.read_fields(data)
            _annotation(parsed, fields, data, given, human, origin, f"{source}{index}")
    return parsed


def _plain(result: Any) -> list[Any]:
    keys = ("type", "from_name", "to_name", "value")
    return [{key: one.get(key) for key in keys} for one in result or [] if isinstance(one, Mapping)]


def _annotation(
    parsed: Parsed,
    fields: labelling.Fields,
    data: Mapping[str, Any],
    given: Mapping[str, Any],
    human: bool,
    origin: Origin,
    part: str,
) -> None:
    at = micros(given.get("created_at"))
    annotator = _person(given) if human else _model(given)
    judgement = origin.id(part, at)
    context = fields.context.sha256 if fields.context else None
    number = 0

    def add(targets: list[TargetRef], what: Any, items: Sequence[Item] = ()) -> None:
        nonlocal number
        envelope = origin.envelope(f"{part}/{number}", at, judgement_id=judgement, context=context)
        score = given.get("score")
        if not human and isinstance(score, int | float) and 0 <= score <= 1:
            envelope["confidence"] = float(score)
        number += 1
        parsed.feedback.append(Feedback.on(targets, what, annotator=annotator, **envelope))
        parsed.items.extend([*fields.items(), *items])

    if given.get("was_cancelled"):
        where = [TargetRef.of(item) for item in fields.candidates.values()]
        intended = "comparison" if len(where) == 2 else "label"
        add(where, NotJudged(intended=intended, reason=NotJudgedReason.skipped))
    for key in ("lead_time", "ground_truth"):
        if given.get(key):
            parsed.not_held.append(f"annotation.{key}")
    marks: dict[str, list[dict[str, Any]]] = {}
    for result in given.get("result") or []:
        if not isinstance(result, Mapping) or not isinstance(result.get("value"), Mapping):
            raise BadInputError("a result is not an object with a value")
        value, question = result["value"], str(result.get("from_name") or "overall")
        items: list[Item] = []
        match result.get("type"):
            case "pairwise":
                add(*_pairwise(fields, result, question))
            case "choices":
                add(*labelling.choice(fields, question, list(value["choices"]), [], items), items)
            case "rating":
                stars = float(value["rating"])
                high = _STARS if stars <= _STARS else 10
                about = _about(fields, result)
                add(*labelling.rating(about, question, stars, min(1.0, stars), high, items), items)
            case "textarea":
                text = value.get("text")
                text = "\n".join(text) if isinstance(text, list) else str(text or "")
                add(*labelling.critique(_about(fields, result), question, text, items), items)
            case "labels":
                for label in value.get("labels") or []:
                    mark = {"start": value["start"], "end": value["end"], "label": label}
                    marks.setdefault(str(result.get("to_name")), []).append(mark)
            case "ranker":
                add(*_ranker(data, value, question, items), items)
            case other:
                parsed.not_held.append(f"results of type {other}")
    for field, found in marks.items():
        items = []
        add(*labelling.spans(fields, field, found, items), items)


def _about(fields: labelling.Fields, result: Mapping[str, Any]) -> labelling.Fields:
    """Only the field that the tag belongs to, if its name says which."""
    name = labelling.pick(fields, str(result.get("to_name") or ""))
    return fields if name is None else labelling.Fields(fields.context, {name: fields.candidates[name]})


def _pairwise(
    fields: labelling.Fields, result: Mapping[str, Any], question: str
) -> tuple[list[TargetRef], Comparison]:
    names = [labelling.pick(fields, name) for name in str(result.get("to_name") or "").split(",")]
    if len(names) != 2 or None in names or names[0] == names[1]:
        names = list(fields.candidates)
    if len(names) != 2:
        raise BadInputError(f"a pairwise result on {len(names)} texts; which two is not said")
    selected = result["value"].get("selected")
    if selected not in ("left", "right"):
        raise BadInputError(f"selected is {selected!r}, where left or right was expected")
    first, second = (fields.candidates[str(name)] for name in names)
    if first.sha256 == second.sha256:
        raise BadInputError("the two texts are equal: nothing was preferred")
    outcome = "first" if selected == "left" else "second"
    return [TargetRef.of(first), TargetRef.of(second)], Comparison(outcome=outcome, criterion=question)


def _ranker(
    data: Mapping[str, Any], value: Mapping[str, Any], question: str, items: list[Item]
) -> labelling.Judgement:
    ranked = value.get("ranker")
    orders = [v for v in ranked.values() if isinstance(v, list)] if isinstance(ranked, Mapping) else []
    if len(orders) != 1:
        raise BadInputError("a ranker result with buckets, which is no single order")
    for listed in data.values():
        if not isinstance(listed, list):
            continue
        known = {one["id"]: one for one in listed if isinstance(one, Mapping) and "id" in one}
        if orders[0] and set(orders[0]) <= set(known):
            texts = {str(i): _list_item(known[i]) for i in orders[0]}
            items += texts.values()
            return labelling.ranking(labelling.Fields(None, texts), question, [[str(i)] for i in orders[0]])
    raise BadInputError("the ranked ids are in no list of the task's data")


def _list_item(one: Mapping[str, Any]) -> Item:
    for key in ("text", "body", "html", "title"):
        if isinstance(one.get(key), str):
            return Item.of_text(one[key], "response")
    return Item.of_json(dict(one), "document")


def _person(given: Mapping[str, Any]) -> Annotator:
    by = given.get("completed_by")
    if isinstance(by, Mapping):  # the id rather than the e-mail address: a pseudonym is enough
        by = by.get("id") or by.get("email")
    return Annotator(pseudonym=str(by) if by not in (None, "") else "unknown", type="human")


def _model(given: Mapping[str, Any]) -> Annotator:
    version = str(given.get("model_version") or "") or None
    return Annotator(pseudonym=version or "unknown", type="ai_judge", version=version)


# --- out ------------------------------------------------------------------------------------------


def to_row(entry: Entry) -> dict[str, Any]:
    """One task with one annotation."""
    shown = labelling.visible(entry.feedback)
    data = labelling.visible_fields(entry)
    names = ",".join(name for name in data if name != "prompt")
    first = names.split(",", maxsplit=1)[0]

    def result(type: str, to: str, value: Mapping[str, Any]) -> dict[str, Any]:
        return {"from_name": shown.question, "to_name": to, "type": type, "value": dict(value)}

    match shown.type, shown.value:
        case "label_selection", ("response_a" | "response_b") as winner:
            side = "left" if winner == "response_a" else "right"
            results = [result("pairwise", names, {"selected": side})]
        case "label_selection", value:
            results = [result("choices", first, {"choices": [value]})]
        case "multi_label_selection", value:
            results = [result("choices", first, {"choices": value})]
        case "rating", value:
            results = [result("rating", first, {"rating": value})]
        case "text", value:
            results = [result("textarea", first, {"text": [value]})]
        case "span", marks:
            text = str(data[first])
            results = [
                result(
                    "labels",
                    first,
                    {
                        "start": mark["start"],
                        "end": mark["end"],
                        "text": text[mark["start"] : mark["end"]],
                        "labels": [mark["label"]],
                    },
                )
                for mark in marks
            ]
        case _:
            raise BadInputError("Label Studio has no such result")
    annotation = {
        "completed_by": entry.feedback.annotator.pseudonym,
        "was_cancelled": False,
        "result": results,
    }
    return {"data": data, "annotations": [annotation], "predictions": [], "meta": labelling.carried(entry)}


@exporter("label-studio", holds=EVERYTHING)
def export(run: ExportRun) -> None:
    """Label Studio tasks with annotations, with each whole record as task metadata."""
    run.write_array(to_row)
