"""Schema versions, and how records of an older version become records of this one.

Within a version only optional fields are added, so that a reader of ``@1`` loads every earlier ``@1`` record.
Anything else is a new version with a migration here: a pure function from the JSON object of version n to
that of version n + 1. Stored records are not rewritten; they are migrated when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from corrigible.errors import BadInputError

FEEDBACK_SCHEMA: Final[Literal["corrigible/feedback@1"]] = "corrigible/feedback@1"
EPISODE_SCHEMA: Final[Literal["corrigible/episode@1"]] = "corrigible/episode@1"
POLICY_SCHEMA: Final[Literal["corrigible/policy@1"]] = "corrigible/policy@1"

CURRENT: dict[str, int] = {"feedback": 1, "episode": 1, "policy": 1}
"""Schema versions that this release writes."""

Migration = Callable[[dict[str, Any]], dict[str, Any]]
MIGRATIONS: dict[tuple[str, int], Migration] = {}
"""``(schema, n)`` to the function that turns version n into n + 1."""


def migration(schema: str, version: int) -> Callable[[Migration], Migration]:
    """Register the step from ``version`` to the next one."""

    def register(step: Migration) -> Migration:
        MIGRATIONS[schema, version] = step
        return step

    return register


def migrate(value: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a record, brought to the version that this release reads.

    An object without ``schema_version`` is taken to be current.

    Raises:
        BadInputError: when it was written by a later release, or is not one of our schemas.
    """
    record = dict(value)
    name = record.get("schema_version")
    if name is None:
        return record
    match = re.fullmatch(r"corrigible/(\w+)@(\d+)", name) if isinstance(name, str) else None
    if match is None or match[1] not in CURRENT:
        raise BadInputError(
            f"schema_version {name!r} is not one of ours.",
            advice=f"Known are: {', '.join(f'corrigible/{s}@{v}' for s, v in CURRENT.items())}.",
        )
    schema, version = match[1], int(match[2])
    if version > CURRENT[schema]:
        raise BadInputError(
            f"{name} was written by a later release; this one reads up to @{CURRENT[schema]}.",
            advice="Upgrade corrigible, or export the record from the release that wrote it.",
        )
    while version < CURRENT[schema]:
        try:
            record = MIGRATIONS[schema, version](record)
        except BadInputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadInputError(f"this {name} record is malformed: {error}.") from None
        version += 1
        record["schema_version"] = f"corrigible/{schema}@{version}"
    return record


_V0_OUTCOMES = {"first": 1, "second": 1, "tie": 0, "both_bad": 0, "both_good": 0, "incomparable": 0}


@migration("feedback", 0)
def feedback_0_to_1(old: dict[str, Any]) -> dict[str, Any]:
    """The first sketch of a record (kind, target, value, source, axis, presented_order, seconds).

    Version 0 knew comparisons, ratings and reactions, named targets by hash only and in the order of the
    screen, and measured time in seconds.
    """
    kind, shas = old.get("kind"), list(old.get("target", ()))
    places = sorted(range(len(shas)), key=lambda i: shas[i])
    payload = _v0_payload(kind, old.get("value"), old.get("axis", "overall"), places)
    source = old.get("source", {})
    new: dict[str, Any] = {
        "id": old.get("id"),
        "kind": kind,
        "targets": [{"sha256": shas[i], "type": "response"} for i in places],
        "annotator": {"pseudonym": source, "type": "human"} if isinstance(source, str) else source,
        "channel": "import",
        "payload": payload,
        "created_at": round(float(old.get("created_at", 0)) * 1_000_000),
    }
    if old.get("context") is not None:
        new["context"] = old["context"]
    if old.get("presented_order") is not None:
        new["presentation"] = {"order": [places.index(i) for i in old["presented_order"]]}
    if old.get("seconds") is not None:
        new["effort"] = {"active_ms": round(float(old["seconds"]) * 1000)}
    return {key: value for key, value in new.items() if value is not None}


def _v0_payload(kind: Any, value: Any, axis: str, places: list[int]) -> dict[str, Any]:
    if kind == "comparison" and value in _V0_OUTCOMES:
        if places == [1, 0]:
            value = {"first": "second", "second": "first"}.get(value, value)
        return {"kind": kind, "outcome": value, "strength": _V0_OUTCOMES[value], "criterion": axis}
    if kind == "rating" and isinstance(value, int | float):
        scale = {"id": "v0", "min": 0.0, "max": 1.0, "level": "interval"}  # version 0 rated in [0, 1]
        return {"kind": kind, "value": value, "scale": scale, "criterion": axis}
    if kind == "reaction" and value in (-1, 0, 1):
        return {"kind": kind, "value": value}
    raise BadInputError(
        f"a version 0 record of kind {kind!r} with value {value!r} cannot be read.",
        advice="Version 0 knew comparison, rating in [0, 1], and reaction -1, 0, +1.",
    )
