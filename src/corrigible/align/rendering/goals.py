"""Reward-augmented pairs: the score to reach stands in the prompt, and every pair is learnt both ways round.

Source: Zhang et al. 2024, "Reward-Augmented Data Enhances Direct Preference Alignment of LLMs"
(arXiv:2410.08067). Under the goal-conditioned reward ``-(g - r(x, y))^2`` the better answer is preferred when
its own score is asked for, and the worse one when that one's is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from corrigible.align.rendering.serving import Serving
from corrigible.align.sources import Unusable
from corrigible.errors import BadInputError
from corrigible.records.items import messages_text, sha256_of_text
from corrigible.store import Pair
from corrigible.store.signals import Ranked, Turn

Choice = Literal["best_worst", "all"]
"""Which pairs of a ranking are learnt: the best against the worst answer, or all with different scores."""


def goal_serving(goal: float, highest: float = 10.0) -> Serving:
    """Ask for an answer of that score."""
    return Serving(
        system=f"The overall quality score of your answer should be {goal:.1f} out of {highest:g}."
    )


@dataclass(frozen=True)
class GoalScale:
    """Where judges' scores lie on the scale that goals are named on.

    Attributes:
        lowest, highest: of the goals' scale.
        bounds: per criterion, the least and the greatest score that is mapped onto it.
    """

    lowest: float
    highest: float
    bounds: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, ranked: Sequence[Ranked], lowest: float = 1.0, highest: float = 10.0) -> GoalScale:
        """The scale on which the least score given is ``lowest`` and the greatest ``highest``, per criterion.

        Raises:
            BadInputError: all scores of a criterion are equal, or none is a number.
        """
        if not lowest < highest:
            raise BadInputError(f"The goals' scale must go up, got {lowest} to {highest}.")
        bounds: dict[str, tuple[float, float]] = {}
        for criterion in sorted({each.criterion for each in ranked}):
            scores = [s for r in ranked if r.criterion == criterion for s in r.scores if math.isfinite(s)]
            if not scores or min(scores) == max(scores):
                said = "none is a number" if not scores else f"all are {scores[0]:g}"
                raise BadInputError(
                    f"scores_all_equal: the scores for {criterion!r} say nothing: {said}.",
                    advice="Goals need scores that differ; sft learns from answers without any.",
                )
            bounds[criterion] = (min(scores), max(scores))
        return cls(lowest, highest, bounds)

    def goal(self, score: float, criterion: str) -> float:
        """A judge's score as a goal, with one decimal (what is written is what is meant).

        Raises:
            Unusable: ``off_scale``.
        """
        least, most = self.bounds.get(criterion, (math.nan, math.nan))
        if not least <= score <= most:
            raise Unusable("off_scale", f"a score of {score} for {criterion!r} is outside {least} to {most}")
        return round(self.lowest + (score - least) / (most - least) * (self.highest - self.lowest), 1)


def goal_pairs(ranked: Ranked, scale: GoalScale, *, choice: Choice = "best_worst") -> list[Pair]:
    """Every chosen pair twice: asked for the better score the better answer wins, asked for the worse one's
    the worse.

    Pairs whose goals are equal as written contradict each other, and are left out. The answers are taken as
    text even when they were sampled by a recorded policy: what it sampled them after was another prompt.

    Args:
        ranked: scored answers to one prompt.
        scale: of the goals.
        choice: which pairs.

    Raises:
        Unusable: ``too_few_scores`` (fewer than two scored answers), ``tie``, ``off_scale``.
    """
    scored = [(score, answer) for score, answer in zip(ranked.scores, ranked.responses, strict=True)]
    scored = [(score, answer) for score, answer in scored if math.isfinite(score)]
    if len(scored) < 2:
        raise Unusable("too_few_scores", f"{len(scored)} of {len(ranked.responses)} answers have a score")
    # By score alone, stable: of equal scores the first given stays first.
    scored.sort(key=lambda each: -each[0])
    chosen = [(scored[0], scored[-1])] if choice == "best_worst" else list(combinations(scored, 2))
    made: list[Pair] = []
    for (high, better), (low, worse) in chosen:
        goals = scale.goal(high, ranked.criterion), scale.goal(low, ranked.criterion)
        if goals[0] == goals[1]:
            continue
        made.append(_pair(ranked, goals[0], scale, better, worse))
        made.append(_pair(ranked, goals[1], scale, worse, better))
    if not made:
        raise Unusable("tie", "no two answers have different scores")
    return made


def _pair(ranked: Ranked, goal: float, scale: GoalScale, chosen: Turn, rejected: Turn) -> Pair:
    prompt = goal_serving(goal, scale.highest).apply(ranked.prompt)
    refs = [sha256_of_text(messages_text(turn)) for turn in (chosen, rejected, prompt)]
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        p_chosen=1.0,
        weight=ranked.weight,
        group=ranked.group,
        annotators=ranked.annotators,
        derived_from=ranked.derived_from,
        criterion=ranked.criterion,
        chosen_ref=refs[0],
        rejected_ref=refs[1],
        prompt_ref=refs[2],
    )
