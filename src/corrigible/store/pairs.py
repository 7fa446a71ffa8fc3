"""Judgements as preference pairs with their texts: what reward models and preference losses learn from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corrigible.errors import BadInputError
from corrigible.events import Message as Said
from corrigible.events import emit
from corrigible.records import MESSAGES_MEDIA_TYPE, Item, Message
from corrigible.records.envelope import Scope
from corrigible.records.views import PairRow, Ties, pairs
from corrigible.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One response preferred to another, with how surely, and where that comes from.

    ``p_chosen`` in [0, 1] is the soft label (a tie is 0.5); ``weight`` > 0 how much the pair counts.
    ``group`` is the task (topic, first message, queue item) when the judgement names one, else the prompt:
    data is split by it, never by row. ``chosen_ref``, ``rejected_ref`` and ``prompt_ref`` are the items'
    SHA-256; ``chosen_episode`` and ``rejected_episode`` say which episode a response was sampled in.
    ``prompt`` is empty and ``prompt_ref`` None when the judgement was about the responses alone.
    ``margin`` is by how much the chosen one is better in the judge's own unit (strength 1 to 3 of a
    comparison, gap of two ratings), None when nobody said.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    p_chosen: float
    weight: float
    group: str
    annotators: tuple[str, ...]
    derived_from: tuple[str, ...]
    criterion: str
    chosen_ref: str
    rejected_ref: str
    prompt_ref: str | None = None
    chosen_episode: str | None = None
    rejected_episode: str | None = None
    margin: float | None = None

    @property
    def prompt_text(self) -> str:
        """The prompt's messages as text, joined by blank lines."""
        return _text(self.prompt)

    @property
    def chosen_text(self) -> str:
        """The preferred response as text."""
        return _text(self.chosen)

    @property
    def rejected_text(self) -> str:
        """The other response as text."""
        return _text(self.rejected)


def load_pairs(
    store: Store,
    *,
    ties: Ties = "half",
    aggregate: bool = False,
    criterion: str | None = None,
    scope: Scope = "train",
    **filters: Any,
) -> list[Pair]:
    """The preference pairs that the store's live feedback implies, in the order the feedback was given.

    Args:
        store: where from.
        ties: a tie becomes a pair with ``p_chosen`` 0.5, or is dropped.
        aggregate: merge all pairs with the same prompt, the same two responses (in either order) and the
            same criterion into one: ``p_chosen`` is the weighted mean of the votes (ties count half),
            ``weight`` their sum, and the side with more votes is the chosen one. The merged pair's
            ``group`` is the first (smallest) of the votes' tasks.
        criterion: only pairs judged on this criterion; judgements of kinds without one (rankings, edits)
            count as "overall".
        scope: leave out records whose consent does not include this use.
        filters: as for :meth:`Store.feedback` (``kind``, ``annotator``, ``policy``, ``task``, …).

    Pairs of images, trajectories and other things that are no text are left out and counted in a message
    event.

    Raises:
        BadInputError: an item that a judgement is about is not in the store; an unknown filter or ``ties``.
    """
    if ties not in ("half", "drop"):
        raise BadInputError(f"Unknown ties={ties!r}.", advice="One of 'half', 'drop'.")
    try:
        records = store.feedback(**filters)
    except TypeError as error:
        raise BadInputError(f"No such filter: {error}.") from error
    # Nothing is superseded that the store has not left out already.
    implied = pairs(records, scope=scope, ties=ties, superseded=())
    rows = [row for row in implied if criterion is None or row.criterion == criterion]
    texts, untexted = _messages(store, rows)
    found: list[Pair] = []
    left_out = 0
    for row in rows:
        if row.chosen in untexted or row.rejected in untexted or row.context in untexted:
            left_out += 1
        else:
            found.append(_pair(row, texts))
    if left_out:
        emit(Said(text=f"{left_out} of {len(rows)} pairs are not about text and were left out"))
    return merged_votes(found) if aggregate else found


def _messages(store: Store, rows: Sequence[PairRow]) -> tuple[dict[str, tuple[Message, ...]], set[str]]:
    """The messages of every item the rows name (a plain text is an assistant's as a response, a user's as a
    prompt), and the items that are no text."""
    contexts = {row.context for row in rows if row.context is not None}
    responses = {sha for row in rows for sha in (row.chosen, row.rejected)}
    texts: dict[str, tuple[Message, ...]] = {}
    untexted: set[str] = set()
    for wanted, role in ((contexts, "user"), (responses, "assistant")):
        found, without = texts_of(store, wanted, role)
        texts |= {_key(sha, role): messages for sha, messages in found.items()}
        untexted |= without
    return texts, untexted


