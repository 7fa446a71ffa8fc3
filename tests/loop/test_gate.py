from __future__ import annotations

import pytest

from corrigible.errors import BadInputError
from corrigible.loop.gate import Gate


def decide(gate: Gate | None = None, **changes: object):
    case = {"win_rate": 0.6, "interval": (0.52, 0.68), "prompts": 100, "kl": 3.0, "length_ratio": 1.1}
    return (gate or Gate()).decide(**{**case, **changes})


def test_promotes_when_the_lower_end_clears_the_bar():
    verdict = decide()
    assert verdict.promoted and verdict.decision == "promote"
    assert all(check.passed for check in verdict.checks)


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"interval": (0.49, 0.70)}, "win rate"),
        ({"interval": (0.5, 0.70)}, "win rate"),  # touching the bar is not above it
        ({"prompts": 19}, "evidence"),
        ({"kl": 51.0}, "drift"),
        ({"length_ratio": 2.5}, "length"),
    ],
)
def test_refuses_and_names_the_check(changes, failed):
    verdict = decide(**changes)
    assert not verdict.promoted
    assert [check.name for check in verdict.checks if not check.passed] == [failed]
    assert len(verdict.reasons) == 1


def test_a_high_point_estimate_does_not_help():
    assert not decide(win_rate=0.9, interval=(0.4, 1.0)).promoted


def test_limits_can_be_switched_off():
    gate = Gate(max_kl=None, max_length_ratio=None)
    assert decide(gate, kl=1e6, length_ratio=50.0).promoted


@pytest.mark.parametrize("interval", [(0.7, 0.8), (0.5, 0.55), (-0.1, 0.7), (0.5, 1.1)])
def test_an_interval_that_is_none_is_an_error(interval):
    with pytest.raises(BadInputError, match="not a rate with an interval"):
        decide(interval=interval)


@pytest.mark.parametrize("bar", [0.0, 1.0, -1.0])
def test_the_bar_must_be_a_rate(bar):
    with pytest.raises(BadInputError, match="min_win_rate"):
        Gate(min_win_rate=bar)
