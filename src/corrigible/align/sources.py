"""Sources of training examples: what a batch is made of, in which order, from which records.

A source renders everything once, before the first step, so that a bad example is met in the first
seconds and not at step 900. Which examples form step ``k`` is a pure function of the seed and
``k``: a resumed run needs no iterator state, and cannot skip or repeat an example.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import numpy as np

from corrigible.errors import BadInputError
from corrigible.events import Alert, emit, track
from corrigible.models.renderer import SCORED, Rendered, Renderer
from corrigible.records import Episode, Message
from corrigible.store import Pair


class Example(Protocol):
    """What the trainer needs to know of an example: its rows of tokens and what it is worth."""

    @property
    def rows(self) -> tuple[Rendered, ...]: ...

    @property
    def weight(self) -> float: ...


@runtime_checkable
class Separable(Example, Protocol):
    """An example whose rows are learnt from one by one: one that is too large for memory may be cut."""

    def part(self, start: int, stop: int) -> Self:
        """The same example with the rows ``start`` to ``stop`` (exclusive) only."""
        ...


class Source(Protocol):
    """Where a trainer's batches come from."""

    @property
    def kind(self) -> str:
        """The kind of examples; an algorithm names the one it learns from."""
        ...

    @property
    def examples(self) -> Sequence[Example]: ...

    def steps_per_epoch(self, batch_size: int) -> int: ...

    def batch(self, step: int, batch_size: int) -> Sequence[Example]:
        """The examples of step ``step`` (from 0): a pure function of the two, or a resume is another run."""
        ...

    def digest(self) -> str:
        """Sha256 over everything that decides the batches: a resumed run must find the same."""
        ...


@runtime_checkable
class Paced(Protocol):
    """A source whose batches depend on how long the run is (a ramp, a curriculum)."""

    def over(self, total_steps: int) -> Self:
        """The same source in a run of so many optimiser steps."""
        ...


T = TypeVar("T")
E = TypeVar("E")
Made = TypeVar("Made", bound="Listed")


