"""Writing records out, and keeping the account of what a format could not hold."""

from __future__ import annotations

import gzip
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from corrigible.errors import BadInputError, StorageError
from corrigible.events import Progress, emit
from corrigible.records import Comparison, Feedback, Item
from corrigible.store.formats.registry import EXPORTERS, UNKNOWN_ANNOTATOR, Entry, Exporter
from corrigible.store.formats.shapes import Messages, messages_of

if TYPE_CHECKING:
    from corrigible.store import Store

ToRow = Callable[[Entry], Mapping[str, Any]]

_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
_CHUNK = 500
#: Envelope fields that every importer restores by itself.
_REGENERATED = frozenset(
    {
        "schema_version",
        "judgement_id",
        "channel",
        "payload",
        "not_judged",
        "targets",
        "context",
        "status",
        "kind",
    }
)


@dataclass(frozen=True)
class ExportReport:
    """What was written, how many records lost which field (or could not be written at all), and what
    importing it into the same store would do (``reimport``, a sentence for people)."""

    format: str
    path: str
    written: int
    skipped: int
    not_held: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    reimport: str = ""


class ExportRun:
    """One export under way: the records to write, where to, and the account."""

    def __init__(
        self,
        store: Store,
        path: Path,
        exporter: Exporter,
        options: Mapping[str, Any],
        filters: Mapping[str, Any],
    ) -> None:
        self.store = store
        self.path = path
        self.exporter = exporter
        self.options = options
        self.filters = {k: v for k, v in filters.items() if v is not None}
        self.not_held: Counter[str] = Counter()
        self.written = 0
        self.skipped = 0

    def entries(self) -> Iterator[Entry]:
        """The records that the filters let through, in time order, with their items."""
        stream = self.store.feedback(**self.filters)
        done = 0
        while chunk := list(islice(stream, _CHUNK)):
            wanted = {record.id: references(record) for record in chunk}
            items = self.store.items(sorted(set().union(*wanted.values())))
            for record in chunk:
                yield Entry(record, items)
            done += len(chunk)
            emit(Progress(task=f"exporting {self.exporter.name}", done=done, total=None, unit="record"))

    def rows(self, convert: ToRow) -> Iterator[Mapping[str, Any]]:
        """Rows of the records that can be written; the others are counted with the reason."""
        for entry in self.entries():
            try:
                row = convert(entry)
            except BadInputError as error:
                self.skipped += 1
                self.lose(f"{entry.feedback.kind}: {error.message.rstrip('.')}")
                continue
            self.account(entry.feedback)
            self.written += 1
            yield row

    def lose(self, what: str) -> None:
        """Count one record that loses ``what``."""
        self.not_held[what] += 1

    def account(self, record: Feedback) -> None:
        """Count every field of ``record`` that is set and that the format has no place for."""
        holds = self.exporter.holds
        if "*" in holds:
            return
        for name in type(record).model_fields:
            if name in holds or name in _REGENERATED:
                continue
            value = getattr(record, name)
            if name == "annotator":
                if value != UNKNOWN_ANNOTATOR:
                    self.lose("annotator")
            elif value not in (None, (), frozenset(), 0) and value != type(record).model_fields[name].default:
                factory = type(record).model_fields[name].default_factory
                if factory is None or name in ("id", "created_at") or value != factory():  # type: ignore[call-arg]
                    self.lose(name)
        if record.payload is not None:
            for name, info in type(record.payload).model_fields.items():
                key = f"{record.kind}.{name}"
                if name == "kind" or key in holds or info.is_required():
                    continue
                usual = info.get_default(call_default_factory=True, validated_data=record.payload.__dict__)
                if getattr(record.payload, name) != usual:
                    self.lose(key)
        if any(target.episode or target.role for target in record.targets):
            self.lose("targets.episode")

    def write_jsonl(self, convert: ToRow) -> None:
        """One JSON object a line."""
        with self.writer() as file:
            for row in self.rows(convert):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))

    def write_array(self, convert: ToRow) -> None:
        """One JSON array, one element a line."""
        with self.writer() as file:
            file.write(b"[")
            for index, row in enumerate(self.rows(convert)):
                file.write((",\n" if index else "\n").encode() + json.dumps(row, ensure_ascii=False).encode())
            file.write(b"\n]\n")

    @contextmanager
    def writer(self) -> Iterator[IO[bytes]]:
        """The output file, gzip when its name says so; in place only when all of it is written."""
        with self.place() as partial:
            if self.path.suffix == ".gz":
                # mtime=0: the same records give the same bytes.
                with partial.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
                    yield file  # type: ignore[misc]
            else:
                with partial.open("wb") as file:
                    yield file

    @contextmanager
    def place(self) -> Iterator[Path]:
        """A path beside the output to write to, renamed when done and removed when not."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if partial.is_file():
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror or error}.",
                advice="Free some space or choose another place; no half-written file was left.",
            ) from error
        finally:
            with suppress(OSError):
                if partial.is_dir():
                    import shutil

                    shutil.rmtree(partial)
                else:
                    partial.unlink(missing_ok=True)


def references(record: Feedback) -> set[str]:
    """Every content hash a record mentions: targets, context, assists, and those in its payload."""
    return set(_SHA256.findall(record.to_json_text()))


def prompt_of(entry: Entry) -> Messages:
    """The messages of the record's context; none when it has no context."""
    if entry.feedback.context is None:
        return ()
    return messages_of(entry.item(entry.feedback.context), role="user")


