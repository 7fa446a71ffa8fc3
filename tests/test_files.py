"""A file is written whole or not at all, and what is in it is JSON."""

from __future__ import annotations

import errno
import json
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

import corrigible.files as files
from corrigible.errors import StorageError
from corrigible.files import plain, replacing, write_atomically, write_json


def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as writing:
        writing.write_text("half")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("a.txt", "old")]
    write_atomically(path, b"new")
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("a.txt", "new")]


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "The disk is full"), (errno.EIO, "Could not write")]
)
def test_what_the_disk_says_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    write_json(tmp_path / "a.json", {"kept": True})

    def fails(path: Path) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(files, "sync", fails)
    with pytest.raises(StorageError, match=says) as caught:
        write_json(tmp_path / "a.json", {"kept": False})
    assert "run again" in caught.value.advice
    assert [json.loads(p.read_text()) for p in tmp_path.iterdir()] == [{"kept": True}]


def test_a_full_disk_under_safetensors_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    with pytest.raises(StorageError, match="disk is full"), replacing(tmp_path / "x"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_an_error_that_is_not_the_disk_s_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x"):
        raise ZeroDivisionError
    with pytest.raises(TypeError, match="object has no JSON form"):
        write_json(tmp_path / "x", {"x": object()})
    assert not list(tmp_path.iterdir())


class Colour(Enum):
    RED = "red"


def test_plain_values(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {Colour.RED: np.arange(2), "low": -np.inf, "in": (tmp_path, {"b", "a"})})
    assert json.loads((tmp_path / "a").read_text()) == {
        "red": [0, 1],
        "low": None,
        "in": [str(tmp_path), ["a", "b"]],
    }
    assert plain(np.float32("nan")) is None
