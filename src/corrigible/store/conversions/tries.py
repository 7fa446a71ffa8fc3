"""Tries at a task, right or wrong: step labels and outcomes as attempts, and what steps teach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from corrigible.records import (
    Feedback,
    Outcome,
    StepLabels,
)
from corrigible.records.views import (
    Slice,
)
from corrigible.store.conversions.content import (
    Content,
    LeftOut,
    NotConvertibleError,
    common,
    demonstrated,
    group_of,
    labelled,
    text_of,
)
from corrigible.store.conversions.matrix import conversion, impossible
from corrigible.store.conversions.scores import log_of, share_of
from corrigible.store.labelled import Labelled
from corrigible.store.signals import Attempt, Attempts, Demonstrated


@dataclass(frozen=True)
class Try:
    """One judged try, before it is put beside the others at its prompt."""

    judge: str
    record: Feedback
    attempt: Attempt
    weight: float = 1.0
    criterion: str = "overall"


def attempts_of(tries: Iterable[Try], content: Content) -> Iterator[Attempts | LeftOut]:
    """Tries at one prompt under one judge, in the order they were judged, as one :class:`Attempts`.

    A text that was judged more than once is one try; when the judgements differ, it could not be checked.
    Critiques of it become its feedback where the judge has none.
    """
    groups: dict[tuple[str, str, str], list[Try]] = defaultdict(list)
    for one in tries:
        if one.record.context is None:
            yield LeftOut((one.record.id,), "no_prompt")
        else:
            groups[one.judge, one.record.context, one.criterion].append(one)
    for members in groups.values():
        kept: dict[str, list[Try]] = defaultdict(list)
        for one in members:
            kept[one.record.targets[0].sha256].append(one)
        first = members[0].record
        try:
            prompt = content.prompt(first.context)
        except NotConvertibleError as why:
            yield LeftOut(tuple(one.record.id for one in members), why.reason, why.detail)
            continue
        remarks = {sha: content.words_on.get(sha, []) for sha in kept}
        yield Attempts(
            prompt=prompt,
            attempts=tuple(_merged(each, remarks[sha]) for sha, each in kept.items()),
            weight=sum(one.weight for one in members) / len(members),
            group=group_of(first, first.targets[0].sha256),
            criterion=members[0].criterion,
            **common(*(m.record for m in members), *(r for each in remarks.values() for r in each)),
        )


def _merged(tries: Sequence[Try], remarks: Sequence[Feedback]) -> Attempt:
    last = tries[-1].attempt
    if len({one.attempt.right for one in tries}) > 1:
        last = replace(last, right=None, first_wrong=None)
    said = [str(getattr(remark.payload, "text", "")) for remark in remarks]
    return replace(last, feedback=last.feedback or "\n".join(said))


@conversion(
    "outcome",
    "attempts",
    assumes="verifier exact, and half the score is not right; tries are made in the order they were checked",
    keeps="an error of the verifier, or two runs that differ, is 'could not be checked'",
    together=True,
)
def _outcome_attempts(records: Sequence[Feedback], content: Content) -> Iterator[Attempts | LeftOut]:
    tries = []
    for record in records:
        payload = record.payload
        assert isinstance(payload, Outcome)
        try:
            share = None if payload.exit != "ok" and payload.passed is None else share_of(payload)
            attempt = Attempt(
                response=content.response(record.targets[0].sha256),
                right=None if share is None else share == 1.0,
                feedback=log_of(payload),
                error="" if payload.exit == "ok" else payload.exit,
            )
            tries.append(Try(payload.verifier.to_json_text(), record, attempt))
        except NotConvertibleError as why:
            yield LeftOut((record.id,), why.reason, why.detail)
    yield from attempts_of(tries, content)


# -- step labels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Steps:
    texts: tuple[str, ...]
    first_wrong: int | None
    right: bool | None
    weight: float


def _steps(record: Feedback, content: Content) -> _Steps:
    """The steps of a text with their verdict.

    The steps are those of its episode if there are several, else its paragraphs, else its lines: the first
    division that has every step that was judged. It is right when all steps were judged and none is wrong;
    a probability below one half is wrong. Values of 0 are neutral.
    """
    payload = record.payload
    assert isinstance(payload, StepLabels)
    texts = step_texts(record, payload.judged_until, content)
    wrong = [label.i for label in payload.labels if label.value == -1 or 0 < label.value < 0.5]
    first = payload.first_error if payload.first_error is not None else min(wrong, default=None)
    whole = payload.judged_until == len(texts) - 1
    right = False if first is not None else True if whole else None
    soft = [abs(2.0 * label.value - 1.0) for label in payload.labels if 0 < label.value < 1]
    return _Steps(texts, first, right, min(soft, default=1.0))


def step_texts(record: Feedback, judged_until: int, content: Content) -> tuple[str, ...]:
    """The texts of the steps of a record's target; see the docstring of the guide on conversions."""
    target = record.targets[0]
    episode = content.episodes.get(target.episode or "")
    if episode is not None:
        start, stop = target.steps or (0, len(episode.steps))
        steps = [action.text for _, _, action in content.steps(Slice(episode.id, start, stop))]
        if len(steps) > max(judged_until, 1):
            return tuple(steps)
    text = text_of(content.response(target.sha256))
    for mark in ("\n\n", "\n"):
        pieces = tuple(piece.strip() for piece in text.split(mark) if piece.strip())
        if len(pieces) > judged_until:
            return pieces
    raise NotConvertibleError("no_steps", f"step {judged_until} was judged")


