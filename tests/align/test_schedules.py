"""Learning rates against formulas of their own, and the exact link of ``uba`` to Chebyshev's iteration."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from typing import get_args

import pytest
from pydantic import ValidationError

from corrigible.align import TrainConfig, learning_rate
from corrigible.align.schedules import Phase, Schedule, decay, inverse_sqrt, uba, uba_phases, warmed_up
from corrigible.errors import BadInputError


def chebyshev(total: int, low: float, high: float) -> list[float]:
    """The best ``total`` fixed step sizes for curvatures in [low, high]: 1 / the roots of the polynomial
    (high + low) / 2 - (high - low) / 2 cos(theta), in exact fractions but for the cosine."""
    a, b = Fraction(low), Fraction(high)
    found = []
    for t in range(1, total + 1):
        # 1 - cos(theta), which floats know to 16 digits where the cosine itself has lost them
        gap = Fraction(2.0 * math.sin((2 * t - 1) * math.pi / (4 * total)) ** 2)
        found.append(float(1 / (a + (b - a) / 2 * gap)))
    return found


@pytest.mark.parametrize(("low", "high"), [(0.01, 1.0), (0.3, 0.7), (1e-4, 25.0)])
@pytest.mark.parametrize("total", [1, 7, 100])
def test_uba_is_chebyshevs_iteration(low: float, high: float, total: int) -> None:
    kappa = high / low
    for t, expected in enumerate(chebyshev(total, low, high), start=1):
        theta = (2 * t - 1) * math.pi / (2 * total)
        found = uba(theta, phi=2 * kappa, high=1 / low, low=1 / high)
        assert found == pytest.approx(expected, rel=1e-12)


def test_uba_is_the_published_formula_and_at_two_the_cosine() -> None:
    draw = random.Random(0)
    for share in [0.0, 0.5, 1.0, *(draw.random() for _ in range(500))]:
        assert decay("uba", share, phi=2.0) == pytest.approx(decay("cosine", share), rel=1e-12, abs=1e-15)
        phi, low, high = draw.uniform(0.1, 20.0), draw.uniform(0.0, 0.4), draw.uniform(0.5, 2.0)
        cosine = math.cos(math.pi * share)
        published = (high - low) * 2 * (1 + cosine) / (2 * phi + (2 - phi) * (1 + cosine)) + low
        found = uba(math.pi * share, phi=phi, high=high, low=low)
        assert found == pytest.approx(published, rel=1e-11, abs=1e-14)


def test_uba_by_hand() -> None:
    # theta = pi / 2: 1 + cos = 1, so (high - low) 2 / (phi + 2) + low
    assert uba(math.pi / 2, phi=6.0) == pytest.approx(0.25)
    assert uba(math.pi / 2, phi=6.0, high=5.0, low=1.0) == pytest.approx(2.0)
    assert uba(0.0, phi=0.3) == 1.0
    assert uba(math.pi, phi=7.0, low=0.2) == pytest.approx(0.2)
    # phi -> 0 is constant until the end; a large phi is gone early
    assert uba(math.pi * 0.9, phi=1e-9) == pytest.approx(1.0, abs=1e-6)
    assert uba(math.pi * 0.5, phi=1e3) < 0.01
    shares = [s / 50 for s in range(51)]
    for small, large in itertools.pairwise((0.25, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0)):
        assert all(decay("uba", s, phi=small) >= decay("uba", s, phi=large) for s in shares)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_every_schedule_starts_at_the_peak_and_never_rises(schedule: Schedule) -> None:
    for floor in (0.0, 0.1):
        rates = [
            warmed_up(step, 40, peak=2.0, warmup=8, schedule=schedule, floor=floor, phi=5.0)
            for step in range(40)
        ]
        assert rates[:8] == pytest.approx([2.0 * (step + 1) / 9 for step in range(8)])
        assert rates[8] == 2.0
        assert all(a >= b > 0 for a, b in itertools.pairwise(rates[8:]))
        assert min(rates[8:]) >= 2.0 * floor
        if schedule not in ("constant", "inverse_sqrt", "step"):
            end = decay(schedule, 1.0, floor=floor, phi=5.0)
            assert end == pytest.approx(floor if floor or schedule != "exponential" else 0.01)


def test_the_usual_ones_by_hand() -> None:
    assert [decay("step", s) for s in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert decay("exponential", 0.5) == pytest.approx(0.1)
    assert decay("exponential", 0.5, floor=0.25) == pytest.approx(0.5)
    assert decay("linear", 0.25, floor=0.2) == pytest.approx(0.8)
    assert inverse_sqrt(9, 9) == 1.0
    assert inverse_sqrt(39, 9) == pytest.approx(0.5)


def test_what_was_there_before_is_the_same_to_the_last_bit() -> None:
    """The rates of earlier versions, written out as they were computed."""
    draw = random.Random(1)
    for _ in range(300):
        lr, total = draw.uniform(1e-7, 1e-2), draw.randint(1, 400)
        share_of_warmup = draw.choice([0.0, draw.random()])
        warmup = math.ceil(share_of_warmup * total) if share_of_warmup else 0
        step = draw.randrange(total)
        for schedule in ("constant", "linear", "cosine"):
            config = TrainConfig.model_validate({"lr": lr, "schedule": schedule, "warmup": share_of_warmup})
            if step < warmup:
                expected = lr * (step + 1) / (warmup + 1)
            else:
                share = (step - warmup) / max(total - warmup, 1)
                expected = {
                    "constant": lr,
                    "linear": lr * (1.0 - share),
                    "cosine": lr * 0.5 * (1.0 + math.cos(math.pi * share)),
                }[schedule]
            assert learning_rate(step, total, config) == expected


def test_the_trainer_knows_them_by_name() -> None:
    config = TrainConfig(lr=1.0, schedule="uba", phi=6.0, warmup=0.0)
    assert learning_rate(5, 10, config) == pytest.approx(0.25)
    floored = TrainConfig(lr=1.0, schedule="uba", phi=6.0, warmup=0.0, schedule_floor=0.5)
    assert learning_rate(5, 10, floored) == pytest.approx(0.5 + 0.5 * 0.25)
    with pytest.raises(ValidationError):
        TrainConfig(schedule="cyclic")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        TrainConfig(phi=0.0)


def test_phases_restart() -> None:
    phases = [Phase(4, 1.0), Phase(2, 0.5, 0.1)]
    rates = [uba_phases(step, phases, phi=3.0) for step in range(6)]
    assert rates[0] == 1.0 and rates[4] == 0.5
    assert rates[5] == pytest.approx(uba(math.pi / 2, phi=3.0, high=0.5, low=0.1))
    with pytest.raises(BadInputError, match="end"):
        uba_phases(6, phases, phi=3.0)
    with pytest.raises(BadInputError, match="at least one step"):
        uba_phases(0, [Phase(0, 1.0)], phi=3.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: uba(0.5, phi=0.0),
        lambda: uba(0.5, phi=math.inf),
        lambda: uba(4.0, phi=1.0),
        lambda: decay("linear", 1.5),
        lambda: decay("linear", 0.5, floor=-0.1),
        lambda: decay("inverse_sqrt", 0.5),
    ],
)
def test_numbers_out_of_range_are_refused(call: object) -> None:
    with pytest.raises(BadInputError):
        call()  # type: ignore[operator]
