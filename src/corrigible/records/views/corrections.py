"""From corrections to what they teach: edit, demonstration, intervention, answer, concept correction."""

from __future__ import annotations

import math
from collections.abc import Iterator

from corrigible.errors import BadInputError
from corrigible.records.editing import changed_ranges
from corrigible.records.feedback import Feedback
from corrigible.records.payloads import Answer, ConceptCorrection, Edit, Intervention
from corrigible.records.views.pairs import EDIT_FIXED
from corrigible.records.views.rows import (
    BadWindowRow,
    BeliefRow,
    DemonstrationRow,
    PenaltyRow,
    Slice,
    SlicePairRow,
    TargetTextRow,
)

PERSON_WAS_RIGHT = "the person was right"
GRADIENT_LEVER = "gradient is the right lever"


def edit_targets(record: Feedback, *, w_rest: float = 0.1) -> Iterator[TargetTextRow]:
    """The object after an edit as a text to imitate: weight 1 where it changed, ``w_rest`` elsewhere.

    An edit by paths (trees, JSON) has no character ranges: all of it weighs 1.
    """
    payload = record.payload
    if not isinstance(payload, Edit):
        return
    yield TargetTextRow(
        derived_from=(record.id,),
        assumption=EDIT_FIXED,
        context=record.context,
        target=payload.after,
        changed=changed_ranges(payload) if payload.is_text else (),
        w_rest=w_rest if payload.is_text else 1.0,
        annotator=record.annotator.pseudonym,
    )


def intervention_rows(
    record: Feedback, *, window: int = 10
) -> Iterator[DemonstrationRow | BadWindowRow | SlicePairRow]:
    """What a person did at the controls, the steps before it, and that the new branch beats the old.

    The demonstration is ``[t_take, t_release)`` of the working branch, of modes in which the person acted
    (takeover, blend, nudge). The bad window is ``[t_detect - window, t_detect)`` of the parent.
    """
    payload = record.payload
    if not isinstance(payload, Intervention):
        return
    parent = str(record.targets[0].episode)
    branch = payload.branch or parent
    who, ids = record.annotator.pseudonym, (record.id,)
    done = Slice(branch, payload.t_take, payload.t_release)
    if payload.mode in ("takeover", "blend", "nudge") and done.start < done.stop:
        yield DemonstrationRow(derived_from=ids, assumption=PERSON_WAS_RIGHT, steps=done, annotator=who)
    bad = Slice(parent, max(0, payload.t_detect - window), payload.t_detect)
    if bad.start < bad.stop:
        yield BadWindowRow(derived_from=ids, assumption=PERSON_WAS_RIGHT, steps=bad, annotator=who)
    if payload.discarded and done.start < done.stop:
        yield SlicePairRow(
            derived_from=ids,
            assumption=PERSON_WAS_RIGHT,
            context=record.context,
            chosen=done,
            rejected=Slice(parent, payload.discarded.start, payload.discarded.stop),
            p_chosen=1.0,
            annotator=who,
        )


def answer_beliefs(record: Feedback, *, error_rate: float = 0.0) -> Iterator[BeliefRow]:
    """What an answer says of each slot: a hard constraint, or the likelihood ratio (1 - e) / e.

    Raises:
        BadInputError: when the error rate of the parser is not in [0, 0.5].
    """
    if not 0.0 <= error_rate <= 0.5:
        raise BadInputError(f"error_rate {error_rate} is not in [0, 0.5].")
    if not isinstance(record.payload, Answer) or record.payload.unsure:
        return
    for slot, constraint in record.payload.slots.items():
        yield BeliefRow(
            derived_from=(record.id,),
            assumption=f"parser error rate {error_rate}",
            context=record.context,
            question=record.targets[0].sha256,
            slot=slot,
            constraint=constraint,
            likelihood_ratio=math.inf if error_rate == 0 else (1.0 - error_rate) / error_rate,
            annotator=record.annotator.pseudonym,
        )


def concept_penalties(record: Feedback) -> Iterator[PenaltyRow]:
    """The penalty on a model's use of a concept."""
    payload = record.payload
    if not isinstance(payload, ConceptCorrection):
        return
    yield PenaltyRow(
        derived_from=(record.id,),
        assumption=GRADIENT_LEVER,
        model=record.targets[0].sha256,
        concept=payload.concept.name,
        action=payload.action,
        rule=payload.rule,
        layer=payload.layer,
        strength=payload.lambda_,
        positive=payload.concept.pos,
        negative=payload.concept.neg,
    )
