from __future__ import annotations

import pytest
from typer.testing import CliRunner

from corrigible.cli import app
from corrigible.errors import BadInputError, RefusedError
from corrigible.loop.gate import Gate
from corrigible.loop.registry import Registry
from corrigible.records import Annotator, PolicyVersion, TrainedOn, comparison
from corrigible.store import Store


@pytest.fixture
def registry(tmp_path):
    with Store.open(tmp_path / "s.db") as store:
        yield Registry(store)


def version(name: str, parent: PolicyVersion | None = None, **more: object) -> PolicyVersion:
    return PolicyVersion(
        name=name, base_model="tiny-random", weights="0" * 64, parent=parent.id if parent else None, **more
    )


def verdict(promoted: bool):
    low = 0.6 if promoted else 0.3
    return Gate().decide(win_rate=0.65, interval=(low, 0.8), prompts=100)


def test_versions_come_with_status_and_the_last_promoted_is_current(registry):
    first = registry.register(version("a-v1"))
    second = registry.register(version("a-v2", first))
    third = registry.register(version("a-v3", second))
    registry.decide(second, verdict(True))
    registry.decide(third, verdict(False))
    assert [(s.version.name, s.status, s.current) for s in registry.states()] == [
        ("a-v1", "created", False),
        ("a-v2", "promoted", True),
        ("a-v3", "refused", False),
    ]
    assert registry.current() == second
    registry.store.add_policy_event(second.id, "retired", {})
    assert registry.current() is None


def test_registering_twice_changes_nothing(registry):
    first = version("a-v1")
    registry.register(first)
    registry.register(first)
    assert len(registry.states()) == 1
    assert [e.event for e in registry.store.policy_events()] == ["created"]


def test_a_version_without_its_parent_is_refused(registry):
    with pytest.raises(BadInputError, match="names the parent"):
        registry.register(version("b-v2", version("b-v1")))


def test_a_refused_version_needs_an_override(registry):
    first = registry.register(version("a-v1"))
    registry.decide(first, verdict(False))
    with pytest.raises(RefusedError, match="not above"):
        registry.promote("a-v1", by="me", reason="I like it")
    registry.promote("a-v1", by="me", reason="I like it", override=True)
    assert registry.current() == first
    assert registry.store.policy_events(first.id)[-1].detail["override"] is True


def test_a_version_is_found_by_id_name_and_beginning(registry):
    first = registry.register(version("a-v1"))
    assert registry.policy(first.id) == registry.policy("a-v1") == registry.policy(first.id[:30]) == first
    with pytest.raises(BadInputError, match="Known names: a-v1"):
        registry.policy("nobody")


def test_lineage_walks_back_to_each_judgement(registry):
    store = registry.store
    first = registry.register(version("a-v1"))
    records = []
    for number in range(6):
        record, items = comparison(
            f"question {number}",
            "good answer",
            f"bad answer {number}",
            annotator=Annotator(pseudonym="ada" if number % 3 else "ben", type="human"),
        )
        store.add_feedback([record], items)
        records.append(record)
    used = sorted(record.id for record in records[:5])
    second = registry.register(
        version("a-v2", first, algorithm="dpo", trained_on=TrainedOn.of(used)), trained_on=used
    )
    found = registry.lineage("a-v2")
    assert (found.judgements, found.kinds) == (5, {"comparison": 5})
    assert found.annotators == {"ada": 3, "ben": 2}
    assert found.parent is not None and found.parent.version == first
    assert sorted(r.id for r in registry.training_feedback(second)) == used
    assert found.to_json()["parent"]["policy"]["name"] == "a-v1"
    with pytest.raises(BadInputError, match="the version itself states"):
        registry.register(version("a-v3", second, trained_on=TrainedOn.of(used)), trained_on=used[:-1])


def test_promoting_by_hand_takes_a_reason(registry):
    first = registry.register(version("a-v1"))
    store = registry.store.url
    empty = CliRunner().invoke(app, ["promote", first.name, "--reason", " ", "--store", store])
    assert empty.exit_code == 3 and registry.current() is None
    said = CliRunner().invoke(app, ["promote", first.name, "--reason", "reads better", "--store", store])
    assert said.exit_code == 0 and registry.current() == first


def test_a_narrow_terminal_shows_whole_ids_and_the_win_rate(registry):
    first = registry.register(version("a-rather-long-name-for-a-policy-v1"))
    evaluation = {"win_rate": 0.65, "win_rate_interval": [0.6, 0.8]}
    registry.decide(first, verdict(True), {"evaluation": evaluation})
    shown = CliRunner().invoke(app, ["policies", "--store", registry.store.url], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert first.id in shown.stdout and "0.60 to 0.80" in shown.stdout
    assert f"* {first.name}" in shown.stdout


def test_versions_of_one_name_are_told_apart(registry):
    import json

    first, alone = registry.register(version("twin", created_at=1)), registry.register(version("alone"))
    second = registry.register(version("twin", created_at=2))
    store = ["--store", registry.store.url]
    assert registry.namesakes(second) == [first.id] and registry.namesakes(alone) == []

    shown = CliRunner().invoke(app, ["policies", *store])
    assert (
        "twin (1 of 2)" in shown.stdout and "twin (2 of 2)" in shown.stdout and "alone (" not in shown.stdout
    )
    assert f"2 versions are called twin: the name means the newest, {second.id}" in shown.stderr
    listed = json.loads(CliRunner().invoke(app, ["policies", "--json", *store]).stdout)["policies"]
    assert {p["id"]: p["same_name"] for p in listed} == {
        first.id: [second.id],
        second.id: [first.id],
        alone.id: [],
    }

    promote = ["promote", "--reason", "r", *store]
    taken = CliRunner().invoke(app, [*promote, "twin"])
    assert second.id in taken.stdout and f"({first.id}): the newest was taken" in taken.stderr
    assert registry.current() == second
    by_id = CliRunner().invoke(app, [*promote, first.id])
    assert first.id in by_id.stdout and by_id.stderr == "" and registry.current() == first
    told = json.loads(CliRunner().invoke(app, [*promote, "twin", "--json"]).stdout)
    assert told == {"promoted": second.id, "name": "twin", "same_name": [first.id]}
