"""What people do, allow and know as signals: demonstration, intervention, approval, implicit event, label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from corrigible.records import (
    Approval,
    Demonstration,
    Feedback,
    ImplicitEvent,
    Intervention,
    Item,
    Label,
    Message,
    sha256_of_text,
)
from corrigible.records.views import (
    DemonstrationRow,
    Slice,
    implicit_signals,
    intervention_rows,
)
from corrigible.store.conversions.choices import SURENESS
from corrigible.store.conversions.content import (
    Content,
    LeftOut,
    NotConvertibleError,
    common,
    demonstrated,
    group_of,
    labelled,
    left_over,
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
# -- behaviour, approval, label ----------------------------------------------------------------------


@conversion(
    "implicit_event",
    "labelled",
    assumes="as the rule of the interpreter says; none without one",
    keeps=f"{SURENESS} of the rule, times 1 / propensity (at most 20)",
    together=True,
)
def _implicit_labelled(records: Sequence[Feedback], content: Content) -> Iterator[Labelled | LeftOut]:
    reader = content.options.interpreter
    if reader is None:
        for record in records:
            yield LeftOut((record.id,), "needs_interpreter")
        return
    by_id = {record.id: record for record in records}
    found: list[Labelled | LeftOut] = []
    for row in implicit_signals(records, reader):
        record = by_id[row.derived_from[0]]
        assert isinstance(record.payload, ImplicitEvent)
        sure = (2.0 * row.p_correct - 1.0) * row.value
        try:
            one = labelled(record, content, row.target, desirable=sure > 0, weight=row.weight * abs(sure))
            found.append(one)
        except NotConvertibleError as why:
            found.append(LeftOut((record.id,), why.reason, why.detail))
    yield from found
    yield from left_over(records, found, {record.id: "undecided" for record in records})


_BEHAVIOUR = "behaviour is read by an interpreter, as labels; see 'labelled'"
impossible(
    "implicit_event",
    pairs=_BEHAVIOUR,
    ranked=_BEHAVIOUR,
    demonstrations=_BEHAVIOUR,
    critiqued=_BEHAVIOUR,
    attempts=_BEHAVIOUR,
)


def _approval(record: Feedback) -> Approval:
    assert isinstance(record.payload, Approval)
    if record.payload.decision == "defer":
        raise NotConvertibleError("undecided")
    return record.payload


@conversion(
    "approval", "labelled", assumes="allowed is good, denied or replaced is bad", keeps="the decision"
)
def _approval_labelled(record: Feedback, content: Content) -> Iterator[Labelled]:
    payload = _approval(record)
    good = payload.decision == "approve"
    yield labelled(record, content, record.targets[0].sha256, desirable=good)
    if payload.alternative is not None:
        yield labelled(record, content, payload.alternative, desirable=True)


@conversion(
    "approval", "pairs", assumes="the alternative is better than what was proposed", keeps="the decision"
)
def _approval_pairs(record: Feedback, content: Content) -> Iterator[Pair]:
    payload = _approval(record)
    if payload.alternative is None:
        raise NotConvertibleError("nothing_replaced")
    target = record.targets[0]
    chosen, rejected = content.response(payload.alternative), content.response(target.sha256)
    if chosen == rejected:
        raise NotConvertibleError("equal_sides")
    yield Pair(
        prompt=content.prompt(record.context),
        chosen=chosen,
        rejected=rejected,
        p_chosen=1.0,
        weight=1.0,
        group=group_of(record, target.sha256),
        criterion="overall",
        chosen_ref=payload.alternative,
        rejected_ref=target.sha256,
        prompt_ref=record.context,
        rejected_episode=target.episode,
        **common(record),
    )


@conversion(
    "approval",
    "demonstrations",
    assumes="what was allowed, or put in its place, is worth imitating",
    keeps="the decision",
)
def _approval_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    payload = _approval(record)
    if payload.decision == "deny":
        raise NotConvertibleError("failed")
    yield demonstrated(record, content, payload.alternative or record.targets[0].sha256)


impossible(
    "approval",
    ranked="there are two sides at most: learn from 'pairs'",
    critiqued="a decision is no words",
    attempts="what may be done does not say what is right",
)


def _classes(record: Feedback) -> Label:
    payload = record.payload
    assert isinstance(payload, Label)
    if not payload.values:
        raise NotConvertibleError("undecided", payload.action)
    return payload


def _named(values: Sequence[str]) -> tuple[Message, ...]:
    return (Message(role="assistant", content=", ".join(values)),)


@conversion(
    "label", "demonstrations", assumes="the task is to answer a text with its classes", keeps="the classes"
)
def _label_demonstrations(record: Feedback, content: Content) -> Iterator[Demonstrated]:
    payload = _classes(record)
    if payload.action == "unsure":
        raise NotConvertibleError("undecided")
    sha = record.targets[0].sha256
    yield Demonstrated(
        prompt=(*content.prompt(record.context), *content.prompt(sha)),
        response=_named(payload.values),
        weight=1.0,
        group=group_of(record, sha),
        quality=record.annotator.type,
        **common(record),
    )


impossible(
    "label",
    pairs="a class is no answer that was compared; learn from 'demonstrations'",
    labelled="a class says what a text is, not whether it is good",
    ranked="classes have no order",
    critiqued="a class is no words about an answer",
    attempts="a class says what a text is, not whether it is right",
)
for _kind, _why in {
    "concept_correction": "it is about a model's use of a concept; views give a penalty",
    "click": "it is about regions of an image",
    "answer": "it says what the person wants, not how good an answer is; views give a belief",
}.items():
    impossible(
        _kind, pairs=_why, labelled=_why, ranked=_why, demonstrations=_why, critiqued=_why, attempts=_why
    )
