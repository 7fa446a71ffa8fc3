"""Questions to the store: which feedback, in which order, a page at a time.

Records stream in the order ``(created_at, id)``, which two stores with the same records agree on whatever
the order they arrived in. A stream is read in pages by key, each page in its own short transaction: memory
is flat, nothing stays open when the reader stops half way, and the reader may write to the store in between.
What is added after the stream was started does not appear in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Executable, Select, func, literal, select, tuple_, union_all

from corrigible.errors import BadInputError
from corrigible.store import schema
from corrigible.store.schema import episode, feedback, feedback_policy, feedback_status, feedback_target

StatusFilter = Literal["live", "superseded", "withdrawn"]
Fetch = Callable[[Executable], Sequence[Any]]
PAGE = 2000


@dataclass(frozen=True)
class Change:
    """One row of the change feed: ``table`` and ``id`` name the record, ``at`` (µs UTC) is when it was added.

    ``id`` is the record's id (an item's SHA-256; for a status or policy event, the id of the record it is
    about)."""

    cursor: int
    table: str
    id: str
    at: int


@dataclass(frozen=True, kw_only=True)
class FeedbackFilter:
    """Which feedback. Every condition that is given must hold.

    ``since`` (inclusive) and ``until`` (exclusive) are µs UTC of ``created_at``; ``policy`` is the id of a
    policy version that produced one of the targets; ``target`` the SHA-256 of one of them, ``episode`` the
    episode one of them was said in; ``status`` None means whatever its status; ``after_cursor`` asks for
    what was added to this store after a position in its change feed.
    """

    kind: str | None = None
    annotator: str | None = None
    policy: str | None = None
    task: str | None = None
    campaign: str | None = None
    criterion: str | None = None
    target: str | None = None
    episode: str | None = None
    since: int | None = None
    until: int | None = None
    status: StatusFilter | None = "live"
    after_cursor: int | None = None

    def __post_init__(self) -> None:
        if self.status is not None and self.status not in get_args(StatusFilter):
            raise BadInputError(
                f"Unknown status {self.status!r}.",
                advice=f"One of {get_args(StatusFilter)}, or None for all.",
            )

    def conditions(self) -> list[ColumnElement[bool]]:
        """The WHERE clause on ``feedback``, without ``policy``, which decides the join."""
        columns = feedback.c
        wanted = {
            columns.kind: self.kind,
            columns.annotator: self.annotator,
            columns.task: self.task,
            columns.campaign: self.campaign,
            columns.criterion: self.criterion,
        }
        found: list[ColumnElement[bool]] = [c == value for c, value in wanted.items() if value is not None]
        if self.since is not None:
            found.append(self._created_at >= self.since)
        if self.until is not None:
            found.append(self._created_at < self.until)
        if self.after_cursor is not None:
            found.append(columns.cursor > self.after_cursor)
        for column, value in (
            (feedback_target.c.sha256, self.target),
            (feedback_target.c.episode, self.episode),
        ):
            if value is not None:
                found.append(columns.cursor.in_(select(feedback_target.c.feedback).where(column == value)))
        if self.policy is not None:
            found.append(feedback_policy.c.policy == self.policy)
        if self.status == "live":
            marked = select(literal(1)).where(feedback_status.c.feedback_id == columns.id)
            found.append(~marked.exists())
        elif self.status is not None:
            found.append(_derived_status() == self.status)
        return found

    @property
    def order(self) -> tuple[ColumnElement[int], ColumnElement[str]]:
        """The columns that order the stream: by policy they are read from the index of that table."""
        return (self._created_at, feedback_policy.c.id if self.policy is not None else feedback.c.id)

    @property
    def _created_at(self) -> ColumnElement[int]:
        return feedback_policy.c.created_at if self.policy is not None else feedback.c.created_at

    def select(self, *columns: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
        """The columns of the matching rows, in no order."""
        statement = select(*columns).where(*self.conditions())
        if self.policy is None:
            return statement.select_from(feedback)
        return statement.select_from(
            feedback_policy.join(feedback, feedback.c.cursor == feedback_policy.c.feedback)
        )


def _derived_status() -> ColumnElement[str | None]:
    # "withdrawn" sorts after "superseded", and wins when a record is both.
    return (
        select(func.max(feedback_status.c.status))
        .where(feedback_status.c.feedback_id == feedback.c.id)
        .scalar_subquery()
    )


def feedback_rows(fetch: Fetch, where: FeedbackFilter, limit: int | None) -> Iterator[tuple[str, str | None]]:
    """Pairs (record text, status other than live) of the matching feedback, in stream order."""
    # Only live ones were asked for: nothing to look up.
    status = literal(None) if where.status == "live" else _derived_status()
    created_at, name = where.order
    statement = where.select(created_at.label("created_at"), name.label("id"), feedback.c.record, status)
    for row in _stream(fetch, statement, (created_at, name), feedback.c.cursor, limit):
        yield row[2], row[3]


def episode_rows(
    fetch: Fetch,
    *,
    task: str | None,
    policy: str | None,
    since: int | None,
    until: int | None,
    limit: int | None,
) -> Iterator[str]:
    """Record texts of the matching episodes, in stream order."""
    columns = episode.c
    statement = select(columns.created_at, columns.id, columns.record)
    if task is not None:
        statement = statement.where(columns.task == task)
    if policy is not None:
        statement = statement.where(columns.policy == policy)
    if since is not None:
        statement = statement.where(columns.created_at >= since)
    if until is not None:
        statement = statement.where(columns.created_at < until)
    for row in _stream(fetch, statement, (columns.created_at, columns.id), columns.cursor, limit):
        yield row[2]


def change_rows(fetch: Fetch, after: int, limit: int | None) -> Iterator[Change]:
    """The change feed after a cursor, in commit order, up to what is committed when it is read to the end."""
    check_limit(limit)
    left = limit
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        # Each part is limited too, so that no table is read further than the page needs.
        parts = [
            select(table.c.cursor, literal(table.name).label("name"), identity.label("id"), table.c.added_at)
            .where(table.c.cursor > after)
            .order_by(table.c.cursor)
            .limit(size)
            .subquery()
            for table, identity in schema.FEED_TABLES.items()
        ]
        merged = union_all(*(select(part) for part in parts)).subquery()
        rows = fetch(select(merged).order_by(merged.c.cursor).limit(size))
        for row in rows:
            yield Change(*row)
        if len(rows) < size:
            return
        after = rows[-1][0]
        left = None if left is None else left - len(rows)


def _stream(
    fetch: Fetch,
    statement: Select[*tuple[Any, ...]],
    order: tuple[ColumnElement[int], ColumnElement[str]],
    cursor: ColumnElement[int],
    limit: int | None,
) -> Iterator[Any]:
    """Rows in ``order``, whose two columns the statement selects first; no row newer than the start."""
    newest = fetch(select(schema.feed.c.cursor))[0][0]
    statement = statement.where(cursor <= newest).order_by(*order)
    left = limit
    page = statement
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        rows = fetch(page.limit(size))
        yield from rows
        if len(rows) < size:
            return
        last = rows[-1]
        page = statement.where(tuple_(*order) > tuple_(literal(last[0]), literal(last[1])))
        left = None if left is None else left - len(rows)


def check_limit(limit: int | None) -> None:
    """Raise BadInputError for a negative limit."""
    if limit is not None and limit < 0:
        raise BadInputError(f"limit must not be negative, got {limit}.")
