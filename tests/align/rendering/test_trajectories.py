"""Several tries at one task as one text: LEMMA and RISE."""

from __future__ import annotations

import math

import numpy as np
import pytest
from feedback_texts import attempt, attempts, written

from corrigible.align import Unusable
from corrigible.align.rendering import checked, error_types, final_answer, lemma, rise, rise_serving
from corrigible.align.rendering.trajectories import FIX, RESTART
from corrigible.models import Renderer

ASKED = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
WRONG = attempt("a = 1\nb = 3\nso 9", False, first_wrong=1)
RIGHT = attempt("a = 1\nb = 2\nso 6", True)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def without_phrase(text: str) -> str:
    for phrase in (*FIX, *RESTART):
        text = text.replace(phrase, "FIX" if phrase in FIX else "RESTART")
    return text


# -- LEMMA --------------------------------------------------------------------------------------


def test_a_mistake_is_fixed_or_the_solution_begun_afresh(renderer: Renderer) -> None:
    lessons = lemma(attempts(WRONG, RIGHT), generator())
    assert [without_phrase(text) for text in written(lessons, renderer)] == [
        f"{ASKED}«a = 1\nb = 3\nFIX\nb = 2\nso 6<|im_end|>»",
        f"{ASKED}«a = 1\nb = 3\nRESTART\na = 1\nb = 2\nso 6<|im_end|>»",
    ]
    assert [s.kind for s in lessons[0].spoken[0].segments] == ["mistake", "transition", "response"]


def test_the_mistake_may_be_shown_without_being_learnt(renderer: Renderer) -> None:
    [text] = written(lemma(attempts(WRONG, RIGHT), generator(), mode="fix", mistake_weight=0.0), renderer)
    assert text.startswith(f"{ASKED}a = 1\nb = 3«\n")
    assert without_phrase(text).endswith("«\nFIX\nb = 2\nso 6<|im_end|>»")


def test_the_mistake_ends_with_its_first_wrong_step_unless_told_otherwise() -> None:
    [cut] = lemma(attempts(WRONG, RIGHT), generator(), mode="restart")
    [whole] = lemma(attempts(WRONG, RIGHT), generator(), mode="restart", truncate=False)
    assert "so 9" not in cut.spoken[0].text and "so 9" in whole.spoken[0].text
    assert final_answer(cut.spoken[0].text) == final_answer(whole.spoken[0].text) == "6"


def test_only_a_right_attempt_that_begins_like_the_wrong_one_can_fix_it() -> None:
    other = attempt("b = 2\na = 1\nso 6", True)
    [restart] = lemma(attempts(WRONG, other), generator())
    assert restart.spoken[0].text.endswith("\nb = 2\na = 1\nso 6")
    with pytest.raises(Unusable, match="no_fix"):
        lemma(attempts(WRONG, other), generator(), mode="fix")
    first = attempt("a = 9\nso 0", False, first_wrong=0)
    [fixed] = lemma(attempts(first, other), generator(), mode="fix")
    assert fixed.spoken[0].text.startswith("a = 9\n") and fixed.spoken[0].text.endswith("so 6")


def test_the_right_attempt_after_the_mistake_is_the_way_on() -> None:
    later = attempt("a = 1\nb = 2\nhence 6", True)
    [fixed] = lemma(attempts(RIGHT, WRONG, later), generator(), mode="fix")
    assert fixed.spoken[0].text.endswith("hence 6")


def test_steps_that_are_not_cut_from_the_text_are_joined() -> None:
    loose = attempt("A one. B three. So nine.", False, steps=("one", "THREE", "nine"), first_wrong=1)
    [restart] = lemma(attempts(loose, RIGHT), generator(), mode="restart")
    assert restart.spoken[0].segments[0].text == "one\nTHREE"


def test_phrases_are_drawn_evenly_and_the_same_by_the_same_seed() -> None:
    task = attempts(WRONG, RIGHT)

    def phrase(seed: int) -> str:
        return lemma(task, generator(seed), mode="restart")[0].spoken[0].segments[1].text.strip()

    drawn = [phrase(seed) for seed in range(600)]
    assert drawn == [phrase(seed) for seed in range(600)]
    counts = [drawn.count(each) for each in RESTART]
    chi_square = sum((count - 100) ** 2 / 100 for count in counts)
    assert sum(counts) == 600 and chi_square < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ((WRONG,), "no_right_attempt"),
        ((RIGHT,), "no_mistake"),
        ((attempt("a\nb", False), RIGHT), "no_mistake"),
        ((attempt("a\nb", False, first_wrong=7), RIGHT), "no_mistake"),
        # It comes out right after all, so it is no mistake to turn from.
        ((attempt("a = 2\nso 6", False, first_wrong=0), RIGHT), "no_mistake"),
    ],
)
def test_tasks_without_a_mistake_or_a_way_on_are_named(made: tuple[object, ...], reason: str) -> None:
    with pytest.raises(Unusable) as raised:
        lemma(attempts(*made), generator())  # type: ignore[arg-type]
    assert raised.value.reason == reason


