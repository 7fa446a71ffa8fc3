"""A look over the whole store: how much there is of what, and which record an abbreviated id means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Column, func, select

from corrigible.errors import BadInputError
from corrigible.store import schema

Fetch = Callable[[Any], Sequence[Any]]

_BEGINNING = re.compile(r"[0-9a-f]{6,64}")


def tally(fetch: Fetch, top: int) -> dict[str, Any]:
    """Records of each sort; judgements by kind, annotator, task and campaign (the ``top`` most frequent)."""
    totals: dict[str, int] = {}
    for table in (schema.feedback, schema.item, schema.episode, schema.policy):
        totals[table.name] = int(fetch(select(func.count()).select_from(table))[0][0])
    found: dict[str, Any] = {"totals": totals}
    for name in ("kind", "annotator", "task", "campaign"):
        column: Column[str] = schema.feedback.c[name]
        count = func.count()
        counted = select(column, count).where(column.is_not(None)).group_by(column)
        rows = fetch(counted.order_by(count.desc(), column).limit(top))
        found[name] = {str(row[0]): int(row[1]) for row in rows}
        totals[f"{name}s"] = int(fetch(select(func.count(func.distinct(column))))[0][0])
    return found


def find(fetch: Fetch, name: str) -> tuple[str, str]:
    """Table and full id of the one record whose id (or hash) is or begins with ``name``."""
    if not _BEGINNING.fullmatch(name.replace("-", "")):
        raise BadInputError(
            f"{name!r} is no id.", advice="Ids are hexadecimal; give at least the first six letters."
        )
    found: list[tuple[str, str]] = []
    for table in (schema.feedback, schema.episode, schema.policy, schema.item):
        column = table.c.sha256 if table is schema.item else table.c.id
        # "g" sorts behind every hexadecimal digit.
        rows = fetch(select(column).where(column >= name, column < name + "g").limit(3))
        found += [(table.name, str(row[0])) for row in rows]
    found = [one for one in found if one[1] == name] or found
    if not found:
        raise BadInputError(
            f"The store holds nothing with the id {name}.", advice="Check the id, and which store is open."
        )
    if len(found) > 1:
        named = ", ".join(f"{table} {full}" for table, full in found[:4])
        raise BadInputError(f"{name} begins several ids: {named}.", advice="Give more letters of the id.")
    return found[0]
