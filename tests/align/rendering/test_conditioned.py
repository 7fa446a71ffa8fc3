"""Class-conditioned learning: the condition in every turn, the weight of the class."""

from __future__ import annotations

import pytest
from feedback_texts import demonstrated, says, user, written

from corrigible.align import Unusable
from corrigible.align.rendering import class_conditioned, class_serving, token_example
from corrigible.models import Renderer


def test_the_condition_stands_in_every_turn_and_only_the_answer_is_learnt(renderer: Renderer) -> None:
    talk = demonstrated(prompt="", response="three", quality="mixed", weight=2.0)
    lesson = class_conditioned(
        type(talk)(**{**vars(talk), "prompt": (*user("one"), *says("two"), *user("more"))})
    )
    assert written([lesson], renderer) == [
        "<|im_start|>user\nmixed user:\none<|im_end|>\n"
        "<|im_start|>assistant\nmixed assistant:\ntwo<|im_end|>\n"
        "<|im_start|>user\nmixed user:\nmore<|im_end|>\n"
        "<|im_start|>assistant\nmixed assistant:\n«three<|im_end|>»"
    ]
    assert lesson.weight == pytest.approx(0.2)


def test_the_best_class_weighs_one_and_is_served() -> None:
    assert class_conditioned(demonstrated(quality="expert")).weight == 1.0
    assert class_conditioned(demonstrated(quality="mixed"), best="mixed").weight == 1.0
    assert class_conditioned(demonstrated(quality="mixed"), other_weight=0.3).weight == 0.3
    assert class_serving("expert").every_turn


def test_answers_may_count_instead_of_tokens(renderer: Renderer) -> None:
    example = token_example(class_conditioned(demonstrated(quality="expert"), per_token=False), renderer)
    assert sum(example.token_weights) == pytest.approx(1.0) and len(example.token_weights) == 4


def test_a_demonstration_of_no_class_is_named() -> None:
    with pytest.raises(Unusable, match="no_class"):
        class_conditioned(demonstrated(quality=" "))
