"""What people do as signals: demonstration and intervention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from corrigible.records import (
    Demonstration,
    Feedback,
    Intervention,
    Item,
    Message,
    sha256_of_text,
)
from corrigible.records.views import (
    DemonstrationRow,
    Slice,
    intervention_rows,
)
from corrigible.store.conversions.content import (
    Content,
    NotConvertibleError,
    common,
    group_of,
    text_of,
    words_of,
)
from corrigible.store.conversions.matrix import conversion, impossible
from corrigible.store.labelled import Labelled
from corrigible.store.pairs import Pair
from corrigible.store.signals import Attempt, Attempts, Critiqued, Demonstrated, Turn

# -- demonstration -----------------------------------------------------------------------------------


def _shown(record: Feedback, content: Content) -> list[tuple[Turn, Turn]]:
    """Prompt and response of each text that a demonstration shows: each step of its episode, or its text."""
    payload = record.payload
    assert isinstance(payload, Demonstration)
    if payload.episode is None:
        return [(content.prompt(record.context), content.response(record.targets[0].sha256))]
    episode = content.episodes.get(payload.episode)
    if episode is None:
        raise NotConvertibleError("missing_episode", payload.episode)
    steps = content.steps(Slice(episode.id, 0, len(episode.steps)))
    return [(prompt, _says(action)) for _, prompt, action in steps]


def _says(action: Message) -> Turn:
    if not action.text.strip() and not action.tool_calls:
        raise NotConvertibleError("empty_response")
    return (action,)


@conversion(
    "demonstration",
    "demonstrations",
    assumes="the source did it well, unless it is said to have failed",
    keeps="who (expert, novice, scripted, agent) as quality; weight 1, shared by the steps of an episode",
)
def _demonstration_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    payload = record.payload
    assert isinstance(payload, Demonstration)
    if payload.success is False:
        raise NotConvertibleError("failed")
    shown = _shown(record, content)
    target = record.targets[0]
    for prompt, response in shown:
        yield Demonstrated(
            prompt=prompt,
            response=response,
            weight=1.0 / len(shown),
            group=group_of(record, target.sha256),
            quality=payload.source,
            episode=target.episode if payload.episode is None else None,
            **common(record),
        )


@conversion(
    "demonstration",
    "labelled",
    assumes="what succeeded is good and what failed is bad",
    keeps="unknown success gives none",
)
def _demonstration_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    payload = record.payload
    assert isinstance(payload, Demonstration)
    if payload.success is None:
        raise NotConvertibleError("undecided")
    shown = _shown(record, content)
    for prompt, response in shown:
        yield Labelled(
            prompt=prompt,
            response=response,
            desirable=payload.success,
            weight=1.0 / len(shown),
            group=group_of(record, record.targets[0].sha256),
            criterion="overall",
            **common(record),
        )


@conversion(
    "demonstration",
    "attempts",
    assumes="a demonstration is one try",
    keeps="success; unknown is 'could not be checked'",
)
def _demonstration_attempts(record: Feedback, content: Content) -> Iterator[Attempts]:
    payload = record.payload
    assert isinstance(payload, Demonstration)
    shown = _shown(record, content)
    prompt, response = shown[-1]
    yield Attempts(
        prompt=prompt,
        attempts=(Attempt(response=response, right=payload.success, feedback=record.rationale or ""),),
        weight=1.0,
        group=group_of(record, record.targets[0].sha256),
        **common(record),
    )


_ALONE = "one demonstration alone has nothing to compare with; see corrigible.align.candidates.data_vs_self"
impossible(
    "demonstration", pairs=_ALONE, ranked=_ALONE, critiqued="a demonstration is no words about a draft"
)

# -- intervention ------------------------------------------------------------------------------------


def _intervention(record: Feedback) -> tuple[Intervention, str, str]:
    """The payload, the parent episode and the working branch."""
    payload = record.payload
    assert isinstance(payload, Intervention)
    parent = str(record.targets[0].episode)
    return payload, parent, payload.branch or parent


def _taken(record: Feedback, content: Content) -> list[tuple[int, Turn, Message]]:
    """The steps of a text episode in which the person acted."""
    rows = [row for row in intervention_rows(record) if isinstance(row, DemonstrationRow)]
    if not rows:
        raise NotConvertibleError("nothing_replaced", "the person did not act")
    return content.steps(rows[0].steps)


@conversion(
    "intervention",
    "demonstrations",
    assumes="the person was right",
    keeps="weight 1, shared by the steps in which the person acted; of text episodes only",
)
def _intervention_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    taken = _taken(record, content)
    _, _, branch = _intervention(record)
    for _, prompt, action in taken:
        yield Demonstrated(
            prompt=prompt,
            response=_says(action),
            weight=1.0 / len(taken),
            group=group_of(record, record.targets[0].sha256),
            quality=record.annotator.type,
            episode=branch if len(taken) == 1 else None,
            **common(record),
        )


def _instead(record: Feedback, content: Content) -> Pair:
    """What the person did first against what the policy had done at the same place."""
    payload, parent, _ = _intervention(record)
    if not payload.discarded:
        raise NotConvertibleError("nothing_replaced", "no step was taken back")
    at, prompt, action = _taken(record, content)[0]
    before = [step for step in content.steps(Slice(parent, 0, payload.t_detect + 1)) if step[0] == at]
    if not before:
        raise NotConvertibleError("nothing_replaced", f"the parent has no step {at}")
    if before[0][1] != prompt:
        raise NotConvertibleError("prompts_differ")
    chosen, rejected = _says(action), _says(before[0][2])
    if chosen == rejected:
        raise NotConvertibleError("equal_sides")
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        p_chosen=1.0,
        weight=1.0,
        group=group_of(record, record.targets[0].sha256),
        criterion="overall",
        chosen_ref=sha256_of_text(text_of(chosen)),
        rejected_ref=sha256_of_text(text_of(rejected)),
        prompt_ref=Item.of_messages(prompt).sha256,
        **common(record),
    )


@conversion(
    "intervention",
    "pairs",
    assumes="the person was right; of text episodes that were rewound",
    keeps="the first step that was done anew, against the one it replaced",
)
def _intervention_pairs(record: Feedback, content: Content) -> Iterator[Pair]:
    yield _instead(record, content)


@conversion(
    "intervention",
    "labelled",
    assumes="the person was right: taken steps are good, discarded ones bad",
    keeps="weight 1 per side, shared by its steps",
)
def _intervention_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    payload, parent, _ = _intervention(record)
    bad = payload.discarded or range(payload.t_detect, payload.t_take)
    sides = [(False, content.steps(Slice(parent, bad.start, bad.stop)) if bad else [])]
    if payload.mode in ("takeover", "blend", "nudge") and payload.t_take < payload.t_release:
        sides.append((True, _taken(record, content)))
    if not any(steps for _, steps in sides):
        raise NotConvertibleError("nothing_replaced")
    for good, steps in sides:
        for _, prompt, action in steps:
            yield Labelled(
                prompt=prompt,
                response=_says(action),
                desirable=good,
                weight=1.0 / len(steps),
                group=group_of(record, record.targets[0].sha256),
                criterion="overall",
                **common(record),
            )


@conversion(
    "intervention",
    "critiqued",
    assumes="command or reason are about the step at which trouble was noticed",
    keeps="what the person did instead, where the step was done anew",
)
def _intervention_critiqued(record: Feedback, content: Content) -> Iterator[Critiqued]:
    payload, parent, _ = _intervention(record)
    words = (payload.command or payload.reason or "").strip() or words_of(record)
    draft = content.steps(Slice(parent, payload.t_detect, payload.t_detect + 1))
    if not draft:
        raise NotConvertibleError("not_text", f"no step {payload.t_detect}")
    _, prompt, action = draft[0]
    one = Critiqued(
        prompt=prompt,
        draft=_says(action),
        critique=words,
        weight=1.0,
        group=group_of(record, record.targets[0].sha256),
        episode=parent,
        **common(record),
    )
    try:
        pair = _instead(record, content)
    except NotConvertibleError:
        yield one
        return
    yield replace(one, prompt=pair.prompt, draft=pair.rejected, refined=pair.chosen)


impossible(
    "intervention",
    ranked="there are two branches at most: learn from 'pairs'",
    attempts="stepping in says what went wrong, not whether the task was solved",
)
