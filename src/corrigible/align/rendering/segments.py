"""Feedback as text: what a renderer of feedback writes, and the one compiler from there to tokens.

A renderer of feedback is a pure function from a signal (a pair, a critique, some attempts) to a few
:class:`Lesson`: conversations in which the assistant's turns are cut into :class:`Segment`, each with its
weight. It knows no tokenizer. :func:`token_example` makes a training example of a lesson through the
policy's :class:`~corrigible.models.Renderer`, the only place where chat becomes tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from corrigible.align.sources import Unusable
from corrigible.align.tokens import TokenExample, weighted_example
from corrigible.errors import BadInputError
from corrigible.models import Place, Rendered, Renderer, TokenKind
from corrigible.records import Message

SegmentKind = Literal["given", "response", "mistake", "transition", "reflection"]
"""What a piece of the assistant's text is.

``given`` is the beginning of a turn that serving writes (a marker, a class): it is tokenised apart, exactly
as it is when the policy is asked, and never learnt. The others say why a piece is there: an answer, a
mistake that is shown, the words that turn from it, what is said about it.
"""


@dataclass(frozen=True)
class Segment:
    """A piece of the assistant's text.

    Attributes:
        text: as it stands; nothing is put between segments.
        weight: what each of its tokens counts; 0 is context only.
        corruptible: whether a corruptor of inputs may replace its tokens.
        kind: what it is there for.
    """

    text: str
    weight: float = 1.0
    corruptible: bool = True
    kind: SegmentKind = "response"


@dataclass(frozen=True)
class Spoken:
    """A turn of the assistant that is learnt from, in pieces. Its end weighs as much as its last piece.

    Attributes:
        segments: in order; those of kind ``given`` come first.
        message: the message that it was, for what a message has besides text (tool calls).
    """

    segments: tuple[Segment, ...]
    message: Message | None = None

    @property
    def text(self) -> str:
        """All of the turn."""
        return "".join(segment.text for segment in self.segments)

    @property
    def given(self) -> str:
        """The beginning that serving writes."""
        return "".join(segment.text for segment in self.segments if segment.kind == "given")

    @property
    def said(self) -> str:
        """The turn after what is given."""
        return "".join(segment.text for segment in self.segments if segment.kind != "given")


@dataclass(frozen=True)
class Lesson:
    """A conversation to learn from.

    Attributes:
        turns: messages that are context, and turns that are learnt from.
        weight: what the whole of it counts, > 0.
        group: the task or prompt behind it: data is split by it.
        derived_from: ids of the feedback records behind it.
        per_token: whether each token counts (a long answer counts more), or the lesson as a whole, its
            tokens sharing its weight.
        prompt_weight: what each token of the context's contents counts; 0 unless the question is to be
            learnt as well.
    """

    turns: tuple[Message | Spoken, ...]
    weight: float
    group: str
    derived_from: tuple[str, ...]
    per_token: bool = True
    prompt_weight: float = 0.0

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation as plain messages."""
        return tuple(turn if isinstance(turn, Message) else _message(turn) for turn in self.turns)

    @property
    def spoken(self) -> tuple[Spoken, ...]:
        """The turns that are learnt from."""
        return tuple(turn for turn in self.turns if isinstance(turn, Spoken))


def spoken_turns(
    response: Sequence[Message], given: str = "", *, weight: float = 1.0, kind: SegmentKind = "response"
) -> tuple[Message | Spoken, ...]:
    """A response to learn from: each of the assistant's messages after the words that are ``given``.

    Raises:
        Unusable: ``empty_completion``.
    """
    if not any(m.role == "assistant" and (m.text.strip() or m.tool_calls) for m in response):
        raise Unusable("empty_completion", "the response says nothing")
    turns: list[Message | Spoken] = []
    for message in response:
        if message.role != "assistant":
            turns.append(message)
            continue
        start = (Segment(given, 0.0, False, "given"),) if given else ()
        turns.append(Spoken((*start, Segment(message.text, weight, kind=kind)), message))
    return tuple(turns)


def answer_text(response: Sequence[Message]) -> str:
    """The text of a response that is one turn of the assistant, for renderers that take it apart.

    Raises:
        Unusable: ``empty_completion``, or ``several_messages`` (tool calls in between, say).
    """
    if len(response) != 1 or response[0].role != "assistant" or response[0].tool_calls:
        roles = ", ".join(message.role for message in response) or "nothing"
        raise Unusable("several_messages", f"the response is not one plain answer of the assistant ({roles})")
    if not response[0].text.strip():
        raise Unusable("empty_completion", "the response says nothing")
    return response[0].text