def pair_of(entry: Entry) -> tuple[Messages, Item, Item]:
    """Prompt, chosen and rejected of a comparison that was decided.

    Raises:
        BadInputError: not a comparison, or one without a winner.
    """
    payload = entry.feedback.payload
    if not isinstance(payload, Comparison):
        raise BadInputError("not a comparison" if payload is not None else "not judged")
    order = {"first": (0, 1), "second": (1, 0)}.get(payload.outcome)
    if order is None:
        raise BadInputError(f"outcome {payload.outcome}, no winner")
    chosen, rejected = (entry.item(entry.feedback.targets[index].sha256) for index in order)
    return prompt_of(entry), chosen, rejected


def export_file(
    store: Store,
    path: str | Path,
    *,
    format: str,
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
    **filters: Any,
) -> ExportReport:
    """Write the feedback that ``filters`` let through to ``path``.

    Args:
        format: a name in ``EXPORTERS``.
        overwrite: replace a file that exists.
        options: what the format understands, see ``EXPORTERS[format].options``.
        **filters: as for :meth:`Store.feedback` (kind, annotator, policy, task, campaign, …, limit).

    Raises:
        BadInputError: unknown format or option, the file exists, or it is the store itself.
        StorageError: the disk is full or the place cannot be written.
    """
    began = time.perf_counter()
    path = Path(path)
    found = EXPORTERS.get(format)
    if found is None:
        raise BadInputError(
            f"There is no export format {format!r}.", advice=f"Known: {', '.join(sorted(EXPORTERS))}."
        )
    unknown = sorted(set(options or {}) - set(found.options))
    if unknown:
        known = "; ".join(f"{k} ({v})" for k, v in found.options.items()) or "none"
        raise BadInputError(f"{format} has no option {unknown[0]!r}.", advice=f"Its options: {known}.")
    if path.exists() and not overwrite:
        raise BadInputError(f"{path} exists already.", advice="Choose another name, or say --overwrite.")
    if store.holds(path):
        raise BadInputError(
            f"{path} is part of the store that is exported, and would be lost.", advice="Choose another name."
        )
    run = ExportRun(store, path, found, options or {}, filters)
    found.write(run)
    return ExportReport(
        format,
        str(path),
        run.written,
        run.skipped,
        dict(sorted(run.not_held.items())),
        round(time.perf_counter() - began, 3),
        _reimport(run),
    )


def _reimport(run: ExportRun) -> str:
    """What importing the file into the store it came from would do: it depends on whether ids are held."""
    if not run.written:
        return ""
    if not run.not_held["id"]:
        return "it holds every record's id: imported into this store again, it adds nothing"
    return (
        f"it does not hold the records' ids: imported into this store again, it adds the {run.written:,} "
        "records a second time, but for rows that are word for word as they once came in"
    )