@conversion(
    "step_labels",
    "attempts",
    assumes="right is what has no wrong step to its end",
    keeps="steps and the first wrong one; what was not judged to its end could not be checked",
    together=True,
)
def _steps_attempts(records: Sequence[Feedback], content: Content) -> Iterator[Attempts | LeftOut]:
    tries = []
    for record in records:
        try:
            steps = _steps(record, content)
            attempt = Attempt(
                response=content.response(record.targets[0].sha256),
                right=steps.right,
                feedback=record.rationale or "",
                steps=steps.texts,
                first_wrong=steps.first_wrong,
            )
            tries.append(Try(record.annotator.pseudonym, record, attempt, steps.weight))
        except NotConvertibleError as why:
            yield LeftOut((record.id,), why.reason, why.detail)
    yield from attempts_of(tries, content)


@conversion(
    "step_labels",
    "labelled",
    assumes="right is what has no wrong step to its end",
    keeps="least sure step as weight",
)
def _steps_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    steps = _steps(record, content)
    if steps.right is None:
        raise NotConvertibleError("unfinished")
    sha = record.targets[0].sha256
    yield labelled(record, content, sha, desirable=steps.right, weight=steps.weight)


@conversion(
    "step_labels",
    "demonstrations",
    assumes="locality: steps before the first wrong one are worth imitating",
    keeps="weight 0 from the first wrong step, and beyond what was judged",
)
def _steps_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    payload = record.payload
    assert isinstance(payload, StepLabels)
    steps = _steps(record, content)
    sha = record.targets[0].sha256
    text = text_of(content.response(sha))
    known = payload.judged_until + 1 if steps.first_wrong is None else steps.first_wrong
    if known == 0:
        raise NotConvertibleError("nothing_good")
    place = 0
    for step in steps.texts[:known]:
        at = text.find(step, place)
        if at < 0:
            raise NotConvertibleError("no_steps", "the steps are those of an episode, not of the text")
        place = at + len(step)
    spans = ((place, len(text), 0.0),) if known < len(steps.texts) else ()
    yield demonstrated(record, content, sha, weight=steps.weight, spans=spans)


impossible(
    "step_labels",
    pairs="labels of steps do not compare two answers; what is right and wrong is in 'attempts'",
    ranked="labels of steps are no score of the whole",
    critiqued="labels are no words",
)
