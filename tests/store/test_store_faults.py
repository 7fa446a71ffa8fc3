"""When the database says no: a clear error, nothing half written, nothing lost."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event
from store_examples import vote, votes

from corrigible.errors import BadInputError, StorageError
from corrigible.store import Added, Store

HERE = str(Path(__file__).parent)


@contextmanager
def running(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that says a line when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {HERE!r})\n{script}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


HOLD_LOCK = """
import sys
from corrigible.store import Store
with Store.open(sys.argv[1]) as store, store.transaction():
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_a_store_locked_by_another_process(url: str) -> None:
    Store.open(url).close()
    with running(HOLD_LOCK, url) as holder, Store.open(url, timeout=0.5) as store:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"is locked.*Wait for that process"):
            store.add_feedback(votes(1))
        assert 0.3 < time.monotonic() - began < 20
        assert store.count_feedback() == 0  # reading goes on meanwhile
        assert holder.stdin is not None
        holder.stdin.write("go\n")
        holder.stdin.flush()
        assert holder.wait(30) == 0
        assert store.add_feedback(votes(1)) == Added(new=1)


def test_a_writer_waits_for_another_one_to_finish(url: str) -> None:
    Store.open(url).close()
    with running(HOLD_LOCK, url) as holder, Store.open(url, timeout=60) as store:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        assert holder.stdin is not None
        holder.stdin.write("go\n")
        holder.stdin.flush()
        assert store.add_feedback(votes(1)) == Added(new=1)


def test_an_exclusively_locked_file_cannot_even_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    Store.open(path).close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    other.execute("UPDATE feed SET cursor = cursor")
    other.execute("COMMIT")
    try:
        with pytest.raises(StorageError, match="is locked"):
            Store.open(path, timeout=0.3)
    finally:
        other.close()
    Store.open(path, timeout=0.3).close()


@pytest.mark.parametrize("fate", ["removed", "replaced", "folder removed"])
def test_a_file_that_is_gone(tmp_path: Path, fate: str) -> None:
    path = tmp_path / "folder" / "a.db"
    with Store.open(path) as store:
        store.add_feedback(votes(3))
        kept = path.rename(tmp_path / "kept.db")
        if fate == "replaced":
            path.write_bytes(kept.read_bytes())
        elif fate == "folder removed":
            for left in path.parent.iterdir():
                left.unlink()
            path.parent.rmdir()
        for attempt in (lambda: store.add_feedback(votes(1)), lambda: list(store.feedback()), store.policies):
            with pytest.raises(StorageError, match="is gone"):
                attempt()
        stream = store.changes()
        with pytest.raises(StorageError, match="is gone"):
            next(stream)


