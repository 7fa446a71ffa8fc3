"""Solved neighbours before a question."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from feedback_texts import demonstrated, marked, user

from corrigible.align import Unusable
from corrigible.align.rendering import Bank, token_example, with_demonstrations, within_budget
from corrigible.align.retrieval import encode_words
from corrigible.errors import BadInputError
from corrigible.models import Renderer
from corrigible.records import Message
from corrigible.store.signals import Demonstrated

BANK = [
    demonstrated("red apple price", "1"),
    demonstrated("red apple colour", "2"),
    demonstrated("green pear price", "3"),
    demonstrated("boat", "4"),
    demonstrated("red apple price", "5"),
]


def texts(found: list[Demonstrated]) -> list[str]:
    return [each.response[0].text for each in found]


def test_neighbours_are_near_and_never_the_question_itself() -> None:
    found = Bank.of(BANK, encode_words).neighbours(2)
    assert texts(found[0]) == ["2", "3"]
    for one, near in zip(BANK, found, strict=True):
        assert all(each.prompt != one.prompt for each in near)
    bank = Bank.of(BANK, encode_words)
    assert texts(bank.near(user("a green pear"), 1)) == ["3"]


def test_a_question_in_nearly_the_same_words_is_a_duplicate() -> None:
    words = " ".join(f"w{n}" for n in range(40))
    bank = [demonstrated(words, "1"), demonstrated(f"{words} w0", "2"), demonstrated("w1 other", "3")]
    assert texts(Bank.of(bank, encode_words).neighbours(2)[0]) == ["3"]
    loose = Bank.of(bank, encode_words, duplicates_above=1.0).neighbours(2)
    assert texts(loose[0]) == ["2", "3"]


def test_the_nearest_stands_next_to_the_question_and_only_the_answer_is_learnt(renderer: Renderer) -> None:
    system = Message(role="system", content="s")
    one = replace(demonstrated("c", "3"), prompt=(system, *user("c")))
    near = replace(demonstrated("b", "2"), prompt=(system, *user("b")))
    lesson = with_demonstrations(one, [near, demonstrated("a", "1")])
    assert marked(token_example(lesson, renderer), renderer) == (
        "<|im_start|>system\ns<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n«3<|im_end|>»"
    )


def test_the_order_may_be_shuffled() -> None:
    near = [demonstrated(letter, letter) for letter in "abcd"]
    orders = {
        tuple(m.text for m in with_demonstrations(demonstrated(), near, np.random.default_rng(s)).messages)
        for s in range(40)
    }
    assert len(orders) > 10 and all(set(order[0:8:2]) == set("abcd") for order in orders)


def test_what_would_give_the_answer_away_or_is_not_there_is_named() -> None:
    with pytest.raises(BadInputError, match="self_retrieval"):
        with_demonstrations(demonstrated(), [demonstrated()])
    with pytest.raises(Unusable, match="no_neighbours"):
        with_demonstrations(demonstrated(), [])


def test_the_farthest_are_left_out_first_when_room_is_short(renderer: Renderer) -> None:
    near = [demonstrated(letter * 20, letter) for letter in "abc"]
    question = (*user("q" * 10), Message(role="assistant", content="answer"))
    sizes = {}
    for budget in range(30, 320, 10):
        kept = within_budget(near, question, renderer, budget)
        assert kept == near[: len(kept)]
        if kept:
            lesson = with_demonstrations(demonstrated("q" * 10, "answer"), kept)
            assert len(token_example(lesson, renderer, max_length=budget).rows[0]) <= budget
            assert token_example(lesson, renderer, max_length=budget).prompt_tokens_cut == 0
        sizes[budget] = len(kept)
    assert sorted(set(sizes.values())) == [0, 1, 2, 3] and list(sizes.values()) == sorted(sizes.values())
