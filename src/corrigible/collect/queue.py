"""What one annotator has still to be asked, out of a store.

Nobody is asked the same question twice: a question counts as asked once a live record of this
annotator answers or skips it. Withdrawing that record (undo) opens it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Literal

from corrigible.collect.questions import (
    Question,
    asked_key,
    draw,
    question_key,
    questions_from_comparisons,
    questions_from_episodes,
)
from corrigible.records import Comparison

if TYPE_CHECKING:
    from corrigible.store import Store

QuestionSource = Literal["episodes", "comparisons"]

_PAGE = 500


def open_questions(
    store: Store,
    annotator: str,
    *,
    source: QuestionSource = "episodes",
    task: str | None = None,
    criterion: str = "overall",
    campaign_id: str | None = None,
    pairs_per_prompt: int = 1,
    at_most: int = 1000,
    seed: int = 0,
) -> list[Question]:
    """Questions that ``annotator`` has not been asked, in a random order that a restart repeats.

    Args:
        source: ``episodes`` pairs the stored answers to each prompt; ``comparisons`` asks again
            what others were asked (imported pairs, say).
        task: only episodes, or comparisons, of this task.
        at_most: stop looking after this many, so that a large store opens at once.
    """
    asked = {asked_key(record) for record in store.feedback(kind="comparison", annotator=annotator)}
    found: dict[str, Question] = {}
    pages = (
        _from_episodes(store, task, criterion, campaign_id, pairs_per_prompt, seed)
        if source == "episodes"
        else _from_comparisons(store, task, criterion, campaign_id)
    )
    for question in pages:
        if question_key(question) not in asked:
            found.setdefault(question.key, question)
        if len(found) >= at_most:
            break
    return sorted(found.values(), key=lambda q: draw("queue", seed, annotator, q.key).random())


def _from_episodes(
    store: Store, task: str | None, criterion: str, campaign_id: str | None, pairs_per_prompt: int, seed: int
) -> Iterator[Question]:
    yield from questions_from_episodes(
        store.episodes(task=task),
        pairs_per_prompt=pairs_per_prompt,
        criterion=criterion,
        campaign_id=campaign_id,
        seed=seed,
    )


def _from_comparisons(
    store: Store, task: str | None, criterion: str, campaign_id: str | None
) -> Iterator[Question]:
    records = (r for r in store.feedback(kind="comparison", task=task) if isinstance(r.payload, Comparison))
    while page := list(islice(records, _PAGE)):
        wanted = {target.sha256 for record in page for target in record.targets}
        wanted |= {record.context for record in page if record.context is not None}
        items = store.items(wanted)
        yield from questions_from_comparisons(page, items, criterion=criterion, campaign_id=campaign_id)
