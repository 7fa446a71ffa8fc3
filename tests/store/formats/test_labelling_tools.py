"""Argilla and Label Studio: the shapes their exports really have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corrigible.records import Feedback
from corrigible.store import Store
from corrigible.store.formats import import_file


def bring(store: Store, tmp_path: Path, rows: Any, name: str = "export.json") -> dict[str, Feedback]:
    """Import rows and return the records by annotator and kind."""
    path = tmp_path / name
    path.write_text(json.dumps(rows))
    report = import_file(store, path)
    assert report.rejected == 0, report.first_rejects
    return {f"{r.annotator.pseudonym}:{r.kind}": r for r in store.feedback()}


ARGILLA_FIELDS = {"instruction": "Say hi", "response-1": "hi", "response-2": "hello there"}


def test_argilla_nested_records_of_version_2(store: Store, tmp_path: Path) -> None:
    record = {
        "id": "1",
        "fields": ARGILLA_FIELDS,
        "metadata": {"source": "web"},
        "suggestions": {"better": {"value": "response-2", "score": 0.9, "agent": "gpt"}},
        "responses": {
            "better": [{"value": "response-1", "user_id": "u1"}, {"value": "tie", "user_id": "u2"}],
            "rating-2": [{"value": 7, "user_id": "u1"}],
            "order": [{"value": ["response-2", "response-1"], "user_id": "u1"}],
            "why": [{"value": "because it is so very short and plain", "user_id": "u1"}],
            "topic": [{"value": "greeting", "user_id": "u1"}],
            "marks": [{"value": [{"start": 0, "end": 2, "label": "word"}], "user_id": "u3"}],
        },
        "vectors": {},
        "_server_id": None,
    }
    got = bring(store, tmp_path, [record])
    chosen = got["u1:comparison"]
    winner = chosen.targets[0 if chosen.payload.outcome == "first" else 1]  # type: ignore[union-attr]
    assert store.item(winner.sha256).text == "hi" and chosen.payload.criterion == "better"  # type: ignore[union-attr]
    assert store.item(chosen.context or "").messages()[0].text == "Say hi"
    assert got["u2:comparison"].payload.outcome == "tie"  # type: ignore[union-attr]
    suggested = got["gpt:comparison"]
    assert suggested.annotator.type == "ai_judge" and suggested.confidence == 0.9
    rated = got["u1:rating"]
    assert rated.payload.value == 7 and store.item(rated.targets[0].sha256).text == "hello there"  # type: ignore[union-attr]
    levels = got["u1:ranking"].payload.levels  # type: ignore[union-attr]
    assert store.item(got["u1:ranking"].targets[levels[0][0]].sha256).text == "hello there"
    assert got["u1:critique"].payload.text.startswith("because")  # type: ignore[union-attr]
    assert got["u1:label"].payload.values == ("greeting",)  # type: ignore[union-attr]


def test_argilla_settings_decide_types(store: Store, tmp_path: Path) -> None:
    (tmp_path / ".argilla").mkdir()
    questions = [
        {"name": "stars", "settings": {"type": "rating", "options": [{"value": v} for v in range(1, 6)]}},
        {"name": "note", "settings": {"type": "text"}},
        {
            "name": "tone",
            "settings": {"type": "label_selection", "options": [{"value": "ok"}, {"value": "bad"}]},
        },
    ]
    (tmp_path / ".argilla" / "settings.json").write_text(json.dumps({"questions": questions}))
    answers = {
        "stars": [{"value": 5, "user_id": "u"}],
        "note": [{"value": "fine", "user_id": "u"}],
        "tone": [{"value": "ok", "user_id": "u"}],
    }
    row = {"fields": {"prompt": "q", "text": "a"}, "responses": answers, "suggestions": {}}
    got = bring(store, tmp_path, [row], "records.json")
    assert got["u:rating"].payload.scale.max == 5 and got["u:rating"].payload.scale.min == 1  # type: ignore[union-attr]
    assert got["u:critique"].payload.text == "fine"  # type: ignore[union-attr]
    assert got["u:label"].payload.label_set == ("ok", "bad")  # type: ignore[union-attr]


def test_argilla_version_1_and_flat_columns(store: Store, tmp_path: Path) -> None:
    old = {
        "fields": {"prompt": "q", "text": "a"},
        "responses": [
            {"user_id": "u1", "values": {"label": {"value": "good"}}, "status": "submitted"},
            {"user_id": "u2", "values": {"label": {"value": "bad"}}, "status": "discarded"},
            {"user_id": "u3", "values": {"label": {"value": "bad"}}, "status": "draft"},
        ],
    }
    got = bring(store, tmp_path, [old], "old.json")
    assert got["u1:label"].payload.values == ("good",)  # type: ignore[union-attr]
    assert got["u2:label"].not_judged is not None and "u3:label" not in got
    flat = {
        "id": "1",
        "status": "completed",
        "text": "some text",
        "mood.responses": ["happy", "sad"],
        "mood.responses.users": ["f1", "f2"],
        "mood.responses.status": ["submitted", "submitted"],
        "mood.suggestion": "happy",
        "mood.suggestion.agent": "model",
        "mood.suggestion.score": 0.5,
        "metadata.lang": "en",
    }
    got = bring(store, tmp_path, [flat], "flat.json")
    assert got["f2:label"].payload.values == ("sad",) and got["model:label"].confidence == 0.5  # type: ignore[union-attr]


def task(*results: dict[str, Any], **data: str) -> dict[str, Any]:
    return {
        "id": 1,
        "data": data,
        "annotations": [
            {
                "id": 1001,
                "completed_by": {"id": 7, "email": "ada@example.org"},
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": "2021-03-09T22:16:08.728353Z",
                "lead_time": 4.288,
                "result": list(results),
            }
        ],
        "predictions": [],
    }


def test_label_studio_results(store: Store, tmp_path: Path) -> None:
    pairwise = {
        "from_name": "pw", "to_name": "txt-1,txt-2", "type": "pairwise", "value": {"selected": "right"}
    }  # fmt: skip
    choices = {
        "from_name": "tone",
        "to_name": "txt-1",
        "type": "choices",
        "value": {"choices": ["rude", "short"]},
    }
    rating = {"from_name": "stars", "to_name": "txt-2", "type": "rating", "value": {"rating": 4}}
    area = {"from_name": "why", "to_name": "txt-1", "type": "textarea", "value": {"text": ["too", "long"]}}
    box = {"from_name": "tag", "to_name": "img", "type": "rectanglelabels", "value": {"x": 1}}
    got = bring(
        store, tmp_path, [task(pairwise, choices, rating, area, box, prompt="q", text1="one", text2="two")]
    )
    record = got["7:comparison"]
    winner = record.targets[0 if record.payload.outcome == "first" else 1]  # type: ignore[union-attr]
    assert store.item(winner.sha256).text == "two"
    assert record.created_at == 1_615_328_168_728_353
    assert len({r.judgement_id for r in got.values()}) == 1
    assert set(got["7:label"].payload.values) == {"rude", "short"}  # type: ignore[union-attr]
    assert store.item(got["7:rating"].targets[0].sha256).text == "two"
    assert got["7:critique"].payload.text == "too\nlong"  # type: ignore[union-attr]
    assert "ada@example.org" not in json.dumps([r.to_json() for r in got.values()])


def test_label_studio_spans_predictions_and_cancelled(store: Store, tmp_path: Path) -> None:
    def mark(start: int, end: int) -> dict[str, Any]:
        value = {"start": start, "end": end, "text": "x", "labels": ["Person"]}
        return {"from_name": "ner", "to_name": "text", "type": "labels", "value": value}

    row = task(mark(4, 8), mark(0, 3), text="Ada met Grace")
    row["predictions"] = [{"model_version": "m1", "score": 0.4, "result": [mark(8, 13)]}]
    row["annotations"].append({"completed_by": 9, "was_cancelled": True, "result": []})
    got = bring(store, tmp_path, [row])
    spans = got["7:spans"].payload.spans  # type: ignore[union-attr]
    assert [(s.start, s.end, s.label) for s in spans] == [(0, 3, "Person"), (4, 8, "Person")]
    assert got["m1:spans"].annotator.type == "ai_judge" and got["m1:spans"].confidence == 0.4
    assert got["9:label"].not_judged is not None


def test_label_studio_ranker(store: Store, tmp_path: Path) -> None:
    row = task(
        {"from_name": "rank", "to_name": "list", "type": "ranker", "value": {"ranker": {"rank": ["b", "a"]}}}
    )
    row["data"] = {
        "prompt": "q",
        "text": "t",
        "items": [{"id": "a", "body": "first"}, {"id": "b", "body": "second"}],
    }
    record = bring(store, tmp_path, [row])["7:ranking"]
    best = record.payload.levels[0][0]  # type: ignore[union-attr]
    assert store.item(record.targets[best].sha256).text == "second"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (task({"type": "pairwise", "value": {"selected": "up"}}, text1="a", text2="b"), "left or right"),
        (task({"type": "pairwise", "value": {"selected": "left"}}, text1="a", text2="a"), "equal"),
        (task({"type": "pairwise", "value": {"selected": "left"}}, text1="a"), "on 1 texts"),
        (
            task(
                {"type": "labels", "to_name": "text", "value": {"start": 0, "end": 99, "labels": ["x"]}},
                text="short",
            ),
            "after the end of the text",
        ),
        (task({"type": "rating"}, text="a"), "not an object with a value"),
        ({"data": [], "annotations": []}, "data is missing"),
        (
            {"fields": {"prompt": "q", "text": "a"}, "responses": {"x": [{"value": {"odd": 1}}]}},
            "no question type",
        ),
        ({"fields": {"n": 3}, "responses": {"x": [{"value": "y"}]}}, "no field with text"),
    ],
)
def test_malformed_exports_are_rejected(store: Store, tmp_path: Path, row: Any, words: str) -> None:
    path = tmp_path / "export.json"
    good = task({"type": "choices", "from_name": "c", "value": {"choices": ["x"]}}, text="fine")
    if "fields" in row:
        good = {"fields": {"text": "fine"}, "responses": {"c": [{"value": "x", "user_id": "u"}]}}
    path.write_text(json.dumps([row, good]))
    report = import_file(store, path)
    assert (report.added, report.rejected) == (1, 1) and words in report.first_rejects[0]
