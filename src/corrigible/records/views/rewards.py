"""From judgements to values: reactions, rewards of spans and steps, outcomes, and read-off behaviour."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, Protocol

from corrigible.records.feedback import Feedback
from corrigible.records.payloads import (
    Comparison,
    ImplicitEvent,
    Outcome,
    Rating,
    Reaction,
    Spans,
    StepLabels,
)
from corrigible.records.views.rows import ReactionRow, RewardRow, SignalRow, SpanRewardRow, StepRewardRow

LENIENCY = "annotator-specific leniency"
WEAK = "weak"
AS_JUDGED = "as judged"
LOCALITY = "locality"
EXACT = "verifier exact"
MAX_IPS_WEIGHT = 20.0


def _reaction(
    record: Feedback, target: str, value: Literal[-1, 1], assumption: str, criterion: str
) -> ReactionRow:
    return ReactionRow(
        derived_from=(record.id,),
        assumption=assumption,
        context=record.context,
        target=target,
        value=value,
        annotator=record.annotator.pseudonym,
        criterion=criterion,
        task_id=record.task_id,
    )


def reactions(record: Feedback) -> Iterator[ReactionRow]:
    """A reaction as it is; one that was taken back (0) gives nothing."""
    if isinstance(record.payload, Reaction) and record.payload.value != 0:
        yield _reaction(record, record.targets[0].sha256, record.payload.value, AS_JUDGED, "overall")


def comparison_reactions(record: Feedback) -> Iterator[ReactionRow]:
    """Winner +1; loser -1 only at strength >= 2; both_bad and both_good react to both."""
    payload = record.payload
    if not isinstance(payload, Comparison):
        return
    first, second = (t.sha256 for t in record.targets)
    if payload.outcome in ("both_bad", "both_good"):
        value: Literal[-1, 1] = 1 if payload.outcome == "both_good" else -1
        for target in (first, second):
            yield _reaction(record, target, value, WEAK, payload.criterion)
    elif payload.outcome in ("first", "second"):
        winner, loser = (first, second) if payload.outcome == "first" else (second, first)
        yield _reaction(record, winner, 1, WEAK, payload.criterion)
        if payload.strength >= 2:
            yield _reaction(record, loser, -1, WEAK, payload.criterion)


def rating_reactions(records: Iterable[Feedback]) -> Iterator[ReactionRow]:
    """Ratings above the annotator's own median (on that scale and criterion) +1, below it -1."""
    groups: dict[tuple[str, str, str], list[tuple[float, Feedback]]] = defaultdict(list)
    for record in records:
        rating = record.payload
        if not isinstance(rating, Rating) or rating.value is None or rating.at is not None:
            continue
        if rating.scale.level != "nominal":
            key = (record.annotator.pseudonym, rating.scale.id, rating.criterion)
            groups[key].append((rating.value, record))
    for key, rated in groups.items():
        threshold = median(value for value, _ in rated)
        for value, record in rated:
            if value != threshold:
                target = record.targets[0].sha256
                yield _reaction(record, target, 1 if value > threshold else -1, LENIENCY, key[2])


def span_rewards(record: Feedback) -> Iterator[SpanRewardRow]:
    """Polarity times severity on each span; the rest is 0, and known only if the marking is exhaustive."""
    payload = record.payload
    if not isinstance(payload, Spans):
        return
    for unit in sorted({span.unit for span in payload.spans}) or ["char"]:
        yield SpanRewardRow(
            derived_from=(record.id,),
            assumption=LOCALITY,
            context=record.context,
            target=record.targets[0].sha256,
            unit=unit,
            rewards=tuple(
                (s.start, s.end, float(s.polarity * s.severity)) for s in payload.spans if s.unit == unit
            ),
            rest_known=payload.exhaustive,
            annotator=record.annotator.pseudonym,
        )


def step_rewards(record: Feedback) -> Iterator[StepRewardRow]:
    """The value of each labelled step; other steps are unknown."""
    if isinstance(record.payload, StepLabels):
        yield StepRewardRow(
            derived_from=(record.id,),
            assumption=LOCALITY,
            context=record.context,
            target=record.targets[0].sha256,
            rewards=tuple((label.i, label.value) for label in record.payload.labels),
            annotator=record.annotator.pseudonym,
        )


def outcome_rewards(record: Feedback, *, on_error: Literal["drop", "zero"] = "drop") -> Iterator[RewardRow]:
    """The score of an outcome, else 1 or 0 for passed. ``on_error`` says what a run without either gives."""
    payload = record.payload
    if not isinstance(payload, Outcome):
        return
    value = payload.score if payload.score is not None else payload.passed
    if value is None and on_error == "drop":
        return
    yield RewardRow(
        derived_from=(record.id,),
        assumption=EXACT if value is not None else "an error of the verifier counts as failure",
        context=record.context,
        target=record.targets[0].sha256,
        reward=0.0 if value is None else float(value),
        source=f"{payload.verifier.name}@{payload.verifier.version}",
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rule of an interpreter read from one event: a value, and the chance that it is right."""

    record: Feedback
    value: float
    p_correct: float
    rule_id: str


class Interpreter(Protocol):
    """Says what behaviour may mean. Behaviour becomes training rows in no other way."""

    def __call__(self, session: Sequence[Feedback]) -> Iterable[Reading]:
        """Readings of one session, whose implicit events come in the order of ``seq``."""
        ...


def implicit_signals(
    records: Iterable[Feedback],
    interpreter: Interpreter,
    *,
    unknown_propensity: Literal["drop", "unweighted"] = "drop",
) -> Iterator[SignalRow]:
    """Signals that an interpreter reads from sessions, weighted 1 / propensity, clipped at 20.

    Events of unknown propensity cannot be reweighted: they are dropped, or, for use that is not
    counterfactual, kept with weight 1.
    """
    sessions: dict[str, list[tuple[int, Feedback]]] = defaultdict(list)
    for record in records:
        if isinstance(record.payload, ImplicitEvent):
            sessions[record.payload.session].append((record.payload.seq, record))
    for events in sessions.values():
        ordered = [record for _, record in sorted(events, key=lambda e: (e[0], e[1].id))]
        for reading in interpreter(ordered):
            propensity = reading.record.propensity
            if propensity is None and unknown_propensity == "drop":
                continue
            for target in reading.record.targets:
                yield SignalRow(
                    derived_from=(reading.record.id,),
                    assumption=f"rule {reading.rule_id}",
                    weight=1.0 if propensity is None else min(1.0 / propensity, MAX_IPS_WEIGHT),
                    context=reading.record.context,
                    target=target.sha256,
                    value=reading.value,
                    p_correct=reading.p_correct,
                    propensity=propensity,
                    rule_id=reading.rule_id,
                )
