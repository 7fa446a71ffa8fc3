"""The feedback record: envelope, targets, and a payload or the reason why there is none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, TypedDict, Unpack

from pydantic import Field, ValidationError, model_validator

from corrigible.errors import BadInputError
from corrigible.records.base import Id, Micros, Record, Sha256, bad_input, new_id, now_us
from corrigible.records.envelope import (
    AGGREGATE,
    Annotator,
    Channel,
    Consent,
    Effort,
    NotJudged,
    PolicyRef,
    Presentation,
    Status,
)
from corrigible.records.items import Item, MessageLike, TargetRef, as_messages
from corrigible.records.migrations import FEEDBACK_SCHEMA, migrate
from corrigible.records.payloads import (
    Adjudication,
    Approval,
    Comparison,
    Critique,
    ImplicitEvent,
    Intervention,
    Payload,
    PayloadBase,
    Ranking,
    Rating,
    Spans,
    UnknownPayload,
    Verdict,
)


class Envelope(TypedDict, total=False):
    """The envelope fields that a caller may give to :meth:`Feedback.on` and :func:`comparison`."""

    id: str
    judgement_id: str
    task_id: str | None
    campaign_id: str | None
    context: str | None
    channel: Channel
    presentation: Presentation | None
    effort: Effort | None
    confidence: float | None
    rationale: str | None
    policy: tuple[PolicyRef | None, ...] | None
    propensity: float | None
    consent: Consent
    supersedes: str | None
    status: Status
    created_at: int


class Feedback(Record):
    """One act of feedback. Immutable: a correction is a new record that supersedes this one.

    Targets stand in the order of their content hash, never of the screen; payload, presentation and policy
    refer to that order. :meth:`on` sorts for you. ``kind`` and ``judgement_id`` fill themselves in.
    """

    schema_version: Literal["corrigible/feedback@1"] = FEEDBACK_SCHEMA
    id: Id = Field(default_factory=new_id)
    kind: str = ""
    judgement_id: Id = ""
    task_id: str | None = None
    campaign_id: str | None = None
    targets: tuple[TargetRef, ...] = Field(min_length=1)
    context: Sha256 | None = None
    annotator: Annotator
    channel: Channel = "api"
    presentation: Presentation | None = None
    effort: Effort | None = None
    confidence: float | None = Field(default=None, ge=0.0, le=1.0)
    rationale: str | None = None
    policy: tuple[PolicyRef | None, ...] | None = None
    propensity: float | None = Field(default=None, gt=0.0, le=1.0)
    consent: Consent = Consent()
    supersedes: Id | None = None
    status: Status = "live"
    created_at: Micros = Field(default_factory=now_us)
    not_judged: NotJudged | None = None
    payload: Payload | None = None  # last, so that an unknown one can be written back as its source text

    @model_validator(mode="after")
    def _check(self) -> Self:
        payload = self.payload
        if (payload is None) == (self.not_judged is None):
            raise ValueError("a record holds a payload or the reason why it was not judged: exactly one")
        kind = payload.kind if payload is not None else self.not_judged.intended  # type: ignore[union-attr]
        if self.kind != kind:
            if self.kind:
                raise ValueError(f"the record says kind {self.kind!r} and its payload {kind!r}")
            self.__dict__["kind"] = kind
        if not self.judgement_id:
            self.__dict__["judgement_id"] = self.id
        self._check_targets()
        if self.presentation is not None:
            self._check_presentation(self.presentation)
        if self.policy is not None and len(self.policy) != len(self.targets):
            raise ValueError(f"policy names {len(self.policy)} of {len(self.targets)} targets")
        if self.supersedes == self.id:
            raise ValueError("a record cannot supersede itself")
        if isinstance(payload, PayloadBase):
            self._check_payload(payload)
        return self

    def _check_targets(self) -> None:
        targets = self.targets
        for before, after in itertools.pairwise(targets):
            if before.sha256 >= after.sha256 and before.sort_key > after.sort_key:
                raise ValueError("targets are ordered by content hash; Feedback.on(...) sorts them")

    def _check_presentation(self, shown: Presentation) -> None:
        if shown.order is not None and sorted(shown.order) != list(range(len(self.targets))):
            raise ValueError(f"presentation.order {list(shown.order)} is no permutation of the targets")
        if shown.shown_at is not None and self.created_at < shown.shown_at:
            raise ValueError("created_at is before presentation.shown_at")

    def _check_payload(self, payload: PayloadBase) -> None:
        count, low, high = len(self.targets), payload.min_targets, payload.max_targets
        if count < low or (high is not None and count > high):
            wanted = str(low) if low == high else f"{low} to {high}" if high else f"{low} or more"
            raise ValueError(f"kind {payload.kind!r} takes {wanted} targets, not {count}")
        if payload.target_types:
            wrong = next((t.type for t in self.targets if t.type not in payload.target_types), None)
            if wrong is not None:
                raise ValueError(
                    f"kind {payload.kind!r} is about {sorted(payload.target_types)}, not {wrong!r}"
                )
        fault = payload.fault_with_targets(count)
        if fault is not None:
            raise ValueError(fault)
        judged = payload.gold if isinstance(payload, Adjudication) else payload
        if isinstance(judged, Comparison):
            if judged.p_first is not None and not (
                self.annotator.type == "ai_judge" or AGGREGATE in self.annotator.groups
            ):
                raise ValueError(f"p_first is for AI judges and annotators of the group {AGGREGATE!r}")
        elif isinstance(payload, ImplicitEvent):
            if "propensity" not in self.model_fields_set:
                raise ValueError("an implicit event states its propensity (null when it is unknown)")
        elif isinstance(payload, Intervention):
            if self.targets[0].episode is None:
                raise ValueError("an intervention is about an episode: its target names the episode's id")
        elif isinstance(payload, Approval):
            at = payload.executed_at
            if at is not None and payload.source == "user" and at < self.created_at:
                raise ValueError("the action was executed before the user approved it")

    @classmethod
    def on(
        cls,
        targets: Sequence[TargetRef],
        judgement: PayloadBase | UnknownPayload | NotJudged,
        *,
        annotator: Annotator,
        **envelope: Unpack[Envelope],
    ) -> Self:
        """A record about targets in any order: sorts them, and renames payload, presentation and policy.

        ``judgement``, ``presentation.order`` and ``policy`` refer to ``targets`` as given here.

        Raises:
            BadInputError: naming the invariant that does not hold.
        """
        places = sorted(range(len(targets)), key=lambda i: targets[i].sort_key)
        fields: dict[str, Any] = dict(envelope)
        if places != list(range(len(targets))):
            new_index = [places.index(i) for i in range(len(targets))]
            targets = [targets[i] for i in places]
            if isinstance(judgement, PayloadBase):
                fault = judgement.fault_with_targets(len(targets))
                if fault is not None:
                    raise BadInputError(f"feedback record: {fault}.")
                judgement = judgement.permuted(new_index)
            shown = envelope.get("presentation")
            if shown is not None and shown.order is not None and len(shown.order) == len(places):
                order = tuple(new_index[i] for i in shown.order)
                fields["presentation"] = shown.model_copy(update={"order": order})
            policy = envelope.get("policy")
            if policy is not None and len(policy) == len(places):
                fields["policy"] = tuple(policy[i] for i in places)
        fields["not_judged" if isinstance(judgement, NotJudged) else "payload"] = judgement
        try:
            return cls(targets=tuple(targets), annotator=annotator, **fields)
        except ValidationError as error:
            raise bad_input(cls, error) from None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dict, without the fields that are None (an implicit event keeps its null propensity)."""
        data = self.model_dump(mode="json", exclude_none=True)
        if isinstance(self.payload, ImplicitEvent):
            data.setdefault("propensity", None)
        elif isinstance(self.payload, UnknownPayload):
            data["payload"] = dict(self.payload.root)
        return data

    def to_json_text(self) -> str:
        """Compact JSON text; a payload of unknown kind comes back to the byte."""
        if isinstance(self.payload, UnknownPayload):
            text = self.model_dump_json(exclude_none=True, exclude={"payload"})
            return f'{text[:-1]},"payload":{self.payload.json_text()}}}'
        text = self.model_dump_json(exclude_none=True)
        if isinstance(self.payload, ImplicitEvent) and self.propensity is None:
            text = f'{text[:-1]},"propensity":null}}'
        return text

    @classmethod
    def from_json(cls, data: str | bytes | Mapping[str, Any]) -> Self:
        """Read a record, from JSON text (fastest) or a parsed object; older schema versions are migrated.

        Raises:
            BadInputError: naming each key that is unknown, missing or wrong, with the allowed ones.
        """
        record = super().from_json(data)
        if type(record.payload) is UnknownPayload and isinstance(data, str | bytes):
            return record._with_payload_source(data)
        return record

    @classmethod
    def _revised(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        value = migrate(value)
        payload = value.get("payload")
        if isinstance(payload, dict) and "kind" not in payload and "kind" in value:
            return {**value, "payload": {"kind": value["kind"], **payload}}
        return value

    def _with_payload_source(self, text: str | bytes) -> Self:
        source = _member_text(text if isinstance(text, str) else text.decode("utf-8"), "payload")
        if source is None or not isinstance(self.payload, UnknownPayload):
            return self
        return self.model_copy(update={"payload": self.payload.with_source(source)})


def _member_text(text: str, name: str) -> str | None:
    """The exact source text of one member of a JSON object (the last of that name)."""
    decoder, found = json.JSONDecoder(), None
    place = text.index("{") + 1
    while True:
        while text[place] in " \t\r\n,":
            place += 1
        if text[place] == "}":
            return found
        key, place = decoder.raw_decode(text, place)
        while text[place] in " \t\r\n:":
            place += 1
        start = place
        _, place = decoder.raw_decode(text, start)
        if key == name:
            found = text[start:place]


# --- making and turning comparisons ---------------------------------------------------------------


def comparison(
    prompt: str | Sequence[MessageLike],
    chosen: str | Sequence[MessageLike],
    rejected: str | Sequence[MessageLike],
    *,
    annotator: Annotator,
    strength: int = 1,
    criterion: str = "overall",
    p_chosen: float | None = None,
    tie: bool = False,
    outcome: Literal["chosen", "tie", "both_bad", "both_good", "incomparable"] = "chosen",
    context_item: Item | None = None,
    episodes: tuple[str | None, str | None] = (None, None),
    **envelope: Unpack[Envelope],
) -> tuple[Feedback, list[Item]]:
    """A comparison of two responses to a prompt, with the items it refers to.

    A plain prompt is one user message; a plain response is the text of one assistant message. ``episodes``,
    ``policy`` and ``presentation.order`` speak of (chosen, rejected) in this order, whichever hash is first.
    With ``tie`` (or an ``outcome`` other than ``chosen``) the two are merely named so, and strength is 0.
    ``p_chosen`` needs an AI judge or an annotator of the group ``aggregate``.

    Raises:
        BadInputError: when the two sides are equal, or an invariant does not hold.
    """
    context = context_item or Item.of_messages(as_messages(prompt), "prompt")
    sides = [
        Item.of_text(side, "response") if isinstance(side, str) else Item.of_messages(side, "response")
        for side in (chosen, rejected)
    ]
    if sides[0].sha256 == sides[1].sha256:
        raise BadInputError(
            "both sides of the comparison are equal, so it says nothing.",
            advice="Drop it, or check that chosen and rejected are read from different fields.",
        )
    decided = outcome == "chosen" and not tie
    try:
        payload = Comparison(
            outcome="first" if decided else "tie" if tie or outcome == "chosen" else outcome,
            strength=strength if decided else 0,
            criterion=criterion,
            p_first=p_chosen,
        )
    except ValidationError as error:
        raise bad_input(Comparison, error, what="comparison") from None
    targets = [TargetRef.of(item, episode=at) for item, at in zip(sides, episodes, strict=True)]
    envelope.setdefault("context", context.sha256)
    record = Feedback.on(targets, payload, annotator=annotator, **envelope)
    return record, [context, *sides]


def swap(record: Feedback) -> Feedback:
    """The mirror record: what would stand here had the two targets exchanged their roles; an involution.

    Targets keep their (hash) order and what produced them; the judgement (outcome, probability, lengths) and
    the presentation are exchanged, so that "the one shown first won" stays as true as it was. A model that
    is antisymmetric gives the mirror record the mirrored probability.

    Raises:
        BadInputError: when the record is not a judgement on two targets.
    """
    if not isinstance(record.payload, PayloadBase) or len(record.targets) != 2:
        raise BadInputError(
            f"a record of kind {record.kind!r} on {len(record.targets)} target(s) has no mirror.",
            advice="Only judgements on two targets can be swapped.",
        )
    update: dict[str, Any] = {"payload": record.payload.permuted((1, 0))}
    if record.presentation is not None and record.presentation.order is not None:
        order = tuple(1 - i for i in record.presentation.order)
        update["presentation"] = record.presentation.model_copy(update={"order": order})
    return record.model_copy(update=update)


def restrict(record: Feedback, criterion: str) -> Feedback | None:
    """What a record says on one criterion, or None when it says nothing on it.

    Comparisons, rankings and ratings have one criterion; verdicts are on their principle's id; critiques keep
    the aspects and spans the labels of that name. Other kinds judge the whole: criterion ``overall``. The
    result keeps the record's id: it is a view, not a record to store.
    """
    payload = record.payload
    if payload is None or isinstance(payload, UnknownPayload):
        return None
    if isinstance(payload, Comparison | Ranking | Rating):
        return record if payload.criterion == criterion else None
    if isinstance(payload, Verdict):
        return record if payload.principle.id == criterion else None
    if isinstance(payload, Critique) and payload.aspects:
        aspects = tuple(a for a in payload.aspects if a.aspect == criterion)
        return _narrowed(record, payload, {"aspects": aspects}) if aspects else None
    if isinstance(payload, Spans):
        spans = tuple(s for s in payload.spans if s.label == criterion)
        return _narrowed(record, payload, {"spans": spans}) if spans else None
    return record if criterion == "overall" else None


def _narrowed(record: Feedback, payload: PayloadBase, update: dict[str, Any]) -> Feedback:
    return record.model_copy(update={"payload": payload.model_copy(update=update)})
