"""From signals, through a renderer of feedback, to the examples of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from corrigible.align.corruptors import Corruptor
from corrigible.align.registry import MakeSource
from corrigible.align.rendering.segments import Lesson, token_example
from corrigible.align.sources import Unusable, check_max_length, render_all
from corrigible.align.tokens import TokenSource
from corrigible.models import Renderer
from corrigible.records import Episode

S = TypeVar("S")
T = TypeVar("T")

Teach = Callable[[S, np.random.Generator], Sequence[Lesson]]
"""From one signal to what is to be learnt of it; raises :class:`Unusable`."""


def lessons_of(
    signals: Sequence[S],
    teach: Teach[S],
    *,
    noun: str = "signal",
    seed: int = 0,
    invalid: Literal["raise", "skip"] = "raise",
) -> tuple[list[Lesson], dict[str, int]]:
    """Every signal as lessons, and how many signals gave none, by reason.

    What a signal's generator draws depends on the seed and the signal's place alone.

    Args:
        signals: what to learn from.
        teach: one signal to lessons.
        noun: what a signal is called ("comparison").
        seed: of what is drawn.
        invalid: ``"raise"`` stops at the first unusable signal, ``"skip"`` leaves it out and counts it.

    Raises:
        Unusable: with ``invalid="raise"``; the message names the record that the signal comes from.
        BadInputError: nothing is left.
    """

    def of(numbered: _Numbered) -> Sequence[Lesson]:
        return said_of(
            numbered.signal, lambda: teach(numbered.signal, np.random.default_rng([seed, numbered.number]))
        )

    items = [_Numbered(number, signal) for number, signal in enumerate(signals)]
    found = render_all(items, of, noun=noun, invalid=invalid)
    return [lesson for lessons in found.examples for lesson in lessons], dict(found.skipped)


def lesson_source(
    signals: Sequence[S],
    teach: Teach[S],
    renderer: Renderer,
    *,
    noun: str = "signal",
    max_length: int = 512,
    seed: int = 0,
    invalid: Literal["raise", "skip"] = "raise",
    corruptor: Corruptor | None = None,
) -> TokenSource:
    """The source of what ``teach`` makes of signals: :func:`lessons_of`, then tokens.

    Args:
        signals, teach, noun, seed, invalid: as for :func:`lessons_of`.
        renderer: the policy's own.
        max_length: longest row in tokens; a longer one loses its oldest context.
        corruptor: changes what is read at each step.

    Raises:
        Unusable, BadInputError: as :func:`lessons_of` and :func:`token_example`.
    """
    check_max_length(max_length)
    lessons, without = lessons_of(signals, teach, noun=noun, seed=seed, invalid=invalid)

    found = render_all(
        lessons,
        lambda lesson: token_example(lesson, renderer, max_length=max_length),
        noun="text",
        invalid=invalid,
    )
    found.skipped.update(without)
    return TokenSource(found.examples, seed=seed, skipped=found.skipped, corruptor=corruptor)


def taught(noun: str, teach: Callable[[Any, np.random.Generator, Any], Sequence[Lesson]]) -> MakeSource:
    """How an algorithm makes its source, when that is to render one signal after the other.

    Args:
        noun: what a signal is called ("comparison").
        teach: signal, generator and the algorithm's settings to lessons; raises :class:`Unusable`.
    """

    def make(
        signals: Sequence[Any],
        renderer: Renderer,
        config: Any,
        /,
        *,
        max_length: int,
        seed: int,
        invalid: Literal["raise", "skip"],
        episodes: Mapping[str, Episode],
    ) -> TokenSource:
        return lesson_source(
            signals,
            lambda signal, rng: teach(signal, rng, config),
            renderer,
            noun=noun,
            max_length=max_length,
            seed=seed,
            invalid=invalid,
        )

    return make


def said_of(signal: Any, make: Callable[[], T]) -> T:
    """What ``make`` makes of a signal.

    Raises:
        Unusable: as ``make`` raises it; ``no_prompt`` for a signal that was said of an answer alone.
    """
    if not getattr(signal, "prompt", True):
        raise Unusable("no_prompt", "it was said of an answer alone, without what was asked")
    return make()


@dataclass(frozen=True)
class _Numbered:
    """A signal and its place."""

    number: int
    signal: Any

    @property
    def derived_from(self) -> tuple[str, ...]:
        """What names it in a message."""
        return tuple(getattr(self.signal, "derived_from", ()))
