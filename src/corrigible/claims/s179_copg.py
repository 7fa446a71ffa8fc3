"""S179 CoPG: contrasts of regularised rewards find the optimum from anybody's samples."""

from __future__ import annotations

import torch
from torch import Tensor

from corrigible.align.contrast import ContrastRows, contrast_loss, preset
from corrigible.claims.fixtures.tabular import generator, minimise
from corrigible.claims.framework import Effect, Outcome, Values, claim

ARMS = 5
BETA = 0.5
RAW = ("no baseline", "E_pi[R]", "E_mu[R]")
REGULARISED = ("E_pi[R - beta h]", "E_mu[R - beta h]")
STEPS, BATCH, RATE = 300, 16, 0.3


def copg(reference: Tensor, rewards: Tensor, behaviour: Tensor) -> Tensor:
    """Log-probabilities that minimise CoPG's loss, in expectation over pairs of ``behaviour``'s draws."""
    first, second = torch.triu_indices(ARMS, ARMS, offset=1)
    arms = torch.stack([first, second], dim=1).reshape(-1)
    weight = (behaviour[first] * behaviour[second]).repeat_interleave(2)

    def loss(logits: Tensor) -> Tensor:
        return _pairs_loss(logits, reference, rewards, arms, weight)

    return torch.log_softmax(minimise(loss, reference), dim=0)


