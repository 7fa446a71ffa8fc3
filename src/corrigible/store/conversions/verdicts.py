"""Verdicts by principle, and adjudications, as signals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from corrigible.records import (
    Adjudication,
    Feedback,
    Verdict,
)
from corrigible.records.views import (
    PairRow,
    verdict_pairs,
)
from corrigible.store.conversions.choices import SOFT, SURENESS, critiqued_pair, ordered, preferred
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
    ranked_by_prompt,
    tried,
    words_of,
)
from corrigible.store.conversions.matrix import CONVERSIONS, FROM_RECORDS, conversion
from corrigible.store.conversions.tries import Try, attempts_of
from corrigible.store.labelled import Labelled
from corrigible.store.pairs import Pair
from corrigible.store.signals import Attempt, Attempts, Critiqued, Demonstrated, Ranked

_AGREES = {"complies": 1.0, "violates": 0.0, "first": 1.0, "second": 0.0, "tie": 0.5}


def chance(payload: Verdict) -> float:
    """Probability that a target complies (or that the first is better)."""
    if payload.outcome not in _AGREES:
        raise NotConvertibleError("not_applicable" if payload.outcome == "na" else "undecided")
    return _AGREES[payload.outcome] if payload.p is None else payload.p


def _verdict_rows(records: Sequence[Feedback]) -> Iterator[PairRow | LeftOut]:
    """Verdicts about two, mixed over principles, and those about one as left out."""
    for record in records:
        if isinstance(record.payload, Verdict) and not record.payload.is_pairwise:
            yield LeftOut((record.id,), "nothing_replaced", "a verdict about one answer")
    yield from verdict_pairs(records)


def _verdicts(records: Sequence[Feedback], content: Content) -> Iterator[Pair | LeftOut]:
    for row in _verdict_rows(records):
        yield from [row] if isinstance(row, LeftOut) else pairs_from_rows([row], content)


@conversion(
    "verdict",
    "pairs",
    assumes="principles weigh alike",
    keeps=f"{SOFT}: the share of principles",
    together=True,
)
def _verdict_pairs(records: Sequence[Feedback], content: Content) -> Iterator[Pair | LeftOut]:
    yield from _verdicts(records, content)


@conversion("verdict", "labelled", assumes="what complies is good", keeps=f"{SURENESS}; both sides of two")
def _verdict_labelled(record: Feedback, content: Content) -> Iterator[Labelled | LeftOut]:
    payload = record.payload
    assert isinstance(payload, Verdict)
    p = chance(payload)
    if p == 0.5:
        raise NotConvertibleError("tie" if payload.is_pairwise else "undecided")
    sides = zip(record.targets, (p > 0.5, p < 0.5), strict=False)
    make = partial(labelled, record, content, weight=abs(2.0 * p - 1.0), criterion=payload.principle.id)
    yield from tried(record, [partial(make, target.sha256, desirable=good) for target, good in sides])


@conversion(
    "verdict",
    "ranked",
    assumes="probabilities of one judge on one principle are comparable",
    keeps="probability as score",
    together=True,
)
def _verdict_ranked(records: Sequence[Feedback], content: Content) -> Iterator[Ranked | LeftOut]:
    single: dict[str, list[tuple[str, Feedback, float]]] = defaultdict(list)
    for record in records:
        payload = record.payload
        assert isinstance(payload, Verdict)
        try:
            if payload.is_pairwise:
                (row,) = verdict_pairs([record])
                yield replace(ordered(pair_from_row(row, content)), criterion=payload.principle.id)
            else:
                judge = record.annotator.pseudonym
                single[payload.principle.id].append((judge, record, chance(payload)))
        except NotConvertibleError as why:
            yield LeftOut((record.id,), why.reason, why.detail)
    for principle, judged in single.items():
        yield from ranked_by_prompt(judged, content, criterion=principle)


@conversion("verdict", "demonstrations", assumes="what complies is worth imitating", keeps=SURENESS)
def _verdict_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    payload = record.payload
    assert isinstance(payload, Verdict)
    p, name = chance(payload), payload.principle.id
    if payload.is_pairwise:
        (row,) = verdict_pairs([record])
        one = preferred(pair_from_row(row, content))
        yield replace(one, quality=record.annotator.type, criterion=name)
    else:
        yield demonstrated(record, content, record.targets[0].sha256, weight=2.0 * p - 1.0, criterion=name)


@conversion(
    "verdict",
    "critiqued",
    assumes="the rationale, or the notes on the evidence, say what violates the principle",
    keeps=SURENESS,
)
def _verdict_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    payload = record.payload
    assert isinstance(payload, Verdict)
    p, name = chance(payload), payload.principle.id
    if payload.is_pairwise:
        (row,) = verdict_pairs([record])
        yield replace(critiqued_pair(record, pair_from_row(row, content)), criterion=name)
        return
    if p >= 0.5:
        raise NotConvertibleError("no_words", "nothing is wrong with it")
    notes = "; ".join(span.note for span in payload.evidence or () if span.note)
    target = record.targets[0]
    yield Critiqued(
        prompt=content.prompt(record.context),
        draft=content.response(target.sha256),
        critique=notes or words_of(record),
        weight=1.0 - 2.0 * p,
        group=group_of(record, target.sha256),
        criterion=name,
        episode=target.episode,
        **common(record),
    )


@conversion(
    "verdict",
    "attempts",
    assumes="what complies with the principle is right",
    keeps=f"{SURENESS}, averaged over the tries",
    together=True,
)
def _verdict_attempts(records: Sequence[Feedback], content: Content) -> Iterator[Attempts | LeftOut]:
    tries = []
    for record in records:
        payload = record.payload
        assert isinstance(payload, Verdict)
        try:
            if payload.is_pairwise:
                raise NotConvertibleError("undecided", "which one is better does not say which is right")
            p = chance(payload)
            if p == 0.5:
                raise NotConvertibleError("undecided")
            notes = "; ".join(span.note for span in payload.evidence or () if span.note)
            attempt = Attempt(
                response=content.response(record.targets[0].sha256),
                right=p > 0.5,
                feedback=notes or (record.rationale or ""),
            )
            judge, sure = record.annotator.pseudonym, abs(2.0 * p - 1.0)
            tries.append(Try(judge, record, attempt, sure, payload.principle.id))
        except NotConvertibleError as why:
            yield LeftOut((record.id,), why.reason, why.detail)
    yield from attempts_of(tries, content)


# -- adjudication ------------------------------------------------------------------------------------


def settled(record: Feedback) -> Feedback:
    """An adjudication as the gold judgement that it settles on, under its own id."""
    assert isinstance(record.payload, Adjudication)
    gold = record.payload.gold
    return record.model_copy(update={"payload": gold, "kind": gold.kind})


def _adjudicated(signal: str) -> None:
    @conversion(
        "adjudication",
        signal,
        assumes="the gold judgement replaces those that it resolves",
        keeps="as the gold judgement's kind",
        together=True,
    )
    def convert(records: Sequence[Feedback], content: Content) -> Iterator[object]:
        by_kind: dict[str, list[Feedback]] = defaultdict(list)
        for record in records:
            gold = settled(record)
            by_kind[gold.kind].append(gold)
        for kind, golds in by_kind.items():
            cell = CONVERSIONS.get((kind, signal))
            if cell is None:
                for gold in golds:
                    yield LeftOut((gold.id,), "not_applicable", f"a {kind} gives no {signal}")
            else:
                yield from cell.convert(golds, content)


for _signal in FROM_RECORDS:
    _adjudicated(_signal)
