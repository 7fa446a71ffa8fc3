"""The vocabulary of the loop: one family of frozen records for text and control alike.

* :class:`Episode` — what a policy did: steps of observation and action, with sampled ids and log-probs.
* :class:`Feedback` — what somebody or something said about it: envelope, targets, and one of 20 payload
  kinds, or :class:`NotJudged`, the reason why there is none. Unknown kinds are kept to the byte and unknown
  keys are refused by name.
* :class:`Item` — content, named by its hash. :class:`PolicyVersion` — what acted, and where it came from.
* :mod:`~corrigible.records.views` — pure functions from feedback to training rows; each row says which
  records it came from and what it assumes.
* :mod:`~corrigible.records.validation` — invariants that need the targets' content or other records.
* :mod:`~corrigible.records.migrations`, :mod:`~corrigible.records.schema` — versions and JSON Schema.

Units: time in integer microseconds UTC, durations in integer milliseconds, text offsets in code points
(half-open), image coordinates in [0, 1], trajectories in environment steps, log-probs in nats.
Nothing here reads a file or knows a model. Field names are those of the feedback vocabulary and are stable.
"""

from corrigible.records.base import Record, canonical_json, new_id, now_us
from corrigible.records.editing import apply_edit
from corrigible.records.envelope import (
    AGGREGATE,
    Annotator,
    Consent,
    Effort,
    NotJudged,
    NotJudgedReason,
    PolicyRef,
    Presentation,
)
from corrigible.records.episodes import Episode, FinishReason, Sampling, Step
from corrigible.records.feedback import Envelope, Feedback, comparison, restrict, swap
from corrigible.records.items import (
    MESSAGES_MEDIA_TYPE,
    Item,
    ItemType,
    Message,
    MessageLike,
    TargetRef,
    ToolCall,
    ToolFunction,
    as_messages,
    messages_text,
    sha256_of_text,
)
from corrigible.records.migrations import MIGRATIONS, migrate
from corrigible.records.payloads import (
    KINDS,
    Adjudication,
    Answer,
    Approval,
    ArrayRef,
    Aspect,
    Click,
    Comparison,
    Concept,
    ConceptCorrection,
    Critique,
    Demonstration,
    Edit,
    EditOp,
    ImplicitEvent,
    Intervention,
    Label,
    Outcome,
    Payload,
    Principle,
    Ranking,
    Rating,
    Reaction,
    Scale,
    SegmentPreference,
    SlotConstraint,
    Span,
    SpanRange,
    Spans,
    StepLabel,
    StepLabels,
    TestResult,
    UnknownPayload,
    Verdict,
    Verifier,
)
from corrigible.records.policies import PolicyVersion, TrainedOn
from corrigible.records.schema import json_schema
from corrigible.records.validation import Violation, validate, validate_together

__all__ = [
    "AGGREGATE",
    "KINDS",
    "MESSAGES_MEDIA_TYPE",
    "MIGRATIONS",
    "Adjudication",
    "Annotator",
    "Answer",
    "Approval",
    "ArrayRef",
    "Aspect",
    "Click",
    "Comparison",
    "Concept",
    "ConceptCorrection",
    "Consent",
    "Critique",
    "Demonstration",
    "Edit",
    "EditOp",
    "Effort",
    "Envelope",
    "Episode",
    "Feedback",
    "FinishReason",
    "ImplicitEvent",
    "Intervention",
    "Item",
    "ItemType",
    "Label",
    "Message",
    "MessageLike",
    "NotJudged",
    "NotJudgedReason",
    "Outcome",
    "Payload",
    "PolicyRef",
    "PolicyVersion",
    "Presentation",
    "Principle",
    "Ranking",
    "Rating",
    "Reaction",
    "Record",
    "Sampling",
    "Scale",
    "SegmentPreference",
    "SlotConstraint",
    "Span",
    "SpanRange",
    "Spans",
    "Step",
    "StepLabel",
    "StepLabels",
    "TargetRef",
    "TestResult",
    "ToolCall",
    "ToolFunction",
    "TrainedOn",
    "UnknownPayload",
    "Verdict",
    "Verifier",
    "Violation",
    "apply_edit",
    "as_messages",
    "canonical_json",
    "comparison",
    "json_schema",
    "messages_text",
    "migrate",
    "new_id",
    "now_us",
    "restrict",
    "sha256_of_text",
    "swap",
    "validate",
    "validate_together",
]
