"""Likelihoods of preference observations: how a latent utility produces a comparison.

Pure functions of tensors. Utilities are in nats (the Bradley-Terry scale): a difference of 1.0 means odds
of e to one. Nothing here knows a model, a tokenizer or a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from corrigible.errors import BadInputError, NumericsError


@dataclass(frozen=True)
class LossOutput:
    """``loss``: scalar tensor to call ``backward()`` on; ``metrics``: plain numbers to log."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


def _vector(name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.shape != like.shape:
        raise BadInputError(
            f"{name} has shape {tuple(value.shape)} but the chosen scores have {tuple(like.shape)}.",
            advice="Pass one entry per pair: every argument is (n,).",
        )
    return value.to(device=like.device, dtype=like.dtype)


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    p_chosen: Tensor | None = None,
    weight: Tensor | None = None,
    margin: Tensor | None = None,
    center: float = 0.0,
    denominator: float | None = None,
) -> LossOutput:
    """Negative log-likelihood of comparisons under Bradley and Terry (1952), with soft labels.

    With Δ = chosen − rejected − margin, the model says P(chosen ≻ rejected) = σ(Δ), and each pair costs
    ``p·softplus(−Δ) + (1 − p)·softplus(Δ)``: the cross-entropy against the share ``p`` of judges who
    preferred the chosen side. The minimum is at Δ = logit(p), so p = 0.5 is a tie that pulls the two
    scores together, and p = 1 is the usual reward-model loss (Ouyang et al. 2022, eq. 1). The margin is
    subtracted inside the sigmoid (Touvron et al. 2023, eq. 2). Computed with softplus in at least
    float32: ``log(sigmoid(x) + eps)`` would flatten the gradient for confident pairs.

    Args:
        chosen_scores: (n,) utilities of the preferred sides, nats.
        rejected_scores: (n,) utilities of the other sides, nats.
        p_chosen: (n,) in [0, 1], share of judges for the chosen side; default all ones.
        weight: (n,) >= 0, what each pair counts (its number of votes, say); default all ones.
        margin: (n,) >= 0, nats by which the chosen side should lead; default zero.
        center: coefficient of the mean of (chosen + rejected)², which fixes the additive constant that
            comparisons leave undetermined (Eisenstein et al. 2023); 0.01 is usual.
        denominator: what the weighted sum is divided by; default the sum of the weights. Pass the sum
            over the whole batch when accumulating micro-batches.

    Returns:
        loss: scalar. Metrics: ``log_loss`` (nats per weight, without centring), ``accuracy`` (weighted
        share of pairs that are no tie and are ordered like their majority, equal scores counting half;
        absent when all are ties) and ``margin`` (weighted mean Δ towards the chosen side, nats).

    Raises:
        BadInputError: shapes differ, or a label, weight or margin lies outside its range.
        NumericsError: a score is NaN or infinite, or every weight is zero.
    """
    if chosen_scores.ndim != 1:
        raise BadInputError(
            f"chosen_scores has shape {tuple(chosen_scores.shape)}, expected (n,).",
            advice="Squeeze the head's last dimension.",
        )
    dtype = torch.promote_types(chosen_scores.dtype, torch.float32)
    chosen = chosen_scores.to(dtype)
    rejected = _vector("rejected_scores", rejected_scores, chosen)
    p = torch.ones_like(chosen) if p_chosen is None else _vector("p_chosen", p_chosen, chosen)
    w = torch.ones_like(chosen) if weight is None else _vector("weight", weight, chosen)
    m = torch.zeros_like(chosen) if margin is None else _vector("margin", margin, chosen)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise BadInputError(
            "p_chosen holds a value outside [0, 1].", advice="It is a share of judges: 1 = all, 0.5 = tie."
        )
    if not bool((w >= 0).all() & torch.isfinite(w).all()):
        raise BadInputError("weight holds a negative or non-finite value.", advice="Weights count votes.")
    if not bool((m >= 0).all() & torch.isfinite(m).all()):
        raise BadInputError("margin holds a negative or non-finite value.", advice="Swap the sides instead.")
    if not bool(torch.isfinite(chosen).all() & torch.isfinite(rejected).all()):
        raise NumericsError(
            "a score is NaN or infinite.", advice="Lower the learning rate or check the inputs of the model."
        )
    total = float(w.sum()) if denominator is None else float(denominator)
    if not total > 0:
        raise NumericsError(
            "every pair of the batch has weight zero.", advice="Drop pairs without weight before batching."
        )

    delta = chosen - rejected - m
    cost = p * F.softplus(-delta) + (1 - p) * F.softplus(delta)
    log_loss = (w * cost).sum() / total
    loss = log_loss
    if center:
        loss = loss + center * (w * (chosen + rejected) ** 2).sum() / total

    with torch.no_grad():
        raw = chosen - rejected
        metrics = {"log_loss": float(log_loss), "margin": float((w * raw).sum() / total)}
        decided = w * (p != 0.5)
        if float(decided.sum()) > 0:
            towards = raw * torch.sign(p - 0.5)
            right = (towards > 0).to(dtype) + 0.5 * (towards == 0).to(dtype)
            metrics["accuracy"] = float((decided * right).sum() / decided.sum())
    return LossOutput(loss=loss, metrics=metrics)
