"""From a path to numbered rows: JSON lines, JSON arrays, CSV, Parquet, Hugging Face datasets.

Readers never raise for one bad row: they yield a :class:`Row` with a ``problem`` and go on. They
raise :class:`BadInputError` only for a file that cannot be read at all.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.store.formats import lines
from corrigible.store.formats.lines import Line, read_lines
from corrigible.store.formats.registry import Row

#: A CSV record may span this many lines; a quote left open longer than that is an error of one line.
_MAX_CSV_SPAN = 2000
#: Columns whose cells hold JSON when they begin like JSON.
_JSON_COLUMNS = frozenset(
    {"prompt", "chosen", "rejected", "completion", "completions", "labels", "messages", "response"}
    | {"response_a", "response_b", "record", "items", "input", "preferred_output", "non_preferred_output"}
)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    got = dict(pairs)
    if len(got) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[0]!r} appears twice in one object")
    return got


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def _json_row(line: Line) -> Row:
    if line.problem:
        extent = {"bytes": line.length, "offset": line.offset, "sha256": line.sha256} if line.sha256 else None
        return Row(line.number, raw=line.raw, problem=line.problem, extent=extent)
    try:
        text = line.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Row(
            line.number,
            raw=line.raw,
            problem=f"not valid UTF-8: byte 0x{line.raw[error.start]:02x} at position {error.start} "
            "(perhaps Latin-1 or Windows-1252)",
        )
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Row(line.number, raw=line.raw, problem=f"not valid JSON: {reason}")
    if not isinstance(value, dict):
        return Row(
            line.number, raw=line.raw, problem=f"a JSON {_json_type(value)} where an object was expected"
        )
    return Row(line.number, value, line.raw)


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def read_jsonl(path: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """One JSON object a line."""
    for line in read_lines(path, options.get("max_line_bytes", lines.MAX_LINE_BYTES)):
        yield _json_row(line)


def read_json(path: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """A JSON array of objects, one object, or (when it is neither) one JSON object a line.

    The array is decoded element by element, so that what precedes a broken element is imported.
    """
    start = lines.head(path, 65536).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        # One object printed over many lines begins with a brace on a line of its own.
        if start.split(b"\n", 1)[0].strip() == b"{" and (whole := _whole(path)) is not None:
            yield Row(1, whole)
            return
        yield from read_jsonl(path, options)
        return
    text = _text(path)
    position, number = text.index("[") + 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position >= len(text):
            yield Row(number + 1, raw=b"", problem="the JSON array is not closed; the file may be cut off")
            return
        if text[position] == "]":
            return
        number += 1
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield Row(
                number,
                raw=text[position:].encode("utf-8", "surrogatepass"),
                problem=f"not valid JSON from element {number} on: {error}",
            )
            return
        raw = text[position:end].encode("utf-8", "surrogatepass")
        position = end
        if isinstance(value, dict):
            yield Row(number, value, raw)
        else:
            yield Row(number, raw=raw, problem=f"a JSON {_json_type(value)} where an object was expected")


def _text(path: Path) -> str:
    pieces: list[bytes] = []
    size = 0
    # Arrays have to be held whole; a gigabyte of labels is not a labelling project.
    for line in read_lines(path, 1 << 30):
        if line.problem:
            raise BadInputError(f"{path}, line {line.number}: {line.problem}.")
        pieces.append(line.raw)
        size += line.length
        if size > 1 << 30:
            raise BadInputError(
                f"{path} is a JSON array of more than 1 GiB.", advice="Export it as JSON lines instead."
            )
    try:
        return b"\n".join(pieces).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path} is not valid UTF-8 (byte {error.start:,}).",
            advice="Convert it first: iconv -f LATIN1 -t UTF-8.",
        ) from None


def _whole(path: Path) -> dict[str, Any] | None:
    try:
        value = _DECODER.decode(_text(path))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_csv(path: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """CSV or TSV with a header; the separator (comma, semicolon, tab, bar) is taken from it."""
    records = _csv_records(
        read_lines(path, options.get("max_line_bytes", lines.MAX_LINE_BYTES), keep_blank=True)
    )
    header = next(records, None)
    if header is None:
        raise BadInputError(f"{path} is empty.", advice="Nothing to import; was the download complete?")
    number, raw, problem = header
    if problem:
        raise BadInputError(f"{path}: the header cannot be read: {problem}.")
    text = raw.decode("utf-8", "surrogateescape")
    separator = max(",;\t|", key=lambda mark: (text.count(mark), mark == ","))
    names = [name.strip().removeprefix("\ufeff") for name in _split(text, separator)]
    if len(set(names)) != len(names):
        raise BadInputError(f"{path}: two columns have the same name.", advice=f"The header reads: {text}")
    for number, raw, problem in records:
        if problem:
            yield Row(number, raw=raw, problem=problem)
            continue
        text = raw.decode("utf-8", "surrogateescape")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            yield Row(number, raw=raw, problem=f"not valid UTF-8 at character {error.start} of the row")
            continue
        try:
            cells = _split(text, separator)
        except csv.Error as error:
            yield Row(number, raw=raw, problem=f"not valid CSV: {error}")
            continue
        if len(cells) != len(names):
            yield Row(
                number, raw=raw, problem=f"{len(cells)} cells where the header has {len(names)} columns"
            )
            continue
        yield Row(number, {n: _cell(n, c) for n, c in zip(names, cells, strict=True)}, raw)


def looks_like_csv(path: Path, start: bytes | None = None) -> bool:
    """Whether the name or, failing that, the first line says CSV or TSV."""
    if {".csv", ".tsv"} & set(path.suffixes):
        return True
    start = lines.head(path).removeprefix(b"\xef\xbb\xbf").lstrip() if start is None else start
    header = start.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    if not header or header[0] in "[{" or "\x00" in header:
        return False
    for mark in ",;\t|":
        names = {cell.strip().strip('"') for cell in header.split(mark)}
        if {"prompt", "chosen", "record"} & names and len(names) > 1:
            return True
    return False


def _split(text: str, separator: str) -> list[str]:
    csv.field_size_limit(lines.MAX_LINE_BYTES)
    # newline="": a quoted cell keeps its line breaks, whichever they are.
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    if len(rows) != 1:
        raise csv.Error("the row does not end where its line ends")
    return rows[0]


def _cell(name: str, cell: str) -> Any:
    if name in _JSON_COLUMNS and cell[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _csv_records(source: Iterator[Line]) -> Iterator[tuple[int, bytes, str]]:
    """(first line number, verbatim bytes, problem) of each record.

    A record ends at the first line end outside quotes, which is where the number of quote marks
    so far is even. A quote that never closes costs its own line only, not the rest of the file.
    """
    pending: list[Line] = []
    while True:
        span: list[Line] = []
        quotes = 0
        while True:
            line = pending.pop(0) if pending else next(source, None)
            if line is None:
                break
            if line.problem:
                if span:
                    pending.insert(0, line)
                    line = None
                else:
                    yield line.number, line.raw, line.problem
                    continue
                break
            if not span and not line.raw.strip():
                continue
            span.append(line)
            quotes += line.raw.count(b'"')
            if quotes % 2 == 0 or len(span) > _MAX_CSV_SPAN:
                break
        if not span:
            return
        if quotes % 2:
            first, *rest = span
            pending[:0] = rest
            yield first.number, first.raw, "a quote is opened and never closed"
            continue
        raw = b"\n".join(line.raw for line in span).removesuffix(b"\r")
        yield span[0].number, raw, ""


def read_parquet(path: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """A Parquet file, batch by batch."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise BadInputError(
            f"{path} is not a readable Parquet file: {error}",
            advice="Was the download complete? Parquet files cannot be read in part.",
        ) from None
    number = 0
    with file:
        batches = file.iter_batches(batch_size=1000)
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                yield Row(number + 1, raw=b"", problem=f"damaged from here on: {error}")
                return
            if batch is None:
                return
            for value in batch.to_pylist():
                number += 1
                yield Row(number, value)


def read_hf(path: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """A folder written by ``save_to_disk``: a Dataset, or every split of a DatasetDict in order."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise BadInputError(
            f"{path} holds no dataset that was saved with save_to_disk.",
            advice="It needs a dataset_info.json and state.json, or a dataset_dict.json.",
        ) from None
    except Exception as error:
        raise BadInputError(
            f"{path} cannot be read as a Hugging Face dataset: {error}",
            advice="Save it again with Dataset.save_to_disk.",
        ) from None
    splits = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    number = 0
    for split in splits:
        for batch in split.with_format(None).iter(batch_size=1000):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(number, dict(zip(names, values, strict=True)))
