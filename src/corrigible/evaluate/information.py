"""What preferences teach: the differential information between two policies.

The differential information distribution from a reference to a policy is their normalised ratio
("Differential Information: An Information-Theoretic Perspective on Preference Optimization", 2025)::

    q(y) = (pi(y) / pi_ref(y)) / sum_y' (pi(y') / pi_ref(y'))

If chosen answers come from the reference, rejected ones from ``pi_l``, and ``q_ref/l ~ q_*/ref^beta`` (a
power law), DPO with that beta learns ``pi*``. A low entropy of ``q`` reinforces a few answers, a high one
smooths, and chosen answers become less likely, too (likelihood displacement).

On spaces that can be enumerated everything is exact. Over texts the normaliser would need weights of
unbounded variance, so two proxies stand in, which are ours: the entropy of the ratio of the next-token
distributions, averaged over positions, and that of the ratios of a set of sampled answers. Entropies are in
nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corrigible.errors import BadInputError, NumericsError

Logps = NDArray[np.float64]


def differential_information(policy_logps: ArrayLike, reference_logps: ArrayLike) -> Logps:
    """``log q`` of every answer, ``(n,)`` nats, normalised.

    Args:
        policy_logps: of every possible answer, ``(n,)``.
        reference_logps: the same; finite, as the ratio must be.

    Raises:
        BadInputError: not the same shape ``(n,)``, or empty.
        NumericsError: ``logps_not_finite``: an answer that one of them cannot give has no ratio.
    """
    policy, reference = _same_shape(policy_logps, reference_logps)
    return _log_softmax(policy - reference)


def entropy(log_q: ArrayLike) -> float:
    """``-sum q log q`` of log-probs, ``(n,)``; at most ``log n``."""
    values = np.asarray(log_q, dtype=np.float64)
    mass = np.exp(values)
    return float(-(mass * np.where(mass > 0, values, 0.0)).sum())


@dataclass(frozen=True)
class SetInformation:
    """The ratios of a set of sampled answers as a distribution over the set.

    Attributes:
        entropy: nats.
        support: answers in the set; the entropy is at most its logarithm.
        effective: ``1 / sum q^2``; near 1, one answer decides the number.
    """

    entropy: float
    support: int
    effective: float


def set_information(log_ratios: ArrayLike) -> SetInformation:
    """The proxy over sampled answers, ``softmax(h)`` with ``h = log pi - log pi_ref``.

    Args:
        log_ratios: of each distinct answer, ``(n,)`` nats.

    Raises:
        BadInputError: fewer than two answers.
        NumericsError: ``logps_not_finite``.
    """
    ratios, _ = _same_shape(log_ratios, log_ratios)
    if len(ratios) < 2:
        raise BadInputError("A set of one answer has no entropy.", advice="Sample several per prompt.")
    log_q = _log_softmax(ratios)
    return SetInformation(entropy(log_q), len(ratios), float(1.0 / (np.exp(log_q) ** 2).sum()))


def token_information(policy_logits: ArrayLike, reference_logits: ArrayLike) -> Logps:
    """Entropy of ``softmax(logits - reference logits)`` at each position, ``(tokens,)`` nats.

    Args:
        policy_logits: ``(tokens, vocabulary)``; log-probs will do.
        reference_logits: the same.

    Raises:
        BadInputError: shapes differ or are not two-dimensional.
        NumericsError: ``logits_not_finite``.
    """
    policy, reference = (np.asarray(v, dtype=np.float64) for v in (policy_logits, reference_logits))
    if policy.shape != reference.shape or policy.ndim != 2 or not policy.size:
        raise BadInputError(f"Logits must be (tokens, vocabulary), got {policy.shape} and {reference.shape}.")
    gap = policy - reference
    if not np.isfinite(gap).all():
        raise NumericsError("logits_not_finite: a ratio of next-token distributions is NaN or infinite.")
    gap = gap - gap.max(axis=1, keepdims=True)
    total = np.log(np.exp(gap).sum(axis=1, keepdims=True))
    log_q = gap - total
    return np.asarray(-(np.exp(log_q) * log_q).sum(axis=1), dtype=np.float64)


def row_information(policy: Any, rows: Sequence[Any], reference: Any | None = None) -> float:
    """The mean of :func:`token_information` over all scored tokens of rows; no gradient.

    Args:
        policy: a :class:`~corrigible.models.LanguagePolicy`.
        rows: rendered conversations.
        reference: another policy of the same vocabulary; by default the policy without its adapter.

    Raises:
        BadInputError: no rows, or neither a reference nor an adapter.
    """
    if not rows:
        raise BadInputError("There are no rows to measure.")
    found = []
    for row in rows:
        mine = _logits(policy, row)
        if reference is None:
            with policy.adapter_disabled():
                theirs = _logits(policy, row)
        else:
            theirs = _logits(reference, row)
        if mine.shape != theirs.shape:
            raise BadInputError("vocabulary_mismatch: the two policies do not have the same tokens.")
        found.append(token_information(mine, theirs))
    return float(np.concatenate(found).mean())


def _logits(policy: Any, row: Any) -> Logps:
    """Logits before each scored token of a row, ``(tokens, vocabulary)``."""
    import torch

    before = [position - 1 for position in row.scored]
    with torch.inference_mode():
        ids = torch.tensor([row.ids], device=policy.device)
        logits = policy.model(input_ids=ids, use_cache=False).logits[0, before]
    return np.asarray(logits.double().cpu().numpy(), dtype=np.float64)


# -- does the power law hold? ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """A least-squares line through ``log (pi_w / pi_l)`` against ``log (pi* / pi_ref)``.

    Attributes:
        slope: the beta with which DPO on such data has ``pi*`` as its optimum.
        intercept: nats.
        r2: share of the variance that the line explains; below 1 the law does not hold exactly.
        n: answers.
    """

    slope: float
    intercept: float
    r2: float
    n: int


def power_law(preferred_log_ratios: ArrayLike, target_log_ratios: ArrayLike) -> PowerLaw:
    """Fit of the power law that makes DPO's loss the right one.

    Args:
        preferred_log_ratios: ``log pi_w - log pi_l`` of each answer, the log-ratio of the distributions that
            chosen and rejected answers come from, ``(n,)`` nats.
        target_log_ratios: ``log pi* - log pi_ref`` of the same answers, ``(n,)``.

    Raises:
        BadInputError: fewer than three answers, or all target ratios equal (there is no slope).
        NumericsError: ``logps_not_finite``.
    """
    y, x = _same_shape(preferred_log_ratios, target_log_ratios)
    if len(x) < 3 or np.ptp(x) == 0.0:
        raise BadInputError(
            f"A line through {len(x)} answers with {len(np.unique(x))} different ratios says nothing.",
            advice="Give at least three answers on which target and reference differ.",
        )
    dx, dy = x - x.mean(), y - y.mean()
    slope = float((dx * dy).sum() / (dx * dx).sum())
    left = dy - slope * dx
    spread = float((dy * dy).sum())
    r2 = 1.0 if spread == 0.0 else 1.0 - float((left * left).sum()) / spread
    return PowerLaw(slope, float(y.mean() - slope * x.mean()), r2, len(x))


def preference_probability(chosen: ArrayLike, rejected: ArrayLike, log_q: ArrayLike) -> NDArray[np.float64]:
    """``sigma(log q(y_w) - log q(y_l))``: how likely each pair is labelled this way round, ``(pairs,)``.

    Args:
        chosen: index of the chosen answer of each pair.
        rejected: of the rejected one.
        log_q: differential information from ``pi_l`` to the reference, ``(n,)``.
    """
    values = np.asarray(log_q, dtype=np.float64)
    gap = values[np.asarray(chosen, dtype=np.int64)] - values[np.asarray(rejected, dtype=np.int64)]
    return np.asarray(1.0 / (1.0 + np.exp(-gap)), dtype=np.float64)


def margin_ordering(
    rejected_margins: ArrayLike, reference_margins: ArrayLike, target_margins: ArrayLike
) -> float:
    """Share of pairs whose log-margins ``log pi(y_w) - log pi(y_l)`` are ordered ``pi_l < pi_ref < pi*``.

    Args:
        rejected_margins: under the distribution that rejected answers come from, ``(pairs,)`` nats.
        reference_margins: under the reference.
        target_margins: under the target (or the trained policy).
    """
    low, middle = _same_shape(rejected_margins, reference_margins)
    middle, high = _same_shape(middle, target_margins)
    return float(((low < middle) & (middle < high)).mean())


def _same_shape(a: ArrayLike, b: ArrayLike) -> tuple[Logps, Logps]:
    first, second = (np.asarray(v, dtype=np.float64) for v in (a, b))
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise BadInputError(f"Both must be (n,) with n >= 1, got {first.shape} and {second.shape}.")
    if not np.isfinite(first).all() or not np.isfinite(second).all():
        where = np.flatnonzero(~(np.isfinite(first) & np.isfinite(second)))[:8].tolist()
        raise NumericsError(
            f"logps_not_finite: answers {where} are NaN or infinite.",
            advice="Leave out answers that one of the policies cannot give.",
        )
    return first, second


def _log_softmax(values: Logps) -> Logps:
    shifted = values - values.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float64)
