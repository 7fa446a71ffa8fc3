"""Content-addressed files beside the database: safetensors, images, adapter folders.

A blob is named by the SHA-256 of its bytes and lives at ``<root>/ab/cdef…``; its media type is the
text file ``….type`` next to it. It is written to a temporary file, forced to disk and then renamed, so
a blob that exists is whole, and two processes that store the same bytes at once store them once.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from corrigible.errors import BadInputError, MissingError, StorageError
from corrigible.store.faults import disk_error

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
DIRECTORY_TYPE = "application/x-tar"


class Blobs:
    """The blobs under one folder, which is made when the first is stored."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def __contains__(self, sha256: str) -> bool:
        return self._place(sha256).exists()

    def put_bytes(self, data: bytes, media_type: str = "application/octet-stream") -> str:
        """Store ``data``; returns its SHA-256 (64 lower-case hex digits). Storing it again does nothing.

        Raises:
            StorageError: the disk is full or the folder cannot be written; nothing is left behind.
        """
        with self._writing(media_type) as writer:
            writer.write(data)
        return writer.sha256

    def put_file(self, path: str | Path, media_type: str = "application/octet-stream") -> str:
        """Store a copy of a file, in constant memory; returns its SHA-256.

        Raises:
            BadInputError: there is no such file.
            StorageError: as for :meth:`put_bytes`.
        """
        source = Path(path)
        if not source.is_file():
            raise BadInputError(f"{source} is not a file.", advice="For a folder use put_directory.")
        with self._writing(media_type) as writer, source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                writer.write(chunk)
        return writer.sha256

    def put_directory(self, directory: str | Path) -> str:
        """Store a folder as one tar; returns its SHA-256.

        The same files give the same SHA-256 everywhere: entries are sorted, and times, owners and
        permissions are left out.

        Raises:
            BadInputError: not a folder, or it holds a link or a device, which would not mean the same
                elsewhere.
            StorageError: as for :meth:`put_bytes`.
        """
        base = Path(directory)
        if not base.is_dir():
            raise BadInputError(f"{base} is not a folder.", advice="For a file use put_file.")
        with (
            self._writing(DIRECTORY_TYPE) as writer,
            tarfile.open(None, "w|", writer, format=tarfile.PAX_FORMAT) as tar,
        ):
            for path in sorted(base.rglob("*"), key=lambda p: p.relative_to(base).parts):
                entry = tarfile.TarInfo(path.relative_to(base).as_posix())
                if path.is_symlink() or not (path.is_dir() or path.is_file()):
                    raise BadInputError(
                        f"{path} is neither a file nor a folder.", advice="Copy what it points to."
                    )
                if path.is_dir():
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(entry)
                else:
                    entry.size, entry.mode = path.stat().st_size, 0o644
                    with path.open("rb") as file:
                        tar.addfile(entry, file)
        return writer.sha256

    def path(self, sha256: str) -> Path:
        """Where the blob's bytes are, to be read only.

        Raises:
            BadInputError: not a SHA-256.
            MissingError: no such blob here.
        """
        place = self._place(sha256)
        if not place.exists():
            raise MissingError(
                f"There is no blob {sha256} under {self.root}.",
                advice="Copy the store's blobs folder along with its database.",
            )
        return place

    def read_bytes(self, sha256: str) -> bytes:
        """The blob's bytes, checked against their name.

        Raises:
            BadInputError, MissingError: as for :meth:`path`.
            StorageError: the file no longer holds what it was stored with.
        """
        data = self.path(sha256).read_bytes()
        self._check(sha256, hashlib.sha256(data).hexdigest())
        return data

    def media_type(self, sha256: str) -> str:
        """The media type the blob was first stored with; raises as :meth:`path` does."""
        note = self.path(sha256).with_suffix(".type")
        return note.read_text(encoding="utf-8") if note.exists() else "application/octet-stream"

    def fetch_directory(self, sha256: str, destination: str | Path) -> Path:
        """Unpack a folder stored with :meth:`put_directory` to ``destination``, which must not exist yet.

        It appears there whole or not at all.

        Raises:
            BadInputError: ``destination`` exists, or the blob is not a folder's.
            MissingError: no such blob here.
            StorageError: the blob is damaged, or the disk is full.
        """
        target = Path(destination)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise BadInputError(f"{target} exists already.", advice="Name a folder that does not.")
        source = self.path(sha256)
        with source.open("rb") as file:
            self._check(sha256, hashlib.file_digest(file, "sha256").hexdigest())
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as unpacked:
                inner = Path(unpacked, "content")
                inner.mkdir()
                with tarfile.open(source, mode="r:") as tar:
                    # Refuses absolute names, "..", links out of the folder and devices.
                    tar.extractall(inner, filter="data")
                inner.replace(target)
        except tarfile.TarError as error:
            raise BadInputError(f"Blob {sha256} is not a stored folder: {error}.") from error
        except OSError as error:
            raise disk_error(error, target) from error
        return target

    def _place(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise BadInputError(f"{sha256!r} is not a SHA-256.", advice="Expected 64 lower-case hex digits.")
        return self.root / sha256[:2] / sha256[2:]

    def _check(self, sha256: str, found: str) -> None:
        if found != sha256:
            raise StorageError(
                f"Blob {sha256} under {self.root} is damaged: its bytes hash to {found}.",
                advice="Restore the file from a backup, or delete it and store it again.",
            )

    @contextmanager
    def _writing(self, media_type: str) -> Iterator[_HashingWriter]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.root, prefix="incoming-")
        except OSError as error:
            raise disk_error(error, self.root) from error
        incoming = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                writer = _HashingWriter(file)
                yield writer
                file.flush()
                os.fsync(file.fileno())
            place = self._place(writer.sha256)
            if not place.exists():
                place.parent.mkdir(exist_ok=True)
                note = place.with_suffix(".type")
                note.write_text(media_type, encoding="utf-8")
                incoming.chmod(0o444)
                incoming.replace(place)
                _sync_folder(place.parent)
        except OSError as error:
            raise disk_error(error, self.root) from error
        finally:
            incoming.unlink(missing_ok=True)


class _HashingWriter(io.RawIOBase):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _sync_folder(folder: Path) -> None:
    # A rename is on disk only when its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
