"""What people do unasked, allow, and call things, as signals: implicit event, approval, label; and the kinds
that are about no response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from corrigible.records import (
    Approval,
    Feedback,
    ImplicitEvent,
    Label,
    Message,
)
from corrigible.records.views import (
    implicit_signals,
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
)
from corrigible.store.conversions.matrix import conversion, impossible
from corrigible.store.labelled import Labelled
from corrigible.store.pairs import Pair
from corrigible.store.signals import Demonstrated


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
