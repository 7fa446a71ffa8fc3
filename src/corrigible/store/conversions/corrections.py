"""Corrections as signals: critique, spans, edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from corrigible.records import (
    Critique,
    Edit,
    Feedback,
    Span,
    Spans,
)
from corrigible.records.editing import changed_ranges
from corrigible.records.views import edit_pairs
from corrigible.store.conversions.choices import both_sides, ordered
from corrigible.store.conversions.content import (
    Content,
    LeftOut,
    NotConvertibleError,
    common,
    demonstrated,
    group_of,
    labelled,
    pair_from_row,
    text_of,
    tried,
    words_of,
)
from corrigible.store.conversions.matrix import conversion, impossible
from corrigible.store.labelled import Labelled
from corrigible.store.pairs import Pair
from corrigible.store.signals import Attempt, Attempts, Critiqued, Demonstrated, Ranked, Turn

# -- critique ----------------------------------------------------------------------------------------


def _refined(record: Feedback, sha: str, content: Content) -> tuple[Turn, tuple[Feedback, ...]]:
    """What became of a criticised text, and the record that says so: the critique's own suggestion, an edit
    of the same judgement, the last edit of that text, a demonstration for the same prompt."""
    payload = record.payload
    assert isinstance(payload, Critique)
    edits = [e for e in content.revisions.get(sha, []) if e.created_at >= record.created_at]
    own = [e for e in content.revisions.get(sha, []) if e.judgement_id == record.judgement_id]
    shown = [
        d for d in content.revisions.get(record.context or "", []) if d.judgement_id == record.judgement_id
    ]
    if payload.suggestion is not None:
        same = tuple(e for e in own if isinstance(e.payload, Edit) and e.payload.after == payload.suggestion)
        return content.response(payload.suggestion), same
    for revision in (*own[-1:], *edits[-1:]):
        assert isinstance(revision.payload, Edit)
        if revision.payload.after != sha:
            return content.response(revision.payload.after), (revision,)
    for example in shown[-1:]:
        return content.response(example.targets[0].sha256), (example,)
    return (), ()


@conversion(
    "critique",
    "critiqued",
    assumes="what replaced the text afterwards follows the critique",
    keeps="without a suggestion, edit or demonstration it stays a critique alone",
)
def _critique_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued | LeftOut]:
    payload = record.payload
    assert isinstance(payload, Critique)

    def make(sha: str, episode: str | None) -> Critiqued:
        refined, revisions = _refined(record, sha, content)
        return Critiqued(
            prompt=content.prompt(record.context),
            draft=content.response(sha),
            critique=payload.text,
            refined=refined,
            weight=1.0,
            group=group_of(record, sha),
            episode=episode,
            **common(record, *revisions),
        )

    yield from tried(record, [partial(make, t.sha256, t.episode) for t in record.targets])


@conversion(
    "critique",
    "labelled",
    assumes="the polarity of the words is that of the answer",
    keeps="the label; neutral words give none",
)
def _critique_labelled(record: Feedback, content: Content) -> Iterator[Labelled | LeftOut]:
    payload = record.payload
    assert isinstance(payload, Critique)
    if payload.polarity == 0:
        raise NotConvertibleError("undecided")
    make = partial(labelled, record, content, desirable=payload.polarity > 0)
    yield from tried(record, [partial(make, target.sha256) for target in record.targets])


_SUGGESTION = "its suggestion is an edit record of its own: learn from that"
impossible(
    "critique",
    pairs=_SUGGESTION,
    ranked=_SUGGESTION,
    demonstrations=_SUGGESTION,
    attempts="words do not say what is right; they become the feedback of tries that were checked",
)

# -- spans -------------------------------------------------------------------------------------------


def _character_spans(record: Feedback, content: Content) -> tuple[str, tuple[Span, ...]]:
    payload = record.payload
    assert isinstance(payload, Spans)
    if any(span.unit != "char" for span in payload.spans):
        raise NotConvertibleError("not_characters")
    text = text_of(content.response(record.targets[0].sha256))
    if any(span.end > len(text) for span in payload.spans):
        raise NotConvertibleError("out_of_range", f"a text of {len(text)} characters")
    return text, payload.spans


def weighted_spans(
    length: int, marks: Sequence[tuple[int, int, float]], rest: float
) -> tuple[tuple[int, int, float], ...]:
    """Overlapping marks as disjoint spans in order, the lowest weight winning; weight 1 is left out."""
    edges = sorted({0, length, *(edge for start, stop, _ in marks for edge in (start, stop))})
    found: list[tuple[int, int, float]] = []
    for start, stop in pairwise(edges):
        weight = min((w for a, b, w in marks if a <= start and stop <= b), default=rest)
        if found and found[-1][1:] == (start, weight):
            found[-1] = (found[-1][0], stop, weight)
        else:
            found.append((start, stop, weight))
    return tuple(span for span in found if span[2] != 1.0)


@conversion(
    "spans",
    "demonstrations",
    assumes="locality: what is not marked as bad is worth imitating",
    keeps="bad spans weigh 0 (or −severity / 3); what a marking that is not exhaustive says nothing of, 0.5",
)
def _spans_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    payload, options = record.payload, content.options
    assert isinstance(payload, Spans)
    text, spans = _character_spans(record, content)
    push = options.bad_spans == "push_down"
    marks = [(s.start, s.end, 1.0 if s.polarity >= 0 else -s.severity / 3.0 if push else 0.0) for s in spans]
    rest = 1.0 if payload.exhaustive else options.unmarked
    weights = weighted_spans(len(text), marks, rest)
    known = sum(stop - start for start, stop, weight in weights if weight <= 0)
    if known == len(text) and not push:
        raise NotConvertibleError("nothing_good")
    yield demonstrated(record, content, record.targets[0].sha256, spans=weights)


@conversion(
    "spans",
    "labelled",
    assumes="the worst span decides; without a bad one it is good if it was read to its end or praised",
    keeps="severity / 3 of the worst span as weight",
)
def _spans_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    payload = record.payload
    assert isinstance(payload, Spans)
    sha = record.targets[0].sha256
    bad = max((s.severity for s in payload.spans if s.polarity < 0), default=None)
    if bad is not None:
        yield labelled(record, content, sha, desirable=False, weight=bad / 3.0)
    elif payload.exhaustive or any(s.polarity > 0 for s in payload.spans):
        yield labelled(record, content, sha, desirable=True)
    else:
        raise NotConvertibleError("undecided")


@conversion(
    "spans",
    "critiqued",
    assumes="labels and notes say what is wrong with the marked words",
    keeps="the words",
)
def _spans_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    text, spans = _character_spans(record, content)
    lines = [f"“{text[s.start : s.end]}”: {s.note or s.label}" for s in spans if s.note or s.label]
    if not lines:
        raise NotConvertibleError("no_words")
    target = record.targets[0]
    yield Critiqued(
        prompt=content.prompt(record.context),
        draft=content.response(target.sha256),
        critique="\n".join(lines),
        weight=1.0,
        group=group_of(record, target.sha256),
        episode=target.episode,
        **common(record),
    )


_ONE = "marks on one answer do not compare it with another"
impossible("spans", pairs=_ONE, ranked=_ONE, attempts="marks do not say whether the whole is right")

# -- edit --------------------------------------------------------------------------------------------


def _edited(record: Feedback, content: Content) -> Pair:
    rows = list(edit_pairs(record))
    if not rows:
        raise NotConvertibleError("unchanged")
    return pair_from_row(rows[0], content)


@conversion("edit", "pairs", assumes="the edit fixed what mattered", keeps="nothing of how much")
def _edit_pairs(record: Feedback, content: Content) -> Iterator[Pair]:
    yield _edited(record, content)


@conversion(
    "edit",
    "labelled",
    assumes="what was edited was bad, what came of it is good",
    keeps="nothing of how much",
)
def _edit_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    yield from both_sides(_edited(record, content))


@conversion("edit", "ranked", assumes="the edit fixed what mattered", keeps="two scores, 1 apart")
def _edit_ranked(record: Feedback, content: Content) -> Iterator[Ranked]:
    yield ordered(_edited(record, content))


@conversion(
    "edit",
    "demonstrations",
    assumes="the edit fixed what mattered",
    keeps="what was changed weighs 1, the rest 0.1; an edit by paths weighs 1 throughout",
)
def _edit_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    payload = record.payload
    assert isinstance(payload, Edit)
    _edited(record, content)
    spans: tuple[tuple[int, int, float], ...] = ()
    if payload.is_text and payload.ops:
        text = text_of(content.response(payload.after))
        changed = [(start, stop, 1.0) for start, stop in changed_ranges(payload)]
        if any(stop > len(text) for _, stop, _ in changed):
            raise NotConvertibleError("out_of_range", f"a text of {len(text)} characters")
        # A pure deletion leaves nothing that was changed: then all of it is what the editor wanted.
        spans = weighted_spans(len(text), changed, content.options.unchanged) if changed else ()
    yield demonstrated(record, content, payload.after, spans=spans)


@conversion(
    "edit",
    "critiqued",
    assumes="the rationale, or the critique that the edit supersedes, says why",
    keeps="the words",
)
def _edit_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    pair = _edited(record, content)
    before = content.critiques.get(record.supersedes or "")
    revised: tuple[Feedback, ...] = (record,)
    if before is not None and isinstance(before.payload, Critique):
        words, revised = before.payload.text, (record, before)
    else:
        words = words_of(record)
    yield Critiqued(
        prompt=pair.prompt,
        draft=pair.rejected,
        critique=words,
        refined=pair.chosen,
        weight=1.0,
        group=pair.group,
        criterion=pair.criterion,
        episode=pair.rejected_episode,
        **common(*revised),
    )


MISTAKES = frozenset({"meaning_changed", "factual", "safety"})
"""Intents of an edit that say that the text before was wrong, not merely badly put."""


@conversion(
    "edit",
    "attempts",
    assumes="a text edited for its facts, meaning or safety was wrong, and is right after a final edit",
    keeps="after an edit that is not final it could not be checked",
)
def _edit_attempts(record: Feedback, content: Content) -> Iterator[Attempts]:
    payload = record.payload
    assert isinstance(payload, Edit)
    intents = sorted({op.intent for op in payload.ops if op.applies and op.intent in MISTAKES})
    if not intents:
        raise NotConvertibleError("no_mistake")
    pair = _edited(record, content)
    words = record.rationale or ""
    yield Attempts(
        prompt=pair.prompt,
        attempts=(
            Attempt(response=pair.rejected, right=False, feedback=words, error=", ".join(intents)),
            Attempt(response=pair.chosen, right=True if payload.final else None),
        ),
        weight=1.0,
        group=pair.group,
        **common(record),
    )
