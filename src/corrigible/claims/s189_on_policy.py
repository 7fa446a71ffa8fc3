"""S189: fresh samples and negative gradients help where the reward peaks off the reference's own region."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from corrigible.align.contrast import contrast_loss, preset
from corrigible.claims.fixtures.tabular import CatBandit, cat_bandit, generator, group_rows, sample
from corrigible.claims.framework import Effect, Outcome, Values, claim

GROUPS, K = 20, 10
STEPS, ROUNDS = 600, 60
RATE = 0.01
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of log-probabilities of policy and reference, of sampled arms ``(groups, k)`` and of their scores."""


def _pairs(name: str, **settings: float) -> Loss:
    """The best sample of each group against every worse one; equal ones make no pair."""
    spec = preset(name, **settings)

    def loss(policy: Tensor, reference: Tensor, arms: Tensor, scores: Tensor) -> Tensor:
        best = scores.argmax(dim=1, keepdim=True)
        worse = scores < scores.gather(1, best)
        both = torch.stack([arms.gather(1, best).expand_as(arms)[worse], arms[worse]], dim=1)
        side = torch.tensor([1, -1], dtype=torch.int8).expand(len(both), 2)
        return contrast_loss(group_rows(policy, reference, both, label=side), spec).loss

    return loss


def _best_of_n(policy: Tensor, reference: Tensor, arms: Tensor, scores: Tensor) -> Tensor:
    best = arms.gather(1, scores.argmax(dim=1, keepdim=True))
    return contrast_loss(group_rows(policy, reference, best), preset("sft")).loss


def _reward_weighted(policy: Tensor, reference: Tensor, arms: Tensor, scores: Tensor) -> Tensor:
    spec = preset("rwr", beta=0.1, self_normalised=True)
    return contrast_loss(group_rows(policy, reference, arms, score=scores), spec).loss


def _reinforce(policy: Tensor, reference: Tensor, arms: Tensor, scores: Tensor) -> Tensor:
    return -((scores - scores.mean()) * policy[arms]).mean()


METHODS: dict[str, Loss] = {
    "best of n": _best_of_n,
    "reward-weighted": _reward_weighted,
    "IPO": _pairs("ipo", tau=0.05),
    "DPO": _pairs("dpo", beta=0.1),
    "REINFORCE": _reinforce,
}
NEGATIVE, LIKELIHOOD = ("IPO", "DPO"), ("best of n", "reward-weighted")


def train(bandit: CatBandit, loss: Loss, seed: int, *, fresh: bool, judged: Tensor) -> float:
    """True reward after 600 Adam steps on 200 samples of the reference, or on 200 fresh ones every ten steps.

    ``judged``: the score ``(arms,)`` that the method sees.
    """
    random = generator(seed, 51)
    logits = bandit.reference.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=RATE)
    arms = sample(bandit.reference, GROUPS * K, random).reshape(GROUPS, K)
    for step in range(STEPS):
        policy = torch.log_softmax(logits, dim=0)
        if fresh and step and step % (STEPS // ROUNDS) == 0:
            arms = sample(policy, GROUPS * K, random).reshape(GROUPS, K)
        if bool((judged[arms] == judged[arms[:, :1]]).all()):
            continue  # nobody is better than anybody: there is nothing to learn from these samples
        optimiser.zero_grad()
        loss(policy, bandit.reference, arms, judged[arms]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return bandit.reward(torch.log_softmax(logits.detach(), dim=0))


def _mean(values: Values, panel: str, names: tuple[str, ...]) -> float:
    return sum(values[f"{panel}/{name}"] for name in names) / len(names)


def _negative_gradients_help(panel: str) -> Callable[[Values], float]:
    return lambda values: _mean(values, panel, NEGATIVE) - _mean(values, panel, LIKELIHOOD)


def _fresh_samples_help(values: Values) -> float:
    names = ("best of n", "DPO")
    return _mean(values, "peak 70, fresh samples", names) - _mean(values, "peak 70, fixed samples", names)


@claim(
    "S189",
    title="On-policy samples and negative gradients find a peak that the reference hides",
    paper="Tajwar et al. 2024, Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data "
    "(arXiv:2404.14367), section 4",
    hypothesis="With a reward peak where the reference is thin, methods that push bad samples down (IPO, "
    "DPO) gain 0.03 reward or more over those that only raise good ones (best of n, reward-weighted) on the "
    "same fixed samples, and fresh samples gain 0.3 over fixed ones; with a peak where the reference is "
    "thick, negative gradients change reward by less than 0.1.",
    figure="In bandits and in language models with synthetic length rewards, on-policy sampling and "
    "negative gradients win clearly when the peak lies in a low-probability region, and offline likelihood "
    "methods are enough when it does not (figures 3 to 8).",
    setting="A bandit of 100 arms, a heavy-tailed reference around arm 20 and a reward bump of width 10, "
    "judged to two decimals: rewards and probabilities are exact. All methods take 600 Adam steps; fresh "
    "sampling uses 60 times the samples.",
    baselines=["best of n", "reward-weighted regression", "REINFORCE"],
    effect=Effect(
        "reward of IPO and DPO minus best of n and reward-weighted, fixed samples, peak at 70",
        of=_negative_gradients_help("peak 70, fixed samples"),
        above=0.03,
    ),
    also=[
        Effect("reward of fresh minus fixed samples, peak at 70", of=_fresh_samples_help, above=0.3),
        Effect(
            "the negative-gradient effect with the peak at 20",
            of=_negative_gradients_help("peak 20, fixed samples"),
            within=(-0.1, 0.1),
        ),
    ],
    controls=[
        Effect(
            "the negative-gradient effect when scores are shuffled over arms",
            of=_negative_gradients_help("peak 70, fixed samples, shuffled scores"),
            above=0.03,
        )
    ],
    seeds=range(15),
    budget=900,
)
def s189(seed: int) -> Outcome:
    """True reward of tabular policies that learn from groups of ten samples.

    Two decimals matter. Far from the peak all rewards are alike to a judge: likelihood methods then raise the
    best of a bad lot, and pairs are not made of it. Where a judge could order even hopeless arms (1e-12
    against 1e-20), DPO spends itself on them and loses to best of n: the panel of exact rewards is reported
    and not judged. REINFORCE subtracts the mean score, so it pushes down too; it belongs to neither side.
    """
    values: dict[str, float] = {}
    for peak in (70, 20):
        bandit = cat_bandit(peak)
        judged = bandit.rewards.mul(100).round().div(100)
        panel = f"peak {peak}, fixed samples"
        values[f"{panel}/reference"] = bandit.reward(bandit.reference)
        for name, loss in METHODS.items():
            values[f"{panel}/{name}"] = train(bandit, loss, seed, fresh=False, judged=judged)
        if peak == 70:
            for name in ("best of n", "DPO"):
                found = train(bandit, METHODS[name], seed, fresh=True, judged=judged)
                values[f"peak 70, fresh samples/{name}"] = found
                found = train(bandit, METHODS[name], seed, fresh=False, judged=bandit.rewards)
                values[f"peak 70, fixed samples, exact rewards/{name}"] = found
            order = torch.randperm(len(judged), generator=generator(seed, 52))
            for name in (*LIKELIHOOD, *NEGATIVE):
                found = train(bandit, METHODS[name], seed, fresh=False, judged=judged[order])
                values[f"peak 70, fixed samples, shuffled scores/{name}"] = found
    return Outcome(values)
