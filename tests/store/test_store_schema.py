"""The schema: append-only by trigger, migrated on opening, refused when it is not ours or newer."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect
from sqlalchemy.exc import DBAPIError
from store_examples import episode, policy, vote, votes

from corrigible.errors import BadInputError, StorageError
from corrigible.records import PolicyRef, TrainedOn
from corrigible.store import Store, schema


def engine_of(store: Store) -> Engine:
    return store._engine


def execute(store: Store, statement: str) -> None:
    with engine_of(store).begin() as connection:
        connection.exec_driver_sql(statement)


def fill(store: Store) -> None:
    """At least one row in every table."""
    refs = (PolicyRef(snapshot="v1"), PolicyRef(snapshot="v2"))
    record, items = vote(1, policy=refs)
    version = policy("demo", trained_on=TrainedOn.of([record.id]))
    store.add_feedback([record], items)
    store.add_episodes([episode(1)])
    store.add_policies([version])
    store.add_policy_event(version.id, "created")
    store.add_lineage(version.id, [record.id])
    store.withdraw(record.id, by="ada")
    store.set_import_state("file", {"line": 1})


def dump(store: Store) -> dict[str, list[Any]]:
    with engine_of(store).connect() as connection:
        return {
            name: [tuple(row) for row in connection.exec_driver_sql(f'SELECT * FROM "{name}" ORDER BY 1, 2')]
            for name in schema.metadata.tables
        }


@pytest.mark.parametrize("table", [table.name for table in schema.APPEND_ONLY])
def test_no_row_of_a_record_table_can_be_changed_or_removed(store: Store, table: str) -> None:
    fill(store)
    before = dump(store)
    assert before[table], "a trigger on an empty table proves nothing"
    column = schema.metadata.tables[table].columns.keys()[0]
    attempts = [f'UPDATE "{table}" SET {column} = {column}', f'DELETE FROM "{table}"']
    if engine_of(store).dialect.name == "postgresql":
        attempts.append(f'TRUNCATE "{table}" CASCADE')
    else:
        attempts.append(f'REPLACE INTO "{table}" SELECT * FROM "{table}"')
    for attempt in attempts:
        with pytest.raises(DBAPIError, match="append-only"):
            execute(store, attempt)
    assert dump(store) == before


def test_every_table_is_append_only_but_the_two_that_say_so() -> None:
    mutable = set(schema.metadata.tables) - {table.name for table in schema.APPEND_ONLY}
    assert mutable == {"feed", "import_progress"}


def test_the_migrated_database_equals_the_metadata(store: Store) -> None:
    with engine_of(store).connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": schema.VERSION_TABLE, "compare_server_default": True}
        )
        assert compare_metadata(context, schema.metadata) == []
        # Alembic compares no partial or composite details everywhere, so the column lists are looked at too.
        looked = inspect(connection)
        for table in schema.metadata.tables.values():
            found = {tuple(index["column_names"]) for index in looked.get_indexes(table.name)}
            declared = {tuple(column.name for column in index.columns) for index in table.indexes}
            assert declared <= found, table.name


def test_the_revisions_are_a_line_that_ends_at_head() -> None:
    config = Config()
    config.set_main_option("script_location", "corrigible.store:migrations")
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [schema.HEAD]
    names = [revision.revision for revision in script.walk_revisions()]
    # Newer is told from older by comparing the names.
    assert names == sorted(names, reverse=True)


def test_opening_again_keeps_everything(url: str, tmp_path: Path) -> None:
    with Store.open(url, blobs=tmp_path) as store:
        fill(store)
        before = dump(store)
    with Store.open(url, blobs=tmp_path, create=False) as store:
        assert dump(store) == before
        assert str(tmp_path) in str(store.blobs.root)


def test_a_store_of_the_first_revision_is_brought_to_head_with_all_it_holds(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corrigible.store.database.HEAD", "0001")
    record, items = vote(1)
    version = policy("demo", trained_on=TrainedOn.of([record.id]))
    with Store.open(url, blobs=tmp_path) as store:
        assert "lineage" not in inspect(engine_of(store)).get_table_names()
        store.add_feedback([record], items)
        store.add_policies([version])
    monkeypatch.undo()
    with Store.open(url, blobs=tmp_path, create=False) as store:
        assert store.feedback_record(record.id) == record
        assert store.lineage(version.id) == []
        store.add_lineage(version.id, [record.id])
        assert store.lineage(version.id) == [record.id]
        assert store.shaped(record.id) == [version.id]


def test_a_store_of_a_newer_corrigible_is_left_alone(url: str, tmp_path: Path) -> None:
    with Store.open(url, blobs=tmp_path) as store:
        fill(store)
        execute(store, f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
        before = dump(store)
        with pytest.raises(StorageError, match=r"newer Corrigible \(schema 9999.*pip install --upgrade"):
            Store.open(url, blobs=tmp_path)
        assert dump(store) == before


def test_another_programs_database_is_left_alone(url: str, tmp_path: Path) -> None:
    if url.startswith("postgresql"):
        with Store.open(url, blobs=tmp_path) as store:
            execute(store, f"DROP TABLE {schema.VERSION_TABLE}")
    else:
        with sqlite3.connect(url) as connection:
            connection.execute("CREATE TABLE moz_places (id INTEGER)")
        connection.close()
    with pytest.raises(StorageError, match="not a Corrigible store"):
        Store.open(url, blobs=tmp_path)


@pytest.mark.postgres
def test_a_postgresql_database_may_hold_other_tables(postgres_server: Any, tmp_path: Path) -> None:
    import psycopg

    url = postgres_server.empty_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE invoices (id integer)")
    with Store.open(url, blobs=tmp_path) as store:
        store.add_feedback(votes(2))
        assert store.count_feedback() == 2


OPEN_AND_ADD = """
import json, sys
from corrigible.store import Store
sys.path.insert(0, sys.argv[3])
from store_examples import votes
with Store.open(sys.argv[1], blobs=sys.argv[1] + ".b" if "://" not in sys.argv[1] else "b") as store:
    print(json.dumps(store.add_feedback(votes(3, start=int(sys.argv[2]))).new))