def test_a_file_removed_in_the_middle_of_a_transaction(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with (
        Store.open(path) as store,
        pytest.raises(StorageError, match="is gone"),
        store.transaction() as transaction,
    ):
        transaction.add_feedback(votes(1))
        path.unlink()


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no store at .*missing\.db.*corrigible import"):
        Store.open(tmp_path / "missing.db", create=False)
    assert not (tmp_path / "missing.db").exists()
    Store.open(tmp_path / "deep" / "down" / "new.db").close()
    with pytest.raises(StorageError, match="is a folder"):
        Store.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot make the folder"):
        Store.open(tmp_path / "file" / "new.db")


def test_files_that_are_no_database(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": b'{"chosen": "a"}\n', "b.gz": b"\x1f\x8b\x08", "c": b"S"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(StorageError, match=r"is not a database.*corrigible import"):
            Store.open(path)
        assert path.read_bytes() == content
    empty = tmp_path / "empty.db"
    empty.touch()
    Store.open(empty).close()


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Store.open(path) as store:
        store.add_feedback(votes(200))
    content = bytearray(path.read_bytes())
    content[100:200] = b"\xff" * 100
    content[4096 * 3 :] = os.urandom(len(content) - 4096 * 3)
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is damaged"), Store.open(path) as store:
        list(store.feedback())


@pytest.mark.postgres
def test_a_server_that_stops_and_comes_back(postgres_server: Any, tmp_path: Path) -> None:
    url = postgres_server.empty_database()
    with Store.open(url, blobs=tmp_path, timeout=5) as store:
        store.add_feedback(votes(3))
        postgres_server.stop()
        try:
            for attempt in (lambda: store.add_feedback(votes(5)), store.policies, lambda: Store.open(url)):
                with pytest.raises(StorageError) as caught:
                    attempt()
                assert "still there and reachable" in caught.value.advice
                assert postgres_server.password not in str(caught.value)
        finally:
            postgres_server.start()
        assert store.add_feedback(votes(5)) == Added(new=5)
        assert store.count_feedback() == 8


@pytest.mark.postgres
def test_a_server_that_is_killed_in_the_middle_of_a_transaction(postgres_server: Any, tmp_path: Path) -> None:
    url = postgres_server.empty_database()
    with Store.open(url, blobs=tmp_path, timeout=5) as store:
        store.add_feedback(votes(2))
        try:
            with pytest.raises(StorageError), store.transaction() as transaction:
                transaction.add_feedback(votes(500, start=10))
                postgres_server.stop(signal.SIGQUIT)
                transaction.add_feedback(votes(500, start=1000))
        finally:
            postgres_server.start()
        assert store.count_feedback() == 2
        assert len(list(store.changes())) == 2


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"database": "nowhere"}, "does not exist on the server"),
        ({"password": "wrong"}, "refused the login"),
        ({"port": 1}, "cannot be reached"),
    ],
)
def test_a_server_that_does_not_let_us_in(
    postgres_server: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    from sqlalchemy import make_url

    url = make_url(postgres_server.url("postgres")).set(**change).render_as_string(hide_password=False)
    with pytest.raises(StorageError, match=message):
        Store.open(url, blobs=tmp_path, timeout=2)


@pytest.mark.postgres
def test_nul_characters_in_names_on_postgresql(postgres_server: Any, tmp_path: Path) -> None:
    with Store.open(postgres_server.empty_database(), blobs=tmp_path) as store:
        with pytest.raises(BadInputError, match="NUL"):
            store.add_feedback([vote(1, task_id="a\x00b")[0]])
        assert store.count_feedback() == 0


# -- a full disk -----------------------------------------------------------------------------------------


def _limit_pages(engine: Engine, pages: int) -> None:
    @event.listens_for(engine, "begin")
    def _limit(connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")


def test_a_full_database_file_keeps_what_it_has(tmp_path: Path) -> None:
    with Store.open(tmp_path / "a.db") as store:
        store.add_feedback(votes(50))
        _limit_pages(store._engine, 80)
        with pytest.raises(StorageError, match=r"is full.*Free some space"):
            store.add_feedback(votes(2000, start=100))
        assert store.count_feedback() == 50
        assert len(list(store.changes())) == 50
        _limit_pages(store._engine, 1_000_000)
        assert store.add_feedback(votes(2000, start=100)) == Added(new=2000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system to fill")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    with Store.open(small_disk / "a.db") as store:
        store.add_feedback(votes(100))
        blob = store.blobs.put_bytes(b"small")
        with pytest.raises(StorageError, match="Free some space"):
            store.add_feedback(votes(6000, start=1000))
        with pytest.raises(StorageError, match=r"No space left.*Free some space"):
            store.blobs.put_bytes(os.urandom(5_000_000))
        assert store.count_feedback() == 100
        assert store.blobs.read_bytes(blob) == b"small"
        assert not list(store.blobs.root.glob("incoming-*"))
    with Store.open(small_disk / "a.db") as store:
        assert store.count_feedback() == 100


def test_a_read_only_disk(small_disk: Path) -> None:
    with Store.open(small_disk / "a.db") as store:
        store.add_feedback(votes(3))
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    if subprocess.run(remount, capture_output=True).returncode != 0:
        pytest.skip("cannot make a file system read-only here")
    for name in ("a.db", "new.db"):
        with pytest.raises(StorageError, match=r"is read-only.*copy the store"):
            Store.open(small_disk / name)


LIMITED = """
import resource
from corrigible.errors import StorageError
from corrigible.store import Store
from store_examples import votes
with Store.open(sys.argv[1]) as store:
    store.add_feedback(votes(100))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
    try:
        store.add_feedback(votes(6000, start=1000))
    except StorageError as error:
        print(error)
"""


def test_a_process_that_may_write_no_more(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with running(LIMITED, str(path)) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "cannot be read or written" in out or "is full" in out
    with Store.open(path) as store:
        assert store.count_feedback() == 100


@pytest.mark.postgres
def test_a_full_server(postgres_server: Any, tmp_path: Path) -> None:
    with Store.open(postgres_server.empty_database(), blobs=tmp_path) as store:
        store.add_feedback(votes(5))
        # The server's own error, raised by it at the moment a full disk would raise it.
        with store._engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER full_disk AFTER INSERT ON feedback_target "
                "FOR EACH STATEMENT EXECUTE FUNCTION full_disk()"
            )
        with pytest.raises(StorageError, match=r"is full.*Free some space"):
            store.add_feedback(votes(20))
        assert store.count_feedback() == 5


# -- kill -9 ---------------------------------------------------------------------------------------------

ADD_FOR_EVER = """
import itertools
from corrigible.store import Store
from store_examples import vote, votes
import corrigible.store.transaction
corrigible.store.transaction._BATCH = 100
def slowly():
    example = vote(0)[0]
    for number in itertools.count():
        name = f"00000000-0000-7000-8000-{number:012x}"
        yield example.model_copy(update={"id": name, "judgement_id": name})
        if number == 3000:
            print("half way", flush=True)
with Store.open(sys.argv[1]) as store:
    store.add_feedback(votes(7))
    with store.transaction() as transaction:
        transaction.set_import_state("file", {"line": 3000})
        transaction.add_feedback(slowly())
"""


def test_kill_9_in_the_middle_of_a_bulk_add(url: str) -> None:
    with running(ADD_FOR_EVER, url) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    with Store.open(url, timeout=30) as store:
        assert store.count_feedback() == 7
        assert len(list(store.changes())) == 7
        assert store.import_state("file") is None
        assert store.add_feedback(votes(7)) == Added(new=7)
        if not url.startswith("postgresql"):
            with sqlite3.connect(url) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            connection.close()
