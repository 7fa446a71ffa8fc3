"""Which judgements each policy version was trained on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Key = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "lineage",
        sa.Column("policy_id", Key, sa.ForeignKey("policy.id"), primary_key=True),
        sa.Column("feedback_id", Key, primary_key=True),
        comment="Which judgements each policy version was trained on.",
        sqlite_with_rowid=False,
    )
    op.create_index("lineage_by_feedback", "lineage", ["feedback_id"])
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER lineage_refuses_{verb.lower()} BEFORE {verb} ON lineage "
                f"BEGIN SELECT RAISE(ABORT, 'lineage is append-only: {verb} refused'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER lineage_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON lineage "
            "FOR EACH STATEMENT EXECUTE FUNCTION corrigible_append_only()"
        )
