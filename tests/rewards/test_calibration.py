"""Calibration against simulations with known answers and a scalar oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corrigible.errors import BadInputError
from corrigible.rewards import fit_temperature
from corrigible.rewards.calibration import calibration, log_loss


def simulated(n: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Margins whose true probabilities are σ(margin / temperature), and one judge per pair."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(scale=2 * temperature, size=n)
    return margins, (rng.random(n) < 1 / (1 + np.exp(-margins / temperature))).astype(float)


def test_log_loss_against_scalars() -> None:
    margins, p = np.array([2.0, -1.0, 0.0]), np.array([1.0, 0.25, 0.5])
    expected = 0.0
    for m, share in zip(margins, p, strict=True):
        q = 1 / (1 + math.exp(-m / 1.5))
        expected -= share * math.log(q) + (1 - share) * math.log(1 - q)
    assert log_loss(margins, p, 1.5) == pytest.approx(expected / 3, rel=1e-12)
    assert log_loss(np.zeros(4), np.full(4, 0.3)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("true", [0.2, 1.0, 5.0])
def test_temperature_is_recovered(true: float) -> None:
    margins, p = simulated(20_000, true)
    assert fit_temperature(margins, p) == pytest.approx(true, rel=0.06)


def test_temperature_of_a_reversed_model_goes_to_the_limit() -> None:
    margins, p = simulated(2_000, 1.0)
    assert fit_temperature(-margins, p, high=100.0) > 90


def test_calibrated_margins_have_a_small_error_and_stretched_ones_a_large_one() -> None:
    margins, p = simulated(20_000, 1.0)
    good, bold = calibration(margins, p), calibration(3 * margins, p)
    assert good.ece < 0.015 < 0.05 < bold.ece
    assert calibration(3 * margins, p, temperature=3.0).ece == pytest.approx(good.ece)


def test_error_against_scalars_and_symmetric_in_the_sides() -> None:
    margins, p = simulated(200, 1.0, seed=5)
    told = calibration(margins, p, bins=5)
    expected = 0.0
    for number in range(5):
        confidences, agreements = [], []
        for m, share in zip(margins, p, strict=True):
            q = 1 / (1 + math.exp(-abs(m)))
            if min(int((q - 0.5) * 10), 4) == number:
                confidences.append(q)
                agreements.append(share if m > 0 else 1 - share)
        if confidences:
            gap = abs(sum(confidences) / len(confidences) - sum(agreements) / len(agreements))
            expected += len(confidences) / 200 * gap
    assert told.ece == pytest.approx(expected)
    assert sum(row.n for row in told.bins) == 200
    assert calibration(-margins, 1 - p, bins=5).ece == pytest.approx(told.ece)


def test_refusals() -> None:
    for margins, p in (([], []), ([1.0], [1.5]), ([float("nan")], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(BadInputError):
            log_loss(np.array(margins), np.array(p))
    with pytest.raises(BadInputError):
        calibration(np.ones(2), np.ones(2), bins=0)
