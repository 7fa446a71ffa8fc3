"""Policy versions: what acts, what it came from, and what it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from corrigible.records.base import Micros, Record, Sha256, new_id, now_us
from corrigible.records.migrations import POLICY_SCHEMA


class TrainedOn(Record):
    """The feedback a policy version learned from: how many records, which, and how they were chosen.

    ``feedback_digest`` is the SHA-256 of the record ids, sorted and joined by newlines.
    """

    feedback: int = Field(ge=0)
    feedback_digest: Sha256
    first_id: str | None = None
    last_id: str | None = None
    filter: dict[str, JsonValue] = Field(default_factory=dict)

    @classmethod
    def of(cls, ids: Iterable[str], **filter: JsonValue) -> Self:
        """What training on the records ``ids`` (in any order, repeats ignored) amounts to."""
        found = sorted(set(ids))
        return cls(
            feedback=len(found),
            feedback_digest=hashlib.sha256("\n".join(found).encode()).hexdigest(),
            first_id=found[0] if found else None,
            last_id=found[-1] if found else None,
            filter=filter,
        )


class PolicyVersion(Record):
    """One version of a policy. ``weights`` is the SHA-256 of its weights, or of its adapter if it has one.

    ``adapter`` is a path or the hash of a blob. ``scores`` holds numbers, or objects with value and interval.
    """

    schema_version: Literal["corrigible/policy@1"] = POLICY_SCHEMA
    id: str = Field(default_factory=new_id, min_length=1)
    name: str = Field(min_length=1)
    parent: str | None = None
    base_model: str
    weights: str
    adapter: str | None = None
    algorithm: str | None = None
    config: dict[str, JsonValue] = Field(default_factory=dict)
    trained_on: TrainedOn | None = None
    scores: dict[str, float | dict[str, JsonValue]] = Field(default_factory=dict)
    created_at: Micros = Field(default_factory=now_us)
    created_by: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.parent == self.id:
            raise ValueError("a policy version cannot be its own parent")
        return self
