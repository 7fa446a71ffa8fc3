"""How fast the store takes in, filters and streams feedback, beside plain ``sqlite3.executemany``.

The plain side writes the very same rows, already serialised, with the same durability (WAL,
synchronous=FULL, one transaction): once into one table with a primary key and nothing else, once into the
store's own tables with all their indices. The store's side starts from records: it serialises them, looks up
whether it holds them, and fills record, target and policy tables, indices and change feed. The time it takes
to make the records up is left out.

    python -m bench.store --n 1000000
    python -m bench.store --n 100000 --url postgresql://me@localhost/bench
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from corrigible.records import Annotator, Feedback, Item, PolicyRef, TargetRef, comparison, new_id
from corrigible.store import Store

ANNOTATORS = 50
TASKS = 1000
POLICIES = 4
BATCH = 4000
PROMPT = "Explain to a newcomer why the sky is blue, in at most three sentences."
FIRST_MOMENT = 1_700_000_000_000_000


class PeakMemory:
    """The largest resident set of this process while the block ran, sampled 20 times a second, in MB."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.peak = self._now()

    def _now(self) -> float:
        return float(self._process.memory_info().rss) / 1e6

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


class Made:
    """Feedback made up on the way, with the time that took, so that it can be left out."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Feedback]:
        annotators = [Annotator(pseudonym=f"annotator-{i}", type="simulated") for i in range(ANNOTATORS)]
        template, _items = comparison(PROMPT, "Because of air.", "It is paint.", annotator=annotators[0])
        responses = [Item.of_text(f"Answer {i}", type="response").sha256 for i in range(20_000)]
        policies = [(PolicyRef(snapshot=f"policy-{i}"),) * 2 for i in range(POLICIES)]
        for start in range(0, self.n, BATCH):
            clock = time.perf_counter()
            records = []
            for i in range(start, min(start + BATCH, self.n)):
                name = new_id()
                shas = sorted((responses[i % 20_000], responses[(i * 7 + 1) % 20_000]))
                records.append(
                    template.model_copy(
                        update={
                            "id": name,
                            "judgement_id": name,
                            "task_id": f"task-{i % TASKS}",
                            "annotator": annotators[i % ANNOTATORS],
                            "policy": policies[i % POLICIES],
                            "targets": tuple(
                                TargetRef.model_construct(sha256=sha, type="response") for sha in shas
                            ),
                            "created_at": FIRST_MOMENT + i,
                        }
                    )
                )
            self.seconds += time.perf_counter() - clock
            yield from records


def run(n: int = 1_000_000, url: str | None = None) -> dict[str, Any]:
    """Measure; rates are records per second, ``slower_than_…`` are ratios of seconds.

    ``url``: an empty PostgreSQL database to measure instead of an SQLite file (the plain side stays
    ``sqlite3``).
    """
    with (
        tempfile.TemporaryDirectory(prefix="corrigible-bench-") as folder,
        PeakMemory() as memory,
        Store.open(url or Path(folder, "corrigible.db"), blobs=Path(folder, "blobs")) as store,
    ):
        made = Made(n)
        clock = time.perf_counter()
        added = store.add_feedback(made)
        add_seconds = time.perf_counter() - clock - made.seconds
        assert added.new == n

        clock = time.perf_counter()
        again = store.add_feedback(store.feedback(limit=min(n, 20_000)))
        again_seconds = time.perf_counter() - clock
        assert again.new == 0

        clock = time.perf_counter()
        found = sum(1 for _ in store.feedback(annotator="annotator-7"))
        found += sum(1 for _ in store.feedback(policy="policy-1", until=FIRST_MOMENT + n // 10))
        found += sum(1 for _ in store.feedback(task="task-5"))
        filter_seconds = time.perf_counter() - clock

        clock = time.perf_counter()
        counted = store.count_feedback(kind="comparison")
        count_seconds = time.perf_counter() - clock

        clock = time.perf_counter()
        streamed = sum(1 for _ in store.feedback())
        stream_seconds = time.perf_counter() - clock

        clock = time.perf_counter()
        changed = sum(1 for _ in store.changes())
        feed_seconds = time.perf_counter() - clock
        assert streamed == counted == changed == n
        bare_seconds, indexed_seconds = _plain_sqlite3(store, Path(folder))
    return {
        "records": n,
        "database": "postgresql" if url else "sqlite",
        "add_per_second": round(n / add_seconds),
        "add_again_per_second": round(again.existing / again_seconds),
        "filter_per_second": round(found / filter_seconds),
        "filtered": found,
        "count_seconds": round(count_seconds, 3),
        "stream_per_second": round(n / stream_seconds),
        "feed_per_second": round(n / feed_seconds),
        "sqlite3_executemany_per_second": round(n / bare_seconds),
        "slower_than_sqlite3": round(add_seconds / bare_seconds, 2),
        "sqlite3_same_tables_per_second": round(n / indexed_seconds),
        "slower_than_sqlite3_same_tables": round(add_seconds / indexed_seconds, 2),
        "peak_rss_mb": round(memory.peak),
        "peak_rss_growth_mb": round(memory.peak - memory.before),
    }


def _plain_sqlite3(store: Store, folder: Path) -> tuple[float, float]:
    """Seconds that sqlite3 alone takes to store the same rows: in one bare table, and in the store's tables
    with all their indices."""
    bare = sqlite3.connect(folder / "bare.db", isolation_level=None)
    bare.execute("PRAGMA journal_mode = WAL")
    bare.execute(
        "CREATE TABLE feedback (id TEXT PRIMARY KEY, kind TEXT, annotator TEXT, task TEXT, "
        "created_at INTEGER, record TEXT)"
    )
    Store.open(folder / "indexed.db").close()
    indexed = sqlite3.connect(folder / "indexed.db", isolation_level=None)
    for connection in (bare, indexed):
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -65536")
        connection.execute("BEGIN IMMEDIATE")
    seconds = [0.0, 0.0]
    records = enumerate(store.feedback(), start=1)
    while batch := list(islice(records, BATCH)):
        rows = [
            (i, 0, f.id, f.kind, f.annotator.pseudonym, f.task_id, f.created_at, f.to_json_text())
            for i, f in batch
        ]
        bare_rows = [row[2:] for row in rows]
        targets = [(t.sha256, i, place, None) for i, f in batch for place, t in enumerate(f.targets)]
        policies = [
            (f.policy[0].snapshot, f.created_at, f.id, i) for i, f in batch if f.policy and f.policy[0]
        ]
        clock = time.perf_counter()
        bare.executemany("INSERT INTO feedback VALUES (?, ?, ?, ?, ?, ?)", bare_rows)
        seconds[0] += time.perf_counter() - clock
        clock = time.perf_counter()
        indexed.executemany(
            "INSERT INTO feedback (cursor, added_at, id, kind, annotator, task, created_at, record) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        indexed.executemany("INSERT INTO feedback_target VALUES (?, ?, ?, ?)", targets)
        indexed.executemany("INSERT INTO feedback_policy VALUES (?, ?, ?, ?)", policies)
        seconds[1] += time.perf_counter() - clock
    for which, connection in enumerate((bare, indexed)):
        clock = time.perf_counter()
        connection.execute("COMMIT")
        seconds[which] += time.perf_counter() - clock
        connection.close()
    return seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1_000_000, help="records (default: 1,000,000)")
    parser.add_argument("--url", help="an empty PostgreSQL database to measure instead of SQLite")
    options = parser.parse_args()
    print(json.dumps(run(options.n, options.url), indent=2))


if __name__ == "__main__":
    main()
