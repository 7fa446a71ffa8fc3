"""How the learning rate falls after warm-up: pure functions of how far the run is.

A schedule is its *decay*: the share of the peak rate that is left when a share of the steps after warm-up is
done. It is 1 at the start; ``floor`` is what is left at the end.

``uba`` is the budget-aware schedule of "Stepsize anything: a unified learning rate schedule for
budgeted-iteration training", 2025, with one shape parameter ``phi``. At ``phi`` = 2 it is the cosine, below
it stays high and drops late, above it falls early. With ``phi`` = 2 kappa, peak 1 / lambda_min and floor
1 / lambda_max it gives, at theta = (2t - 1) pi / 2T, the step sizes of Chebyshev's iteration, which are the
best T fixed steps for any quadratic whose curvature lies between the two: phi / 2 plays the condition number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from corrigible.errors import BadInputError

Schedule = Literal["constant", "linear", "cosine", "step", "exponential", "inverse_sqrt", "uba"]
"""The schedules by name."""

EXPONENTIAL_END = 0.01
"""What the exponential schedule falls to when no floor is given: it never reaches 0."""

STEP_FACTOR = 0.1
"""What each drop of the step schedule multiplies the rate with; drops are at 1/2 and 3/4 of the steps."""


def uba(theta: float, *, phi: float, high: float = 1.0, low: float = 0.0) -> float:
    """``(high - low) 2 (1 + cos theta) / (2 phi + (2 - phi)(1 + cos theta)) + low``.

    Args:
        theta: phase in [0, pi]; 0 gives ``high``, pi gives ``low``.
        phi: shape, > 0.
        high: largest rate.
        low: smallest rate.

    Raises:
        BadInputError: ``theta`` or ``phi`` is out of range.
    """
    if not phi > 0.0 or not math.isfinite(phi):
        raise BadInputError(f"phi must be a positive number, got {phi}.", advice="2 is the cosine.")
    if not 0.0 <= theta <= math.pi:
        raise BadInputError(f"theta must be in [0, pi], got {theta}.")
    # The same with 1 + cos = 2 up, 1 - cos = 2 down: as it is written, a large phi loses all digits near 0.
    up, down = math.cos(theta / 2.0) ** 2, math.sin(theta / 2.0) ** 2
    return (high - low) * (2.0 * up / (phi * down + 2.0 * up)) + low


def decay(schedule: Schedule, share: float, *, floor: float = 0.0, phi: float = 2.0) -> float:
    """The share of the peak rate that is left when ``share`` of the steps after warm-up is done.

    Args:
        schedule: which; ``inverse_sqrt`` counts steps and is not among them (:func:`inverse_sqrt`).
        share: in [0, 1].
        floor: what is left at the end, in [0, 1].
        phi: shape of ``uba``.

    Raises:
        BadInputError: an unknown schedule, or a number out of range.
    """
    if not 0.0 <= share <= 1.0 or not 0.0 <= floor <= 1.0:
        raise BadInputError(f"share and floor are in [0, 1], got {share} and {floor}.")
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            left = 1.0 - share
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * share))
        case "step":
            left = STEP_FACTOR ** (0 if share < 0.5 else 1 if share < 0.75 else 2)
        case "exponential":
            return float((floor or EXPONENTIAL_END) ** share)
        case "uba":
            return uba(math.pi * share, phi=phi, low=floor)
        case _:
            raise BadInputError(
                f"There is no schedule {schedule!r} of the share alone.",
                advice=f"Schedules: {', '.join(get_args(Schedule))}.",
            )
    return left if floor == 0.0 else floor + (1.0 - floor) * left


def inverse_sqrt(step: int, warmup: int) -> float:
    """``sqrt((warmup + 1) / (step + 1))`` for step ``step`` (from 0) at or after ``warmup``: 1 at first.

    Source: Vaswani et al. 2017, "Attention is all you need", eq. 3, with the peak as the unit.
    """
    return math.sqrt((warmup + 1) / (step + 1))


def warmed_up(
    step: int,
    total: int,
    *,
    peak: float,
    warmup: int,
    schedule: Schedule,
    floor: float = 0.0,
    phi: float = 2.0,
) -> float:
    """The rate at step ``step`` (from 0) of ``total`` optimiser steps.

    ``warmup`` steps rise linearly to ``peak`` (the first one already moves), then the schedule. The decay
    would reach its end one step after the last, so that the last step moves, too.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "inverse_sqrt":
        return peak * max(floor, inverse_sqrt(step, warmup))
    return peak * decay(schedule, (step - warmup) / max(total - warmup, 1), floor=floor, phi=phi)


@dataclass(frozen=True)
class Phase:
    """One part of a run with restarts: its steps, and the rates it falls from and to."""

    steps: int
    high: float
    low: float = 0.0


def uba_phases(step: int, phases: Sequence[Phase], *, phi: float) -> float:
    """The rate at step ``step`` (from 0) of phases one after the other, each a whole ``uba`` of its own.

    Raises:
        BadInputError: a phase without steps, or a step after the last phase.
    """
    if any(phase.steps < 1 for phase in phases):
        raise BadInputError("A phase needs at least one step.")
    for phase in phases:
        if step < phase.steps:
            return uba(math.pi * step / phase.steps, phi=phi, high=phase.high, low=phase.low)
        step -= phase.steps
    raise BadInputError(f"The phases end {step + 1} steps before this one.")
