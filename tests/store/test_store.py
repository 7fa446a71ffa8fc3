"""Adding and asking, the same on SQLite and PostgreSQL."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest
from store_examples import T0, episode, mixed, policy, vote, votes

import corrigible.store.queries as queries
from corrigible.errors import BadInputError
from corrigible.records import Feedback, Item, TargetRef
from corrigible.store import Added, Store


def test_records_come_back_equal(store: Store) -> None:
    record, items = vote(1, rationale="naïve 日本語 \U0001f642 \u2028 'quoted' \\ \x00", task_id="t")
    assert store.add_feedback([record], items) == Added(new=1)
    assert store.feedback_record(record.id) == record
    assert list(store.feedback()) == [record]
    assert store.item(items[0].sha256) == items[0]
    assert store.items(i.sha256 for i in [*items, Item.of_text("not there")]) == {i.sha256: i for i in items}
    made = episode(3, policy="v1")
    assert store.add_episodes([made]) == Added(new=1)
    assert store.episode(made.id) == made


def test_text_with_every_awkward_character_survives(store: Store) -> None:
    awkward = [
        Item.of_text(t) for t in ("", "\x00nul\x00", "\r\n\t\\N\\.", "é" + "e\u0301", "\U0010ffff", '"')
    ]
    store.add_items(awkward)
    assert [store.item(i.sha256).text for i in awkward] == [i.text for i in awkward]


def test_adding_again_stores_nothing(store: Store) -> None:
    records = list(votes(10))
    assert store.add_feedback(records[:6]) == Added(new=6)
    assert store.add_feedback(records) == Added(new=4, existing=6)
    assert store.add_feedback([*records, *records]) == Added(existing=20)
    assert store.count_feedback() == 10
    one = vote(99)[0]
    assert store.add_feedback([one, one]) == Added(new=1, existing=1)
    assert len(list(store.changes())) == 11


@pytest.mark.parametrize("within_one_call", [True, False])
def test_one_id_cannot_hold_two_records(store: Store, within_one_call: bool) -> None:
    kept, items = vote(1)
    other = kept.model_copy(update={"rationale": "another thought"})
    newcomer = vote(2)[0]
    store.add_feedback([] if within_one_call else [kept], items)
    calls = [kept, newcomer, other] if within_one_call else [newcomer, other]
    with pytest.raises(BadInputError, match=f"{kept.id} already holds a different"):
        store.add_feedback(calls)
    # The call was one transaction: the good record beside the bad one is not half in.
    assert list(store.feedback()) == ([] if within_one_call else [kept])


def test_one_id_cannot_hold_two_episodes_or_policies(store: Store) -> None:
    run, version = episode(1), policy("demo-v1")
    store.add_episodes([run])
    store.add_policies([version])
    with pytest.raises(BadInputError, match="different episode"):
        store.add_episodes([run.model_copy(update={"task": "else"})])
    with pytest.raises(BadInputError, match="different policy"):
        store.add_policies([version.model_copy(update={"name": "else"})])


def test_same_bytes_are_one_item_but_not_of_two_media_types(store: Store) -> None:
    first = Item.of_text("[]", "response")
    store.add_items([first])
    assert store.add_items([Item.of_text("[]", "text")]) == Added(existing=1)
    assert store.item(first.sha256) == first
    with pytest.raises(BadInputError, match="different item"):
        store.add_items([Item.of_messages([], "prompt")])


def test_what_is_not_a_record_is_refused_by_name(store: Store) -> None:
    with pytest.raises(BadInputError, match="Expected Feedback records, got dict at position 1"):
        store.add_feedback([vote(1)[0], {"kind": "comparison"}])  # type: ignore[list-item]
    with pytest.raises(BadInputError, match="Expected Feedback records, got tuple"):
        store.add_feedback([vote(1)])  # type: ignore[list-item]
    assert store.count_feedback(status=None) == 0


def test_a_failing_source_leaves_nothing_behind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corrigible.store.transaction._BATCH", 3)

    def source() -> Iterator[Feedback]:
        yield from votes(10)
        raise BadInputError("line 11 is no record")

    with pytest.raises(BadInputError, match="line 11"):
        store.add_feedback(source())
    assert store.count_feedback() == 0
    assert list(store.changes()) == []
    assert store.add_feedback(votes(10)) == Added(new=10)


def test_asking_for_what_is_not_there(store: Store) -> None:
    for ask in (store.item, store.episode, store.feedback_record, store.policy):
        with pytest.raises(BadInputError, match="holds no"):
            ask("nothing-of-this-name")
    assert list(store.feedback(annotator="nobody")) == []
    assert store.items([]) == {}
    with pytest.raises(BadInputError, match="limit"):
        store.feedback(limit=-1)
    with pytest.raises(BadInputError, match="Unknown status"):
        store.feedback(status="alive")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="No such filter"):
        store.count_feedback(who="ada")


# The oracle of every filter: the same condition on the records in memory.
FILTERS = {
    "kind": ("rating", lambda f: f.kind == "rating"),
    "annotator": ("p2", lambda f: f.annotator.pseudonym == "p2"),
    "task": ("t1", lambda f: f.task_id == "t1"),
    "campaign": ("c1", lambda f: f.campaign_id == "c1"),
    "criterion": ("tone", lambda f: getattr(f.payload, "criterion", None) == "tone"),
    "policy": ("v1", lambda f: f.policy is not None and f.policy[0].snapshot == "v1"),
    "episode": ("e3", lambda f: f.targets[0].episode == "e3"),
    "target": (
        Item.of_text("answer 2").sha256,
        lambda f: f.targets[0].sha256 == Item.of_text("answer 2").sha256,
    ),
    "since": (T0 + 20, lambda f: f.created_at >= T0 + 20),
    "until": (T0 + 40, lambda f: f.created_at < T0 + 40),
}


@pytest.mark.parametrize("page", [7, 2000])
def test_filters_order_and_limits_agree_with_memory(
    store: Store, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "PAGE", page)
    records = mixed(240, seed=1)
    store.add_feedback(records)
    ordered = sorted(records, key=lambda f: (f.created_at, f.id))
    draw = random.Random(2)
    questions = [(), *((name,) for name in FILTERS)]
    questions += [tuple(draw.sample(sorted(FILTERS), draw.choice([2, 3]))) for _ in range(25)]
    asked_something = 0
    for names in questions:
        wanted = {name: FILTERS[name][0] for name in names}
        expected = [f for f in ordered if all(FILTERS[name][1](f) for name in names)]
        asked_something += bool(expected)
        assert list(store.feedback(**wanted)) == expected, names  # type: ignore[arg-type]
        assert store.count_feedback(**wanted) == len(expected), names
        for limit in (0, 1, 7, 8):
            assert list(store.feedback(**wanted, limit=limit)) == expected[:limit]  # type: ignore[arg-type]
    assert asked_something > 20


def test_after_cursor_gives_what_came_later(store: Store) -> None:
    store.add_feedback(votes(5, start=100))
    seen = max(change.cursor for change in store.changes())
    late = list(votes(3))
    store.add_feedback(late)
    assert list(store.feedback(after_cursor=seen)) == late
    assert store.count_feedback(after_cursor=seen) == 3


def test_superseded_and_withdrawn(store: Store) -> None:
    first, second, third = (vote(n)[0] for n in range(3))
    better = vote(7, supersedes=first.id)[0]
    store.add_feedback([first, second, third, better])
    store.withdraw(second.id, by="ada", reason="pressed the wrong key")
    store.withdraw(second.id, by="ada")
    assert list(store.feedback()) == [third, better]
    assert [f.id for f in store.feedback(status="superseded")] == [first.id]
    assert [f.id for f in store.feedback(status="withdrawn")] == [second.id]
    assert [f.status for f in store.feedback(status=None)] == ["superseded", "withdrawn", "live", "live"]
    assert store.feedback_record(second.id).status == "withdrawn"
    assert store.count_feedback() == 2
    # Withdrawing what was superseded: withdrawn wins, in the filter too.
    store.withdraw(first.id, by="ada")
    assert store.feedback_record(first.id).status == "withdrawn"
    assert store.count_feedback(status="superseded") == 0
    # Nothing was edited: the record as it was given is still what an import finds.
    assert store.add_feedback([first, second]) == Added(existing=2)
    with pytest.raises(BadInputError, match="no feedback"):
        store.withdraw("00000000-0000-7000-8000-000000000000", by="ada")


def test_a_correction_may_arrive_before_what_it_corrects(store: Store) -> None:
    first = vote(1)[0]
    store.add_feedback([vote(2, supersedes=first.id)[0]])
    store.add_feedback([first])
    assert store.feedback_record(first.id).status == "superseded"
    assert store.count_feedback() == 1


def test_status_travels_with_an_export(store: Store) -> None:
    first, second = vote(1)[0], vote(2)[0]
    withdrawn = first.model_copy(update={"status": "withdrawn"})
    store.add_feedback([withdrawn, second])
    assert list(store.feedback()) == [second]
    assert store.feedback_record(first.id) == withdrawn
    # The same record with another status is the same record, and the news is taken in.
    assert store.add_feedback([second.model_copy(update={"status": "superseded"})]) == Added(existing=1)
    assert store.count_feedback() == 0


def test_unknown_kinds_are_kept(store: Store) -> None:
    known = vote(1)[0].to_json()
    known.update(kind="telepathy", payload={"kind": "telepathy", "strength": 1.50, "who": None})
    record = Feedback.from_json(known)
    store.add_feedback([record])
    (back,) = store.feedback(kind="telepathy")
    assert back.to_json() == record.to_json()
    assert store.add_feedback([back]) == Added(existing=1)


def test_a_stream_ignores_what_is_added_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "PAGE", 4)
    store.add_feedback(votes(10))
    seen = []
    for number, record in enumerate(store.feedback()):
        seen.append(record)
        store.add_feedback([vote(1000 + number)[0]])  # would be next in time order, without end
    assert seen == sorted(seen, key=lambda f: f.created_at)
    assert len(seen) == 10
    assert store.count_feedback() == 20


def test_a_stream_may_be_abandoned(store: Store) -> None:
    store.add_feedback(votes(10))
    stream = store.feedback()
    next(stream)
    store.add_feedback(votes(10, start=50))
    assert store.count_feedback() == 20


def test_streaming_memory_is_flat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "PAGE", 200)
    monkeypatch.setattr("corrigible.store.transaction._BATCH", 200)
    example = vote(1)[0]

    def many(n: int) -> Iterator[Feedback]:
        for number in range(n):
            name = f"00000000-0000-7000-8000-{number:012x}"
            yield example.model_copy(update={"id": name, "judgement_id": name, "rationale": "x" * 2000})

    store.add_feedback(many(400))  # warm every cache
    tracemalloc.start()
    try:
        store.add_feedback(many(4000))
        adding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert sum(1 for _ in store.feedback()) == 4000
        streaming = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All of it at once would be more than 4000 · 2 kB = 8 MB.
    assert adding < 5e6
    assert streaming < 5e6


def test_episodes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "PAGE", 3)
    runs = [episode(n, policy="v1" if n % 3 else None) for n in range(20)]
    store.add_episodes(reversed(runs))
    assert list(store.episodes()) == runs
    assert list(store.episodes(task="task-1", policy="v1")) == [runs[n] for n in (1, 5, 7, 11, 13, 17, 19)]
    assert list(store.episodes(since=T0 + 4, until=T0 + 8)) == runs[4:8]
    assert list(store.episodes(limit=4)) == runs[:4]


def test_policies_and_their_history(store: Store) -> None:
    first = policy("demo", created_at=T0)
    second = policy("demo", created_at=T0 + 5, parent=first.id)
    other = policy("other", created_at=T0 + 1)
    store.add_policies([second, other, first])
    assert store.policies() == [first, other, second]
    assert store.policy(first.id) == first
    assert store.policy("demo") == second
    store.add_policy_event(second.id, "created")
    store.add_policy_event(other.id, "refused", {"win_rate": 0.48, "why": "interval reaches below ½"})
    store.add_policy_event(second.id, "promoted", {"win_rate": 0.61})
    assert [(e.policy_id, e.event) for e in store.policy_events()] == [
        (second.id, "created"),
        (other.id, "refused"),
        (second.id, "promoted"),
    ]
    assert [e.event for e in store.policy_events(second.id)] == ["created", "promoted"]
    assert store.policy_events(other.id)[0].detail == {"win_rate": 0.48, "why": "interval reaches below ½"}
    with pytest.raises(BadInputError, match="no policy version"):
        store.add_policy_event("nobody", "created")
    with pytest.raises(BadInputError, match="Unknown policy event"):
        store.add_policy_event(first.id, "celebrated")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="JSON"):
        store.add_policy_event(first.id, "created", {"when": object()})
    with pytest.raises(BadInputError, match="JSON"):
        store.add_policy_event(first.id, "created", {"score": float("nan")})


def test_a_transaction_is_all_or_nothing(store: Store) -> None:
    record, items = vote(1)
    with store.transaction() as transaction:
        transaction.add_items(items)
        transaction.add_feedback([record])
        transaction.set_import_state("file", {"line": 1})
    assert store.import_state("file") == {"line": 1}
    with pytest.raises(RuntimeError, match="stop"), store.transaction() as transaction:
        transaction.add_feedback([vote(2)[0]])
        transaction.add_episodes([episode(1)])
        transaction.set_import_state("file", {"line": 2})
        raise RuntimeError("stop")
    assert store.import_state("file") == {"line": 1}
    assert store.count_feedback() == 1
    assert list(store.episodes()) == []
    store.set_import_state("file", {"line": 3, "done": True})
    assert store.import_state("file") == {"line": 3, "done": True}
    assert store.import_state("other") is None


def test_a_transaction_inside_another_is_refused_at_once(store: Store) -> None:
    with pytest.raises(BadInputError, match="already inside a transaction"), store.transaction():
        store.add_feedback([vote(1)[0]])
    assert store.add_feedback([vote(1)[0]]) == Added(new=1)


def test_two_targets_with_the_same_content(store: Store) -> None:
    same = Item.of_text("the same words", "response")
    refs = [TargetRef.of(same, episode="a"), TargetRef.of(same, episode="b")]
    record = vote(1)[0].model_copy(update={"targets": tuple(refs)})
    store.add_feedback([record])
    assert list(store.feedback(target=same.sha256)) == [record]
    assert list(store.feedback(episode="b")) == [record]


def test_numbers_and_text_that_no_database_holds(store: Store) -> None:
    record = vote(1)[0]
    with pytest.raises(BadInputError, match="no time"):
        store.add_feedback([record.model_copy(update={"created_at": 1 << 63})])
    with pytest.raises(BadInputError, match="JSON"):
        store.add_feedback([record.model_copy(update={"rationale": "half of a pair: \ud83d"})])
    assert store.count_feedback() == 0


def test_a_tally_and_an_abbreviated_id(store: Store) -> None:
    first, items = vote(1, task_id="t")
    second, more = vote(2)
    store.add_feedback([first, second], [*items, *more])
    counts = store.tally(top=1)
    assert counts["totals"]["feedback"] == 2 and counts["kind"] == {"comparison": 2}
    assert counts["task"] == {"t": 1}
    assert store.find(first.id) == ("feedback", first.id)
    assert store.find(items[0].sha256[:20]) == ("item", items[0].sha256)
    with pytest.raises(BadInputError, match="is no id"):
        store.find("ada")
    with pytest.raises(BadInputError, match="holds nothing"):
        store.find("0" * 12)
    with pytest.raises(BadInputError, match="begins several ids"):
        store.find(first.id[:6])
