"""Judgements of single responses with their texts: what losses without pairs learn from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from corrigible.errors import BadInputError
from corrigible.events import Message as Said
from corrigible.events import emit
from corrigible.records import Message
from corrigible.records.envelope import Scope
from corrigible.records.views import rating_reactions, reactions, usable
from corrigible.store.pairs import Pair, texts_of
from corrigible.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One response that was found good or bad, how much that counts, and where it comes from.

    ``weight`` > 0. ``group`` is the task when the judgement names one, else the prompt: data is split
    by it, never by row. ``episode`` says in which episode the response was sampled. ``prompt`` is empty
    when the judgement was about the response alone.
    """

    prompt: tuple[Message, ...]
    response: tuple[Message, ...]
    desirable: bool
    weight: float
    group: str
    annotators: tuple[str, ...]
    derived_from: tuple[str, ...]
    criterion: str
    episode: str | None = None


def labelled_from_pairs(pairs: Iterable[Pair]) -> list[Labelled]:
    """Both sides of every pair, one after the other: the chosen one good, the rejected one bad.

    A soft label weighs ``|2 p_chosen - 1|`` of the pair: for a loss that is linear in the label, with
    both sides weighted alike, that has the gradient of the loss's mean over the label. A pair with
    ``p_chosen`` below one half is turned round, and a tie says nothing and is left out.
    """
    found: list[Labelled] = []
    for pair in pairs:
        sureness = abs(2.0 * pair.p_chosen - 1.0)
        if sureness == 0.0:
            continue
        for response, episode, first in (
            (pair.chosen, pair.chosen_episode, True),
            (pair.rejected, pair.rejected_episode, False),
        ):
            found.append(
                Labelled(
                    prompt=pair.prompt,
                    response=response,
                    desirable=first == (pair.p_chosen > 0.5),
                    weight=pair.weight * sureness,
                    group=pair.group,
                    annotators=pair.annotators,
                    derived_from=pair.derived_from,
                    criterion=pair.criterion,
                    episode=episode,
                )
            )
    return found


def load_labelled(
    store: Store, *, criterion: str | None = None, scope: Scope = "train", **filters: Any
) -> list[Labelled]:
    """The labels that the store's live reactions and ratings give to single responses.

    A reaction counts as it is; a rating is good above its annotator's own median on that scale and
    criterion, bad below it, and left out at it. Reactions come first, then ratings.

    Args:
        store: where from.
        criterion: only judgements on this criterion; reactions count as "overall".
        scope: leave out records whose consent does not include this use.
        filters: as for :meth:`Store.feedback` (``annotator``, ``policy``, ``task``, ...).

    Responses that are no text are left out and counted in a message event.

    Raises:
        BadInputError: an item that a judgement is about is not in the store; an unknown filter.
    """
    try:
        live = store.feedback(**filters)
    except TypeError as error:
        raise BadInputError(f"No such filter: {error}.") from error
    records = list(usable(live, scope, superseded=()))
    rows = [row for record in records for row in reactions(record)] + list(rating_reactions(records))
    rows = [row for row in rows if criterion is None or row.criterion == criterion]
    prompts, no_text = texts_of(store, {row.context for row in rows if row.context is not None}, "user")
    responses, no_text_either = texts_of(store, {row.target for row in rows}, "assistant")
    targets = {record.id: record.targets[0] for record in records}
    found: list[Labelled] = []
    for row in rows:
        if row.context in no_text or row.target in no_text_either:
            continue
        found.append(
            Labelled(
                prompt=prompts[row.context] if row.context is not None else (),
                response=responses[row.target],
                desirable=row.value > 0,
                weight=row.weight,
                group=row.task_id or row.context or f"item:{row.target}",
                annotators=(row.annotator,),
                derived_from=row.derived_from,
                criterion=row.criterion,
                episode=targets[row.derived_from[0]].episode,
            )
        )
    if len(found) < len(rows):
        emit(Said(text=f"{len(rows) - len(found)} of {len(rows)} judged responses are no text, left out"))
    return found
