"""The write path: everything that is ever added goes through one :class:`Transaction`.

Writers are serialised: a transaction holds the feed's only row (and on SQLite the write lock) from its
first statement until it commits. Three things follow, on both databases. Cursors are given out in commit
order, so a reader of the feed that has seen cursor 11 will never be surprised by a 10 (a PostgreSQL
sequence would not promise that). Looking up which ids exist and then inserting the others is not a race.
And bulk rows can go in by the fastest road there is, ``executemany`` or ``COPY``, with no conflict clause.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

from sqlalchemy import ARRAY, Column, Connection, Table, Text, any_, cast, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from corrigible.errors import BadInputError
from corrigible.records import Episode, Feedback, Item, PolicyVersion, Record, TrainedOn, now_us
from corrigible.store import schema

Row = tuple[Any, ...]
R = TypeVar("R", bound=Record)
PolicyEventKind = Literal["created", "promoted", "refused", "retired"]
POLICY_EVENTS: tuple[PolicyEventKind, ...] = ("created", "promoted", "refused", "retired")

# Large enough that a statement's fixed cost vanishes, small enough to stay far below the parameter
# limits (32 766 on SQLite, 65 535 on PostgreSQL) and to keep memory flat.
_BATCH = 4000
_LATEST = (1 << 63) - 1


@dataclass(frozen=True)
class Added:
    """How many records of one call were ``new``, and how many the store held already."""

    new: int = 0
    existing: int = 0

    def __add__(self, other: Added) -> Added:
        return Added(self.new + other.new, self.existing + other.existing)


class Transaction:
    """All or nothing: what is added here is stored when the ``with`` block ends, or not at all.

    Made by :meth:`corrigible.store.Store.transaction`. Every ``add_*`` takes an iterable of any length
    and reads it in batches, so memory stays flat. Adding a record again is counted as existing; adding a
    different record under an id that is taken raises, and undoes the whole transaction.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._at = now_us()
        lock = select(schema.feed.c.cursor).with_for_update()
        self._first = self._cursor = int(connection.execute(lock).scalar_one())

    def add_items(self, items: Iterable[Item]) -> Added:
        """Store content. The first description of the same bytes is kept (a text may be both a response and
        an edit's outcome).

        Raises:
            BadInputError: not items, or the same bytes were stored under another media type.
        """

        def row(cursor: int, item: Item, text: str) -> Row:
            return (cursor, self._at, item.sha256, text)

        return self._add(Item, items, schema.item.c.sha256, lambda i: i.sha256, row, _same_item)

    def add_episodes(self, episodes: Iterable[Episode]) -> Added:
        """Store episodes.

        Raises:
            BadInputError: not episodes, or an id that already holds a different episode.
        """

        def row(cursor: int, e: Episode, text: str) -> Row:
            return (cursor, self._at, e.id, e.task, e.policy, e.created_at, text)

        return self._add(Episode, episodes, schema.episode.c.id, lambda e: e.id, row, _same)

    def add_policies(self, policies: Iterable[PolicyVersion]) -> Added:
        """Store policy versions.

        Raises:
            BadInputError: not policy versions, or an id that already holds a different one.
        """

        def row(cursor: int, p: PolicyVersion, text: str) -> Row:
            return (cursor, self._at, p.id, p.name, p.created_at, text)

        return self._add(PolicyVersion, policies, schema.policy.c.id, lambda p: p.id, row, _same)

    def add_feedback(self, records: Iterable[Feedback], items: Iterable[Item] = ()) -> Added:
        """Store judgements, and first the ``items`` they are about (not counted in the result).

        A record that supersedes another marks that one superseded; a record that arrives with status
        superseded or withdrawn (from another store's export) is marked so here, even when the record
        itself is held already. Status is no part of a record's identity.

        Raises:
            BadInputError: not feedback, or an id that already holds a different record.
        """
        self.add_items(items)
        targets: list[Row] = []
        policies: list[Row] = []
        statuses: list[tuple[str, str, str | None, str | None]] = []

        def row(cursor: int, f: Feedback, text: str) -> Row:
            targets.extend((t.sha256, cursor, i, t.episode) for i, t in enumerate(f.targets))
            if f.policy is not None:
                snapshots = {ref.snapshot for ref in f.policy if ref is not None}
                policies.extend((snapshot, f.created_at, f.id, cursor) for snapshot in sorted(snapshots))
            if f.supersedes is not None:
                statuses.append((f.supersedes, "superseded", f.id, None))
            criterion = getattr(f.payload, "criterion", None)
            annotator = f.annotator.pseudonym
            return (
                cursor,
                self._at,
                f.id,
                f.kind,
                annotator,
                f.task_id,
                f.campaign_id,
                criterion,
                f.created_at,
                text,
            )

        def marked(batch: Sequence[Feedback]) -> None:
            self._insert(schema.feedback_target, targets)
            self._insert(schema.feedback_policy, policies)
            statuses.extend((f.id, f.status, None, None) for f in batch if f.status != "live")
            for status in statuses:
                self._mark(*status)
            targets.clear()
            policies.clear()
            statuses.clear()

        return self._add(
            Feedback, records, schema.feedback.c.id, lambda f: f.id, row, _same_feedback, after_batch=marked
        )

    def withdraw(self, feedback_id: str, *, by: str, reason: str = "") -> None:
        """Take a judgement out of the live ones; the record stays. Doing it again changes nothing.

        Raises:
            BadInputError: there is no such record.
        """
        known = select(schema.feedback.c.cursor).where(schema.feedback.c.id == feedback_id)
        if self._connection.execute(known).first() is None:
            raise BadInputError(f"There is no feedback {feedback_id} to withdraw.", advice="Check the id.")
        self._mark(feedback_id, "withdrawn", by, reason)

    def add_policy_event(
        self, policy_id: str, event: PolicyEventKind, detail: dict[str, Any] | None = None
    ) -> None:
        """Append to a policy version's history.

        Raises:
            BadInputError: an unknown policy version or event, or a detail that is not JSON.
        """
        if event not in POLICY_EVENTS:
            raise BadInputError(
                f"Unknown policy event {event!r}.", advice=f"One of: {', '.join(POLICY_EVENTS)}."
            )
        known = select(schema.policy.c.cursor).where(schema.policy.c.id == policy_id)
        if self._connection.execute(known).first() is None:
            raise BadInputError(
                f"There is no policy version {policy_id}.", advice="Add it with add_policies."
            )
        text = _json_text(detail or {}, "the event's detail")
        self._insert(schema.policy_event, [(self._next(), self._at, policy_id, event, text)])

    def add_lineage(self, policy_id: str, feedback_ids: Iterable[str]) -> Added:
        """Write down which judgements a policy version was trained on; once, and all of them.

        Raises:
            BadInputError: the version is not in the store or says that it was trained on other records,
                or another list was written for it before.
        """
        known = select(schema.policy.c.record).where(schema.policy.c.id == policy_id)
        text = self._connection.execute(known).scalar()
        if text is None:
            raise BadInputError(f"There is no policy version {policy_id}.", advice="Add it first.")
        stated = PolicyVersion.from_json(text).trained_on
        ids = sorted(set(feedback_ids))
        found = TrainedOn.of(ids)
        if stated is None or stated.feedback_digest != found.feedback_digest:
            raise BadInputError(
                f"The lineage of {policy_id} has {found.feedback} records; the version itself states "
                f"{'none' if stated is None else f'{stated.feedback}, or others'}.",
                advice="Pass the ids that trained_on was made from.",
            )
        held = select(schema.lineage.c.feedback_id).where(schema.lineage.c.policy_id == policy_id)
        if self._connection.execute(held.limit(1)).first() is not None:
            return Added(0, len(ids))
        for begin in range(0, len(ids), _BATCH):
            self._insert(schema.lineage, [(policy_id, one) for one in ids[begin : begin + _BATCH]])
        return Added(len(ids), 0)

    def set_import_state(self, key: str, state: dict[str, Any]) -> None:
        """Remember how far an import has come, together with what this transaction adds.

        Raises:
            BadInputError: a state that is not JSON.
        """
        table = schema.import_progress
        values = {"updated_at": self._at, "state": _json_text(state, "the import state")}
        changed = self._connection.execute(update(table).where(table.c.key == key).values(values))
        if changed.rowcount == 0:
            self._connection.execute(insert(table).values(key=key, **values))

    def finish(self) -> None:
        """Publish the cursors given out; the caller commits."""
        if self._cursor != self._first:
            self._connection.execute(update(schema.feed).values(cursor=self._cursor))

    def _next(self) -> int:
        self._cursor += 1
        return self._cursor

    def _add(
        self,
        kind: type[R],
        records: Iterable[R],
        identity: Column[str],
        key: Callable[[R], str],
        row: Callable[[int, R, str], Row],
        same: Callable[[R, str, str], bool],
        after_batch: Callable[[Sequence[R]], None] = lambda batch: None,
    ) -> Added:
        """``row`` makes the table's row from (cursor, record, text); ``same`` says whether a record, given
        with its text, equals the text stored under its key."""
        table = identity.table
        assert isinstance(table, Table)
        added = Added()
        for batch in _batches(_checked(kind, records)):
            held = self._held(identity, [key(record) for record in batch])
            rows: list[Row] = []
            for record in batch:
                name = key(record)
                text = _text(record, name)
                stored = held.get(name)
                if stored is None:
                    held[name] = text
                    rows.append(row(self._next(), record, text))
                elif not same(record, text, stored):
                    raise BadInputError(
                        f"{identity.name} {name} already holds a different {table.name} record.",
                        advice="Records are never edited: give the new one its own id (a corrected judgement "
                        "names the old one in `supersedes`). Nothing of this call was stored.",
                    )
            self._insert(table, rows)
            after_batch(batch)
            added += Added(len(rows), len(batch) - len(rows))
        return added

    def _held(self, identity: Column[str], keys: list[str]) -> dict[str, str]:
        if self._connection.dialect.name == "postgresql":
            # One array instead of thousands of parameters, each of which costs the driver and the planner.
            named = identity == any_(cast(keys, ARRAY(Text)))
        else:
            named = identity.in_(keys)
        statement = select(identity, identity.table.c.record).where(named)
        return {row[0]: row[1] for row in self._connection.execute(statement)}

    def _insert(self, table: Table, rows: Sequence[Row]) -> None:
        if not rows:
            return
        columns = ", ".join(f'"{column.name}"' for column in table.columns)
        if self._connection.dialect.name == "sqlite":
            places = ", ".join("?" * len(table.columns))
            self._connection.exec_driver_sql(
                f'INSERT INTO "{table.name}" ({columns}) VALUES ({places})', list(rows)
            )
            return
        statement = f'COPY "{table.name}" ({columns}) FROM STDIN'
        driver: Any = self._connection.connection.driver_connection
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)

    def _mark(self, feedback_id: str, status: str, by: str | None, reason: str | None) -> None:
        dialect = sqlite if self._connection.dialect.name == "sqlite" else postgresql
        statement = dialect.insert(schema.feedback_status).values(
            cursor=self._next(),
            added_at=self._at,
            feedback_id=feedback_id,
            status=status,
            by=by,
            reason=reason,
        )
        self._connection.execute(statement.on_conflict_do_nothing(index_elements=["feedback_id", "status"]))