def token_example(lesson: Lesson, renderer: Renderer, *, max_length: int = 512) -> TokenExample:
    """A lesson as the tokens and weights that a policy is trained on.

    A token across the border of two segments takes the mean of their weights, by characters. What the
    template writes to end a turn weighs as the turn's last segment. Tokens of segments that are ``given``
    are no part of the answer: they are rendered as :meth:`Serving.prompt` renders them.

    Args:
        lesson: what to learn.
        renderer: the policy's own.
        max_length: longest row in tokens; a longer one loses its oldest context (never what is learnt,
            so with :attr:`Lesson.prompt_weight` nothing).

    Raises:
        Unusable: ``bad_weight``, ``empty_completion``, ``nothing_to_learn``, ``not_renderable`` or
            ``too_long``.
    """
    _check(lesson)
    messages = lesson.messages
    spoken = {i: turn for i, turn in enumerate(lesson.turns) if isinstance(turn, Spoken)}
    try:
        row, places = renderer.located(messages, {i: len(turn.given) for i, turn in spoken.items()})
    except BadInputError as error:
        raise Unusable("not_renderable", error.message, advice=error.advice) from error
    of = {i: _Characters(turn) for i, turn in spoken.items()}
    weights = [of[place.message].weight(place) for place in places]
    corruptible = [False] * len(row)
    for position, place in zip(row.scored, places, strict=True):
        corruptible[position] = of[place.message].corruptible(place)
    if lesson.prompt_weight:
        row, weights = _with_prompt(row, weights, lesson.prompt_weight)
    if not any(weights):
        raise Unusable("nothing_to_learn", "every token weighs 0")
    if not lesson.per_token:
        total = math.fsum(weights)
        weights = [weight / total for weight in weights]
    return weighted_example(
        row,
        weights,
        renderer,
        max_length=max_length,
        weight=lesson.weight,
        group=lesson.group,
        derived_from=lesson.derived_from,
        corruptible=corruptible,
    )


class _Characters:
    """What every character of a turn weighs, and whether a corruptor may replace it."""

    def __init__(self, turn: Spoken) -> None:
        self._weights = [s.weight for s in turn.segments for _ in s.text]
        self._corruptible = [s.corruptible for s in turn.segments for _ in s.text]
        self._last = turn.segments[-1].weight

    def weight(self, place: Place) -> float:
        if place.start >= len(self._weights):
            return self._last
        # A token of no characters of its own (a part of one that several tokens spell) is where it starts.
        part = self._weights[place.start : max(place.stop, place.start + 1)]
        return part[0] if len(set(part)) == 1 else math.fsum(part) / len(part)

    def corruptible(self, place: Place) -> bool:
        """Whether all of a token's characters are; the end of a turn never is."""
        part = self._corruptible[place.start : place.stop]
        return bool(part) and all(part)


def _message(turn: Spoken) -> Message:
    if turn.message is None:
        return Message(role="assistant", content=turn.text)
    return turn.message.model_copy(update={"content": turn.text})


def _with_prompt(row: Rendered, weights: list[float], weight: float) -> tuple[Rendered, list[float]]:
    """The row with the contents of its context scored as well; its first token only predicts."""
    kinds = list(row.kinds)
    scored = dict(zip(row.scored, weights, strict=True))
    for i, kind in enumerate(row.kinds):
        if kind is TokenKind.PROMPT and i > 0:
            kinds[i] = TokenKind.NOT_SAMPLED
            scored[i] = weight
    return replace(row, kinds=tuple(kinds)), [scored[i] for i in sorted(scored)]


def _check(lesson: Lesson) -> None:
    if not 0.0 < lesson.weight < math.inf:
        raise Unusable("bad_weight", f"weight is {lesson.weight}, not a positive number")
    for turn in lesson.spoken:
        if any(not 0.0 <= s.weight < math.inf for s in turn.segments) or not (
            0.0 <= lesson.prompt_weight < math.inf
        ):
            raise Unusable("bad_weight", "a segment's weight is negative or not a number")
        kinds = [segment.kind == "given" for segment in turn.segments]
        if kinds != sorted(kinds, reverse=True):
            raise BadInputError("What is given of a turn must stand at its beginning: serving writes it.")
        tool_calls = turn.message is not None and turn.message.tool_calls
        if not turn.said.strip() and not tool_calls:
            raise Unusable("empty_completion", "a turn that is to be learnt says nothing")
    if not lesson.spoken:
        raise Unusable("nothing_to_learn", "no turn of the lesson is learnt from")
