"""Group advantages against scalar loops in float64, and what missing rewards and ties must not do."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from corrigible.align.advantages import STD_EPSILON, group_advantages, spread
from corrigible.errors import BadInputError, NumericsError

ESTIMATORS = ("mean", "mean_std", "leave_one_out")


def oracle(rewards: list[float], group: list[int], valid: list[bool], estimator: str) -> list[float]:
    """The equations, one answer at a time; no tensors."""
    found = []
    for own, number, live in zip(rewards, group, valid, strict=True):
        mine = [r for r, g, v in zip(rewards, group, valid, strict=True) if g == number and v]
        if not live or len(mine) < 2 or max(mine) == min(mine):
            found.append(0.0)
            continue
        mean = math.fsum(mine) / len(mine)
        if estimator == "mean":
            found.append(own - mean)
        elif estimator == "mean_std":
            found.append((own - mean) / (statistics.stdev(mine) + STD_EPSILON))
        else:
            found.append(own - (math.fsum(mine) - own) / (len(mine) - 1))
    return found


def case(rng: random.Random) -> tuple[list[float], list[int], list[bool]]:
    n = rng.randint(0, 20)
    group = [rng.choice([0, 3, 4, 17]) for _ in range(n)]
    draw = rng.choice([lambda: rng.gauss(0, 3), lambda: float(rng.random() < 0.3), lambda: 0.1])
    valid = [rng.random() < 0.8 for _ in range(n)]
    # What could not be computed is NaN or nonsense, and must not be read.
    return [draw() if v else rng.choice([math.nan, math.inf, 1e9]) for v in valid], group, valid


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_estimators_equal_the_oracle_on_200_ragged_cases(estimator: str) -> None:
    rng = random.Random(11)
    for _ in range(200):
        rewards, group, valid = case(rng)
        found = group_advantages(
            torch.tensor(rewards, dtype=torch.float64),
            torch.tensor(group, dtype=torch.long),
            valid=torch.tensor(valid, dtype=torch.bool),
            estimator=estimator,  # type: ignore[arg-type]
        )
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(oracle(rewards, group, valid, estimator), rel=1e-9, abs=1e-12)


def advantages(rewards: list[float], estimator: str = "mean_std", **options: object) -> list[float]:
    values = torch.tensor(rewards, dtype=torch.float64)
    together = torch.zeros(len(rewards), dtype=torch.long)
    return group_advantages(values, together, estimator=estimator, **options).tolist()  # type: ignore[arg-type]


def test_numbers_of_the_field_guide() -> None:
    assert advantages([1.0, 0.0]) == pytest.approx([0.7070, -0.7070], abs=1e-4)
    assert advantages([1.0, 0.0, 0.0, 0.0], "leave_one_out") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    mean, loo = advantages([3.0, 1.0, 5.0], "mean"), advantages([3.0, 1.0, 5.0], "leave_one_out")
    assert [a * 3 / 2 for a in mean] == pytest.approx(loo)


def test_what_shifting_and_scaling_rewards_changes() -> None:
    rewards = [0.0, 2.0, 7.0]
    for estimator in ESTIMATORS:
        assert advantages([r + 40 for r in rewards], estimator) == pytest.approx(
            advantages(rewards, estimator)
        )
    assert advantages([100 * r for r in rewards]) == pytest.approx(advantages(rewards), rel=1e-3)
    assert advantages([100 * r for r in rewards], "mean") == pytest.approx(
        [100 * a for a in advantages(rewards, "mean")]
    )


def test_a_failed_judge_is_not_a_zero() -> None:
    """Counted as 0, the failure would lower the baseline of the others and be punished itself."""
    valid = torch.tensor([True, True, False])
    found = advantages([4.0, 6.0, 0.0], "mean", valid=valid)
    assert found == [-1.0, 1.0, 0.0]
    assert found != advantages([4.0, 6.0, 0.0], "mean")


@pytest.mark.parametrize("value", [0.1, 1e-12, -7.3, 0.0])
def test_equal_rewards_leave_exactly_nothing(value: float) -> None:
    """0.1 three times has a mean of 0.10000000000000002: rounding must not become an advantage."""
    for estimator in ESTIMATORS:
        assert advantages(
            [value] * 3, estimator, **({"epsilon": 0.0} if estimator == "mean_std" else {})
        ) == [
            0.0,
            0.0,
            0.0,
        ]


def test_spread_names_the_groups_with_something_to_learn_from() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 5.0, 2.0, math.nan])
    group = torch.tensor([9, 9, 2, 2, 4, 7, 7])
    valid = torch.tensor([True] * 6 + [False])
    # sorted: 2 (differ), 4 (one answer), 7 (one valid answer), 9 (equal)
    assert spread(rewards, group, valid=valid).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"rewards": torch.zeros(3)}, BadInputError, "one shape"),
        ({"valid": torch.ones(2)}, BadInputError, "valid booleans"),
        ({"group": torch.zeros(2)}, BadInputError, "integers"),
        ({"rewards": torch.tensor([0.0, math.nan])}, NumericsError, r"reward_not_finite: rewards \[1\]"),
        ({"estimator": "median"}, BadInputError, "median"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, error: type[Exception], says: str) -> None:
    arguments = {"rewards": torch.zeros(2), "group": torch.zeros(2, dtype=torch.long)} | change
    with pytest.raises(error, match=says):
        group_advantages(**arguments)
