"""The reject file: every row that was not imported, verbatim, with its number and the reason.

One JSON object a line: ``source``, ``line``, ``reason`` and ``raw`` (or ``raw_base64`` when the bytes
are not UTF-8; a line too long to copy has its first bytes as ``raw_start`` and ``bytes``,
``offset`` and ``sha256`` to find it by). The file is only ever appended to, and importing again
adds nothing that it holds already.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
from pathlib import Path

from corrigible.errors import StorageError
from corrigible.store.formats.registry import Row, canonical

Key = tuple[int, str]


def default_path(source: Path) -> Path:
    """``<source>.rejects.jsonl`` beside the source, or in the working folder if that is read-only."""
    name = f"{source.name}.rejects.jsonl"
    beside = source.absolute().parent
    # The mode too: root may write anywhere, but a folder marked read-only was meant so.
    writable = os.access(beside, os.W_OK) and beside.stat().st_mode & 0o222
    return (beside if writable else Path.cwd()) / name


class Rejects:
    """Appends to one reject file; nothing is created before the first reject."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path = path
        self._source = source.name
        self._seen: set[Key] | None = None
        self._waiting: list[str] = []

    def add(self, row: Row, reason: str) -> None:
        """Remember a rejected row until :meth:`flush`."""
        if self._seen is None:
            self._seen = self._read()
        entry: dict[str, object] = {"source": self._source, "line": row.number, "reason": reason}
        if row.extent is not None:
            entry |= {**row.extent, "raw_start": (row.raw or b"").decode("utf-8", "replace")}
            digest = str(row.extent["sha256"])
        else:
            raw = row.raw if row.raw is not None else canonical(row.value).encode("utf-8", "surrogatepass")
            digest = hashlib.sha256(raw).hexdigest()
            try:
                entry["raw"] = raw.decode("utf-8")
            except UnicodeDecodeError:
                entry["raw_base64"] = base64.b64encode(raw).decode("ascii")
            entry["sha256"] = digest
        if (row.number, digest) not in self._seen:
            self._seen.add((row.number, digest))
            self._waiting.append(json.dumps(entry, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Write what is waiting to the disk, before the rows around it are committed to the store.

        Raises:
            StorageError: the disk is full, or the place cannot be written.
        """
        if not self._waiting:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._ends_whole()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("" if whole else "\n") + "".join(self._waiting))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageError(
                f"The reject file {self.path} cannot be written: {error.strerror}.",
                advice=("Free some space" if full else "Choose another place with --rejects")
                + " and run the same command again; it goes on where it stopped.",
            ) from error
        self._waiting.clear()

    def _ends_whole(self) -> bool:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _read(self) -> set[Key]:
        seen: set[Key] = set()
        if not self.path.is_file():
            return seen
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    seen.add((int(entry["line"]), str(entry["sha256"])))
                except (ValueError, KeyError, TypeError):
                    continue  # half a line from a killed run: the row is rejected and written again
        return seen
