"""Tables: CSV, Parquet and Hugging Face datasets on disk, both ways.

In: rows of any known shape (see :mod:`corrigible.store.formats.shapes`), two more that live in
tables, and our own table. Out: our own table, one row a judgement. Its first columns are for
people; ``record`` and ``items`` hold everything, so what was exported comes back exactly.

| columns | record |
|---|---|
| prompt, response_a, response_b, winner (a, b, tie, both_bad) | comparison |
| prompt, response, rating (and optional rating_min, rating_max) | rating |
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Feedback, Item, Rating, Scale, TargetRef, comparison
from corrigible.store.formats import lines
from corrigible.store.formats.exporting import ExportRun, prompt_of, references
from corrigible.store.formats.readers import looks_like_csv, read_csv, read_hf, read_json, read_parquet
from corrigible.store.formats.registry import EVERYTHING, Entry, Origin, Parsed, exporter, importer
from corrigible.store.formats.shapes import (
    conversation,
    given,
    has,
    messages_of,
    parse_any,
    recognise,
    response,
    response_item,
    shape,
    simplest,
    unknown_keys,
)

_WINNERS = {
    "a": "a", "model_a": "a", "response_a": "a", "1": "a", "first": "a", "left": "a",
    "b": "b", "model_b": "b", "response_b": "b", "2": "b", "second": "b", "right": "b",
    "tie": "tie", "equal": "tie", "both_bad": "both_bad", "tie (bothbad)": "both_bad",
    "both_good": "both_good",
}  # fmt: skip


@shape("side-by-side", format="jsonl", matches=has("prompt", "response_a", "response_b", "winner"))
def side_by_side(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """Two responses and who won, as chat arenas and spreadsheets have it."""
    winner = _WINNERS.get(str(row["winner"]).strip().lower())
    if winner is None:
        raise BadInputError(f"winner is {row['winner']!r}, where a, b, tie or both_bad was expected")
    prompt = conversation(row["prompt"], "prompt")
    first, second = (response(row[f"response_{side}"], f"response_{side}") for side in "ab")
    chosen, rejected = (second, first) if winner == "b" else (first, second)
    said = given(row, origin)
    record, items = comparison(
        prompt,
        chosen,
        rejected,
        annotator=said.annotator,
        criterion=said.criterion,
        strength=1 if said.strength is None else said.strength,
        outcome="chosen" if winner in "ab" else winner,  # type: ignore[arg-type]
        **said.envelope,
    )
    return Parsed([record], items, not_held=unknown_keys(row, "prompt", "response_a", "response_b", "winner"))


@shape("rating", format="jsonl", matches=has("prompt", "response", "rating"))
def rating(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """One response and a number on a scale (1 to 5 unless rating_min and rating_max say otherwise)."""
    try:
        value, low, high = (
            float(row[key] if row.get(key) not in (None, "") else default)
            for key, default in (("rating", ""), ("rating_min", 1), ("rating_max", 5))
        )
    except (TypeError, ValueError):
        raise BadInputError(f"rating is {row['rating']!r}, not a number") from None
    context = Item.of_messages(conversation(row["prompt"], "prompt"))
    target = response_item(response(row["response"], "response"))
    said = given(row, origin)
    scale = Scale(id=f"{low:g}-{high:g}", min=low, max=high)
    record = Feedback.on(
        [TargetRef.of(target)],
        Rating(value=value, scale=scale, criterion=said.criterion),
        annotator=said.annotator,
        context=context.sha256,
        **said.envelope,
    )
    known = ("prompt", "response", "rating", "rating_min", "rating_max")
    return Parsed([record], [context, target], not_held=unknown_keys(row, *known))


@shape("corrigible-table", format="jsonl", matches=has("record", "items"))
def own_table(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A row of our own table: the whole record and the items it points to."""
    record, items = (json.loads(v) if isinstance(v, str) else v for v in (row["record"], row["items"]))
    return Parsed([Feedback.from_json(record)], [Item.from_json(item) for item in items])


