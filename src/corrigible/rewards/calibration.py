"""Does a probability of 0.8 mean that eight in ten judges agree?

All functions take margins: score(chosen) − score(rejected), (n,), in nats, and the share of judges
``p_chosen`` (n,) in [0, 1]. They are symmetric in the two sides: which side is called chosen cannot help.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from corrigible.errors import BadInputError
from corrigible.rewards.signals import sigmoid

Floats = NDArray[np.float64]


def _checked(margins: Floats, p_chosen: Floats) -> tuple[Floats, Floats]:
    m, p = np.asarray(margins, dtype=np.float64), np.asarray(p_chosen, dtype=np.float64)
    if m.ndim != 1 or m.shape != p.shape or len(m) == 0:
        raise BadInputError(
            f"margins {m.shape} and p_chosen {p.shape} must be equal, (n,) and not empty.",
            advice="Score the pairs first.",
        )
    if not np.isfinite(m).all() or not ((p >= 0) & (p <= 1)).all():
        raise BadInputError("a margin is not finite or a share lies outside [0, 1].")
    return m, p


def log_loss(margins: Floats, p_chosen: Floats, temperature: float = 1.0) -> float:
    """Mean cross-entropy in nats of σ(margin / temperature) against the vote shares; ln 2 is chance."""
    m, p = _checked(margins, p_chosen)
    z = m / temperature
    return float((p * np.logaddexp(0, -z) + (1 - p) * np.logaddexp(0, z)).mean())


def fit_temperature(margins: Floats, p_chosen: Floats, *, low: float = 0.02, high: float = 100.0) -> float:
    """The temperature in [low, high] with the smallest log-loss (Guo et al. 2017, section 4.2).

    The loss is convex in 1/temperature, so golden-section search finds it. Fit it on pairs that were not
    trained on. ``high`` (probabilities of nearly 0.5) is what a useless or reversed model gets.
    """
    m, p = _checked(margins, p_chosen)
    a, b = 1 / high, 1 / low
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(100):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        if log_loss(m, p, 1 / c) <= log_loss(m, p, 1 / d):
            b = d
        else:
            a = c
    return float(2 / (a + b))


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies in [low, high): what was said and how many judges agreed."""

    low: float
    high: float
    n: int
    confidence: float
    agreement: float


@dataclass(frozen=True)
class Calibration:
    """``ece``: expected calibration error, the pair-weighted mean of |confidence − agreement| over bins."""

    ece: float
    bins: tuple[Bin, ...]
    log_loss: float
    temperature: float

    def to_json(self) -> dict[str, object]:
        return {
            "ece": self.ece,
            "log_loss": self.log_loss,
            "temperature": self.temperature,
            "bins": [vars(entry) for entry in self.bins],
        }


def calibration(
    margins: Floats, p_chosen: Floats, *, temperature: float = 1.0, bins: int = 10
) -> Calibration:
    """Reliability over equal-width bins of confidence max(p, 1 − p) in [0.5, 1].

    Agreement is the share of judges on the side that the model prefers; a tied vote agrees half. Empty
    bins are left out. The error is biased upwards on few pairs: a perfectly calibrated model with 400
    pairs in 10 bins shows about 0.04.
    """
    m, p = _checked(margins, p_chosen)
    if bins < 1:
        raise BadInputError(f"{bins} bins.", advice="Use at least one.")
    said = sigmoid(m / temperature)
    confidence = np.maximum(said, 1 - said)
    agreement = np.where(m > 0, p, np.where(m < 0, 1 - p, 0.5))
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    rows = []
    error = 0.0
    for number in range(bins):
        inside = which == number
        if not inside.any():
            continue
        row = Bin(
            low=0.5 + number / (2 * bins),
            high=0.5 + (number + 1) / (2 * bins),
            n=int(inside.sum()),
            confidence=float(confidence[inside].mean()),
            agreement=float(agreement[inside].mean()),
        )
        rows.append(row)
        error += row.n / len(m) * abs(row.confidence - row.agreement)
    return Calibration(error, tuple(rows), log_loss(m, p, temperature), temperature)
