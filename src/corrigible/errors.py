"""Errors for the person who meets them: what was wrong, where, and what to do."""

from __future__ import annotations


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


class Interrupted(CorrigibleError):
    """Ctrl-C: what was done is kept, and the advice says how to go on."""

    exit_code = 130
