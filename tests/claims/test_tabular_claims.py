"""The claims on tables: their estimators are what their papers say, and they can come out wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from corrigible.claims import find_claim, run_claim, run_seed, s101_brain, s179_copg, s188_dpo
from corrigible.claims.fixtures.tabular import generator


@pytest.mark.parametrize("id", ["S101", "S173", "S179", "S188"])
def test_a_seed_is_deterministic(id: str) -> None:
    claim = find_claim(id)
    first, second = run_seed(claim, 1000), run_seed(claim, 1000)
    assert first.failure == "" and first.outcome == second.outcome
    assert run_seed(claim, 1001).outcome != first.outcome


def test_a_wrong_sign_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment has the power to fail: turn every comparison round and the claim does not hold."""
    right = s188_dpo.fit

    def swapped(world: Any, choices: Any, spec: Any, **rest: Any) -> Any:
        turned = dataclasses.replace(choices, chosen=choices.rejected, rejected=choices.chosen)
        return right(world, turned, spec, **rest)

    monkeypatch.setattr(s188_dpo, "fit", swapped)
    assert run_claim(find_claim("S188"), range(1000, 1005)).verdict == "not supported"


def test_free_dpo_closes_the_distance_to_the_optimum() -> None:
    assert s188_dpo.share_of_distance_closed(1000, votes_are_coins=False) > 0.98
    assert abs(s188_dpo.share_of_distance_closed(1000, votes_are_coins=True)) < 0.2


def logits(*stream: int) -> torch.Tensor:
    random = generator(1000, *stream)
    return torch.log_softmax(torch.randn(s101_brain.OUTCOMES, generator=random, dtype=torch.float64), dim=0)


def test_brain_gradients_are_those_of_the_equation() -> None:
    """``-sum_i (alpha_i - beta_i) grad log pi(y_i)``, with both sides self-normalised, written out here."""
    policy, target, proposal = logits(1), logits(2), logits(3)
    arms = torch.multinomial(proposal.exp().expand(3, -1), 6, replacement=True, generator=generator(0))
    found = s101_brain.brain_gradients(policy, target, proposal, arms)
    for g in range(3):
        alpha = torch.softmax((target - proposal)[arms[g]], dim=0)
        beta = torch.softmax((policy - proposal)[arms[g]], dim=0)
        expected = torch.zeros_like(policy)
        for i in range(6):
            one_hot = torch.zeros_like(policy)
            one_hot[arms[g, i]] = 1.0
            expected -= (alpha[i] - beta[i]) * (one_hot - policy.exp())
        assert torch.allclose(found[g], expected, atol=1e-12)


def test_weighted_gradients_are_unbiased() -> None:
    """DPG's and GDC++'s are estimates of the gradient of KL(target || policy), ``policy - target``."""
    policy, target, proposal = logits(4), logits(5), logits(6)
    arms = torch.multinomial(proposal.exp().expand(4000, -1), 32, replacement=True, generator=generator(1))
    to_target, to_policy = (target - proposal)[arms].exp(), (policy - proposal)[arms].exp()
    for weights in (to_target, to_target - to_policy):
        found = s101_brain.weighted_gradients(policy, weights, arms)
        error = found.std(dim=0) / 4000**0.5
        assert float(((found.mean(dim=0) - (policy.exp() - target.exp())) / error).abs().max()) < 4.5


def test_copg_and_the_right_baseline_share_their_optimum() -> None:
    random = generator(1000, 7)
    rewards = torch.randn(5, generator=random, dtype=torch.float64)
    reference = torch.log_softmax(torch.randn(5, generator=random, dtype=torch.float64), dim=0)
    behaviour = torch.softmax(torch.randn(5, generator=random, dtype=torch.float64), dim=0)
    best = torch.log_softmax(reference + rewards / s179_copg.BETA, dim=0)
    assert torch.allclose(s179_copg.copg(reference, rewards, behaviour), best, atol=1e-5)
    right = s179_copg.policy_gradient(reference, rewards, behaviour, "E_mu[R - beta h]")
    assert torch.allclose(right, best, atol=1e-5)
    wrong = s179_copg.policy_gradient(reference, rewards, behaviour, "no baseline")
    assert not torch.allclose(wrong, best, atol=1e-2)