def _pairs_loss(
    logits: Tensor, reference: Tensor, rewards: Tensor, arms: Tensor, weight: Tensor | None = None
) -> Tensor:
    rows = ContrastRows(
        logp=torch.log_softmax(logits, dim=0)[arms][:, None],
        mask=torch.ones(len(arms), 1, dtype=torch.bool),
        group=torch.arange(len(arms) // 2).repeat_interleave(2),
        ref_logp=reference[arms][:, None],
        score=rewards[arms],
        weight=weight,
    )
    return contrast_loss(rows, preset("copg", beta=BETA)).loss


def policy_gradient(
    reference: Tensor, rewards: Tensor, behaviour: Tensor | None, baseline: str, *, steps: int = 20_000
) -> Tensor:
    """Where plain policy gradient on ``behaviour``'s draws (None: its own) comes to rest; log-probabilities.

    Exact expectations of ``(R - beta h - b) grad log pi`` with no importance weights, small steps.
    """
    logits = reference.clone()
    for _ in range(steps):
        log_policy = torch.log_softmax(logits, dim=0)
        policy = log_policy.exp()
        mu = policy if behaviour is None else behaviour
        worth = rewards - BETA * (log_policy - reference)
        b = {
            "no baseline": worth.new_zeros(()),
            "E_pi[R]": policy @ rewards,
            "E_mu[R]": mu @ rewards,
            "E_pi[R - beta h]": policy @ worth,
            "E_mu[R - beta h]": mu @ worth,
        }[baseline]
        pull = mu * (worth - b)
        step = pull - policy * pull.sum()
        logits = logits + 0.3 * step
        if float(step.abs().max()) < 1e-12:
            break
    return torch.log_softmax(logits, dim=0)


def sampled(reference: Tensor, rewards: Tensor, behaviour: Tensor, seed: int, *, weights: bool) -> Tensor:
    """The same from 16 draws a step: CoPG on pairs of them, or policy gradient with importance weights."""
    random = generator(seed, 32)
    logits = reference.clone()
    for i in range(STEPS):
        arms = torch.multinomial(behaviour, BATCH, replacement=True, generator=random)
        logits = logits.detach().requires_grad_()
        if weights:
            log_policy = torch.log_softmax(logits, dim=0)
            with torch.no_grad():
                worth = (rewards - BETA * (log_policy - reference))[arms]
                ratio = log_policy.exp()[arms] / behaviour[arms]
            loss = -(ratio * worth * log_policy[arms]).mean()
        else:
            loss = _pairs_loss(logits, reference, rewards, arms)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = logits - RATE * (1 - i / STEPS) * gradient
    return torch.log_softmax(logits.detach(), dim=0)


def _worst(values: Values, names: tuple[str, ...]) -> float:
    return max(values[name] for name in names)


@claim(
    "S179",
    title="CoPG finds the optimum off-policy where raw-reward baselines do not",
    paper="Flet-Berliac et al. 2024, Contrastive Policy Gradient (arXiv:2406.19185), section 5.1",
    hypothesis="From a fixed and skewed behaviour policy, CoPG ends within 0.001 nats of the optimum, and "
    "policy gradient without importance weights over 0.01 nats away with any baseline of the raw reward.",
    figure="On a 3-arm bandit, CoPG finds the optimum from two behaviour policies, policy gradient only "
    "on-policy, or with importance weights at the price of variance (figure 1).",
    setting="Five arms with random rewards and reference, beta 0.5. The optimum pi_ref exp(R / beta) / Z is "
    "known, and expectations are exact sums but for the arms that are called sampled.",
    baselines=[
        "policy gradient with no baseline, E[R] under the policy or the behaviour",
        "importance weights",
    ],
    effect=Effect(
        "KL to the optimum of the best raw-reward baseline, skewed behaviour",
        of=lambda v: min(v[f"skewed behaviour/{name}"] for name in RAW),
        above=0.01,
        unit="nats",
    ),
    also=[
        Effect(
            "minus CoPG's larger KL to the optimum of two behaviours",
            of=lambda v: -_worst(v, ("skewed behaviour/CoPG", "uniform behaviour/CoPG")),
            above=-1e-3,
            unit="nats",
        ),
        Effect(
            "minus the larger KL with a baseline of the regularised reward",
            of=lambda v: -_worst(v, tuple(f"skewed behaviour/{name}" for name in REGULARISED)),
            above=-1e-3,
            unit="nats",
        ),
    ],
    controls=[
        Effect(
            "KL of no baseline when draws are the policy's own",
            of=lambda v: v["on-policy/no baseline"],
            above=0.01,
            unit="nats",
        )
    ],
    seeds=range(20),
    budget=60,
    fast=True,
)
def s179(seed: int) -> Outcome:
    """KL(learnt || optimum) of every estimator on random bandits, from a uniform and from a skewed behaviour.

    The skewed behaviour draws the better arms least, down to a seventh as often as the worst. On-policy the
    baseline does not matter in expectation, so there the effect must go. What a pair of CoPG subtracts is
    another draw's *regularised* reward: policy gradient with the mean of that as its baseline finds the
    optimum too.

    With exact expectations importance weights find the optimum as well; the paper's objection to them is
    variance. The sampled arms show it at 16 draws and 300 steps of one size, and are not judged: with five
    arms no weight is large.
    """
    random = generator(seed, 31)
    rewards = torch.randn(ARMS, generator=random, dtype=torch.float64)
    reference = torch.log_softmax(0.5 * torch.randn(ARMS, generator=random, dtype=torch.float64), dim=0)
    best = torch.log_softmax(reference + rewards / BETA, dim=0)
    rank = rewards.argsort(descending=True).argsort().double()  # 0 for the best arm
    behaviours = {
        "uniform": torch.full((ARMS,), 1.0 / ARMS, dtype=torch.float64),
        "skewed": torch.softmax(rank * 0.5, dim=0),
    }

    def kl(policy: Tensor) -> float:
        return float((policy.exp() * (policy - best)).sum())

    values = {}
    for name, behaviour in behaviours.items():
        values[f"{name} behaviour/CoPG"] = kl(copg(reference, rewards, behaviour))
        for baseline in (*RAW, *REGULARISED):
            found = policy_gradient(reference, rewards, behaviour, baseline)
            values[f"{name} behaviour/{baseline}"] = kl(found)
    values["on-policy/no baseline"] = kl(policy_gradient(reference, rewards, None, "no baseline"))
    for name, weights in (("CoPG", False), ("importance weights", True)):
        learnt = sampled(reference, rewards, behaviours["skewed"], seed, weights=weights)
        values[f"sampled, skewed behaviour/{name}"] = kl(learnt)
    return Outcome(values)