"""


def test_several_processes_may_make_the_same_new_store_at_once(url: str) -> None:
    here = str(Path(__file__).parent)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_ADD, url, str(10 * number), here],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out) == 3
    with Store.open(url) as store:
        assert store.count_feedback() == 9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mysql://me@localhost/x", "cannot live in 'mysql'"),
        ("", "names none"),
        (":memory:", "names none"),
        ("sqlite://", "names none"),
        ("://x", "not a database URL"),
        ("https://example.org/a.db", "cannot live in 'https'"),
    ],
)
def test_names_that_no_store_can_have(name: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        Store.open(name)


def test_a_postgresql_store_has_to_be_told_where_blobs_go(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CORRIGIBLE_BLOBS", raising=False)
    with Store.open(url) as store:
        if url.startswith("postgresql"):
            with pytest.raises(BadInputError, match="CORRIGIBLE_BLOBS"):
                _ = store.blobs
        else:
            assert store.blobs.root == Path(f"{url}.blobs")
    monkeypatch.setenv("CORRIGIBLE_BLOBS", str(tmp_path / "elsewhere"))
    with Store.open(url) as store:
        where = tmp_path / "elsewhere" if url.startswith("postgresql") else Path(f"{url}.blobs")
        assert store.blobs.root == where


def test_passwords_stay_out_of_messages(url: str) -> None:
    with Store.open(url) as store:
        if url.startswith("postgresql"):
            assert "***" in repr(store)
            assert url.split(":")[2].split("@")[0] not in repr(store)
        with Store.open(store.url) as again:
            assert again.count_feedback() == 0
