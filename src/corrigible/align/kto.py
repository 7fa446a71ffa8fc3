"""KTO: learning from answers that were found good or bad one by one, without pairs.

Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization"
(arXiv:2402.01306), eq. 7 and 8. The reference point ``z0`` is how far the policy has moved from the
reference on answers that do *not* belong to their prompts; it is one number for the whole optimiser
batch, whatever micro-batches it is computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from corrigible.align.losses import (
    SATURATED,
    LossOutput,
    check_logps,
    implicit_rewards,
    per_item,
    prospect,
    weighted_mean,
    whole_weight,
    widen,
)
from corrigible.align.registry import AlgorithmConfig, ScoredExamples, algorithm
from corrigible.align.unpaired import UnpairedExample
from corrigible.errors import BadInputError, NumericsError
from corrigible.models import Rendered


@dataclass(frozen=True)
class ReferencePoint:
    """What every micro-batch of an optimiser batch must know of the whole of it.

    Attributes:
        z0: nats, >= 0 (:func:`reference_point`).
        desirable: total weight of the desirable examples.
        undesirable: total weight of the others.
    """

    z0: float
    desirable: float
    undesirable: float


def reference_point(policy_logps: Tensor, reference_logps: Tensor) -> float:
    """KTO's ``z0``: the mean of ``log pi - log pi_ref`` over mismatched answers, never below 0, nats.

    An estimate of KL(policy || reference) on prompts of the batch that is biased, but cheap: the
    answers are those of other prompts (KTO, section 4.1). No gradient goes through it.

    Args:
        policy_logps: summed log-probs of the mismatched answers under the policy, ``(k,)``, nats.
        reference_logps: the same under the reference, ``(k,)``.

    Returns:
        The mean clamped at 0; 0 when there are none (a batch of one example).

    Raises:
        BadInputError, NumericsError: as :func:`~corrigible.align.losses.check_logps`.
    """
    if policy_logps.shape == reference_logps.shape == (0,):
        return 0.0
    check_logps(policy_logps=policy_logps, reference_logps=reference_logps)
    ratios = widen(policy_logps.detach()).double() - widen(reference_logps.detach()).double()
    return max(0.0, float(ratios.mean()))


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    *,
    z0: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    whole: ReferencePoint | None = None,
) -> LossOutput:
    """Kahneman-Tversky optimisation: a value function that saturates for gains and for losses.

    ``lambda_D (1 - sigma(beta (h - z0)))`` for a desirable answer and ``lambda_U (1 - sigma(beta (z0 - h)))``
    for an undesirable one, ``h = log pi(y|x) - log pi_ref(y|x)``; the weighted mean over answers.

    Source: Ethayarajh et al. 2024, eq. 7 and 8.

    Args:
        policy_logps: log-probs of the answers, summed over their tokens (the end of turn included),
            ``(n,)``, nats.
        reference_logps: the same under the frozen reference, ``(n,)``; no gradient.
        desirable: ``(n,)`` bool.
        z0: the batch's reference point, nats, >= 0; a constant.
        beta: KL coefficient, > 0: how quickly values saturate.
        desirable_weight: ``lambda_D``, >= 0.
        undesirable_weight: ``lambda_U``, >= 0.
        weight: of each answer, ``(n,)`` >= 0; 1 when absent.
        denominator: what the weighted sum is divided by; the sum of ``weight`` when absent. Give that
            of the whole batch when this is one of its micro-batches.
        whole: total weights of the batch's two sides, for the metrics; those of these answers when absent.

    Returns:
        The loss, and the metrics ``loss``, ``rewards/desirable`` and ``rewards/undesirable`` (mean of
        ``beta h`` over that side; absent when the batch has none), ``rewards/margin`` (their
        difference, when it has both), ``z0``, ``desirable`` (share of the weight), ``grad_weight``
        (mean slope of the value function, at most 1/4) and ``saturated`` (share of answers with
        ``|beta (h - z0)| > 10``).

    Raises:
        BadInputError: shapes differ, nothing to learn from, or a setting out of range.
        NumericsError: a log-prob or weight is not finite, or a log-prob is positive.
    """
    if not 0.0 < beta < float("inf"):
        raise BadInputError(
            f"beta must be a positive number, got {beta}.", advice="KTO's usual range is 0.01-0.5."
        )
    if not 0.0 <= z0 < float("inf"):
        raise NumericsError(f"z0_not_usable: z0 is {z0}.", advice="It is a mean of log-ratios, clamped at 0.")
    sides = (desirable_weight, undesirable_weight)
    if not all(0.0 <= side < float("inf") for side in sides) or sum(sides) == 0.0:
        raise BadInputError(
            f"desirable_weight and undesirable_weight must be >= 0 and not both 0, got {sides}."
        )
    n = check_logps(policy_logps=policy_logps, reference_logps=reference_logps)
    if desirable.dtype != torch.bool or tuple(desirable.shape) != (n,):
        raise BadInputError(
            f"desirable must be booleans ({n},), got {desirable.dtype} {tuple(desirable.shape)}."
        )
    weights = per_item("weight", weight, n, policy_logps)
    total = whole_weight(denominator, weights)

    rewards = implicit_rewards(policy_logps, reference_logps, beta=beta)
    sign = torch.full_like(rewards, -1.0).masked_fill(desirable, 1.0)
    gain = sign * (rewards - beta * z0)
    scale = torch.full_like(rewards, undesirable_weight).masked_fill(desirable, desirable_weight)
    losses = prospect(gain, scale)
    loss = weighted_mean(losses, weights, total)

    with torch.no_grad():
        means = {
            "loss": losses,
            "z0": torch.full_like(losses, z0),
            "desirable": desirable.to(losses),
            "grad_weight": scale * torch.sigmoid(gain) * torch.sigmoid(-gain),
            "saturated": (gain.abs() > SATURATED).to(losses),
        }
        metrics = {name: float(weighted_mean(value, weights, total)) for name, value in means.items()}
        good, bad = weights * desirable, weights * ~desirable
        of_good = whole.desirable if whole is not None else float(good.sum())
        of_bad = whole.undesirable if whole is not None else float(bad.sum())
        # Side by side and not in ``means``: each side has its own denominator.
        if of_good > 0.0:
            metrics["rewards/desirable"] = float((good * rewards).sum()) / of_good
        if of_bad > 0.0:
            metrics["rewards/undesirable"] = float((bad * rewards).sum()) / of_bad
        if of_good > 0.0 and of_bad > 0.0:
            metrics["rewards/margin"] = metrics["rewards/desirable"] - metrics["rewards/undesirable"]
    return LossOutput(loss, metrics)


class KTOConfig(AlgorithmConfig):
    """Settings of KTO."""

    beta: float = Field(
        0.1, gt=0, description="KL coefficient: small lets the policy move far, large keeps it near."
    )
    desirable_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of good answers. Keep weight x number of the two sides within 1:1 to 4:3: "
        "with three times as many good answers as bad ones, raise undesirable_weight to about 3.",
    )
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of bad answers.")


def mismatched_rows(examples: Sequence[UnpairedExample]) -> list[Rendered]:
    """The rows that ``z0`` is estimated on: each prompt with the answer of another example of the batch."""
    return [example.mismatched for example in examples if example.mismatched is not None]


def measure(batch: ScoredExamples[UnpairedExample], config: KTOConfig) -> ReferencePoint:
    """The reference point of a whole batch, from its :func:`mismatched_rows`."""
    rows = batch.policy and (batch.policy_logps(), batch.reference_logps())
    good = sum(example.weight for example in batch.examples if example.desirable)
    bad = sum(example.weight for example in batch.examples if not example.desirable)
    return ReferencePoint(reference_point(*rows) if rows else 0.0, good, bad)


@algorithm(
    "kto",
    source="unpaired",
    signal="labelled",
    weight="judgement",
    config=KTOConfig,
    paper="Ethayarajh et al. 2024, Model Alignment as Prospect Theoretic Optimization (arXiv:2402.01306)",
    probes=mismatched_rows,
    measure=measure,
)
def kto(batch: ScoredExamples[UnpairedExample], config: KTOConfig) -> LossOutput:
    """Kahneman-Tversky optimisation: raise answers that were found good, lower those found bad.

    Choose it when judgements are thumbs or ratings of single answers, or when one side of the pairs
    is missing or unreliable; with clean pairs DPO uses them better. Give it batches of 16 and more:
    its reference point is a mean over the batch.
    """
    whole: ReferencePoint = batch.whole
    return kto_loss(
        batch.policy_logps(),
        batch.reference_logps(),
        batch.column("desirable") > 0.5,
        z0=whole.z0,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        weight=batch.column("weight"),
        denominator=batch.denominator,
        whole=whole,
    )