def test_types_of_mistakes_by_how_often_they_are_made() -> None:
    tasks = [
        attempts(attempt("1", False, error="digit"), attempt("2", False, error="operator")),
        attempts(attempt("3", False, error="digit"), attempt("4", True, error="digit"), attempt("5", False)),
    ]
    assert error_types(tasks) == {"digit": 2 / 3, "operator": 1 / 3}
    assert error_types([]) == {}


# -- RISE ---------------------------------------------------------------------------------------

TASK = attempts(
    attempt("3", False), attempt("??", None), attempt("3", False), attempt("4", True), attempt("5", False)
)
NO = "The answer is incorrect. Please try again. Here's the question: Q?"


def test_only_the_last_answer_is_learnt_and_weighs_by_its_reward(renderer: Renderer) -> None:
    lessons = rise(TASK, keep="all")
    said = [[m.text for m in lesson.messages] for lesson in lessons]
    assert said == [["Q?", "3"], ["Q?", "3", NO, "??"], ["Q?", "3", NO, "??", NO, "4"]]
    assert [lesson.weight for lesson in lessons] == pytest.approx([1.0, math.exp(-2.5), math.exp(2.5)])
    assert [math.exp(1 / 0.4), math.exp(-1 / 0.4)] == pytest.approx([12.18, 0.082], rel=1e-2)
    [text] = written(lessons[1:2], renderer)
    assert text == (
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
        f"<|im_start|>user\n{NO}<|im_end|>\n"
        "<|im_start|>assistant\n«??<|im_end|>»0.333333"
    )


def test_an_answer_counts_by_its_weight_whatever_its_length(renderer: Renderer) -> None:
    from corrigible.align.rendering import token_example

    for lesson in rise(attempts(attempt("three", False), attempt("four it is", True)), keep="all"):
        assert sum(token_example(lesson, renderer).token_weights) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("keep", "learnt"),
    [("all", ["3", "??", "4"]), ("better", ["4"]), ("best", ["4"]), ("success", ["4"])],
)
def test_filters(keep: str, learnt: list[str]) -> None:
    assert [each.spoken[0].said for each in rise(TASK, keep=keep)] == learnt  # type: ignore[arg-type]


def test_filters_where_nothing_is_right() -> None:
    task = attempts(attempt("??", None), attempt("3", False), attempt("5", False))
    assert [each.spoken[0].said for each in rise(task, keep="best")] == ["3", "5"]
    # A wrong answer is better than one that nobody can read.
    assert [each.spoken[0].said for each in rise(task, keep="better")] == ["3"]
    with pytest.raises(Unusable, match="nothing_kept: none of 3"):
        rise(task, keep="success")
    with pytest.raises(Unusable, match="nothing_kept"):
        rise(attempts(attempt("3", False), attempt("5", False)), keep="better")


def test_a_first_answer_that_is_right_is_learnt_and_ends_the_conversation() -> None:
    [only] = rise(attempts(attempt("4", True), attempt("3", False)), keep="better")
    assert [m.text for m in only.messages] == ["Q?", "4"]


def test_the_latest_answers_stay_in_sight_as_in_use() -> None:
    task = attempts(*(attempt(str(n), False) for n in range(4)), attempt("9", True))
    [last] = rise(task, keep="success", serving=rise_serving(context_turns=2))
    assert [m.text for m in last.messages] == ["Q?", "2", NO, "3", NO, "9"]
    [whole] = rise(task, keep="success", serving=rise_serving(context_turns=0))
    assert len(whole.messages) == 10


def test_what_the_records_say_between_answers_is_not_shown() -> None:
    """In use nobody says what was wrong, so in training nobody does."""
    task = attempts(attempt("3", False, feedback="Add, don't subtract."), attempt("4", True))
    [lesson] = rise(task)
    assert not any("subtract" in m.text for m in lesson.messages)


def test_a_verifier_says_what_is_right() -> None:
    task = checked(TASK, lambda text: 1 if text == "5" else 0 if text.isdigit() else -1)
    assert [each.right for each in task.attempts] == [False, None, False, False, True]
