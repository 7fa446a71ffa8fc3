"""Derived views: pure functions from feedback to training rows.

Every row keeps ``derived_from`` (record ids), the ``assumption`` it makes, and a ``weight``. Functions on one
record take it as it is; :func:`usable` says which records may be used, and :func:`pairs` and :func:`project`
ask it. Behaviour (implicit events) becomes rows only through an :class:`Interpreter`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from corrigible.errors import BadInputError
from corrigible.records.envelope import Scope
from corrigible.records.feedback import Feedback
from corrigible.records.views.corrections import (
    answer_beliefs,
    concept_penalties,
    edit_targets,
    intervention_rows,
)
from corrigible.records.views.pairs import (
    Ties,
    comparison_pairs,
    edit_pairs,
    outcome_pairs,
    pairs,
    ranking_pairs,
    rating_pairs,
    reaction_pairs,
    segment_pairs,
    verdict_pairs,
)
from corrigible.records.views.rewards import (
    MAX_IPS_WEIGHT,
    Interpreter,
    Reading,
    comparison_reactions,
    implicit_signals,
    outcome_rewards,
    rating_reactions,
    reactions,
    span_rewards,
    step_rewards,
)
from corrigible.records.views.rows import (
    BadWindowRow,
    BeliefRow,
    DemonstrationRow,
    PairRow,
    PenaltyRow,
    ReactionRow,
    RewardRow,
    Row,
    SignalRow,
    Slice,
    SlicePairRow,
    SpanRewardRow,
    StepRewardRow,
    TargetTextRow,
)
from corrigible.records.views.usable import is_usable, usable

View = Callable[[Iterable[Feedback]], Iterator[Row]]


def _each(view: Callable[[Feedback], Iterator[Row]]) -> View:
    return lambda records: (row for record in records for row in view(record))


VIEWS: dict[str, View] = {
    "comparison->pairs": _each(comparison_pairs),
    "ranking->pairs": _each(ranking_pairs),
    "rating->pairs": rating_pairs,
    "reaction->pairs": reaction_pairs,
    "outcome->pairs": outcome_pairs,
    "edit->pairs": _each(edit_pairs),
    "verdict->pairs": verdict_pairs,
    "reaction->reactions": _each(reactions),
    "comparison->reactions": _each(comparison_reactions),
    "rating->reactions": rating_reactions,
    "edit->targets": _each(edit_targets),
    "spans->rewards": _each(span_rewards),
    "step_labels->rewards": _each(step_rewards),
    "outcome->rewards": _each(outcome_rewards),
    "intervention->rows": _each(intervention_rows),
    "segment_preference->pairs": _each(segment_pairs),
    "answer->beliefs": _each(answer_beliefs),
    "concept_correction->penalties": _each(concept_penalties),
}
"""Views that need nothing but records, by ``from->to``; :func:`implicit_signals` needs an interpreter."""


def project(
    records: Iterable[Feedback],
    view: str,
    *,
    scope: Scope = "train",
    at: int | None = None,
    superseded: Collection[str] | None = None,
) -> Iterator[Row]:
    """The rows of a named view over the usable records; other arguments as in :func:`usable`.

    Raises:
        BadInputError: when there is no such view.
    """
    if view not in VIEWS:
        raise BadInputError(f"there is no view {view!r}.", advice=f"Views are: {', '.join(VIEWS)}.")
    return VIEWS[view](usable(records, scope, at=at, superseded=superseded))


__all__ = [
    "MAX_IPS_WEIGHT",
    "VIEWS",
    "BadWindowRow",
    "BeliefRow",
    "DemonstrationRow",
    "Interpreter",
    "PairRow",
    "PenaltyRow",
    "ReactionRow",
    "Reading",
    "RewardRow",
    "Row",
    "SignalRow",
    "Slice",
    "SlicePairRow",
    "SpanRewardRow",
    "StepRewardRow",
    "TargetTextRow",
    "Ties",
    "answer_beliefs",
    "comparison_pairs",
    "comparison_reactions",
    "concept_penalties",
    "edit_pairs",
    "edit_targets",
    "implicit_signals",
    "intervention_rows",
    "is_usable",
    "outcome_pairs",
    "outcome_rewards",
    "pairs",
    "project",
    "ranking_pairs",
    "rating_pairs",
    "rating_reactions",
    "reaction_pairs",
    "reactions",
    "segment_pairs",
    "span_rewards",
    "step_rewards",
    "usable",
    "verdict_pairs",
]
