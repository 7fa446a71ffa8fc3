"""Scores never hold a made-up number, and the two adapters agree with their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from corrigible.errors import BadInputError, NumericsError
from corrigible.rewards import Preference, Scores, Signal, preference_from_signal, signal_from_preference
from corrigible.rewards.signals import logit, sigmoid


class Numbers:
    """Episodes are plain numbers here; None cannot be scored."""

    name, axis = "numbers", "overall"

    def score(self, episodes: Sequence[Any]) -> Scores:
        return Scores(
            np.array([0.0 if e is None else float(e) for e in episodes]),
            tuple("cannot_judge" if e is None else None for e in episodes),
        )


class FirstIsBetter:
    """Bradley-Terry in the numbers, plus a liking for whatever comes first."""

    def __init__(self, bias: float) -> None:
        self.bias = bias

    def prefer(self, a: Sequence[Any], b: Sequence[Any]) -> np.ndarray:
        return sigmoid(np.asarray(a, dtype=float) - np.asarray(b, dtype=float) + self.bias)


def test_reasons_are_not_numbers() -> None:
    scores = Numbers().score([1, None, 3])
    assert scores.valid.tolist() == [True, False, True]
    assert scores.mean() == 2.0
    with pytest.raises(NumericsError, match="episode 1: cannot_judge"):
        scores.require_all()
    with pytest.raises(NumericsError, match="cannot_judge"):
        Numbers().score([None]).mean()


@pytest.mark.parametrize(
    "bad",
    [
        {"values": np.array([1.0, np.nan])},
        {"values": np.array([np.inf])},
        {"values": np.zeros((2, 1))},
        {"values": np.zeros(2), "reasons": ("timeout",)},
        {"values": np.zeros(2), "uncertainty": np.array([0.1, -0.1])},
        {"values": np.zeros(2), "steps": (np.zeros(1),)},
    ],
)
def test_scores_refuse_what_they_cannot_mean(bad: dict[str, Any]) -> None:
    with pytest.raises((BadInputError, NumericsError)):
        Scores(**bad)


def test_preference_from_signal() -> None:
    preference = preference_from_signal(Numbers(), scale=2.0)
    p = preference.prefer([3, 1, None], [1, 1, 0])
    assert p.tolist() == pytest.approx([1 / (1 + np.exp(-1)), 0.5, 0.5])
    assert isinstance(preference, Preference) and isinstance(Numbers(), Signal)
    with pytest.raises(BadInputError):
        preference_from_signal(Numbers(), scale=0.0)
    with pytest.raises(BadInputError):
        preference.prefer([1], [1, 2])


def test_signal_from_preference_undoes_a_position_bias() -> None:
    signal = signal_from_preference(FirstIsBetter(bias=0.5), [0.0, 1.0])
    scores = signal.score([0.0, 0.5, 2.0])
    fair = signal_from_preference(FirstIsBetter(bias=0.0), [0.0, 1.0]).score([0.5])
    assert fair.values[0] == pytest.approx(0.0)  # half-way between the anchors
    assert scores.values[1] == pytest.approx(0.0, abs=1e-9)
    assert scores.values[0] < scores.values[1] < scores.values[2]
    assert scores.uncertainty is not None and (scores.uncertainty > 0).all()
    with pytest.raises(BadInputError):
        signal_from_preference(FirstIsBetter(0.0), [])


def test_sigmoid_and_logit_are_inverse_and_do_not_overflow() -> None:
    x = np.array([-700.0, -3.0, 0.0, 3.0, 700.0])
    assert np.isfinite(sigmoid(x)).all() and sigmoid(x)[0] >= 0 and sigmoid(x)[-1] <= 1
    assert logit(sigmoid(x[1:4])) == pytest.approx(x[1:4])
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()