def texts_of(
    store: Store, wanted: Collection[str], role: str
) -> tuple[dict[str, tuple[Message, ...]], set[str]]:
    """Items by SHA-256 as messages (a plain text is one of ``role``), and those that are no text.

    Raises:
        BadInputError: one of them is not in the store.
    """
    held = store.items(sorted(wanted))
    missing = set(wanted) - held.keys()
    if missing:
        raise BadInputError(
            f"{len(missing)} items that judgements are about are not in the store, such as {min(missing)}.",
            advice="Add them with add_items, or import again from the source.",
        )
    messages = {sha: turn_of(item, role) for sha, item in held.items()}
    found = {sha: said for sha, said in messages.items() if said is not None}
    return found, messages.keys() - found.keys()


def turn_of(item: Item, role: str) -> tuple[Message, ...] | None:
    """The messages that an item holds (a plain text is one of ``role``); None when it is no text."""
    if item.media_type == MESSAGES_MEDIA_TYPE:
        return item.messages()
    if item.text is None or not item.media_type.startswith("text/"):
        return None
    return (Message.model_validate({"role": role, "content": item.text}),)


def _key(sha: str, role: str) -> str:
    # The same text may be one pair's prompt and another one's response.
    return f"{role}:{sha}"


def _pair(row: PairRow, texts: dict[str, tuple[Message, ...]]) -> Pair:
    return pair_of(
        row,
        texts[_key(row.context, "user")] if row.context is not None else (),
        texts[_key(row.chosen, "assistant")],
        texts[_key(row.rejected, "assistant")],
    )


def pair_of(
    row: PairRow,
    prompt: tuple[Message, ...],
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
) -> Pair:
    """A row with the texts that it names by hash."""
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        p_chosen=row.p_chosen,
        weight=row.weight,
        group=row.task_id or row.context or f"item:{min(row.chosen, row.rejected)}",
        annotators=(row.annotator,),
        derived_from=row.derived_from,
        criterion=row.criterion,
        chosen_ref=row.chosen,
        rejected_ref=row.rejected,
        prompt_ref=row.context,
        chosen_episode=row.chosen_episode,
        rejected_episode=row.rejected_episode,
        margin=row.margin,
    )


def merged_votes(votes: Sequence[Pair]) -> list[Pair]:
    """All pairs on the same two responses, in either order, as one; see ``aggregate`` of :func:`load_pairs`.

    Its margin is the weighted mean of the votes' that have one, a vote for the other side counting
    against it.
    """
    ballots: dict[tuple[str | None, str, str, str], list[Pair]] = {}
    for vote in votes:
        first, second = sorted((vote.chosen_ref, vote.rejected_ref))
        ballots.setdefault((vote.prompt_ref, first, second, vote.criterion), []).append(vote)
    return [_merged(ballot) for ballot in ballots.values()]


def _merged(ballot: Sequence[Pair]) -> Pair:
    # Counted for the smaller hash, so that the result does not depend on the order of the votes.
    first = min(ballot[0].chosen_ref, ballot[0].rejected_ref)
    weight = sum(vote.weight for vote in ballot)
    for_first = sum(
        vote.weight * (vote.p_chosen if vote.chosen_ref == first else 1.0 - vote.p_chosen) for vote in ballot
    )
    share = for_first / weight
    chosen_is_first = share >= 0.5
    like = next((v for v in ballot if (v.chosen_ref == first) == chosen_is_first), None)
    if like is None:  # every vote is the other way round, and says so weakly (p_chosen below one half)
        like = _swapped(ballot[0])
    margins = [
        (vote.weight, vote.margin if (vote.chosen_ref == first) == chosen_is_first else -vote.margin)
        for vote in ballot
        if vote.margin is not None
    ]
    return replace(
        like,
        p_chosen=share if chosen_is_first else 1.0 - share,
        margin=sum(w * m for w, m in margins) / sum(w for w, _ in margins) if margins else None,
        weight=weight,
        group=min(vote.group for vote in ballot),
        annotators=tuple(dict.fromkeys(name for vote in ballot for name in vote.annotators)),
        derived_from=tuple(dict.fromkeys(name for vote in ballot for name in vote.derived_from)),
    )


def _swapped(pair: Pair) -> Pair:
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        p_chosen=1.0 - pair.p_chosen,
        chosen_ref=pair.rejected_ref,
        rejected_ref=pair.chosen_ref,
        chosen_episode=pair.rejected_episode,
        rejected_episode=pair.chosen_episode,
        margin=None if pair.margin is None else -pair.margin,
    )


def _text(messages: tuple[Message, ...]) -> str:
    return "\n\n".join(message.text for message in messages)
