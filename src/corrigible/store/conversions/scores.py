"""Scores of single responses as signals: rating, reaction, outcome."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from corrigible.records import (
    Feedback,
    Outcome,
    Rating,
    Reaction,
)
from corrigible.records.views import (
    outcome_pairs,
    rating_pairs,
    rating_reactions,
    reaction_pairs,
)
from corrigible.store.conversions.content import (
    Content,
    LeftOut,
    NotConvertibleError,
    common,
    demonstrated,
    group_of,
    labelled,
    left_over,
    pairs_from_rows,
    ranked_by_prompt,
    words_of,
)
from corrigible.store.conversions.matrix import conversion, impossible
from corrigible.store.labelled import Labelled
from corrigible.store.pairs import Pair
from corrigible.store.signals import Critiqued, Demonstrated, Ranked

_BLOB = re.compile(r"[0-9a-f]{64}")

# -- rating ------------------------------------------------------------------------------------------


def _rating(record: Feedback) -> Rating:
    """The rating of a whole response, with a value on a scale that has an order."""
    payload = record.payload
    assert isinstance(payload, Rating)
    if payload.na or payload.value is None:
        raise NotConvertibleError("not_applicable")
    if payload.at is not None:
        raise NotConvertibleError("no_order", f"it rates step {payload.at}, not the response")
    if payload.scale.level == "nominal":
        raise NotConvertibleError("no_order", f"scale {payload.scale.id} is nominal")
    return payload


def _faults(records: Iterable[Feedback]) -> dict[str, str]:
    """Why single ratings cannot be used, by id; and those without a prompt."""
    found: dict[str, str] = {}
    for record in records:
        try:
            _rating(record)
            if record.context is None:
                found[record.id] = "no_prompt"
        except NotConvertibleError as why:
            found[record.id] = why.reason
    return found


@conversion(
    "rating",
    "pairs",
    assumes="ordinal within annotator only",
    keeps="gap in scale units as margin; less than one step of the scale gives none",
    together=True,
)
def _rating_pairs(records: Sequence[Feedback], content: Content) -> Iterator[Pair | LeftOut]:
    found = list(pairs_from_rows(rating_pairs(records), content))
    yield from found
    yield from left_over(records, found, _faults(records))


@conversion(
    "rating",
    "labelled",
    assumes="annotator-specific leniency: good is above the annotator's own median",
    keeps="nothing of the distance; the median itself gives none",
    together=True,
)
def _rating_labelled(records: Sequence[Feedback], content: Content) -> Iterator[Labelled | LeftOut]:
    by_id = {record.id: record for record in records}
    found: list[Labelled | LeftOut] = []
    for row in rating_reactions(records):
        record = by_id[row.derived_from[0]]
        try:
            found.append(
                labelled(record, content, row.target, desirable=row.value > 0, criterion=row.criterion)
            )
        except NotConvertibleError as why:
            found.append(LeftOut((record.id,), why.reason, why.detail))
    yield from found
    reasons = {r.id: "at_the_median" for r in records} | {
        name: reason for name, reason in _faults(records).items() if reason != "no_prompt"
    }
    yield from left_over(records, found, reasons)


@conversion(
    "rating",
    "ranked",
    assumes="ratings of one annotator on one scale are comparable",
    keeps="values in scale units; equal values are ties",
    together=True,
)
def _rating_ranked(records: Sequence[Feedback], content: Content) -> Iterator[Ranked | LeftOut]:
    judged = []
    for record in records:
        try:
            rating = _rating(record)
            key = (record.annotator.pseudonym, rating.scale.id, rating.criterion)
            judged.append((key, record, float(rating.value or 0.0)))
        except NotConvertibleError as why:
            yield LeftOut((record.id,), why.reason, why.detail)
    yield from ranked_by_prompt(judged, content)


@conversion(
    "rating",
    "demonstrations",
    assumes="worth imitating as much as its place between the ends of the scale",
    keeps="weight: (value − min) / (max − min); the worst value gives none",
)
def _rating_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    rating = _rating(record)
    share = (float(rating.value or 0.0) - rating.scale.min) / (rating.scale.max - rating.scale.min)
    yield demonstrated(record, content, record.targets[0].sha256, weight=share, criterion=rating.criterion)


def remark(record: Feedback, content: Content, words: str, criterion: str) -> Critiqued:
    target = record.targets[0]
    return Critiqued(
        prompt=content.prompt(record.context),
        draft=content.response(target.sha256),
        critique=words,
        weight=1.0,
        group=group_of(record, target.sha256),
        criterion=criterion,
        episode=target.episode,
        **common(record),
    )


@conversion("rating", "critiqued", assumes="the rationale is about the response", keeps="the words")
def _rating_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    assert isinstance(record.payload, Rating)
    yield remark(record, content, words_of(record), record.payload.criterion)


impossible("rating", attempts="a value on a scale does not say what is right")

# -- reaction ----------------------------------------------------------------------------------------


def _reacted(record: Feedback) -> Reaction:
    assert isinstance(record.payload, Reaction)
    if record.payload.value == 0:
        raise NotConvertibleError("not_applicable", "it was taken back")
    return record.payload


@conversion(
    "reaction", "labelled", assumes="as judged", keeps="the label; one that was taken back gives none"
)
def _reaction_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    good = _reacted(record).value > 0
    yield labelled(record, content, record.targets[0].sha256, desirable=good)


@conversion(
    "reaction",
    "pairs",
    assumes="ordinal within annotator only: liked is better than disliked, of one prompt",
    keeps="nothing of how much",
    together=True,
)
def _reaction_pairs(records: Sequence[Feedback], content: Content) -> Iterator[Pair | LeftOut]:
    found = list(pairs_from_rows(reaction_pairs(records), content))
    yield from found
    reasons = {r.id: "no_prompt" for r in records if r.context is None}
    reasons |= {r.id: "not_applicable" for r in records if _value(r) == 0}
    yield from left_over(records, found, reasons)


def _value(record: Feedback) -> int:
    assert isinstance(record.payload, Reaction)
    return record.payload.value


@conversion(
    "reaction", "ranked", assumes="ordinal within annotator only", keeps="scores +1 and −1", together=True
)
def _reaction_ranked(records: Sequence[Feedback], content: Content) -> Iterator[Ranked | LeftOut]:
    judged = []
    for record in records:
        if _value(record):
            judged.append((record.annotator.pseudonym, record, float(_value(record))))
        else:
            yield LeftOut((record.id,), "not_applicable", "it was taken back")
    yield from ranked_by_prompt(judged, content, criterion="overall")


@conversion(
    "reaction", "demonstrations", assumes="what was liked is worth imitating", keeps="nothing of how much"
)
def _reaction_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    if _reacted(record).value < 0:
        raise NotConvertibleError("failed")
    yield demonstrated(record, content, record.targets[0].sha256)


@conversion("reaction", "critiqued", assumes="rationale or tags are about the response", keeps="the words")
def _reaction_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    words = ", ".join(_reacted(record).tags) if not record.rationale else words_of(record)
    if not words:
        raise NotConvertibleError("no_words")
    yield remark(record, content, words, "overall")


impossible("reaction", attempts="liking an answer does not say that it is right")

# -- outcome -----------------------------------------------------------------------------------------


def outcome_of(record: Feedback) -> Outcome:
    payload = record.payload
    assert isinstance(payload, Outcome)
    if payload.passed is None and payload.score is None:
        raise NotConvertibleError("undecided", f"the run ended with {payload.exit}")
    return payload


def share_of(payload: Outcome) -> float:
    """How good between 0 and 1: passed, else the place of the score in its range."""
    if payload.passed is not None:
        return float(payload.passed)
    if payload.range is None or payload.score is None or payload.range[0] == payload.range[1]:
        raise NotConvertibleError("no_threshold", f"score {payload.score}")
    low, high = payload.range
    return (payload.score - low) / (high - low)


@conversion(
    "outcome", "pairs", assumes="verifier exact", keeps="difference of scores as margin", together=True
)
def _outcome_pairs(records: Sequence[Feedback], content: Content) -> Iterator[Pair | LeftOut]:
    found = list(pairs_from_rows(outcome_pairs(records), content))
    yield from found
    reasons = {r.id: "no_prompt" for r in records if r.context is None}
    for record in records:
        try:
            outcome_of(record)
        except NotConvertibleError as why:
            reasons[record.id] = why.reason
    yield from left_over(records, found, reasons)


@conversion(
    "outcome",
    "labelled",
    assumes="verifier exact; a score without 'passed' is good in the upper half of its range",
    keeps="distance of the score from the middle as weight",
)
def _outcome_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    share = share_of(outcome_of(record))
    weight = abs(2.0 * share - 1.0)
    yield labelled(record, content, record.targets[0].sha256, desirable=share > 0.5, weight=weight)


@conversion(
    "outcome",
    "ranked",
    assumes="scores of one verifier are comparable",
    keeps="scores (else passed)",
    together=True,
)
def _outcome_ranked(records: Sequence[Feedback], content: Content) -> Iterator[Ranked | LeftOut]:
    judged = []
    for record in records:
        try:
            payload = outcome_of(record)
            value = float(payload.score if payload.score is not None else bool(payload.passed))
            judged.append((payload.verifier.to_json_text(), record, value))
        except NotConvertibleError as why:
            yield LeftOut((record.id,), why.reason, why.detail)
    yield from ranked_by_prompt(judged, content, criterion="overall")


@conversion(
    "outcome",
    "demonstrations",
    assumes="what passes is worth imitating",
    keeps="place in the range as weight",
)
def _outcome_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    yield demonstrated(record, content, record.targets[0].sha256, weight=share_of(outcome_of(record)))


def log_of(payload: Outcome) -> str:
    """What a run says in words: its log (when that is not a blob), else the tests that failed."""
    if payload.log and not _BLOB.fullmatch(payload.log):
        return payload.log.strip()
    failed = [test.name for test in payload.tests if test.passed is False]
    return f"Failed: {', '.join(failed)}." if failed else ""


@conversion("outcome", "critiqued", assumes="log or failed tests say what is wrong", keeps="the words")
def _outcome_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    words = log_of(outcome_of(record))
    if not words:
        raise NotConvertibleError("no_words")
    yield remark(record, content, words, "overall")
