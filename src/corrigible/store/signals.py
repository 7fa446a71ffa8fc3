"""What feedback says, with its texts, in the few shapes that algorithms learn from.

Two of them are as old as the store: :class:`~corrigible.store.pairs.Pair` and
:class:`~corrigible.store.labelled.Labelled`. Which kinds of records become which of these, and how, is the
table in :mod:`corrigible.store.conversions`.
"""

from __future__ import annotations

from dataclasses import dataclass

from corrigible.records import Message

Turn = tuple[Message, ...]
"""The messages of a prompt or of a response."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Several responses to one prompt, scored against each other.

    Attributes:
        prompt: empty when the judgement was about the responses alone.
        responses: at least two.
        scores: of each response, higher is better, in the judge's own unit; equal scores are a tie, NaN is
            "not judged".
        weight: how much the whole of it counts, > 0.
        group: the task, else the prompt: data is split by it, never by row.
        annotators: who judged.
        derived_from: ids of the feedback records behind it.
        criterion: what was judged.
        episodes: per response, the episode that it was sampled in, if known.
    """

    prompt: Turn
    responses: tuple[Turn, ...]
    scores: tuple[float, ...]
    weight: float
    group: str
    annotators: tuple[str, ...]
    derived_from: tuple[str, ...]
    criterion: str = "overall"
    episodes: tuple[str | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Demonstrated:
    """A response to imitate (or, with negative spans, to imitate in part).

    Attributes:
        quality: the class that its source puts it in (``"expert"``, ``"mixed"``, an annotator's type, ...);
            empty when nothing is known.
        spans: ``(start, stop, weight)`` in characters of the response's text, disjoint and in order; weight 1
            elsewhere. 0 leaves a span out, a negative weight is for losses that push down.

    The other attributes are as for :class:`Ranked`.
    """

    prompt: Turn
    response: Turn
    weight: float
    group: str
    annotators: tuple[str, ...]
    derived_from: tuple[str, ...]
    criterion: str = "overall"
    quality: str = ""
    spans: tuple[tuple[int, int, float], ...] = ()
    episode: str | None = None


@dataclass(frozen=True, kw_only=True)
class Critiqued:
    """A draft, what was said about it in words, and what became of it if anything did.

    Attributes:
        draft: the response that was criticised.
        critique: the words.
        refined: the response after the critique; empty when nobody wrote one.

    The other attributes are as for :class:`Ranked`.
    """

    prompt: Turn
    draft: Turn
    critique: str
    weight: float
    group: str
    annotators: tuple[str, ...]
    derived_from: tuple[str, ...]
    criterion: str = "overall"
    refined: Turn = ()
    episode: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a task.

    Attributes:
        response: what was tried.
        right: whether it was; ``None`` when it could not be checked.
        feedback: what was said about it, if anything.
        steps: the response's text in steps, where somebody divided it.
        first_wrong: index of the first wrong step; ``None`` when it is right or nobody said.
        error: type of the mistake, if somebody named it.
    """

    response: Turn
    right: bool | None = None
    feedback: str = ""
    steps: tuple[str, ...] = ()
    first_wrong: int | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """Tries at one task in the order they were made, for losses that learn from mistakes.

    The other attributes are as for :class:`Ranked`.
    """

    prompt: Turn
    attempts: tuple[Attempt, ...]
    weight: float
    group: str
    annotators: tuple[str, ...]
    derived_from: tuple[str, ...]
    criterion: str = "overall"
