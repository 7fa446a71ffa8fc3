"""Class-conditioned learning: say where an answer comes from, weigh it by that, ask for the best class.

Source: Wang et al. 2023, "OpenChat: Advancing Open-source Language Models with Mixed-Quality Data"
(arXiv:2309.11235), eq. 5 and 6: the policy that maximises a class's reward near the start is fitted by
``-E[exp(r_c / beta) log pi(y | x, c)]``.
"""

from __future__ import annotations

from corrigible.align.rendering.segments import Lesson, spoken_turns
from corrigible.align.rendering.serving import Serving
from corrigible.align.sources import Unusable
from corrigible.store.signals import Demonstrated


def class_serving(quality: str) -> Serving:
    """The condition of a class: before what the user says and before the assistant's words, in every turn."""
    return Serving(
        user_prefix=f"{quality} user:\n", assistant_prefix=f"{quality} assistant:\n", every_turn=True
    )


def class_conditioned(
    demonstrated: Demonstrated,
    *,
    best: str = "expert",
    other_weight: float = 0.1,
    per_token: bool = True,
) -> Lesson:
    """A demonstration under the condition of its class; ``exp(r_c / beta)`` is 1 for the best, else less.

    Args:
        demonstrated: with its class in ``quality``.
        best: the class that is served.
        other_weight: of every other class, in (0, 1].
        per_token: whether each token counts, or each answer.

    Raises:
        Unusable: ``no_class``, ``empty_completion``.
    """
    if not demonstrated.quality.strip():
        raise Unusable(
            "no_class",
            "nothing says which class the demonstration is of",
            advice="Give its source a quality, or use sft.",
        )
    serving = class_serving(demonstrated.quality)
    return Lesson(
        turns=(
            *serving.apply(demonstrated.prompt),
            *spoken_turns(demonstrated.response, serving.assistant_prefix),
        ),
        weight=demonstrated.weight * (1.0 if demonstrated.quality == best else other_weight),
        group=demonstrated.group,
        derived_from=demonstrated.derived_from,
        per_token=per_token,
    )
