"""What a format is: how its rows are read, what one row means, and how rows are written.

An importer is two small functions. ``read`` turns a path into numbered rows (or into rows with a
problem); ``parse`` turns one row into records and raises :class:`BadInputError` when it cannot.
Neither touches the store. An exporter turns one record into one row, or says why it cannot.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Annotator, Episode, Feedback, Item, PolicyVersion

#: What importers of files without annotator ids write: somebody, we do not know who.
UNKNOWN_ANNOTATOR = Annotator(pseudonym="unknown", type="human")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: ``value`` when it could be read, else ``problem``.

    ``number`` is 1-based and is what a person finds in the file: a line number for line-based
    formats, a row or element number for the others. ``raw`` is the row verbatim where the source
    has bytes for it.
    """

    number: int
    value: Mapping[str, Any] | None = None
    raw: bytes | None = None
    problem: str = ""
    #: For a line too long to hold: {"bytes", "offset", "sha256"} of the whole.
    extent: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Parsed:
    """What one row turned into, and the names of what in it Corrigible has no place for."""

    feedback: list[Feedback] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    policies: list[PolicyVersion] = field(default_factory=list)
    not_held: list[str] = field(default_factory=list)


class Origin:
    """Where a row comes from: the seed of its record ids and the envelope every record gets."""

    def __init__(self, value: Mapping[str, Any], campaign: str | None, options: Mapping[str, Any]) -> None:
        self.campaign = campaign
        self.options = options
        self._value: Any = value
        self._seed: bytes | None = None

    def seeded(self, value: Any) -> None:
        """Let the ids depend on ``value`` only, when the row is mostly joined tables."""
        self._value = value
        self._seed = None

    def id(self, part: str = "", at: int = 0) -> str:
        """A record id that depends on the row's content (and the campaign and options) alone.

        The same row gives the same id in any file on any day, so importing it again stores
        nothing twice. The layout is that of a UUID version 7: the time ``at`` (microseconds,
        0 when the file does not say) in milliseconds, then 74 bits of SHA-256.
        """
        if self._seed is None:
            text = canonical([self._value, self.campaign, dict(self.options)])
            self._seed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        digest = hashlib.sha256(self._seed + part.encode("utf-8")).digest()
        bits = int.from_bytes(digest[:16], "big")
        millis = max(0, at // 1000) & ((1 << 48) - 1)
        number = (
            (millis << 80)
            | (0x7 << 76)
            | (((bits >> 64) & 0xFFF) << 64)
            | (0b10 << 62)
            | (bits & (1 << 62) - 1)
        )
        return str(uuid.UUID(int=number))

    def envelope(self, part: str = "", at: int = 0, **more: Any) -> dict[str, Any]:
        """Keyword arguments for a :class:`Feedback` of this row."""
        return {
            "id": self.id(part, at),
            "channel": "import",
            "created_at": at,
            "campaign_id": self.campaign,
            **more,
        }


def canonical(value: Any) -> str:
    """JSON in one spelling only: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


Read = Callable[[Path, Mapping[str, Any]], Iterator[Row]]
Parse = Callable[[Mapping[str, Any], Origin], Parsed]
Sniff = Callable[[Path, Sequence[Mapping[str, Any]]], bool]


@dataclass(frozen=True, slots=True)
class Importer:
    """A registered importer. ``sniff`` gets the path and up to 20 rows that are JSON objects."""

    name: str
    summary: str
    read: Read
    parse: Parse
    sniff: Sniff


@dataclass(frozen=True, slots=True)
class Entry:
    """A record on its way out, with the items it points to."""

    feedback: Feedback
    items: Mapping[str, Item]

    def item(self, sha256: str) -> Item:
        try:
            return self.items[sha256]
        except KeyError:
            raise BadInputError(f"the item {sha256[:12]}… it points to is not in the store") from None


@dataclass(frozen=True, slots=True)
class Exporter:
    """A registered exporter: ``write(run)`` consumes ``run.entries()`` and writes ``run.path``."""

    name: str
    summary: str
    write: Callable[[Any], None]
    #: Envelope fields the format can hold; every other field that is set is accounted as lost.
    holds: frozenset[str]
    #: Options understood, with what they do (for ``--help``).
    options: Mapping[str, str]


IMPORTERS: dict[str, Importer] = {}
EXPORTERS: dict[str, Exporter] = {}

#: The value of ``holds`` for formats that keep the whole record.
EVERYTHING = frozenset({"*"})


def importer(name: str, *, read: Read, sniff: Sniff) -> Callable[[Parse], Parse]:
    """Register ``parse`` as the importer ``name``; its docstring's first line is the summary."""

    def register(parse: Parse) -> Parse:
        IMPORTERS[name] = Importer(name, _summary(parse), read, parse, sniff)
        return parse

    return register


def exporter(
    name: str, *, holds: frozenset[str] = frozenset(), options: Mapping[str, str] | None = None
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register ``write`` as the exporter ``name``."""

    def register(write: Callable[[Any], None]) -> Callable[[Any], None]:
        EXPORTERS[name] = Exporter(name, _summary(write), write, holds, options or {})
        return write

    return register


def _summary(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0] if function.__doc__ else ""
