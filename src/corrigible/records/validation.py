"""Invariants that one record cannot check alone: they need its targets' content, episodes, other records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from corrigible.errors import BadInputError
from corrigible.records.base import Record
from corrigible.records.editing import apply_edit
from corrigible.records.episodes import Episode
from corrigible.records.feedback import Feedback
from corrigible.records.items import MESSAGES_MEDIA_TYPE, Item, sha256_of_text
from corrigible.records.payloads import (
    Adjudication,
    Answer,
    Click,
    Critique,
    Demonstration,
    Edit,
    ImplicitEvent,
    Intervention,
    Outcome,
    Rating,
    SegmentPreference,
    SpanRange,
    Spans,
    StepLabels,
    Verdict,
)


class Violation(Record):
    """An invariant that does not hold: in which record, which rule, and what is wrong."""

    record: str
    rule: str
    message: str


def validate(
    record: Feedback, items: Mapping[str, Item], episodes: Mapping[str, Episode] | None = None
) -> list[Violation]:
    """Check a record against the content it refers to.

    ``items`` by hash; what is missing there but needed is reported as rule ``unresolved``. ``episodes`` by
    id; checks on episodes that are not given are left out.
    """
    found = [*_check_steps(record, episodes or {}), *_check_content(record, items, episodes or {})]
    return [Violation(record=record.id, rule=rule, message=message) for rule, message in found]


Faults = Iterator[tuple[str, str]]


def _check_content(record: Feedback, items: Mapping[str, Item], episodes: Mapping[str, Episode]) -> Faults:
    payload = record.payload
    if isinstance(payload, Critique):
        for aspect in payload.aspects:
            if aspect.span is not None:
                yield from _check_span(aspect.span, record.targets[aspect.target].sha256, items)
    elif isinstance(payload, Spans | Verdict):
        for span in (payload.spans if isinstance(payload, Spans) else payload.evidence) or ():
            yield from _check_span(span, record.targets[0].sha256, items)
    elif isinstance(payload, Edit):
        yield from _check_edit(payload, record.targets[0].sha256, items)
    elif isinstance(payload, Demonstration) and payload.text is not None:
        if sha256_of_text(payload.text) != record.targets[0].sha256:
            yield "demonstration.text", "the text is not the content of the target"
    elif isinstance(payload, Intervention):
        yield from _check_intervention(payload, str(record.targets[0].episode), episodes)
    elif isinstance(payload, SegmentPreference):
        for target, length in zip(record.targets, (payload.len_a, payload.len_b), strict=True):
            if target.steps is not None and target.steps[1] - target.steps[0] != length:
                yield "segment.length", f"steps {list(target.steps)} are not {length} long"
        known = [e for t in record.targets if t.episode is not None and (e := episodes.get(t.episode))]
        if len(known) == 2 and known[0].env != known[1].env:
            yield "segment.env", "the segments come from different environment specs"


def _check_span(span: SpanRange, sha256: str, items: Mapping[str, Item]) -> Faults:
    item = items.get(sha256)
    if item is None:
        yield "unresolved", f"item {sha256[:12]} is needed to check a span"
    elif span.unit == "char" and item.text is not None and span.end > len(item.text):
        yield "span.range", f"span ends at {span.end} in a text of {len(item.text)} characters"
    elif span.unit == "turn" and item.media_type == MESSAGES_MEDIA_TYPE:
        turns = len(item.messages())
        if span.end > turns:
            yield "span.range", f"span ends at turn {span.end} of {turns}"


def _check_edit(edit: Edit, sha256: str, items: Mapping[str, Item]) -> Faults:
    before = items.get(sha256)
    if before is None or before.text is None:
        yield "unresolved", f"item {sha256[:12]} is needed to apply the edit"
        return
    try:
        after = apply_edit(before.text, edit)
    except BadInputError as error:
        yield "edit.fits", error.message
        return
    if sha256_of_text(after) != edit.after:
        yield "edit.after", "applying the operations that were not rejected does not give 'after'"


def _check_intervention(payload: Intervention, parent_id: str, episodes: Mapping[str, Episode]) -> Faults:
    parent = episodes.get(parent_id)
    branch = parent if payload.branch is None else episodes.get(payload.branch)
    if parent is not None and payload.t_detect >= len(parent.steps):
        yield (
            "intervention.parent",
            f"t_detect {payload.t_detect} is past the {len(parent.steps)} parent steps",
        )
    if branch is not None and payload.t_release > len(branch.steps):
        yield (
            "intervention.branch",
            f"t_release {payload.t_release} is past the {len(branch.steps)} steps of the branch",
        )
    if payload.branch is not None and branch is not None and branch.parent != parent_id:
        yield "intervention.branch", f"episode {payload.branch} is no branch of {parent_id}"
    if payload.branch is not None and branch is not None and branch.branch_step != payload.t_rewind:
        yield "intervention.branch", f"the branch starts at {branch.branch_step}, not at {payload.t_rewind}"


def _check_steps(record: Feedback, episodes: Mapping[str, Episode]) -> Faults:
    for target in record.targets:
        episode = episodes.get(target.episode) if target.episode is not None else None
        if episode is None:
            continue
        length = len(episode.steps)
        if target.steps is not None and target.steps[1] > length:
            yield "target.steps", f"steps {list(target.steps)} cross the end of an episode of {length} steps"
        last = (
            record.payload.at
            if isinstance(record.payload, Rating)
            else record.payload.judged_until
            if isinstance(record.payload, StepLabels)
            else None
        )
        first = target.steps[0] if target.steps is not None else 0
        last_step = (target.steps[1] if target.steps is not None else length) - first
        if last is not None and last >= last_step:
            yield "step.range", f"step {last} does not exist: the target has {last_step} steps"


# --- between records ------------------------------------------------------------------------------


def validate_together(records: Iterable[Feedback]) -> list[Violation]:
    """Check the invariants between the live records of a session, task or campaign.

    Sessions of implicit events are in order and respond to something shown; click rounds are contiguous and
    clicked keypoints frozen; answers do not contradict each other; a suggestion has its edit; deterministic
    verifiers replay identically; adjudications are about the targets that they resolve.
    """
    given = list(records)
    replaced = {r.supersedes for r in given if r.supersedes is not None}
    live = sorted(
        (r for r in given if r.status == "live" and r.id not in replaced), key=lambda r: (r.created_at, r.id)
    )
    found: list[Violation] = []
    for check in (
        _check_sessions,
        _check_clicks,
        _check_answers,
        _check_suggestions,
        _check_replays,
        _check_adjudications,
    ):
        found += [Violation(record=r.id, rule=rule, message=m) for r, rule, m in check(live)]
    return found


Clashes = Iterator[tuple[Feedback, str, str]]
RESPONSES = frozenset({"accepted", "rejected", "kept"})
"""Events that presuppose that the same suggestion was shown earlier in the session."""


def _check_sessions(records: Sequence[Feedback]) -> Clashes:
    sessions: dict[str, list[tuple[Feedback, ImplicitEvent]]] = defaultdict(list)
    for record in records:
        if isinstance(record.payload, ImplicitEvent):
            sessions[record.payload.session].append((record, record.payload))
    for session, events in sessions.items():
        for (_, before), (record, after) in pairwise(events):
            if after.seq <= before.seq:
                yield record, "implicit.seq", f"seq {after.seq} follows {before.seq} in session {session!r}"
        shown: set[str] = set()
        for record, event in sorted(events, key=lambda e: e[1].seq):
            targets = {t.sha256 for t in record.targets}
            if event.event == "shown":
                shown |= targets
            elif event.event in RESPONSES and not targets <= shown:
                yield record, "implicit.shown", f"{event.event} a suggestion that was not shown before"


def _check_clicks(records: Sequence[Feedback]) -> Clashes:
    rounds: dict[tuple[str, ...], list[tuple[Feedback, Click]]] = defaultdict(list)
    for record in records:
        if isinstance(record.payload, Click):
            key = (record.targets[0].sha256, record.annotator.pseudonym, record.task_id or "")
            rounds[key].append((record, record.payload))
    for clicks in rounds.values():
        expected, frozen = 0, set[tuple[str, int]]()
        for record, click in sorted(clicks, key=lambda c: c[1].round):
            if click.round > expected:
                yield record, "click.rounds", f"round {click.round} comes without round {expected}"
            expected = click.round + 1
            if click.keypoint is not None:
                point = (click.object_id, click.keypoint)
                if point in frozen:
                    yield record, "click.frozen", f"keypoint {click.keypoint} was clicked and not undone"
                frozen.add(point)


def _check_answers(records: Sequence[Feedback]) -> Clashes:
    earlier: dict[tuple[str, ...], list[Answer]] = defaultdict(list)
    for record in records:
        if not isinstance(record.payload, Answer):
            continue
        key = (record.annotator.pseudonym, record.task_id or "", record.context or "")
        for slot, constraint in record.payload.slots.items():
            if any(slot in a.slots and constraint.contradicts(a.slots[slot]) for a in earlier[key]):
                yield record, "answer.consistent", f"slot {slot!r} contradicts an earlier live answer"
        earlier[key].append(record.payload)


def _check_suggestions(records: Sequence[Feedback]) -> Clashes:
    edits = {(r.judgement_id, r.payload.after) for r in records if isinstance(r.payload, Edit)}
    for record in records:
        suggestion = record.payload.suggestion if isinstance(record.payload, Critique) else None
        if suggestion is not None and (record.judgement_id, suggestion) not in edits:
            yield record, "critique.suggestion", "the suggestion has no edit record of the same judgement"


def _check_replays(records: Sequence[Feedback]) -> Clashes:
    first: dict[tuple[str, ...], Outcome] = {}
    for record in records:
        outcome = record.payload
        if not isinstance(outcome, Outcome) or not outcome.verifier.deterministic:
            continue
        key = (
            record.targets[0].sha256,
            record.context or "",
            outcome.verifier.to_json_text(),
            str(outcome.seed),
            str(outcome.env_digest),
        )
        if first.setdefault(key, outcome).replay_key() != outcome.replay_key():
            yield record, "outcome.replay", "a deterministic verifier gave two outcomes for one target"


def _check_adjudications(records: Sequence[Feedback]) -> Clashes:
    by_id = {r.id: r for r in records}
    for record in records:
        if not isinstance(record.payload, Adjudication):
            continue
        resolved = [by_id.get(i) for i in record.payload.resolves]
        if all(r is not None for r in resolved):
            judged = {t.sha256 for r in resolved if r is not None for t in r.targets}
            if not {t.sha256 for t in record.targets} <= judged:
                yield record, "adjudication.targets", "it judges targets that none of its records is about"
