"""The tables, as SQLAlchemy metadata; ``migrations/`` creates them, and a test keeps the two equal.

Every record table has the same four columns first: ``cursor`` (position in the change feed, unique
over all tables and rising in commit order), ``added_at`` (this store's clock, µs UTC), the record's
own identity, and ``record`` (the record's JSON text, exactly as it was added). The other columns are
copies of fields of that text, held for the indices. No row of a record table is ever changed or
removed: triggers refuse it. What changes about a record later (it is superseded, withdrawn, promoted)
is itself an appended row.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, MetaData, Table, Text, UniqueConstraint

HEAD: Final = "0002"
"""The newest schema revision this code knows. They are numbered, so that a newer one is seen as newer."""

VERSION_TABLE: Final = "corrigible_version"
"""Alembic's version table under our own name, so that a database shared with others stays clear."""

# Code point order on both databases: keyset paging compares in Python's order, not in a locale's.
_Key = Text().with_variant(Text(collation="C"), "postgresql")
# SQLite makes exactly INTEGER PRIMARY KEY the row id, which gives the feed its index for nothing.
_Cursor = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData()

feed = Table(
    "feed",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("cursor", BigInteger, nullable=False),
    comment="One row: the last cursor given out. Writers hold it locked until they commit.",
)

item = Table(
    "item",
    metadata,
    Column("cursor", _Cursor, primary_key=True, autoincrement=False),
    Column("added_at", BigInteger, nullable=False),
    Column("sha256", _Key, nullable=False, unique=True),
    Column("record", Text, nullable=False),
)

episode = Table(
    "episode",
    metadata,
    Column("cursor", _Cursor, primary_key=True, autoincrement=False),
    Column("added_at", BigInteger, nullable=False),
    Column("id", _Key, nullable=False, unique=True),
    Column("task", _Key),
    Column("policy", _Key),
    Column("created_at", BigInteger, nullable=False),
    Column("record", Text, nullable=False),
    Index("episode_by_time", "created_at", "id"),
    Index("episode_by_task", "task", "created_at", "id"),
    Index("episode_by_policy", "policy", "created_at", "id"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("cursor", _Cursor, primary_key=True, autoincrement=False),
    Column("added_at", BigInteger, nullable=False),
    Column("id", _Key, nullable=False, unique=True),
    Column("kind", _Key, nullable=False),
    Column("annotator", _Key, nullable=False),
    Column("task", _Key),
    Column("campaign", _Key),
    Column("criterion", _Key),
    Column("created_at", BigInteger, nullable=False),
    Column("record", Text, nullable=False),
    Index("feedback_by_time", "created_at", "id"),
    Index("feedback_by_kind", "kind", "created_at", "id"),
    Index("feedback_by_annotator", "annotator", "created_at", "id"),
    Index("feedback_by_task", "task", "created_at", "id"),
)

feedback_target = Table(
    "feedback_target",
    metadata,
    Column("sha256", _Key, primary_key=True),
    Column("feedback", _Cursor, ForeignKey("feedback.cursor"), primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("episode", _Key),
    Index(
        "feedback_target_by_episode",
        "episode",
        sqlite_where=Column("episode").is_not(None),
        postgresql_where=Column("episode").is_not(None),
    ),
    comment="What each record is about: content hash, and the episode it was said in.",
    sqlite_with_rowid=False,
)

feedback_policy = Table(
    "feedback_policy",
    metadata,
    Column("policy", _Key, primary_key=True),
    Column("created_at", BigInteger, primary_key=True, autoincrement=False),
    Column("id", _Key, primary_key=True),
    Column("feedback", _Cursor, ForeignKey("feedback.cursor"), nullable=False),
    comment="Which policy versions produced a record's targets, in the order records are streamed.",
    sqlite_with_rowid=False,
)

feedback_status = Table(
    "feedback_status",
    metadata,
    Column("cursor", _Cursor, primary_key=True, autoincrement=False),
    Column("added_at", BigInteger, nullable=False),
    # No foreign key: a correction may arrive before the record it corrects.
    Column("feedback_id", _Key, nullable=False),
    Column("status", _Key, nullable=False),
    Column("by", Text),
    Column("reason", Text),
    UniqueConstraint("feedback_id", "status", name="feedback_status_once"),
)

policy = Table(
    "policy",
    metadata,
    Column("cursor", _Cursor, primary_key=True, autoincrement=False),
    Column("added_at", BigInteger, nullable=False),
    Column("id", _Key, nullable=False, unique=True),
    Column("name", _Key, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("record", Text, nullable=False),
    Index("policy_by_name", "name", "created_at", "id"),
)

policy_event = Table(
    "policy_event",
    metadata,
    Column("cursor", _Cursor, primary_key=True, autoincrement=False),
    Column("added_at", BigInteger, nullable=False),
    Column("policy_id", _Key, ForeignKey("policy.id"), nullable=False),
    Column("event", _Key, nullable=False),
    Column("detail", Text, nullable=False),
    Index("policy_event_by_policy", "policy_id", "cursor"),
)

lineage = Table(
    "lineage",
    metadata,
    Column("policy_id", _Key, ForeignKey("policy.id"), primary_key=True),
    # No foreign key: a version may have been trained on records of another store.
    Column("feedback_id", _Key, primary_key=True),
    Index("lineage_by_feedback", "feedback_id"),
    comment="Which judgements each policy version was trained on.",
    sqlite_with_rowid=False,
)

import_progress = Table(
    "import_progress",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("updated_at", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    comment="How far each import has come. The only table besides `feed` whose rows change.",
)

FEED_TABLES: Final = {
    item: item.c.sha256,
    episode: episode.c.id,
    feedback: feedback.c.id,
    feedback_status: feedback_status.c.feedback_id,
    policy: policy.c.id,
    policy_event: policy_event.c.policy_id,
}
"""The tables of the change feed, each with the column that names its record."""

APPEND_ONLY: Final = (*FEED_TABLES, feedback_target, feedback_policy, lineage)
"""The tables on which triggers refuse UPDATE and DELETE."""
