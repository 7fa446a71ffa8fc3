"""DPO finds the optimum of KL-constrained reward maximisation without ever seeing the reward.

Rafailov et al. 2023, "Direct Preference Optimization", eq. 4 and 7: with comparisons drawn from a
Bradley-Terry model of a reward r, minimising the DPO loss leads to
``pi*(y) = pi_ref(y) exp(r(y) / beta) / Z``. A bandit with six answers has that optimum in closed
form, so the claim is checked against the truth and not against another estimate.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from corrigible.align.losses import dpo_loss
from corrigible.claims.framework import Effect, claim

ANSWERS = 6
BETA = 0.5
VOTES_PER_PAIR = 2000


def optimal_policy(reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log-probabilities of ``pi_ref exp(r / beta) / Z``; all ``(answers,)``."""
    return torch.log_softmax(reference_logps + rewards / beta, dim=0)


def fit(reference_logps: Tensor, pairs: Tensor, p_first: Tensor, beta: float) -> Tensor:
    """The tabular policy that minimises the DPO loss, ``(answers,)`` log-probabilities.

    ``pairs`` is ``(n, 2)`` indices of answers, ``p_first`` ``(n,)`` the share of votes for the first.
    """
    logits = reference_logps.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        policy = torch.log_softmax(logits, dim=0)
        first, second = pairs[:, 0], pairs[:, 1]
        output = dpo_loss(
            policy[first],
            policy[second],
            reference_logps[first],
            reference_logps[second],
            beta=beta,
            p_chosen=p_first,
        )
        output.loss.backward()  # type: ignore[no-untyped-call]
        return output.loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return torch.log_softmax(logits.detach(), dim=0)


def _share_of_distance_closed(seed: int, *, votes_are_coins: bool) -> float:
    """``1 - KL(pi* || trained) / KL(pi* || reference)``: 1 is the optimum itself, 0 is no progress."""
    random = torch.Generator().manual_seed(seed)
    rewards = torch.randn(ANSWERS, generator=random, dtype=torch.float64)
    reference = torch.log_softmax(torch.randn(ANSWERS, generator=random, dtype=torch.float64), dim=0)
    pairs = torch.tensor(list(itertools.combinations(range(ANSWERS), 2)))
    p_true = torch.sigmoid(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])
    if votes_are_coins:
        p_true = torch.full_like(p_true, 0.5)
    votes = torch.rand(len(pairs), VOTES_PER_PAIR, generator=random, dtype=torch.float64) < p_true[:, None]
    trained = fit(reference, pairs, votes.double().mean(dim=1), BETA)
    best = optimal_policy(reference, rewards, BETA)
    distance = (best.exp() * (best - trained)).sum() / (best.exp() * (best - reference)).sum()
    return 1.0 - float(distance)


@claim(
    "S188",
    title="DPO reaches the optimum it never sees",
    paper="Rafailov et al. 2023, Direct Preference Optimization, eq. 4 and 7 (arXiv:2305.18290)",
    hypothesis="From votes alone, DPO closes more than 90 % of the KL distance between the reference and "
    "the optimum of the KL-constrained reward.",
    effect=Effect("share of the distance closed", of=lambda v: v["votes"], above=0.9),
    controls=[Effect("the same when votes are coin flips", of=lambda v: v["coins"], above=0.9)],
    seeds=range(8),
    budget=30,
    fast=True,
    aliases=["dpo-optimum"],
)
def s188(seed: int) -> dict[str, float]:
    """Share of the KL distance closed with votes that follow the reward; the control's are coin flips."""
    return {
        "votes": _share_of_distance_closed(seed, votes_are_coins=False),
        "coins": _share_of_distance_closed(seed, votes_are_coins=True),
    }
