"""Demonstrations and rendered feedback as training examples: rows of tokens, each with what it weighs.

Weights are given to characters (spans of a response, segments of a rendered text) and become those of
tokens here, through where the renderer says that each token stands. A token on the border of two spans
takes the mean of its characters' weights. The end of the turn weighs 1, whatever the text before it does.
A token of weight 0 is read and not learnt from: it is not even scored.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal, Self

import numpy as np

from corrigible.align.corruptors import Corruptor
from corrigible.align.sources import (
    ListSource,
    Unusable,
    check_max_length,
    fitted,
    render_all,
    response_row,
)
from corrigible.errors import BadInputError
from corrigible.models.renderer import Rendered, Renderer, TokenKind
from corrigible.records import Episode
from corrigible.store.signals import Demonstrated, Turn

Spans = Literal["keep", "weights", "signed"]
"""What a weight of a span means: above 0 learn it, else leave it out (``keep``); as it is, but nothing below
0 (``weights``); as it is, to be pushed down where it is below 0 (``signed``)."""

BETWEEN = "\n\n"
"""What stands between the messages of a response when its characters are counted."""


@dataclass(frozen=True)
class TokenExample:
    """A rendered text, and what each of its tokens weighs.

    Attributes:
        rows: the text; one row.
        token_weights: of each scored token, in order; 0 keeps it out of the loss and its denominators.
        weight: what the judgements behind it are worth, > 0; multiplies all of ``token_weights``.
        group: the cluster it belongs to (task or prompt), for splits and intervals.
        derived_from: ids of the feedback records behind it.
        prompt_tokens_cut: how many of the oldest prompt tokens were left out to fit.
        quality: the class its source puts it in; empty when nothing is known.
        corruptible: per token of the row, whether a corruptor may touch it; the scored ones when absent.
    """

    rows: tuple[Rendered]
    token_weights: tuple[float, ...]
    weight: float
    group: str
    derived_from: tuple[str, ...]
    prompt_tokens_cut: int = 0
    quality: str = ""
    corruptible: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        (row,) = self.rows
        if len(self.token_weights) != len(row.scored):
            raise BadInputError(f"{len(self.token_weights)} weights for {len(row.scored)} scored tokens.")
        if self.corruptible is not None and len(self.corruptible) != len(row):
            raise BadInputError(
                f"corruptible speaks of {len(self.corruptible)} tokens, the row has {len(row)}."
            )

    @property
    def places(self) -> tuple[int, ...]:
        """Positions of the row that a corruptor may touch."""
        (row,) = self.rows
        if self.corruptible is None:
            return row.scored
        return tuple(place for place, may in enumerate(self.corruptible) if may)


class TokenSource(ListSource[TokenExample]):
    """Texts with token weights, in an order that only depends on the seed.

    Args:
        examples: what to learn from; :func:`demonstration_source` makes it from demonstrations.
        seed: of the order, and of what the corruptor draws.
        skipped: how many could not be used, by reason.
        corruptor: changes what is read of each example at each step; ``examples`` stay as they are.
    """

    kind = "tokens"

    def __init__(
        self,
        examples: Sequence[TokenExample],
        *,
        seed: int = 0,
        skipped: Counter[str] | None = None,
        corruptor: Corruptor | None = None,
    ) -> None:
        if not examples:
            raise BadInputError("There is no text to train on.", advice="Check the data and max_length.")
        super().__init__(examples, skipped if skipped is not None else Counter(), seed)
        self.corruptor = corruptor
        self.total_steps: int | None = None

    def over(self, total_steps: int) -> Self:
        """The same source in a run of so many steps; until told, a ramp counts as over."""
        paced = copy(self)
        paced.total_steps = total_steps
        return paced

    def batch(self, step: int, batch_size: int) -> list[TokenExample]:
        """The examples of step ``step`` (from 0), each as the policy is to read it there."""
        examples = super().batch(step, batch_size)
        if self.corruptor is None:
            return examples
        progress = 1.0 if self.total_steps is None else min(1.0, step / self.total_steps)
        return [
            replace(
                one,
                rows=(
                    self.corruptor(
                        one.rows[0], one.places, progress, np.random.default_rng([self.seed, step, number])
                    ),
                ),
            )
            for number, one in enumerate(examples)
        ]

    def settings(self) -> tuple[object, ...]:
        """The seed, and how examples are corrupted."""
        return self.seed, None if self.corruptor is None else self.corruptor.settings()

    def worth(self, example: TokenExample) -> tuple[object, ...]:
        """Its weights, and where it may be corrupted."""
        return example.weight, example.token_weights, example.corruptible


def demonstration_source(
    demonstrations: Iterable[Demonstrated],
    renderer: Renderer,
    *,
    max_length: int = 512,
    seed: int = 0,
    invalid: Literal["raise", "skip"] = "raise",
    episodes: Mapping[str, Episode] | None = None,
    spans: Spans = "keep",
    quality_weights: Mapping[str, float] | None = None,
    corruptor: Corruptor | None = None,
) -> TokenSource:
    """Responses to imitate, as the examples of a source.

    Args:
        demonstrations: what to learn from.
        renderer: turns messages into token ids (the policy's own).
        max_length: longest row in tokens; a longer one loses its oldest prompt tokens.
        seed: of the order of examples, and of what the corruptor draws.
        invalid: ``"raise"`` stops at the first unusable demonstration; ``"skip"`` leaves such out,
            counts them in :attr:`TokenSource.skipped` and says so in an alert.
        episodes: episodes by id. A response that names one is trained on the token ids that were really
            sampled, never on a re-tokenisation of its text.
        spans: what the weight of a span means.
        quality_weights: what a demonstration of a quality class counts, > 0; 1 for classes not named.
        corruptor: changes what is read at each step.

    Raises:
        Unusable: with ``invalid="raise"``, an unusable demonstration: ``empty_completion``, ``too_long``,
            ``bad_weight``, ``bad_span``, ``nothing_weighted``, ``places_unknown``, ``text_differs`` or
            ``not_renderable``.
        BadInputError: nothing usable is left, ``max_length`` is too small to hold anything, or a quality
            weight is not above 0.
    """
    check_max_length(max_length)
    quality = dict(quality_weights or {})
    for name, value in quality.items():
        if not 0.0 < value < float("inf"):
            raise BadInputError(
                f"The quality class '{name}' weighs {value}.",
                advice="Give it a positive weight, or leave such demonstrations out before training.",
            )
    found = render_all(
        list(demonstrations),
        lambda one: _demonstration(one, renderer, max_length, episodes or {}, spans, quality),
        noun="demonstration",
        invalid=invalid,
    )
    return TokenSource(found.examples, seed=seed, skipped=found.skipped, corruptor=corruptor)


def weighted_example(
    row: Rendered,
    token_weights: Sequence[float],
    renderer: Renderer,
    *,
    max_length: int,
    weight: float,
    group: str,
    derived_from: tuple[str, ...],
    quality: str = "",
    corruptible: Sequence[bool] | None = None,
) -> TokenExample:
    """An example of a rendered text: tokens of weight 0 are no longer scored, and the row is made to fit.

    Args:
        row: the text.
        token_weights: of each of its scored tokens, in order.
        renderer: the policy's own.
        max_length: longest row in tokens; a longer one loses its oldest prompt tokens, never a token that
            is learnt from.
        weight, group, derived_from, quality: as for :class:`TokenExample`.
        corruptible: per token of ``row``, whether a corruptor may touch it; its scored tokens when
            absent, those of weight 0 among them.

    Raises:
        Unusable: ``bad_weight``, ``empty_completion``, ``nothing_weighted`` or ``too_long``.
        BadInputError: the numbers of weights and scored tokens differ.
    """
    if not 0.0 < weight < float("inf"):
        raise Unusable("bad_weight", f"weight is {weight}, not a positive number")
    scored = row.scored
    if not scored:
        raise Unusable("empty_completion", "the text has no token to learn from")
    if len(token_weights) != len(scored):
        raise BadInputError(f"{len(token_weights)} weights for {len(scored)} scored tokens.")
    if not all(isfinite(w) for w in token_weights):
        raise Unusable("bad_weight", "a token's weight is not finite")
    if not any(token_weights):
        raise Unusable("nothing_weighted", "every token weighs 0")
    kinds = list(row.kinds)
    may = None if corruptible is None else list(corruptible)
    if not all(token_weights):
        if may is None:
            may = [place in set(scored) for place in range(len(row))]
        for place, w in zip(scored, token_weights, strict=True):
            if w == 0.0:
                kinds[place] = TokenKind.PROMPT
    learnt = replace(row, kinds=tuple(kinds))
    # What follows the last token that is learnt changes nothing before it: not worth computing.
    end = learnt.scored[-1] + 1
    fits = fitted(replace(learnt, ids=row.ids[:end], kinds=learnt.kinds[:end]), renderer, max_length)
    cut = fits.dropped - row.dropped
    if may is not None:
        keep = int(cut > 0 and row.ids[0] == renderer.tokenizer.bos_token_id)
        may = [*may[:keep], *may[keep + cut : end]]
    return TokenExample(
        rows=(fits,),
        token_weights=tuple(float(w) for w in token_weights if w != 0.0),
        weight=weight,
        group=group,
        derived_from=derived_from,
        prompt_tokens_cut=cut,
        quality=quality,
        corruptible=None if may is None else tuple(may),
    )


def character_weights(
    text: str, spans: Sequence[tuple[int, int, float]], mode: Spans = "signed"
) -> np.ndarray:
    """What each character of ``text`` weighs, ``(characters,)`` float64: 1 outside of all spans.

    Raises:
        Unusable: ``bad_span``: out of the text, out of order, overlapping, or not finite.
    """
    weights = np.ones(len(text))
    reached = 0
    for start, stop, weight in spans:
        if not reached <= start < stop <= len(text) or not isfinite(weight):
            raise Unusable(
                "bad_span", f"the span ({start}, {stop}, {weight}) of a text of {len(text)} characters"
            )
        weights[start:stop] = weight
        reached = stop
    if mode == "keep":
        return (weights > 0.0).astype(np.float64)
    return weights.clip(min=0.0) if mode == "weights" else weights


def token_weights(places: Sequence[tuple[int, int] | None], weights: np.ndarray) -> tuple[float, ...]:
    """What tokens weigh that stand at ``(start, stop)`` in a text whose characters weigh ``weights``.

    A token of several characters takes their mean; one without any (the rest of a character that takes
    several tokens) that of the character before it; ``None`` (the end of the turn) 1.
    """
    found = []
    for place in places:
        if place is None or not len(weights):
            found.append(1.0)
            continue
        start, stop = place
        stretch = weights[start:stop] if start < stop else weights[max(start - 1, 0) : max(start, 1)]
        # Equal weights give themselves, not a mean that is rounded.
        found.append(float(stretch[0] if (stretch == stretch[0]).all() else stretch.mean()))
    return tuple(found)


def _demonstration(
    one: Demonstrated,
    renderer: Renderer,
    max_length: int,
    episodes: Mapping[str, Episode],
    spans: Spans,
    quality: Mapping[str, float],
) -> TokenExample:
    if not 0.0 < one.weight < float("inf"):
        raise Unusable("bad_weight", f"weight is {one.weight}, not a positive number")
    episode = episodes.get(one.episode or "")
    row, _ = response_row(one.prompt, one.response, renderer, episode, "the response")
    weights: tuple[float, ...] = (1.0,) * len(row.scored)
    if one.spans:
        characters = character_weights(BETWEEN.join(m.text for m in one.response), one.spans, spans)
        weights = token_weights(_places(one, row, renderer), characters)
        # An answer of which nothing is kept is no lesson in when to stop.
        if not any(characters):
            raise Unusable("nothing_weighted", "every character of the response weighs 0")
    return weighted_example(
        row,
        weights,
        renderer,
        max_length=max_length,
        weight=one.weight * quality.get(one.quality, 1.0),
        group=one.group,
        derived_from=one.derived_from,
        quality=one.quality,
    )


def _places(one: Demonstrated, row: Rendered, renderer: Renderer) -> list[tuple[int, int] | None]:
    """Where each scored token stands in the response's text; None for the end of a turn."""
    ids = [row.ids[place] for place in row.scored]
    if row.messages:
        found = _written(one.prompt, one.response, row, renderer)
    else:
        found = _sampled(one.response, ids, renderer)
    return [None if i in renderer.end_of_turn_ids else at for i, at in zip(ids, found, strict=True)]


def _written(prompt: Turn, response: Turn, row: Rendered, renderer: Renderer) -> list[tuple[int, int]]:
    """Of a response that was rendered from its text."""
    turns = {len(prompt) + i: 0 for i, m in enumerate(response) if m.role == "assistant"}
    try:
        again, places = renderer.located([*prompt, *response], turns)
    except BadInputError as error:
        raise Unusable("places_unknown", error.message) from error
    assert again.ids[: len(row)] == row.ids
    begins = np.cumsum([0, *(len(m.text) + len(BETWEEN) for m in response)]).tolist()
    return [
        (begins[at.message - len(prompt)] + at.start, begins[at.message - len(prompt)] + at.stop)
        for at in places[: len(row.scored)]
    ]


def _sampled(response: Turn, ids: Sequence[int], renderer: Renderer) -> list[tuple[int, int]]:
    """Of a response that was sampled: what each token adds to the text that is there."""
    text = BETWEEN.join(m.text for m in response)
    if renderer.decode(ids) != text:
        raise Unusable("text_differs", "its spans are of another text than the one that was sampled")
    ends = [0]
    for count in range(1, len(ids) + 1):
        # A character that is not complete yet counts already: its first token has it.
        ends.append(min(max(ends[-1], len(renderer.decode(ids[:count]))), len(text)))
    return list(itertools.pairwise(ends))
