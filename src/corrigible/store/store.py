"""The :class:`Store`: one database of records and the blobs beside it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Engine, Executable, func, or_, select

from corrigible.errors import BadInputError, StorageError
from corrigible.records import Episode, Feedback, Item, PolicyVersion
from corrigible.store import lookup, schema
from corrigible.store.blobs import Blobs
from corrigible.store.database import connect, resolve
from corrigible.store.faults import shown, translated
from corrigible.store.queries import (
    Change,
    FeedbackFilter,
    StatusFilter,
    change_rows,
    check_limit,
    episode_rows,
    feedback_rows,
)
from corrigible.store.transaction import Added, PolicyEventKind, Transaction


@dataclass(frozen=True)
class PolicyEvent:
    """One entry of a policy version's history; ``at`` is µs UTC."""

    cursor: int
    policy_id: str
    event: PolicyEventKind
    detail: dict[str, Any]
    at: int


class Store:
    """Records, append-only, in SQLite or PostgreSQL, with content-addressed blobs beside them.

    Open one with :meth:`open`; it is a context manager. It may be shared by the threads of a process; other
    processes open their own. Every ``add_*`` is one transaction, takes an iterable of any length, and may be
    repeated: what is held already is counted, not stored again. For several kinds of records in one
    transaction use :meth:`transaction`.

    Every method raises ``StorageError`` when the database is locked for longer than the timeout, full,
    gone, damaged or out of reach, and then nothing of that call is stored.
    """

    def __init__(self, engine: Engine, blobs: Blobs | None) -> None:
        self._engine = engine
        self._blobs = blobs
        self._file = _identity(Path(engine.url.database or "")) if engine.dialect.name == "sqlite" else None
        self._writing = threading.local()

    @classmethod
    def open(
        cls,
        url_or_path: str | Path = "corrigible.db",
        *,
        create: bool = True,
        blobs: str | Path | None = None,
        timeout: float = 60.0,
    ) -> Self:
        """Open a store, making it or bringing its schema up to date first.

        Args:
            url_or_path: a file path, ``sqlite:///PATH`` or ``postgresql://USER@HOST/DATABASE``.
            create: whether to make a file that does not exist; a PostgreSQL database must exist.
            blobs: folder of the blobs. By default ``<file>.blobs`` beside an SQLite file, and for
                PostgreSQL the environment variable ``CORRIGIBLE_BLOBS``.
            timeout: seconds that a writer waits for another writer to finish.

        Raises:
            BadInputError: not a path or URL of a supported database.
            MissingError: the PostgreSQL driver is not installed.
            StorageError: missing, not a database or not ours, newer than this code, locked, out of reach.
        """
        url = resolve(url_or_path)
        engine = connect(url, create=create, timeout=timeout)
        folder = blobs or os.environ.get("CORRIGIBLE_BLOBS")
        if engine.dialect.name == "sqlite" and blobs is None:
            folder = f"{url.database}.blobs"
        return cls(engine, Blobs(folder) if folder else None)

    def close(self) -> None:
        """Give the connections back. Streams that are still being read end with an error."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({shown(self._engine.url)!r})"

    @property
    def url(self) -> str:
        """What to give :meth:`open`, in another process too, to reach this store (password included)."""
        return self._engine.url.render_as_string(hide_password=False)

    def holds(self, path: str | Path) -> bool:
        """Whether ``path`` is where this store lives: its SQLite file, the files beside it, or its blobs."""
        wanted = Path(path).resolve()
        own = []
        if self._file is not None:
            file = Path(self._engine.url.database or "").resolve()
            own = [file, *(file.with_name(file.name + end) for end in ("-wal", "-shm", "-journal"))]
        blobs = self._blobs.root.resolve() if self._blobs is not None else None
        return wanted in own or (blobs is not None and (wanted == blobs or blobs in wanted.parents))

    @property
    def blobs(self) -> Blobs:
        """The blobs beside the records.

        Raises:
            BadInputError: this store is on PostgreSQL and was not told where its blobs go.
        """
        if self._blobs is None:
            raise BadInputError(
                f"The store {shown(self._engine.url)} does not know where its blobs go.",
                advice="Pass blobs=FOLDER to Store.open, or set CORRIGIBLE_BLOBS.",
            )
        return self._blobs

    # -- adding ----------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Several additions that are stored together or not at all.

        Other writers wait while the block runs, so keep it to one batch. Reads through the store do not see
        what the block has added until it ends.

        Raises:
            BadInputError: opened inside another one of the same thread, which would wait for itself.
        """
        if getattr(self._writing, "now", False):
            raise BadInputError(
                "This thread is already inside a transaction of this store.",
                advice="Use that transaction's own add_ methods inside its block.",
            )
        self._writing.now = True
        try:
            with translated(self._engine.url):
                self._check_here()
                writer = self._engine.connect().execution_options(corrigible_writing=True)
                with writer as connection, connection.begin():
                    transaction = Transaction(connection)
                    yield transaction
                    transaction.finish()
                    # A file removed meanwhile would take the commit without a word, and lose it.
                    self._check_here()
        finally:
            self._writing.now = False

    def add_items(self, items: Iterable[Item]) -> Added:
        """See :meth:`Transaction.add_items`."""
        with self.transaction() as transaction:
            return transaction.add_items(items)

    def add_episodes(self, episodes: Iterable[Episode]) -> Added:
        """See :meth:`Transaction.add_episodes`."""
        with self.transaction() as transaction:
            return transaction.add_episodes(episodes)

    def add_feedback(self, records: Iterable[Feedback], items: Iterable[Item] = ()) -> Added:
        """See :meth:`Transaction.add_feedback`."""
        with self.transaction() as transaction:
            return transaction.add_feedback(records, items)

    def add_policies(self, policies: Iterable[PolicyVersion]) -> Added:
        """See :meth:`Transaction.add_policies`."""
        with self.transaction() as transaction:
            return transaction.add_policies(policies)

    def add_policy_event(
        self, policy_id: str, event: PolicyEventKind, detail: dict[str, Any] | None = None
    ) -> None:
        """See :meth:`Transaction.add_policy_event`."""
        with self.transaction() as transaction:
            transaction.add_policy_event(policy_id, event, detail)

    def add_lineage(self, policy_id: str, feedback_ids: Iterable[str]) -> Added:
        """As :meth:`Transaction.add_lineage`, in a transaction of its own."""
        with self.transaction() as tx:
            return tx.add_lineage(policy_id, feedback_ids)

    def withdraw(self, feedback_id: str, *, by: str, reason: str = "") -> None:
        """See :meth:`Transaction.withdraw`."""
        with self.transaction() as transaction:
            transaction.withdraw(feedback_id, by=by, reason=reason)

    def set_import_state(self, key: str, state: dict[str, Any]) -> None:
        """See :meth:`Transaction.set_import_state`."""
        with self.transaction() as transaction:
            transaction.set_import_state(key, state)

    # -- asking ----------------------------------------------------------------------------------------

    def item(self, sha256: str) -> Item:
        """The item with this content hash.

        Raises:
            BadInputError: the store holds no such item.
        """
        return Item.from_json(self._record(schema.item, schema.item.c.sha256 == sha256, f"item {sha256}"))

    def items(self, sha256s: Iterable[str]) -> dict[str, Item]:
        """The items with these content hashes; those that the store does not hold are left out."""
        wanted = list(dict.fromkeys(sha256s))
        found: dict[str, Item] = {}
        for start in range(0, len(wanted), 4000):
            page = schema.item.c.sha256.in_(wanted[start : start + 4000])
            rows = self._fetch(select(schema.item.c.sha256, schema.item.c.record).where(page))
            found.update((name, Item.from_json(text)) for name, text in rows)
        return found

    def episode(self, episode_id: str) -> Episode:
        """The episode with this id.

        Raises:
            BadInputError: the store holds no such episode.
        """
        return Episode.from_json(
            self._record(schema.episode, schema.episode.c.id == episode_id, f"episode {episode_id}")
        )

    def episodes(
        self,
        *,
        task: str | None = None,
        policy: str | None = None,
        since: int | None = None,
        until: int | None = None,
        limit: int | None = None,
    ) -> Iterator[Episode]:
        """Episodes in the order (created_at, id), streamed. ``policy`` is a policy version's id; ``since``
        (inclusive) and ``until`` (exclusive) are µs UTC."""
        check_limit(limit)
        rows = episode_rows(self._fetch, task=task, policy=policy, since=since, until=until, limit=limit)
        return (Episode.from_json(text) for text in rows)

    def feedback_record(self, feedback_id: str) -> Feedback:
        """The feedback with this id, whatever its status, which is the present one.

        Raises:
            BadInputError: the store holds no such record.
        """
        where = schema.feedback.c.id == feedback_id
        record = Feedback.from_json(self._record(schema.feedback, where, f"feedback {feedback_id}"))
        column = schema.feedback_status.c
        status = self._fetch(select(func.max(column.status)).where(column.feedback_id == feedback_id))[0][0]
        return record if status is None else record.model_copy(update={"status": status})

    def feedback(
        self,
        *,
        kind: str | None = None,
        annotator: str | None = None,
        policy: str | None = None,
        task: str | None = None,
        campaign: str | None = None,
        criterion: str | None = None,
        target: str | None = None,
        episode: str | None = None,
        since: int | None = None,
        until: int | None = None,
        status: StatusFilter | None = "live",
        after_cursor: int | None = None,
        limit: int | None = None,
    ) -> Iterator[Feedback]:
        """Feedback in the order (created_at, id), streamed in flat memory; see :class:`FeedbackFilter`.

        Records come with their present status. What is added after the call does not appear.

        Raises:
            BadInputError: an unknown status, a negative limit.
        """
        check_limit(limit)
        where = FeedbackFilter(
            kind=kind,
            annotator=annotator,
            policy=policy,
            task=task,
            campaign=campaign,
            criterion=criterion,
            target=target,
            episode=episode,
            since=since,
            until=until,
            status=status,
            after_cursor=after_cursor,
        )
        return self._feedback(where, limit)

    def _feedback(self, where: FeedbackFilter, limit: int | None) -> Iterator[Feedback]:
        for text, status in feedback_rows(self._fetch, where, limit):
            record = Feedback.from_json(text)
            yield record if status is None else record.model_copy(update={"status": status})

    def count_feedback(self, **filters: Any) -> int:
        """How many records :meth:`feedback` would give for the same filters (there is no ``limit``)."""
        try:
            where = FeedbackFilter(**filters)
        except TypeError as error:
            raise BadInputError(f"No such filter: {error}.") from error
        return int(self._fetch(where.select(func.count()))[0][0])

    def changes(self, after: int = 0, limit: int | None = None) -> Iterator[Change]:
        """What was added after a cursor, in the order it was committed; cursors rise, with gaps.

        A reader that keeps the last cursor it saw and asks again never misses a row and never sees one
        twice, however many writers there are: a row becomes visible only after every row with a lower
        cursor has.
        """
        check_limit(limit)
        return change_rows(self._fetch, after, limit)

    def tally(self, top: int = 15) -> dict[str, Any]:
        """How much there is: ``totals``, and judgements by kind, annotator, task, campaign (``top`` each)."""
        return lookup.tally(self._fetch, top)

    def find(self, name: str) -> tuple[str, str]:
        """Table (feedback, episode, policy, item) and full id of the one record that ``name`` begins.

        Raises:
            BadInputError: ``name`` is no beginning of an id, or of none, or of several.
        """
        return lookup.find(self._fetch, name)

    def policies(self) -> list[PolicyVersion]:
        """Every policy version, in the order (created_at, id)."""
        columns = schema.policy.c
        rows = self._fetch(select(columns.record).order_by(columns.created_at, columns.id))
        return [PolicyVersion.from_json(row[0]) for row in rows]

    def policy(self, id_or_name: str) -> PolicyVersion:
        """The policy version with this id, or else the newest one of this name.

        Raises:
            BadInputError: the store holds neither.
        """
        columns = schema.policy.c
        rows = self._fetch(
            select(columns.record)
            .where(or_(columns.id == id_or_name, columns.name == id_or_name))
            .order_by((columns.id == id_or_name).desc(), columns.created_at.desc(), columns.id.desc())
            .limit(1)
        )
        if not rows:
            raise BadInputError(
                f"The store holds no policy {id_or_name!r}.", advice="`corrigible policies` lists them."
            )
        return PolicyVersion.from_json(rows[0][0])

    def policy_events(self, policy_id: str | None = None) -> list[PolicyEvent]:
        """What happened to one policy version, or to all of them, oldest first."""
        columns = schema.policy_event.c
        statement = select(
            columns.cursor, columns.policy_id, columns.event, columns.detail, columns.added_at
        ).order_by(columns.cursor)
        if policy_id is not None:
            statement = statement.where(columns.policy_id == policy_id)
        return [
            PolicyEvent(cursor, policy, event, json.loads(detail), at)
            for cursor, policy, event, detail, at in self._fetch(statement)
        ]

    def lineage(self, policy_id: str) -> list[str]:
        """Ids of the judgements that a policy version was trained on, sorted; empty when none are known."""
        columns = schema.lineage.c
        statement = select(columns.feedback_id).where(columns.policy_id == policy_id)
        return [row[0] for row in self._fetch(statement.order_by(columns.feedback_id))]

    def shaped(self, feedback_id: str) -> list[str]:
        """Ids of the policy versions that were trained on a judgement."""
        columns = schema.lineage.c
        statement = select(columns.policy_id).where(columns.feedback_id == feedback_id)
        return [row[0] for row in self._fetch(statement.order_by(columns.policy_id))]

    def import_state(self, key: str) -> dict[str, Any] | None:
        """What :meth:`set_import_state` last stored under ``key``."""
        columns = schema.import_progress.c
        rows = self._fetch(select(columns.state).where(columns.key == key))
        state: dict[str, Any] | None = json.loads(rows[0][0]) if rows else None
        return state

    # -- within ----------------------------------------------------------------------------------------

    def _record(self, table: Any, where: Any, what: str) -> str:
        rows = self._fetch(select(table.c.record).where(where))
        if not rows:
            raise BadInputError(
                f"The store holds no {what}.", advice="Check the id, and which store is open."
            )
        text: str = rows[0][0]
        return text

    def _fetch(self, statement: Executable) -> Sequence[Any]:
        with translated(self._engine.url):
            self._check_here()
            with self._engine.connect() as connection:
                return connection.execute(statement).all()

    def _check_here(self) -> None:
        """An unlinked SQLite file goes on working for who has it open, and takes everything with it."""
        if self._file is not None and _identity(Path(self._engine.url.database or "")) != self._file:
            raise StorageError(
                f"The store {shown(self._engine.url)} is gone: its file was removed, moved or replaced.",
                advice="Put it back (with its -wal file), then open the store again.",
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
