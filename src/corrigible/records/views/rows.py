"""Training rows. Each says which records it came from, what it assumes, and what it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from corrigible.records.payloads import SlotConstraint


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What every row keeps: ids of its records, the assumption made, a weight >= 0."""

    derived_from: tuple[str, ...]
    assumption: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow(Row):
    """Of two targets (by hash) the chosen is better with probability ``p_chosen``; a tie has 0.5.

    ``margin`` is the strength 1..3 of a comparison, the gap of two ratings in scale units, else None.
    """

    context: str | None
    chosen: str
    rejected: str
    p_chosen: float
    criterion: str
    annotator: str
    margin: float | None = None
    task_id: str | None = None
    chosen_episode: str | None = None
    rejected_episode: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReactionRow(Row):
    """A target (by hash) that was liked (+1) or disliked (-1), unpaired."""

    context: str | None
    target: str
    value: Literal[-1, 1]
    annotator: str
    criterion: str = "overall"
    task_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTextRow(Row):
    """A text to imitate (by hash): weight 1 on the ``changed`` code point ranges, ``w_rest`` elsewhere."""

    context: str | None
    target: str
    changed: tuple[tuple[int, int], ...]
    w_rest: float
    annotator: str

    def token_weights(self, offsets: list[tuple[int, int]]) -> list[float]:
        """One weight per token from its half-open code point range; a token is changed if it touches one.

        Tokens of no characters (special ones) get ``w_rest``.
        """
        return [
            1.0 if any(a < end and start < b for a, b in self.changed) else self.w_rest
            for start, end in offsets
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRewardRow(Row):
    """Rewards on half-open ranges of one target; ``rest_known`` says that the rest is 0 and not unknown."""

    context: str | None
    target: str
    unit: str
    rewards: tuple[tuple[int, int, float], ...]
    rest_known: bool
    annotator: str

    def token_rewards(self, offsets: list[tuple[int, int]]) -> tuple[list[float], list[bool]]:
        """Reward (sum over the spans it touches) and whether it is known, per token given as a range."""
        values, known = [], []
        for start, end in offsets:
            touching = [r for a, b, r in self.rewards if a < end and start < b]
            values.append(sum(touching))
            known.append(bool(touching) or self.rest_known)
        return values, known


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRewardRow(Row):
    """Rewards of numbered steps of one target; steps that are not listed are unknown."""

    context: str | None
    target: str
    rewards: tuple[tuple[int, float], ...]
    annotator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRow(Row):
    """A scalar reward of one target."""

    context: str | None
    target: str
    reward: float
    source: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Steps ``[start, stop)`` of an episode (or of stored content, by hash, where there is no episode)."""

    episode: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationRow(Row):
    """Steps of an episode to imitate."""

    steps: Slice
    annotator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BadWindowRow(Row):
    """Steps of an episode that led to trouble: label -1."""

    steps: Slice
    annotator: str
    label: Literal[-1] = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePairRow(Row):
    """Of two slices, the sum of rewards over the chosen one is larger with probability ``p_chosen``."""

    context: str | None
    chosen: Slice
    rejected: Slice
    p_chosen: float
    annotator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRow(Row):
    """What an interpreter read from behaviour: a value for a target, and how sure its rule is."""

    context: str | None
    target: str
    value: float
    p_correct: float
    propensity: float | None
    rule_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BeliefRow(Row):
    """What an answer says of a slot. ``likelihood_ratio`` is that of values that satisfy the constraint
    against those that do not; infinite for a hard constraint."""

    context: str | None
    question: str
    slot: str
    constraint: SlotConstraint
    likelihood_ratio: float
    annotator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PenaltyRow(Row):
    """A penalty lambda * sum((mask * d logit / d concept)^2) on one model at one layer."""

    model: str
    concept: str
    action: str
    rule: str
    layer: str | None
    strength: float
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def penalty(self, gradient: Any, mask: Any) -> Any:
        """The penalty, for arrays or tensors of equal shape (any library with ``*``, ``**`` and ``sum``)."""
        return self.strength * ((mask * gradient) ** 2).sum()
