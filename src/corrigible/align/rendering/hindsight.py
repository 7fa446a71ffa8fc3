"""Chain of Hindsight: comparisons as sentences that say which answer is the good one.

Source: Liu, Sferrazza and Abbeel 2023, "Chain of Hindsight Aligns Language Models with Feedback"
(arXiv:2302.02676).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from corrigible.align.rendering.segments import Lesson, Spoken, spoken_turns
from corrigible.align.rendering.serving import Serving
from corrigible.align.sources import Unusable
from corrigible.records import Message
from corrigible.store import Labelled, Pair
from corrigible.store.signals import Turn

Form = Literal["p", "n", "np", "pn"]
"""Which answers are shown, in order: the good one (p), the bad one (n)."""

FORMS: tuple[Form, ...] = ("p", "n", "np", "pn")
"""All of them, as in the paper's code."""

Placement = Literal["assistant", "user"]
"""Who says the marker: the assistant, as the first words of its turn, or the user, as its last ones.

``assistant`` is the paper's order of words. In a chain the assistant then speaks twice in a row, which some
chat templates refuse; with ``user`` the turns alternate.
"""

PHRASINGS: tuple[tuple[str, str], ...] = (
    ("A helpful answer:\n", "An unhelpful answer:\n"),
    ("A good answer:\n", "A bad answer:\n"),
    ("The preferred answer:\n", "The rejected answer:\n"),
    ("An answer that people liked:\n", "An answer that people disliked:\n"),
    ("A better answer:\n", "A worse answer:\n"),
    ("Rated highly:\n", "Rated poorly:\n"),
)
"""What a good and a bad answer are announced with. The first is the one that serving uses."""


def hindsight_serving(placement: Placement = "assistant", *, good: bool = True) -> Serving:
    """Ask for the good answer (or, to see whether the policy can be steered, for the bad one)."""
    return _marked(PHRASINGS[0][0 if good else 1], placement)


def hindsight(
    pair: Pair,
    *,
    forms: Sequence[Form] = FORMS,
    phrasing: int = 0,
    placement: Placement = "assistant",
) -> list[Lesson]:
    """A comparison as up to four texts: good, bad, bad then good, good then bad; both answers are learnt.

    The end of turn stands after each answer and is learnt with it; the markers and the prompt are not. A
    pair that is sure to ``p_chosen`` weighs ``|2 p_chosen - 1|`` of its weight, and its sides change
    places when ``p_chosen`` is below one half.

    Args:
        pair: the comparison.
        forms: which texts.
        phrasing: index into :data:`PHRASINGS`.
        placement: who says the markers.

    Raises:
        Unusable: ``tie`` (nothing is good or bad), ``equal_sides``, ``empty_completion``, ``bad_label``.
    """
    if not 0.0 <= pair.p_chosen <= 1.0:
        raise Unusable("bad_label", f"p_chosen is {pair.p_chosen}, not in [0, 1]")
    if pair.p_chosen == 0.5:
        raise Unusable("tie", "neither answer is the better one", advice="DPO learns from ties, too.")
    if pair.chosen == pair.rejected:
        raise Unusable("equal_sides", "chosen and rejected are the same")
    good, bad = (pair.chosen, pair.rejected) if pair.p_chosen > 0.5 else (pair.rejected, pair.chosen)
    weight = pair.weight * abs(2.0 * pair.p_chosen - 1.0)
    answers = {"p": (good, True), "n": (bad, False)}
    return [
        Lesson(
            turns=_chain(pair.prompt, [answers[letter] for letter in form], phrasing, placement),
            weight=weight,
            group=pair.group,
            derived_from=pair.derived_from,
        )
        for form in forms
    ]


def hindsight_of_one(
    labelled: Labelled, *, phrasing: int = 0, placement: Placement = "assistant"
) -> list[Lesson]:
    """An answer that was judged alone, after the marker that says what was thought of it.

    Raises:
        Unusable: ``empty_completion``.
    """
    answer = (labelled.response, labelled.desirable)
    turns = _chain(labelled.prompt, [answer], phrasing, placement)
    return [Lesson(turns, labelled.weight, labelled.group, labelled.derived_from)]


def _marked(marker: str, placement: Placement) -> Serving:
    if placement == "assistant":
        return Serving(assistant_prefix=marker)
    return Serving(user_suffix=f"\n\n{marker.strip()}")


def _chain(
    prompt: Turn, answers: Sequence[tuple[Turn, bool]], phrasing: int, placement: Placement
) -> tuple[Message | Spoken, ...]:
    """The prompt, then each answer after its marker, as if each had been asked for."""
    turns: list[Message | Spoken] = []
    for number, (answer, good) in enumerate(answers):
        marker = PHRASINGS[phrasing][0 if good else 1]
        serving = _marked(marker, placement)
        if number == 0:
            turns += serving.apply(prompt)
        elif placement == "user":
            turns.append(Message(role="user", content=marker.strip()))
        turns += spoken_turns(answer, serving.assistant_prefix)
    return tuple(turns)
