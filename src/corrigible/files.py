"""Files that are written whole or not at all, and the plain JSON that goes into them.

What is written lies beside its place first, is synced, and then renamed into it. A kill, a full disk or
a power cut at any moment leaves what was there before.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from corrigible.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file to; it takes the place of ``path`` when the block ends well.

    For writers that want a path of their own (safetensors, torch); see :func:`write_atomically`.

    Raises:
        StorageError: the disk is full or not writable; the old content is untouched.
    """
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        writing = path.with_name(f".{path.name}.partial")
        try:
            yield writing
            sync(writing)
            writing.replace(path)
            sync(path.parent)
        except BaseException:
            writing.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8): readers see the old content or the new, never a part.

    Raises:
        StorageError: the disk is full or not writable; the old content is untouched.
    """
    with replacing(path) as writing:
        writing.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON, in the form that :func:`plain` gives it.

    Raises:
        StorageError: the disk is full or not writable; the old content is untouched.
        TypeError: a part of ``value`` has no JSON form.
    """
    write_atomically(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """What ``json`` cannot write, as plain values; a float that is not finite becomes null.

    Raises:
        TypeError: there is no such form.

    >>> plain({"where": Path("a/b"), "interval": (0.5, math.inf)})
    {'where': 'a/b', 'interval': [0.5, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int | bool) or value is None:
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn what the operating system says about writing into a :class:`StorageError` with advice."""
    try:
        yield
    except Exception as error:
        # Its own class, so asked for by name: importing safetensors is not this module's to do.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        # safetensors reports the operating system's error as text only: "... (os error 28)".
        text = str(error)
        if getattr(error, "errno", None) in _FULL or any(f"os error {code})" in text for code in _FULL):
            raise StorageError(
                f"The disk is full: could not write under {where}.",
                advice="Free some space and run again (with --resume, where there is one); "
                "what was there before is intact.",
            ) from error
        raise StorageError(
            f"Could not write under {where}: {getattr(error, 'strerror', None) or text}.",
            advice="Check that the folder can be written; run again (with --resume, where there is one).",
        ) from error


def sync(path: Path) -> None:
    """Wait until ``path`` is on the disk: of a file its content, of a folder the names in it.

    A rename is durable only once its folder is.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
