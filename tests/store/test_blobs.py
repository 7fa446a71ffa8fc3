"""Files by content hash."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from pathlib import Path

import pytest

from corrigible.errors import BadInputError, MissingError, StorageError
from corrigible.store import Blobs


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "deep" / "er" / "weights.safetensors").write_bytes(os.urandom(100_000))
    (folder / "ünïcode näme").write_text("")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")
    }


def test_bytes_and_files(blobs: Blobs, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    sha = blobs.put_bytes(data, "image/png")
    assert sha == hashlib.sha256(data).hexdigest()
    assert blobs.path(sha).read_bytes() == blobs.read_bytes(sha) == data
    assert blobs.media_type(sha) == "image/png"
    (tmp_path / "file").write_bytes(data)
    assert blobs.put_file(tmp_path / "file", "something/else") == sha
    assert blobs.media_type(sha) == "image/png"  # the first description is kept, as for items
    assert sha in blobs
    assert hashlib.sha256(b"").hexdigest() == blobs.put_bytes(b"")
    assert len([p for p in blobs.root.rglob("*") if p.is_file() and p.suffix != ".type"]) == 2


def test_a_stored_blob_is_read_only(blobs: Blobs) -> None:
    assert blobs.path(blobs.put_bytes(b"x")).stat().st_mode & 0o222 == 0


def test_a_folder_comes_back_equal(blobs: Blobs, adapter: Path, tmp_path: Path) -> None:
    sha = blobs.put_directory(adapter)
    fetched = blobs.fetch_directory(sha, tmp_path / "new" / "place")
    assert contents(fetched) == contents(adapter)
    assert [p.name for p in fetched.parent.iterdir()] == ["place"]
    (tmp_path / "there").mkdir()
    assert contents(blobs.fetch_directory(sha, tmp_path / "there")) == contents(adapter)


def test_the_same_folder_has_the_same_hash_whenever_and_wherever(
    blobs: Blobs, adapter: Path, tmp_path: Path
) -> None:
    sha = blobs.put_directory(adapter)
    for path in adapter.rglob("*"):
        os.utime(path, (1, 1))
    (adapter / "adapter_config.json").chmod(0o600)
    copy = blobs.fetch_directory(sha, tmp_path / "copy")
    assert blobs.put_directory(adapter) == blobs.put_directory(copy) == sha
    (adapter / "adapter_config.json").write_text("{} ")
    assert blobs.put_directory(adapter) != sha


def test_what_cannot_be_stored(blobs: Blobs, adapter: Path) -> None:
    with pytest.raises(BadInputError, match="not a file"):
        blobs.put_file(adapter)
    with pytest.raises(BadInputError, match="not a folder"):
        blobs.put_directory(adapter / "adapter_config.json")
    (adapter / "link").symlink_to("/etc/passwd")
    with pytest.raises(BadInputError, match="neither a file nor a folder"):
        blobs.put_directory(adapter)
    assert not blobs.root.exists() or not any(blobs.root.iterdir())


def test_what_is_not_there(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no blob"):
        blobs.path("0" * 64)
    for wrong in ("../../etc/passwd", "0" * 63, "A" * 64, "", "0" * 64 + "\n"):
        with pytest.raises(BadInputError, match="not a SHA-256"):
            blobs.path(wrong)
    with pytest.raises(MissingError, match="no blob"):
        blobs.fetch_directory("0" * 64, tmp_path / "x")


def test_a_damaged_blob_is_noticed(blobs: Blobs, adapter: Path, tmp_path: Path) -> None:
    for sha in (blobs.put_bytes(b"precious"), blobs.put_directory(adapter)):
        path = blobs.path(sha)
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(StorageError, match="is damaged"):
            blobs.read_bytes(sha)
        with pytest.raises(StorageError, match="is damaged"):
            blobs.fetch_directory(sha, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_fetching_where_something_is(blobs: Blobs, adapter: Path) -> None:
    with pytest.raises(BadInputError, match="exists already"):
        blobs.fetch_directory(blobs.put_directory(adapter), adapter)


def test_a_blob_that_is_no_folder(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not a stored folder"):
        blobs.fetch_directory(blobs.put_bytes(b"text"), tmp_path / "x")
    hostile = io.BytesIO()
    with tarfile.open(fileobj=hostile, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("../escaped"))
    with pytest.raises(BadInputError, match="not a stored folder"):
        blobs.fetch_directory(blobs.put_bytes(hostile.getvalue()), tmp_path / "inner" / "x")
    assert not list(tmp_path.rglob("escaped"))


def test_the_same_bytes_from_many_threads(blobs: Blobs) -> None:
    data = os.urandom(500_000)
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(blobs.put_bytes(data))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {hashlib.sha256(data).hexdigest()} and len(found) == 8
    assert blobs.read_bytes(found[0]) == data
    assert not list(blobs.root.glob("incoming-*"))


def test_an_interrupted_write_leaves_nothing(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        blobs.put_bytes(b"half")
    assert list(blobs.root.iterdir()) == []
