"""What a database's refusal means to the person who meets it."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from corrigible.errors import BadInputError, CorrigibleError, StorageError

_LOCKED = "Another process holds it. Wait for that process to finish, or stop it, then run this again."
_FULL = "Free some space (or move the store to a larger disk) and run this again: nothing was lost."
_GONE = "Check that it is still there and reachable, then open the store again."
_DAMAGED = "Restore it from a backup, or salvage what is readable with `sqlite3 FILE .recover`."
_READ_ONLY = (
    "Give this user write permission on the file and on its folder (SQLite needs it to read, too), "
    "or copy the store to a place that can be written."
)

# SQLite result codes, primary part: https://www.sqlite.org/rescode.html
_SQLITE = {
    "SQLITE_BUSY": ("is locked", _LOCKED),
    "SQLITE_LOCKED": ("is locked", _LOCKED),
    "SQLITE_FULL": ("is full: no space left to write", _FULL),
    "SQLITE_IOERR": ("cannot be read or written (I/O error)", "Check the disk's health and free space."),
    "SQLITE_CORRUPT": ("is damaged", _DAMAGED),
    "SQLITE_NOTADB": (
        "is not a database",
        "Name a Corrigible store; to bring data in, use `corrigible import`.",
    ),
    "SQLITE_CANTOPEN": ("cannot be opened", _GONE),
    "SQLITE_READONLY": ("is read-only", _READ_ONLY),
    "SQLITE_PERM": ("is not accessible", _READ_ONLY),
    "SQLITE_AUTH": ("is not accessible", _READ_ONLY),
}
# PostgreSQL SQLSTATE, whole or class: https://www.postgresql.org/docs/current/errcodes-appendix.html
_POSTGRES = {
    "55P03": ("is locked", _LOCKED),
    "40P01": ("is locked (deadlock)", _LOCKED),
    "57014": ("did not answer in time", _LOCKED),
    "53100": ("is full: no space left to write", _FULL),
    "53300": ("has no connection left to give", "Close other clients or raise max_connections."),
    "53": ("has run out of resources", "Look at the server's log."),
    "28": ("refused the login", "Check user and password in the store's URL."),
    "3D000": ("does not exist on the server", "Create it with `createdb`, then run this again."),
    "42501": ("is not accessible", "Give this user permission to create and write tables."),
    "25006": ("is read-only", "Connect to the primary server."),
    "XX001": ("is damaged", "Restore it from a backup."),
    "57": ("went away: the server is stopping or stopped", _GONE),
    "08": ("went away: the connection broke", _GONE),
}
_WORDS = {
    r"database .* does not exist": "3D000",
    r"authentication failed|no password supplied|role .* does not exist|pg_hba": "28",
    r"too many clients|connection slots": "53300",
}


def shown(url: URL) -> str:
    """The store's name for messages: a path for SQLite, else the URL without its password."""
    return (
        url.database or "?"
        if url.get_backend_name() == "sqlite"
        else url.render_as_string(hide_password=True)
    )


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn what the driver or SQLAlchemy raises inside into ``StorageError`` with advice.

    Raises:
        StorageError: locked, full, gone, damaged, not a database, read-only, or anything else the
            database refused.
        BadInputError: text that the database cannot hold (NUL characters on PostgreSQL).
    """
    try:
        yield
    except DBAPIError as error:
        raise _explained(error.orig or error, shown(url)) from error
    except InvalidRequestError as error:
        # A pooled transaction whose connection was lost underneath it.
        raise StorageError(f"The store {shown(url)} went away.", advice=_GONE) from error
    except Exception as error:
        # The drivers' own errors, from where they are used without SQLAlchemy: setting up, COPY.
        if not (isinstance(error, sqlite3.Error) or hasattr(error, "sqlstate")):
            raise
        raise _explained(error, shown(url)) from error


def disk_error(error: OSError, where: str | Path) -> StorageError:
    """The same for a file of ours beside the database: a full disk is named as such."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(f"No space left to write {where}.", advice=_FULL)
    return StorageError(f"Cannot read or write {where}: {error.strerror or error}.", advice=_READ_ONLY)


def _explained(origin: BaseException, name: str) -> CorrigibleError:
    sqlite_name = getattr(origin, "sqlite_errorname", None)
    if isinstance(sqlite_name, str):
        primary = "_".join(sqlite_name.split("_")[:2])
        if primary == "SQLITE_CANTOPEN" and _may_not_write(Path(name).parent):
            primary = "SQLITE_READONLY"  # SQLite says the same of a folder in which it can make no file
        if primary in _SQLITE:
            what, advice = _SQLITE[primary]
            return StorageError(f"The store {name} {what}.", advice=advice)
    text = str(origin).strip()
    state = getattr(origin, "sqlstate", None) or _state_of(text)
    for code in (state, state[:2]):
        if code in _POSTGRES:
            what, advice = _POSTGRES[code]
            return StorageError(f"The store {name} {what}.", advice=advice)
    if "NUL" in text or "0x00" in text:
        return BadInputError(
            "An id, name or task contains a NUL character, which PostgreSQL cannot hold.",
            advice="Remove it from the input.",
        )
    if "connection" in text:
        return StorageError(f"The store {name} cannot be reached: {text}", advice=_GONE)
    return StorageError(f"The store {name} refused: {text}", advice="Nothing was stored.")


def _may_not_write(folder: Path) -> bool:
    return folder.is_dir() and not os.access(folder, os.W_OK)


def _state_of(text: str) -> str:
    """The SQLSTATE of a refused connection, for which the driver has only the server's words."""
    return next((state for pattern, state in _WORDS.items() if re.search(pattern, text)), "")
