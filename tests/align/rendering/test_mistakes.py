"""Mistake tuning: a prefix for right and for wrong rationales, and which mistakes are none."""

from __future__ import annotations

import pytest
from feedback_texts import attempt, attempts, written

from corrigible.align import Unusable
from corrigible.align.rendering import final_answer, mistakes
from corrigible.models import Renderer

ASKED = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"


def test_every_checked_attempt_after_its_prefix(renderer: Renderer) -> None:
    task = attempts(attempt("It is 3.", False), attempt("It is 4.", True), attempt("Hm.", None))
    assert written(mistakes(task), renderer) == [
        f"{ASKED}[INCORRECT RATIONALE]\n«It is 3.<|im_end|>»",
        f"{ASKED}[CORRECT RATIONALE]\n«It is 4.<|im_end|>»",
    ]


def test_the_paper_learns_question_and_prefix_as_well(renderer: Renderer) -> None:
    [text] = written(mistakes(attempts(attempt("4", True)), mask_prompt=False), renderer)
    assert text == (
        "<|im_start|>user\n«Q?»<|im_end|>\n<|im_start|>assistant\n«[CORRECT RATIONALE]\n4<|im_end|>»"
    )


@pytest.mark.parametrize("wrong", ["4", "By luck 2 + 2 = 4.", "so #### 4"])
def test_a_wrong_rationale_that_reaches_the_right_answer_is_left_out(wrong: str) -> None:
    lessons = mistakes(attempts(attempt(wrong, False), attempt("4", True), attempt("It is 5.", False)))
    assert [lesson.spoken[0].said for lesson in lessons] == ["4", "It is 5."]


def test_attempts_that_nobody_checked_are_named() -> None:
    with pytest.raises(Unusable, match="unchecked"):
        mistakes(attempts(attempt("3", None)))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First 3. Wait, that is wrong: it is 4.", "4"),
        ("#### 5 or rather #### 7", "7"),
        (r"so \boxed{3}, no: \boxed{12}.", "12"),
        ("about 1,200.50 euros", "1200.5"),
        ("-3", "-3"),
        ("3/4 of it", "3/4"),
        (r"hence \boxed{x+1}", "x+1"),
        ("no number", None),
        ("10", "10"),
        ("7.00", "7"),
    ],
)
def test_the_final_answer_is_the_last_one(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer
