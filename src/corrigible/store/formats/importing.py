"""The import itself: rows in, records stored in batches, rejects kept, progress remembered.

A batch of records, the items they point to and how far the file has been read go into one
transaction. A killed import therefore resumes at the last batch; record ids depend on the content
of their row, so even reading everything again stores nothing twice.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from corrigible.errors import BadInputError, Interrupted
from corrigible.events import Progress, emit
from corrigible.records import Feedback, UnknownPayload
from corrigible.records.base import bad_input
from corrigible.store.formats import lines
from corrigible.store.formats.readers import looks_like_csv, read_json
from corrigible.store.formats.registry import (
    IMPORTERS,
    Importer,
    Origin,
    Parsed,
    Row,
    canonical,
)
from corrigible.store.formats.rejects import Rejects, default_path
from corrigible.store.transaction import Added

if TYPE_CHECKING:
    from corrigible.store import Store, Transaction

_BATCH_ROWS = 1000
_BATCH_BYTES = 16 * 1024 * 1024
_EDGE = 1024 * 1024
_SNIFFED_ROWS = 20
_SNIFFED_LINES = 2000


@dataclass(frozen=True)
class ImportReport:
    """What one import did. Counts are of the whole file, also when it was resumed half way.

    ``read`` rows were looked at: ``rejected`` of them are in the file ``rejects_path``, ``empty`` of
    them held no judgement. ``added`` records are new in the store, ``existing`` were there already.
    ``not_held`` says how many rows had something that Corrigible has no place for, and what.
    """

    format: str
    path: str
    read: int
    added: int
    existing: int
    rejected: int
    rejects_path: str | None
    empty: int = 0
    resumed_at: int = 0
    not_held: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    first_rejects: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _Progress:
    """What is remembered between runs."""

    rows: int = 0
    added: int = 0
    existing: int = 0
    rejected: int = 0
    empty: int = 0
    not_held: dict[str, int] = field(default_factory=dict)
    unknown_kinds: dict[str, int] = field(default_factory=dict)
    first_rejects: list[str] = field(default_factory=list)
    done: bool = False


def import_file(
    store: Store,
    path: str | Path,
    *,
    format: str | None = None,
    rejects: str | Path | None = None,
    resume: bool = True,
    campaign: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> ImportReport:
    """Import the feedback in a file or folder.

    Args:
        format: a name in ``IMPORTERS``; recognised from the content when not given.
        rejects: where rejected rows go; ``<path>.rejects.jsonl`` when not given.
        resume: go on after the last stored batch if an earlier import of this file was cut short.
        campaign: ``campaign_id`` of the records.
        limit: read at most this many rows.
        **options: for the format; ``max_line_bytes`` (default 64 MiB) for every line-based one.

    Raises:
        BadInputError: the file as a whole cannot be used (not there, empty, wrong type, unknown format).
        StorageError: the store or the disk failed; what was stored before stays, run it again.
        Interrupted: Ctrl-C; what was stored before stays, run it again.
    """
    began = time.perf_counter()
    source = Path(path)
    chosen = _choose(source, format)
    key = f"import:{chosen.name}:{_fingerprint(source)}:{_digest([campaign, options])}"
    progress = _start(store, key, resume, limit)
    resumed_at = progress.rows
    rejected = Rejects(Path(rejects) if rejects is not None else default_path(source), source)
    try:
        _Import(store, source, chosen, progress, rejected, key, campaign, options).run(limit)
    except KeyboardInterrupt:
        raise Interrupted(
            f"The import of {source} was interrupted; its first {progress.rows:,} rows are dealt with.",
            advice="Run the same command again: it goes on from there.",
        ) from None
    if progress.rows == 0:
        raise BadInputError(f"{source} holds no rows.", advice="Nothing to import; was the export complete?")
    return ImportReport(
        chosen.name,
        str(source),
        progress.rows,
        progress.added,
        progress.existing,
        progress.rejected,
        str(rejected.path) if progress.rejected else None,
        progress.empty,
        resumed_at,
        dict(sorted(progress.not_held.items())),
        _warnings(progress),
        progress.first_rejects,
        round(time.perf_counter() - began, 3),
    )


def _start(store: Store, key: str, resume: bool, limit: int | None) -> _Progress:
    state = store.import_state(key) if resume else None
    if not state or state.get("done") or (limit is not None and state["rows"] >= limit):
        return _Progress()
    return _Progress(**state)


def _warnings(progress: _Progress) -> list[str]:
    found = []
    if progress.existing:
        found.append(
            f"{progress.existing:,} records were in the store already (an earlier import, or rows that "
            "repeat exactly): each is kept once"
        )
    if progress.empty:
        found.append(f"{progress.empty:,} rows hold no judgement and were passed over")
    for kind, count in sorted(progress.unknown_kinds.items()):
        found.append(f"{count:,} records are of the unknown kind {kind!r}: kept as they are, used by no view")
    return found


class _Import:
    """One run over one source."""

    def __init__(
        self,
        store: Store,
        source: Path,
        importer: Importer,
        progress: _Progress,
        rejects: Rejects,
        key: str,
        campaign: str | None,
        options: Mapping[str, Any],
    ) -> None:
        self.store = store
        self.source = source
        self.importer = importer
        self.progress = progress
        self.rejects = rejects
        self.key = key
        self.campaign = campaign
        self.options = options
        # What shapes the records, as opposed to how the file is read.
        self.seed_options = {k: v for k, v in options.items() if k != "max_line_bytes"}

    def run(self, limit: int | None) -> None:
        """Read on from ``progress.rows`` to the end (or the limit), batch by batch."""
        rows = self.importer.read(self.source, self.options)
        stop = None if limit is None else max(limit - self.progress.rows, 0)
        rows = islice(rows, self.progress.rows, None)
        limited = islice(rows, stop)
        while batch := _take(limited):
            self._store(batch)
            emit(Progress(task=f"importing {self.source.name}", done=self.progress.rows, unit="row"))
        if limit is None or next(rows, None) is None:
            self.progress.done = True
            if self.progress.rows:
                self.store.set_import_state(self.key, asdict(self.progress))

    def _store(self, batch: Sequence[Row]) -> None:
        parsed = [(row, outcome) for row in batch if (outcome := self._parse(row)) is not None]
        try:
            self._commit(batch, [outcome for _, outcome in parsed])
        except BadInputError:
            # One of them collides with a record that is there under the same id. Find out which: the
            # others are stored one at a time, and the progress only after all of them.
            good: list[Parsed] = []
            added = Added()
            for row, outcome in parsed:
                try:
                    with self.store.transaction() as transaction:
                        added += self._add(transaction, [outcome])
                    good.append(outcome)
                except BadInputError as error:
                    self._reject(row, _reason(error))
            self._commit(batch, good, added)

    def _parse(self, row: Row) -> Parsed | None:
        if row.value is None:
            self._reject(row, row.problem)
            return None
        try:
            parsed = self.importer.parse(row.value, Origin(row.value, self.campaign, self.seed_options))
        except BadInputError as error:
            self._reject(row, _reason(error))
            return None
        except ValidationError as error:
            self._reject(row, _reason(bad_input(Feedback, error)))
            return None
        except (ValueError, RecursionError) as error:
            self._reject(row, f"cannot be read: {error}"[:300])
            return None
        if not (parsed.feedback or parsed.episodes or parsed.policies or parsed.items):
            self.progress.empty += 1
            return None
        return parsed

    def _reject(self, row: Row, reason: str) -> None:
        self.rejects.add(row, reason)
        self.progress.rejected += 1
        if len(self.progress.first_rejects) < 5:
            self.progress.first_rejects.append(f"line {row.number}: {reason}")

    def _commit(self, batch: Sequence[Row], parsed: Sequence[Parsed], stored: Added | None = None) -> None:
        """Store a batch (unless it was ``stored`` already) and how far that brings us."""
        self.rejects.flush()
        with self.store.transaction() as transaction:
            added = self._add(transaction, parsed) if stored is None else stored
            # Counted on a copy: if the commit fails, this batch was not dealt with.
            after = _Progress(**asdict(self.progress))
            after.rows += len(batch)
            after.added += added.new
            after.existing += added.existing
            after.not_held = dict(
                Counter(after.not_held) + Counter(name for one in parsed for name in one.not_held)
            )
            after.unknown_kinds = dict(
                Counter(after.unknown_kinds)
                + Counter(
                    r.kind for one in parsed for r in one.feedback if isinstance(r.payload, UnknownPayload)
                )
            )
            transaction.set_import_state(self.key, asdict(after))
        self.progress.__dict__.update(after.__dict__)

    def _add(self, transaction: Transaction, parsed: Sequence[Parsed]) -> Added:
        transaction.add_items(item for one in parsed for item in one.items)
        policies = transaction.add_policies(policy for one in parsed for policy in one.policies)
        episodes = transaction.add_episodes(episode for one in parsed for episode in one.episodes)
        feedback = transaction.add_feedback(record for one in parsed for record in one.feedback)
        return policies + episodes + feedback


def _take(rows: Iterator[Row]) -> list[Row]:
    """The next batch: bounded in rows and in bytes."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.raw or b"")
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            break
    return batch