def _checked(kind: type[R], records: Iterable[R]) -> Iterator[R]:
    for position, record in enumerate(records):
        if not isinstance(record, kind):
            raise BadInputError(
                f"Expected {kind.__name__} records, got {type(record).__name__} at position {position}.",
                advice="Pass an iterable of records, such as a list.",
            )
        yield record


def _batches(records: Iterator[R]) -> Iterator[list[R]]:
    while batch := list(islice(records, _BATCH)):
        yield batch


def _text(record: Record, name: str) -> str:
    if getattr(record, "created_at", 0) > _LATEST:
        raise BadInputError(f"created_at of {name} is no time.", advice="It is in microseconds, UTC.")
    try:
        return record.to_json_text()
    except ValueError as error:
        raise BadInputError(
            f"{name} cannot be written as JSON: {error}.",
            advice="Lone surrogates come from decoding with the wrong encoding; decode the source again.",
        ) from error


def _json_text(value: dict[str, Any], what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise BadInputError(f"Cannot store {what} as JSON: {error}.") from error


# The text is compared first, because it nearly always decides. When it differs the records are compared:
# a later Corrigible may write the same record with a new field at its default.


def _same(record: Record, text: str, stored: str) -> bool:
    return text == stored or type(record).from_json(stored) == record


def _same_feedback(record: Feedback, text: str, stored: str) -> bool:
    if text == stored:
        return True
    live = {"status": "live"}
    return Feedback.from_json(stored).model_copy(update=live) == record.model_copy(update=live)


def _same_item(item: Item, text: str, stored: str) -> bool:
    return text == stored or Item.from_json(stored).media_type == item.media_type
