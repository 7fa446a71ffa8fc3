"""Humour pairs: which of two one-liners is funnier, as vote counts.

Simpson et al. 2019 (ACL), from the UKP humour and metaphor data. The folder holds
``items.jsonl.gz`` and ``pairs.jsonl.gz``. There are no worker ids, only counts, so each pair becomes
one aggregate comparison (criterion ``funny``) whose ``p_first`` is the share of votes and whose
annotator's groups say how many there were (``votes:5``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from corrigible.errors import BadInputError
from corrigible.records import Annotator, Item, Message, comparison
from corrigible.records.envelope import AGGREGATE
from corrigible.store.formats.readers import read_jsonl
from corrigible.store.formats.registry import Origin, Parsed, Row, importer

PROMPT = "Say something funny in one sentence."
_CONTEXT = Item.of_messages([Message(role="user", content=PROMPT)])


def _sniff(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    return path.is_dir() and all(
        any((path / f"{name}.jsonl{end}").is_file() for end in ("", ".gz")) for name in ("items", "pairs")
    )


def _read(folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Pairs joined with their texts; row numbers are lines of the pair table."""
    paths = []
    for name in ("items", "pairs"):
        found = [p for p in (folder / f"{name}.jsonl.gz", folder / f"{name}.jsonl") if p.is_file()]
        if not found:
            raise BadInputError(
                f"{folder} has no {name}.jsonl.gz.", advice="Both tables, items and pairs, are needed."
            )
        paths.append(found[0])
    texts: dict[Any, Mapping[str, Any]] = {}
    for row in read_jsonl(paths[0], options):
        if row.value is None:
            raise BadInputError(f"{paths[0]}, line {row.number}: {row.problem}.")
        texts[row.value.get("item_id")] = row.value
    for row in read_jsonl(paths[1], options):
        if row.value is None:
            yield row
            continue
        first, second = (texts.get(row.value.get(side)) for side in ("item_a", "item_b"))
        if first is None or second is None:
            yield Row(row.number, raw=row.raw, problem="one of the two items is not in the item table")
            continue
        yield Row(row.number, {"pair": row.value, "a": first, "b": second}, row.raw)


@lru_cache(maxsize=256)
def _annotator(votes: int) -> Annotator:
    return Annotator(
        pseudonym="aggregate:humour-pairs", type="human", groups=frozenset({AGGREGATE, f"votes:{votes}"})
    )


@importer("humour-pairs", read=_read, sniff=_sniff)
def parse(row: Mapping[str, Any], origin: Origin) -> Parsed:
    """The humour-pairs folder: vote counts between one-liners, one aggregate comparison a pair."""
    pair, first, second = row["pair"], row["a"], row["b"]
    for_a, for_b = pair.get("votes_a"), pair.get("votes_b")
    if not isinstance(for_a, int) or not isinstance(for_b, int) or min(for_a, for_b) < 0 or for_a + for_b < 1:
        raise BadInputError("votes_a and votes_b must be whole numbers, at least one of them above 0")
    if first["text"] == second["text"]:
        raise BadInputError("the two texts are equal: nothing was preferred")
    if for_b > for_a:
        first, second, for_a, for_b = second, first, for_b, for_a
    tie = for_a == for_b
    origin.seeded([first["text"], second["text"], for_a, for_b])
    record, items = comparison(
        PROMPT,
        first["text"],
        second["text"],
        context_item=_CONTEXT,
        annotator=_annotator(for_a + for_b),
        criterion="funny",
        strength=0 if tie else 1,
        tie=tie,
        p_chosen=for_a / (for_a + for_b),
        **origin.envelope(),
    )
    not_held = [f"item.{key}" for key in ("bws_score", "category") if first.get(key) is not None]
    return Parsed([record], list(items), not_held=not_held)
