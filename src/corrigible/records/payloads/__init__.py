"""The 20 kinds of feedback, their invariants, and :class:`UnknownPayload` for kinds of another version.

Each kind is one frozen model with a ``kind`` literal; :data:`Payload` is their union, chosen by ``kind``.
Invariants that a payload can check alone are checked when it is made; those that need its record are checked
by :class:`~corrigible.records.feedback.Feedback`; those that need the targets' content or other records are
checked by :mod:`corrigible.records.validation`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import ConfigDict, Discriminator, Field, JsonValue, RootModel, Tag, model_validator

from corrigible.records.base import Id
from corrigible.records.payloads.acts import (
    Approval,
    ArrayRef,
    Demonstration,
    ImplicitEvent,
    Intervention,
)
from corrigible.records.payloads.base import PayloadBase
from corrigible.records.payloads.choices import Comparison, Principle, Ranking, SegmentPreference, Verdict
from corrigible.records.payloads.edit import Edit, EditOp
from corrigible.records.payloads.knowledge import (
    Answer,
    Concept,
    ConceptCorrection,
    SlotConstraint,
    rule_atoms,
)
from corrigible.records.payloads.marks import Aspect, Click, Critique, Span, SpanRange, Spans
from corrigible.records.payloads.scores import (
    Label,
    Outcome,
    Rating,
    Reaction,
    Scale,
    StepLabel,
    StepLabels,
    TestResult,
    Verifier,
)

Judgement = Annotated[
    Comparison
    | Ranking
    | Rating
    | Reaction
    | Critique
    | Spans
    | StepLabels
    | Edit
    | Demonstration
    | Intervention
    | SegmentPreference
    | ImplicitEvent
    | Verdict
    | Outcome
    | ConceptCorrection
    | Click
    | Label
    | Answer
    | Approval,
    Field(discriminator="kind"),
]
"""Every kind that an adjudication may settle: all but adjudication itself."""


class Adjudication(PayloadBase):
    """The settled judgement on records that disagree; it stands beside them and never overwrites.

    ``resolves`` lists the records, ``gold`` is the right payload for the same targets.
    """

    kind: Literal["adjudication"] = "adjudication"
    resolves: tuple[Id, ...] = Field(min_length=1)
    gold: Judgement
    reason: str = ""

    max_targets: ClassVar[int | None] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.resolves)) != len(self.resolves):
            raise ValueError("a record is resolved twice")
        return self

    def permuted(self, new_index: Any) -> Self:
        """See :meth:`PayloadBase.permuted`."""
        return self.model_copy(update={"gold": self.gold.permuted(new_index)})

    def fault_with_targets(self, count: int) -> str | None:
        """See :meth:`PayloadBase.fault_with_targets`."""
        high = self.gold.max_targets
        if count < self.gold.min_targets or (high is not None and count > high):
            return f"gold of kind {self.gold.kind!r} does not fit {count} targets"
        return self.gold.fault_with_targets(count)


def _any_other_kind(schema: dict[str, Any]) -> None:
    schema["required"] = ["kind"]
    schema["properties"] = {"kind": {"type": "string", "not": {"enum": list(KINDS)}}}


class UnknownPayload(RootModel[dict[str, JsonValue]]):
    """The payload of a kind that this version does not know: kept to the byte, and in no view."""

    model_config = ConfigDict(frozen=True, json_schema_extra=_any_other_kind)

    _source: str | None = None  # the exact text it was read from, where that is not its compact JSON

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not isinstance(self.root.get("kind"), str):
            raise ValueError("a payload needs its kind")
        return self

    @classmethod
    def of(cls, kind: str, data: dict[str, Any]) -> Self:
        """Payload of an unknown kind."""
        return cls({"kind": kind, **data})

    @property
    def kind(self) -> str:
        """The kind it claims to be."""
        return str(self.root["kind"])

    @property
    def data(self) -> dict[str, JsonValue]:
        """Its keys and values, without the kind."""
        return {key: value for key, value in self.root.items() if key != "kind"}

    def with_source(self, text: str) -> UnknownPayload:
        """The same payload, remembering the exact JSON text that it was read from."""
        payload = UnknownPayload.model_construct(self.root)
        payload._source = None if text == self._compact() else text
        return payload

    def json_text(self) -> str:
        """The exact text it was read from, else compact JSON."""
        return self._source if self._source is not None else self._compact()

    def _compact(self) -> str:
        return json.dumps(self.root, separators=(",", ":"), ensure_ascii=False)


KINDS: dict[str, type[PayloadBase]] = {
    str(model.model_fields["kind"].default): model
    for model in (*get_args(get_args(Judgement)[0]), Adjudication)
}
"""The 20 kinds by name, in the field guide's order."""


def _known_or_not(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    if not isinstance(kind, str):
        return None
    return kind if kind == "adjudication" else "judgement" if kind in KINDS else "unknown"


Payload = Annotated[
    Annotated[Judgement, Tag("judgement")]
    | Annotated[Adjudication, Tag("adjudication")]
    | Annotated[UnknownPayload, Tag("unknown")],
    Discriminator(_known_or_not),
]
"""Any payload, chosen by its ``kind``."""

__all__ = [
    "KINDS",
    "Adjudication",
    "Answer",
    "Approval",
    "ArrayRef",
    "Aspect",
    "Click",
    "Comparison",
    "Concept",
    "ConceptCorrection",
    "Critique",
    "Demonstration",
    "Edit",
    "EditOp",
    "ImplicitEvent",
    "Intervention",
    "Judgement",
    "Label",
    "Outcome",
    "Payload",
    "PayloadBase",
    "Principle",
    "Ranking",
    "Rating",
    "Reaction",
    "Scale",
    "SegmentPreference",
    "SlotConstraint",
    "Span",
    "SpanRange",
    "Spans",
    "StepLabel",
    "StepLabels",
    "TestResult",
    "UnknownPayload",
    "Verdict",
    "Verifier",
    "rule_atoms",
]
