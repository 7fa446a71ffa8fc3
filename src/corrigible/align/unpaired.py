"""Answers that were found good or bad one by one, as training examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from corrigible.align.sources import (
    ListSource,
    Unusable,
    check_max_length,
    fitted,
    render_all,
    response_row,
)
from corrigible.errors import BadInputError
from corrigible.events import Alert, emit
from corrigible.models import Rendered, Renderer
from corrigible.records import Episode
from corrigible.store import Labelled


@dataclass(frozen=True)
class UnpairedExample:
    """A rendered answer and whether it is wanted.

    Attributes:
        rows: the answer after its prompt; one row.
        desirable: whether it was found good.
        weight: what the judgements behind it are worth, > 0.
        group: the cluster it belongs to (task or prompt), for splits and intervals.
        derived_from: ids of the feedback records behind it.
        prompt_tokens_cut: how many of the oldest prompt tokens were left out to fit.
        mismatched: its prompt with the answer of another example of its batch, for an estimate of how
            far the policy has moved on answers that nobody judged; ``None`` outside a batch, and in a
            batch whose other examples all have this prompt or this answer.
    """

    rows: tuple[Rendered]
    desirable: bool
    weight: float
    group: str
    derived_from: tuple[str, ...]
    prompt_tokens_cut: int = 0
    mismatched: Rendered | None = None


class UnpairedSource(ListSource[UnpairedExample]):
    """Labelled answers as training examples, in an order that only depends on the seed.

    Args:
        labelled: what to learn from: :func:`~corrigible.store.load_labelled`, or pairs through
            :func:`~corrigible.store.labelled_from_pairs`.
        renderer: turns messages into token ids (the policy's own).
        max_length: longest row in tokens, mismatched ones included. A longer one loses its oldest
            prompt tokens.
        seed: of the order of examples.
        invalid: ``"raise"`` stops at the first unusable answer; ``"skip"`` leaves such answers out,
            counts them in :attr:`skipped` and says so in an alert.
        episodes: episodes by id. An answer that names one is trained on the token ids that were really
            sampled, never on a re-tokenisation of its text.

    Attributes:
        labelled: the judgement behind each example, in the same order.

    Raises:
        Unusable: with ``invalid="raise"``, an unusable answer: ``empty_completion``, ``too_long``,
            ``bad_weight`` or ``not_renderable``.
        BadInputError: no usable answer is left, or ``max_length`` is too small to hold anything.
    """

    kind = "unpaired"

    def __init__(
        self,
        labelled: Iterable[Labelled],
        renderer: Renderer,
        *,
        max_length: int = 512,
        seed: int = 0,
        invalid: Literal["raise", "skip"] = "raise",
        episodes: Mapping[str, Episode] | None = None,
    ) -> None:
        check_max_length(max_length)
        found = render_all(
            list(labelled),
            lambda one: _example(one, renderer, max_length, episodes or {}),
            noun="answer",
            invalid=invalid,
        )
        super().__init__(found.examples, found.skipped, seed)
        self.max_length = max_length
        self.renderer = renderer
        self.labelled: list[Labelled] = found.kept
        self._said = False

    def batch(self, step: int, batch_size: int) -> list[UnpairedExample]:
        """The examples of step ``step`` (from 0), each with its ``mismatched`` row."""
        examples = super().batch(step, batch_size)
        rows = mismatch(examples, self.renderer, self.max_length)
        if not self._said and not any(rows):
            self._said = True
            emit(
                Alert(
                    name="mismatch_impossible",
                    message=f"A batch of {len(examples)} has no two different prompts and answers: its "
                    "reference point is taken to be 0.",
                )
            )
        return [replace(each, mismatched=row) for each, row in zip(examples, rows, strict=True)]

    def settings(self) -> tuple[object, ...]:
        """The seed, and the longest row: it decides which answers fit other prompts."""
        return self.seed, self.max_length

    def worth(self, example: UnpairedExample) -> tuple[object, ...]:
        """Its label and its weight."""
        return example.desirable, example.weight


def mismatch(
    examples: Sequence[UnpairedExample], renderer: Renderer, max_length: int
) -> list[Rendered | None]:
    """Each example's prompt with the answer of the next example of the batch (KTO, section 4.1).

    After the last example comes the first. An answer that makes a row of the batch with this prompt
    (the example's own answer, or another one to the same prompt) is passed over, because that row is a
    matched one, and so is an answer that does not fit; an example for which none is left gets ``None``.
    """
    parts = [(row.ids[: row.scored[0]], row.ids[row.scored[0] :]) for (row,) in (e.rows for e in examples)]
    matched = set(parts)
    found: list[Rendered | None] = []
    for index, example in enumerate(examples):
        row = None
        for place in range(index + 1, index + len(examples)):
            other = place % len(examples)
            if (parts[index][0], parts[other][1]) in matched:
                continue
            try:
                row = renderer.fit(_joined(example, examples[other]), max_length, "truncate_prompt")
                break
            except BadInputError:  # the answer fits its own, shorter prompt only
                continue
        found.append(row)
    return found


def _joined(prompt_of: UnpairedExample, answer_of: UnpairedExample) -> Rendered:
    (first,), (second,) = prompt_of.rows, answer_of.rows
    here, there = first.scored[0], second.scored[0]
    return Rendered(first.ids[:here] + second.ids[there:], first.kinds[:here] + second.kinds[there:])


def _example(
    one: Labelled, renderer: Renderer, max_length: int, episodes: Mapping[str, Episode]
) -> UnpairedExample:
    if not 0.0 < one.weight < float("inf"):
        raise Unusable("bad_weight", f"weight is {one.weight}, not a positive number")
    row, _ = response_row(one.prompt, one.response, renderer, episodes.get(one.episode or ""), "the answer")
    row = fitted(row, renderer, max_length)
    return UnpairedExample((row,), one.desirable, one.weight, one.group, one.derived_from, row.dropped)
