"""The options by which ``export`` and ``show`` choose judgements."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corrigible.errors import BadInputError

if TYPE_CHECKING:
    from corrigible.store import Store

Kind = Annotated[str | None, typer.Option("--kind", help="Only this kind of feedback, e.g. comparison.")]
Who = Annotated[str | None, typer.Option("--annotator", help="Only by this annotator (pseudonym).")]
Policy = Annotated[str | None, typer.Option("--policy", help="Only about this policy version (id or name).")]
Task = Annotated[str | None, typer.Option("--task", help="Only of this task.")]
Campaign = Annotated[str | None, typer.Option("--campaign", help="Only of this campaign.")]
Criterion = Annotated[str | None, typer.Option("--criterion", help="Only on this criterion.")]
Since = Annotated[
    str | None, typer.Option("--since", help="Given at or after this time (ISO 8601, UTC unless it says).")
]
Until = Annotated[str | None, typer.Option("--until", help="Given before this time.")]
Status = Annotated[str, typer.Option("--status", help="live, superseded, withdrawn or all.")]


def feedback_filters(opened: Store, *, since: str | None, until: str | None, **given: Any) -> dict[str, Any]:
    """Filters for the store; those that were not given, and the default status, are left out."""
    found = {name: value for name, value in given.items() if value is not None}
    status = found.pop("status", "live")
    if status != "live":
        found["status"] = None if status == "all" else status
    if policy := found.get("policy"):
        found["policy"] = opened.policy(policy).id
    for name, text in (("since", since), ("until", until)):
        if text is not None:
            found[name] = _micros(text, name)
    return found


def _micros(text: str, name: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadInputError(
            f"--{name} {text!r} is not a time.", advice="Write 2025-01-31 or 2025-01-31T12:00:00+01:00."
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1_000_000)


# --- show -----------------------------------------------------------------------------------------
