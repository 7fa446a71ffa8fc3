"""Losses that move a policy: pure functions from log-probabilities to a number.

Nothing here knows a model, a tokenizer or a file. Every loss of this family is read in
five steps (field guide, "contrast losses"), and a new one replaces one step only:

1. *reduce*   per-token log-probs to one number a response (the caller does it: ``(n,)``);
2. *link*     to the implicit reward ``beta * (policy - reference)`` (:func:`implicit_rewards`);
3. *compare*  the difference ``d`` between chosen and rejected;
4. *psi*      a convex function of ``d`` and the label (:func:`soft_logistic` for DPO);
5. *average*  over comparisons with their weights (:func:`weighted_mean`), never over tokens.

Accumulation. Loss and metrics are sums over comparisons divided by ``denominator``. With the
total weight of the *whole* batch as denominator, the outputs of its micro-batches add up
exactly to the output of the batch, however unevenly it was cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from corrigible.errors import BadInputError, NumericsError
from corrigible.rewards.losses import LossOutput

__all__ = [
    "LossOutput",
    "agreement",
    "check_logps",
    "dpo_loss",
    "implicit_rewards",
    "label_mean",
    "minus_log_sigmoid",
    "per_item",
    "prospect",
    "smoothed",
    "soft_logistic",
    "unflipped",
    "weighted_mean",
    "whole_weight",
    "widen",
]

SATURATED = 10.0
"""|d| above which a logistic comparison carries (almost) no gradient any more."""


def implicit_rewards(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """The reward a policy implies, ``beta * (log pi(y|x) - log pi_ref(y|x))`` (DPO, eq. 5).

    Args:
        policy_logps: summed log-probs of the responses under the policy, ``(n,)``, nats.
        reference_logps: the same under the frozen reference, ``(n,)``, nats.
        beta: KL coefficient, > 0.

    Returns:
        ``(n,)`` rewards, each known up to a constant of its prompt; no gradient reaches the
        reference.
    """
    return beta * (widen(policy_logps) - widen(reference_logps).detach())


def soft_logistic(difference: Tensor, p_chosen: Tensor) -> Tensor:
    """Cross-entropy of a Bradley-Terry comparison with a label that may be uncertain.

    ``-p log sigma(d) - (1 - p) log sigma(-d)``; its minimum is at ``d = log(p / (1 - p))``.

    Args:
        difference: score of chosen minus score of rejected, ``(n,)``.
        p_chosen: probability that the first side is the better one, ``(n,)`` in [0, 1].

    Returns:
        ``(n,)`` losses >= 0.
    """
    return label_mean(minus_log_sigmoid, difference, p_chosen)


def minus_log_sigmoid(difference: Tensor) -> Tensor:
    """``-log sigma(d)``: the logistic loss of a comparison that was won."""
    return -logsigmoid(difference)


def label_mean(
    psi: Callable[[Tensor], Tensor], difference: Tensor, p_chosen: Tensor, margin: float | Tensor = 0.0
) -> Tensor:
    """What a comparison costs on average over its label, ``p psi(d - m) + (1 - p) psi(-d - m)``.

    Every soft label goes through here. With ``p`` outside [0, 1] the average is that which labels flipped at
    a known rate have without the flips (:func:`unflipped`).

    Args:
        psi: loss of a difference whose first side won.
        difference: score of chosen minus score of rejected, ``(n,)``.
        p_chosen: probability that the first side is the better one, ``(n,)``.
        margin: what the difference must exceed, whichever side won.

    Returns:
        ``(n,)``.
    """
    return p_chosen * psi(difference - margin) + (1.0 - p_chosen) * psi(-difference - margin)


def prospect(gain: Tensor, scale: Tensor) -> Tensor:
    """KTO's loss of a gain or loss against the reference point, ``scale (1 - sigma(gain))``, ``(n,)``.

    As ``sigma(-gain)``: the subtraction would round small losses away.
    """
    return scale * torch.sigmoid(-gain)


def smoothed(p_chosen: Tensor, rate: float) -> Tensor:
    """``p (1 - e) + (1 - p) e``: the label when a share ``e`` of labels is believed to be flipped (cDPO)."""
    return p_chosen * (1.0 - rate) + (1.0 - p_chosen) * rate


def unflipped(p_chosen: Tensor, rate: float | Tensor) -> Tensor:
    """``(p - e) / (1 - 2 e)``: the inverse of :func:`smoothed`, which undoes flips at a known rate (rDPO).

    Above 1 for a hard label: Chowdhury et al. 2024, "Provably Robust DPO" (arXiv:2403.00409).
    """
    return (p_chosen - rate) / (1.0 - 2.0 * rate)


def weighted_mean(values: Tensor, weight: Tensor, denominator: float | Tensor) -> Tensor:
    """``sum(weight * values) / denominator``: the one place where comparisons are averaged."""
    return (weight * values).sum() / denominator


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    p_chosen: Tensor | None = None,
    weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> LossOutput:
    """Direct preference optimisation, with smoothed (cDPO) and soft labels.

    ``-p log sigma(d) - (1 - p) log sigma(-d)`` with ``d = beta * (h_chosen - h_rejected)``,
    ``h = log pi(y|x) - log pi_ref(y|x)`` and ``p = p_chosen (1 - e) + (1 - p_chosen) e``
    for ``e = label_smoothing``.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7 (hard labels);
    Mitchell 2023, "A note on DPO with noisy preferences" (the conservative form, cDPO).

    Args:
        policy_chosen_logps: log-probs under the policy, summed over the response's tokens
            (its end-of-turn included), ``(n,)``, nats.
        policy_rejected_logps: the same for the rejected responses, ``(n,)``.
        reference_chosen_logps: under the frozen reference, ``(n,)``; no gradient.
        reference_rejected_logps: ``(n,)``; no gradient.
        beta: KL coefficient, > 0.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        p_chosen: how sure the label is, ``(n,)`` in [0, 1]; 1 when absent, 0.5 for a tie.
        weight: weight of each comparison, ``(n,)`` >= 0; 1 when absent.
        denominator: what the weighted sum is divided by, > 0; the sum of ``weight`` when
            absent. Give the weight of the whole batch when this is one of its micro-batches.

    Returns:
        The loss, and the metrics ``loss``, ``rewards/chosen``, ``rewards/rejected``,
        ``rewards/margin``, ``rewards/accuracy`` (agreement of the margin's sign with the
        label; ties count a half), ``logps/chosen``, ``logps/rejected``, ``grad_weight`` (mean
        ``|psi'(d)|``) and ``saturated`` (share with ``|d| > 10``).

    Raises:
        BadInputError: shapes differ, nothing to compare, or a setting out of range.
        NumericsError: a log-prob, label or weight is not finite, or a log-prob is positive.
    """
    if not 0.0 < beta < float("inf"):
        raise BadInputError(
            f"beta must be a positive number, got {beta}.", advice="DPO's usual range is 0.01-0.5."
        )
    if not 0.0 <= label_smoothing < 0.5:
        raise BadInputError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}.",
            advice="It is the share of labels you believe to be flipped; at 0.5 labels say nothing.",
        )
    n = check_logps(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    label = per_item("p_chosen", p_chosen, n, policy_chosen_logps, high=1.0)
    weights = per_item("weight", weight, n, policy_chosen_logps)
    total = whole_weight(denominator, weights)

    chosen = implicit_rewards(policy_chosen_logps, reference_chosen_logps, beta=beta)
    rejected = implicit_rewards(policy_rejected_logps, reference_rejected_logps, beta=beta)
    difference = chosen - rejected
    target = smoothed(label, label_smoothing)
    loss = weighted_mean(soft_logistic(difference, target), weights, total)

    with torch.no_grad():
        means = {
            "loss": soft_logistic(difference, target),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": difference,
            "rewards/accuracy": agreement(difference, label),
            "logps/chosen": widen(policy_chosen_logps),
            "logps/rejected": widen(policy_rejected_logps),
            "grad_weight": (torch.sigmoid(difference) - target).abs(),
            "saturated": (difference.abs() > SATURATED).to(difference.dtype),
        }
        metrics = {name: float(weighted_mean(value, weights, total)) for name, value in means.items()}
    return LossOutput(loss, metrics)


def agreement(margin: Tensor, p_chosen: Tensor) -> Tensor:
    """1 where ``margin`` has the label's sign, 0 where it has not, 0.5 when either is a tie; ``(n,)``."""
    return 0.5 + 0.5 * torch.sign(margin) * torch.sign(p_chosen - 0.5)


def widen(value: Tensor) -> Tensor:
    """``value`` in float32 or wider: sums of hundreds of log-probs lose whole nats in bf16."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def check_logps(**named: Tensor) -> int:
    """The common length ``n`` of summed log-probs ``(n,)``, given by name.

    Raises:
        BadInputError: they have no common shape ``(n,)``, n is 0, or one is not floating point.
        NumericsError: ``logps_not_finite`` or ``logps_positive``, with the name and the rows.
    """
    shapes = {name: tuple(value.shape) for name, value in named.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise BadInputError(
            f"All log-probs must have one shape (n,), got {listed}.",
            advice="Sum the per-token log-probs of each response first; row i of each belongs together.",
        )
    n = next(iter(shapes.values()))[0]
    if n == 0:
        raise BadInputError(
            "There is nothing to learn from: n = 0.", advice="Skip empty batches before the loss."
        )
    for name, value in named.items():
        if not value.is_floating_point():
            raise BadInputError(f"{name} must hold floating-point log-probs, got {value.dtype}.")
        detached = value.detach()
        if not bool(torch.isfinite(detached).all()):
            rows = (~torch.isfinite(detached)).nonzero().flatten().tolist()[:8]
            raise NumericsError(
                f"logps_not_finite: {name} is NaN or infinite at rows {rows}.",
                advice="Look there: NaN weights, an impossible token, or a learning rate that blew up.",
            )
        # Rounding may leave a certain response a hair above log 1 = 0; more is a wrong sign.
        if bool((detached > 1e-3).any()):
            rows = (detached > 1e-3).nonzero().flatten().tolist()[:8]
            raise NumericsError(
                f"logps_positive: {name} is above 0 at rows {rows}.",
                advice="Log-probabilities are never positive; these look like losses or raw logits.",
            )
    return int(n)


def per_item(name: str, value: Tensor | None, n: int, like: Tensor, high: float = float("inf")) -> Tensor:
    """A column ``(n,)`` in ``[0, high]`` of the device and precision of ``like``; ones when absent.

    Raises:
        BadInputError: another shape, or out of range.
        NumericsError: ``<name>_not_finite``.
    """
    like = widen(like)
    if value is None:
        return torch.ones(n, dtype=like.dtype, device=like.device)
    if tuple(value.shape) != (n,):
        raise BadInputError(f"{name} must have shape ({n},), got {tuple(value.shape)}.")
    value = value.detach().to(like)
    if not bool(torch.isfinite(value).all()):
        raise NumericsError(f"{name}_not_finite: {name} holds NaN or infinity.")
    if bool((value < 0).any()) or bool((value > high).any()):
        raise BadInputError(
            f"{name} must lie in [0, {high:g}], got values from {value.min()} to {value.max()}."
        )
    return value


def whole_weight(denominator: float | Tensor | None, weights: Tensor) -> float:
    """What a weighted sum is divided by: ``denominator``, or the sum of ``weights`` when that is absent.

    Raises:
        NumericsError: ``nothing_to_average``: it is not a positive number.
    """
    total = float(weights.sum()) if denominator is None else float(denominator)
    if not 0.0 < total < float("inf"):
        raise NumericsError(
            f"nothing_to_average: the weights sum to {total}.",
            advice="Every example of this batch has weight 0; drop such examples before training.",
        )
    return total