def epoch_batch(items: Sequence[T], step: int, batch_size: int, seed: int) -> list[T]:
    """Step ``step`` (from 0) of passes over ``items``: epoch ``e`` is the permutation of ``(seed, e)``.

    The last batch of an epoch may be smaller.
    """
    epoch, place = divmod(step, -(-len(items) // batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(len(items))
    return [items[i] for i in order[place * batch_size : (place + 1) * batch_size]]


class Listed(Example, Protocol):
    """An example of a fixed list, which knows the judgements behind it."""

    @property
    def derived_from(self) -> tuple[str, ...]: ...


class ListSource(ABC, Generic[Made]):
    """A source whose examples are all there before the first step, in an order that the seed decides.

    Attributes:
        examples: what batches are made of.
        skipped: how many were left out, by reason.
        seed: of the order.
    """

    kind: str

    def __init__(self, examples: Sequence[Made], skipped: Counter[str], seed: int) -> None:
        self.examples = list(examples)
        self.skipped = skipped
        self.seed = seed

    def __len__(self) -> int:
        return len(self.examples)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in one pass over the examples; the last one may be smaller."""
        return -(-len(self.examples) // batch_size)

    def batch(self, step: int, batch_size: int) -> list[Made]:
        """The examples of step ``step`` (from 0), by :func:`epoch_batch`."""
        return epoch_batch(self.examples, step, batch_size, self.seed)

    def digest(self) -> str:
        """Sha256 over everything that decides the batches: a resumed run must find the same."""
        digest = hashlib.sha256(f"{self.kind}/1 {self.settings()!r} {len(self.examples)}\n".encode())
        for example in self.examples:
            for row in example.rows:
                digest.update(row_key(row))
            digest.update(f"{self.worth(example)!r}\n".encode())
        return digest.hexdigest()

    def settings(self) -> tuple[object, ...]:
        """What besides the examples decides the batches."""
        return (self.seed,)

    @abstractmethod
    def worth(self, example: Made) -> tuple[object, ...]:
        """What besides its rows decides what is learnt from an example."""

    def derived_from(self) -> list[str]:
        """Ids of all feedback records behind the examples, sorted."""
        return sorted({record for example in self.examples for record in example.derived_from})


@dataclass(frozen=True)
class PairExample:
    """Two rendered responses to one prompt, and how sure it is that the first is the better one.

    Attributes:
        rows: ``(chosen, rejected)``; both begin with the same prompt tokens.
        p_chosen: label in [0, 1]; 0.5 for a tie.
        weight: what the judgements behind it are worth, > 0.
        group: the cluster it belongs to (task or prompt), for splits and intervals.
        derived_from: ids of the feedback records behind it.
        prompt_tokens_cut: how many of the oldest prompt tokens were left out to fit, on both sides alike.
        behaviour: per side, the log-probs of its scored tokens that were recorded when it was sampled
            (under the plain model, temperature 1), and the id of the policy version that sampled
            it; ``None`` when it was not sampled by a recorded policy.
        flip_rate: share of flipped labels of whoever judged it, in [0, 0.5); ``None`` when nobody said.
    """

    rows: tuple[Rendered, Rendered]
    p_chosen: float
    weight: float
    group: str
    derived_from: tuple[str, ...]
    prompt_tokens_cut: int = 0
    behaviour: tuple[Behaviour | None, Behaviour | None] = (None, None)
    flip_rate: float | None = None


class Behaviour(NamedTuple):
    """What was recorded when a response was sampled: who said it, and with which log-probs."""

    policy: str
    logprobs: tuple[float, ...]


class Unusable(BadInputError):
    """An example that cannot be trained on; ``reason`` is one of a few stable names."""

    def __init__(self, reason: str, message: str, *, advice: str = "") -> None:
        super().__init__(f"{reason}: {message}", advice=advice)
        self.reason = reason


class PairSource(ListSource[PairExample]):
    """Comparisons as training examples, in an order that only depends on the seed.

    Args:
        pairs: what to learn from.
        renderer: turns messages into token ids (the policy's own).
        max_length: longest row in tokens. A longer pair loses its oldest prompt tokens, the same
            ones on both sides (a different cut would compare answers to different prompts).
        seed: of the order of examples.
        invalid: ``"raise"`` stops at the first unusable pair; ``"skip"`` leaves such pairs out,
            counts them in :attr:`skipped` and says so in an alert.
        episodes: episodes by id. A side that names one is trained on the token ids that were
            really sampled, never on a re-tokenisation of its text.

    Attributes:
        pairs: the pair behind each example, in the same order.

    Raises:
        Unusable: with ``invalid="raise"``, an unusable pair: ``equal_sides``, ``empty_completion``,
            ``too_long``, ``bad_weight``, ``bad_label``, ``prompts_differ`` or ``not_renderable``.
        BadInputError: no usable pair is left, or ``max_length`` is too small to hold anything.
    """

    kind = "pairs"

    def __init__(
        self,
        pairs: Iterable[Pair],
        renderer: Renderer,
        *,
        max_length: int = 512,
        seed: int = 0,
        invalid: Literal["raise", "skip"] = "raise",
        episodes: Mapping[str, Episode] | None = None,
    ) -> None:
        check_max_length(max_length)
        found = render_all(
            list(pairs),
            lambda pair: _example(pair, renderer, max_length, episodes or {}),
            noun="pair",
            invalid=invalid,
        )
        super().__init__(found.examples, found.skipped, seed)
        self.max_length = max_length
        self.pairs: list[Pair] = found.kept

    def worth(self, example: PairExample) -> tuple[object, ...]:
        """Its label, its weight, and how often such labels are flipped where that is known."""
        known = () if example.flip_rate is None else (example.flip_rate,)
        return example.p_chosen, example.weight, *known


class RenderedAll(NamedTuple, Generic[T, E]):
    """What :func:`render_all` found: examples, what each was made from, and what was left out by reason."""

    examples: list[E]
    kept: list[T]
    skipped: Counter[str]


def render_all(
    items: Sequence[T], render: Callable[[T], E], *, noun: str, invalid: Literal["raise", "skip"]
) -> RenderedAll[T, E]:
    """Render every item once; an :class:`Unusable` one stops the run or is left out and counted.

    Args:
        items: what to render.
        render: one item to one example; raises :class:`Unusable`.
        noun: what an item is called ("pair").
        invalid: what to do with an unusable one.

    Raises:
        Unusable: with ``invalid="raise"``, the first unusable item, by its number.
        BadInputError: nothing is left.
    """
    found: RenderedAll[T, E] = RenderedAll([], [], Counter())
    such_as: dict[str, str] = {}
    for index, item in enumerate(track(items, f"render {noun}s", unit=noun)):
        try:
            found.examples.append(render(item))
            found.kept.append(item)
        except Unusable as error:
            if invalid == "raise":
                raise Unusable(
                    error.reason,
                    f"{noun} {index} of {len(items)}{_of_record(item)} ({error.message.split(': ', 1)[1]})",
                    advice=error.advice or f"Leave such {noun}s out with invalid='skip'.",
                ) from error
            found.skipped[error.reason] += 1
            such_as.setdefault(error.reason, _of_record(item))
    if not found.examples:
        why = ", ".join(f"{n} {reason}" for reason, n in found.skipped.items()) or "the input was empty"
        raise BadInputError(
            f"There is no {noun} to train on ({why}).", advice="Check the data and max_length."
        )
    say_skipped(found.skipped, noun, such_as)
    return found


def _of_record(item: object) -> str:
    """`` from record ...``: the first record behind an item, or nothing when it names none."""
    records = getattr(item, "derived_from", ())
    return f" from record {records[0]}" if records else ""


def say_skipped(skipped: Counter[str], noun: str, such_as: Mapping[str, str] | None = None) -> None:
    """An alert ``<noun>s_skipped`` that lists what was left out by reason; nothing when nothing was.

    Args:
        skipped: how many, by reason.
        noun: what they are called.
        such_as: by reason, where the first of them came from.
    """
    if skipped:
        named = such_as or {}
        listing = ", ".join(
            f"{count} {reason}{_first(named.get(reason, ''), count)}"
            for reason, count in sorted(skipped.items())
        )
        emit(Alert(name=f"{noun}s_skipped", message=f"Left out of training: {listing}."))


def _first(origin: str, count: int) -> str:
    return f" ({'the first' if count > 1 else 'it'} came{origin})" if origin else ""


def row_key(row: Rendered) -> bytes:
    """Sha256 (32 bytes) of a row's token ids, of which of them are scored, and of what is read instead."""
    ids = np.asarray(row.ids, dtype=np.int64)
    scored = np.asarray([kind in SCORED for kind in row.kinds], dtype=np.uint8)
    read = b"" if row.inputs is None else b"|" + np.asarray(row.inputs, dtype=np.int64).tobytes()
    return hashlib.sha256(ids.tobytes() + b"|" + scored.tobytes() + read).digest()


LEAST_PROMPT = 8
"""Fewer prompt tokens than this are no prompt any more: an answer so long is left out."""


def check_max_length(length: int) -> None:
    """BadInputError for a longest row that holds nothing."""
    if length < LEAST_PROMPT:
        raise BadInputError(f"max_length must be at least {LEAST_PROMPT} tokens, got {length}.")


def fitted(row: Rendered, renderer: Renderer, length: int) -> Rendered:
    """The row without its oldest prompt tokens, at most ``length`` tokens long.

    Raises:
        Unusable: ``too_long``: the response alone, or with less than
            :data:`LEAST_PROMPT` tokens of its prompt.
    """
    try:
        cut = renderer.fit(row, length, "truncate_prompt")
    except BadInputError as error:
        raise Unusable("too_long", error.message, advice="Raise max_length.") from error
    if cut.dropped > row.dropped and cut.scored[0] < LEAST_PROMPT:
        raise Unusable(
            "too_long",
            f"the response leaves room for {cut.scored[0]} of {row.scored[0]} prompt tokens",
            advice="Raise max_length.",
        )
    return cut


def _example(pair: Pair, renderer: Renderer, max_length: int, episodes: Mapping[str, Episode]) -> PairExample:
    if not 0.0 <= pair.p_chosen <= 1.0:
        raise Unusable("bad_label", f"p_chosen is {pair.p_chosen}, not in [0, 1]")
    if not 0.0 < pair.weight < float("inf"):
        raise Unusable("bad_weight", f"weight is {pair.weight}, not a positive number")
    sides = (("chosen", pair.chosen, pair.chosen_episode), ("rejected", pair.rejected, pair.rejected_episode))
    (chosen, chosen_log), (rejected, rejected_log) = (
        response_row(pair.prompt, response, renderer, episodes.get(episode or ""), f"the {name} side")
        for name, response, episode in sides
    )
    if chosen.ids == rejected.ids:
        raise Unusable("equal_sides", "chosen and rejected are the same tokens")
    shared = chosen.scored[0]
    if shared != rejected.scored[0] or chosen.ids[:shared] != rejected.ids[:shared]:
        raise Unusable("prompts_differ", "the two sides do not begin with the same prompt tokens")
    cut = max(0, max(len(chosen), len(rejected)) - max_length)
    chosen, rejected = (fitted(row, renderer, len(row) - cut) for row in (chosen, rejected))
    return PairExample(
        rows=(chosen, rejected),
        p_chosen=pair.p_chosen,
        weight=pair.weight,
        group=pair.group,
        derived_from=pair.derived_from,
        prompt_tokens_cut=cut,
        # What was recorded belongs to the whole prompt; after a cut it is about another context.
        behaviour=(None, None) if cut else (chosen_log, rejected_log),
    )


def response_row(
    prompt: Sequence[Message],
    response: Sequence[Message],
    renderer: Renderer,
    episode: Episode | None,
    name: str,
) -> tuple[Rendered, Behaviour | None]:
    """A response after its prompt, exactly as its policy sampled it when its episode says so.

    Returns:
        The row, up to its last scored token, and the log-probs that were recorded when it was sampled.

    Raises:
        Unusable: ``empty_completion`` or ``not_renderable``; the message calls the response ``name``.
    """
    recorded = _sampled(episode)
    if recorded is not None:
        row, log = recorded
    else:
        if not any(_has_text(message) for message in response):
            raise Unusable("empty_completion", f"{name} says nothing")
        try:
            row, log = renderer.pair(prompt, response), None
        except BadInputError as error:
            raise Unusable("not_renderable", f"{name}: {error.message}") from error
    if not row.scored:
        raise Unusable("empty_completion", f"{name} has no token to learn from")
    # What the template writes after the response changes nothing before it: not worth computing.
    end = row.scored[-1] + 1
    return replace(row, ids=row.ids[:end], kinds=row.kinds[:end]), log


def _has_text(message: Message) -> bool:
    content = message.content
    return bool(content.strip() if isinstance(content, str) else content or message.tool_calls)


def _sampled(episode: Episode | None) -> tuple[Rendered, Behaviour | None] | None:
    """The row as it was sampled, when its episode is known and one turn long."""
    if episode is None or len(episode.steps) != 1:
        return None
    step = episode.steps[0]
    if not step.token_ids or not step.prompt_token_ids:
        return None
    row = Rendered.from_tokens(step.prompt_token_ids, step.token_ids)
    if step.logprobs is None or episode.policy is None or len(step.logprobs) != len(step.token_ids):
        return row, None
    return row, Behaviour(episode.policy, tuple(step.logprobs))
