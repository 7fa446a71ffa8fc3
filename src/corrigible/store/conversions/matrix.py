"""The matrix of conversions: from which kind of record which signal is made, and why other cells are empty.

A conversion states what it assumes and what it keeps of the judge's uncertainty; a cell without one states
the reason. Every cell of kinds x signals is one or the other (tests/store/test_conversions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Feedback
from corrigible.store.conversions.content import Content, LeftOut, NotConvertibleError
from corrigible.store.labelled import Labelled
from corrigible.store.pairs import Pair
from corrigible.store.signals import Attempts, Critiqued, Demonstrated, Ranked


@dataclass(frozen=True)
class SignalKind:
    """A shape that algorithms learn from.

    Attributes:
        type: its dataclass; ``None`` when no store holds it.
        description: one line for people.
    """

    type: type | None
    description: str


SIGNALS: dict[str, SignalKind] = {
    "pairs": SignalKind(Pair, "one response preferred to another, with how surely"),
    "labelled": SignalKind(Labelled, "one response, found good or bad"),
    "ranked": SignalKind(Ranked, "several responses to one prompt, scored against each other"),
    "demonstrations": SignalKind(Demonstrated, "a response to imitate, or to imitate in part"),
    "critiqued": SignalKind(Critiqued, "a draft, what was said about it, and what became of it"),
    "attempts": SignalKind(Attempts, "tries at one task, right and wrong"),
    "groups": SignalKind(None, "answers sampled while training, with rewards (corrigible.align.GroupSource)"),
}
"""Every signal by name."""

FROM_RECORDS = tuple(name for name, signal in SIGNALS.items() if signal.type is not None)
"""The signals that are made of records."""

Convert = Callable[[Sequence[Feedback], Content], Iterator[Any]]
"""From records of one kind to signals and :class:`LeftOut`."""


@dataclass(frozen=True)
class Conversion:
    """One cell of the matrix.

    Attributes:
        kind: of the records.
        signal: a key of :data:`SIGNALS`.
        convert: the function; pure.
        assumes: what must hold for the signals to mean what they say.
        keeps: how the judge's uncertainty survives.
        together: whether records are read against each other (so all of them must be given at once).
    """

    kind: str
    signal: str
    convert: Convert
    assumes: str
    keeps: str
    together: bool


CONVERSIONS: dict[tuple[str, str], Conversion] = {}
"""Every conversion by (kind, signal)."""

IMPOSSIBLE: dict[tuple[str, str], str] = {}
"""Why there is none, for every other (kind, signal)."""


def conversion(
    kind: str, signal: str, *, assumes: str, keeps: str, together: bool = False
) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    """Register a function as the conversion of a kind into a signal.

    It takes one record and its content, or, with ``together``, all records. It may raise
    :class:`NotConvertibleError` for a record that gives nothing.
    """

    def register(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        assert (kind, signal) not in CONVERSIONS and signal in FROM_RECORDS, (kind, signal)
        convert = function if together else _each(function)
        CONVERSIONS[kind, signal] = Conversion(kind, signal, convert, assumes, keeps, together)
        return function

    return register


def _each(function: Callable[[Feedback, Content], Iterator[Any]]) -> Convert:
    def convert(records: Sequence[Feedback], content: Content) -> Iterator[Any]:
        for record in records:
            try:
                yield from list(function(record, content))
            except NotConvertibleError as why:
                yield LeftOut((record.id,), why.reason, why.detail)

    return convert


def impossible(kind: str, **reasons: str) -> None:
    """Say why a kind gives no such signals: ``signal="reason"``."""
    for signal, reason in reasons.items():
        assert (kind, signal) not in IMPOSSIBLE and signal in FROM_RECORDS, (kind, signal)
        IMPOSSIBLE[kind, signal] = reason


def kinds_for(signal: str) -> frozenset[str]:
    """The kinds of records that a signal can be made of.

    Raises:
        BadInputError: there is no such signal, or it is not made of records.
    """
    check_signal(signal)
    return frozenset(kind for kind, name in CONVERSIONS if name == signal)


def check_signal(signal: str) -> None:
    """BadInputError unless this is a signal that is made of records."""
    if signal not in SIGNALS:
        raise BadInputError(f"There is no signal {signal!r}.", advice=f"Known: {', '.join(FROM_RECORDS)}.")
    if signal not in FROM_RECORDS:
        raise BadInputError(
            f"{signal!r} is not made of records: {SIGNALS[signal].description}.",
            advice="Sample answers (corrigible generate), score them, and train on a GroupSource.",
        )


def matrix_table() -> str:
    """The matrix as Markdown: a cell per kind and signal, then what each conversion assumes and keeps, then
    why the others are impossible."""
    from corrigible.records import KINDS

    cells = [(kind, signal) for kind in KINDS for signal in FROM_RECORDS]
    lines = [
        f"| kind | {' | '.join(FROM_RECORDS)} |",
        f"|---|{'---|' * len(FROM_RECORDS)}",
        *(
            f"| `{kind}` | {' | '.join('yes' if (kind, s) in CONVERSIONS else '–' for s in FROM_RECORDS)} |"
            for kind in KINDS
        ),
        "",
        "| from → to | assumes | keeps |",
        "|---|---|---|",
        *(
            f"| `{cell[0]}` → {cell[1]} | {CONVERSIONS[cell].assumes} | {CONVERSIONS[cell].keeps} |"
            for cell in cells
            if cell in CONVERSIONS
        ),
        "",
        "| no conversion | why |",
        "|---|---|",
    ]
    for kind in KINDS:
        whys: dict[str, list[str]] = {}
        for signal in FROM_RECORDS:
            if (kind, signal) in IMPOSSIBLE:
                whys.setdefault(IMPOSSIBLE[kind, signal], []).append(signal)
        lines += [f"| `{kind}` → {', '.join(signals)} | {why} |" for why, signals in whys.items()]
    return "\n".join(lines) + "\n"
