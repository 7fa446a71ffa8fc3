"""Errors for the person who meets them: what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CorrigibleError(Exception):
    """Base of every error that Corrigible raises on purpose.

    ``advice`` says what to do next; the command line prints it under the message and
    exits with ``exit_code``.
    """

    exit_code = 1

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".strip()


class BadInputError(CorrigibleError, ValueError):
    """The input cannot be used (not there, wrong type, empty, malformed, inconsistent)."""

    exit_code = 3


class MissingError(CorrigibleError):
    """Something that is needed is not here, and can be got: a model, an extra, a system package.

    A file of data that is not there is a :class:`BadInputError`, a store a :class:`StorageError`.
    """

    exit_code = 4


class StorageError(CorrigibleError):
    """The store cannot be read or written: locked, gone, full."""

    exit_code = 5


class RefusedError(CorrigibleError):
    """A gate said no: the evidence does not support the promotion."""

    exit_code = 6


class NumericsError(CorrigibleError):
    """A named alert of training or scoring: NaN, an all-masked batch, a shape that lies."""

    exit_code = 7


class OutOfMemory(NumericsError):
    """``out_of_memory``: an allocation failed; the advice names the settings that need less."""

    exit_code = 1


class Interrupted(CorrigibleError):
    """Ctrl-C: what was done is kept, and the advice says how to go on."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's own error, or what torch says of either processor."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in said for words in ("out of memory", "allocate memory", "not enough memory"))
    )


@contextmanager
def memory_advice(what: str, advice: str) -> Iterator[None]:
    """Give an allocation that fails in the block its name and advice.

    Args:
        what: there is no room for.
        advice: which settings need less.

    Raises:
        OutOfMemory: an allocation failed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(f"out_of_memory: there is no room for {what} ({first}).", advice=advice) from error
