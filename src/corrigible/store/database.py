"""Reaching the database: what a URL means, how a connection is set up, and bringing the schema to head."""

from __future__ import annotations

import sqlite3
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url
from sqlalchemy.exc import ArgumentError

from corrigible.errors import BadInputError, MissingError, StorageError
from corrigible.store.faults import shown, translated
from corrigible.store.schema import HEAD, VERSION_TABLE, metadata

_SQLITE_MAGIC = b"SQLite format 3\x00"
# Any constant will do, as long as every version of this code takes the same one.
_MIGRATION_LOCK = 0x636F7272


def resolve(url_or_path: str | Path) -> URL:
    """The database URL that a path, ``sqlite:///`` or ``postgresql://`` URL stands for.

    Raises:
        BadInputError: not a path or URL, an unsupported database, or an in-memory SQLite database.
        MissingError: PostgreSQL is asked for and its driver is not installed.
    """
    text = str(url_or_path)
    if "://" not in text:
        if text in ("", ":memory:"):
            raise BadInputError(
                f"A store lives in a file; {text!r} names none.", advice="Give a path such as corrigible.db."
            )
        return URL.create("sqlite", database=str(Path(text).expanduser().absolute()))
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise BadInputError(
            f"{text!r} is not a database URL.", advice="Example: sqlite:///runs/a.db"
        ) from error
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise BadInputError("A store lives in a file; this URL names none.", advice="Use sqlite:///PATH.")
        return url.set(database=str(Path(url.database).expanduser().absolute()))
    if backend in ("postgresql", "postgres"):
        if find_spec("psycopg") is None:
            raise MissingError(
                "PostgreSQL stores need the psycopg driver.", advice="pip install 'corrigible[postgres]'"
            )
        return url.set(drivername="postgresql+psycopg")
    raise BadInputError(
        f"A store cannot live in {backend!r}.", advice="Use a file path, sqlite:///PATH or postgresql://…"
    )


def connect(url: URL, *, create: bool, timeout: float) -> Engine:
    """An engine on a database that exists and is at the newest schema revision.

    ``timeout`` (seconds) is how long a writer waits for another writer before it gives up.

    Raises:
        StorageError: missing (with ``create=False``), not a database, some other program's database,
            written by a newer Corrigible, locked for longer than ``timeout``, or out of reach.
    """
    if url.get_backend_name() == "sqlite":
        _check_file(Path(url.database or ""), create)
        engine = _sqlite_engine(url, timeout)
    else:
        engine = _postgres_engine(url, timeout)
    try:
        with translated(url):
            _bring_to_head(engine, url, timeout)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _check_file(path: Path, create: bool) -> None:
    if path.is_dir():
        raise StorageError(
            f"{path} is a folder, not a store.", advice="Name a file in it, such as corrigible.db."
        )
    if not path.exists():
        if not create:
            raise StorageError(
                f"There is no store at {path}.",
                advice="Check the path (--store), or make one with `corrigible import`.",
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"Cannot make the folder {path.parent}: {error.strerror}.") from error
        return
    try:
        with path.open("rb") as file:
            magic = file.read(len(_SQLITE_MAGIC))
    except OSError as error:
        raise StorageError(
            f"Cannot read {path}: {error.strerror}.", advice="Check its permissions."
        ) from error
    # An empty file is what SQLite itself leaves before the first write.
    if magic and magic != _SQLITE_MAGIC:
        raise StorageError(
            f"{path} is not a database.", advice=f"To bring its data into a store: corrigible import {path}"
        )


def _sqlite_engine(url: URL, timeout: float) -> Engine:
    engine = create_engine(url, connect_args={"timeout": timeout})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        # The driver must not guess when to begin (it forgets to, before DDL and SELECT): we say BEGIN.
        connection.isolation_level = None
        run = connection.execute
        run(f"PRAGMA busy_timeout = {int(timeout * 1000)}")
        run("PRAGMA foreign_keys = ON")
        # Otherwise REPLACE removes rows without asking the append-only triggers.
        run("PRAGMA recursive_triggers = ON")
        # FULL, not NORMAL: in WAL mode NORMAL may lose the last commits when power fails, and a person's
        # judgement cannot be asked for twice. It costs one fsync per transaction, however large.
        run("PRAGMA synchronous = FULL")
        run("PRAGMA cache_size = -65536")
        run("PRAGMA temp_store = MEMORY")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes the write lock at once: upgrading a read lock later fails without waiting.
        writing = connection.get_execution_options().get("corrigible_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _postgres_engine(url: URL, timeout: float) -> Engine:
    options = f"-c lock_timeout={int(timeout * 1000)} -c timezone=UTC"
    return create_engine(
        url,
        # A server restart between two calls is survived: dead pooled connections are replaced.
        pool_pre_ping=True,
        connect_args={"options": options, "connect_timeout": max(2, int(min(timeout, 30)))},
    )


def _bring_to_head(engine: Engine, url: URL, timeout: float) -> None:
    if engine.dialect.name == "sqlite":
        _use_wal(engine, timeout)
    with engine.connect() as connection:
        if _revision(connection, url) == HEAD:
            return
    with engine.connect().execution_options(corrigible_writing=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
        # Asked again under the lock: another process may have migrated in between.
        if _revision(connection, url) != HEAD:
            _migrate(connection)


def _use_wal(engine: Engine, timeout: float) -> None:
    # Two processes that open a new file at once both switch it to WAL; SQLite refuses the second one
    # without calling the busy handler, so the waiting is done here.
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = engine.raw_connection()
            try:
                cursor = connection.cursor()
                cursor.execute("PRAGMA journal_mode")
                if cursor.fetchone() != ("wal",):
                    cursor.execute("PRAGMA journal_mode = WAL")
                return
            finally:
                connection.close()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _revision(connection: Connection, url: URL) -> str | None:
    """The schema's revision, ``None`` for an empty database; refuses what is not ours or is newer."""
    tables = set(inspect(connection).get_table_names())
    if VERSION_TABLE not in tables:
        # A PostgreSQL database may hold other people's tables beside ours; an SQLite file should not.
        foreign = tables if connection.dialect.name == "sqlite" else tables & set(metadata.tables)
        if foreign:
            raise StorageError(
                f"{shown(url)} is a database, but not a Corrigible store: it holds {sorted(foreign)[:5]}.",
                advice="Name another file or database.",
            )
        return None
    revision = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()
    if revision is not None and str(revision) > HEAD:
        raise StorageError(
            f"{shown(url)} was written by a newer Corrigible (schema {revision}; this one knows {HEAD}).",
            advice="Upgrade with `pip install --upgrade corrigible`. Nothing was changed.",
        )
    return None if revision is None else str(revision)


def _migrate(connection: Connection) -> None:
    # Imported here: a store that is already at head, the usual case, opens without Alembic.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "corrigible.store:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)
