"""Imitation learning from language feedback: the target, and who chooses it."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from feedback_texts import critiqued, user, written

from corrigible.align import Unusable
from corrigible.align.rendering import (
    AtRandom,
    Similarity,
    Verified,
    YesNo,
    check_judge,
    refine,
    refinement,
    refinement_prompt,
)
from corrigible.align.rendering.refinement import WORDINGS
from corrigible.align.retrieval import encode_words
from corrigible.errors import BadInputError
from corrigible.models import Renderer, load_policy
from corrigible.records import Message


def test_the_target_is_the_refinement_without_draft_and_critique(renderer: Renderer) -> None:
    assert written([refinement(critiqued(refined="yes"))], renderer) == [
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»"
    ]


def test_critiques_that_nobody_acted_on_are_named() -> None:
    with pytest.raises(Unusable, match="no_refinement") as raised:
        refinement(critiqued())
    assert "refinement_prompt" in raised.value.advice
    with pytest.raises(Unusable, match="unchanged"):
        refinement(critiqued(refined="no"))


def test_refinements_are_asked_for_with_everything_that_is_known() -> None:
    system = Message(role="system", content="Be brief.")
    record = critiqued("no {critique}", "Say {prompt}.", prompt=(system, *user("Why {draft}?")))
    first, asked = refinement_prompt(record)
    assert first == system
    # Braces of the texts stay as they are.
    assert [text in asked.text for text in ("Why {draft}?", "no {critique}", "Say {prompt}.")] == [True] * 3
    with pytest.raises(Unusable, match="no_critique"):
        refinement_prompt(critiqued(critique=" "))
    with pytest.raises(Unusable, match="no_prompt"):
        refinement_prompt(critiqued(prompt=()))


def test_yes_over_no_is_the_mean_probability_of_the_wordings() -> None:
    """Against the plain model: one row at a time, softmax over everything, renormalised over the two."""
    policy = load_policy("tiny-random", dtype="float32", device="cpu")
    ask = YesNo(policy, answers=("Y", "N"), wordings=WORDINGS[:3], token_budget=2000)
    record, candidates = critiqued(), ["yes", "no, and again no"]
    yes, no = ask.answer_ids()
    expected = []
    for candidate in candidates:
        shares = []
        for wording in ask.wordings:
            text = (
                f"Question:\nQ?\n\nOld answer:\nno\n\nFeedback:\nSay yes.\n\nNew answer:\n{candidate}\n\n"
                f"{wording} Answer yes or no."
            )
            ids = policy.renderer.prompt(list(user(text))).ids
            with torch.no_grad():
                p = policy.model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            shares.append(float(p[yes] / (p[yes] + p[no])))
        expected.append(sum(shares) / len(shares))
    found = ask(record, candidates)
    assert found.probabilities == pytest.approx(expected, rel=1e-4)
    assert found.index == int(np.argmax(expected)) and found.by == "yes-no"
    assert not math.isclose(*expected, rel_tol=1e-3)  # the two differ, or nothing was compared


def test_answers_of_several_tokens_are_refused() -> None:
    policy = load_policy("tiny-random", dtype="float32", device="cpu")
    with pytest.raises(BadInputError, match="answer_not_one_token: 'Yes' is 3 tokens"):
        YesNo(policy)
    with pytest.raises(BadInputError, match="the same token"):
        YesNo(policy, answers=("Y", "Y"))
    with pytest.raises(BadInputError, match="needs a question"):
        YesNo(policy, wordings=(), answers=("Y", "N"))


def test_similarity_takes_the_candidate_nearest_to_the_critique() -> None:
    record = critiqued(critique="mention the red car")
    found = Similarity(encode_words)(record, ["a blue bus", "the red car is here", "mention nothing"])
    assert found.index == 1 and all(0.0 <= p <= 1.0 for p in found.probabilities)


def test_at_random_all_are_alike() -> None:
    select = AtRandom(np.random.default_rng(0))
    drawn = Counter(select(critiqued(), ["a", "b", "c"]).index for _ in range(600))
    assert sum((count - 200) ** 2 / 200 for count in drawn.values()) < 13.8  # 2 degrees, p = 0.001
    assert select(critiqued(), ["a", "b"]).probabilities == (0.5, 0.5)


def test_a_verifier_decides_and_the_first_of_equals_is_taken() -> None:
    select = Verified(lambda record, text: float("yes" in text))
    record, selection = refine(critiqued(), ["no", "yes", "yes indeed"], select)
    assert selection.index == 1 and selection.probabilities == (0.0, 1.0, 1.0)
    assert record.refined[0].text == "yes" and record.critique == "Say yes."
    with pytest.raises(BadInputError, match="no probabilities"):
        Verified(lambda record, text: math.nan)(critiqued(), ["a"])


def test_candidates_must_be_there_and_say_something() -> None:
    for select in (AtRandom(np.random.default_rng(0)), Similarity(encode_words)):
        for candidates in ([], ["a", " "]):
            with pytest.raises(BadInputError, match="There must be candidates"):
                refine(critiqued(), candidates, select)


def test_what_chose_the_data_may_not_judge_the_policy() -> None:
    _, selection = refine(critiqued(), ["yes"], Similarity(encode_words))
    with pytest.raises(BadInputError, match="judge_is_selector"):
        check_judge(selection, "similarity")
    check_judge(selection, "win rate")
