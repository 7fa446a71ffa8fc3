"""The claims on small models: declared as they must be, and functions of their seed alone."""

from __future__ import annotations

import importlib
import math
import random
from functools import partial
from typing import Any

import numpy as np
import pytest

from corrigible.align.retrieval import encode_words
from corrigible.claims import (
    find_claim,
    run_seed,
    s076_language_feedback,
    s135_journey_learning,
    s143_error_correction,
    s147_recursive_introspection,
    s155_class_conditioning,
)
from corrigible.claims.fixtures import chain_policy
from corrigible.claims.fixtures.critic import defects
from corrigible.claims.fixtures.digit_chain import ERROR_TYPES, check, problems
from corrigible.claims.fixtures.search_task import searches, solved
from corrigible.claims.fixtures.tiny_lm import first_model
from corrigible.claims.fixtures.vocabulary import EOS
from corrigible.claims.framework import Claim

IDS = ("S035", "S060", "S075", "S076", "S135", "S142", "S143", "S147", "S148", "S155", "S165")


@pytest.mark.parametrize("id", IDS)
def test_a_claim_declares_seeds_controls_and_a_budget(id: str) -> None:
    claim = find_claim(id)
    assert len(claim.seeds) >= 5 and max(claim.seeds) < 1000
    assert claim.controls and claim.baselines and claim.figure and claim.setting
    assert 0 < claim.budget <= 480 and claim.threads == 2


SMALL: dict[str, Any] = {
    "ANSWERS": 60,
    "DEMONSTRATIONS": 20,
    "DRAFTS": 20,
    "EDITS": 40,
    "FIRST": 2,
    "HELD_OUT": 6,
    "LONG": 12,
    "LOOKS": 2,
    "META_STEPS": 2,
    "PAIRS": 60,
    "RATES": (1e-3,),
    "REFINER_STEPS": 2,
    "ROLLED_OUT": 6,
    "SAMPLES": 4,
    "SHORT": 40,
    "STEPS": 2,
    "TOKENS": 24,
    "TRAINING": 40,
    "TUNING_STEPS": 2,
    "WORLDS": 2,
}
"""Sizes at which an experiment takes a second: it runs through, and means nothing."""


def _small(id: str, monkeypatch: pytest.MonkeyPatch) -> Claim:
    claim = find_claim(id)
    module = importlib.import_module(claim.module)
    for name, size in SMALL.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, size)
    if id in ("S143", "S147", "S155"):
        model = partial(chain_policy.first_model, steps=2)
        monkeypatch.setattr(module, "first_model", model)
    elif hasattr(module, "first_model"):
        monkeypatch.setattr(module, "first_model", partial(first_model, reviews=128))
    if id == "S147":
        # Nothing that an untrained model writes is right.
        monkeypatch.setattr(module, "_right", lambda problem, text: len(text) % 2 == 0)
    if id == "S148":
        monkeypatch.setattr(module, "_encode", lambda: encode_words)
    return claim


@pytest.mark.parametrize("id", IDS)
def test_an_experiment_runs_through_on_a_small_scale(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = _small(id, monkeypatch)
    run = run_seed(claim, 1000)
    assert run.failure == "" and run.outcome is not None
    for effect in (claim.effect, *claim.also, *claim.controls):
        assert math.isfinite(effect.number(run.outcome.values))


@pytest.mark.parametrize("id", ["S060", "S135", "S142"])
def test_a_seed_is_deterministic(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = _small(id, monkeypatch)
    monkeypatch.setattr(importlib.import_module(claim.module), "STEPS", 8)
    first, second = run_seed(claim, 1002), run_seed(claim, 1002)
    assert first.failure == "" and first.outcome == second.outcome
    assert run_seed(claim, 1003).outcome != first.outcome


def test_casual_writers_take_minus_for_plus_and_nothing_else() -> None:
    rng, wrong = random.Random(0), 0
    for one in problems(0, 400, links=2, distractors=0):
        verdict = check(one, s155_class_conditioning._careless(one, rng))
        wrong += not verdict.right
        if not verdict.right:
            minus = [d.operator for d in one.path].index("-")
            assert (verdict.error, verdict.first_wrong) == ("operator", minus)
    # Three problems in four have a minus, and a ninth of these change nothing.
    assert 0.35 < wrong / 400 < 0.6


def test_corrections_end_right_and_the_controls_phrases_follow_nothing_wrong() -> None:
    train = problems(1, 60, links=2, distractors=0)
    language = s143_error_correction.LANGUAGE
    by_question = {one.question: one for one in train}
    shares = dict.fromkeys(ERROR_TYPES, 0.25)
    mistaken = 0
    for row in s143_error_correction._corrections(train, shares, 0):
        one = by_question[language.decode(row.prompt)]
        text = language.decode(row.response)
        assert row.response[-1] == EOS and check(one, text).right
        mistaken += check(one, text).first_wrong is not None
    assert mistaken > 30
    for row in s143_error_correction._phrases_alone(train, 0):
        one = by_question[language.decode(row.prompt)]
        text = language.decode(row.response)
        for phrase in (*s143_error_correction.FIX, *s143_error_correction.RESTART):
            before, found, _ = text.partition(phrase)
            if found:
                assert one.solution.startswith(before)


def test_journeys_of_all_arms_end_in_the_problem_s_own_solution() -> None:

    rng = np.random.default_rng(0)
    first, second = searches(0, 2)
    for segments in (
        s135_journey_learning._journey(first, rng),
        s135_journey_learning._journey(first, rng, "none"),
        s135_journey_learning._lost(first, second, rng),
    ):
        assert solved(first, "".join(segment.text for segment in segments).replace("\n", ""))


def test_a_noisy_selector_is_right_as_often_as_it_says() -> None:

    record = s076_language_feedback._critiqued("review the hotel : staff", "it was not nice .")
    assert record.critique == "no negation and mention the staff"
    good, bad = "the staff was nice .", "it was nice ."
    assert not defects(record.group, good) and defects(record.group, bad)
    selector = s076_language_feedback._noisy(0.8, np.random.default_rng(0))
    chosen = sum(selector(record, [good, bad]).index == 0 for _ in range(2000)) / 2000
    # Told apart rightly 0.64, wrongly 0.04; otherwise a toss-up.
    assert chosen == pytest.approx(0.64 + 0.16, abs=0.03)


def test_majorities_and_turns_are_counted_by_hand() -> None:
    asked = problems(2, 2, links=1, distractors=0)
    right = [f"#{one.answer}" for one in asked]
    wrong = [f"#{(one.answer + 1) % 10}" for one in asked]
    majority = s147_recursive_introspection._majority
    assert majority(asked, [right, wrong, right]) == 1.0
    assert majority(asked, [wrong, wrong, right]) == 0.0
    assert majority(asked, [right, wrong]) == 1.0  # of equals the earliest
    assert majority(asked, [["", right[1]], ["", ""]]) == 0.5
