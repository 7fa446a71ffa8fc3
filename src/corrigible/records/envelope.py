"""The envelope's parts: who judged, what they saw, what it cost them, and what may be done with it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer

from corrigible.records.base import Micros, Millis, Record, Sha256, StringSet

Count = Annotated[int, Field(ge=0)]
Channel = Literal["ui", "api", "gateway", "import", "sim"]
Status = Literal["live", "superseded", "withdrawn"]
Scope = Literal["train", "eval", "publish"]

AGGREGATE = "aggregate"
"""Group of an annotator that stands for several people: such a record may carry a probability."""


class Annotator(Record):
    """Who judged. ``version`` is the guideline version of a person, the hash of model, prompt and decoding
    of an AI judge, the code hash of a verifier."""

    pseudonym: str = Field(min_length=1)
    type: Literal["human", "ai_judge", "verifier", "simulated", "environment", "user"]
    version: str | None = None
    groups: StringSet = frozenset()
    expertise: StringSet = frozenset()


class Presentation(Record):
    """What the annotator saw. ``order[p]`` is the index of the target shown at position p; ``assists``
    lists every AI hint that was visible."""

    order: tuple[Count, ...] | None = None
    layout: str | None = None
    blind: bool | None = None
    shown_at: Micros | None = None
    assists: tuple[Sha256, ...] = ()
    guideline: str | None = None
    seed: int | None = None


class Effort(Record):
    """What a judgement cost its annotator.

    ``active_ms`` sums the gaps between input events while the page is visible, each gap capped at 30 000 ms;
    ``clicks`` counts pointer actions that changed the answer; a drag is 1; each polygon vertex is 1; undo
    adds 1 and removes nothing.
    """

    active_ms: Millis = 0
    idle_ms: Millis = 0
    clicks: Count = 0
    drags: Count = 0
    vertices: Count = 0
    keys: Count = 0
    chars_in: Count = 0
    chars_out: Count = 0
    undo: Count = 0
    scrolls: Count = 0
    plays: Count = 0
    assisted: bool = False


class Consent(Record):
    """What the annotator allowed. ``retention_days`` None means no limit."""

    scope: Annotated[frozenset[Scope], PlainSerializer(sorted, return_type=list[str], when_used="json")] = (
        frozenset({"train", "eval"})
    )
    retention_days: Count | None = None
    pii: Literal["raw", "scrubbed"] = "raw"


class PolicyRef(Record):
    """What produced one target: policy version, how it was sampled, summed log-probability in nats."""

    snapshot: str
    sampler: str | None = None
    logprob: float | None = None


class NotJudgedReason(StrEnum):
    """Why a judgement could not be made."""

    cannot_judge = "cannot_judge"
    skipped = "skipped"
    unsafe = "unsafe"
    broken_item = "broken_item"
    timeout = "timeout"
    judge_error = "judge_error"
    parse_error = "parse_error"
    refused = "refused"
    context_overflow = "context_overflow"
    not_applicable = "not_applicable"
    interrupted = "interrupted"


class NotJudged(Record):
    """Value or reason: stands where the payload would, and is never turned into a number."""

    intended: str = Field(min_length=1)
    reason: NotJudgedReason
    detail: str = ""


__all__ = [
    "AGGREGATE",
    "Annotator",
    "Channel",
    "Consent",
    "Effort",
    "NotJudged",
    "NotJudgedReason",
    "PolicyRef",
    "Presentation",
    "Scope",
    "Status",
]
