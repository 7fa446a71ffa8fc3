"""From judgements to pairs: comparison, ranking, ratings, reactions, edit, verdicts, outcomes; and pairs of
summed segments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import combinations
from typing import Literal

from corrigible.records.envelope import Scope
from corrigible.records.feedback import Feedback
from corrigible.records.items import TargetRef
from corrigible.records.payloads import (
    Comparison,
    Edit,
    Outcome,
    Ranking,
    Rating,
    Reaction,
    SegmentPreference,
    Verdict,
)
from corrigible.records.views.rows import PairRow, Slice, SlicePairRow
from corrigible.records.views.usable import usable

Ties = Literal["half", "drop"]

AS_JUDGED = "as judged"
TRANSITIVE = "transitive, noise independent of distance"
ORDINAL = "ordinal within annotator only"
EDIT_FIXED = "the edit fixed what mattered"
MIXTURE = "principle weights"
ADDITIVE = "additive reward"
EXACT = "verifier exact"


def _pair(
    record: Feedback,
    chosen: TargetRef,
    rejected: TargetRef,
    p_chosen: float,
    *,
    assumption: str,
    criterion: str = "overall",
    weight: float = 1.0,
    margin: float | None = None,
    derived_from: tuple[str, ...] | None = None,
) -> PairRow:
    return PairRow(
        derived_from=derived_from or (record.id,),
        assumption=assumption,
        weight=weight,
        context=record.context,
        chosen=chosen.sha256,
        rejected=rejected.sha256,
        p_chosen=p_chosen,
        criterion=criterion,
        annotator=record.annotator.pseudonym,
        margin=margin,
        task_id=record.task_id,
        chosen_episode=chosen.episode,
        rejected_episode=rejected.episode,
    )


def comparison_pairs(record: Feedback, ties: Ties = "half") -> Iterator[PairRow]:
    """The pair of a comparison; tie, both_bad and both_good are ties (0.5), incomparable gives nothing.

    A stated probability (AI judge, aggregate) becomes the soft label.
    """
    payload = record.payload
    if not isinstance(payload, Comparison) or payload.outcome == "incomparable":
        return
    first, second = record.targets
    if payload.is_tie:
        if ties == "drop":
            return
        p = 0.5 if payload.p_first is None else payload.p_first
        yield _pair(record, first, second, p, assumption=AS_JUDGED, criterion=payload.criterion, margin=0.0)
        return
    won_first = payload.outcome == "first"
    p = 1.0 if payload.p_first is None else payload.p_first if won_first else round(1.0 - payload.p_first, 12)
    chosen, rejected = (first, second) if won_first else (second, first)
    yield _pair(
        record,
        chosen,
        rejected,
        p,
        assumption=AS_JUDGED,
        criterion=payload.criterion,
        margin=float(payload.strength),
    )


def ranking_pairs(record: Feedback) -> Iterator[PairRow]:
    """All strict pairs of a ranking, which together weigh 1."""
    if not isinstance(record.payload, Ranking):
        return
    pairs = list(record.payload.strict_pairs())
    for better, worse in pairs:
        yield _pair(
            record,
            record.targets[better],
            record.targets[worse],
            1.0,
            assumption=TRANSITIVE,
            criterion=record.payload.criterion,
            weight=1.0 / len(pairs),
        )


def rating_pairs(records: Iterable[Feedback], *, min_gap: float | None = None) -> Iterator[PairRow]:
    """Pairs of ratings by one annotator, on one scale and criterion, of answers to one prompt.

    ``min_gap`` is in scale units; None is one step of the scale (any difference where it has none). Ratings
    of single steps, without a context, or on a nominal scale give no pairs.
    """
    groups: dict[tuple[str, str, str, str], list[tuple[float, Feedback]]] = defaultdict(list)
    for record in records:
        rating = record.payload
        if not isinstance(rating, Rating) or rating.value is None or rating.at is not None:
            continue
        if record.context is None or rating.scale.level == "nominal":
            continue
        key = (record.annotator.pseudonym, record.context, rating.scale.id, rating.criterion)
        groups[key].append((rating.value, record))
    for key, rated in groups.items():
        for (value_a, a), (value_b, b) in combinations(rated, 2):
            gap = abs(value_a - value_b)
            assert isinstance(a.payload, Rating)
            wanted = (a.payload.scale.step or 0.0) if min_gap is None else min_gap
            if gap == 0 or gap < wanted * (1 - 1e-9) or a.targets[0].sha256 == b.targets[0].sha256:
                continue
            better, worse = (a, b) if value_a > value_b else (b, a)
            yield _pair(
                better,
                better.targets[0],
                worse.targets[0],
                1.0,
                assumption=ORDINAL,
                criterion=key[3],
                margin=gap,
                derived_from=(better.id, worse.id),
            )


def reaction_pairs(records: Iterable[Feedback]) -> Iterator[PairRow]:
    """What somebody liked is better than what they disliked among the answers to one prompt."""
    groups: dict[tuple[str, str], list[tuple[float, Feedback]]] = defaultdict(list)
    for record in records:
        if isinstance(record.payload, Reaction) and record.payload.value and record.context is not None:
            groups[record.annotator.pseudonym, record.context].append((record.payload.value, record))
    for judged in groups.values():
        yield from _by_value(judged, assumption=ORDINAL, margins=False)


def outcome_pairs(records: Iterable[Feedback]) -> Iterator[PairRow]:
    """Of two answers to one prompt that the same verifier ran, the one with the higher score (else 1 or 0
    for passed) is better; ``margin`` is by how much. Runs that ended in an error are left out."""
    groups: dict[tuple[str, str], list[tuple[float, Feedback]]] = defaultdict(list)
    for record in records:
        payload = record.payload
        if not isinstance(payload, Outcome) or record.context is None:
            continue
        value = payload.score if payload.score is not None else payload.passed
        if value is not None:
            groups[payload.verifier.to_json_text(), record.context].append((float(value), record))
    for judged in groups.values():
        yield from _by_value(judged, assumption=EXACT, margins=True)


def _by_value(
    judged: Iterable[tuple[float, Feedback]], *, assumption: str, margins: bool
) -> Iterator[PairRow]:
    for (value_a, a), (value_b, b) in combinations(judged, 2):
        if value_a == value_b or a.targets[0].sha256 == b.targets[0].sha256:
            continue
        better, worse = (a, b) if value_a > value_b else (b, a)
        yield _pair(
            better,
            better.targets[0],
            worse.targets[0],
            1.0,
            assumption=assumption,
            margin=abs(value_a - value_b) if margins else None,
            derived_from=(better.id, worse.id),
        )


def edit_pairs(record: Feedback) -> Iterator[PairRow]:
    """The object after an edit is better than the one before, if anything changed."""
    if isinstance(record.payload, Edit) and record.payload.after != record.targets[0].sha256:
        before = record.targets[0]
        after = TargetRef(sha256=record.payload.after, type=before.type)
        yield _pair(record, after, before, 1.0, assumption=EDIT_FIXED)


_P_VERDICT = {"first": 1.0, "second": 0.0, "tie": 0.5}


def verdict_pairs(
    records: Iterable[Feedback], *, weights: Mapping[str, float] | None = None
) -> Iterator[PairRow]:
    """Soft comparisons: per annotator and pair, the weighted mixture of its verdicts over principles.

    ``weights`` by principle id, 1 where it is not named; principles of weight 0 do not count.
    """
    groups: dict[tuple[str | None, ...], list[tuple[float, float, Feedback]]] = defaultdict(list)
    for record in records:
        verdict = record.payload
        if not isinstance(verdict, Verdict) or not verdict.is_pairwise:
            continue
        weight = 1.0 if weights is None else weights.get(verdict.principle.id, 1.0)
        p = _P_VERDICT[verdict.outcome] if verdict.p is None else verdict.p
        key = (record.annotator.pseudonym, record.context, *(t.sha256 for t in record.targets))
        if weight > 0:
            groups[key].append((weight, p, record))
    for votes in groups.values():
        p = sum(w * p for w, p, _ in votes) / sum(w for w, _, _ in votes)
        record = votes[0][2]
        first, second = record.targets
        chosen, rejected = (first, second) if p >= 0.5 else (second, first)
        yield _pair(
            record,
            chosen,
            rejected,
            max(p, 1.0 - p),
            assumption=MIXTURE,
            derived_from=tuple(r.id for _, _, r in votes),
        )


def pairs(
    records: Iterable[Feedback],
    *,
    scope: Scope = "train",
    ties: Ties = "half",
    at: int | None = None,
    superseded: Collection[str] | None = None,
) -> Iterator[PairRow]:
    """All pairs that usable records of any kind give.

    Streams: only ratings and verdicts are kept until the end. ``scope``, ``at`` and ``superseded`` as in
    :func:`~corrigible.records.views.usable.usable`.
    """
    ratings: list[Feedback] = []
    verdicts: list[Feedback] = []
    for record in usable(records, scope, at=at, superseded=superseded):
        payload = record.payload
        if isinstance(payload, Comparison):
            yield from comparison_pairs(record, ties)
        elif isinstance(payload, Ranking):
            yield from ranking_pairs(record)
        elif isinstance(payload, Edit):
            yield from edit_pairs(record)
        elif isinstance(payload, Rating):
            ratings.append(record)
        elif isinstance(payload, Verdict):
            verdicts.append(record)
    yield from rating_pairs(ratings)
    yield from verdict_pairs(verdicts)


def segment_pairs(record: Feedback, ties: Ties = "half") -> Iterator[SlicePairRow]:
    """Which of two segments has the larger sum of rewards."""
    payload = record.payload
    if not isinstance(payload, SegmentPreference) or payload.outcome == "incomparable":
        return
    if payload.outcome == "equal" and ties == "drop":
        return
    a = _slice(record.targets[0], payload.len_a)
    b = _slice(record.targets[1], payload.len_b)
    chosen, rejected = (b, a) if payload.outcome == "b" else (a, b)
    yield SlicePairRow(
        derived_from=(record.id,),
        assumption=ADDITIVE,
        context=record.context,
        chosen=chosen,
        rejected=rejected,
        p_chosen=0.5 if payload.outcome == "equal" else 1.0,
        annotator=record.annotator.pseudonym,
    )


def _slice(target: TargetRef, length: int) -> Slice:
    start, stop = target.steps or (0, length)
    return Slice(target.episode or target.sha256, start, stop)
