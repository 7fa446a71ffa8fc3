"""UKPConvArg1: which of two arguments on the same side of a debate is more convincing.

Habernal and Gurevych 2016, "Which argument is more convincing?" (ACL). The folder holds
``arguments.jsonl.gz``, ``pairs.jsonl.gz`` and ``votes.jsonl.gz``; every vote becomes one comparison
(criterion ``convincing``) by the worker who gave it, with the worker's reason as its rationale and
the worker's own stance as a group. ``equal`` is a tie. The prompt is the debate's title and the side
argued for; ``task_id`` is the topic, so that a split by task is a split by topic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Annotator, Item, Message, comparison
from corrigible.store.formats.readers import read_jsonl
from corrigible.store.formats.registry import Origin, Parsed, Row, importer

_FILES = ("arguments.jsonl", "pairs.jsonl", "votes.jsonl")


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise BadInputError(
        f"{folder} has no {name} or {name}.gz.", advice="All three tables of UKPConvArg1 are needed."
    )


def _sniff(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    return path.is_dir() and all(
        (path / name).is_file() or (path / f"{name}.gz").is_file() for name in _FILES
    )


def _table(path: Path, key: str, options: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    table: dict[str, Mapping[str, Any]] = {}
    for row in read_jsonl(path, options):
        if row.value is None:
            raise BadInputError(f"{path}, line {row.number}: {row.problem}.")
        table[str(row.value.get(key))] = row.value
    return table


def _read(folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Votes joined with their pair and its two arguments; row numbers are lines of the vote table."""
    arguments = _table(_find(folder, "arguments.jsonl"), "arg_id", options)
    pairs = _table(_find(folder, "pairs.jsonl"), "pair_id", options)
    for row in read_jsonl(_find(folder, "votes.jsonl"), options):
        if row.value is None:
            yield row
            continue
        vote = row.value
        pair = pairs.get(str(vote.get("pair_id")))
        if pair is None:
            yield Row(
                row.number, raw=row.raw, problem=f"the pair {vote.get('pair_id')!r} is not in the pair table"
            )
            continue
        first, second = (arguments.get(str(pair.get(side))) for side in ("arg1", "arg2"))
        if first is None or second is None:
            yield Row(
                row.number, raw=row.raw, problem=f"an argument of the pair {pair['pair_id']!r} is missing"
            )
            continue
        yield Row(row.number, {"vote": vote, "pair": pair, "arg1": first, "arg2": second}, row.raw)


@importer("ukp-convarg1", read=_read, sniff=_sniff)
def parse(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """The UKPConvArg1 folder: five crowd votes a pair, with workers, reasons and ties."""
    vote, pair, first, second = row["vote"], row["pair"], row["arg1"], row["arg2"]
    value = vote.get("value")
    if value not in ("a1", "a2", "equal"):
        raise BadInputError(f"the vote is {value!r}, where a1, a2 or equal was expected")
    if first["text"] == second["text"]:
        raise BadInputError("the two arguments are equal: nothing was preferred")
    chosen, rejected = (second, first) if value == "a2" else (first, second)
    origin.seeded([vote, first["text"], second["text"]])
    record, items = comparison(
        "",
        chosen["text"],
        rejected["text"],
        context_item=_context(first["title"], first["stance"]),
        annotator=_annotator(str(vote["worker"]), vote.get("workerStance")),
        criterion="convincing",
        strength=0 if value == "equal" else 1,
        tie=value == "equal",
        **origin.envelope(
            task_id=str(pair["topic"]), rationale=str(vote["reason"]) if vote.get("reason") else None
        ),
    )
    not_held = [f"vote.{key}" for key in ("turkCompetence", "hit_seconds") if vote.get(key) is not None]
    not_held += [f"pair.{key}" for key in ("gold_label", "strict_label") if pair.get(key) is not None]
    return Parsed([record], list(items), not_held=not_held)


@lru_cache(maxsize=4096)
def _annotator(worker: str, stance: str | None) -> Annotator:
    groups = frozenset({f"stance:{stance}"} if stance else ())
    return Annotator(pseudonym=worker, type="human", groups=groups)


@lru_cache(maxsize=256)
def _context(title: str, stance: str) -> Item:
    """What a debater was asked: the debate's title and the side to argue for."""
    return Item.of_messages([Message(role="user", content=f"Debate: {title}\nArgue for this side: {stance}")])
