"""Chain of hindsight: four texts of a comparison, both answers learnt, markers not."""

from __future__ import annotations

import pytest
from feedback_texts import labelled, pair, written

from corrigible.align import Unusable
from corrigible.align.rendering import hindsight, hindsight_of_one, hindsight_serving
from corrigible.align.rendering.hindsight import PHRASINGS
from corrigible.models import Renderer

ASKED = "<|im_start|>user\nQ?<|im_end|>\n"
GOOD = "<|im_start|>assistant\nA helpful answer:\n«yes<|im_end|>»"
BAD = "<|im_start|>assistant\nAn unhelpful answer:\n«no<|im_end|>»"


def test_the_four_texts_of_a_comparison(renderer: Renderer) -> None:
    assert written(hindsight(pair()), renderer) == [
        f"{ASKED}{GOOD}",
        f"{ASKED}{BAD}",
        f"{ASKED}{BAD}\n{GOOD}",
        f"{ASKED}{GOOD}\n{BAD}",
    ]


def test_with_markers_said_by_the_user_the_turns_alternate(renderer: Renderer) -> None:
    [chain] = written(hindsight(pair(), forms=["np"], placement="user"), renderer)
    assert chain == (
        "<|im_start|>user\nQ?\n\nAn unhelpful answer:<|im_end|>\n<|im_start|>assistant\n«no<|im_end|>»\n"
        "<|im_start|>user\nA helpful answer:<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»"
    )


def test_another_phrasing_changes_the_markers_alone(renderer: Renderer) -> None:
    assert len({marker for both in PHRASINGS for marker in both}) == 2 * len(PHRASINGS)
    [text] = written(hindsight(pair(), forms=["n"], phrasing=1), renderer)
    assert text == f"{ASKED}{BAD}".replace("An unhelpful answer:", "A bad answer:")


def test_a_label_below_one_half_turns_the_pair_round_and_doubt_weighs_less(renderer: Renderer) -> None:
    plain, doubted = hindsight(pair()), hindsight(pair("no", "yes", p_chosen=0.25, weight=3.0))
    assert written(plain, renderer) == written(doubted, renderer)
    assert {lesson.weight for lesson in doubted} == {1.5}
    assert {lesson.derived_from for lesson in doubted} == {("f1",)}


def test_an_answer_judged_alone(renderer: Renderer) -> None:
    assert written(hindsight_of_one(labelled()), renderer) == [f"{ASKED}{GOOD}"]
    assert written(hindsight_of_one(labelled("no", False)), renderer) == [f"{ASKED}{BAD}"]


def test_serving_asks_for_the_good_answer_or_for_the_bad_one() -> None:
    assert hindsight_serving().assistant_prefix == "A helpful answer:\n"
    assert hindsight_serving(good=False).assistant_prefix == "An unhelpful answer:\n"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"p_chosen": 0.5}, "tie"),
        ({"p_chosen": float("nan")}, "bad_label"),
        ({"rejected": "yes"}, "equal_sides"),
        ({"rejected": " "}, "empty_completion"),
    ],
)
def test_pairs_that_teach_nothing_are_named(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Unusable) as raised:
        hindsight(pair(**changes))  # type: ignore[arg-type]
    assert raised.value.reason == reason
