"""The first tables: items, episodes, feedback, policies, and the feed that orders them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Spelled out here and not imported: a revision must go on meaning what it meant when it was written.
Key = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
Cursor = sa.BigInteger().with_variant(sa.Integer, "sqlite")
APPEND_ONLY = (
    "item",
    "episode",
    "feedback",
    "feedback_status",
    "policy",
    "policy_event",
    "feedback_target",
    "feedback_policy",
)


def feed_columns() -> tuple[sa.Column[int], sa.Column[int]]:
    return (
        sa.Column("cursor", Cursor, primary_key=True, autoincrement=False),
        sa.Column("added_at", sa.BigInteger, nullable=False),
    )


def upgrade() -> None:
    op.create_table(
        "feed",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("cursor", sa.BigInteger, nullable=False),
        comment="One row: the last cursor given out. Writers hold it locked until they commit.",
    )
    op.execute("INSERT INTO feed (id, cursor) VALUES (1, 0)")
    op.create_table(
        "item",
        *feed_columns(),
        sa.Column("sha256", Key, nullable=False, unique=True),
        sa.Column("record", sa.Text, nullable=False),
    )
    op.create_table(
        "episode",
        *feed_columns(),
        sa.Column("id", Key, nullable=False, unique=True),
        sa.Column("task", Key),
        sa.Column("policy", Key),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
    )
    op.create_index("episode_by_time", "episode", ["created_at", "id"])
    op.create_index("episode_by_task", "episode", ["task", "created_at", "id"])
    op.create_index("episode_by_policy", "episode", ["policy", "created_at", "id"])
    op.create_table(
        "feedback",
        *feed_columns(),
        sa.Column("id", Key, nullable=False, unique=True),
        sa.Column("kind", Key, nullable=False),
        sa.Column("annotator", Key, nullable=False),
        sa.Column("task", Key),
        sa.Column("campaign", Key),
        sa.Column("criterion", Key),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
    )
    op.create_index("feedback_by_time", "feedback", ["created_at", "id"])
    op.create_index("feedback_by_kind", "feedback", ["kind", "created_at", "id"])
    op.create_index("feedback_by_annotator", "feedback", ["annotator", "created_at", "id"])
    op.create_index("feedback_by_task", "feedback", ["task", "created_at", "id"])
    op.create_table(
        "feedback_target",
        sa.Column("sha256", Key, primary_key=True),
        sa.Column(
            "feedback", Cursor, sa.ForeignKey("feedback.cursor"), primary_key=True, autoincrement=False
        ),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("episode", Key),
        comment="What each record is about: content hash, and the episode it was said in.",
        sqlite_with_rowid=False,
    )
    op.create_index(
        "feedback_target_by_episode",
        "feedback_target",
        ["episode"],
        sqlite_where=sa.text("episode IS NOT NULL"),
        postgresql_where=sa.text("episode IS NOT NULL"),
    )
    op.create_table(
        "feedback_policy",
        sa.Column("policy", Key, primary_key=True),
        sa.Column("created_at", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", Key, primary_key=True),
        sa.Column("feedback", Cursor, sa.ForeignKey("feedback.cursor"), nullable=False),
        comment="Which policy versions produced a record's targets, in the order records are streamed.",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "feedback_status",
        *feed_columns(),
        sa.Column("feedback_id", Key, nullable=False),
        sa.Column("status", Key, nullable=False),
        sa.Column("by", sa.Text),
        sa.Column("reason", sa.Text),
        sa.UniqueConstraint("feedback_id", "status", name="feedback_status_once"),
    )
    op.create_table(
        "policy",
        *feed_columns(),
        sa.Column("id", Key, nullable=False, unique=True),
        sa.Column("name", Key, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
    )
    op.create_index("policy_by_name", "policy", ["name", "created_at", "id"])
    op.create_table(
        "policy_event",
        *feed_columns(),
        sa.Column("policy_id", Key, sa.ForeignKey("policy.id"), nullable=False),
        sa.Column("event", Key, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
    )
    op.create_index("policy_event_by_policy", "policy_event", ["policy_id", "cursor"])
    op.create_table(
        "import_progress",
        sa.Column("key", Key, primary_key=True),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        comment="How far each import has come. The only table besides `feed` whose rows change.",
    )
    if op.get_bind().dialect.name == "sqlite":
        for table in APPEND_ONLY:
            for verb in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER {table}_refuses_{verb.lower()} BEFORE {verb} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only: {verb} refused'); END"
                )
    else:
        op.execute(
            "CREATE FUNCTION corrigible_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP; END $$"
        )
        for table in APPEND_ONLY:
            op.execute(
                f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION corrigible_append_only()"
            )
