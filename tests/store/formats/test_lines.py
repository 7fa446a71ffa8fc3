"""The line reader holds its promises whatever the file holds."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corrigible.errors import BadInputError
from corrigible.store.formats.lines import read_lines, refuse_foreign


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b""))), st.booleans()
)
def test_lines_are_those_of_split(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "file"
    data = b"\n".join(parts)
    if data.startswith((b"\x1f\x8b", b"\xef\xbb\xbf")):
        return
    path.write_bytes(gzip.compress(data) if zipped else data)
    wanted = [(n, part) for n, part in enumerate(parts, 1) if part.strip()]
    assert [(line.number, line.raw) for line in read_lines(path)] == wanted


def test_long_line_is_measured_not_held(tmp_path: Path) -> None:
    path = tmp_path / "file"
    long = b"x" * 5000 + b"y" * 5000
    path.write_bytes(b"first\n" + long + b"\nlast\n")
    first, middle, last = read_lines(path, max_line_bytes=1000)
    assert (first.raw, last.raw, last.number) == (b"first", b"last", 3)
    assert middle.length == 10_000 and middle.sha256 == hashlib.sha256(long).hexdigest()
    assert "10,000 bytes" in middle.problem and len(middle.raw) <= 2000
    assert path.read_bytes()[middle.offset : middle.offset + middle.length] == long


def test_truncated_gzip_gives_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    lines = [hashlib.sha256(str(i).encode()).hexdigest().encode() for i in range(5000)]
    whole = gzip.compress(b"\n".join(lines))
    path.write_bytes(whole[: len(whole) // 2])
    got = list(read_lines(path))
    assert "ends in the middle" in got[-1].problem
    assert 1000 < len(got) < 5000
    assert [line.raw for line in got[:-1]] == lines[: len(got) - 1]


def test_damaged_gzip_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    whole = bytearray(gzip.compress(b"one\ntwo\n" * 500))
    whole[-6] ^= 0xFF  # the checksum
    path.write_bytes(bytes(whole))
    assert "damaged" in list(read_lines(path))[-1].problem


def test_members_of_gzip_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(b"one\nt") + gzip.compress(b"wo\n"))
    assert [line.raw for line in read_lines(path)] == [b"one", b"two"]


def test_byte_order_mark_is_taken_off_and_windows_line_ends_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf{}\r\n{}\r\n")
    assert [line.raw for line in read_lines(path)] == [b"{}\r", b"{}\r"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\n", "only white space"),
        (gzip.compress(b""), "only white space"),
        ("{}\n".encode("utf-16"), "UTF-16"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"%PDF-1.7", "a PDF"),
        (b"SQLite format 3\x00", "an SQLite database"),
        (b"\x80\x04\x95", "a Python pickle"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=words) as caught:
        refuse_foreign(path)
    assert caught.value.advice


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        list(read_lines(tmp_path / "nothing"))