@importer("csv", read=read_csv, sniff=lambda path, rows: path.is_file() and looks_like_csv(path))
def parse_csv(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """CSV or TSV with a header; rows of any known shape."""
    # An empty cell is an absent one: CSV cannot tell them apart.
    return parse_any({k: v for k, v in row.items() if v != ""}, origin)


@importer(
    "parquet",
    read=read_parquet,
    sniff=lambda path, rows: path.is_file() and lines.head(path, 4) == b"PAR1",
)
def parse_parquet(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """Parquet; rows of any known shape."""
    return parse_any(row, origin)


def _is_saved_dataset(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    return path.is_dir() and (
        (path / "dataset_dict.json").is_file()
        or ((path / "dataset_info.json").is_file() and (path / "state.json").is_file())
    )


@importer("hf-dataset", read=read_hf, sniff=_is_saved_dataset)
def parse_hf(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """A Hugging Face Dataset or DatasetDict folder (save_to_disk); rows of any known shape."""
    return parse_any(row, origin)


@importer("jsonl", read=read_json, sniff=lambda path, rows: any(recognise(row) for row in rows))
def parse_jsonl(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """JSON lines (or a JSON array) whose rows are of several shapes, or of a shape without a name."""
    return parse_any(row, origin)


# --- out ------------------------------------------------------------------------------------------

COLUMNS = (
    "id", "created_at", "kind", "annotator", "annotator_type", "criterion", "task_id", "campaign_id",
    "prompt", "first", "second", "value", "rationale", "record", "items",
)  # fmt: skip


def table_row(entry: Entry) -> dict[str, Any]:
    """One row of our own table; every cell is text, a whole number or None."""
    record = entry.feedback
    texts = [_shown(entry, target.sha256) for target in record.targets[:2]]
    known = [entry.items[sha] for sha in sorted(references(record)) if sha in entry.items]
    return {
        "id": record.id,
        "created_at": record.created_at,
        "kind": record.kind,
        "annotator": record.annotator.pseudonym,
        "annotator_type": record.annotator.type,
        "criterion": getattr(record.payload, "criterion", None),
        "task_id": record.task_id,
        "campaign_id": record.campaign_id,
        "prompt": "\n\n".join(m.text for m in _prompt(entry)) or None,
        "first": texts[0],
        "second": texts[1] if len(texts) > 1 else None,
        "value": _value(record),
        "rationale": record.rationale,
        "record": record.to_json_text(),
        "items": json.dumps([item.to_json() for item in known], ensure_ascii=False),
    }


def _prompt(entry: Entry) -> Any:
    try:
        return prompt_of(entry)
    except BadInputError:
        return ()


def _shown(entry: Entry, sha256: str) -> str | None:
    item = entry.items.get(sha256)
    if item is None or item.text is None:
        return None
    simple = simplest(messages_of(item))
    return simple if isinstance(simple, str) else "\n\n".join(m.text for m in simple)


def _value(record: Feedback) -> str | None:
    for name in ("outcome", "value", "text", "levels", "values", "decision", "event"):
        value = getattr(record.payload, name, None)
        if value is not None:
            return value if isinstance(value, str) else json.dumps(value)
    return record.not_judged.reason.value if record.not_judged else None


@exporter("csv", holds=EVERYTHING)
def export_csv(run: ExportRun) -> None:
    """CSV, one row a judgement, lossless (a .tsv name writes tabs)."""
    tabs = ".tsv" in run.path.suffixes
    with run.writer() as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.DictWriter(
            text, COLUMNS, delimiter="\t" if tabs else ",", lineterminator="\n", quoting=csv.QUOTE_MINIMAL
        )
        writer.writeheader()
        writer.writerows(run.rows(table_row))
        text.flush()
        text.detach()


def _schema() -> Any:
    import pyarrow

    return pyarrow.schema(
        [(name, pyarrow.int64() if name == "created_at" else pyarrow.large_string()) for name in COLUMNS]
    )


def _tables(run: ExportRun) -> Iterator[Any]:
    import pyarrow

    rows = run.rows(table_row)
    while chunk := list(islice(rows, 1000)):
        yield pyarrow.Table.from_pylist(chunk, schema=_schema())


@exporter("parquet", holds=EVERYTHING)
def export_parquet(run: ExportRun) -> None:
    """Parquet, one row a judgement, lossless."""
    import pyarrow.parquet

    with run.place() as partial, pyarrow.parquet.ParquetWriter(partial, _schema()) as writer:
        for table in _tables(run):
            writer.write_table(table)


@exporter("hf-dataset", holds=EVERYTHING)
def export_hf(run: ExportRun) -> None:
    """A Hugging Face Dataset folder (load_from_disk), one row a judgement, lossless."""
    import datasets
    import pyarrow

    with run.place() as partial:
        tables = list(_tables(run))
        table = pyarrow.concat_tables(tables) if tables else _schema().empty_table()
        hidden = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()  # our own events say how far it is
        try:
            datasets.Dataset(table).save_to_disk(str(partial))
        finally:
            if not hidden:
                datasets.enable_progress_bars()
