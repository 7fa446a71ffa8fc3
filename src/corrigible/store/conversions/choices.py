"""Choices between responses as signals: comparison, ranking, segment preference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from corrigible.records import (
    Comparison,
    Feedback,
    Ranking,
    SegmentPreference,
    sha256_of_text,
)
from corrigible.records.views import (
    comparison_pairs,
    ranking_pairs,
    segment_pairs,
)
from corrigible.store.conversions.content import (
    Content,
    LeftOut,
    NotConvertibleError,
    common,
    demonstrated,
    group_of,
    labelled,
    pair_from_row,
    pairs_from_rows,
    text_of,
    tried,
    words_of,
)
from corrigible.store.conversions.matrix import conversion, impossible
from corrigible.store.labelled import Labelled, labelled_from_pairs
from corrigible.store.pairs import Pair
from corrigible.store.signals import Critiqued, Demonstrated, Ranked, Turn

SOFT = "soft label"
SURENESS = "weight \\|2p − 1\\|"


def sureness(pair: Pair) -> float:
    """``|2 p_chosen - 1|``: 1 for a certain label, 0 for a tie."""
    return abs(2.0 * pair.p_chosen - 1.0)


def preferred(pair: Pair) -> Demonstrated:
    """The preferred side of a pair as something to imitate, as much as it is sure."""
    first = pair.p_chosen > 0.5
    if pair.p_chosen == 0.5:
        raise NotConvertibleError("tie")
    return Demonstrated(
        prompt=pair.prompt,
        response=pair.chosen if first else pair.rejected,
        weight=pair.weight * sureness(pair),
        group=pair.group,
        annotators=pair.annotators,
        derived_from=pair.derived_from,
        criterion=pair.criterion,
        episode=pair.chosen_episode if first else pair.rejected_episode,
    )


def ordered(pair: Pair) -> Ranked:
    """A pair as two scores, its margin (else 1) apart, that weigh as much as it is sure."""
    if pair.p_chosen == 0.5:
        raise NotConvertibleError("tie")
    gap = pair.margin or 1.0
    return Ranked(
        prompt=pair.prompt,
        responses=(pair.chosen, pair.rejected),
        scores=(gap, 0.0) if pair.p_chosen > 0.5 else (0.0, gap),
        weight=pair.weight * sureness(pair),
        group=pair.group,
        annotators=pair.annotators,
        derived_from=pair.derived_from,
        criterion=pair.criterion,
        episodes=(pair.chosen_episode, pair.rejected_episode),
    )


def both_sides(pair: Pair) -> list[Labelled]:
    """Both sides of a pair as one good and one bad answer."""
    found = labelled_from_pairs([pair])
    if not found:
        raise NotConvertibleError("tie")
    return found


def _compared(record: Feedback, content: Content) -> Pair:
    assert isinstance(record.payload, Comparison)
    if record.payload.outcome == "incomparable":
        raise NotConvertibleError("incomparable")
    (row,) = comparison_pairs(record)
    return pair_from_row(row, content)


@conversion("comparison", "pairs", assumes="as judged", keeps=f"{SOFT}; ties 0.5; strength as margin")
def _comparison_pairs(record: Feedback, content: Content) -> Iterator[Pair]:
    yield _compared(record, content)


@conversion(
    "comparison",
    "labelled",
    assumes="the better one is good in itself, the other one bad (both_good, both_bad: as judged)",
    keeps=SURENESS,
)
def _comparison_labelled(record: Feedback, content: Content) -> Iterator[Labelled | LeftOut]:
    payload = record.payload
    assert isinstance(payload, Comparison)
    if payload.outcome in ("both_good", "both_bad"):
        good = payload.outcome == "both_good"
        make = partial(labelled, record, content, desirable=good, criterion=payload.criterion)
        yield from tried(record, [partial(make, target.sha256) for target in record.targets])
    else:
        yield from both_sides(_compared(record, content))


@conversion(
    "comparison", "ranked", assumes="strengths 1 to 3 are evenly spaced", keeps=f"{SURENESS}; strength as gap"
)
def _comparison_ranked(record: Feedback, content: Content) -> Iterator[Ranked]:
    yield ordered(_compared(record, content))


@conversion("comparison", "demonstrations", assumes="the better one is worth imitating", keeps=SURENESS)
def _comparison_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated | LeftOut]:
    payload = record.payload
    assert isinstance(payload, Comparison)
    if payload.outcome == "both_bad":
        raise NotConvertibleError("failed")
    if payload.outcome == "both_good":
        make = partial(demonstrated, record, content, criterion=payload.criterion)
        yield from tried(record, [partial(make, target.sha256) for target in record.targets])
    else:
        yield replace(preferred(_compared(record, content)), quality=record.annotator.type)


@conversion(
    "comparison",
    "critiqued",
    assumes="the rationale says what the worse one lacks and the better one has",
    keeps=SURENESS,
)
def _comparison_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    yield critiqued_pair(record, _compared(record, content))


def critiqued_pair(record: Feedback, pair: Pair) -> Critiqued:
    words = words_of(record)
    if pair.p_chosen == 0.5:
        raise NotConvertibleError("tie")
    first = pair.p_chosen > 0.5
    return Critiqued(
        prompt=pair.prompt,
        draft=pair.rejected if first else pair.chosen,
        critique=words,
        refined=pair.chosen if first else pair.rejected,
        weight=pair.weight * sureness(pair),
        group=pair.group,
        annotators=pair.annotators,
        derived_from=pair.derived_from,
        criterion=pair.criterion,
        episode=pair.rejected_episode if first else pair.chosen_episode,
    )


impossible("comparison", attempts="which one is better does not say which one is right")

# -- ranking -----------------------------------------------------------------------------------------


@conversion(
    "ranking",
    "pairs",
    assumes="transitive, noise independent of distance",
    keeps="all strict pairs, which weigh 1 together; ties and the unranked tail give none",
)
def _ranking_pairs(record: Feedback, content: Content) -> Iterator[Pair | LeftOut]:
    rows = list(ranking_pairs(record))
    if not rows:
        raise NotConvertibleError("no_order")
    yield from pairs_from_rows(rows, content)


@conversion("ranking", "ranked", assumes="levels are evenly spaced", keeps="ties; NaN where nobody judged")
def _ranking_ranked(record: Feedback, content: Content) -> Iterator[Ranked | LeftOut]:
    payload = record.payload
    assert isinstance(payload, Ranking)
    scores = {
        i: float(len(payload.levels) - level) for level, each in enumerate(payload.levels) for i in each
    }
    tail = 0.0 if payload.tail == "worse" else float("nan")
    scores |= dict.fromkeys(payload.unranked, tail)
    prompt = content.prompt(record.context)
    found: list[tuple[Turn, float, str | None]] = []
    for place, target in enumerate(record.targets):
        try:
            found.append((content.response(target.sha256), scores[place], target.episode))
        except NotConvertibleError as why:
            yield LeftOut((record.id,), why.reason, why.detail)
    if len({score for _, score, _ in found if score == score}) < 2:
        raise NotConvertibleError("no_order")
    if all(response == found[0][0] for response, _, _ in found):
        raise NotConvertibleError("equal_sides")
    yield Ranked(
        prompt=prompt,
        responses=tuple(response for response, _, _ in found),
        scores=tuple(score for _, score, _ in found),
        weight=1.0,
        group=group_of(record, record.targets[0].sha256),
        criterion=payload.criterion,
        episodes=tuple(episode for _, _, episode in found),
        **common(record),
    )


@conversion(
    "ranking",
    "labelled",
    assumes="as judged where the ranking says what is acceptable, else good is what wins more than it loses",
    keeps="weight: share of wins minus share of losses",
)
def _ranking_labelled(record: Feedback, content: Content) -> Iterator[Labelled | LeftOut]:
    payload = record.payload
    assert isinstance(payload, Ranking)
    if payload.ok_until is not None:
        levels = [*payload.levels, *([payload.unranked] if payload.tail == "worse" else [])]
        judged = {i: 1.0 if n <= payload.ok_until else -1.0 for n, level in enumerate(levels) for i in level}
    else:
        wins: dict[int, list[int]] = defaultdict(list)
        for better, worse in payload.strict_pairs():
            wins[better].append(1)
            wins[worse].append(-1)
        judged = {i: sum(each) / len(each) for i, each in wins.items()}
    if not any(judged.values()):
        raise NotConvertibleError("no_order")
    make = partial(labelled, record, content, criterion=payload.criterion)
    makers = [
        partial(make, record.targets[place].sha256, desirable=net > 0, weight=abs(net))
        for place, net in sorted(judged.items())
        if net
    ]
    yield from tried(record, makers)


@conversion(
    "ranking",
    "demonstrations",
    assumes="the best level is worth imitating (every acceptable one, where the ranking says which are)",
    keeps="weight 1, shared by what is imitated",
)
def _ranking_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated | LeftOut]:
    payload = record.payload
    assert isinstance(payload, Ranking)
    if payload.ok_until is None and not any(payload.strict_pairs()):
        raise NotConvertibleError("no_order")
    best = [i for level in payload.levels[: (payload.ok_until or 0) + 1] for i in level]
    make = partial(demonstrated, record, content, weight=1.0 / len(best), criterion=payload.criterion)
    yield from tried(record, [partial(make, record.targets[i].sha256) for i in best])


impossible(
    "ranking",
    critiqued="its rationale is about the whole order, not about one answer",
    attempts="an order does not say what is right",
)

# -- segment preference ------------------------------------------------------------------------------


def _segments(record: Feedback, content: Content) -> Pair:
    """Two segments of text episodes that answer the same prompt, as a pair."""
    payload = record.payload
    assert isinstance(payload, SegmentPreference)
    if payload.outcome == "incomparable":
        raise NotConvertibleError("incomparable")
    (row,) = segment_pairs(record)
    sides = [content.steps(row.chosen), content.steps(row.rejected)]
    if not all(sides):
        raise NotConvertibleError("not_text", "a segment without steps")
    prompts = [side[0][1] for side in sides]
    if prompts[0] != prompts[1]:
        raise NotConvertibleError("prompts_differ")
    # Of a segment of several turns all is the response: what the environment said in between is part of it.
    chosen, rejected = ((*side[-1][1][len(prompts[0]) :], side[-1][2]) for side in sides)
    if chosen == rejected:
        raise NotConvertibleError("equal_sides")
    refs = [sha256_of_text(text_of(side)) for side in (chosen, rejected)]
    return Pair(
        prompt=prompts[0],
        chosen=chosen,
        rejected=rejected,
        p_chosen=row.p_chosen,
        weight=row.weight,
        group=group_of(record, record.targets[0].sha256),
        criterion="overall",
        chosen_ref=refs[0],
        rejected_ref=refs[1],
        prompt_ref=record.context,
        chosen_episode=row.chosen.episode,
        rejected_episode=row.rejected.episode,
        margin=float(payload.strength),
        **common(record),
    )


@conversion(
    "segment_preference",
    "pairs",
    assumes="additive reward; of text episodes whose segments start from the same messages",
    keeps="ties 0.5; strength as margin",
)
def _segment_pairs(record: Feedback, content: Content) -> Iterator[Pair]:
    yield _segments(record, content)


@conversion(
    "segment_preference",
    "labelled",
    assumes="the better one is good in itself, the other one bad",
    keeps=SURENESS,
)
def _segment_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    yield from both_sides(_segments(record, content))


@conversion("segment_preference", "ranked", assumes="strengths are evenly spaced", keeps="strength as gap")
def _segment_ranked(record: Feedback, content: Content) -> Iterator[Ranked]:
    yield ordered(_segments(record, content))


@conversion(
    "segment_preference", "demonstrations", assumes="the better one is worth imitating", keeps=SURENESS
)
def _segment_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    yield replace(preferred(_segments(record, content)), quality=record.annotator.type)


@conversion(
    "segment_preference",
    "critiqued",
    assumes="the rationale says what the worse one lacks and the better one has",
    keeps=SURENESS,
)
def _segment_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    yield critiqued_pair(record, _segments(record, content))


impossible("segment_preference", attempts="which one is better does not say which one is right")
