"""The change feed, with several processes writing at once."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
from store_examples import episode, policy, vote, votes, write_batches

import corrigible.store.queries as queries
from corrigible.store import Store

SPAWN = multiprocessing.get_context("spawn")


def test_everything_that_is_added_is_in_the_feed_in_order(store: Store) -> None:
    record, items = vote(1)
    run, version = episode(1), policy("demo")
    store.add_policies([version])
    store.add_episodes([run])
    store.add_feedback([record], items)
    store.withdraw(record.id, by="ada")
    store.add_policy_event(version.id, "created")
    changes = list(store.changes())
    assert [(c.table, c.id) for c in changes] == [
        ("policy", version.id),
        ("episode", run.id),
        *(("item", item.sha256) for item in items),
        ("feedback", record.id),
        ("feedback_status", record.id),
        ("policy_event", version.id),
    ]
    cursors = [c.cursor for c in changes]
    assert cursors == sorted(set(cursors))
    assert abs(changes[0].at / 1e6 - time.time()) < 60


def test_pages_limits_and_going_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "PAGE", 4)
    for number in range(5):
        store.add_episodes([episode(number)])
        store.add_feedback(votes(2, start=10 * number))
    everything = list(store.changes())
    assert len(everything) == 15
    assert list(store.changes(limit=6)) == everything[:6]
    assert list(store.changes(limit=0)) == []
    assert list(store.changes(after=everything[5].cursor)) == everything[6:]
    assert list(store.changes(after=everything[-1].cursor)) == []
    assert list(store.changes(after=10**12)) == []


def test_a_reader_skips_nothing_while_processes_write(url: str, tmp_path: Path) -> None:
    writers, batches, size = 3, 20, 5
    Store.open(url).close()
    processes = [
        SPAWN.Process(target=write_batches, args=(url, tmp_path, w, batches, size)) for w in range(writers)
    ]
    with Store.open(url) as store:
        for process in processes:
            process.start()
        seen, cursor, polls_with_news = [], 0, 0
        deadline = time.monotonic() + 120
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            news = list(store.changes(after=cursor))
            polls_with_news += bool(news)
            seen.extend(news)
            cursor = news[-1].cursor if news else cursor
            time.sleep(0.005)
        for process in processes:
            process.join(60)
        seen.extend(store.changes(after=cursor))
        # Not one writer failed, with "database is locked" or otherwise.
        assert [process.exitcode for process in processes] == [0] * writers
        assert seen == list(store.changes())
        assert len({change.id for change in seen}) == len(seen) == writers * batches * size
        assert polls_with_news > 5  # else the reader was never there while it mattered


def test_records_of_two_bulk_writers_at_once_are_all_there(url: str, tmp_path: Path) -> None:
    Store.open(url).close()
    processes = [SPAWN.Process(target=write_batches, args=(url, tmp_path, w, 1, 4500)) for w in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    with Store.open(url) as store:
        assert store.count_feedback() == 9000
