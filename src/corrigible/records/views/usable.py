"""Which records a view may use: live, of a known kind, and with consent that still holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from corrigible.records.base import now_us
from corrigible.records.envelope import Scope
from corrigible.records.feedback import Feedback
from corrigible.records.payloads import PayloadBase

DAY_US = 86_400_000_000


def is_usable(record: Feedback, scope: Scope = "train", at: int | None = None) -> bool:
    """Whether one record is live, judged, of a known kind, and consented to for ``scope`` at time ``at``.

    ``at`` is in microseconds UTC, None is now; it decides whether the retention has run out.
    """
    consent = record.consent
    if record.status != "live" or scope not in consent.scope or not isinstance(record.payload, PayloadBase):
        return False
    if consent.retention_days is None:
        return True
    return (now_us() if at is None else at) < record.created_at + consent.retention_days * DAY_US


def usable(
    records: Iterable[Feedback],
    scope: Scope = "train",
    *,
    at: int | None = None,
    superseded: Collection[str] | None = None,
) -> Iterator[Feedback]:
    """The records that a view may use.

    ``superseded`` are ids known to be replaced or withdrawn. None looks for them among ``records``, which
    holds all of them in memory; pass an empty collection when the store has sorted them out already.
    """
    if superseded is None:
        records = list(records)
        superseded = {r.supersedes for r in records if r.supersedes is not None}
    for record in records:
        if record.id not in superseded and is_usable(record, scope, at):
            yield record
