"""What a sampled answer is worth beside the other answers to its prompt: pure functions of rewards.

A reward is a number or missing. A missing one (the judge failed, a verifier timed out) is never a
zero: it moves no baseline and its answer has no advantage.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from corrigible.errors import BadInputError, NumericsError

Estimator = Literal["mean", "mean_std", "leave_one_out"]
"""How rewards of a group become advantages; see :func:`group_advantages`."""

STD_EPSILON = 1e-4
"""Added to a group's standard deviation, in units of the reward (GRPO as TRL runs it)."""

SPREAD = 1e-9
"""Rewards that differ by less than this, relative to the largest of their group, are equal."""


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    valid: Tensor | None = None,
    estimator: Estimator = "mean_std",
    epsilon: float = STD_EPSILON,
) -> Tensor:
    """Advantages of answers within their groups (the answers to one prompt).

    With ``R`` the rewards of a group's ``G`` valid answers and ``m`` their mean:

    * ``"mean"``: ``R_i - m`` (Dr. GRPO: Liu et al. 2025, "Understanding R1-Zero-like training");
    * ``"mean_std"``: ``(R_i - m) / (std(R) + epsilon)`` with the unbiased standard deviation (GRPO:
      Shao et al. 2024, "DeepSeekMath", section 4.1.2), which weighs easy and hard prompts up;
    * ``"leave_one_out"``: ``R_i`` minus the mean of the other ``G - 1``, that is ``(R_i - m) G / (G - 1)``
      (RLOO: Ahmadian et al. 2024, "Back to Basics", eq. 8), unbiased.

    Args:
        rewards: ``(n,)``; entries that are not valid are never read and may be NaN.
        group: ``(n,)`` integers; answers with the same one belong together, in any order.
        valid: ``(n,)`` bool; all when absent.
        estimator: which of the three.
        epsilon: for ``"mean_std"``, in units of the reward.

    Returns:
        ``(n,)`` in the rewards' type, float32 at least; 0 for answers that are not valid and for all
        answers of a group without :func:`spread`.

    Raises:
        BadInputError: shapes differ, or an unknown estimator.
        NumericsError: ``reward_not_finite``: a valid reward is NaN or infinite.
    """
    if estimator not in ("mean", "mean_std", "leave_one_out"):
        raise BadInputError(
            f"There is no estimator {estimator!r}.", advice="One of mean, mean_std, leave_one_out."
        )
    values, index, live, groups = _columns(rewards, group, valid)
    count = _sums(live.to(values.dtype), index, groups)
    mean = _sums(values, index, groups) / count.clamp(min=1.0)
    centred = torch.where(live, values - mean[index], 0.0)
    if estimator == "leave_one_out":
        centred = centred * (count / (count - 1.0).clamp(min=1.0))[index]
    elif estimator == "mean_std":
        variance = _sums(centred.square(), index, groups) / (count - 1.0).clamp(min=1.0)
        centred = centred / (variance.sqrt() + epsilon)[index]
    # Equal rewards leave rounding behind, which a small standard deviation would blow up.
    return torch.where(live & spread(rewards, group, valid=valid)[index], centred, 0.0)


def spread(rewards: Tensor, group: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Which groups have something to learn from: at least two different valid rewards.

    Args:
        rewards, group, valid: as for :func:`group_advantages`.

    Returns:
        ``(groups,)`` bool, in the order of the sorted distinct values of ``group``.

    Raises:
        BadInputError, NumericsError: as for :func:`group_advantages`.
    """
    values, index, live, groups = _columns(rewards, group, valid)
    highest = values.new_full((groups,), -torch.inf)
    highest.scatter_reduce_(0, index[live], values[live], "amax")
    lowest = values.new_full((groups,), torch.inf)
    lowest.scatter_reduce_(0, index[live], values[live], "amin")
    return highest - lowest > SPREAD * torch.maximum(highest.abs(), lowest.abs())


def _columns(rewards: Tensor, group: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rewards with 0 where they are missing, group numbers from 0, which are valid, how many groups."""
    live = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    if rewards.ndim != 1 or rewards.shape != group.shape or rewards.shape != live.shape:
        raise BadInputError(
            f"rewards {tuple(rewards.shape)}, group {tuple(group.shape)} and valid {tuple(live.shape)} "
            "must have one shape (n,).",
            advice="One reward, one group number and one flag per answer.",
        )
    if live.dtype != torch.bool or group.is_floating_point():
        raise BadInputError(f"group must hold integers and valid booleans, got {group.dtype}, {live.dtype}.")
    values = rewards.detach()
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    if not bool(torch.isfinite(values[live]).all()):
        where = (live & ~torch.isfinite(values)).nonzero().flatten().tolist()[:8]
        raise NumericsError(
            f"reward_not_finite: rewards {where} are NaN or infinite.",
            advice="A reward that could not be computed is a reason, not a number: mark it as not valid.",
        )
    distinct, index = torch.unique(group, return_inverse=True)
    return torch.where(live, values, 0.0), index, live, len(distinct)


def _sums(values: Tensor, index: Tensor, groups: int) -> Tensor:
    return values.new_zeros(groups).index_add_(0, index, values)
