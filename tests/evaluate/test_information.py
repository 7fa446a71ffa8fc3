"""Differential information against scalar loops, and the theorem that makes it worth knowing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from corrigible.errors import BadInputError, NumericsError
from corrigible.evaluate.information import (
    differential_information,
    entropy,
    margin_ordering,
    power_law,
    preference_probability,
    row_information,
    set_information,
    token_information,
)
from corrigible.models import load_policy
from corrigible.records import Message


def normalised(draw: random.Random, n: int) -> list[float]:
    odds = [math.exp(draw.gauss(0, 1.5)) for _ in range(n)]
    return [math.log(x / sum(odds)) for x in odds]


def test_differential_information_is_that_of_a_loop() -> None:
    draw = random.Random(0)
    for _ in range(200):
        n = draw.randint(1, 12)
        policy, reference = normalised(draw, n), normalised(draw, n)
        ratios = [math.exp(a) / math.exp(b) for a, b in zip(policy, reference, strict=True)]
        q = [ratio / sum(ratios) for ratio in ratios]
        found = differential_information(policy, reference)
        assert np.exp(found).tolist() == pytest.approx(q, rel=1e-10)
        assert entropy(found) == pytest.approx(-sum(p * math.log(p) for p in q), rel=1e-9, abs=1e-12)
        assert entropy(found) + 1e-12 >= 0.0 and entropy(found) <= math.log(n) + 1e-12


def test_no_difference_is_uniform_and_extreme_ratios_do_not_overflow() -> None:
    same = differential_information([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0])
    assert entropy(same) == pytest.approx(math.log(3))
    assert entropy(differential_information([-1.0, -5000.0], [-3000.0, -1.0])) == pytest.approx(0.0)
    assert entropy([0.0, -math.inf]) == 0.0


def test_sets_of_samples() -> None:
    one = set_information([0.3, 0.3, 0.3, 0.3])
    assert (one.entropy, one.support, one.effective) == (pytest.approx(math.log(4)), 4, pytest.approx(4.0))
    skewed = set_information([0.0, math.log(3.0)])  # 1/4 and 3/4
    assert skewed.entropy == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert skewed.effective == pytest.approx(1 / (0.0625 + 0.5625))
    with pytest.raises(BadInputError, match="one answer"):
        set_information([0.0])


def test_token_information_is_that_of_a_loop() -> None:
    draw = random.Random(1)
    policy = [[draw.gauss(0, 2) for _ in range(5)] for _ in range(4)]
    reference = [[draw.gauss(0, 2) for _ in range(5)] for _ in range(4)]
    found = token_information(policy, reference)
    for t in range(4):
        odds = [math.exp(a - b) for a, b in zip(policy[t], reference[t], strict=True)]
        q = [x / sum(odds) for x in odds]
        assert found[t] == pytest.approx(-sum(p * math.log(p) for p in q), rel=1e-12)
    shifted = token_information(np.array(policy) + 3.0, reference)  # logits and log-probs alike
    assert shifted == pytest.approx(found, rel=1e-9)
    with pytest.raises(BadInputError, match="vocabulary"):
        token_information(policy, reference[:2])
    with pytest.raises(NumericsError, match="logits_not_finite"):
        token_information([[0.0, math.nan]], [[0.0, 0.0]])


def test_a_line_through_the_power_law() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    exact = power_law(0.4 * x - 1.0, x)
    assert (exact.slope, exact.intercept) == (pytest.approx(0.4), pytest.approx(-1.0))
    assert exact.r2 == pytest.approx(1.0) and exact.n == 30
    noisy = power_law(0.4 * x - 1.0 + rng.normal(size=30), x)
    fit = np.polyfit(x, 0.4 * x - 1.0, 1)
    assert fit[0] == pytest.approx(0.4) and noisy.r2 < 0.6
    # against the normal equations written out
    y = 2.0 * x**2
    n, sx, sy, sxx, sxy = len(x), sum(x), sum(y), sum(x * x), sum(x * y)
    slope = (n * sxy - sx * sy) / (n * sxx - sx * sx)
    assert power_law(y, x).slope == pytest.approx(slope, rel=1e-10)
    with pytest.raises(BadInputError, match="says nothing"):
        power_law([1.0, 2.0], [0.0, 1.0])
    with pytest.raises(BadInputError, match="says nothing"):
        power_law([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    with pytest.raises(NumericsError, match=r"answers \[1\]"):
        power_law([1.0, math.nan, 3.0], [1.0, 2.0, 3.0])


def test_labels_drawn_from_the_optimal_rejected_distribution_follow_the_law() -> None:
    """Where chosen answers come from pi_ref and rejected ones from the optimal distribution, the chance of a
    label is that of Bradley and Terry with the reward beta log(pi* / pi_ref)."""
    from corrigible.align.candidates import optimal_rejected

    draw, beta = random.Random(3), 0.5
    reference, target = normalised(draw, 8), normalised(draw, 8)
    rejected = optimal_rejected(reference, target, beta)
    law = power_law(np.array(reference) - rejected, np.array(target) - np.array(reference))
    assert law.slope == pytest.approx(beta, rel=1e-9) and law.r2 == pytest.approx(1.0)
    log_q = differential_information(reference, rejected)
    chosen, other = [0, 3, 5], [1, 2, 7]
    found = preference_probability(chosen, other, log_q)
    for p, w, o in zip(found, chosen, other, strict=True):
        reward = beta * ((target[w] - reference[w]) - (target[o] - reference[o]))
        assert p == pytest.approx(1 / (1 + math.exp(-reward)), rel=1e-9)
        # and it is what Bayes' rule says of one answer of each source, whichever way round it is shown
        this_way = math.exp(reference[w] + rejected[o])
        other_way = math.exp(reference[o] + rejected[w])
        assert p == pytest.approx(this_way / (this_way + other_way), rel=1e-9)


def test_margins_in_order() -> None:
    assert margin_ordering([0, 0, 3, 0], [1, 1, 2, 0], [2, 1, 4, 5]) == 0.25
    with pytest.raises(BadInputError):
        margin_ordering([0.0], [1.0, 2.0], [2.0])


def test_the_token_proxy_on_a_policy() -> None:
    policy = load_policy("tiny-random", device="cpu")
    policy.add_lora(rank=2)
    prompt, answer = (
        (Message(role="user", content="Hi"),),
        (Message(role="assistant", content="Hello there"),),
    )
    row: Any = policy.renderer.pair(prompt, answer)
    logits = policy.model(input_ids=torch.tensor([row.ids])).logits
    vocabulary = logits.shape[-1]
    assert row_information(policy, [row]) == pytest.approx(math.log(vocabulary), rel=1e-9)  # it has not moved
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5)
    moved = row_information(policy, [row])
    assert moved < math.log(vocabulary)
    now = policy.model(input_ids=torch.tensor([row.ids])).logits[0].double().detach()
    then = logits[0].double().detach()
    by_hand = []
    for position in row.scored:
        q = torch.softmax(now[position - 1] - then[position - 1], dim=0)
        by_hand.append(-float((q * q.log()).sum()))
    assert moved == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-6)
    with pytest.raises(BadInputError, match="no rows"):
        row_information(policy, [])


@pytest.mark.parametrize(
    "call",
    [
        lambda: differential_information([], []),
        lambda: differential_information([0.0, -1.0], [0.0]),
        lambda: power_law([[1.0]], [[1.0]]),
    ],
)
def test_shapes_are_checked(call: Callable[[], Any]) -> None:
    with pytest.raises(BadInputError, match=r"\(n,\)"):
        call()


def test_an_answer_that_one_policy_cannot_give_is_named() -> None:
    with pytest.raises(NumericsError, match=r"answers \[1\]"):
        differential_information([0.0, -math.inf], [-1.0, -1.0])
