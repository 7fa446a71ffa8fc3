"""Retrieved demonstrations: solved neighbours of a question stand before it.

Source: Mueller et al. 2023, "Meta-training with Demonstration Retrieval for Efficient Few-shot Learning"
(arXiv:2307.00119). Every question is learnt with its nearest neighbours in the bank, never with itself, so
that what a task needs is read from the bank and need not sit in the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from corrigible.align.rendering.segments import Lesson, spoken_turns
from corrigible.align.rendering.serving import Serving
from corrigible.align.retrieval import NEAR_DUPLICATE, Encode, Retriever
from corrigible.align.sources import Unusable
from corrigible.errors import BadInputError
from corrigible.models import Renderer
from corrigible.records import Message
from corrigible.store.signals import Demonstrated, Turn


def demonstration_turns(demonstrations: Sequence[Demonstrated]) -> tuple[Message, ...]:
    """Demonstrations as turns of a conversation, in order; their system messages are left out."""
    return tuple(
        message
        for each in demonstrations
        for message in (*each.prompt, *each.response)
        if message.role != "system"
    )


def question_text(prompt: Turn) -> str:
    """What is compared: the text of a prompt without its system messages."""
    return "\n\n".join(message.text for message in prompt if message.role != "system")


@dataclass(frozen=True)
class Bank:
    """Demonstrations that can be looked up by question.

    Attributes:
        demonstrations: in order.
        retriever: over their questions.
        duplicates_above: cosine above which a question is taken for the same one.
    """

    demonstrations: tuple[Demonstrated, ...]
    retriever: Retriever
    duplicates_above: float = NEAR_DUPLICATE

    @classmethod
    def of(
        cls,
        demonstrations: Sequence[Demonstrated],
        encode: Encode,
        *,
        duplicates_above: float = NEAR_DUPLICATE,
    ) -> Bank:
        """Encode the questions of all demonstrations.

        Raises:
            BadInputError: there are none.
        """
        retriever = Retriever(encode, [question_text(each.prompt) for each in demonstrations])
        return cls(tuple(demonstrations), retriever, duplicates_above)

    def neighbours(self, count: int) -> list[list[Demonstrated]]:
        """Of every demonstration the nearest others: never itself, and never the same question."""
        same: dict[str, set[int]] = {}
        for index, each in enumerate(self.demonstrations):
            same.setdefault(question_text(each.prompt), set()).add(index)
        barred = [same[question_text(each.prompt)] for each in self.demonstrations]
        hits = self.retriever.topk(
            self.retriever.vectors, count, barred, duplicates_above=self.duplicates_above
        )
        return [[self.demonstrations[hit.index] for hit in each] for each in hits]

    def near(self, prompt: Turn, count: int) -> list[Demonstrated]:
        """The nearest demonstrations to a question from outside."""
        [hits] = self.retriever.topk([question_text(prompt)], count, duplicates_above=self.duplicates_above)
        return [self.demonstrations[hit.index] for hit in hits]


def with_demonstrations(
    demonstrated: Demonstrated,
    neighbours: Sequence[Demonstrated],
    rng: np.random.Generator | None = None,
) -> Lesson:
    """An answer after its neighbours and its question; only the answer is learnt.

    Args:
        demonstrated: what is learnt.
        neighbours: nearest first. They stand in this order reversed, the nearest next to the question.
        rng: shuffles them instead, so that no order is learnt.

    Raises:
        Unusable: ``no_neighbours``, ``empty_completion``.
        BadInputError: ``self_retrieval``: the question itself is among its neighbours.
    """
    if not neighbours:
        raise Unusable("no_neighbours", "the bank holds no other demonstration that may stand before it")
    if any(each.prompt == demonstrated.prompt for each in neighbours):
        raise BadInputError(
            "self_retrieval: the question's own demonstration would stand before it, with the answer.",
            advice="Exclude it: Bank.neighbours does.",
        )
    order = list(rng.permutation(len(neighbours))) if rng is not None else range(len(neighbours))[::-1]
    turns = demonstration_turns([neighbours[i] for i in order])
    serving = Serving(demonstrations=len(neighbours))
    return Lesson(
        turns=(*serving.apply(demonstrated.prompt, turns), *spoken_turns(demonstrated.response)),
        weight=demonstrated.weight,
        group=demonstrated.group,
        derived_from=demonstrated.derived_from,
    )


def within_budget(
    neighbours: Sequence[Demonstrated], question: Sequence[Message], renderer: Renderer, budget: int
) -> list[Demonstrated]:
    """As many of the nearest demonstrations as fit before a question, so that the question is never cut.

    Args:
        neighbours: nearest first.
        question: the conversation that follows them, the answer included when it is known.
        renderer: counts tokens.
        budget: tokens in all.
    """
    kept = list(neighbours)
    while kept:
        turns = (*demonstration_turns(kept), *(m for m in question if m.role != "system"))
        system = [m for m in question if m.role == "system"]
        if len(renderer.conversation([*system, *turns])) <= budget:
            return kept
        kept.pop()
    return kept
