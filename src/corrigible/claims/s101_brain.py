"""S101 BRAIn: self-normalised weights and baseline take most of a gradient's variance out."""

from __future__ import annotations

from collections.abc import Callable
from math import log2

import torch
from torch import Tensor

from corrigible.align.contrast import contrast_loss, preset
from corrigible.claims.fixtures.tabular import generator, group_rows
from corrigible.claims.framework import Effect, Outcome, Values, claim

OUTCOMES, SAMPLES, GROUPS = 50, 32, 500
SHIFTS = (0.0, 1.0, 2.0)
STAGES = {"at the start": 0.0, "near the end": 0.8}
"""How far of the way from the prior to the target the policy has come, in logits."""
REWARD = 2.0
"""Standard deviation of ``reward / beta`` over outcomes, which tilts the prior to the target."""


def brain_gradients(policy: Tensor, target: Tensor, proposal: Tensor, arms: Tensor) -> Tensor:
    """Gradient on the policy's logits of every group's BRAIn loss, ``(groups, outcomes)``.

    ``policy``, ``target`` and ``proposal`` are log-probabilities ``(outcomes,)``; ``arms``, ``(groups,
    samples)``, were drawn from the proposal. The target is given as a uniform prior times
    ``exp(reward / beta)``: only the product matters.
    """
    groups = len(arms)
    logits = policy.expand(groups, -1).clone().requires_grad_()
    reference = torch.log_softmax(torch.zeros_like(policy), dim=0)
    rows = group_rows(
        torch.log_softmax(logits, dim=1),
        reference,
        arms,
        score=(target - reference)[arms],
        logq=proposal[arms],
    )
    loss = contrast_loss(rows, preset("brain", beta=1.0), denominator=1.0).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def weighted_gradients(policy: Tensor, weights: Tensor, arms: Tensor) -> Tensor:
    """``-mean_i w_i grad log pi(y_i)`` on logits, ``(groups, outcomes)``; weights ``(groups, samples)``."""
    pulled = torch.zeros(len(arms), len(policy), dtype=torch.float64).scatter_add_(1, arms, weights)
    return -(pulled - weights.sum(dim=1, keepdim=True) * policy.exp()) / arms.shape[1]


def _variance(gradients: Tensor) -> float:
    """Trace of the covariance over groups, times the samples of a group: of one sample, so to say."""
    return float(gradients.var(dim=0).sum()) * SAMPLES


def _halvings(stage: str, shift: float, first: str, second: str) -> Callable[[Values], float]:
    panel = f"variance {stage}, shift {shift:g}"
    return lambda values: log2(values[f"{panel}/{first}"] / values[f"{panel}/{second}"])


def _saving(stage: str, shift: float, first: str, second: str) -> Effect:
    """How often the variance halves from one estimator to another; shown if it falls below a third."""
    name = f"halvings of the variance from {first} to {second}, {stage}, shift {shift:g}"
    return Effect(name, of=_halvings(stage, shift, first, second), above=log2(3))


@claim(
    "S101",
    title="BRAIn's self-normalisation takes out most of the gradient's variance",
    paper="Pandey et al. 2024, BRAIn: Bayesian Reward-conditioned Amortized Inference (arXiv:2402.02479)",
    hypothesis="With 32 samples of a proposal at distance 2 from the prior, BRAIn's gradient has less than "
    "a third of the variance of GDC++'s, with a saving that grows with the distance, and no variance at all "
    "where the policy is the target.",
    figure="The paper shows a smaller variance than DPG and GDC++, the more so the further proposal and "
    "target are apart, and more wins than DPO and RRHF on TL;DR and HH. The variance is tested here.",
    setting="50 outcomes; a random prior, the target prior * exp(reward / beta), a policy on its way from "
    "the one to the other, and proposals at three distances from the prior (normal noise of standard "
    "deviation 0, 1 and 2 on its logits). All estimators see the same 500 groups.",
    baselines=["DPG: importance weights alone", "GDC++: minus the policy's own weights"],
    effect=_saving("at the start", 2.0, "GDC++", "BRAIn"),
    also=[
        _saving("near the end", 2.0, "GDC++", "BRAIn"),
        _saving("near the end", 2.0, "BRAIn without its baseline", "BRAIn"),
        Effect(
            "halvings that BRAIn gains on GDC++ from shift 0 to shift 2",
            of=lambda v: (
                _halvings("at the start", 2.0, "GDC++", "BRAIn")(v)
                - _halvings("at the start", 0.0, "GDC++", "BRAIn")(v)
            ),
        ),
        Effect(
            "largest entry of a gradient where the policy is the target",
            of=lambda v: v["largest gradient at the target"],
            within=(-1e-9, 1e-9),
        ),
    ],
    controls=[
        _saving("at the start", 0.0, "GDC++", "BRAIn"),
        _saving("near the end", 2.0, "GDC++", "BRAIn without its baseline"),
    ],
    seeds=range(40),
    budget=30,
    fast=True,
)
def s101(seed: int) -> Outcome:
    """Trace of the gradient's covariance over 500 groups of 32 samples, times 32; and the norm of its bias.

    The page shows what does the work: at the start self-normalised weights alone save nearly as much as with
    the baseline, near the end the baseline saves nearly everything. The first control takes the distance
    away, the second the baseline. BRAIn is not unbiased: the norm of its bias is reported and not judged.
    """
    random = generator(seed, 41)

    def normal() -> Tensor:
        return torch.randn(OUTCOMES, generator=random, dtype=torch.float64)

    prior, reward, away = normal(), REWARD * normal(), normal()
    target = torch.log_softmax(prior + reward, dim=0)
    values: dict[str, float] = {}
    for shift in SHIFTS:
        proposal = torch.log_softmax(prior + shift * away, dim=0)
        drawn = proposal.exp().expand(GROUPS, -1)
        arms = torch.multinomial(drawn, SAMPLES, replacement=True, generator=random)
        to_target = (target - proposal)[arms].exp()
        own = to_target / to_target.sum(dim=1, keepdim=True) * SAMPLES
        for stage, way in STAGES.items():
            policy = torch.log_softmax(prior + way * reward, dim=0)
            to_policy = (policy - proposal)[arms].exp()
            gradients = {
                "DPG": weighted_gradients(policy, to_target, arms),
                "GDC++": weighted_gradients(policy, to_target - to_policy, arms),
                "BRAIn without its baseline": weighted_gradients(policy, own, arms),
                "BRAIn": brain_gradients(policy, target, proposal, arms),
            }
            true = policy.exp() - target.exp()
            values[f"norm of the bias {stage}, shift {shift:g}/true gradient"] = float(true.norm())
            for name, found in gradients.items():
                values[f"variance {stage}, shift {shift:g}/{name}"] = _variance(found)
                bias = float((found.mean(dim=0) - true).norm())
                values[f"norm of the bias {stage}, shift {shift:g}/{name}"] = bias
    at_target = brain_gradients(target, target, proposal, arms)
    return Outcome({**values, "largest gradient at the target": float(at_target.abs().max())})
