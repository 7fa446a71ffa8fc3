"""Reading lines from a file of any size without trusting it.

A line is at most :data:`MAX_LINE_BYTES` long in memory; a longer one is measured, hashed and
reported, never held. Gzip is recognised by its first bytes, not by its name, and a truncated
or damaged archive yields every whole line before the damage and then one line that says so.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from corrigible.errors import BadInputError, StorageError

MAX_LINE_BYTES = 64 * 1024 * 1024
_CHUNK = 1024 * 1024
_HEAD_KEPT = 2000

#: First bytes of files that are certainly not feedback, and what to call them.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive (or an Office file)"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x7fELF", "a program"),
    (b"GGUF", "a GGUF model"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
)
_WIDE_MARKS = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff", b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file: its bytes, or the reason why it could not be read.

    ``raw`` is verbatim (without the newline) unless the line was too long; then it is the
    first 2000 bytes, ``length`` and ``sha256`` describe the whole line and ``offset`` says
    where in the (decompressed) file it begins, so that it can be cut out later.
    """

    number: int
    raw: bytes
    offset: int
    length: int
    problem: str = ""
    sha256: str = ""


class _Broken(Exception):
    """The compressed stream ends or lies in the middle."""


def open_binary(path: Path) -> IO[bytes]:
    """Open for reading, with errors that say what to do."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise BadInputError(
            f"{path} does not exist.", advice="Check the spelling, or give an absolute path."
        ) from None
    except IsADirectoryError:
        raise BadInputError(f"{path} is a folder.", advice="Name a file inside it.") from None
    except PermissionError:
        raise StorageError(f"{path} may not be read.", advice="Check the permissions of the file.") from None


def head(path: Path, size: int = 4096) -> bytes:
    """The first ``size`` bytes, decompressed if the file is gzip."""
    got = b""
    try:
        for chunk in _chunks(path):
            got += chunk
            if len(got) >= size:
                break
    except _Broken:
        pass
    return got[:size]


def refuse_foreign(path: Path) -> None:
    """Refuse a file that is empty, in a wide encoding, or plainly something else.

    Raises:
        BadInputError: naming what the file is and what to do.
    """
    start = head(path)
    if not start.strip(b"\xef\xbb\xbf \t\r\n"):
        size = path.stat().st_size
        if size == 0:
            raise BadInputError(f"{path} is empty.", advice="Nothing to import; was the download complete?")
        if len(start) < 4096:
            raise BadInputError(f"{path} holds only white space ({size} bytes).", advice="Nothing to import.")
    for mark in _WIDE_MARKS:
        if start.startswith(mark):
            raise BadInputError(
                f"{path} is UTF-16 or UTF-32, not UTF-8.",
                advice=f"Convert it first: iconv -f UTF-16 -t UTF-8 '{path}' > converted.jsonl",
            )
    for signature, name in _SIGNATURES:
        if start.startswith(signature):
            raise BadInputError(
                f"{path} is {name}, not feedback.",
                advice="Unpack or export it first; `corrigible import --help` lists the formats.",
            )


def read_lines(
    path: Path, max_line_bytes: int = MAX_LINE_BYTES, *, keep_blank: bool = False
) -> Iterator[Line]:
    """Yield the lines of ``path`` with their 1-based numbers; blank ones only if ``keep_blank``.

    Memory stays below ``max_line_bytes`` plus one chunk whatever the file holds.
    """
    number, start, length = 0, 0, 0
    parts: list[bytes] = []
    digest: hashlib._Hash | None = None
    problem = ""

    def finish() -> Line | None:
        nonlocal digest
        raw = b"".join(parts)
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if digest is not None:
            reason = f"the line is {length:,} bytes long, more than the limit of {max_line_bytes:,}"
            line = Line(number, raw[:_HEAD_KEPT], start, length, reason, digest.hexdigest())
            digest = None
            return line
        if not keep_blank and (not raw or raw.isspace()):
            return None
        return Line(number, raw, start, length)

    def grow(piece: bytes) -> None:
        nonlocal length, digest
        length += len(piece)
        if digest is not None:
            digest.update(piece)
        elif length > max_line_bytes:
            digest = hashlib.sha256(b"".join(parts))
            digest.update(piece)
            first = b"".join(parts[:2])[:_HEAD_KEPT]
            parts[:] = [first or piece[:_HEAD_KEPT]]
        else:
            parts.append(piece)

    number = 1
    try:
        for chunk in _chunks(path):
            pieces = chunk.split(b"\n")
            for piece in pieces[:-1]:
                grow(piece)
                line = finish()
                if line is not None:
                    yield line
                start += length + 1
                number, length = number + 1, 0
                parts.clear()
            if pieces[-1]:
                grow(pieces[-1])
    except _Broken as broken:
        problem = str(broken)
    last = finish() if length or problem else None
    if problem:
        kept = last.raw if last is not None else b""
        yield Line(number, kept, start, length, problem, last.sha256 if last else "")
    elif last is not None:
        yield last


def _chunks(path: Path) -> Iterator[bytes]:
    with open_binary(path) as file:
        first = file.read(_CHUNK)
        if not first.startswith(b"\x1f\x8b"):
            while first:
                yield first
                first = file.read(_CHUNK)
            return
        unzip = zlib.decompressobj(wbits=31)
        data = first
        while True:
            try:
                # max_length bounds memory against a bomb: a few bytes can unpack to gigabytes.
                out = unzip.decompress(data, _CHUNK)
            except zlib.error as error:
                raise _Broken(f"the gzip data is damaged here ({error}); what follows is lost") from None
            if out:
                yield out
            data = unzip.unconsumed_tail
            if unzip.eof:
                data = unzip.unused_data.lstrip(b"\x00") or file.read(_CHUNK).lstrip(b"\x00")
                if not data:
                    return
                unzip = zlib.decompressobj(wbits=31)
            elif not data:
                data = file.read(_CHUNK)
                if not data and not out:
                    raise _Broken(
                        "the gzip file ends in the middle (an incomplete download?); what follows is lost"
                    )