def _reason(error: BadInputError) -> str:
    return error.message.rstrip(".")


# --- which format, which file ---------------------------------------------------------------------


def _choose(source: Path, format: str | None) -> Importer:
    if not source.exists():
        raise BadInputError(
            f"{source} does not exist.", advice="Check the spelling, or give an absolute path."
        )
    if format is not None and format not in IMPORTERS:
        raise BadInputError(
            f"There is no import format {format!r}.", advice=f"Known: {', '.join(sorted(IMPORTERS))}."
        )
    if source.is_file():
        lines.refuse_foreign(source)
    if format is not None:
        return IMPORTERS[format]
    return sniff(source)


def sniff(source: Path) -> Importer:
    """The importer that recognises this file or folder.

    Raises:
        BadInputError: none does; the message says what was seen.
    """
    rows: list[Mapping[str, Any]] = []
    start = b""
    if source.is_file():
        start = lines.head(source).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start.startswith(b"PAR1") and not looks_like_csv(source, start):
            seen = islice(read_json(source, {}), _SNIFFED_LINES)
            objects = (row.value for row in seen if row.value is not None)
            rows = list(islice(objects, _SNIFFED_ROWS))
    for candidate in IMPORTERS.values():
        if candidate.sniff(source, rows):
            return candidate
    if rows:
        keys = ", ".join(sorted({key for row in rows for key in row})[:12]) or "none"
        seen_text = f"its rows have the keys {keys}, which no known kind of feedback has"
    elif source.is_dir():
        seen_text = "the folder holds none of the datasets that can be imported"
    elif b"\x00" in start:
        seen_text = "it looks like a binary file"
    else:
        seen_text = f"not one of its first {_SNIFFED_LINES:,} lines is a JSON object"
    raise BadInputError(
        f"{source} is of no known format: {seen_text}.",
        advice=f"Formats: {', '.join(sorted(IMPORTERS))}; `corrigible import --help` says how rows look.",
    )


def _fingerprint(source: Path) -> str:
    """Names the content without reading all of it: sizes, and the first and last megabyte of each file."""
    digest = hashlib.sha256()
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(source) if source.is_dir() else ''}\0{size}\0".encode())
        with lines.open_binary(file) as opened:
            digest.update(opened.read(_EDGE))
            if size > 2 * _EDGE:
                opened.seek(-_EDGE, os.SEEK_END)
            digest.update(opened.read(_EDGE))
    return digest.hexdigest()[:32]


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:8]
