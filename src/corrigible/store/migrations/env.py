"""Alembic's entry point: runs on the connection that ``Store.open`` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from corrigible.store.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    # SQLite can roll DDL back too, once BEGIN is said by us and not guessed by the driver.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
