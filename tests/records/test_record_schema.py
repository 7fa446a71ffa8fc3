"""Versions: earlier records are read, later ones refused; the JSON Schema says what the models say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from record_examples import PAYLOADS, make, sha

from corrigible.errors import BadInputError
from corrigible.records import KINDS, MIGRATIONS, Comparison, Feedback, json_schema, migrate
from corrigible.records.migrations import CURRENT

EARLIER = Path(__file__).with_name("feedback_v1.jsonl")


def test_every_earlier_record_of_version_1_is_read_without_loss() -> None:
    """The file holds one record of each kind as the first release of @1 wrote it. It is never rewritten."""
    lines = EARLIER.read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["kind"] for line in lines} >= set(GUIDE_V1)
    for line in lines:
        old, new = json.loads(line), Feedback.from_json(line).to_json()
        assert Feedback.from_json(old).to_json() == new
        assert covers(new, old), f"{old['kind']} lost something"


GUIDE_V1 = tuple(PAYLOADS)


def covers(new: Any, old: Any) -> bool:
    """Whether everything in ``old`` is in ``new`` (which may hold more optional keys)."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(k in new and covers(new[k], v) for k, v in old.items())
    if isinstance(old, list):
        return isinstance(new, list) and len(new) == len(old) and all(map(covers, new, old))
    return bool(new == old)


def v0(**fields: Any) -> dict[str, Any]:
    record = make("comparison")
    return {
        "schema_version": "corrigible/feedback@0",
        "id": record.id,
        "kind": "comparison",
        "target": [sha("left"), sha("right")],
        "value": "first",
        "source": "worker-7",
        "axis": "helpfulness",
        "context": sha("prompt"),
        "presented_order": [1, 0],
        "seconds": 2.5,
        "created_at": 1_700_000_000.25,
        **fields,
    }


def test_version_0_comparison_is_migrated() -> None:
    old = v0()
    untouched = json.dumps(old)
    for given in (old, json.dumps(old)):
        record = Feedback.from_json(given)
        assert isinstance(record.payload, Comparison)
        index = 0 if record.payload.outcome == "first" else 1
        assert record.targets[index].sha256 == sha("left")  # "first" was the first as listed, not by hash
        assert record.payload.criterion == "helpfulness" and record.payload.strength == 1
        assert record.presentation is not None and record.presentation.order is not None
        assert record.targets[record.presentation.order[0]].sha256 == sha("right")  # was shown first
        assert record.effort is not None and record.effort.active_ms == 2500
        assert record.created_at == 1_700_000_000_250_000
        assert record.annotator.pseudonym == "worker-7" and record.context == sha("prompt")
        assert record.to_json()["schema_version"] == "corrigible/feedback@1"
    assert json.dumps(old) == untouched


def test_version_0_rating_and_reaction_are_migrated() -> None:
    rating: Any = Feedback.from_json(
        v0(kind="rating", target=[sha("x")], value=0.5, presented_order=None)
    ).payload
    assert (rating.value, rating.criterion, rating.scale.id) == (0.5, "helpfulness", "v0")
    thumb: Any = Feedback.from_json(
        v0(kind="reaction", target=[sha("x")], value=-1, presented_order=None)
    ).payload
    assert thumb.value == -1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (v0(kind="ranking"), "version 0 record of kind 'ranking'"),
        (v0(value="left"), "with value 'left'"),
        (v0(target=["nonsense"]), "feedback@0 record is malformed"),
        (v0(seconds=[]), "feedback@0 record is malformed"),
        (v0(target=["nonsense"], presented_order=None), r"targets\[0\].sha256"),
        ({"schema_version": "corrigible/feedback@2"}, "later release.*Upgrade"),
        ({"schema_version": "corrigible/poem@1"}, "not one of ours"),
        ({"schema_version": 1}, "not one of ours"),
        ({"schema_version": "corrigible/episode@1"}, "schema_version"),
    ],
)
def test_versions_that_cannot_be_read(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Feedback.from_json(given)


def test_every_version_has_its_way_up() -> None:
    assert MIGRATIONS.keys() == {(schema, n) for schema, now in CURRENT.items() for n in range(now)} - {
        ("episode", 0),
        ("policy", 0),
    }  # these began at version 1
    current = make("reaction").to_json()
    assert migrate(current) == current


def test_json_schema_is_published() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "corrigible.records.schema"],
        capture_output=True,
        text=True,
        check=True,
    )
    schema = json.loads(done.stdout)
    assert schema == json_schema()
    for kind, model in KINDS.items():
        definition = schema["$defs"][model.__name__]
        assert definition["properties"]["kind"]["const"] == kind and "kind" in definition["required"]
        assert definition["additionalProperties"] is False and definition["description"]
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert set(definition["properties"]) == names
    unknown = schema["$defs"]["UnknownPayload"]["properties"]["kind"]
    assert set(unknown["not"]["enum"]) == set(KINDS)
    assert set(schema["$defs"]["Feedback"]["properties"]) == set(Feedback.model_fields)
