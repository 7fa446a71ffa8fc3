"""From signals to a source: what cannot be used is named and counted, the rest goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from feedback_texts import attempt, attempts, pair

from corrigible.align import Unusable
from corrigible.align.rendering import Lesson, hindsight, lemma, lesson_source, lessons_of, spoken_turns
from corrigible.errors import BadInputError
from corrigible.events import Alert
from corrigible.models import Renderer
from corrigible.store import Pair


def teach(one: Pair, rng: np.random.Generator) -> list[Lesson]:
    return hindsight(one, forms=["p", "n"])


def test_the_rest_goes_on_and_what_was_left_out_is_counted(
    renderer: Renderer, recorded_events: list[object]
) -> None:
    signals = [pair(), pair(p_chosen=0.5), pair("x" * 99, "no"), replace(pair(), prompt=())]
    source = lesson_source(signals, teach, renderer, max_length=60, invalid="skip", noun="comparison")
    assert len(source) == 3  # both sides of the first, and the short side of the third
    assert source.skipped == {"tie": 1, "too_long": 1, "no_prompt": 1}
    alerts = {event.name: event.message for event in recorded_events if isinstance(event, Alert)}
    assert "1 tie" in alerts["comparisons_skipped"] and "1 too_long" in alerts["texts_skipped"]


def test_the_message_names_the_record(renderer: Renderer) -> None:
    signals = [pair(), pair(p_chosen=0.5, derived_from=("f42",))]
    with pytest.raises(Unusable, match=r"tie: comparison 1 of 2 from record f42 \(neither"):
        lesson_source(signals, teach, renderer, noun="comparison")
    with pytest.raises(Unusable, match=r"too_long: text 2 of 3 from record f43 \(.*tokens"):
        lesson_source(
            [pair(), pair("x" * 99, "no", derived_from=("f43",))],
            lambda one, rng: hindsight(one, forms=["p", "n"])[: 2 if len(one.chosen_text) < 9 else 1],
            renderer,
            max_length=60,
        )
    with pytest.raises(BadInputError, match="1 tie"):
        lesson_source(signals[1:], teach, renderer, invalid="skip")
    with pytest.raises(BadInputError, match="the input was empty"):
        lesson_source([], teach, renderer, invalid="skip")


def test_what_is_drawn_depends_on_the_seed_and_the_place_alone() -> None:
    task = attempts(attempt("a\nb", False, first_wrong=1), attempt("a\nc", True))

    def made(tasks: int, seed: int) -> list[Lesson]:
        return lessons_of([task] * tasks, lambda one, rng: lemma(one, rng, mode="fix"), seed=seed)[0]

    assert made(12, 3)[:5] == made(5, 3)
    assert made(12, 3) != made(12, 4)
    assert len({lesson.spoken[0].text for lesson in made(12, 3)}) > 1


def test_the_source_is_one_of_tokens_and_knows_its_records(renderer: Renderer) -> None:
    source = lesson_source([pair(), pair("si", derived_from=("f2", "f3"))], teach, renderer)
    assert source.kind == "tokens" and source.derived_from() == ["f1", "f2", "f3"]
    assert (
        source.digest()
        == lesson_source([pair(), pair("si", derived_from=("f2", "f3"))], teach, renderer).digest()
    )
    other = lesson_source(
        [pair()], lambda one, rng: [Lesson((*one.prompt, *spoken_turns(one.chosen)), 2.0, "g", ())], renderer
    )
    assert other.digest() != source.digest()
